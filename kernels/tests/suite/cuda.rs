//! The seam to CUDA from outside: on a machine with a GPU the kernels must agree with the
//! reference, on one without the answer must be a reason, not a crash.

use rehearsal_kernels::cuda::{self, CudaDevice};

/// Prints past the test harness's capture, so that a skipped test is seen in every log.
fn say(line: &str) {
    use std::io::Write;
    let _ = writeln!(std::io::stderr(), "{line}");
}

#[test]
fn cuda_kernels_agree_with_the_reference_or_are_skipped_aloud() {
    match cuda::devices() {
        Ok(_) => say(&format!("gpu: {}", cuda::self_test().unwrap())),
        Err(reason) => {
            say(&format!("SKIPPED: the cuda kernels were not run, only compiled: {reason}"));
            assert!(reason.starts_with("no cuda device: "), "{reason}");
            assert_eq!(cuda::self_test(), Err(reason.clone()));
            assert_eq!(CudaDevice::open(0).err(), Some(reason));
        }
    }
}

#[test]
fn a_cuda_device_that_does_not_exist_is_refused_with_a_reason() {
    let refused = CudaDevice::open(1_000_000).err().unwrap();
    assert!(refused.contains("cuda device"), "{refused}");
}
