//! Ranks for tests: this test binary, started by mpirun as often as a check wants, or the program itself.
//!
//! Knows no check. What mpirun wants to be told on a machine with few cores and a privileged user is told here, not asked of
//! people.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Output};

/// Names the check that a rank is to make.
pub const CHECK: &str = "REHEARSAL_RANK_CHECK";

/// mpirun for so many ranks, without the program.
pub fn mpirun(ranks: usize, options: &[&str]) -> Command {
    mpirun_at(Path::new("mpirun"), ranks, options)
}

/// The same of another MPI library than the one that is found first.
pub fn mpirun_at(launcher: &Path, ranks: usize, options: &[&str]) -> Command {
    let mut command = Command::new(launcher);
    // No test takes nearly as long; one that hangs is to end with all its processes.
    command.args(options).args(["--timeout", "120", "--oversubscribe", "-n", &ranks.to_string()]);
    for allowed in ["OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"] {
        command.env(allowed, "1");
    }
    command.current_dir(env!("CARGO_MANIFEST_DIR"));
    command
}

/// Lets so many ranks make a check of `processes::as_a_rank`.
pub fn check_command(ranks: usize, options: &[&str], check: &str) -> Command {
    checked(mpirun(ranks, options), check)
}

/// Lets the ranks of a launcher make a check of `processes::as_a_rank`.
pub fn checked(mut command: Command, check: &str) -> Command {
    command.arg(std::env::current_exe().unwrap());
    command.args(["processes::as_a_rank", "--exact", "--nocapture", "--test-threads=1"]);
    command.env(CHECK, check);
    command
}

/// The same, made.
pub fn ranks_check(ranks: usize, check: &str) -> Output {
    check_command(ranks, &[], check).output().expect("mpirun is installed: .ci/run does it")
}

/// What all ranks wrote, both streams.
pub fn text(output: &Output) -> String {
    let [out, err] = [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text));
    format!("{out}{err}")
}

/// Says that a test is left out: aloud, where cargo keeps the words of tests that pass to itself.
pub fn skipped(why: &str) {
    // Nobody may read it.
    let _ = writeln!(std::io::stderr(), "SKIPPED: {why}");
}
