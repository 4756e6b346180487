//! PolicyUpdater: scored groups to one or more GRPO updates of the policy.
//!
//! Knows no reward's origin and no optimizer: the loss is `rl::grpo`'s, the step the device's.

use super::crew::added;
use super::messages::*;
use super::port::Port;
use super::post::{Post, answers_for_itself};
use crate::config::stage::GrpoStage;
use crate::engine::phase::{GrpoReport, StepReport, TrainJob};
use crate::rl::grpo::GrpoSettings;
use actix::{Handler, ResponseActFuture};

/// See the module.
pub struct PolicyUpdater {
    post: Post,
    train: Port<Train>,
}

impl PolicyUpdater {
    /// An updater of the policy behind `train`.
    pub fn new(post: Post, train: Port<Train>) -> PolicyUpdater {
        PolicyUpdater { post, train }
    }
}

answers_for_itself!(PolicyUpdater);

impl Handler<UpdatePolicy> for PolicyUpdater {
    type Result = ResponseActFuture<Self, Result<PolicyUpdate, Failure>>;

    fn handle(&mut self, message: UpdatePolicy, _: &mut Self::Context) -> Self::Result {
        let train = self.train.clone();
        let UpdatePolicy { id, groups, settings } = message;
        self.post.work(UpdatePolicy::NAME, async move {
            let mut total: Option<PolicyUpdate> = None;
            for update in 1..=settings.updates.max(1) {
                let job = TrainJob::Grpo {
                    groups: groups.clone(),
                    settings: loss_settings(&settings),
                    micro_batch: settings.micro_batch,
                    share_prompts: settings.share_prompts,
                };
                let report = train.ask(Train { id: id.part(update as u32), job }).await?;
                let skipped_updates = u64::from(report.skipped);
                let last = PolicyUpdate { report, updates: 1, skipped_updates };
                total = Some(match total {
                    None => last,
                    Some(before) => join(before, last),
                });
            }
            Ok(total.expect("at least one update is made"))
        })
    }
}

/// What the loss needs of a stage.
fn loss_settings(stage: &GrpoStage) -> GrpoSettings {
    GrpoSettings {
        clip: stage.clip,
        kl_weight: stage.kl_weight,
        temperature: stage.temperature,
        ratio_level: stage.ratio_level,
        length_norm: stage.length_norm,
        max_new_tokens: stage.max_new_tokens,
        importance_limit: stage.importance_weights(),
    }
}

/// Updates on the same rollouts as one: the figures of the last that changed a weight, sums of
/// work, and the sampler's gap of the first, before which no weight had moved.
fn join(before: PolicyUpdate, last: PolicyUpdate) -> PolicyUpdate {
    let policy_version = last.report.policy_version;
    let (tokens, rows, seconds) = (
        before.report.tokens + last.report.tokens,
        before.report.rows + last.report.rows,
        before.report.seconds + last.report.seconds,
    );
    let (unique_rows, useful_flops) = (
        before.report.unique_rows + last.report.unique_rows,
        before.report.useful_flops + last.report.useful_flops,
    );
    let ran = if last.report.ran.is_empty() {
        before.report.ran.clone()
    } else {
        last.report.ran.clone()
    };
    let exchanged = added(before.report.exchanged, last.report.exchanged);
    let gap = |grpo: &GrpoReport| (grpo.logprob_gap_max, grpo.logprob_gap_mean, grpo.sampler_kl);
    let gap = before.report.grpo.as_ref().map(gap);
    let shown = if last.report.skipped { before.report } else { last.report };
    let grpo = shown.grpo.map(|mut grpo| {
        if let Some(gap) = gap {
            (grpo.logprob_gap_max, grpo.logprob_gap_mean, grpo.sampler_kl) = gap;
        }
        grpo
    });
    PolicyUpdate {
        report: StepReport {
            tokens,
            rows,
            unique_rows,
            useful_flops,
            seconds,
            ran,
            exchanged,
            policy_version,
            grpo,
            ..shown
        },
        updates: before.updates + last.updates,
        skipped_updates: before.skipped_updates + last.skipped_updates,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn update(gap: f64, policy_version: u64, skipped: bool) -> PolicyUpdate {
        let grpo =
            GrpoReport { logprob_gap_max: gap, sampler_kl: gap, kl: gap, ..GrpoReport::default() };
        let report = StepReport {
            tokens: 10,
            useful_flops: if skipped { 0.0 } else { 6.0 },
            loss: if skipped { f64::NAN } else { gap },
            policy_version,
            skipped,
            grpo: Some(grpo),
            ..StepReport::default()
        };
        PolicyUpdate { report, updates: 1, skipped_updates: u64::from(skipped) }
    }

    #[test]
    fn the_sampler_gap_of_several_updates_is_that_of_the_first() {
        let joined = join(update(0.25, 1, false), update(0.5, 2, false));
        let grpo = joined.report.grpo.unwrap();
        assert_eq!((grpo.logprob_gap_max, grpo.sampler_kl, grpo.kl), (0.25, 0.25, 0.5));
        assert_eq!((joined.report.tokens, joined.updates, joined.skipped_updates), (20, 2, 0));
        assert_eq!(joined.report.useful_flops, 12.0);
    }

    #[test]
    fn a_step_is_skipped_only_if_none_of_its_updates_changed_a_weight() {
        let changed_last = join(update(0.25, 0, true), update(0.5, 1, false));
        let changed_first = join(update(0.25, 1, false), update(0.5, 1, true));
        for (joined, loss) in [(&changed_last, 0.5), (&changed_first, 0.25)] {
            assert_eq!((joined.report.skipped, joined.report.policy_version), (false, 1));
            assert_eq!((joined.report.loss, joined.skipped_updates), (loss, 1));
            assert_eq!(joined.report.useful_flops, 6.0, "what was discarded is of no use");
        }
        let ran = |number: u32| (number, Vec::new());
        let mut taken_down = update(0.25, 1, false);
        taken_down.report.ran = vec![ran(0), ran(1)];
        let joined = join(taken_down.clone(), update(0.5, 2, false));
        assert_eq!(joined.report.ran, taken_down.report.ran, "one of the step's updates was");
        let never = join(update(0.25, 0, true), update(0.5, 0, true));
        assert_eq!((never.report.skipped, never.updates, never.skipped_updates), (true, 2, 2));
    }
}
