//! When models and moments leave the device and return in a step: data in, data out.
//!
//! A step is a cycle of phases; before each lies a gap, in which the device holds no working memory and computes nothing.
//! Items (weights of a model, a moment) are on the device in the phases that need them. Elsewhere they may leave, if the host
//! or the disk below holds a copy. One channel moves one item at a time, in a phase (beside its computation) or in a gap (which
//! it makes longer: those seconds are exposed). Of all such steps [`plan`] finds the shortest, and of these the one that moves
//! the fewest bytes.
//!
//! The rules of the model, which the exhaustive search of the tests shares:
//!   * device: bytes of the items on it, of an item that is being read (from its first byte on) and of the phase's working
//!     memory never exceed the budget; host: bytes of the copies there, that being written included, neither
//!   * an item is copied while it is on the device and no phase changes it; it then leaves at once and for nothing
//!   * a copy stays until its item is changed; an item that is never changed has its copy, or none, for good
//!   * a step ends where it began, with an idle channel; a copy is made from the device and read by it, and goes nowhere else
//!
//! Knows no engine: the seconds are measured ones or estimates, and whoever executes a plan need not keep its times.

mod bounds;
mod search;
mod strategies;

pub use bounds::{least_device_bytes, lower_bound};
use serde::{Deserialize, Serialize};

/// A step to be planned.
#[derive(Clone, Debug, PartialEq)]
pub struct Problem {
    /// Its phases, in order; the first follows the last.
    pub phases: Vec<PhaseNeeds>,
    /// What may move.
    pub items: Vec<Item>,
    /// Bytes that the device may hold, working memory included.
    pub device_bytes: u64,
    /// Bytes that copies on the host may take.
    pub host_bytes: u64,
    /// What the way to the host and back carries.
    pub host: Bandwidth,
    /// The same of the disk, which has room for everything.
    pub disk: Bandwidth,
}

/// A phase of a step.
#[derive(Clone, Debug, PartialEq)]
pub struct PhaseNeeds {
    /// Its name.
    pub name: String,
    /// Seconds that it computes.
    pub seconds: f64,
    /// Bytes beside the items: packed weights, cache, activations, gradients.
    pub working_bytes: u64,
}

/// Something that moves as a whole.
#[derive(Clone, Debug, PartialEq)]
pub struct Item {
    /// Its name, as in the ledger.
    pub name: String,
    /// Its size.
    pub bytes: u64,
    /// Phases that it must be on the device in.
    pub needed: Vec<bool>,
    /// Phases that change it, of those that need it.
    pub changed: Vec<bool>,
}

/// Bytes a second.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bandwidth {
    /// Towards the device.
    pub read: f64,
    /// Away from it.
    pub write: f64,
}

/// Where an item is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Tier {
    /// Where it is computed with.
    Device,
    /// Memory of the host (pinned where the device is a GPU).
    Host,
    /// A file.
    Disk,
}

/// One thing that a plan does, in the order in which it does them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// These items leave, whose copies are below; then the phase begins.
    Begin {
        /// Number of the phase.
        phase: usize,
        /// Numbers of the items.
        leave: Vec<usize>,
    },
    /// The item is copied to a tier below and stays on the device.
    Write {
        /// Number of the item.
        item: usize,
        /// The tier.
        tier: Tier,
    },
    /// These items leave, and the item is read from its copy into their place.
    Read {
        /// Number of the item.
        item: usize,
        /// Numbers of those that leave.
        leave: Vec<usize>,
    },
    /// The phase that began last has ended: what follows belongs to the gap.
    End,
}

/// A transfer on the step's timeline.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Transfer {
    /// Number of the item.
    #[serde(skip)]
    pub item: usize,
    /// Its name.
    pub name: String,
    /// Where it goes to: `device`, or the tier of the copy.
    pub to: Tier,
    /// The tier of the copy.
    pub copy: Tier,
    /// Seconds since the step began.
    pub start: f64,
    /// See `start`.
    pub end: f64,
}

/// A planned step.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// What to do, in order.
    pub steps: Vec<Step>,
    /// Start and end of each phase, in seconds since the step began.
    pub phases: Vec<[f64; 2]>,
    /// Of each phase, where each item is as it begins.
    pub places: Vec<Vec<Tier>>,
    /// Most bytes on the device in each phase and the gap before it.
    pub peaks: Vec<u64>,
    /// In order of their starts.
    pub transfers: Vec<Transfer>,
    /// Of the step.
    pub seconds: f64,
    /// Of these, those in which nothing is computed.
    pub exposed_seconds: f64,
    /// Bytes moved, both ways.
    pub moved_bytes: u64,
    /// No step of this problem exposes less than this.
    pub least_exposed_seconds: f64,
    /// Whether no step is shorter; else the plan is the best that was found in bounded time.
    pub is_optimal: bool,
}

impl Plan {
    /// The share of the step in which nothing is computed.
    pub fn exposed_share(&self) -> f64 {
        if self.seconds > 0.0 { self.exposed_seconds / self.seconds } else { 0.0 }
    }

    /// By how much of the step a better plan could at most be shorter.
    pub fn gap_share(&self) -> f64 {
        let gap = self.exposed_seconds - self.least_exposed_seconds;
        if self.seconds > 0.0 && !self.is_optimal { gap.max(0.0) / self.seconds } else { 0.0 }
    }
}

/// The device is too small for a phase, whatever else leaves.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "phase {phase} needs {least_bytes} bytes on the device, and it may hold {device_bytes}; raise engine.budget to {least_bytes}"
)]
pub struct TooSmall {
    /// The phase that needs most.
    pub phase: String,
    /// The smallest budget that would do.
    pub least_bytes: u64,
    /// The budget.
    pub device_bytes: u64,
}

/// States that are looked at in search of the best plan; beyond, what is found within bounds is told with its gap.
pub const EFFORT: usize = 20_000;

/// The shortest step, or the smallest budget that would do.
pub fn plan(problem: &Problem) -> Result<Plan, TooSmall> {
    plan_within(problem, EFFORT)
}

/// The same with a bound on the states that are looked at.
pub fn plan_within(problem: &Problem, effort: usize) -> Result<Plan, TooSmall> {
    check(problem);
    let (phase, least_bytes) = least_device_bytes(problem);
    if least_bytes > problem.device_bytes {
        let phase = problem.phases[phase].name.clone();
        return Err(TooSmall { phase, least_bytes, device_bytes: problem.device_bytes });
    }
    Ok(strategies::search(problem, effort))
}

/// The exposed share of a step that is wanted.
pub const GOAL: f64 = 0.05;

/// A plan with less working memory where that makes room for transfers, and the working memory of its phases: as much as is
/// wanted if then less than [`GOAL`] of the step is exposed, else a half, a quarter or nothing of what is above `least`,
/// whichever exposes least.
pub fn plan_elastic(problem: &Problem, least: &[u64]) -> Result<(Plan, Vec<u64>), TooSmall> {
    let mut best: Option<(Plan, Vec<u64>)> = None;
    let mut refused = None;
    for parts in [4, 2, 1, 0] {
        let working = |(phase, least): (&PhaseNeeds, &u64)| {
            let least = *least.min(&phase.working_bytes);
            least + (phase.working_bytes - least) / 4 * parts
        };
        let working: Vec<u64> = match parts {
            4 => problem.phases.iter().map(|phase| phase.working_bytes).collect(),
            _ => problem.phases.iter().zip(least).map(working).collect(),
        };
        let mut lowered = problem.clone();
        for (phase, bytes) in lowered.phases.iter_mut().zip(&working) {
            phase.working_bytes = *bytes;
        }
        match plan(&lowered) {
            Err(too_small) => refused = Some(too_small),
            Ok(plan) => {
                let is_good = plan.exposed_share() < GOAL;
                let is_better =
                    |(best, _): &(Plan, Vec<u64>)| plan.exposed_seconds < best.exposed_seconds;
                if best.as_ref().is_none_or(is_better) {
                    best = Some((plan, working));
                }
                if is_good {
                    break;
                }
            }
        }
    }
    best.ok_or_else(|| refused.expect("each attempt gives a plan or a refusal"))
}

/// The working memory that a phase can do with, of what it wants and what it holds in any case: a sixteenth of its activations,
/// for they can be fewer at once; all of them where it samples, whose cache is as large as what is left allows.
pub fn lower_working(wanted: u64, fixed: u64, samples: bool) -> u64 {
    if samples { wanted } else { fixed.min(wanted) + wanted.saturating_sub(fixed) / 16 }
}

/// What a caller must not get wrong.
fn check(problem: &Problem) {
    let count = problem.phases.len();
    assert!(count > 0, "a step has a phase");
    assert!(problem.items.len() <= 32, "items are told apart by the bits of a word");
    for item in &problem.items {
        assert!(item.needed.len() == count && item.changed.len() == count, "{}", item.name);
        let is_sound =
            item.changed.iter().zip(&item.needed).all(|(changed, needed)| *needed || !changed);
        assert!(is_sound, "{} is changed where it is not needed", item.name);
    }
}

#[cfg(test)]
mod tests;
