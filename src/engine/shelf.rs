//! Everything of a device that may leave it: weights of models and moments, and who needs them when.
//!
//! Where an allocation is short of memory the shelf makes room: what is copied and not in use leaves first, then what is being
//! read, then what must be copied before, the last loaded first. Invariant: what the present phase needs stays.

use super::offload::{Parked, Slot};
use super::offload_plan::Tier;
use super::phase::Role;
use std::sync::{Arc, Mutex, MutexGuard};

/// A phase as the planner tells them apart: models are scored one after the other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stretch {
    /// Sampling from the policy.
    Generate,
    /// Forward passes of this model.
    Score(Role),
    /// Updates.
    Train,
}

impl Stretch {
    /// Its name in a plan.
    pub fn name(&self) -> String {
        match self {
            Stretch::Generate => "generate".to_string(),
            Stretch::Score(role) => format!("score {}", role.name()),
            Stretch::Train => "train".to_string(),
        }
    }
}

/// Something on the shelf.
#[derive(Clone)]
pub(super) struct Kept {
    pub slot: Arc<Slot>,
    role: Role,
    is_moment: bool,
}

impl Kept {
    /// Whether a phase needs it.
    pub fn is_needed(&self, stretch: &Stretch) -> bool {
        needs(&self.role, self.is_moment, stretch)
    }

    /// Whether a phase changes it.
    pub fn is_changed(&self, stretch: &Stretch) -> bool {
        changes(&self.role, stretch)
    }
}

/// Whether a phase changes the weights of a role, and its moments.
pub fn changes(role: &Role, stretch: &Stretch) -> bool {
    *role == Role::Policy && *stretch == Stretch::Train
}

/// Whether a phase needs the weights of a role, or its moments.
pub fn needs(role: &Role, is_moment: bool, stretch: &Stretch) -> bool {
    match (role, stretch) {
        (Role::Policy, Stretch::Train) => true,
        (Role::Policy, Stretch::Generate) => !is_moment,
        (role, Stretch::Score(scored)) => role == scored && !is_moment,
        _ => false,
    }
}

/// See the module.
#[derive(Default)]
pub(super) struct Shelf {
    kept: Mutex<Vec<Kept>>,
    present: Mutex<Option<Stretch>>,
}

impl Shelf {
    /// Takes on weights, or a moment.
    pub fn add(&self, parked: &Parked, role: Role, is_moment: bool) {
        lock(&self.kept).push(Kept { slot: parked.0.clone(), role, is_moment });
    }

    /// All that is kept, in the order in which it came.
    pub fn kept(&self) -> Vec<Kept> {
        lock(&self.kept).clone()
    }

    /// Forgets everything.
    pub fn clear(&self) {
        lock(&self.kept).clear();
    }

    /// What stays from now on is what this phase needs.
    pub fn enter(&self, present: Option<Stretch>) {
        *lock(&self.present) = present;
    }

    /// What the present phase does not need, the last that came first.
    fn spare(&self) -> Vec<Arc<Slot>> {
        let present = lock(&self.present).clone();
        let is_spare =
            |kept: &&Kept| present.as_ref().is_none_or(|present| !kept.is_needed(present));
        lock(&self.kept).iter().rev().filter(is_spare).map(|kept| kept.slot.clone()).collect()
    }

    /// Bytes on the device that could make room.
    pub fn spare_bytes(&self) -> u64 {
        let spare = self.spare();
        spare.iter().filter(|slot| slot.is_idle_on_device()).map(|slot| slot.bytes()).sum()
    }

    /// Bytes on the device, in whole pages.
    pub fn bytes_on_device(&self) -> u64 {
        let kept = self.kept();
        let here = kept.iter().filter(|kept| kept.slot.tier() == Tier::Device);
        here.map(|kept| kept.slot.bytes().next_multiple_of(4096)).sum()
    }

    /// Makes one thing leave, if there is one. Says whether it did.
    pub fn make_room(&self) -> bool {
        let spare = self.spare();
        spare.iter().any(|slot| slot.leave_if_copied() > 0)
            || spare.iter().any(|slot| slot.stop_reading().is_ok_and(|bytes| bytes > 0))
            || spare.iter().any(|slot| slot.release(Tier::Host).is_ok_and(|bytes| bytes > 0))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}
