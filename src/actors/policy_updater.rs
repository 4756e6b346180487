//! PolicyUpdater: scored groups to one or more GRPO updates of the policy.
//!
//! Knows no reward's origin and no optimizer: the loss is `rl::grpo`'s, the step the device's.

use super::messages::*;
use super::port::Port;
use super::post::{Post, answers_for_itself};
use crate::config::stage::GrpoStage;
use crate::engine::phase::{StepReport, TrainJob};
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
    type Result = ResponseActFuture<Self, Result<StepReport, Failure>>;

    fn handle(&mut self, message: UpdatePolicy, _: &mut Self::Context) -> Self::Result {
        let train = self.train.clone();
        let UpdatePolicy { id, groups, settings } = message;
        self.post.work(UpdatePolicy::NAME, async move {
            let mut total: Option<StepReport> = None;
            for update in 1..=settings.updates.max(1) {
                let job = TrainJob::Grpo {
                    groups: groups.clone(),
                    settings: loss_settings(&settings),
                    micro_batch: settings.micro_batch,
                };
                let report = train.ask(Train { id: id.part(update as u32), job }).await?;
                total = Some(match total {
                    None => report,
                    Some(before) => join(before, report),
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
        deviation: stage.deviation,
    }
}

/// Two updates on the same rollouts as one report: the last one's figures, sums of work, and the
/// sampler's gap of the first, before which no weight had moved.
fn join(before: StepReport, last: StepReport) -> StepReport {
    let grpo = last.grpo.map(|mut grpo| {
        if let Some(first) = &before.grpo {
            (grpo.logprob_gap_max, grpo.logprob_gap_mean) =
                (first.logprob_gap_max, first.logprob_gap_mean);
        }
        grpo
    });
    StepReport {
        tokens: before.tokens + last.tokens,
        seconds: before.seconds + last.seconds,
        skipped: before.skipped || last.skipped,
        grpo,
        ..last
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::phase::GrpoReport;

    #[test]
    fn the_sampler_gap_of_several_updates_is_that_of_the_first() {
        let report = |gap, tokens, skipped| StepReport {
            tokens,
            skipped,
            grpo: Some(GrpoReport { logprob_gap_max: gap, kl: gap, ..GrpoReport::default() }),
            ..StepReport::default()
        };
        let joined = join(report(0.25, 10, true), report(0.5, 10, false));
        let grpo = joined.grpo.unwrap();
        assert_eq!((grpo.logprob_gap_max, grpo.kl), (0.25, 0.5));
        assert_eq!((joined.tokens, joined.skipped), (20, true));
    }
}
