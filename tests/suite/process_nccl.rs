//! Runs whose exchanges go over NCCL: the run that they make over MPI, to the bit; or, where there are not GPUs enough, why they
//! are none, on all ranks and before anything is trained.

use crate::mpirun::{skipped, text};
use crate::process_runs::{check_failed, over};
use crate::runs::{done, events, steps};
use serde_json::Value;
use std::path::Path;
use tempfile::TempDir;

fn losses(out: &Path) -> Vec<Value> {
    steps(out).iter().map(|step| step["loss"].clone()).collect()
}

#[test]
fn a_process_run_over_nccl_is_the_one_over_mpi_or_is_refused_and_skipped_aloud() {
    let folder = TempDir::new().unwrap();
    let out = folder.path().join("over-nccl");
    let layout = ["cluster.data=2", "cluster.expert=2", "cluster.backend=nccl"];
    let output = over(2, &out, &layout).output().unwrap();
    if output.status.success() {
        let told = events(&out, "run").pop().unwrap()["processes"].to_string();
        assert!(told.contains("exchanges go over NCCL, between cuda 0"), "{told}");
        let other = folder.path().join("over-mpi");
        done(over(2, &other, &layout[..2]));
        return assert_eq!(losses(&out), losses(&other));
    }
    let reasons: &[&str] = match cfg!(feature = "cuda") {
        true => &["no cuda device: ", "NCCL is not there: ", "have the same GPU, "],
        false => &["wants a build with `--features cuda,mpi`"],
    };
    let said = text(&output);
    let reason = reasons.iter().find(|reason| said.contains(**reason));
    let reason = reason.unwrap_or_else(|| panic!("refused for another reason: {said}"));
    assert_eq!(output.status.code(), Some(2), "{said}");
    check_failed(&output, &out, &["cluster.backend", "exchanges", "over MPI"]);
    assert!(!said.contains(" is gone"), "a rank left before the others knew why: {said}");
    assert!(!out.exists(), "a run that is refused leaves no folder");
    skipped(&format!("no run went over NCCL: {reason}"));
}
