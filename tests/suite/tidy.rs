//! The architecture as a failing test: imports, homes of crates, sizes, head docs, names, the README's tree.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Folder of `src/` and the folders that it may import (docs: architecture, "who may import whom").
const MAY_IMPORT: &[(&str, &[&str])] = &[
    ("actors", &["engine", "data", "rl", "checkpoint", "cluster", "console", "config"]),
    ("plan", &["engine", "train", "model", "cluster", "console", "config"]),
    ("engine", &["train", "inference", "model", "checkpoint", "cluster", "data", "rl", "config"]),
    ("train", &["model", "rl", "data", "cluster", "config"]),
    ("inference", &["model", "data", "rl", "config"]),
    ("model", &["cluster", "config"]),
    ("rl", &["data", "config"]),
    ("checkpoint", &["cluster", "config"]),
    ("data", &["config"]),
    ("cluster", &["config"]),
    ("console", &["config"]),
    ("config", &[]),
];

/// The one file of `src/` with `unsafe`: a mapping of a file into memory, which no safe interface gives.
const MAPS_FILES: &str = "src/checkpoint/mapped.rs";

/// The other: calls of the MPI library.
const CALLS_MPI: &str = "src/cluster/mpi_calls.rs";

/// Outside crates and the places that may use them.
const HOMES: &[(&str, &[&str])] = &[
    ("actix", &["src/actors/"]),
    ("tokio", &["src/actors/", "src/cli/"]),
    ("candle_core", &["src/checkpoint/"]),
    ("cudarc", &["kernels/src/cuda"]),
    ("memmap2", &[MAPS_FILES]),
    ("mpi::ffi", &[CALLS_MPI]),
    ("rmp_serde", &["src/actors/messages.rs", "src/cluster/wire.rs"]),
    ("crossbeam", &["src/actors/worker.rs", "src/cluster/local.rs", "kernels/src/pool.rs"]),
];

const BANNED_NAMES: &[&str] = &["utils", "util", "common", "helpers", "misc", "types", "manager"];

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn files(folder: &str, extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![root().join(folder)];
    while let Some(folder) = folders.pop() {
        let Ok(entries) = std::fs::read_dir(&folder) else { continue };
        for entry in entries {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == extension) {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

fn sources() -> Vec<PathBuf> {
    ["src", "kernels/src", "tests", "kernels/tests"]
        .iter()
        .flat_map(|folder| files(folder, "rs"))
        .collect()
}

fn relative(path: &Path) -> String {
    path.strip_prefix(root()).unwrap().to_string_lossy().into_owned()
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap()
}

fn assert_none(faults: Vec<String>) {
    assert!(faults.is_empty(), "\n{}", faults.join("\n"));
}

#[test]
fn imports_go_down_only() {
    let mut faults = Vec::new();
    for path in files("src", "rs") {
        let name = relative(&path);
        let folder = name.trim_start_matches("src/").split('/').next().unwrap();
        let Some((_, allowed)) = MAY_IMPORT.iter().find(|(from, _)| *from == folder) else {
            continue;
        };
        for (number, line) in read(&path).lines().enumerate() {
            let code = line.split("//").next().unwrap();
            for piece in code.split("crate::").skip(1) {
                let target: String =
                    piece.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
                let known =
                    MAY_IMPORT.iter().any(|(folder, _)| *folder == target) || target == "cli";
                if known && target != folder && !allowed.contains(&target.as_str()) {
                    faults.push(format!("{name}:{}: {folder} may not import {target}", number + 1));
                }
            }
        }
    }
    assert_none(faults);
}

#[test]
fn outside_crates_stay_in_their_homes() {
    let mut faults = Vec::new();
    for path in sources().into_iter().filter(|p| !relative(p).contains("tests/")) {
        let name = relative(&path);
        for (crate_name, homes) in HOMES {
            let uses =
                |line: &str| line.split("//").next().unwrap().contains(&format!("{crate_name}::"));
            if read(&path).lines().any(uses) && !homes.iter().any(|home| name.starts_with(home)) {
                faults.push(format!("{name}: uses {crate_name}, whose home is {homes:?}"));
            }
        }
        if name.starts_with("src/")
            && ![MAPS_FILES, CALLS_MPI].contains(&name.as_str())
            && read(&path)
                .lines()
                .any(|l| l.trim_start().starts_with("unsafe ") || l.contains("unsafe {"))
        {
            faults.push(format!("{name}: unsafe lives in kernels/"));
        }
    }
    assert_none(faults);
}

#[test]
fn every_file_has_a_head_doc_and_at_most_500_lines() {
    let mut faults = Vec::new();
    for path in sources() {
        let text = read(&path);
        if !text.starts_with("//!") {
            faults.push(format!("{}: no head doc", relative(&path)));
        }
        let lines = text.lines().count();
        if lines > 500 {
            faults.push(format!("{}: {lines} lines", relative(&path)));
        }
    }
    for path in files("kernels", "cu") {
        if !read(&path).starts_with("//") {
            faults.push(format!("{}: no head comment", relative(&path)));
        }
    }
    assert_none(faults);
}

#[test]
fn no_file_has_a_name_that_says_nothing() {
    let says_nothing =
        |path: &PathBuf| BANNED_NAMES.contains(&path.file_stem().unwrap().to_str().unwrap());
    let faults = sources().into_iter().filter(says_nothing);
    assert_none(faults.map(|path| relative(&path)).collect());
}

#[test]
fn door_plates_are_short_and_every_file_is_mounted() {
    let mut faults = Vec::new();
    for path in files("src", "rs").into_iter().chain(files("kernels/src", "rs")) {
        let stem = path.file_stem().unwrap().to_str().unwrap().to_string();
        if ["lib", "main"].contains(&stem.as_str()) {
            continue;
        }
        let folder = path.parent().unwrap();
        let (plates, name) = if stem == "mod" {
            let above = folder.parent().unwrap();
            (
                vec![above.join("mod.rs"), above.join("lib.rs")],
                folder.file_name().unwrap().to_str().unwrap().to_string(),
            )
        } else {
            (vec![folder.join("mod.rs"), folder.join("lib.rs"), folder.with_extension("rs")], stem)
        };
        let mounted = plates
            .iter()
            .filter(|p| p.exists())
            .any(|plate| read(plate).contains(&format!("mod {name};")));
        if !mounted {
            faults.push(format!("{}: no door plate mounts it", relative(&path)));
        }
    }
    assert_none(faults);
}

#[test]
fn every_cuda_kernel_has_its_operation() {
    let faults = files("kernels", "cu").into_iter().filter(|path| {
        let stem = path.file_stem().unwrap().to_str().unwrap();
        !root().join(format!("kernels/src/ops/{stem}.rs")).exists()
    });
    assert_none(
        faults.map(|p| format!("{}: no kernels/src/ops file of that stem", relative(&p))).collect(),
    );
}

#[test]
fn every_config_passes_the_plan_check() {
    let mut faults = Vec::new();
    for extension in ["toml", "json"] {
        for path in files("configs", extension) {
            let output = Command::new(env!("CARGO_BIN_EXE_rehearsal"))
                .arg("check")
                .arg(&path)
                .arg("--plan-only")
                .output()
                .unwrap();
            if !output.status.success() {
                faults.push(format!(
                    "{}: {}",
                    relative(&path),
                    String::from_utf8_lossy(&output.stderr)
                ));
            }
        }
    }
    assert_none(faults);
}

#[test]
fn the_readmes_tree_is_the_tree() {
    let readme = read(&root().join("README.md"));
    let tree = readme
        .split("<!-- tree -->")
        .nth(1)
        .expect("README has its tree between two <!-- tree --> marks");
    let listed: BTreeSet<String> = listed_paths(tree);
    let tracked = Command::new("git")
        .args(["ls-files", "--cached", "--others", "--exclude-standard"])
        .current_dir(root())
        .output();
    let Ok(tracked) = tracked else { return };
    let wanted: BTreeSet<String> = String::from_utf8(tracked.stdout)
        .unwrap()
        .lines()
        .filter(|p| {
            p.ends_with(".rs")
                || p.ends_with(".cu")
                || p.ends_with(".toml") && p.starts_with("configs/")
                || p.starts_with("docs/")
                || p.starts_with(".ci/")
        })
        .filter(|p| root().join(p).exists())
        .map(str::to_string)
        .collect();
    let missing: Vec<_> =
        wanted.difference(&listed).map(|p| format!("{p} is not in the README's tree")).collect();
    let dead: Vec<_> = listed
        .iter()
        .filter(|p| !root().join(p).exists())
        .map(|p| format!("{p} is in the README's tree only"))
        .collect();
    assert_none(missing.into_iter().chain(dead).collect());
}

#[test]
fn links_between_pages_lead_to_files() {
    let pages = ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "benches/peers/README.md"]
        .map(|page| root().join(page));
    let mut faults = Vec::new();
    for page in pages.into_iter().chain(files("docs", "md")) {
        let text = read(&page);
        let targets = text.split("](").skip(1).filter_map(|rest| rest.split([')', '#']).next());
        let is_dead = |target: &&str| {
            !target.is_empty() && !target.contains("://") && !page.with_file_name(target).exists()
        };
        faults.extend(targets.filter(is_dead).map(|to| format!("{}: no {to}", relative(&page))));
    }
    assert_none(faults);
}

/// Paths of a tree drawn by indentation: two blanks a level, folders end with a slash, a purpose follows.
fn listed_paths(tree: &str) -> BTreeSet<String> {
    let mut folders: Vec<String> = Vec::new();
    let mut paths = BTreeSet::new();
    for line in tree.lines().filter(|l| !l.trim().is_empty() && !l.starts_with("```")) {
        let depth = (line.len() - line.trim_start().len()) / 2;
        let name = line.split_whitespace().next().unwrap();
        folders.truncate(depth);
        if name.ends_with('/') {
            folders.push(name.to_string());
        } else {
            paths.insert(format!("{}{name}", folders.concat()));
        }
    }
    paths
}
