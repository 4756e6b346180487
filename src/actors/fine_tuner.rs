//! FineTuner: leads SFT and the fitting of reward models, on conversations and preference pairs.
//!
//! It also measures a reward model's accuracy and fits the scale of its scores. Knows no optimizer.

use super::messages::*;
use super::port::Port;
use super::post::{Post, answers_for_itself, aside};
use super::reader::Reader;
use crate::config::stage::StageKind;
use crate::data::Pair;
use crate::engine::phase::StepReport;
use crate::engine::phase::{Role, ScoreJob, SequenceScore};
use actix::{Handler, ResponseActFuture};
use std::sync::Arc;

/// See the module.
pub struct FineTuner {
    post: Post,
    reader: Arc<Reader>,
    ports: FineTunerPorts,
}

/// Whom a [`FineTuner`] asks.
#[derive(Clone)]
pub struct FineTunerPorts {
    /// The device, for a step.
    pub train: Port<Train>,
    /// The device, for forward passes.
    pub score: Port<Score>,
}

impl FineTuner {
    /// A fine-tuner that reads through `reader`.
    pub fn new(post: Post, reader: Arc<Reader>, ports: FineTunerPorts) -> FineTuner {
        FineTuner { post, reader, ports }
    }
}

answers_for_itself!(FineTuner);

impl Handler<OpenStage> for FineTuner {
    type Result = ResponseActFuture<Self, Result<StageShape, Failure>>;

    fn handle(&mut self, message: OpenStage, _: &mut Self::Context) -> Self::Result {
        let reader = Arc::clone(&self.reader);
        self.post.work(OpenStage::NAME, aside(move || reader.shape(message.stage)))
    }
}

impl Handler<TrainStep> for FineTuner {
    type Result = ResponseActFuture<Self, Result<StepReport, Failure>>;

    fn handle(&mut self, message: TrainStep, _: &mut Self::Context) -> Self::Result {
        let (reader, train) = (Arc::clone(&self.reader), self.ports.train.clone());
        let TrainStep { id, stage, step } = message;
        self.post.work(TrainStep::NAME, async move {
            let job = aside(move || reader.train_job(stage, step)).await?;
            train.ask(Train { id: id.part(1), job }).await
        })
    }
}

impl Handler<Measure> for FineTuner {
    type Result = ResponseActFuture<Self, Result<Measurement, Failure>>;

    fn handle(&mut self, message: Measure, _: &mut Self::Context) -> Self::Result {
        let (reader, score) = (Arc::clone(&self.reader), self.ports.score.clone());
        self.post.work(Measure::NAME, async move {
            let eval = reader.config().stages[message.stage].eval[message.eval].clone();
            let pairs = aside(move || reader.pairs(message.stage, &eval.data, eval.limit)).await?;
            let samples = pairs.len() as u64;
            let scores = pair_scores(&score, message.id, pairs).await?;
            Ok(Measurement { value: accuracy(&scores), samples, ..Measurement::default() })
        })
    }
}

impl Handler<FitScale> for FineTuner {
    type Result = ResponseActFuture<Self, Result<Scale, Failure>>;

    fn handle(&mut self, message: FitScale, _: &mut Self::Context) -> Self::Result {
        let (reader, score) = (Arc::clone(&self.reader), self.ports.score.clone());
        self.post.work(FitScale::NAME, async move {
            let StageKind::RewardModel(stage) = &reader.config().stages[message.stage].kind else {
                panic!("only a reward model has a scale")
            };
            let set = stage.calibration.clone().unwrap_or_else(|| stage.data.clone());
            let pairs = aside(move || reader.pairs(message.stage, &set, 0)).await?;
            Ok(scale(&pair_scores(&score, message.id, pairs).await?))
        })
    }
}

/// Scores of the chosen and the rejected reply of each pair, by the reward model that is being
/// fitted.
async fn pair_scores(
    score: &Port<Score>,
    id: WorkId,
    pairs: Vec<Pair>,
) -> Result<Vec<[f64; 2]>, Failure> {
    let sequences: Vec<Vec<u32>> =
        pairs.into_iter().flat_map(|pair| [pair.chosen, pair.rejected]).collect();
    let first = vec![1; sequences.len()];
    let job = ScoreJob { role: Role::Policy, sequences, temperature: 1.0, first };
    let scores = score.ask(Score { id: id.part(1), job }).await?;
    let scores: Vec<f64> = scores
        .into_iter()
        .map(|score| match score {
            SequenceScore::Reward(score) => score,
            SequenceScore::Logprobs(_) => {
                panic!("pairs were scored by a model without a value head")
            }
        })
        .collect();
    Ok(scores.chunks_exact(2).map(|pair| [pair[0], pair[1]]).collect())
}

/// Share of pairs whose chosen reply scores higher; a tie is no success.
fn accuracy(scores: &[[f64; 2]]) -> f64 {
    scores.iter().filter(|[chosen, rejected]| chosen > rejected).count() as f64
        / scores.len().max(1) as f64
}

/// Mean and population deviation over all scores, chosen and rejected alike.
fn scale(scores: &[[f64; 2]]) -> Scale {
    let all: Vec<f64> = scores.iter().flatten().copied().collect();
    let count = all.len().max(1) as f64;
    let mean = all.iter().sum::<f64>() / count;
    let deviation = (all.iter().map(|score| (score - mean).powi(2)).sum::<f64>() / count).sqrt();
    Scale { mean, deviation }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tie_is_no_success() {
        assert_eq!(accuracy(&[[1.0, 0.0], [0.0, 0.0], [0.0, 1.0], [3.0, 2.0]]), 0.5);
    }

    #[test]
    fn a_scale_is_mean_and_population_deviation_over_both_replies() {
        assert_eq!(scale(&[[5.0, 1.0], [5.0, 1.0]]), Scale { mean: 3.0, deviation: 2.0 });
    }
}
