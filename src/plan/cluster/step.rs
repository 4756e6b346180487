//! A step of training: bubbles of the real schedule with the real, uneven stages, and its simulated time.
//!
//! Bubbles are told without messages. The simulated time has messages, exchanges, sums and the optimizer in it; where a step
//! has many micro-batches, the first ones are simulated and each further one adds what those in their stride do (tested).
//! Steps are taken to follow each other without a gap, each stage beginning the next when it is done (post-validation).

use super::batch::Batch;
use super::bytes::{Held, Layouts};
use super::load::{Load, Passes};
use super::traffic::{Traffic, summed};
use crate::cluster::mesh::Mesh;
use crate::config::HardwareConfig;
use crate::model::flops_per_token;
use crate::plan::simulation::engine::{Outcome, Span};
use crate::plan::simulation::programs::{End, Pipeline};
use crate::plan::simulation::{Links, Program, What, simulate};
use crate::train::pipeline::{Kind, Schedule};
use serde::Serialize;
use std::collections::BTreeMap;

/// All schedules, with their names in TOML.
pub const SCHEDULES: [(&str, Kind); 4] = [
    ("1f1b", Kind::OneForwardOneBackward),
    ("zb-h1", Kind::ZeroBubbleH1),
    ("zb-h2", Kind::ZeroBubbleH2),
    ("zb-v", Kind::ZeroBubbleV),
];

/// A step of training of one stage of a run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StepPlan {
    /// The stage of the run.
    pub stage: String,
    /// Micro-batches of each data rank.
    pub micro_batches: usize,
    /// Tokens of a step.
    pub step_tokens: f64,
    /// FLOPs of a token in training.
    pub flops_per_token: f64,
    /// Share of the ranks' time that they idle, without messages.
    pub bubble_share: f64,
    /// What of it is there because stages differ: it would stay with any schedule.
    pub uneven_share: f64,
    /// `bubble_share` of each schedule; absent where a step has too few micro-batches for it.
    pub bubble_shares: BTreeMap<&'static str, Option<f64>>,
    /// Bytes of a step.
    pub traffic: Traffic,
    /// Its time; absent without `[cluster.hardware]`.
    pub simulated: Option<Simulated>,
}

/// A simulated step.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Simulated {
    /// Seconds from one step to the next.
    pub step_seconds: f64,
    /// Shares of the ranks' time: passes,
    pub compute_share: f64,
    /// exchanges that shared experts do not hide,
    pub exchange_share: f64,
    /// sums of gradients, weights that come back, the optimizer,
    pub update_share: f64,
    /// and waiting.
    pub idle_share: f64,
    /// Useful FLOPs of the peak.
    pub share_of_peak: f64,
    /// GPU hours of a trillion tokens.
    pub gpu_hours_per_trillion_tokens: f64,
}

/// What a step is planned from.
pub struct Step<'a> {
    /// Its model and machine.
    pub load: Load<'a>,
    /// Layouts.
    pub layouts: &'a Layouts,
    /// The run's schedule.
    pub kind: Kind,
    /// Its batch.
    pub batch: Batch,
}

/// The links of `[cluster.hardware]`.
pub fn links(hardware: &HardwareConfig) -> Links {
    Links {
        node: hardware.devices_per_node,
        node_rate: hardware.node_bytes_per_second,
        node_latency: hardware.node_latency_seconds,
        network_rate: hardware.network_bytes_per_second,
        network_latency: hardware.network_latency_seconds,
    }
}

impl Step<'_> {
    fn mesh(&self) -> Mesh {
        *self.layouts.training.mesh()
    }

    /// The plan; the step is of a stage of that name.
    pub fn plan(&self, stage: &str) -> StepPlan {
        let mesh = self.mesh();
        let share = |kind| self.bubble_share(kind);
        let (model, batch) = (self.load.model, &self.batch);
        StepPlan {
            stage: stage.to_string(),
            micro_batches: batch.micro_batches,
            step_tokens: batch.step_tokens,
            flops_per_token: flops_per_token(model, batch.sequence),
            bubble_share: share(self.kind).unwrap_or(f64::NAN),
            uneven_share: self.uneven_share(),
            bubble_shares: SCHEDULES.into_iter().map(|(name, kind)| (name, share(kind))).collect(),
            traffic: Traffic::new(&self.load, &mesh, &self.layouts.held, batch, self.kind.chunks()),
            simulated: self.load.hardware.map(|hardware| self.simulated(hardware)),
        }
    }

    /// A token's passes through the pieces of each stage, if the schedule has so many of them.
    pub fn passes(&self, kind: Kind) -> Vec<Vec<Passes>> {
        let training = self.layouts.training.in_chunks(kind.chunks());
        let of = |stage, chunk| self.load.passes(&training, stage, chunk, self.batch.sequence);
        let stages = 0..self.mesh().pipeline();
        stages.map(|stage| (0..kind.chunks()).map(|chunk| of(stage, chunk)).collect()).collect()
    }

    fn uneven_share(&self) -> f64 {
        let passes = self.passes(self.kind);
        let work = |pieces: &Vec<Passes>| -> f64 { pieces.iter().map(all).sum() };
        let most = passes.iter().map(work).fold(0.0, f64::max);
        1.0 - passes.iter().map(work).sum::<f64>() / (passes.len() as f64 * most)
    }

    /// Idle share without messages.
    fn bubble_share(&self, kind: Kind) -> Option<f64> {
        let stages = self.mesh().pipeline();
        if kind.chunks() * stages > self.load.model.num_hidden_layers.max(stages) {
            return None;
        }
        let passes = self.passes(kind);
        let tokens = self.batch.tokens;
        let times = |stage: usize, chunk: usize| passes[stage][chunk].times(tokens, 1.0, 0.0).0;
        let of = |micro_batches| {
            let timeline =
                Schedule::new(kind, stages, micro_batches).ok()?.simulate_uneven(times)?;
            let ends = |ran: &Vec<crate::train::pipeline::Ran>| {
                ran.last().map_or(0.0, |last| last.end)
                    - ran.first().map_or(0.0, |first| first.start)
            };
            Some([timeline.stages.iter().map(ends).fold(0.0, f64::max)])
        };
        let [period] = in_stride(self.batch.micro_batches, stages, of)?;
        let each: f64 = passes.iter().flatten().map(all).sum();
        let busy = each * tokens * self.batch.micro_batches as f64;
        Some((1.0 - busy / (stages as f64 * period)).max(0.0))
    }

    fn simulated(&self, hardware: &HardwareConfig) -> Simulated {
        let mesh = self.mesh();
        let of = |micro_batches| {
            let outcome = self.outcome(hardware, self.kind, micro_batches)?;
            let shares = [is_pass, is_exchange, is_update].map(|is| busy(&outcome, is));
            Some([period(&outcome), shares[0], shares[1], shares[2]])
        };
        let figures = in_stride(self.batch.micro_batches, mesh.pipeline(), of);
        let [seconds, compute, exchange, update] = figures.unwrap_or([f64::NAN; 4]);
        let ranks = mesh.ranks() as f64;
        let share = |busy: f64| busy / (ranks * seconds);
        let flops = flops_per_token(self.load.model, self.batch.sequence) * self.batch.step_tokens;
        Simulated {
            step_seconds: seconds,
            compute_share: share(compute),
            exchange_share: share(exchange),
            update_share: share(update),
            idle_share: (1.0 - share(compute + exchange + update)).max(0.0),
            share_of_peak: flops / (ranks * seconds * hardware.peak_flops),
            gpu_hours_per_trillion_tokens: ranks * seconds / self.batch.step_tokens * 1e12 / 3600.0,
        }
    }

    /// A step of so many micro-batches in simulated time.
    pub fn outcome(
        &self,
        hardware: &HardwareConfig,
        kind: Kind,
        micro_batches: usize,
    ) -> Option<Outcome> {
        let mesh = self.mesh();
        let schedule = Schedule::new(kind, mesh.pipeline(), micro_batches).ok()?;
        let tokens = |_, _| self.batch.tokens;
        let pipeline = Pipeline {
            schedule: &schedule,
            mesh,
            passes: self.passes(kind),
            tokens: &tokens,
            boundary: self.load.model.hidden_size as f64 * self.load.number_bytes(),
            links: links(hardware),
        };
        let mut program = Program::new(mesh.ranks());
        pipeline.passes(&mut program);
        pipeline.end(&mut program, &self.ends(hardware));
        simulate(&program, &links(hardware)).ok()
    }

    /// The end of a step on each stage.
    pub fn ends(&self, hardware: &HardwareConfig) -> Vec<End> {
        let (mesh, links) = (self.mesh(), links(hardware));
        let number = self.load.number_bytes();
        let end = |(stage, held): (usize, &Held)| {
            let rank = stage * mesh.data();
            let groups = [mesh.data_group(rank), mesh.expert_replicas(rank)];
            let elements = summed(&mesh, held);
            let seconds = |bytes: f64| -> f64 {
                let of = |(group, elements): (&Vec<usize>, f64)| {
                    let (rate, latency) = links.spread(group);
                    if elements > 0.0 { elements * bytes / rate + latency } else { 0.0 }
                };
                groups.iter().zip(elements).map(of).sum()
            };
            // Reads gradient, master and both moments, writes the last three and the weight.
            let gradient = hardware.gradient_dtype.bytes() as f64;
            let moved = held.moments as f64 * (gradient + 24.0 + number);
            End {
                reduce: seconds(gradient),
                update: moved / hardware.memory_bytes_per_second,
                gather: seconds(number),
            }
        };
        self.layouts.held.iter().enumerate().map(end).collect()
    }
}

/// Figures of a step of many micro-batches, drawn on from two shorter ones.
fn in_stride<const N: usize>(
    micro_batches: usize,
    stages: usize,
    of: impl Fn(usize) -> Option<[f64; N]>,
) -> Option<[f64; N]> {
    let (short, long) = (3 * stages + 1, 5 * stages + 1);
    if micro_batches <= long {
        return of(micro_batches);
    }
    let (before, at) = (of(short)?, of(long)?);
    let further = (micro_batches - long) as f64 / (long - short) as f64;
    Some(std::array::from_fn(|i| at[i] + further * (at[i] - before[i])))
}

fn all(passes: &Passes) -> f64 {
    passes.forward + passes.backward_input + passes.backward_weight
}

/// The longest time of a rank between its first act and its last.
fn period(outcome: &Outcome) -> f64 {
    let of = |spans: &Vec<Span>| {
        spans.last().map_or(0.0, |last| last.end) - spans.first().map_or(0.0, |first| first.start)
    };
    outcome.spans.iter().map(of).fold(0.0, f64::max)
}

/// Seconds that all ranks are busy with some of it.
fn busy(outcome: &Outcome, is: fn(What) -> bool) -> f64 {
    let spans = outcome.spans.iter().flatten().filter(|span| is(span.what));
    spans.map(|span| span.end - span.start).sum()
}

fn is_pass(what: What) -> bool {
    matches!(what, What::Forward(_) | What::BackwardInput(_) | What::BackwardWeight(_))
}

fn is_exchange(what: What) -> bool {
    what == What::Exchange
}

fn is_update(what: What) -> bool {
    matches!(what, What::Reduce | What::Update)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::RunConfig;
    use crate::plan::cluster::layouts;
    use std::path::Path;

    fn planned(name: &str, assignments: &[&str], mut check: impl FnMut(&Step, &HardwareConfig)) {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/paper");
        let assignments: Vec<String> = assignments.iter().map(|text| text.to_string()).collect();
        let config = RunConfig::load(&folder.join(name), &assignments).unwrap().config;
        let layouts = layouts(&config.cluster, &config.model).unwrap();
        let (mesh, hardware) = (layouts.training.mesh(), config.cluster.hardware.clone().unwrap());
        let load = Load { model: &config.model, hardware: Some(&hardware), expert: mesh.expert() };
        let (kind, stage) = (config.cluster.schedule, &config.stages[0].kind);
        let batch = Batch::new(&config, stage, mesh.data(), 1);
        check(&Step { load, layouts: &layouts, kind, batch }, &hardware);
    }

    #[test]
    fn a_step_drawn_on_from_its_stride_is_the_step_simulated_to_its_end() {
        // 4608 rows over 8 ranks are 576 micro-batches; 160 of them are few enough to be simulated whole.
        for (schedule, rows) in [("1f1b", 1280), ("zb-h1", 1280), ("zb-h2", 1280), ("zb-v", 1280)] {
            let set = [format!("cluster.schedule={schedule}"), format!("stage.base.batch={rows}")];
            let set: Vec<&str> = set.iter().map(String::as_str).collect();
            planned("deepseek-67b.toml", &set, |step, hardware| {
                let micro_batches = step.batch.micro_batches;
                assert_eq!(micro_batches, 160);
                let whole = step.outcome(hardware, step.kind, micro_batches).unwrap();
                let drawn = step.simulated(hardware).step_seconds;
                assert!((drawn / period(&whole) - 1.0).abs() < 1e-9, "{schedule}: {drawn}");
            });
        }
    }

    #[test]
    fn the_work_of_a_rank_is_the_same_for_any_number_of_them() {
        // What a simulation costs is the acts that it takes.
        let mut acts = Vec::new();
        for data in [1usize, 4, 8, 16] {
            let (data, rows) =
                (format!("cluster.data={data}"), format!("stage.base.batch={}", 64 * data));
            planned("deepseek-67b.toml", &[&data, &rows], |step, hardware| {
                let outcome = step.outcome(hardware, step.kind, 64).unwrap();
                acts.push(outcome.acts as f64 / step.layouts.training.mesh().ranks() as f64);
            });
        }
        assert!(acts.iter().all(|each| *each == acts[0]), "{acts:?}");
    }
}
