//! The table of the head doc, row by row, and two runs in one folder.

use super::super::failure::exit_code;
use super::super::loaded;
use super::*;
use crate::config::RunConfig;

fn typed() -> TypedCommand {
    TypedCommand { directory: "/".into(), words: vec!["rehearsal".into(), "run".into()] }
}

fn ready(path: &Path, assignments: &[&str], wish: Wish) -> RunFolder {
    match open(path, &loaded(assignments), wish, typed()).unwrap() {
        Opened::Ready(folder) => folder,
        Opened::Finished => panic!("the run is not finished"),
    }
}

fn refusal(path: &Path, assignments: &[&str], wish: Wish) -> String {
    let before = names(path);
    let fault = open(path, &loaded(assignments), wish, typed()).expect_err("it must be refused");
    assert_eq!(exit_code(&fault), 2);
    assert_eq!(names(path), before, "a refusal writes nothing");
    fault.to_string().replace(&path.display().to_string(), "OUT")
}

fn names(path: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(path) else { return Vec::new() };
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

#[test]
fn a_new_or_empty_folder_starts_whatever_was_wished() {
    let place = tempfile::tempdir().unwrap();
    for (number, wish) in [Wish::Plain, Wish::Resume, Wish::Fresh].into_iter().enumerate() {
        let absent = place.path().join(format!("deep/absent-{number}"));
        let folder = ready(&absent, &[], wish);
        assert!(!folder.resumed && folder.moved.is_none());
        assert_eq!(names(&absent), ["config.toml", "lock", "run.json"]);
        let empty = place.path().join(format!("empty-{number}"));
        std::fs::create_dir(&empty).unwrap();
        assert!(!ready(&empty, &[], wish).resumed);
    }
}

#[test]
fn an_unfinished_run_of_the_same_config_resumes() {
    let place = tempfile::tempdir().unwrap();
    let out = place.path().join("run");
    drop(ready(&out, &[], Wish::Plain));
    assert!(ready(&out, &[], Wish::Plain).resumed);
    assert!(ready(&out, &[], Wish::Resume).resumed);
    assert!(ready(&out, &["engine.threads=1", "console.mode=off"], Wish::Resume).resumed);
}

#[test]
fn another_gate_goes_on_and_is_written_into_the_runs_config() {
    let place = tempfile::tempdir().unwrap();
    let out = place.path().join("run");
    let gate = |minimum: &str| format!("stage.sft.gate={{eval=\"solved\", minimum={minimum}}}");
    drop(ready(&out, &[&gate("0.9")], Wish::Plain));
    let text = || std::fs::read_to_string(out.join("config.toml")).unwrap();
    assert!(text().contains("minimum = 0.9"));
    assert!(ready(&out, &[&gate("0.1")], Wish::Resume).resumed);
    assert!(text().contains("minimum = 0.1") && !text().contains("minimum = 0.9"));
    assert!(ready(&out, &[], Wish::Resume).resumed);
    assert!(!text().contains("minimum = 0.1"));
    let both = [&gate("0.1"), "seed=4"];
    assert!(refusal(&out, &both, Wish::Resume).contains("(seed differs)"));
}

#[test]
fn the_record_keeps_the_command_that_goes_on() {
    let place = tempfile::tempdir().unwrap();
    let out = place.path().join("run");
    drop(ready(&out, &[], Wish::Plain));
    let record: RunRecord =
        serde_json::from_slice(&std::fs::read(out.join("run.json")).unwrap()).unwrap();
    assert_eq!(record.resume, Some(typed()));
    let shown = crate::console::next_steps::resume_command(&out).unwrap();
    assert_eq!(shown, "cd / && rehearsal run");
}

#[test]
fn a_place_that_can_be_no_folder_is_the_users_to_change() {
    let place = tempfile::tempdir().unwrap();
    std::fs::write(place.path().join("file"), "x").unwrap();
    let text = refusal(&place.path().join("file/sub"), &[], Wish::Plain);
    assert!(text.ends_with("choose another place with --out"), "{text}");
}

#[test]
fn a_finished_run_ends_at_once_on_resume_and_is_kept_otherwise() {
    let place = tempfile::tempdir().unwrap();
    let out = place.path().join("run");
    ready(&out, &[], Wish::Plain).finish().unwrap();
    assert!(matches!(open(&out, &loaded(&[]), Wish::Resume, typed()).unwrap(), Opened::Finished));
    assert_eq!(
        refusal(&out, &[], Wish::Plain),
        "OUT holds this run, finished; use --fresh to move it aside and start anew, or choose another --out"
    );
}

#[test]
fn a_run_of_another_config_is_refused_with_what_differs() {
    let place = tempfile::tempdir().unwrap();
    let out = place.path().join("run");
    drop(ready(&out, &[], Wish::Plain));
    for wish in [Wish::Plain, Wish::Resume] {
        assert_eq!(
            refusal(&out, &["seed=4", "engine.threads=1"], wish),
            "OUT holds a run of another config (seed differs); use --fresh to move it aside and start anew, or choose another --out"
        );
    }
    let many =
        ["seed=4", "stage.sft.batch=2", "stage.align.reward.1.weight=0", "checkpoint.keep=5"];
    let text = refusal(&out, &many, Wish::Plain);
    assert!(text.contains(" more differ)") && text.contains("seed"), "{text}");
}

#[test]
fn fresh_moves_the_old_run_aside_and_loses_nothing_of_it() {
    let place = tempfile::tempdir().unwrap();
    let out = place.path().join("run");
    for number in 1..=2 {
        drop(ready(&out, &[], Wish::Plain));
        std::fs::write(out.join("journal.jsonl"), format!("{number}")).unwrap();
        let folder = ready(&out, &["seed=9"], Wish::Fresh);
        let aside = place.path().join(format!("run.old-{number}"));
        assert_eq!(folder.moved.as_deref(), Some(aside.as_path()));
        assert_eq!(
            std::fs::read_to_string(aside.join("journal.jsonl")).unwrap(),
            format!("{number}")
        );
        assert_eq!(names(&out), ["config.toml", "lock", "run.json"]);
        drop(folder);
        std::fs::remove_dir_all(&out).unwrap();
    }
}

#[test]
fn a_folder_that_is_no_run_is_never_touched() {
    let place = tempfile::tempdir().unwrap();
    let out = place.path().join("thesis");
    std::fs::create_dir(&out).unwrap();
    std::fs::write(out.join("chapter.tex"), "work of years").unwrap();
    for wish in [Wish::Plain, Wish::Resume, Wish::Fresh] {
        assert_eq!(
            refusal(&out, &[], wish),
            "OUT is no run folder (it has no run.json) and is not empty; choose another --out"
        );
    }
    std::fs::remove_file(out.join("chapter.tex")).unwrap();
    std::fs::write(out.join("config.toml"), "mine").unwrap();
    refusal(&out, &[], Wish::Fresh);
    let file = place.path().join("file");
    std::fs::write(&file, "x").unwrap();
    refusal(&file, &[], Wish::Fresh);
    std::fs::remove_file(out.join("config.toml")).unwrap();
    std::fs::write(out.join("run.json"), "{").unwrap();
    assert!(refusal(&out, &[], Wish::Fresh).contains("no record of a run"));
}

#[test]
fn a_start_that_was_killed_before_its_record_counts_as_empty() {
    let place = tempfile::tempdir().unwrap();
    for left in [&["lock"][..], &["lock", "config.toml"], &["lock", "config.toml", "run.json.tmp"]]
    {
        let out = place.path().join(left.len().to_string());
        std::fs::create_dir(&out).unwrap();
        for name in left {
            std::fs::write(out.join(name), "").unwrap();
        }
        assert!(!ready(&out, &[], Wish::Resume).resumed);
    }
}

#[test]
fn two_runs_in_one_folder_are_refused_until_the_first_ends() {
    let place = tempfile::tempdir().unwrap();
    let out = place.path().join("run");
    let first = ready(&out, &[], Wish::Plain);
    let me = std::process::id();
    for wish in [Wish::Plain, Wish::Resume, Wish::Fresh] {
        assert_eq!(
            refusal(&out, &[], wish),
            format!(
                "another run works in OUT (process {me}); wait for it, stop it, or choose another --out"
            )
        );
    }
    drop(first);
    assert!(ready(&out, &[], Wish::Plain).resumed);
}

#[test]
fn the_written_config_is_whole_and_runs_again() {
    let place = tempfile::tempdir().unwrap();
    let out = place.path().join("run");
    drop(ready(&out, &["stage.align.steps=7"], Wish::Plain));
    let again = RunConfig::load(&out.join("config.toml"), &[]).unwrap().config;
    assert_eq!(again.stages.len(), loaded(&[]).config.stages.len());
    let text = std::fs::read_to_string(out.join("config.toml")).unwrap();
    assert!(text.contains("steps = 7") && text.contains("deadline_seconds"), "{text}");
}
