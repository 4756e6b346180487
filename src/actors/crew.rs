//! Crew: a job for the device, on the devices of all ranks at once, and how their results become one.
//!
//! Every rank is given the whole job, and its engine takes its own share of it. Knows no actor and no wire.
//!
//! Invariants:
//!   * one rank's result is the crew's result
//!   * ranks that disagree where all compute the same are told apart, never averaged

use super::messages::*;
use crate::config::Dtype;
use crate::engine::hybrid::SavedState;
use crate::engine::phase::{GenerateJob, GenerateReport};
use crate::engine::phase::{Phase, PhaseReport, PrepareStage, ScoreJob, SequenceScore};
use crate::engine::phase::{StepReport, TrainJob};
use crate::engine::utilisation::Switched;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// A job for the device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Job {
    /// See [`PrepareDevice`].
    Prepare(Box<PrepareStage>),
    /// See [`EnterPhase`](super::messages::EnterPhase).
    EnterPhase(Phase, Dtype),
    /// See [`Generate`](super::messages::Generate).
    Generate(GenerateJob),
    /// See [`Score`](super::messages::Score).
    Score(ScoreJob),
    /// See [`Train`](super::messages::Train).
    Train(TrainJob),
    /// See [`Save`](super::messages::Save).
    Save {
        /// The folder; it exists.
        folder: PathBuf,
        /// Moments too.
        with_optimizer: bool,
    },
    /// See [`Restore`](super::messages::Restore).
    Restore {
        /// The commit's folder.
        folder: PathBuf,
        /// Its counters.
        state: SavedState,
    },
    /// See [`Calibrate`](super::messages::Calibrate).
    Calibrate(Scale),
    /// See [`HandOver`](super::messages::HandOver).
    HandOver(u64),
}

/// What a job gave.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Yield {
    /// It is done.
    Nothing,
    /// Of a change of phase.
    Phase(PhaseReport),
    /// Of sampling, the groups apart.
    Generated(Generated),
    /// Of forward passes, in order.
    Scores(Vec<SequenceScore>),
    /// Of an optimizer step.
    Stepped(StepReport),
    /// Of a save.
    Saved(SavedState),
    /// Of a hand-over.
    Switched(Switched),
}

impl Job {
    /// The name of the request.
    pub fn name(&self) -> &'static str {
        match self {
            Job::Prepare(_) => PrepareDevice::NAME,
            Job::EnterPhase(..) => EnterPhase::NAME,
            Job::Generate(_) => Generate::NAME,
            Job::Score(_) => Score::NAME,
            Job::Train(_) => Train::NAME,
            Job::Save { .. } => Save::NAME,
            Job::Restore { .. } => Restore::NAME,
            Job::Calibrate(_) => Calibrate::NAME,
            Job::HandOver(_) => HandOver::NAME,
        }
    }
}

/// The results of all ranks, in their order, as one.
pub fn together(name: &str, parts: Vec<Yield>) -> Result<Yield, Failure> {
    let mut parts = parts.into_iter().enumerate();
    let (_, mut whole) = parts.next().expect("a crew has a rank");
    for (rank, part) in parts {
        whole = match (whole, part) {
            (Yield::Nothing, Yield::Nothing) => Yield::Nothing,
            (Yield::Phase(whole), Yield::Phase(part)) if whole.sampled_as != part.sampled_as => {
                let shown = |report: &PhaseReport| format!("weights as {:?}", report.sampled_as);
                return Err(apart(rank, &shown(&part), &shown(&whole)));
            }
            (Yield::Phase(whole), Yield::Phase(part)) => Yield::Phase(phases(whole, part)),
            (Yield::Generated(whole), Yield::Generated(part)) => {
                let span = [whole.span[0].min(part.span[0]), whole.span[1].max(part.span[1])];
                Yield::Generated(Generated { report: samplings(whole.report, part.report), span })
            }
            (Yield::Scores(mut whole), Yield::Scores(part)) => {
                whole.extend(part);
                Yield::Scores(whole)
            }
            (Yield::Stepped(whole), Yield::Stepped(part)) => {
                Yield::Stepped(steps(whole, &part, rank)?)
            }
            (Yield::Switched(whole), Yield::Switched(part)) => {
                Yield::Switched(switches(whole, part))
            }
            (Yield::Saved(whole), Yield::Saved(part)) if whole == part => Yield::Saved(whole),
            (Yield::Saved(whole), Yield::Saved(part)) => {
                return Err(apart(rank, &format!("{part:?}"), &format!("{whole:?}")));
            }
            (whole, part) => {
                let other = std::mem::discriminant(&whole) != std::mem::discriminant(&part);
                debug_assert!(other, "results of one kind are put together");
                return Err(apart(rank, &format!("a result of another kind to {name}"), "its own"));
            }
        };
    }
    Ok(whole)
}

/// Bytes moved are sums, times those of the slowest, bytes held those of the rank that holds most.
fn phases(mut whole: PhaseReport, part: PhaseReport) -> PhaseReport {
    whole.seconds = whole.seconds.max(part.seconds);
    whole.bytes_out += part.bytes_out;
    whole.bytes_in += part.bytes_in;
    whole.high_water = whole.high_water.max(part.high_water);
    whole.most_used = whole.most_used.max(part.most_used);
    let sum = |report: &PhaseReport| report.held.values().sum::<u64>();
    if sum(&part) > sum(&whole) {
        whole.held = part.held;
    }
    for (whole, part) in [(&mut whole.chores, part.chores), (&mut whole.left, part.left)] {
        whole.pack_seconds = whole.pack_seconds.max(part.pack_seconds);
        whole.offload_seconds = whole.offload_seconds.max(part.offload_seconds);
        whole.reference_seconds = whole.reference_seconds.max(part.reference_seconds);
        whole.switched = switches(whole.switched, part.switched);
    }
    whole
}

/// All ranks know what the plan moves and had to move; each adds what went through it.
fn switches(mut whole: Switched, part: Switched) -> Switched {
    whole.sent_bytes += part.sent_bytes;
    whole.received_bytes += part.received_bytes;
    whole.seconds = whole.seconds.max(part.seconds);
    whole.cpu_seconds += part.cpu_seconds;
    whole
}

/// Tokens and work are sums, times those of the slowest; passes are those of all devices.
pub(super) fn samplings(mut whole: GenerateReport, part: GenerateReport) -> GenerateReport {
    whole.prompt_tokens += part.prompt_tokens;
    whole.new_tokens += part.new_tokens;
    whole.useful_flops += part.useful_flops;
    whole.least_bytes += part.least_bytes;
    whole.prefill_seconds = whole.prefill_seconds.max(part.prefill_seconds);
    whole.seconds = whole.seconds.max(part.seconds);
    whole.working_bytes = whole.working_bytes.max(part.working_bytes);
    whole.pages_high_water = whole.pages_high_water.max(part.pages_high_water);
    let mut decode: BTreeMap<u64, _> = whole.decode.iter().map(|p| (p.rows, *p)).collect();
    for passes in part.decode {
        decode
            .entry(passes.rows)
            .and_modify(|sum| {
                sum.passes += passes.passes;
                sum.seconds += passes.seconds;
                sum.cached_tokens += passes.cached_tokens;
            })
            .or_insert(passes);
    }
    whole.decode = decode.into_values().collect();
    whole
}

/// All ranks know the figures of the step; time and memory are those of who took most.
fn steps(mut whole: StepReport, part: &StepReport, rank: usize) -> Result<StepReport, Failure> {
    let of = |report: &StepReport| (report.policy_version, report.skipped);
    if of(&whole) != of(part) {
        let shown = |report: &StepReport| {
            let (version, skipped) = of(report);
            format!("version {version}{}", if skipped { ", its step skipped" } else { "" })
        };
        return Err(apart(rank, &shown(part), &shown(&whole)));
    }
    whole.seconds = whole.seconds.max(part.seconds);
    whole.memory_high_water = whole.memory_high_water.max(part.memory_high_water);
    whole.micro_batch = whole.micro_batch.min(part.micro_batch);
    whole.ran.extend(part.ran.iter().cloned());
    whole.exchanged = added(whole.exchanged, part.exchanged);
    Ok(whole)
}

/// Seconds of one and of another.
pub(super) fn added(one: [f64; 2], other: [f64; 2]) -> [f64; 2] {
    [one[0] + other[0], one[1] + other[1]]
}

fn apart(rank: usize, its: &str, others: &str) -> Failure {
    Failure::new(
        FailureKind::Device,
        format!("rank {rank} has {its}, the ranks before it {others}"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::{Doing, Span};
    use crate::engine::phase::DecodePasses;

    fn stepped(seconds: f64, policy_version: u64) -> Yield {
        let report = StepReport { loss: 2.5, seconds, policy_version, ..StepReport::default() };
        Yield::Stepped(report)
    }

    #[test]
    fn one_rank_s_result_is_the_crew_s() {
        assert_eq!(together("Train", vec![stepped(1.0, 3)]).unwrap(), stepped(1.0, 3));
        assert_eq!(together("Calibrate", vec![Yield::Nothing]).unwrap(), Yield::Nothing);
    }

    #[test]
    fn a_step_takes_as_long_as_its_slowest_rank_and_ranks_that_disagree_are_named() {
        let whole = together("Train", vec![stepped(1.0, 3), stepped(4.0, 3), stepped(2.0, 3)]);
        assert_eq!(whole.unwrap(), stepped(4.0, 3));
        let apart = together("Train", vec![stepped(1.0, 3), stepped(1.0, 3), stepped(1.0, 4)]);
        let text = apart.unwrap_err().text;
        assert_eq!(text, "rank 2 has version 4, the ranks before it version 3");
        let saved = |policy_version| Yield::Saved(SavedState { policy_version, optimizer_step: 1 });
        assert!(together("Save", vec![saved(1), saved(1)]).is_ok());
        assert!(together("Save", vec![saved(1), saved(2)]).is_err());
        assert!(together("Save", vec![saved(1), Yield::Nothing]).is_err());
    }

    #[test]
    fn a_step_has_the_passes_of_each_rank_once() {
        let of = |rank: u32| {
            let span = Span { doing: Doing::Update, start: 1.0, end: 2.0 };
            Yield::Stepped(StepReport {
                ran: vec![(rank, vec![span])],
                exchanged: [2.0, 0.5],
                ..StepReport::default()
            })
        };
        let Yield::Stepped(whole) = together("Train", vec![of(0), of(1), of(2)]).unwrap() else {
            panic!()
        };
        assert_eq!(whole.ran.iter().map(|(rank, _)| *rank).collect::<Vec<_>>(), [0, 1, 2]);
        assert_eq!(whole.exchanged, [6.0, 1.5]);
    }

    #[test]
    fn scores_stand_in_order_of_the_ranks_and_samplings_add_up() {
        let scores = |values: &[f64]| {
            Yield::Scores(values.iter().map(|value| SequenceScore::Reward(*value)).collect())
        };
        let whole = together("Score", vec![scores(&[1.0, 2.0]), scores(&[]), scores(&[3.0])]);
        assert_eq!(whole.unwrap(), scores(&[1.0, 2.0, 3.0]));
        let generated = |rows: &[u64], seconds: f64| {
            let passes = |rows: &u64| DecodePasses { rows: *rows, passes: 1, ..Default::default() };
            let decode = rows.iter().map(passes).collect();
            let report = GenerateReport { new_tokens: 5, seconds, decode, ..Default::default() };
            Yield::Generated(Generated { report, span: [seconds, 2.0 * seconds] })
        };
        let whole = together("Generate", vec![generated(&[4, 8], 1.0), generated(&[2, 8], 3.0)]);
        let Yield::Generated(Generated { report, span }) = whole.unwrap() else { panic!() };
        assert_eq!((report.new_tokens, report.seconds, span), (10, 3.0, [1.0, 6.0]));
        let passes: Vec<_> = report.decode.iter().map(|p| (p.rows, p.passes)).collect();
        assert_eq!(passes, [(2, 1), (4, 1), (8, 2)]);
    }

    #[test]
    fn a_phase_holds_what_the_rank_that_holds_most_holds() {
        let phase = |[weights, cache]: [u64; 2], high_water| {
            let held = [("policy/weights", weights), ("policy/cache", cache)];
            let held = held.map(|(owner, bytes)| (owner.to_string(), bytes)).into();
            Yield::Phase(PhaseReport { bytes_out: 3, held, high_water, ..Default::default() })
        };
        let parts = vec![phase([8, 9], 20), phase([4, 16], 10), phase([12, 2], 10)];
        let Yield::Phase(report) = together("EnterPhase", parts).unwrap() else { panic!() };
        let held = [report.held["policy/weights"], report.held["policy/cache"]];
        assert_eq!((held, report.high_water, report.bytes_out), ([4, 16], 20, 9));
    }
}
