//! Checkpoints of several processes under mpirun: killed in a commit, gone on with in other layouts, and a full disk on one.

use crate::mpirun::{mpirun, text};
use crate::process_runs::{check_failed, check_is_the_run_of_one, over, program, rank};
use crate::runs::{contents, done, smoke_with};
use std::path::Path;
use std::process::{Command, Output};
use tempfile::TempDir;

/// Commits often.
const OFTEN: &str = "checkpoint.every_steps=3";

/// Two data ranks that share experts, in each of two stages.
const FOUR: [&str; 5] = [
    "cluster.data=2",
    "cluster.pipeline=2",
    "cluster.expert=2",
    "cluster.schedule=\"zb-h1\"",
    OFTEN,
];

/// The smoke run over four, the `odd` one of which is started by `words` before its program.
fn over_four(out: &Path, odd: usize, words: &[&str]) -> Command {
    // Files in shared memory would be under the limit of files, too.
    let mut command = mpirun(1, &["--mca", "btl", "self,tcp"]);
    for place in 0..4 {
        if place > 0 {
            command.args([":", "-n", "1"]);
        }
        let words = if place == odd { words } else { &[] };
        command.args(words).args(rank(&program(), out, &FOUR, &[]));
    }
    command
}

/// What a run over four says that is killed at a failpoint of one of them.
fn killed(out: &Path, odd: usize, point: &str) -> Output {
    let witness = out.with_extension("witness");
    let point_is = format!("REHEARSAL_FAIL_AT={point}");
    let witness_is = format!("REHEARSAL_FAIL_WITNESS={}", witness.display());
    let output = over_four(out, odd, &["env", &point_is, &witness_is]).output().unwrap();
    let seen = std::fs::read_to_string(witness).unwrap_or_default();
    assert_eq!(seen.trim(), point.split(':').next().unwrap(), "{}", text(&output));
    output
}

#[test]
fn processes_that_are_killed_in_a_commit_go_on_in_another_layout() {
    let folder = TempDir::new().unwrap();
    let stages = ["cluster.pipeline=2", "cluster.schedule=\"zb-h1\"", OFTEN];
    for (odd, point) in [
        (2, "checkpoint-own-written:3"),
        (0, "checkpoint-before-rename:2"),
        (3, "checkpoint-write:40"),
    ] {
        let out = folder.path().join(format!("killed-{odd}"));
        let output = killed(&out, odd, point);
        check_failed(&output, &out, &[]);
        let shards = |stem: &str| {
            let names = contents(&out.join("checkpoints")).into_keys();
            names
                .filter(|path| path.file_name().unwrap().to_str().unwrap().starts_with(stem))
                .count()
        };
        assert!(shards("model-") >= 4 && shards("optimizer-") >= 4, "four have committed");
        match odd {
            0 => done(smoke_with(&out, &[OFTEN])),
            _ => done(over(2, &out, &stages)),
        };
        check_is_the_run_of_one(&out);
    }
}

#[test]
fn a_full_disk_on_one_process_ends_all_by_its_name_and_the_run_goes_on_when_there_is_room() {
    let folder = TempDir::new().unwrap();
    let out = folder.path().join("run");
    check_failed(&killed(&out, 2, "checkpoint-own-written:3"), &out, &[]);
    let before = contents(&out.join("checkpoints"));
    // What a file of this process may have at most is less than a shard; the signal for it is ignored.
    let limited = ["sh", "-c", "trap '' XFSZ; ulimit -f 20; exec \"$0\" \"$@\""];
    let output = over_four(&out, 1, &limited).output().unwrap();
    assert_eq!(output.status.code(), Some(4), "{}", text(&output));
    // mpirun ends those that are still there when the first one goes, perhaps before they can tell.
    let named = "ends: rank 1: no room left to write";
    let shard = "-00002-of-00004.safetensors";
    check_failed(&output, &out, &[named, shard, "free some space", "--resume"]);
    assert!(!text(&output).contains("rank 2: rank 1"), "named once: {}", text(&output));
    // The commit before is as it was; what was begun is cleared away by the next start.
    let whole =
        |(path, _): &(std::path::PathBuf, Vec<u8>)| !path.to_str().unwrap().contains("tmp-");
    let after = contents(&out.join("checkpoints")).into_iter().filter(whole);
    let before = before.into_iter().filter(whole);
    assert!(after.eq(before), "what was committed is there");
    done(over(2, &out, &["cluster.data=2", OFTEN]));
    check_is_the_run_of_one(&out);
}
