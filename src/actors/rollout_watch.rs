//! What a person is told of a stage's rollouts, once when it begins to hold: they are sampled from other weights than was
//! asked for, or the sampler is far from the trainer.
//!
//! Reads the lines of steps, and knows nothing of how they came about.

use crate::config::stage::{GrpoStage, Stage, StageKind};
use crate::console::Event;

/// KL(sampler || trainer) in nats a token beyond which rollouts no longer speak for the trainer.
pub(super) const ALARMING_KL: f64 = 1e-3;

/// Watches the steps of one stage.
pub(super) struct RolloutWatch<'a> {
    stage: &'a Stage,
    fell_back: bool,
    is_far: bool,
}

impl<'a> RolloutWatch<'a> {
    /// A watch over a stage of any kind.
    pub(super) fn new(stage: &'a Stage) -> RolloutWatch<'a> {
        RolloutWatch { stage, fell_back: false, is_far: false }
    }

    /// What is new with this step.
    pub(super) fn remarks(&mut self, step: &Event) -> Vec<Event> {
        let StageKind::Grpo(settings) = &self.stage.kind else { return Vec::new() };
        let is_other = step.text("rollout_dtype") != Some(settings.rollout_dtype.name());
        let kl = step.number("sampler_kl").unwrap_or_default();
        let mut remarks = Vec::new();
        if is_other && !self.fell_back {
            remarks.push(self.remark("fallback", step).with("reason", fallback(settings, step)));
        }
        // Rollouts of the policy before are far from it by right.
        let is_far = kl > ALARMING_KL && settings.max_staleness == 0;
        if is_far && !self.is_far {
            let alarm = self.remark("alarm", step).with("sampler_kl", kl);
            remarks.push(alarm.with("reason", self.distance(settings, step, kl)));
        }
        (self.fell_back, self.is_far) = (is_other, is_far);
        remarks
    }

    fn remark(&self, name: &str, step: &Event) -> Event {
        let event = Event::new(name).of_stage(&self.stage.name, self.stage.kind.name());
        event.with("step", step.whole("step"))
    }

    fn distance(&self, settings: &GrpoStage, step: &Event, kl: f64) -> String {
        format!(
            "stage {:?}, step {}: the sampler's weights in {} are {kl:.1e} nats a token from the trainer's, more than \
             {ALARMING_KL:.0e}; the run goes on, and rollout_dtype = \"f32\", or bf16, is closer",
            self.stage.name,
            step.whole("step").unwrap_or_default(),
            settings.rollout_dtype.name(),
        )
    }
}

fn fallback(settings: &GrpoStage, step: &Event) -> String {
    format!(
        "this processor has no instructions for rollouts in {}; they are sampled in {}",
        settings.rollout_dtype.name(),
        step.text("rollout_dtype").unwrap_or("f32"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn stage(dtype: &str) -> Stage {
        let settings = json!({
            "data": "prompts", "steps": 9, "prompts": 1, "group_size": 2, "max_new_tokens": 4, "reward": [],
            "rollout_dtype": dtype,
        });
        let kind = StageKind::Grpo(serde_json::from_value(settings).unwrap());
        Stage { name: "align".to_string(), start_from: None, eval: Vec::new(), gate: None, kind }
    }

    /// What is told after each of some steps, of which the first is the stage's third.
    fn told(stage: &Stage, steps: &[(&str, f64)]) -> Vec<String> {
        let mut watch = RolloutWatch::new(stage);
        let mut told = Vec::new();
        for (index, (dtype, kl)) in steps.iter().enumerate() {
            let step = Event::step("align", "grpo", 3 + index as u64);
            let step = step.with("rollout_dtype", *dtype).with("sampler_kl", *kl);
            let name = |event: &Event| format!("{} {}", event.name(), event.whole("step").unwrap());
            told.extend(watch.remarks(&step).iter().map(name));
        }
        told
    }

    #[test]
    fn an_alarm_is_given_when_the_sampler_leaves_the_trainer_and_not_while_it_stays_away() {
        let kls = [1e-3, 1.1e-3, 5.0, 2e-3, 0.0, 2e-3].map(|kl| ("int8", kl));
        assert_eq!(told(&stage("int8"), &kls), ["alarm 4", "alarm 8"]);
        let step = Event::step("align", "grpo", 7).with("rollout_dtype", "int8");
        let stage = stage("int8");
        let remarks = RolloutWatch::new(&stage).remarks(&step.with("sampler_kl", 0.25));
        let (text, kl) = (remarks[0].remark().unwrap(), remarks[0].number("sampler_kl"));
        for part in ["stage \"align\", step 7", "in int8 are 2.5e-1 nats", "1e-3", "rollout_dtype"]
        {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert_eq!(kl, Some(0.25));
    }

    #[test]
    fn rollouts_from_other_weights_than_asked_for_are_told_once() {
        let fell_back = [("f32", 0.0); 3];
        assert_eq!(told(&stage("int8"), &fell_back), ["fallback 3"]);
        assert!(told(&stage("f32"), &fell_back).is_empty());
        let stage = stage("int8");
        let step = Event::step("align", "grpo", 1).with("rollout_dtype", "f32");
        let text = RolloutWatch::new(&stage).remarks(&step)[0].remark().unwrap();
        assert!(text.contains("rollouts in int8; they are sampled in f32"), "{text}");
    }
}
