//! Conductor: leads the transfers of a device through its phases.
//!
//! It watches what the phases of a step take (seconds without waiting, working memory) and what the channel carries, plans the
//! step from that, and asks for each transfer where the plan begins it. A phase that the plan does not know, as that of an
//! eval, makes room for itself and takes what it needs.
//!
//! Plans change when things move and nothing else: results do not depend on what was measured. Without a budget, and where
//! `engine.offload` is a list, there is no plan.

use super::offload_plan::{
    Item, PhaseNeeds, Plan, Problem, Step, Tier, lower_working, plan_elastic,
};
use super::phase::{Phase, Role};
use super::shelf::{Shelf, Stretch};
use super::transfers::Transfers;
use crate::config::ModelConfig;
use crate::config::engine::Prefill;
use crate::model::parameters::{multiplied, packed_bytes, parameters};
use anyhow::Result;
use rehearsal_kernels::WeightFormat;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Seconds that a phase is taken to last before it was seen: long enough for every transfer.
const UNSEEN: f64 = 1e4;
/// A plan is made anew no more often than takes this share of the time.
const PLANNING_SHARE: u32 = 50;
/// A change of what is known that is worth a new plan.
const NOTABLE: f64 = 0.25;

/// Phases of a step at most, to be learned.
const LONGEST: usize = 64;

/// What a phase takes.
#[derive(Clone, Debug, PartialEq)]
struct Seen {
    stretch: Stretch,
    /// As of late, without waiting.
    seconds: f64,
    /// The most it ever took.
    working: u64,
}

struct Planned {
    problem: Problem,
    plan: Plan,
    stretches: Vec<Stretch>,
    /// Working memory that the plan allows each phase.
    working: Vec<u64>,
    /// Steps in the gap before each phase, and beside it.
    gaps: Vec<Vec<Step>>,
    runs: Vec<Vec<Step>>,
}

struct Open {
    stretch: Stretch,
    began: Instant,
    waited: f64,
}

/// What a device's transfers are like.
pub(super) struct Manner {
    /// Whether they are planned: there is a budget, and `engine.offload` is no list.
    pub plans: bool,
    /// Whether they run beside computation.
    pub overlaps: bool,
    /// Whether the device samples. A step begins with that, or else with the first phase after an update.
    pub samples: bool,
}

/// See the module.
pub(super) struct Conductor {
    pub transfers: Arc<Transfers>,
    pub shelf: Arc<Shelf>,
    manner: Manner,
    /// Whether a step has begun and its update has not ended.
    is_in_step: bool,
    model: Option<(ModelConfig, Prefill)>,
    cycle: Vec<Seen>,
    passed: Vec<Seen>,
    planned: Option<Planned>,
    at: Option<usize>,
    open: Option<Open>,
    last_planned: Option<(Instant, Duration)>,
}

impl Conductor {
    /// For a device with these transfers.
    pub fn new(transfers: Arc<Transfers>, mut manner: Manner) -> Conductor {
        let shelf = Arc::<Shelf>::default();
        if manner.plans {
            let shelf = Arc::downgrade(&shelf);
            let room = move |_| shelf.upgrade().is_some_and(|shelf| shelf.make_room());
            transfers.arena.ask_for_room(Some(Arc::new(room)));
        }
        manner.plans &= transfers.arena.budget().is_some();
        Conductor {
            transfers,
            shelf,
            manner,
            is_in_step: false,
            model: None,
            cycle: Vec::new(),
            passed: Vec::new(),
            planned: None,
            at: None,
            open: None,
            last_planned: None,
        }
    }

    /// Forgets a stage.
    pub fn clear(&mut self) {
        self.end();
        self.transfers.end();
        self.shelf.clear();
        self.shelf.enter(None);
        self.transfers.record.restart();
        (self.planned, self.at, self.last_planned) = (None, None, None);
        self.cycle.clear();
        self.passed.clear();
        self.is_in_step = false;
        self.transfers.arena.allow_working(None);
    }

    /// A stage begins with these models beside the policy; if it trains, its step is expected to score with each of them.
    pub fn start<'a>(
        &mut self,
        model: &ModelConfig,
        prefill: Prefill,
        others: impl Iterator<Item = &'a Role>,
        trains: bool,
    ) {
        self.model = Some((model.clone(), prefill));
        // The reference comes last, as where a step is scored.
        let mut scored: Vec<Role> = others.cloned().collect();
        scored.sort_by_key(|role| *role == Role::Reference);
        if !trains || scored.is_empty() {
            return;
        }
        let scored = scored.into_iter().map(Stretch::Score).collect();
        let sampled = self.manner.samples.then_some(Stretch::Generate).into_iter().collect();
        let stretches = [sampled, scored, vec![Stretch::Train]].concat();
        let expected = |stretch: Stretch| {
            let working = self.least_working(&stretch);
            Seen { stretch, seconds: UNSEEN, working }
        };
        self.cycle = stretches.into_iter().map(expected).collect();
        self.plan();
    }

    /// Whether phases give up memory for what moves.
    pub fn moves(&self) -> bool {
        self.planned.as_ref().is_some_and(|planned| planned.plan.moved_bytes > 0)
    }

    /// Bytes that a phase holds beside activations and cache.
    fn least_working(&self, stretch: &Stretch) -> u64 {
        let Some((model, prefill)) = &self.model else { return 0 };
        match stretch {
            Stretch::Generate => packed_bytes(model, WeightFormat::F32, *prefill),
            Stretch::Score(_) => 4 * multiplied(model),
            Stretch::Train => 8 * multiplied(model) + 4 * parameters(model).total,
        }
    }

    /// The device enters a phase. Which model is scored is not known before the first job.
    pub fn enter(&mut self, phase: Phase) -> Result<()> {
        match phase {
            Phase::Generate => self.begin(Stretch::Generate),
            Phase::Train => self.begin(Stretch::Train),
            Phase::Score | Phase::Idle => Ok(()),
        }
    }

    /// A phase begins. What the plan wants elsewhere by now leaves, at the cost of waiting; the rest moves beside.
    pub fn begin(&mut self, stretch: Stretch) -> Result<()> {
        if self.open.as_ref().is_some_and(|open| open.stretch == stretch) {
            return Ok(());
        }
        self.end();
        if self.is_first(&stretch) {
            self.begin_step();
        }
        self.shelf.enter(Some(stretch.clone()));
        self.at = self.planned.as_ref().and_then(|planned| planned.next(self.at, &stretch));
        match self.at {
            Some(phase) => self.lead(phase)?,
            None => self.improvise(&stretch),
        }
        let transfers = &self.transfers;
        transfers.record.begin(&stretch.name());
        transfers.arena.working_peak();
        let waited = transfers.record.totals().0;
        self.open = Some(Open { stretch, began: Instant::now(), waited });
        Ok(())
    }

    /// A device that does not sample begins a step by giving the policy to who does.
    pub fn hand_over(&mut self) {
        self.end();
        self.begin_step();
    }

    /// Whether a step begins with this phase. An eval of the policy belongs to none.
    fn is_first(&self, stretch: &Stretch) -> bool {
        match self.manner.samples {
            true => *stretch == Stretch::Generate,
            false => *stretch != Stretch::Score(Role::Policy),
        }
    }

    fn begin_step(&mut self) {
        if !self.is_in_step {
            self.is_in_step = true;
            self.learn();
        }
    }

    /// The phase ends: what comes before the next one may begin.
    pub fn end(&mut self) {
        let Some(Open { stretch, began, waited }) = self.open.take() else { return };
        let transfers = &self.transfers;
        transfers.record.end();
        let waited = transfers.record.totals().0 - waited;
        let seconds = (began.elapsed().as_secs_f64() - waited).max(0.0);
        // What lasts and is not on the shelf (another layout of the policy, say) is working memory too.
        let beside = transfers.lasting().saturating_sub(self.shelf.bytes_on_device());
        let working = transfers.arena.working_peak() + beside;
        self.is_in_step &= stretch != Stretch::Train;
        // A device that never updates has no step to learn.
        if self.passed.len() == LONGEST {
            self.passed.remove(0);
        }
        self.passed.push(Seen { stretch, seconds, working });
        self.shelf.enter(None);
        if let (Some(phase), Some(planned)) = (self.at, &self.planned) {
            let next = (phase + 1) % planned.stretches.len();
            self.ask(&planned.gaps[next]);
        }
    }

    /// Readies a phase of the plan.
    fn lead(&self, phase: usize) -> Result<()> {
        let planned = self.planned.as_ref().expect("a phase of a plan has one");
        let kept = self.shelf.kept();
        for (kept, place) in kept.iter().zip(&planned.plan.places[phase]) {
            if *place != Tier::Device {
                kept.slot.release(*place)?;
            }
        }
        let working = planned.working[phase];
        self.transfers.reserve(working);
        let is_lowered = working < planned.problem.phases[phase].working_bytes;
        self.transfers.arena.allow_working(is_lowered.then_some(working));
        self.ask(&planned.runs[phase]);
        Ok(())
    }

    /// Readies a phase that no plan knows.
    fn improvise(&self, stretch: &Stretch) {
        self.transfers.call_off();
        self.transfers.reserve(0);
        let arena = &self.transfers.arena;
        arena.allow_working(None);
        let Some(budget) = arena.budget().filter(|_| self.manner.plans) else { return };
        let seen = self.cycle.iter().chain(&self.passed).filter(|seen| seen.stretch == *stretch);
        let working = seen.map(|seen| seen.working).max().unwrap_or(0);
        let working = working.max(self.least_working(stretch));
        while arena.in_use() + working > budget && self.shelf.make_room() {}
    }

    fn ask(&self, steps: &[Step]) {
        if !self.manner.overlaps {
            return;
        }
        let kept = self.shelf.kept();
        for step in steps {
            match step {
                Step::Write { item, tier } => kept[*item].slot.ask_to_write(*tier),
                Step::Read { item, leave } => {
                    let leave = leave.iter().map(|item| kept[*item].slot.clone()).collect();
                    kept[*item].slot.ask_to_read(leave);
                }
                Step::Begin { .. } | Step::End => {}
            }
        }
    }

    /// A step has passed and the next begins: what it took is learned.
    fn learn(&mut self) {
        self.transfers.record.restart();
        let passed = std::mem::take(&mut self.passed);
        let is_once =
            |seen: &Seen| passed.iter().filter(|other| other.stretch == seen.stretch).count() == 1;
        // The policy scores an eval after an update, and what was sampled ahead before one.
        let is_step = passed.first().is_some_and(|first| self.is_first(&first.stretch))
            && passed.last().is_some_and(|last| last.stretch == Stretch::Train)
            && passed.iter().all(is_once);
        if !self.manner.plans || !is_step {
            return;
        }
        let known = std::mem::take(&mut self.cycle);
        let learned = |seen: Seen| match known.iter().find(|known| known.stretch == seen.stretch) {
            Some(known) if known.seconds < UNSEEN => Seen {
                seconds: 0.5 * (known.seconds + seen.seconds),
                working: known.working.max(seen.working),
                ..seen
            },
            _ => seen,
        };
        self.cycle = passed.into_iter().map(learned).collect();
        self.plan();
    }

    /// Plans the step anew, if that is worth it.
    fn plan(&mut self) {
        if !self.manner.plans || self.cycle.is_empty() {
            return;
        }
        let problem = self.problem();
        let stretches: Vec<Stretch> = self.cycle.iter().map(|seen| seen.stretch.clone()).collect();
        let is_same = self.planned.as_ref().is_some_and(|planned| {
            planned.stretches == stretches && !differs(&planned.problem, &problem)
        });
        let is_early =
            self.last_planned.is_some_and(|(at, took)| at.elapsed() < took * PLANNING_SHARE);
        let must = self.planned.as_ref().is_none_or(|planned| planned.stretches != stretches);
        if is_same || (is_early && !must) {
            return;
        }
        let began = Instant::now();
        let least: Vec<u64> = self
            .cycle
            .iter()
            .map(|seen| {
                lower_working(
                    seen.working,
                    self.least_working(&seen.stretch),
                    seen.stretch == Stretch::Generate,
                )
            })
            .collect();
        // A budget that is too small even so is refused by name where memory is asked for.
        let plan = plan_elastic(&problem, &least).ok();
        self.planned = plan.map(|(plan, working)| Planned::new(problem, plan, stretches, working));
        self.at = None;
        self.last_planned = Some((began, began.elapsed()));
    }

    fn problem(&self) -> Problem {
        let kept = self.shelf.kept();
        let items = kept.iter().map(|kept| Item {
            name: kept.slot.name().to_string(),
            bytes: kept.slot.bytes().next_multiple_of(4096),
            needed: self.cycle.iter().map(|seen| kept.is_needed(&seen.stretch)).collect(),
            changed: self.cycle.iter().map(|seen| kept.is_changed(&seen.stretch)).collect(),
        });
        let phases = self.cycle.iter().map(|seen| PhaseNeeds {
            name: seen.stretch.name(),
            seconds: seen.seconds,
            working_bytes: seen.working,
        });
        Problem {
            phases: phases.collect(),
            items: items.collect(),
            device_bytes: self.transfers.arena.budget().unwrap_or(u64::MAX),
            host_bytes: self.transfers.host_budget(),
            host: self.transfers.bandwidth(Tier::Host),
            disk: self.transfers.bandwidth(Tier::Disk),
        }
    }
}

/// Whether a plan of one is no good for the other.
fn differs(one: &Problem, other: &Problem) -> bool {
    let far = |a: f64, b: f64| (a - b).abs() > NOTABLE * a.max(b);
    let ways = [(one.host, other.host), (one.disk, other.disk)];
    one.items != other.items
        || one.device_bytes != other.device_bytes
        || one.phases.iter().zip(&other.phases).any(|(a, b)| {
            far(a.seconds, b.seconds)
                || a.working_bytes.abs_diff(b.working_bytes) > a.working_bytes / 32
        })
        || ways.iter().any(|(a, b)| far(a.read, b.read) || far(a.write, b.write))
}

impl Planned {
    fn new(problem: Problem, plan: Plan, stretches: Vec<Stretch>, working: Vec<u64>) -> Planned {
        let count = stretches.len();
        let (mut gaps, mut runs) = (vec![Vec::new(); count], vec![Vec::new(); count]);
        let (mut next, mut is_run) = (0, false);
        for step in &plan.steps {
            match step {
                Step::Begin { phase, .. } => (next, is_run) = (*phase, true),
                Step::End => (next, is_run) = ((next + 1) % count, false),
                step if is_run => runs[next].push(step.clone()),
                step => gaps[next].push(step.clone()),
            }
        }
        Planned { problem, plan, stretches, working, gaps, runs }
    }

    /// The next phase of this kind after one.
    fn next(&self, at: Option<usize>, stretch: &Stretch) -> Option<usize> {
        let count = self.stretches.len();
        let first = at.map_or(0, |at| at + 1);
        (first..first + count)
            .map(|phase| phase % count)
            .find(|phase| self.stretches[*phase] == *stretch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rehearsal_kernels::{Arena, MappedFiles};

    /// What a device has learned to be a step, after some of these phases; `None` is a hand-over.
    fn learned(samples: bool, phases: &[Option<Stretch>]) -> Vec<Stretch> {
        let folder = tempfile::tempdir().unwrap();
        let (arena, deadline) = (Arena::new(Some(1 << 20)), Duration::from_secs(1));
        let (path, host) = (folder.path().to_path_buf(), Arc::new(MappedFiles));
        let transfers = Transfers::new(arena, path, host, u64::MAX, deadline);
        let mut conductor =
            Conductor::new(Arc::new(transfers), Manner { plans: true, overlaps: true, samples });
        for phase in phases {
            match phase {
                Some(stretch) => conductor.begin(stretch.clone()).unwrap(),
                None => conductor.hand_over(),
            }
        }
        assert!(conductor.cycle.iter().all(|seen| seen.seconds < UNSEEN));
        conductor.cycle.iter().map(|seen| seen.stretch.clone()).collect()
    }

    #[test]
    fn a_step_ends_with_its_update_and_begins_with_sampling_or_with_the_hand_over() {
        let [policy, reference] = [Role::Policy, Role::Reference].map(Stretch::Score);
        let (generate, train) = (Stretch::Generate, Stretch::Train);
        let trainer = |phases: &[Option<&Stretch>]| {
            learned(false, &phases.iter().map(|phase| phase.cloned()).collect::<Vec<_>>())
        };
        let (score, update) = (Some(&reference), Some(&train));
        assert_eq!(trainer(&[score, update, None]), [reference.clone(), train.clone()]);
        assert_eq!(trainer(&[None, update, None, update, None]), std::slice::from_ref(&train));
        // No version is handed over after an update that was left out.
        assert_eq!(trainer(&[None, score, update, score]), [reference.clone(), train.clone()]);
        // An eval belongs to no step.
        assert_eq!(trainer(&[None, score, update, Some(&policy), None]), []);
        let step = [generate.clone(), policy.clone(), reference, train];
        let phases: Vec<_> = step.iter().cloned().chain([generate]).map(Some).collect();
        assert_eq!(learned(true, &phases), step, "the policy scores what is ahead in a step");
        assert_eq!(learned(true, &phases[1..]), [], "a step begins with sampling");
    }
}
