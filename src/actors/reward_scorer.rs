//! RewardScorer: what a rollout is worth. Programs judge each group as it arrives; reward models and the reference
//! score all groups of a step together; then come weighted rewards and advantages.
//!
//! The arithmetic is `rl`'s. Knows no weights and no update. It keeps nothing between two messages, so that a
//! restarted scorer goes on where the last one died.

use super::messages::*;
use super::port::Port;
use super::post::{Post, answers_for_itself, aside};
use crate::config::stage::{GrpoStage, RewardEntry};
use crate::engine::phase::{Role, ScoreJob, SequenceScore};
use crate::rl::reward::{clamp_model_score, component_names, finish_group, weights};
use crate::rl::rollout::{Group, JudgedGroup, Rollout};
use crate::rl::stats::step_statistics;
use crate::rl::verifiers::verify as verify_reply;
use actix::{Handler, ResponseActFuture};

/// See the module.
pub struct RewardScorer {
    post: Post,
    score: Port<Score>,
}

impl RewardScorer {
    /// A scorer whose models are behind `score`.
    pub fn new(post: Post, score: Port<Score>) -> RewardScorer {
        RewardScorer { post, score }
    }
}

answers_for_itself!(RewardScorer);

impl Handler<JudgeGroup> for RewardScorer {
    type Result = ResponseActFuture<Self, Result<JudgedGroup, Failure>>;

    fn handle(&mut self, message: JudgeGroup, _: &mut Self::Context) -> Self::Result {
        let JudgeGroup { group, reward } = message;
        self.post.work(JudgeGroup::NAME, aside(move || judge(group, &reward)))
    }
}

impl Handler<ScoreGroups> for RewardScorer {
    type Result = ResponseActFuture<Self, Result<ScoredGroups, Failure>>;

    fn handle(&mut self, message: ScoreGroups, _: &mut Self::Context) -> Self::Result {
        let score = self.score.clone();
        let ScoreGroups { id, groups, settings } = message;
        self.post.work(ScoreGroups::NAME, async move { score_groups(&score, id, groups, &settings).await })
    }
}

/// The components that programs decide; models' components stay open.
fn judge(group: Group, reward: &[RewardEntry]) -> anyhow::Result<JudgedGroup> {
    let answer = group.prompt.answer.as_deref();
    let mut components = Vec::with_capacity(group.rollouts.len());
    for rollout in &group.rollouts {
        components.push(reward.iter().map(|entry| verify(entry, rollout, answer)).collect::<anyhow::Result<_>>()?);
    }
    Ok(JudgedGroup { group, components })
}

/// What a program gives a reply; `None` if the component is a model's.
fn verify(entry: &RewardEntry, rollout: &Rollout, answer: Option<&str>) -> anyhow::Result<Option<f64>> {
    let Some(verifier) = entry.verifier else { return Ok(None) };
    Ok(Some(verify_reply(verifier, &rollout.text, answer, entry.partial)?.score))
}

/// Completes the components, then rewards and advantages, and asks for the reference's log-probabilities.
async fn score_groups(
    score: &Port<Score>,
    id: WorkId,
    mut groups: Vec<JudgedGroup>,
    settings: &GrpoStage,
) -> Result<ScoredGroups, Failure> {
    // Part numbers follow the order of the reward's entries, so that a repeated request names the same jobs.
    for (index, entry) in settings.reward.iter().enumerate() {
        let Some(model) = entry.model.as_ref().filter(|_| entry.weight != 0.0) else { continue };
        let job = score_job(Role::Reward(model.clone()), &groups, settings.temperature);
        let scores = score.ask(Score { id: id.part(index as u32 + 2), job }).await?;
        let mut scores = scores.into_iter();
        for row in groups.iter_mut().flat_map(|group| &mut group.components) {
            let Some(SequenceScore::Reward(value)) = scores.next() else {
                panic!("reward model {model} scored every rollout with one number")
            };
            row[index] = Some(clamp_model_score(value));
        }
    }
    let mut reference = Vec::new();
    if settings.kl_weight != 0.0 {
        let job = score_job(Role::Reference, &groups, settings.temperature);
        reference = score.ask(Score { id: id.part(1), job }).await?;
    }
    let mut reference = reference.into_iter().map(|score| match score {
        SequenceScore::Logprobs(logprobs) => logprobs,
        SequenceScore::Reward(_) => panic!("the reference is a policy"),
    });
    let weights = weights(&settings.reward);
    let finish = |judged: JudgedGroup| {
        let of_group = reference.by_ref().take(judged.group.rollouts.len()).collect();
        finish_group(judged, &weights, settings.deviation, settings.deviation_epsilon, of_group)
    };
    let groups: Vec<_> = groups.into_iter().map(finish).collect();
    let statistics = step_statistics(&component_names(&settings.reward), &groups);
    Ok(ScoredGroups { groups, statistics })
}

/// One forward pass over prompt and reply of every rollout, in order; log-probabilities of the replies' tokens.
fn score_job(role: Role, groups: &[JudgedGroup], temperature: f64) -> ScoreJob {
    let (mut sequences, mut first) = (Vec::new(), Vec::new());
    for JudgedGroup { group, .. } in groups {
        for rollout in &group.rollouts {
            sequences.push([group.prompt.tokens.as_slice(), &rollout.tokens].concat());
            first.push(group.prompt.tokens.len());
        }
    }
    ScoreJob { role, sequences, temperature, first }
}
