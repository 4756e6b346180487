//! RolloutGenerator: prompts to groups of rollouts. Each finished group is decoded and judged at
//! once, while the device samples the others.
//!
//! Knows no reward: what a reply is worth is the scorer's. Measuring replies to held-out prompts is
//! the same walk, greedy and with one sample a prompt.
//!
//! Invariants:
//!   * a group that arrives twice counts once (by its slot), and groups leave in order of slot
//!   * what is sampled depends on the seed, the step and the prompt alone

use super::messages::*;
use super::port::Port;
use super::post::{Post, answers_for_itself, aside, seconds_now};
use super::reader::Reader;
use crate::config::failpoint::failpoint;
use crate::config::stage::{GrpoStage, RewardEntry};
use crate::data::{Prompt, Tokenizer};
use crate::engine::phase::{GenerateJob, GenerateRequest, TokenGroup};
use crate::rl::rollout::{Group, JudgedGroup};
use actix::{Handler, ResponseActFuture};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

/// Steps of evals are counted from here, apart from those of training.
const EVAL_STEP: u64 = 1 << 40;

/// See the module.
pub struct RolloutGenerator {
    post: Post,
    reader: Arc<Reader>,
    ports: RolloutGeneratorPorts,
    rounds: Rounds,
}

/// Whom a [`RolloutGenerator`] asks.
#[derive(Clone)]
pub struct RolloutGeneratorPorts {
    /// The device.
    pub generate: Port<Generate>,
    /// The scorer.
    pub judge: Port<JudgeGroup>,
}

/// The requests being served, by the id of their device job.
type Rounds = Rc<RefCell<BTreeMap<WorkId, Rc<Round>>>>;

/// One request being served.
struct Round {
    prompts: Vec<Prompt>,
    reward: Vec<RewardEntry>,
    /// `None` for random tokens, which are no text.
    tokenizer: Option<Arc<Tokenizer>>,
    judged: RefCell<BTreeMap<u32, JudgedGroup>>,
    /// Start of the first judging and end of the last.
    judging: RefCell<Option<[f64; 2]>>,
}

impl RolloutGenerator {
    /// A generator that reads through `reader`.
    pub fn new(post: Post, reader: Arc<Reader>, ports: RolloutGeneratorPorts) -> RolloutGenerator {
        RolloutGenerator { post, reader, ports, rounds: Rounds::default() }
    }
}

answers_for_itself!(RolloutGenerator);

impl Handler<OpenStage> for RolloutGenerator {
    type Result = ResponseActFuture<Self, Result<StageShape, Failure>>;

    fn handle(&mut self, message: OpenStage, _: &mut Self::Context) -> Self::Result {
        let reader = Arc::clone(&self.reader);
        self.post.work(OpenStage::NAME, aside(move || reader.shape(message.stage)))
    }
}

impl Handler<GenerateGroups> for RolloutGenerator {
    type Result = ResponseActFuture<Self, Result<GeneratedGroups, Failure>>;

    fn handle(&mut self, message: GenerateGroups, _: &mut Self::Context) -> Self::Result {
        let (reader, ports, rounds) =
            (Arc::clone(&self.reader), self.ports.clone(), Rc::clone(&self.rounds));
        let GenerateGroups { id, stage, step, settings, prompts, policy_version } = message;
        self.post.work(GenerateGroups::NAME, async move {
            let seed = reader.config().seed;
            let (prompts, tokenizer) = match prompts {
                Some(given) => (given, None),
                None => {
                    let open =
                        move || Ok((reader.step_prompts(stage, step)?, Some(reader.tokenizer()?)));
                    aside(open).await?
                }
            };
            let sampling = Sampling {
                seed,
                // Stages of one run draw apart: each has a range of steps of its own.
                step: ((stage as u64) << 32) + step,
                samples: settings.group_size as u32,
                max_new_tokens: settings.max_new_tokens,
                temperature: settings.temperature,
                policy_version,
            };
            let job = sampling.job(&prompts, tokenizer.as_deref(), &settings);
            serve(&ports, &rounds, id.part(1), job, prompts, tokenizer, settings.reward).await
        })
    }
}

impl Handler<AcceptGroup> for RolloutGenerator {
    type Result = ResponseActFuture<Self, Result<(), Failure>>;

    fn handle(&mut self, message: AcceptGroup, _: &mut Self::Context) -> Self::Result {
        let round = self.rounds.borrow().get(&message.id).cloned();
        let judge = self.ports.judge.clone();
        self.post.work(AcceptGroup::NAME, async move {
            // Groups of a request that nobody waits for any more: its next asker is handed them
            // again.
            let Some(round) = round else { return Ok(()) };
            round.accept(&judge, message.group).await
        })
    }
}

impl Handler<Measure> for RolloutGenerator {
    type Result = ResponseActFuture<Self, Result<Measurement, Failure>>;

    fn handle(&mut self, message: Measure, _: &mut Self::Context) -> Self::Result {
        let (reader, ports, rounds) =
            (Arc::clone(&self.reader), self.ports.clone(), Rc::clone(&self.rounds));
        let Measure { id, stage, eval, policy_version } = message;
        self.post.work(Measure::NAME, async move {
            let seed = reader.config().seed;
            let eval = reader.config().stages[stage].eval[eval].clone();
            let (wanted, show) = (eval.clone(), eval.show);
            let (prompts, tokenizer) =
                aside(move || Ok((reader.prompts(stage, &wanted)?, reader.tokenizer()?))).await?;
            let sampling = Sampling {
                seed,
                step: EVAL_STEP,
                samples: 1,
                max_new_tokens: eval.max_new_tokens,
                temperature: 0.0,
                policy_version,
            };
            let job = sampling.greedy(&prompts, &tokenizer);
            let reward =
                RewardEntry { verifier: eval.verifier, model: None, weight: 1.0, partial: 0.0 };
            let done =
                serve(&ports, &rounds, id.part(1), job, prompts, Some(tokenizer), vec![reward])
                    .await?;
            Ok(measurement(&done.groups, show))
        })
    }
}

/// Has the device sample a job and collects the judged groups.
async fn serve(
    ports: &RolloutGeneratorPorts,
    rounds: &Rounds,
    id: WorkId,
    job: GenerateJob,
    prompts: Vec<Prompt>,
    tokenizer: Option<Arc<Tokenizer>>,
    reward: Vec<RewardEntry>,
) -> Result<GeneratedGroups, Failure> {
    let round = Rc::new(Round {
        prompts,
        reward,
        tokenizer,
        judged: RefCell::default(),
        judging: RefCell::default(),
    });
    rounds.borrow_mut().insert(id, Rc::clone(&round));
    let generated = ports.generate.ask(Generate { id, job }).await;
    rounds.borrow_mut().remove(&id);
    round.finish(generated?)
}

impl Round {
    /// Decodes a group and has it judged.
    async fn accept(&self, judge: &Port<JudgeGroup>, group: TokenGroup) -> Result<(), Failure> {
        let slot = group.slot;
        if self.judged.borrow().contains_key(&slot) {
            return Ok(());
        }
        failpoint("mid-generation");
        let start = seconds_now();
        let reward = self.reward.clone();
        let judged = judge.ask(JudgeGroup { group: self.decode(group), reward }).await?;
        let end = seconds_now();
        let mut judging = self.judging.borrow_mut();
        *judging =
            Some(judging.map_or([start, end], |[first, last]| [first.min(start), last.max(end)]));
        self.judged.borrow_mut().insert(slot, judged);
        Ok(())
    }

    fn decode(&self, group: TokenGroup) -> Group {
        let prompt = self.prompts[group.slot as usize].clone();
        let mut rollouts = group.rollouts;
        for rollout in &mut rollouts {
            rollout.text = match &self.tokenizer {
                Some(tokenizer) => tokenizer.decode(&rollout.tokens),
                // Random tokens are no text; the parity of the last gives a program something to
                // judge.
                None => rollout.tokens.last().map_or(0, |token| token % 2).to_string(),
            };
        }
        Group {
            slot: group.slot,
            prompt: Arc::new(prompt),
            policy_version: group.policy_version,
            rollouts: rollouts.into(),
        }
    }

    fn finish(&self, generated: Generated) -> Result<GeneratedGroups, Failure> {
        let groups: Vec<JudgedGroup> =
            std::mem::take(&mut *self.judged.borrow_mut()).into_values().collect();
        let (got, asked) = (groups.len(), self.prompts.len());
        if got != asked {
            return Err(Failure::new(
                FailureKind::Other,
                format!("the device sampled {got} of {asked} groups"),
            ));
        }
        let judge = self.judging.borrow().unwrap_or_default();
        Ok(GeneratedGroups { groups, report: generated.report, generate: generated.span, judge })
    }
}

/// How a job samples.
struct Sampling {
    seed: u64,
    step: u64,
    samples: u32,
    max_new_tokens: usize,
    temperature: f64,
    policy_version: u64,
}

impl Sampling {
    fn job(
        &self,
        prompts: &[Prompt],
        tokenizer: Option<&Tokenizer>,
        settings: &GrpoStage,
    ) -> GenerateJob {
        let stop_tokens = tokenizer.map(Tokenizer::end).into_iter().collect();
        GenerateJob {
            top_p: settings.top_p,
            top_k: settings.top_k,
            ..self.plain(prompts, stop_tokens)
        }
    }

    fn greedy(&self, prompts: &[Prompt], tokenizer: &Tokenizer) -> GenerateJob {
        self.plain(prompts, vec![tokenizer.end()])
    }

    fn plain(&self, prompts: &[Prompt], stop_tokens: Vec<u32>) -> GenerateJob {
        let request = |(slot, prompt): (usize, &Prompt)| GenerateRequest {
            slot: slot as u32,
            tokens: prompt.tokens.clone(),
            prompt: prompt.index,
            samples: self.samples,
        };
        GenerateJob {
            requests: prompts.iter().enumerate().map(request).collect(),
            max_new_tokens: self.max_new_tokens,
            temperature: self.temperature,
            top_p: 1.0,
            top_k: 0,
            stop_tokens,
            seed: self.seed,
            step: self.step,
            policy_version: self.policy_version,
        }
    }
}

/// The mean of what the verifier gave, and the first replies.
fn measurement(groups: &[JudgedGroup], show: usize) -> Measurement {
    let score = |group: &JudgedGroup| group.components[0][0].unwrap_or_default();
    let count = groups.len().max(1) as f64;
    let tokens: usize = groups.iter().map(|group| group.group.rollouts[0].tokens.len()).sum();
    let reply = |judged: &JudgedGroup| Reply {
        prompt: judged.group.prompt.text.clone(),
        text: judged.group.rollouts[0].text.clone(),
        answer: judged.group.prompt.answer.clone(),
        score: score(judged),
    };
    Measurement {
        value: groups.iter().map(score).sum::<f64>() / count,
        samples: groups.len() as u64,
        mean_tokens: Some(tokens as f64 / count),
        shown: groups.iter().take(show).map(reply).collect(),
    }
}
