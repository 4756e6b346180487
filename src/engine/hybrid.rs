//! HybridEngine: one device, its models, and the phases it moves through (DeepSeek-V2, section 4.2; deepseek_v2.md 4.5).
//!
//! | phase    | policy weights | packed for       | moments  | gradients | cache | other models   |
//! |----------|----------------|------------------|----------|-----------|-------|----------------|
//! | Idle     | resident       | -                | parked   | -         | -     | parked         |
//! | Generate | resident       | sampling         | parked   | -         | yes   | parked         |
//! | Score    | resident       | one model scored | parked   | -         | -     | one at a time  |
//! | Train    | resident       | training         | resident | yes       | -     | parked         |
//!
//! "Parked" is on the host or the disk if the plan (`offload_plan`) or a list of `engine.offload` wants it off the device, else
//! still resident. Packed weights carry the policy version; the sampler refuses another one before its first token.

use super::conductor::{Conductor, Manner};
use super::formats::Formats;
use super::parked_optimizer::ParkedOptimizer;
use super::phase::{Phase, PhaseReport, PrepareStage, Role};
use super::resident::{
    Calibration, Resident, config_of, interrupted, out_of_memory, require_policy,
};
use super::scoring::ROWS_AT_ONCE;
use super::switch::{Switch, Way, sampled};
use super::transfers::Transfers;
use super::utilisation::Chores;
use crate::cluster::{Broken, Group, Team, Timeline, work_for};
use crate::config::engine::{AttentionForm, Prefill};
use crate::config::fault::Fault;
use crate::config::routing::Balance;
use crate::config::{EngineConfig, ModelConfig};
use crate::model::{Gradients, LatentCache, PackFor, PackedModel, Params, PassError, Transformer};
use crate::train::job::{StepReport, TrainJob};
use crate::train::ranks::{experts_of, part_of};
use crate::train::step::{StepSettings, Trainee, examples_at_once, train_step};
use crate::train::{Items, Optimizer, Ranks, Rollouts};
use anyhow::{Context, Result, bail, ensure};
use rehearsal_kernels::{
    Activity, Arena, CpuKernels, Kernels, Kind, MappedFiles, Profile, Profiled, WeightFormat,
};
use serde::{Deserialize, Serialize};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What an engine is made with.
#[derive(Clone, Debug)]
pub struct EngineSetup {
    /// The run's model.
    pub model: ModelConfig,
    /// `[engine]`.
    pub engine: EngineConfig,
    /// The run's seed (initial weights).
    pub seed: u64,
    /// Folder for offloaded slabs; removed with the engine.
    pub spill: PathBuf,
    /// The ranks of the run.
    pub team: Team,
}

/// Counters that a checkpoint keeps beside the tensors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedState {
    /// Version of the policy's weights.
    pub policy_version: u64,
    /// Updates made by the optimizer.
    pub optimizer_step: u64,
}

/// One device and everything on it.
pub struct HybridEngine {
    pub(super) kernels: Arc<dyn Kernels>,
    pub(super) setup: EngineSetup,
    pub(super) phase: Phase,
    pub(super) policy: Option<Resident>,
    /// The policy's way to the layout of sampling, if that is another than the one of training.
    pub(super) switch: Option<Switch>,
    /// The policy's way to the ranks that only sample, if there are any.
    pub(super) to_samplers: Option<Way>,
    /// All ranks that sample and score together.
    pub(super) world: Group,
    pub(super) policy_version: u64,
    pub(super) others: BTreeMap<Role, Resident>,
    pub(super) optimizer: Option<ParkedOptimizer>,
    balance: Balance,
    pub(super) form: AttentionForm,
    pub(super) prefill: Prefill,
    pub(super) formats: Formats,
    /// Examples at once that a step of this stage had to make do with; 0 before any did not fit.
    fitting: usize,
    /// Rows that fitted when a model was scored last.
    pub(super) rows_at_once: Cell<usize>,
    /// Leads what moves between the device and what is below it.
    pub(super) conductor: Conductor,
    /// What of its totals the chores have.
    pub(super) settled: (f64, [u64; 2]),
    /// What was done beside sampling, rewards and training since a phase was last asked for.
    pub(super) chores: Chores,
    /// What the phase made; dropped when it ends.
    pub(super) working: Working,
}

/// Memory of the current phase.
#[derive(Default)]
pub(super) struct Working {
    pub packed: Option<PackedModel>,
    /// What the weights are packed as for sampling.
    pub(super) sampling: WeightFormat,
    pub gradients: Option<Gradients>,
    pub cache: Option<LatentCache>,
    pub scored: Option<(Role, Params, PackedModel)>,
    /// The policy's weights in the layout of sampling, if that is another than the one of training.
    pub switched: Option<Params>,
}

impl HybridEngine {
    /// An engine on the CPU with nothing loaded.
    pub fn new(setup: EngineSetup) -> Result<HybridEngine> {
        HybridEngine::profiled(setup, None)
    }

    /// The same; what it does is counted if a profile is given.
    pub fn profiled(setup: EngineSetup, profile: Option<Arc<Profile>>) -> Result<HybridEngine> {
        // An engine is made on the thread that will own it.
        work_for(setup.team.link.board(), setup.team.rank());
        std::fs::create_dir_all(&setup.spill)
            .with_context(|| format!("failed to create {}", setup.spill.display()))?;
        let arena = Arena::new(setup.engine.budget.map(|b| b.0));
        let EngineConfig { host_budget, deadline_seconds, .. } = setup.engine;
        let host_budget = host_budget.map_or(u64::MAX, |budget| budget.0);
        let deadline = Duration::from_secs(deadline_seconds.max(1));
        let gpu = setup.team.link.carrier();
        let host = gpu.map_or_else(|| Arc::new(MappedFiles) as _, |gpu| gpu.host_memory());
        let folder = setup.spill.clone();
        let transfers = Transfers::new(arena.clone(), folder, host, host_budget, deadline);
        let (plans, overlaps) = (setup.engine.offload.is_none(), setup.engine.overlap);
        let samples = setup.team.samplers == 0 || setup.team.is_sampler();
        let conductor = Conductor::new(Arc::new(transfers), Manner { plans, overlaps, samples });
        let plain = CpuKernels::new(setup.engine.threads, arena);
        let kernels: Arc<dyn Kernels> = match profile {
            Some(profile) => Arc::new(Profiled::new(Box::new(plain), profile)),
            None => Arc::new(plain),
        };
        Ok(HybridEngine {
            world: setup.team.group(setup.team.peers().collect()),
            kernels,
            setup,
            phase: Phase::Idle,
            policy: None,
            switch: None,
            to_samplers: None,
            policy_version: 0,
            others: BTreeMap::new(),
            optimizer: None,
            balance: Balance::NONE,
            form: AttentionForm::Expanded,
            prefill: Prefill::ByCost,
            formats: Formats::default(),
            fitting: 0,
            rows_at_once: Cell::new(ROWS_AT_ONCE),
            conductor,
            settled: Default::default(),
            chores: Chores::default(),
            working: Working::default(),
        })
    }

    /// Loads the models of a stage and starts its optimizer anew. Ends in Idle, at policy version 0.
    pub fn prepare(&mut self, stage: &PrepareStage) -> Result<()> {
        self.enter_phase(Phase::Idle)?;
        let _during = Activity::Load.begin(&self.kernels);
        self.conductor.clear();
        (self.policy, self.optimizer, self.policy_version) = (None, None, 0);
        (self.switch, self.to_samplers) = (None, None);
        self.others.clear();
        (self.balance, self.fitting) = (stage.balance, 0);
        self.rows_at_once.set(ROWS_AT_ONCE);
        (self.form, self.prefill) = (stage.form, stage.prefill);
        let Conductor { transfers, shelf, .. } = &self.conductor;
        let (seed, transfers, shelf) = (self.setup.seed, &transfers.clone(), shelf.clone());
        // Whoever only looks at a model may look at a reward model's weights too.
        if stage.optimizer.is_some() {
            require_policy(&stage.policy)?;
        }
        let mut config = config_of(&self.setup.model, &stage.policy)?;
        if let Some((yarn, positions)) = &stage.yarn {
            config.rope_scaling = yarn.clone();
            config.max_position_embeddings = *positions;
        }
        self.compare_sources(stage)?;
        let (model, ranks) = self.policy_model(&config, stage.value_head)?;
        let kernels = self.kernels.as_ref();
        let mut policy =
            Resident::load(kernels, &Role::Policy, model, &stage.policy, seed, transfers)?;
        policy.calibration = Calibration::default();
        shelf.add(&policy.weights, Role::Policy, false);
        self.policy = Some(policy);
        // Who only samples has no other model and no optimizer.
        let Some(ranks) = ranks else { return Ok(()) };
        if let Some(settings) = &stage.optimizer {
            let state = ParkedOptimizer::new(kernels, ranks, settings, stage.steps, transfers)?;
            shelf.add(&state.first, Role::Policy, true);
            shelf.add(&state.second, Role::Policy, true);
            self.optimizer = Some(state);
        }
        let mut others: Vec<_> =
            stage.reference.iter().map(|source| (Role::Reference, source.clone(), false)).collect();
        let folder = |path: &PathBuf| super::phase::ModelSource::Folder(path.clone());
        others.extend(
            stage
                .rewards
                .iter()
                .map(|(name, path)| (Role::Reward(name.clone()), folder(path), true)),
        );
        for (role, source, value_head) in others {
            let config = config_of(&self.setup.model, &source)?;
            let kernels = self.kernels.as_ref();
            let (team, timeline) = (&self.setup.team, Timeline::since(Instant::now()));
            let model = sampled(kernels, team, &config, value_head, &Arc::new(timeline))
                .map_err(out_of_memory)?;
            let model = Resident::load(kernels, &role, model, &source, seed, transfers)?;
            shelf.add(&model.weights, role.clone(), false);
            self.others.insert(role, model);
            self.park()?;
        }
        self.conductor.start(&config, self.prefill, self.others.keys(), stage.optimizer.is_some());
        self.settle();
        Ok(())
    }

    /// This rank's part of the policy, and what it needs of the others if it trains; readies the ways between layouts.
    fn policy_model(
        &mut self,
        config: &ModelConfig,
        value_head: bool,
    ) -> Result<(Transformer, Option<Ranks>)> {
        let (kernels, team) = (self.kernels.as_ref(), &self.setup.team);
        let timeline = Arc::new(Timeline::since(Instant::now()));
        let model = match team.is_sampler() {
            true => sampled(kernels, team, config, value_head, &timeline),
            false => {
                let (part, experts) = (part_of(team, config), experts_of(team, &timeline));
                Transformer::of_part(kernels, config, value_head, part, experts)
            }
        };
        let model = model.map_err(out_of_memory)?;
        if team.samplers > 0 {
            self.to_samplers = Some(Way::to_samplers(team, config, &model.layout));
        }
        if team.is_sampler() {
            return Ok((model, None));
        }
        self.switch =
            Switch::new(kernels, team, config, &model.layout, &timeline).map_err(out_of_memory)?;
        let ranks = Ranks::new(team, config, &model.layout, timeline);
        Ok((model, Some(ranks)))
    }

    /// Leaves the current phase's memory and readies the next one's. Does nothing if already there but tell how it stands.
    pub fn enter_phase(&mut self, phase: Phase) -> Result<PhaseReport> {
        self.enter(phase, self.formats.weights)
    }

    /// The same; `sampling` is the format of the weights in Generate.
    pub(super) fn enter(&mut self, phase: Phase, sampling: WeightFormat) -> Result<PhaseReport> {
        let began = Instant::now();
        let _during = Activity::Switch.begin(&self.kernels);
        let ([mut bytes_out, mut bytes_in], mut chores) = ([0, 0], Chores::default());
        self.settle();
        let left = std::mem::take(&mut self.chores);
        let is_other = phase == Phase::Generate && self.working.sampling != sampling;
        if phase != self.phase || is_other {
            self.leave()?;
            self.phase = phase;
            self.park()?;
            // What a phase used is there for its next time, unless memory is to be had for others.
            if self.gives_back() {
                self.kernels.arena().trim();
            }
            if self.policy.is_some() {
                self.conductor.enter(phase)?;
                match phase {
                    Phase::Generate => self.pack_for_sampling(sampling)?,
                    Phase::Train => self.ready_training()?,
                    Phase::Score | Phase::Idle => {}
                }
            }
            [bytes_out, bytes_in] = self.settle();
            chores = std::mem::take(&mut self.chores);
        }
        let seconds = began.elapsed().as_secs_f64();
        Ok(PhaseReport { seconds, bytes_out, bytes_in, chores, left, ..self.holdings() })
    }

    /// One optimizer step of the policy (or of the reward model that is being fitted).
    pub fn train(&mut self, job: &TrainJob) -> Result<StepReport> {
        self.expect_phase(Phase::Train, "train")?;
        let _during = Activity::Forward.begin(&self.kernels);
        let Some(state) = self.optimizer.as_mut() else {
            bail!("the stage was prepared without an optimizer")
        };
        let kernels = self.kernels.as_ref();
        let policy = self.policy.as_mut().expect("checked by expect_phase");
        let arena = kernels.arena();
        let mut params = policy.take_to_change(kernels)?;
        let mut optimizer = Optimizer {
            first: state.first.take_to_change(arena)?.0,
            second: state.second.take_to_change(arena)?.0,
            step: state.step,
        };
        let (items, share, micro_batch, dropping) = match job {
            TrainJob::Batch { batch, share, micro_batch, dropping } => {
                (Items::of_batch(batch), *share, *micro_batch, dropping.as_ref())
            }
            TrainJob::Grpo { groups, settings, micro_batch, share_prompts } => {
                let share = state.step as f64 / state.steps.max(1) as f64;
                let rollouts = Rollouts::new(groups, settings, *share_prompts, &self.balance);
                (Items::Rollouts(rollouts), share, *micro_batch, None)
            }
        };
        let micro_batch = match (micro_batch, self.fitting) {
            (asked, 0) => asked,
            (0, fitting) => fitting,
            (asked, fitting) => asked.min(fitting),
        };
        let settings = StepSettings {
            optimizer: &state.config,
            step: state.step,
            steps: state.steps,
            share,
            balance: self.balance,
            dropping,
            micro_batch,
            recompute: self.setup.engine.recompute,
        };
        let report = train_step(
            &mut Trainee {
                kernels,
                model: &policy.model,
                params: &mut params,
                packed: self.working.packed.as_ref().expect("Train packs the policy"),
                gradients: self.working.gradients.as_mut().expect("Train makes gradients"),
                optimizer: &mut optimizer,
                ranks: &state.ranks,
            },
            &settings,
            &items,
        );
        state.step = optimizer.step;
        state.first.put_changed(optimizer.first);
        state.second.put_changed(optimizer.second);
        policy.weights.put_changed(params.slab);
        let mut report = report.map_err(|error| ended(error, job))?;
        if report.micro_batch < examples_at_once(&items, micro_batch, &self.setup.team) {
            self.fitting = report.micro_batch;
        }
        if !report.skipped {
            self.policy_version += 1;
            self.pack_policy(PackFor::documents(self.form, true))?;
        }
        report.policy_version = self.policy_version;
        Ok(report)
    }

    /// Tells the other ranks that this one is lost.
    pub fn cut_off(&self, why: &str) {
        let (link, why) = (&self.setup.team.link, why.to_string());
        link.stop(&Broken::Failed { rank: link.rank(), why, code: 1 });
    }

    /// Whether the ranks have stopped.
    pub fn is_cut_off(&self) -> bool {
        self.setup.team.link.stopped().is_some()
    }

    /// Sets the calibration that is saved with a fitted reward model.
    pub fn calibrate(&mut self, mean: f64, deviation: f64) {
        if let Some(policy) = &mut self.policy {
            policy.calibration = Calibration { mean, deviation: deviation.max(1e-6) };
        }
    }

    /// Who holds how many bytes.
    pub fn holdings(&self) -> PhaseReport {
        let arena = self.kernels.arena();
        let name = |kind: Kind| format!("{kind:?}").to_lowercase();
        let held = arena
            .holdings()
            .into_iter()
            .map(|((role, kind), bytes)| (format!("{role}/{}", name(kind)), bytes));
        PhaseReport {
            held: held.collect(),
            high_water: arena.high_water(),
            most_used: arena.most_used(),
            timeline: self.conductor.transfers.record.timeline(),
            ..PhaseReport::default()
        }
    }

    /// The config of the loaded policy (YaRN and length of a long-context stage included).
    pub fn model_config(&self) -> Option<&ModelConfig> {
        self.policy.as_ref().map(|p| &p.model.config)
    }

    pub(super) fn expect_phase(&self, phase: Phase, verb: &str) -> Result<()> {
        ensure!(
            self.phase == phase,
            "cannot {verb} in phase {:?}: enter {phase:?} first",
            self.phase
        );
        if self.policy.is_none() {
            bail!(Fault::User(format!("cannot {verb}: no model is loaded")));
        }
        Ok(())
    }
}

/// Why a step ended early, and what else helps where a group of rollouts did not fit.
fn ended(error: PassError, job: &TrainJob) -> anyhow::Error {
    match (error, job) {
        (PassError::Memory(error), TrainJob::Grpo { share_prompts: true, .. }) => {
            Fault::resources(format!(
                "{error}; or set share_prompts = false in the stage: then rollouts of a group go through one by one"
            ))
        }
        (error, _) => interrupted(error),
    }
}

impl Drop for HybridEngine {
    fn drop(&mut self) {
        self.working = Working::default();
        self.kernels.arena().ask_for_room(None);
        self.conductor.clear();
        self.others.clear();
        (self.policy, self.optimizer) = (None, None);
        let _ = std::fs::remove_dir(&self.setup.spill);
        // Of several devices each has a folder in one of the run's.
        if let Some(parent) = self.setup.spill.parent().filter(|parent| parent.ends_with("spill")) {
            let _ = std::fs::remove_dir(parent);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::stage::{LengthNorm, RatioLevel};
    use crate::engine::phase::GrpoSettings;
    use rehearsal_kernels::DType;

    #[test]
    fn a_lost_rank_is_no_want_of_memory_whatever_is_trained_on() {
        let settings = GrpoSettings {
            clip: 0.2,
            kl_weight: 0.0,
            temperature: 1.0,
            ratio_level: RatioLevel::Token,
            length_norm: LengthNorm::PerOutput,
            max_new_tokens: 8,
            importance_limit: None,
        };
        let job = TrainJob::Grpo { groups: vec![], settings, micro_batch: 0, share_prompts: true };
        let gone = Broken::Gone { rank: 0, gone: 2, found: "it was at figures".to_string() };
        let error = ended(PassError::Ranks(gone.clone()), &job);
        assert_eq!(error.downcast_ref(), Some(&gone));
        let arena = Arena::new(Some(1 << 12));
        let full = arena.buffer(arena.owner("x", Kind::Weights), DType::F32, 1 << 12, 1).err();
        let error = ended(PassError::Memory(full.unwrap()), &job);
        assert!(matches!(error.downcast_ref(), Some(Fault::Resources(_))), "{error}");
        assert!(error.to_string().contains("share_prompts = false"), "{error}");
    }
}
