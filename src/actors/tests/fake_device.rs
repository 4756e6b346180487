//! A stand-in for the engine: its weights are a hash of what it was trained on, and it can be told
//! to misbehave.
//!
//! It writes down every call in words that do not depend on the place of the run.

use super::utilisation;
use crate::actors::port::Desk;
use crate::actors::worker::{Device, DeviceMaker};
use crate::checkpoint::tensors::TensorEntry;
use crate::checkpoint::{TensorFolder, write_model_config, write_tensors};
use crate::cluster::mesh::cut;
use crate::config::{Dtype, Fault, ModelConfig, RunConfig};
use crate::engine::hybrid::SavedState;
use crate::engine::phase::{GenerateJob, GenerateReport, TokenGroup};
use crate::engine::phase::{GrpoReport, StepReport, TrainJob};
use crate::engine::phase::{
    ModelSource, Phase, PhaseReport, PrepareStage, Role, ScoreJob, SequenceScore,
};
use crate::engine::utilisation::Switched;
use crate::rl::rollout::{Rollout, Stop};
use anyhow::Result;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock};
use std::time::{Duration, Instant};
use tokio::sync::Notify;

const HEAD: &str = "lm_head.weight";
/// What a stuck test is given up after; no passing test gets near it.
const PATIENCE: Duration = Duration::from_secs(30);

/// How the stand-in misbehaves. Numbers count updates from 1, over all devices of one run.
#[derive(Clone, Default)]
pub struct Script {
    pub await_judge: bool,
    pub wrong_slot: bool,
    pub stuck_in_train: Option<u64>,
    /// In this update the device waits until the watched worker has taken a `PrepareDevice`, and in
    /// that one until it has taken a `Train`: which comes too late.
    pub late_after_train: Option<u64>,
    pub panic_in_train: Option<u64>,
    pub not_finite_from: Option<u64>,
    pub not_finite: Vec<u64>,
    /// Sampler and trainer differ by so much in this update.
    pub gap_in_train: Option<(u64, f64)>,
    /// And so much where the policy scores for the so-manieth time, from 1.
    pub gap_in_score: Option<(u64, f32)>,
    pub signal_in_train: Option<(u64, Arc<AtomicI32>)>,
    pub shared: Arc<Shared>,
}

/// What all clones of a script share.
#[derive(Default)]
pub struct Shared {
    desk: OnceLock<Arc<Desk>>,
    released: Mutex<bool>,
    release: Condvar,
    reached: Notify,
    updates: AtomicU64,
    scores_by_policy: AtomicU64,
    awaits_late: AtomicBool,
    has_failed: AtomicBool,
}

impl Script {
    /// The desk whose handled messages `await_judge` counts, or the worker's.
    pub fn watch(&self, desk: &Arc<Desk>) {
        assert!(self.shared.desk.set(Arc::clone(desk)).is_ok(), "one desk is watched");
    }

    /// Lets a stuck device go on.
    pub fn release(&self) {
        *self.shared.released.lock().unwrap() = true;
        self.shared.release.notify_all();
    }

    /// Waits until a device is stuck.
    pub async fn reached(&self) {
        self.shared.reached.notified().await;
    }

    /// Waits until the last message that the watched desk's actor took is this one.
    fn await_message(&self, message: &str) {
        let desk = self.shared.desk.get().expect("the worker's desk is watched");
        let began = Instant::now();
        while desk.pulse().last_message.as_deref() != Some(message) {
            assert!(began.elapsed() < PATIENCE, "the worker is not asked for {message}");
            std::thread::yield_now();
        }
    }

    fn stick(&self) {
        self.shared.reached.notify_one();
        let released = self.shared.released.lock().unwrap();
        drop(
            self.shared
                .release
                .wait_timeout_while(released, PATIENCE, |released| !*released)
                .unwrap(),
        );
    }

    /// Messages that the watched desk has handled.
    fn judged(&self) -> u64 {
        self.shared.desk.get().map_or(0, |desk| desk.pulse().handled)
    }

    fn await_judge(&self, before: u64) {
        let began = Instant::now();
        while self.judged() == before {
            assert!(began.elapsed() < PATIENCE, "nobody judges while the device samples");
            std::thread::yield_now();
        }
    }
}

/// What is shared by the devices of one run.
pub struct Fake {
    /// Which of how many ranks it stands in for.
    pub rank: [usize; 2],
    /// Whether there is another one that only samples.
    pub samples: bool,
    script: Script,
    model: ModelConfig,
    calls: Arc<Mutex<Vec<String>>>,
}

impl Fake {
    pub fn new(script: Script, config: &RunConfig) -> Fake {
        let (model, samples) = (config.model.clone(), config.cluster.samplers > 0);
        Fake { rank: [0, 1], samples, script, model, calls: Arc::default() }
    }

    pub fn calls(&self) -> Arc<Mutex<Vec<String>>> {
        Arc::clone(&self.calls)
    }

    pub fn maker(&self) -> DeviceMaker {
        let (script, model, calls) = (self.script.clone(), self.model.clone(), self.calls());
        let rank = self.rank;
        Arc::new(move || {
            Ok(Box::new(FakeDevice {
                rank,
                script: script.clone(),
                model: model.clone(),
                calls: Arc::clone(&calls),
                weights: [0.0; 2],
                state: SavedState::default(),
                value_head: false,
                phase: None,
            }))
        })
    }
}

struct FakeDevice {
    rank: [usize; 2],
    script: Script,
    model: ModelConfig,
    calls: Arc<Mutex<Vec<String>>>,
    /// 24 bits of a hash each, which an f32 holds exactly.
    weights: [f32; 2],
    state: SavedState,
    value_head: bool,
    phase: Option<(Phase, Dtype)>,
}

impl FakeDevice {
    fn call(&self, text: String) {
        self.calls.lock().unwrap().push(text);
    }

    fn load(&mut self, folder: &Path) -> Result<()> {
        let numbers = TensorFolder::open(folder)?.read_f32(HEAD)?;
        self.weights.copy_from_slice(&numbers);
        Ok(())
    }
}

fn hash(weights: &[f32; 2], what: &str) -> [u8; 32] {
    *blake3::hash(format!("{weights:?} {what}").as_bytes()).as_bytes()
}

fn name(folder: &Path) -> String {
    let name = folder.file_name().unwrap().to_string_lossy();
    // A folder that is being filled has a number before its name, and `tmp-` before that.
    let aside = name.strip_prefix("tmp-").and_then(|rest| rest.split_once('-'));
    aside.map_or(name.as_ref(), |(_, name)| name).to_string()
}

fn source_name(source: &ModelSource) -> String {
    match source {
        ModelSource::Fresh => "fresh".to_string(),
        ModelSource::Folder(folder) => name(folder),
    }
}

impl Device for FakeDevice {
    fn prepare(&mut self, stage: &PrepareStage) -> Result<()> {
        if self.script.shared.awaits_late.swap(false, Ordering::SeqCst) {
            self.script.await_message("Train");
        }
        let reference = stage.reference.as_ref().map(source_name).unwrap_or_default();
        let rewards: Vec<&String> = stage.rewards.keys().collect();
        self.call(format!(
            "prepare {} reference={reference} rewards={rewards:?}",
            source_name(&stage.policy)
        ));
        (self.weights, self.state, self.value_head) =
            ([1.0, 2.0], SavedState::default(), stage.value_head);
        match &stage.policy {
            ModelSource::Fresh => Ok(()),
            ModelSource::Folder(folder) => self.load(folder),
        }
    }

    fn enter_phase(&mut self, phase: Phase, sample_as: Dtype) -> Result<PhaseReport> {
        let kept = if sample_as == Dtype::F32 { "" } else { sample_as.name() };
        self.call(format!("phase {phase:?} {kept}").trim_end().to_string());
        let held = BTreeMap::from([("policy/weights".to_string(), 8)]);
        let sampled_as = (phase == Phase::Generate).then_some(sample_as);
        let report = match self.phase.replace((phase, sample_as)) == Some((phase, sample_as)) {
            true => utilisation::stayed(phase),
            false => utilisation::entered(phase),
        };
        Ok(PhaseReport { held, high_water: 8, sampled_as, ..report })
    }

    /// Of two devices the first that comes to it fails, and the other one waits for it.
    fn hand_over(&mut self, _: u64) -> Result<Switched> {
        if self.script.shared.has_failed.swap(true, Ordering::SeqCst) {
            self.script.stick();
        }
        Err(Fault::resources("a planted want of memory"))
    }

    fn generate(
        &mut self,
        job: &GenerateJob,
        on_group: &mut dyn FnMut(TokenGroup),
    ) -> Result<GenerateReport> {
        assert_eq!(
            job.policy_version, self.state.policy_version,
            "the sampler refuses another version"
        );
        self.call(format!("generate {} prompts at {}", job.requests.len(), job.step));
        let began = Instant::now();
        let mut new_tokens = 0;
        let [rank, ranks] = self.rank;
        let own = |(number, _): &(usize, &_)| number % ranks == rank;
        for (number, request) in job.requests.iter().enumerate().filter(own) {
            let rollout = |sample: u32| {
                let key = format!("{} {} {sample} {:?}", job.step, request.prompt, request.tokens);
                let token = 5 + u32::from(hash(&self.weights, &key)[0]);
                let mut tokens = vec![token];
                tokens.extend(job.stop_tokens.first());
                let stop = if job.stop_tokens.is_empty() { Stop::Length } else { Stop::Eos };
                Rollout {
                    sample,
                    logprobs: vec![-1.0; tokens.len()],
                    tokens,
                    stop,
                    text: String::new(),
                }
            };
            let rollouts: Vec<Rollout> = (0..request.samples).map(rollout).collect();
            new_tokens += rollouts.iter().map(|r| r.tokens.len() as u64).sum::<u64>();
            let slot = if self.script.wrong_slot { 1000 } else { request.slot };
            // The desk is looked at before the group leaves, or its judging might not be seen.
            let (judged, last) = (self.script.judged(), number + 1 == job.requests.len());
            on_group(TokenGroup { slot, rollouts, policy_version: job.policy_version });
            if self.script.await_judge && !last {
                self.script.await_judge(judged);
            }
        }
        let seconds = began.elapsed().as_secs_f64();
        Ok(GenerateReport { new_tokens, ..utilisation::sampled(seconds) })
    }

    fn score(&mut self, job: &ScoreJob) -> Result<Vec<SequenceScore>> {
        self.call(format!("score {} sequences by {}", job.sequences.len(), job.role.name()));
        let is_reward = matches!(job.role, Role::Reward(_)) || self.value_head;
        if job.role == Role::Policy && !is_reward {
            // What it sampled by, unless it is to differ.
            let number = self.script.shared.scores_by_policy.fetch_add(1, Ordering::SeqCst) + 1;
            let gap = self.script.gap_in_score.filter(|(at, _)| *at == number);
            let logprob = -1.0 - gap.map_or(0.0, |(_, gap)| gap);
            let tokens = job.sequences.iter().zip(&job.first).map(|(all, first)| all.len() - first);
            return Ok(tokens.map(|count| SequenceScore::Logprobs(vec![logprob; count])).collect());
        }
        let score = |(tokens, first): (&Vec<u32>, &usize)| {
            let bits = hash(&self.weights, &format!("{tokens:?}"))[0];
            match is_reward {
                true => SequenceScore::Reward(f64::from(bits) / 64.0),
                false => {
                    SequenceScore::Logprobs(vec![-f32::from(bits) / 64.0; tokens.len() - first])
                }
            }
        };
        let [rank, ranks] = self.rank;
        let own = cut(job.sequences.len(), ranks, rank);
        Ok(job
            .sequences
            .iter()
            .zip(&job.first)
            .skip(own.start)
            .take(own.len())
            .map(score)
            .collect())
    }

    fn train(&mut self, job: &TrainJob) -> Result<StepReport> {
        let number = self.script.shared.updates.fetch_add(1, Ordering::SeqCst) + 1;
        if let Some((at, stop)) = &self.script.signal_in_train
            && *at == number
        {
            stop.store(15, Ordering::SeqCst);
        }
        if self.script.stuck_in_train == Some(number) {
            self.script.stick();
        }
        if self.script.late_after_train == Some(number) {
            self.script.await_message("PrepareDevice");
            self.script.shared.awaits_late.store(true, Ordering::SeqCst);
        }
        assert!(self.script.panic_in_train != Some(number), "a planted panic");
        let digest = hash(&self.weights, &serde_json::to_string(job)?);
        self.call(format!("train {}", blake3::Hash::from(digest).to_hex()));
        let gap = self.script.gap_in_train.filter(|(at, _)| *at == number).map_or(0.0, |at| at.1);
        let grpo = matches!(job, TrainJob::Grpo { .. }).then(|| GrpoReport {
            trained_share: 1.0,
            logprob_gap_max: gap,
            ..GrpoReport::default()
        });
        if self.script.not_finite_from.is_some_and(|from| number >= from)
            || self.script.not_finite.contains(&number)
        {
            let policy_version = self.state.policy_version;
            return Ok(StepReport {
                loss: f64::NAN,
                skipped: true,
                policy_version,
                grpo,
                ..StepReport::default()
            });
        }
        let bits = |at: usize| f32::from(digest[at]) * 65_536.0 + f32::from(digest[at + 1]);
        self.weights = [bits(0), bits(2)];
        self.state.policy_version += 1;
        self.state.optimizer_step += 1;
        Ok(StepReport {
            loss: 1.0,
            tokens: 10,
            policy_version: self.state.policy_version,
            grpo,
            ..utilisation::updated()
        })
    }

    fn save(&mut self, folder: &Path, with_optimizer: bool) -> Result<SavedState> {
        self.call(format!("save {}", name(folder)));
        if self.rank[0] > 0 {
            return Ok(self.state);
        }
        write_model_config(folder, &self.model)?;
        let entry = |name: &str| TensorEntry { name: name.to_string(), shape: vec![1, 2] };
        let weights = self.weights.to_vec();
        write_tensors(&folder.join("model.safetensors"), &[entry(HEAD)], &mut |_| {
            Ok(weights.clone())
        })?;
        if with_optimizer {
            let moments = [entry(&format!("m.{HEAD}"))];
            write_tensors(&folder.join("optimizer.safetensors"), &moments, &mut |_| {
                Ok(vec![0.0; 2])
            })?;
        }
        Ok(self.state)
    }

    fn restore(&mut self, folder: &Path, state: &SavedState) -> Result<()> {
        self.call(format!("restore {}", name(folder)));
        self.state = *state;
        self.load(folder)
    }

    fn calibrate(&mut self, mean: f64, deviation: f64) {
        self.call(format!("calibrate {mean:.3} {deviation:.3}"));
    }
}
