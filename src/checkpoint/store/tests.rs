//! Tests of the store: every truncation, every flipped byte, every partial folder, and a kill at
//! every point.

use super::*;
use crate::checkpoint::tensors::{MODEL_FILE, TensorEntry, TensorFolder, write_tensors};
use std::collections::BTreeMap;
use std::process::Command;

fn manifest(step: u64) -> Manifest {
    Manifest {
        stage: "sft".to_string(),
        stage_index: 1,
        step,
        policy_version: step,
        optimizer_step: step,
        seed: 7,
        config_identity: "c0ffee".to_string(),
        ..Manifest::default()
    }
}

fn write_model(folder: &Path, value: f32) -> Result<()> {
    let entries = ["a", "b"].map(|name| TensorEntry { name: name.to_string(), shape: vec![2, 3] });
    write_tensors(&folder.join(MODEL_FILE), &entries, &mut |_| Ok(vec![value; 6]))?;
    std::fs::write(folder.join("config.json"), "{}\n")?;
    Ok(())
}

fn commit(store: &mut Store, step: u64) -> Result<Commit> {
    let staging = store.begin(&format!("sft-{step}"))?;
    write_model(staging.path(), step as f32)?;
    store.commit(staging, manifest(step))
}

fn run_with(steps: &[u64], keep: usize) -> (tempfile::TempDir, Store) {
    let run = tempfile::tempdir().expect("a temporary folder");
    let mut store = Store::open(run.path(), keep).expect("a store");
    for step in steps {
        commit(&mut store, *step).expect("a commit");
    }
    (run, store)
}

fn names(store: &Store) -> Vec<String> {
    list_files(&store.checkpoints).expect("a folder").into_iter().collect()
}

fn newest_step(store: &mut Store) -> Option<u64> {
    store.latest().expect("a whole checkpoint, or none").commit.map(|commit| commit.manifest.step)
}

#[test]
fn a_commit_comes_back_and_old_ones_go() {
    let (_run, mut store) = run_with(&[10, 20, 30], 2);
    assert_eq!(names(&store), ["000002-sft-20", "000003-sft-30"]);
    let found = store.latest().expect("a checkpoint");
    let commit = found.commit.expect("a checkpoint");
    assert_eq!(found.rejected, []);
    let mut expected = manifest(30);
    expected.record_files(&commit.folder, BTreeMap::new()).expect("files");
    assert_eq!(commit.manifest, expected);
    let tensors = TensorFolder::open(&commit.folder).expect("tensors");
    assert_eq!(tensors.read_f32("b").expect("numbers"), [30.0; 6]);
}

#[test]
fn a_run_without_a_commit_has_none() {
    let (_run, mut store) = run_with(&[], 2);
    assert_eq!(store.latest().expect("nothing is no error"), Latest::default());
}

#[test]
fn every_flipped_byte_of_every_file_is_found() {
    let (_run, mut store) = run_with(&[10], 1);
    let folder = store.latest().expect("a checkpoint").commit.expect("a checkpoint").folder;
    let mut flips = 0;
    for name in list_files(&folder).expect("files") {
        let path = folder.join(&name);
        let whole = std::fs::read(&path).expect("a file");
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            // One bit, and another one for every byte: 0x20 also turns a digit's letter into its
            // capital.
            bytes[at] ^= [1, 0x20, 0x80][at % 3];
            std::fs::write(&path, &bytes).expect("a damaged file");
            let error = Manifest::verify(&folder).expect_err("a flipped byte must be found");
            let text = format!("{error:#}");
            assert!(text.contains(&name) || name == MANIFEST_FILE, "byte {at} of {name}: {text}");
            assert!(
                matches!(error.downcast_ref(), Some(Fault::User(_))),
                "byte {at} of {name}: {text}"
            );
            flips += 1;
        }
        std::fs::write(&path, &whole).expect("the file restored");
    }
    assert!(flips > 500, "only {flips} bytes were flipped");
    Manifest::verify(&folder).expect("the restored checkpoint is whole");
}

#[test]
fn every_truncation_of_every_file_is_found() {
    let (_run, mut store) = run_with(&[10], 1);
    let folder = store.latest().expect("a checkpoint").commit.expect("a checkpoint").folder;
    for name in list_files(&folder).expect("files") {
        let path = folder.join(&name);
        let whole = std::fs::read(&path).expect("a file");
        for length in 0..whole.len() {
            std::fs::write(&path, &whole[..length]).expect("a truncated file");
            let error = store.latest().expect_err("a truncated checkpoint must be refused");
            assert!(
                matches!(error.downcast_ref(), Some(Fault::User(_))),
                "{name} cut at {length}: {error:#}"
            );
        }
        std::fs::write(&path, [&whole[..], b"x"].concat()).expect("a longer file");
        store.latest().expect_err("a file that grew must be refused");
        std::fs::write(&path, &whole).expect("the file restored");
    }
    assert_eq!(newest_step(&mut store), Some(10));
}

#[test]
fn of_a_folder_with_some_of_its_files_only_the_whole_one_counts() {
    let (_run, mut store) = run_with(&[10, 20], 2);
    let folder = store.latest().expect("a checkpoint").commit.expect("a checkpoint").folder;
    let files: Vec<(PathBuf, Vec<u8>)> = list_files(&folder)
        .expect("files")
        .iter()
        .map(|name| (folder.join(name), std::fs::read(folder.join(name)).expect("a file")))
        .collect();
    for present in 0..1 << files.len() {
        for (index, (path, bytes)) in files.iter().enumerate() {
            match present >> index & 1 {
                1 => std::fs::write(path, bytes).expect("a file"),
                _ => drop(std::fs::remove_file(path)),
            }
        }
        let whole = present == (1 << files.len()) - 1;
        let found = store.latest().expect("the older one is whole");
        let step = found.commit.expect("a checkpoint").manifest.step;
        assert_eq!(step, if whole { 20 } else { 10 }, "files {present:b}");
        assert_eq!(found.rejected.len(), usize::from(!whole), "files {present:b}");
    }
}

#[test]
fn a_stray_file_that_would_change_what_is_loaded_is_refused() {
    let (_run, mut store) = run_with(&[10], 1);
    let folder = store.latest().expect("a checkpoint").commit.expect("a checkpoint").folder;
    std::fs::write(folder.join("notes.txt"), "mine").expect("a note");
    assert_eq!(newest_step(&mut store), Some(10));
    std::fs::write(folder.join("model.safetensors.index.json"), r#"{"weight_map":{}}"#)
        .expect("an index");
    let error = TensorFolder::open(&folder).expect_err("a stray index must be refused");
    assert!(format!("{error:#}").contains("index.json"), "{error:#}");
}

#[test]
fn a_damaged_newest_falls_back_loudly_and_goes_with_the_next_commit() {
    let (_run, mut store) = run_with(&[10, 20], 2);
    let newest = store.checkpoints.join("000002-sft-20");
    std::fs::write(newest.join(MODEL_FILE), "short").expect("a damaged file");
    let found = store.latest().expect("the older one is whole");
    assert_eq!(found.commit.expect("a checkpoint").manifest.step, 10);
    assert_eq!(found.rejected[0].folder, newest);
    assert!(found.rejected[0].reason.contains(MODEL_FILE), "{}", found.rejected[0].reason);
    commit(&mut store, 20).expect("a commit");
    assert_eq!(names(&store), ["000001-sft-10", "000003-sft-20"]);
}

#[test]
fn all_damaged_is_the_users_to_decide_and_names_every_file() {
    let (_run, mut store) = run_with(&[10, 20], 2);
    for name in names(&store) {
        std::fs::write(store.checkpoints.join(name).join("config.json"), "[]")
            .expect("a damaged file");
    }
    let error = store.latest().expect_err("none is whole");
    let text = format!("{error:#}");
    assert!(matches!(error.downcast_ref(), Some(Fault::User(_))), "{text}");
    assert!(
        text.contains("000001-sft-10/config.json") && text.contains("000002-sft-20/config.json"),
        "{text}"
    );
    assert_eq!(names(&store).len(), 2, "nothing is lost");
}

#[test]
fn a_full_disk_keeps_the_checkpoint_before_and_leaves_no_rubbish() {
    let (_run, mut store) = run_with(&[10], 1);
    let staging = store.begin("sft-20").expect("a folder");
    std::os::unix::fs::symlink("/dev/full", staging.path().join(MODEL_FILE)).expect("a full place");
    let error = write_model(staging.path(), 20.0).expect_err("no room");
    assert!(matches!(error.downcast_ref(), Some(Fault::Resources(_))), "{error:#}");
    drop(staging);
    assert_eq!(names(&store), ["000001-sft-10"]);
    assert_eq!(newest_step(&mut store), Some(10));
}

#[test]
fn a_stage_name_cannot_leave_the_folder() {
    let (_run, store) = run_with(&[], 1);
    for name in ["../x-1", "a/b-1", "a\n-1"] {
        let error = store.begin(name).expect_err("a name that leaves the folder");
        assert!(matches!(error.downcast_ref(), Some(Fault::User(_))), "{error:#}");
    }
}

#[test]
fn an_artefact_replaces_the_one_of_an_interrupted_run() {
    let (run, store) = run_with(&[], 1);
    for value in [1.0, 2.0] {
        let staging = store.begin_artefact("01-sft").expect("a folder");
        write_model(staging.path(), value).expect("a model");
        let path = store.finish_artefact(staging, manifest(1)).expect("an artefact");
        assert_eq!(path, run.path().join("stages/01-sft"));
        assert_eq!(
            TensorFolder::open(&path).expect("tensors").read_f32("a").expect("numbers"),
            [value; 6]
        );
    }
    assert_eq!(list_files(&store.stages).expect("a folder").len(), 1);
}

/// Body of the process that [`killed_anywhere_the_newest_whole_checkpoint_is_found`] kills; does
/// nothing otherwise.
#[test]
fn child_that_commits_until_it_is_killed() {
    let Some(run) = std::env::var_os("REHEARSAL_TEST_RUN") else { return };
    let mut store = Store::open(Path::new(&run), 1).expect("a store");
    let done = newest_step(&mut store).unwrap_or(0);
    commit(&mut store, done + 1).expect("a commit");
}

#[test]
fn killed_anywhere_the_newest_whole_checkpoint_is_found() {
    // Each point with the step that must be found after the kill: before the rename the old one,
    // after it the new one.
    let points = [
        ("checkpoint-begin", 1),
        ("checkpoint-write:1", 1),
        ("checkpoint-write:2", 1),
        ("checkpoint-before-manifest", 1),
        ("checkpoint-before-rename", 1),
        ("checkpoint-after-rename", 2),
        ("checkpoint-mid-prune", 2),
    ];
    for (point, found) in points {
        let (run, mut store) = run_with(&[1], 1);
        let child = |point: Option<&str>| {
            let mut command = Command::new(std::env::current_exe().expect("this test's binary"));
            command.args([
                "--exact",
                "checkpoint::store::tests::child_that_commits_until_it_is_killed",
            ]);
            command.env("REHEARSAL_TEST_RUN", run.path()).env_remove("REHEARSAL_FAIL_AT");
            if let Some(point) = point {
                command.env("REHEARSAL_FAIL_AT", point);
                command.env("REHEARSAL_FAIL_WITNESS", run.path().join("witness"));
            }
            command.output().expect("the child runs").status.success()
        };
        assert!(!child(Some(point)), "{point} must kill");
        let witness = std::fs::read_to_string(run.path().join("witness")).expect("a witness");
        assert_eq!(witness.trim(), point.split(':').next().expect("a name"));
        assert_eq!(newest_step(&mut store), Some(found), "{point}");
        assert!(child(None), "the run goes on after {point}");
        assert_eq!(newest_step(&mut store), Some(found + 1), "{point}");
        assert_eq!(names(&store).len(), 1, "{point} left rubbish: {:?}", names(&store));
    }
}
