//! RewardScorer: what a rollout is worth. Programs judge each group as it arrives; reward models
//! and the reference score all groups of a step together; then come weighted rewards and
//! advantages.
//!
//! The arithmetic is `rl`'s. Knows no weights and no update. It keeps nothing between two messages,
//! so that a restarted scorer goes on where the last one died.

use super::messages::*;
use super::port::Port;
use super::post::{Post, answers_for_itself, aside};
use crate::config::stage::{GrpoStage, RewardEntry, VerifierKind};
use crate::engine::phase::{Role, ScoreJob, SequenceScore};
use crate::rl::reward::{clamp_model_score, component_names, finish_group, weights};
use crate::rl::rollout::{Group, JudgedGroup, Rollout, Stop};
use crate::rl::stats::step_statistics;
use crate::rl::verifiers::verify;
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
        self.post.work(JudgeGroup::NAME, aside(move || Ok(judge(group, &reward))))
    }
}

impl Handler<ScoreGroups> for RewardScorer {
    type Result = ResponseActFuture<Self, Result<ScoredGroups, Failure>>;

    fn handle(&mut self, message: ScoreGroups, _: &mut Self::Context) -> Self::Result {
        let score = self.score.clone();
        let ScoreGroups { id, groups, settings } = message;
        self.post.work(ScoreGroups::NAME, async move {
            score_groups(&score, id, groups, &settings).await
        })
    }
}

/// The components that programs decide; models' components stay open.
fn judge(group: Group, reward: &[RewardEntry]) -> JudgedGroup {
    let answer = group.prompt.answer.as_deref();
    let row =
        |rollout: &Rollout| reward.iter().map(|entry| component(entry, rollout, answer)).collect();
    let components = group.rollouts.iter().map(row).collect();
    JudgedGroup { group, components }
}

/// What a program gives a reply; `None` if the component is a model's. Where there is no answer no
/// rule applies.
fn component(entry: &RewardEntry, rollout: &Rollout, answer: Option<&str>) -> Option<f64> {
    let verifier = entry.verifier?;
    let answer = match (answer, verifier) {
        (Some(answer), _) => answer,
        (None, VerifierKind::Annotations) => "",
        (None, _) => return Some(0.0),
    };
    Some(verify(verifier, entry.partial, &rollout.text, rollout.stop == Stop::Eos, answer).score)
}

/// Completes the components, then rewards and advantages, and asks for the reference's
/// log-probabilities.
async fn score_groups(
    score: &Port<Score>,
    id: WorkId,
    mut groups: Vec<JudgedGroup>,
    settings: &GrpoStage,
) -> Result<ScoredGroups, Failure> {
    // Part numbers follow the order of the reward's entries, so that a repeated request names the
    // same jobs.
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

/// One forward pass over prompt and reply of every rollout, in order; log-probabilities of the
/// replies' tokens.
pub(super) fn score_job(role: Role, groups: &[JudgedGroup], temperature: f64) -> ScoreJob {
    let (mut sequences, mut first) = (Vec::new(), Vec::new());
    for JudgedGroup { group, .. } in groups {
        for rollout in group.rollouts.iter() {
            sequences.push([group.prompt.tokens.as_slice(), &rollout.tokens].concat());
            first.push(group.prompt.tokens.len());
        }
    }
    ScoreJob { role, sequences, temperature, first }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(verifier: Option<VerifierKind>, model: Option<&str>) -> RewardEntry {
        RewardEntry { verifier, model: model.map(str::to_string), weight: 1.0, partial: 0.0 }
    }

    fn reply(text: &str, stop: Stop) -> Rollout {
        Rollout { sample: 0, tokens: vec![1], logprobs: vec![-1.0], stop, text: text.to_string() }
    }

    #[test]
    fn a_program_decides_its_component_and_leaves_a_models_open() {
        let exact = entry(Some(VerifierKind::Exact), None);
        assert_eq!(component(&exact, &reply("b", Stop::Eos), Some("b")), Some(1.0));
        assert_eq!(
            component(&exact, &reply("b", Stop::Length), Some("b")),
            Some(0.0),
            "it was cut off"
        );
        assert_eq!(component(&exact, &reply("b", Stop::Eos), None), Some(0.0), "no rule applies");
        assert_eq!(
            component(&entry(None, Some("helpful")), &reply("b", Stop::Eos), Some("b")),
            None
        );
    }

    #[test]
    fn reply_tokens_are_scored_after_their_prompt() {
        let prompt = crate::data::example::Prompt {
            index: 0,
            text: String::new(),
            tokens: vec![7, 8],
            answer: None,
        };
        let group = Group {
            slot: 0,
            prompt: prompt.into(),
            policy_version: 0,
            rollouts: [reply("", Stop::Eos)].into(),
        };
        let job =
            score_job(Role::Reference, &[JudgedGroup { group, components: vec![vec![]] }], 0.5);
        assert_eq!(
            (job.sequences, job.first, job.temperature),
            (vec![vec![7, 8, 1]], vec![2], 0.5)
        );
    }
}
