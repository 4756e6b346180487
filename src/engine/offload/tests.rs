//! A slab's ways: out and back, asked for and taken before, called off, refused, over and over.

use super::*;
use rehearsal_kernels::{CpuKernels, Kernels, Kind, MappedFiles};
use std::time::Duration;
use tempfile::TempDir;

struct Place {
    arena: Arena,
    kernels: CpuKernels,
    transfers: Arc<Transfers>,
    folder: TempDir,
}

fn place(budget: Option<u64>, host_budget: u64) -> Place {
    let folder = tempfile::tempdir().unwrap();
    let arena = Arena::new(budget);
    let kernels = CpuKernels::new(1, arena.clone());
    let deadline = Duration::from_secs(60);
    let path = folder.path().to_path_buf();
    let host = Arc::new(MappedFiles);
    let transfers = Transfers::new(arena.clone(), path, host, host_budget, deadline);
    let transfers = Arc::new(transfers);
    Place { arena, kernels, transfers, folder }
}

const ELEMENTS: usize = 7 * 33;
const BYTES: u64 = ELEMENTS as u64 * 4;

impl Place {
    fn parked(&self, name: &str, seed: f32) -> (Parked, Vec<f32>) {
        let owner = self.arena.owner(name, Kind::Weights);
        let mut slab = self.arena.slab(owner, DType::F32, &[(7, 33)]).unwrap();
        let values: Vec<f32> = (0..ELEMENTS).map(|i| (i as f32 * seed).sin()).collect();
        self.kernels.upload(&values, &mut slab.tensor_mut(0));
        (Parked::new(&self.transfers, format!("{name}/weights"), owner, name, slab), values)
    }

    fn values(&self, parked: &mut Parked) -> Vec<f32> {
        let (slab, _) = parked.take(&self.arena).unwrap();
        let values = self.kernels.download(&slab.tensor(0));
        parked.put(slab);
        values
    }

    /// Waits until the thread has done what it was asked for.
    fn settle(&self, done: impl Fn() -> bool) {
        let began = Instant::now();
        while !done() {
            assert!(began.elapsed() < Duration::from_secs(60), "the thread does nothing");
            std::thread::yield_now();
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.transfers.end();
    }
}

#[test]
fn a_released_slab_leaves_no_byte_and_comes_back_equal() {
    for (host_budget, tier) in [(u64::MAX, Tier::Host), (BYTES - 1, Tier::Disk)] {
        let place = place(None, host_budget);
        let (mut parked, values) = place.parked("reference", 1.0);
        for round in 0..2 {
            assert_eq!(parked.release().unwrap(), BYTES);
            assert_eq!((parked.0.tier(), place.arena.held_by(Kind::Weights)), (tier, 0));
            assert_eq!(place.values(&mut parked), values);
            // What was not changed is not written again.
            assert_eq!(place.transfers.record.totals().1, [(round + 1) * BYTES, BYTES]);
        }
    }
}

#[test]
fn a_slab_that_cannot_be_written_stays() {
    let place = place(None, u64::MAX);
    let (mut parked, values) = place.parked("no such folder/reference", 1.0);
    let fault = parked.release().unwrap_err().to_string();
    assert!(fault.contains("failed to offload no such folder/reference/weights to "), "{fault}");
    assert_eq!(parked.0.tier(), Tier::Device);
    assert_eq!(place.values(&mut parked), values);
}

#[test]
fn the_thread_copies_and_reads_beside_and_a_change_makes_the_copy_void() {
    let place = place(None, u64::MAX);
    let (mut parked, values) = place.parked("policy", 1.0);
    let slot = parked.0.clone();
    slot.ask_to_write(Tier::Host);
    // Reading goes on while it is copied.
    assert_eq!(place.values(&mut parked), values);
    place.settle(|| slot.has_copy());
    assert_eq!(slot.leave_if_copied(), BYTES);
    assert_eq!(place.arena.held(), 0);
    slot.ask_to_read(Vec::new());
    place.settle(|| slot.tier() == Tier::Device && slot.lock().moving.is_none());
    let waited = place.transfers.record.totals().0;
    assert_eq!(place.values(&mut parked), values);
    assert_eq!(place.transfers.record.totals().0, waited, "nobody waited");
    let (mut slab, _) = parked.take_to_change(&place.arena).unwrap();
    place.kernels.fill(&mut slab.whole_mut(), 2.0);
    parked.put_changed(slab);
    assert!(!slot.has_copy(), "the copy is of other values");
    assert_eq!(slot.leave_if_copied(), 0, "what has no copy does not leave");
    parked.release().unwrap();
    assert_eq!(place.values(&mut parked), vec![2.0; ELEMENTS]);
}

#[test]
fn whoever_needs_a_slab_that_was_asked_for_does_not_wait_for_others() {
    let place = place(None, u64::MAX);
    let (mut parked, values) = place.parked("reference", 1.0);
    parked.release().unwrap();
    // Asked for and not begun: there is no thread.
    parked.0.lock().asked = Asked::Read;
    assert_eq!(place.values(&mut parked), values);
    assert!(matches!(parked.0.lock().asked, Asked::Nothing));
}

#[test]
fn no_transfer_breaks_a_budget_or_takes_the_room_that_is_kept() {
    // Each slab takes a page of the two that the budget has.
    let place = place(Some(8192), u64::MAX);
    let (mut first, values) = place.parked("first", 1.0);
    first.release().unwrap();
    let (mut second, _) = place.parked("second", 2.0);
    place.transfers.reserve(4096);
    let slot = first.0.clone();
    slot.ask_to_read(Vec::new());
    place.settle(|| matches!(slot.lock().asked, Asked::Nothing));
    assert_eq!(slot.tier(), Tier::Host, "the room is kept for others");
    // The second makes room if it may leave.
    second.release().unwrap();
    drop(place.values(&mut second));
    slot.ask_to_read(vec![second.0.clone()]);
    place.settle(|| slot.tier() == Tier::Device && slot.lock().moving.is_none());
    assert_eq!(second.0.tier(), Tier::Host);
    assert_eq!(place.values(&mut first), values);
    assert!(place.arena.high_water() <= 8192);
}

#[test]
fn slabs_that_come_and_go_at_random_keep_their_values_and_the_budget() {
    use rehearsal_kernels::random::{Draws, Stream};
    let place = place(Some(4 * 4096), 3 * BYTES);
    let mut parked: Vec<(Parked, Vec<f32>)> = Vec::new();
    for index in 0..6 {
        let (mut one, values) = place.parked(&format!("model {index}"), index as f32 + 1.0);
        one.release().unwrap();
        parked.push((one, values));
    }
    let slots: Vec<Arc<Slot>> = parked.iter().map(|(one, _)| one.0.clone()).collect();
    let mut draws = Draws::new(5, Stream::Data, [0; 3]);
    for round in 0..2000 {
        let index = draws.below(6) as usize;
        let (one, values) = &mut parked[index];
        match draws.below(5) {
            0 => one.0.ask_to_read(
                slots.iter().filter(|slot| slot.name() != one.0.name()).cloned().collect(),
            ),
            1 => one.0.ask_to_write(Tier::Host),
            2 => drop(one.0.leave_if_copied()),
            3 | 4 => {
                // Make room as the engine does, then read, or change.
                for slot in &slots {
                    if slot.name() != one.0.name() {
                        slot.stop_reading().unwrap();
                        slot.release(Tier::Host).unwrap();
                    }
                }
                let (mut slab, _) = one.take_to_change(&place.arena).unwrap();
                assert!(place.kernels.download(&slab.tensor(0)) == *values, "round {round}");
                if draws.below(2) == 0 {
                    values[0] = round as f32;
                    place.kernels.upload(values, &mut slab.tensor_mut(0));
                    one.put_changed(slab);
                } else {
                    one.put(slab);
                }
            }
            _ => unreachable!("of five"),
        }
    }
    place.transfers.end();
    assert!(place.arena.high_water() <= 4 * 4096, "{}", place.arena.high_water());
    let files = || std::fs::read_dir(place.folder.path()).unwrap().count();
    assert!(files() > 0);
    drop((parked, slots));
    assert_eq!(files(), 0, "copies go with their slabs");
}
