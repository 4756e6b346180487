//! Pretrainer: readies the run's data and leads pretraining and the long-context stage, packed
//! batch by batch.
//!
//! It also measures perplexity, which is the same reading of texts without an update. Knows no
//! optimizer and no reward.

use super::messages::*;
use super::port::Port;
use super::post::{Post, answers_for_itself, aside};
use super::reader::Reader;
use crate::engine::phase::{Role, ScoreJob, SequenceScore};
use actix::{Handler, ResponseActFuture};
use std::sync::Arc;

/// See the module.
pub struct Pretrainer {
    post: Post,
    reader: Arc<Reader>,
    ports: PretrainerPorts,
}

/// Whom a [`Pretrainer`] asks.
#[derive(Clone)]
pub struct PretrainerPorts {
    /// The device, for a step.
    pub train: Port<Train>,
    /// The device, for forward passes.
    pub score: Port<Score>,
}

impl Pretrainer {
    /// A pretrainer that reads through `reader`.
    pub fn new(post: Post, reader: Arc<Reader>, ports: PretrainerPorts) -> Pretrainer {
        Pretrainer { post, reader, ports }
    }
}

answers_for_itself!(Pretrainer);

impl Handler<PrepareData> for Pretrainer {
    type Result = ResponseActFuture<Self, Result<DataReport, Failure>>;

    fn handle(&mut self, _: PrepareData, _: &mut Self::Context) -> Self::Result {
        let reader = Arc::clone(&self.reader);
        self.post.work(PrepareData::NAME, aside(move || reader.prepare()))
    }
}

impl Handler<OpenStage> for Pretrainer {
    type Result = ResponseActFuture<Self, Result<StageShape, Failure>>;

    fn handle(&mut self, message: OpenStage, _: &mut Self::Context) -> Self::Result {
        let reader = Arc::clone(&self.reader);
        self.post.work(OpenStage::NAME, aside(move || reader.shape(message.stage)))
    }
}

impl Handler<TrainStep> for Pretrainer {
    type Result = ResponseActFuture<Self, Result<crate::engine::phase::StepReport, Failure>>;

    fn handle(&mut self, message: TrainStep, _: &mut Self::Context) -> Self::Result {
        let (reader, train) = (Arc::clone(&self.reader), self.ports.train.clone());
        let TrainStep { id, stage, step } = message;
        self.post.work(TrainStep::NAME, async move {
            let job = aside(move || reader.train_job(stage, step)).await?;
            train.ask(Train { id: id.part(1), job }).await
        })
    }
}

impl Handler<Measure> for Pretrainer {
    type Result = ResponseActFuture<Self, Result<Measurement, Failure>>;

    fn handle(&mut self, message: Measure, _: &mut Self::Context) -> Self::Result {
        let (reader, score) = (Arc::clone(&self.reader), self.ports.score.clone());
        self.post.work(Measure::NAME, async move {
            let eval = reader.config().stages[message.stage].eval[message.eval].clone();
            let texts = aside(move || reader.texts(message.stage, &eval)).await?;
            let sequences: Vec<Vec<u32>> = texts.into_iter().map(|text| text.tokens).collect();
            let (samples, first) = (sequences.len() as u64, vec![1; sequences.len()]);
            let job = ScoreJob { role: Role::Policy, sequences, temperature: 1.0, first };
            let scores = score.ask(Score { id: message.id.part(1), job }).await?;
            Ok(Measurement { value: perplexity(&scores), samples, ..Measurement::default() })
        })
    }
}

/// exp of the mean negative log-probability per token.
fn perplexity(scores: &[SequenceScore]) -> f64 {
    let (mut sum, mut tokens) = (0.0, 0u64);
    for score in scores {
        let SequenceScore::Logprobs(logprobs) = score else {
            panic!("texts were scored by a reward model")
        };
        sum += logprobs.iter().map(|l| f64::from(*l)).sum::<f64>();
        tokens += logprobs.len() as u64;
    }
    (-sum / tokens.max(1) as f64).exp()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn perplexity_of_a_fair_coin_is_two_whatever_the_lengths() {
        let half = 0.5f32.ln();
        let scores = [SequenceScore::Logprobs(vec![half; 3]), SequenceScore::Logprobs(vec![half])];
        assert!((perplexity(&scores) - 2.0).abs() < 1e-6);
        let uneven = [SequenceScore::Logprobs(vec![half; 3]), SequenceScore::Logprobs(vec![0.0])];
        assert!((perplexity(&uneven) - 2f64.powf(0.75)).abs() < 1e-6);
    }
}
