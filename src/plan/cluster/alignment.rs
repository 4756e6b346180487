//! A step of GRPO on a cluster, in simulated time: switch of layouts, rollouts, scoring, training, update.
//!
//! 1. **switch**: weights go to the sampler's layout while moments and masters go to the host.
//! 2. **generate**: prompts, then new tokens, the ranks of a group pass by pass together; the longest rollout of a group holds
//!    all of it.
//! 3. **score**: reward models and reference, each in the layout of training; while one scores, the next one comes from the
//!    host.
//! 4. **train**: one pass of the schedule over the step's rollouts, while moments and masters come back.
//! 5. **update**: sums, optimizer, weights.
//!
//! All ranks wait for each other at the end of a phase. More than one update repeats 4 and 5.

use super::batch::Batch;
use super::bytes::Layouts;
use super::load::Load;
use super::rollouts::{Sampler, decode_passes, lengths, new_tokens, prompts_of, rollouts_of};
use super::step::{Step, links};
use super::switch::SwitchPlan;
use crate::cluster::mesh::cut;
use crate::config::stage::GrpoStage;
use crate::config::{Attention, HardwareConfig, Offload, RunConfig};
use crate::model::forward_flops_per_token;
use crate::plan::cost::cache_elements_per_token;
use crate::plan::estimate::prompt_tokens;
use crate::plan::memory::others;
use crate::plan::simulation::engine::Stuck;
use crate::plan::simulation::programs::Pipeline;
use crate::plan::simulation::{Act, Channel, Outcome, Program, What, simulate};
use crate::train::pipeline::{Kind, Schedule};
use serde::Serialize;

/// Names of the phases, in order.
pub const PHASES: [&str; 5] = ["switch", "generate", "score", "train", "update"];

/// A step of a GRPO stage.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct AlignmentPlan {
    /// The stage of the run.
    pub stage: String,
    /// Rollouts of a step.
    pub rollouts: usize,
    /// Tokens of a prompt, and new ones of a step.
    pub prompt_tokens: usize,
    /// New tokens of a step.
    pub new_tokens: usize,
    /// Models that are held beside the policy.
    pub models: Vec<String>,
    /// What the switch of layouts moves.
    pub switch: SwitchPlan,
    /// Ranks that hold the cache of the same sequence whole.
    pub cache_copies: usize,
    /// Bytes that go to the host and come back in a step, over all ranks.
    pub offloaded_bytes: f64,
    /// Its time; absent without `[cluster.hardware]`, and where it takes more than [`MOST_ACTS`].
    pub simulated: Option<SimulatedAlignment>,
}

/// Acts of a step that is simulated, at most: some seconds, and less than a gigabyte.
pub const MOST_ACTS: usize = 1 << 24;

/// A simulated step.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SimulatedAlignment {
    /// Seconds of the phases, in order.
    pub seconds: Vec<(&'static str, f64)>,
    /// Seconds of the step.
    pub step_seconds: f64,
    /// Share of the step that the rank that waits most does for what comes from its host or goes there.
    pub exposed_offload_share: f64,
    /// New tokens of a step for each second and GPU.
    pub tokens_per_second_and_gpu: f64,
    /// Useful FLOPs of the peak: prompts and replies once, and thrice where they are trained on.
    pub rfu: f64,
}

/// What a step of GRPO is planned from.
pub struct Alignment<'a> {
    /// The run.
    pub config: &'a RunConfig,
    /// The stage.
    pub grpo: &'a GrpoStage,
    /// Model and machine of training.
    pub load: Load<'a>,
    /// Layouts.
    pub layouts: &'a Layouts,
    /// The run's schedule.
    pub kind: Kind,
    /// The batch of training.
    pub batch: Batch,
}

impl Alignment<'_> {
    /// The plan of a step of a stage of that name.
    pub fn plan(&self, stage: &str, switch: &SwitchPlan) -> Result<AlignmentPlan, Stuck> {
        let grpo = self.grpo;
        let rollouts = grpo.prompts * grpo.group_size;
        let hardware = self.load.hardware.filter(|_| self.acts() <= MOST_ACTS);
        let simulated = hardware.map(|hardware| self.simulated(hardware, switch));
        let data = self.layouts.training.mesh().data() as f64;
        let loads: f64 =
            (0..self.layouts.held.len()).map(|place| self.loads(place).sum::<f64>()).sum();
        Ok(AlignmentPlan {
            stage: stage.to_string(),
            rollouts,
            prompt_tokens: prompt_tokens(self.config, grpo) as usize,
            new_tokens: self.new_tokens(),
            models: others(grpo),
            switch: switch.clone(),
            cache_copies: self.cache_copies(),
            offloaded_bytes: data * loads,
            simulated: simulated.transpose()?,
        })
    }

    /// About as many acts as the ranks' lines take: passes that decode, and those of micro-batches with their messages.
    fn acts(&self) -> usize {
        let (ranks, sampling) = (self.layouts.training.mesh().ranks(), self.layouts.sampling);
        let copies = sampling.tensor.max(sampling.expert);
        let decoded = self.new_tokens().saturating_mul(copies) / self.config.engine.decode_batch;
        let passes = others(self.grpo).len() + 3 * self.grpo.updates as usize;
        let each = 3 * self.kind.chunks() * passes;
        let trained = ranks.saturating_mul(self.batch.micro_batches).saturating_mul(each);
        decoded.saturating_add(trained)
    }

    fn lengths(&self) -> Vec<usize> {
        lengths(self.grpo.prompts * self.grpo.group_size, self.grpo.max_new_tokens)
    }

    fn new_tokens(&self) -> usize {
        new_tokens(self.grpo.prompts * self.grpo.group_size, self.grpo.max_new_tokens)
    }

    /// The latents of MLA are whole on each rank of a tensor group, heads of grouped attention are cut as far as there are.
    fn cache_copies(&self) -> usize {
        let tensor = self.layouts.sampling.tensor;
        match self.load.model.attention() {
            Attention::Mla => tensor,
            Attention::Gqa { kv_heads, .. } => tensor.div_ceil(kv_heads),
        }
    }

    /// Bytes that come from the host to a rank of a stage: other models, then moments and masters.
    fn loads(&self, place: usize) -> impl Iterator<Item = f64> {
        let engine = &self.config.engine;
        let weights = self.layouts.held[place].weights as f64 * self.load.number_bytes();
        let masters = if self.load.number_bytes() < 4.0 { 4.0 } else { 0.0 };
        let optimizer = self.layouts.held[place].moments as f64 * (8.0 + masters);
        let of = |role: String| {
            let what = if role == "reference" { Offload::Reference } else { Offload::RewardModels };
            if engine.offloads(what) { weights } else { 0.0 }
        };
        let models: Vec<f64> = others(self.grpo).into_iter().map(of).collect();
        let optimizer = if engine.offloads(Offload::Optimizer) { optimizer } else { 0.0 };
        models.into_iter().chain([optimizer])
    }

    fn simulated(
        &self,
        hardware: &HardwareConfig,
        switch: &SwitchPlan,
    ) -> Result<SimulatedAlignment, Stuck> {
        let outcome = self.outcome(hardware, switch)?;
        let mut before = 0.0;
        let seconds = outcome.phases.iter().map(|(number, end)| {
            let seconds = end - before;
            before = *end;
            (PHASES[*number], seconds)
        });
        let seconds: Vec<(&'static str, f64)> = seconds.collect();
        let ranks = self.layouts.training.mesh().ranks();
        let new_tokens = self.new_tokens();
        let prompts = (self.grpo.prompts as u64 * prompt_tokens(self.config, self.grpo)) as f64;
        let forward = forward_flops_per_token(self.load.model, self.batch.sequence);
        let passes = 1.0 + 3.0 * self.grpo.updates as f64;
        let useful = passes * (prompts + new_tokens as f64) * forward;
        let waited = outcome.waited_for_loads.iter().copied().fold(0.0, f64::max);
        let each = outcome.seconds * ranks as f64;
        Ok(SimulatedAlignment {
            seconds,
            step_seconds: outcome.seconds,
            exposed_offload_share: waited / outcome.seconds,
            tokens_per_second_and_gpu: new_tokens as f64 / each,
            rfu: useful / (each * hardware.peak_flops),
        })
    }

    /// The step in simulated time.
    pub fn outcome(
        &self,
        hardware: &HardwareConfig,
        switch: &SwitchPlan,
    ) -> Result<Outcome, Stuck> {
        let ranks = self.layouts.training.mesh().ranks();
        let mut program = Program::new(ranks);
        // Lines N + r copy from the host of rank r, 2N + r to it.
        program.ranks.extend((0..2 * ranks).map(|line| line % ranks));
        program.lines.resize(3 * ranks, Vec::new());
        let everyone = program.group((0..ranks).collect());
        let end = |program: &mut Program, number: usize| {
            let act = Act::Meet { group: everyone, seconds: 0.0, what: What::Phase(number) };
            (0..ranks).for_each(|rank| program.lines[rank].push(act));
        };
        self.switch(&mut program, hardware, switch);
        end(&mut program, 0);
        self.generate(&mut program, hardware);
        end(&mut program, 1);
        self.score(&mut program, hardware);
        end(&mut program, 2);
        self.train(&mut program, hardware, |program| end(program, 3));
        end(&mut program, 4);
        simulate(&program, &links(hardware))
    }

    fn place(&self, rank: usize) -> usize {
        self.layouts.training.mesh().place(rank).stage
    }

    fn switch(&self, program: &mut Program, hardware: &HardwareConfig, switch: &SwitchPlan) {
        let (ranks, number) = (program.ranks.len() / 3, self.load.number_bytes());
        let channel = Channel::Weights;
        for round in &switch.messages {
            for (from, to, elements) in round {
                let bytes = *elements as f64 * number;
                program.lines[*from].push(Act::Send { to: *to, channel, bytes });
            }
            for (from, to, _) in round {
                program.lines[*to].push(Act::Receive { from: *from, channel });
            }
        }
        for rank in 0..ranks {
            let optimizer = self.loads(self.place(rank)).last().unwrap_or(0.0);
            let seconds = optimizer / hardware.host_bytes_per_second;
            let done = Act::Send { to: rank, channel: Channel::Loaded, bytes: 0.0 };
            program.lines[2 * ranks + rank].extend([Act::Run { seconds, what: What::Store }, done]);
            let from = 2 * ranks + rank;
            program.lines[rank].push(Act::Receive { from, channel: Channel::Loaded });
        }
    }

    fn generate(&self, program: &mut Program, hardware: &HardwareConfig) {
        let sampler = self.sampler(hardware);
        let sampling = self.layouts.sampling;
        let (lengths, prompt) = (self.lengths(), prompt_tokens(self.config, self.grpo) as usize);
        let slots = self.config.engine.decode_batch;
        for first in (0..sampling.ranks).step_by(sampler.group()) {
            let members: Vec<usize> = (first..first + sampler.group()).collect();
            let group = program.group(members.clone());
            let mut passes = Vec::new();
            for rank in &members {
                let own = rollouts_of(*rank, &sampling, lengths.len());
                let seconds = sampler.prefill(prompts_of(&own, self.grpo), prompt);
                let what = What::Prefill;
                program.lines[*rank].push(Act::Meet { group, seconds, what });
                passes.push(decode_passes(&lengths[own], prompt, slots));
            }
            let most = passes.iter().map(Vec::len).max().unwrap_or(0);
            for number in 0..most {
                let of = |passes: &Vec<_>| passes.get(number).copied().unwrap_or_default();
                // Ranks of a tensor group share their rows.
                let rows: usize = passes.iter().map(|passes| of(passes).rows).sum();
                let rows = rows / sampling.tensor;
                for (rank, passes) in members.iter().zip(&passes) {
                    let seconds = sampler.decode(of(passes), rows);
                    let what = What::Decode;
                    program.lines[*rank].push(Act::Meet { group, seconds, what });
                }
            }
        }
    }

    fn sampler<'a>(&'a self, hardware: &'a HardwareConfig) -> Sampler<'a> {
        let sampling = self.layouts.sampling;
        let (code, own) = (self.load.code_bytes(self.grpo.rollout_dtype), self.load.number_bytes());
        let all = self.layouts.sampler_bytes(code, own as u64) as f64;
        let experts = (self.layouts.sampled_experts() * code) as f64;
        let elements = cache_elements_per_token(self.load.model) as f64;
        let parts = sampling.tensor as f64 / self.cache_copies() as f64;
        Sampler {
            load: Load { expert: sampling.expert, ..self.load },
            hardware,
            links: links(hardware),
            sampling,
            weights: [all - experts, experts],
            cache: elements / parts * f64::from(hardware.cache_bits) / 8.0,
        }
    }

    fn score(&self, program: &mut Program, hardware: &HardwareConfig) {
        let ranks = program.ranks.len() / 3;
        let models = others(self.grpo).len();
        let lengths = self.lengths();
        let tokens = |data, micro_batch| self.tokens(&lengths, data, micro_batch);
        let schedule = self.schedule();
        let pipeline = self.pipeline(&schedule, hardware, &tokens);
        let freed = |rank| Act::Send { to: ranks + rank, channel: Channel::Freed(0), bytes: 0.0 };
        for rank in 0..ranks {
            // One model scores and the next one is on its way: there is room for two.
            program.lines[rank].extend([freed(rank), freed(rank)]);
            for bytes in self.loads(self.place(rank)).take(models) {
                let seconds = bytes / hardware.host_bytes_per_second;
                program.lines[ranks + rank].extend([
                    Act::Receive { from: rank, channel: Channel::Freed(0) },
                    Act::Run { seconds, what: What::Load },
                    Act::Send { to: rank, channel: Channel::Loaded, bytes: 0.0 },
                ]);
            }
        }
        for _ in 0..models {
            for rank in 0..ranks {
                let loaded = Act::Receive { from: ranks + rank, channel: Channel::Loaded };
                program.lines[rank].push(loaded);
            }
            pipeline.forward(program);
            (0..ranks).for_each(|rank| program.lines[rank].push(freed(rank)));
        }
    }

    fn train(
        &self,
        program: &mut Program,
        hardware: &HardwareConfig,
        trained: impl FnOnce(&mut Program),
    ) {
        let ranks = program.ranks.len() / 3;
        let lengths = self.lengths();
        let tokens = |data, micro_batch| self.tokens(&lengths, data, micro_batch);
        let schedule = self.schedule();
        let pipeline = self.pipeline(&schedule, hardware, &tokens);
        for rank in 0..ranks {
            let channel = Channel::Freed(1);
            program.lines[rank].push(Act::Send { to: ranks + rank, channel, bytes: 0.0 });
            let optimizer = self.loads(self.place(rank)).last().unwrap_or(0.0);
            let seconds = optimizer / hardware.host_bytes_per_second;
            program.lines[ranks + rank].extend([
                Act::Receive { from: rank, channel },
                Act::Run { seconds, what: What::Load },
                Act::Send { to: rank, channel: Channel::Loaded, bytes: 0.0 },
            ]);
        }
        let ends = self.step().ends(hardware);
        let mut trained = Some(trained);
        for update in 0..self.grpo.updates {
            pipeline.passes(program);
            if update == 0 {
                for rank in 0..ranks {
                    let loaded = Act::Receive { from: ranks + rank, channel: Channel::Loaded };
                    program.lines[rank].push(loaded);
                }
            }
            // The phase is named after its last update.
            if update + 1 == self.grpo.updates
                && let Some(trained) = trained.take()
            {
                trained(program);
            }
            pipeline.end(program, &ends);
        }
    }

    fn step(&self) -> Step<'_> {
        let Alignment { load, layouts, kind, batch, .. } = *self;
        Step { load, layouts, kind, batch }
    }

    fn schedule(&self) -> Schedule {
        let stages = self.layouts.training.mesh().pipeline();
        Schedule::new(self.kind, stages, self.batch.micro_batches)
            .expect("a plan's batches have the micro-batches that its schedule needs")
    }

    fn pipeline<'a>(
        &'a self,
        schedule: &'a Schedule,
        hardware: &HardwareConfig,
        tokens: &'a dyn Fn(usize, usize) -> f64,
    ) -> Pipeline<'a> {
        Pipeline {
            schedule,
            mesh: *self.layouts.training.mesh(),
            passes: self.step().passes(self.kind),
            tokens,
            boundary: self.load.model.hidden_size as f64 * self.load.number_bytes(),
            links: links(hardware),
        }
    }

    /// Tokens of a data rank's micro-batch: its rollouts with their prompts, once for each group where they are shared.
    fn tokens(&self, lengths: &[usize], data: usize, micro_batch: usize) -> f64 {
        let own = cut(lengths.len(), self.layouts.training.mesh().data(), data);
        let part = cut(own.len(), self.batch.micro_batches, micro_batch);
        let part = own.start + part.start..own.start + part.end;
        let prompt = prompt_tokens(self.config, self.grpo) as usize;
        let prompts =
            if self.grpo.share_prompts { prompts_of(&part, self.grpo) } else { part.len() };
        let new: usize = lengths[part].iter().sum();
        (prompts * prompt + new) as f64
    }
}
