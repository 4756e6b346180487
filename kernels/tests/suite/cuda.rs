//! The seam to CUDA from outside: on a machine with a GPU the kernels must agree with the
//! reference, on one without the answer must be a reason, not a crash.

use rehearsal_kernels::cuda::{self, CudaDevice, NcclCommunicator, NcclDevice, PinnedMemory};
use rehearsal_kernels::{Arena, Below, CpuKernels, DType, Kernels, Kind, SlabCopy, below};
use std::time::{Duration, Instant};

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

#[test]
fn a_slab_comes_back_from_page_locked_memory_bit_for_bit_or_is_skipped_aloud() {
    let memory = match PinnedMemory::open(0) {
        Ok(memory) => memory,
        Err(reason) => {
            say(&format!("SKIPPED: page-locked memory was not asked for: {reason}"));
            return assert!(reason.starts_with("no cuda device: "), "{reason}");
        }
    };
    let arena = Arena::new(None);
    let kernels = CpuKernels::new(1, arena.clone());
    let owner = arena.owner("reference", Kind::Weights);
    // A whole piece and a part of one.
    let (rows, cols) = (below::PIECE / 20 + 11, 5);
    let mut slab = arena.slab(owner, DType::F32, &[(rows, cols)]).unwrap();
    let values: Vec<f32> = (0..rows * cols).map(|i| (i as f32).sin()).collect();
    kernels.upload(&values, &mut slab.tensor_mut(0));
    let (form, path) = ((slab.dtype(), slab.shapes()), std::env::temp_dir().join("not-written"));
    let copy = SlabCopy::write(&slab.reader(), form, &path, Below::Host(&memory), &|| true);
    let copy = copy.unwrap().unwrap();
    assert!(!path.exists(), "it is in memory");
    let mut back = arena.slab(owner, copy.dtype(), copy.shapes()).unwrap();
    assert!(copy.read(&mut back, &|| true).unwrap());
    assert!(kernels.download(&back.tensor(0)) == values);
}

/// Polls until something is through.
fn settle(communicator: &mut NcclCommunicator) {
    let began = Instant::now();
    while !communicator.poll().unwrap() {
        assert!(began.elapsed() < Duration::from_secs(60), "NCCL does not answer");
        std::thread::yield_now();
    }
}

/// Joins as one of several ranks and sends each, itself too, payloads of other lengths in each round.
fn exchange_with_all(device: NcclDevice, id: &[u8], rank: usize, ranks: usize) {
    let payload = |from: usize, to: usize, round: usize| -> Vec<u8> {
        (0..1000 * (round + 1) + 7 * to).map(|i| (i * 31 + from * 7 + round) as u8).collect()
    };
    let mut communicator = device.connect(id, rank, ranks).unwrap();
    settle(&mut communicator);
    for round in [0, 400, 3] {
        let out: Vec<_> = (0..ranks).map(|to| (to, payload(rank, to, round))).collect();
        let into: Vec<_> =
            (0..ranks).map(|from| (from, payload(from, rank, round).len())).collect();
        communicator.begin(&out, &into).unwrap();
        settle(&mut communicator);
        let expected: Vec<_> = (0..ranks).map(|from| payload(from, rank, round)).collect();
        assert!(communicator.take() == expected, "round {round} at rank {rank}");
    }
    communicator.abort();
    assert!(communicator.poll().is_err(), "an aborted communicator does nothing");
}

#[test]
fn one_rank_sends_itself_over_nccl_what_it_receives_or_is_skipped_aloud() {
    match NcclDevice::open(0) {
        Ok(device) => {
            let id = device.unique_id().unwrap();
            say(&format!("gpu: NCCL {} on {}", cuda::nccl_version().unwrap(), device.name()));
            exchange_with_all(device, &id, 0, 1);
        }
        Err(reason) => {
            say(&format!(
                "SKIPPED: NCCL carried nothing, not even from a rank to itself: {reason}"
            ));
            let is_named = ["no cuda device: ", "NCCL is not there: "];
            assert!(is_named.iter().any(|begin| reason.starts_with(begin)), "{reason}");
        }
    }
}

#[test]
fn ranks_on_gpus_of_their_own_exchange_over_nccl_or_are_skipped_aloud() {
    let ranks = match cuda::devices() {
        Ok(count) if count > 1 && cuda::nccl_version().is_ok() => count,
        found => {
            let found = found.map_or_else(|why| why, |count| format!("{count} cuda devices"));
            return say(&format!("SKIPPED: NCCL between GPUs wants two and the library: {found}"));
        }
    };
    let id = NcclDevice::open(0).unwrap().unique_id().unwrap();
    std::thread::scope(|scope| {
        for rank in 0..ranks {
            let id = &id;
            scope.spawn(move || {
                exchange_with_all(NcclDevice::open(rank).unwrap(), id, rank, ranks);
            });
        }
    });
}
