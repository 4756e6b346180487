//! One line of the journal: an open map with a few keys that every line has.
//!
//! `event`, `time` (seconds since 1970), `stage` (name), `kind` (of stage), `step` (within the
//! stage, from 1) are in every line, null where they do not apply. The other keys depend on the
//! event; the ones that board, console and plots read are:
//!   * `run`: `resumed` (bool), `seed`, `stages` (list of `{name, kind, steps}`; steps null if not
//!     known yet), `machine` (what it does in a second, measured when this process began, with the
//!     keys of `bench machine --json`), `ranks` and `sampling_ranks` (processes, and those that sample: every share of a step
//!     is of these rates times as many)
//!   * `stage-start`: `steps`; `stage-end`: `seconds`
//!   * `step`: `loss`, `learning_rate`, `gradient_norm`, `tokens`, `tokens_per_second`, `seconds`;
//!     `dropped` (share of the pairs of token and expert) in a stage that lets full devices drop;
//!     `useful_share` (of the measured f32 products) but in `grpo`, which has `reward_mean`, `kl`,
//!     `entropy`, `clip_share`, `length_mean`, `zero_variance_groups`, `logprob_gap_max` (of sampler and trainer of one
//!     version), `stale_gap_max` (of the sampler and a policy that has changed since), `rollout_dtype`, `sampler_kl`, with importance weights `importance_weight_mean` and
//!     `truncated_share`, and of the machine `rfu` (useful-FLOP utilisation), `rollout_bandwidth`, `tail_factor`,
//!     `padding_share` and `exposed_seconds` (of `reward`, `reference`, `sync`, `offload`, `compare`); where models or moments moved,
//!     `offload_exposed_share` (of the step) and `offload`, of rank 0 where there are several: `seconds`, `exposed_seconds`, `overlap_share`, `bytes_in`,
//!     `bytes_out`, `computed` (lists of phase, start, end), `waited` (start, end), `moved` (item, `read` or `write`, the
//!     copy's tier, start, end, bytes), all in seconds since the step began;
//!     of a run over ranks, in steps 1, 2, 4, 8 and so on, `ranks` (lists of rank, pass, start, end, micro-batch, piece);
//!     `switch`: `moved_bytes`, `least_bytes`, `seconds`, `cpu_seconds` of all ranks and `cpu_seconds_per_byte`;
//!     `window` (start and end of the step), `intervals` (what was done in it: `generate` and `judge` of its batch, `hand_over`,
//!     `ahead`, `judge_ahead` and `compare` of the next one's, `score`, `train`), `sampled` (where its batch comes from: `step`,
//!     `version`, `generate`, `judge`), all in seconds since 1970, and `sampling_overlap`, the share of `train` beside which
//!     the next batch was sampled; docs/performance.md defines them
//!   * `eval`: `name`, one of `pass_at_1`, `perplexity`, `accuracy`, `rate`, and `samples`;
//!     optionally `replies` (list of `{prompt, text, answer, score}`)
//!   * `commit`: `folder`; `note`: `text`
//!   * remarks, which are shown as one sentence: `rejected`: `folder`, `reason`; `restart`, `silent`:
//!     `actor`, `reason`; `refused`, `inject`: `actor`, `message`; `skipped`: `in_a_row`; `rollback`,
//!     `fallback`: `reason`; `alarm`: `reason`, and `logprob_gap_max` or `sampler_kl`
//!   * `end`: `state` (`finished`, `stopped`, `failed`), `reason`, `export`, `computed_steps` (steps
//!     computed since the start or resume, those that the journal had already included)

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::time::{SystemTime, UNIX_EPOCH};

/// An event of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Event(Map<String, Value>);

impl Event {
    /// An event of this name, now, outside any stage.
    pub fn new(name: &str) -> Event {
        let mut keys = Map::new();
        keys.insert("event".to_string(), json!(name));
        keys.insert("time".to_string(), json!(now()));
        for key in ["stage", "kind", "step"] {
            keys.insert(key.to_string(), Value::Null);
        }
        Event(keys)
    }

    /// What a remark says to a person, as one sentence; `None` for other events.
    pub fn remark(&self) -> Option<String> {
        let [actor, reason, message] =
            ["actor", "reason", "message"].map(|key| self.text(key).unwrap_or_default());
        let whole = |key| self.whole(key).unwrap_or_default();
        Some(match self.name() {
            "restart" => format!("{actor} restarted: {reason}"),
            "rejected" => {
                let folder = self.text("folder").unwrap_or_default();
                format!("{folder} checkpoint rejected: {reason}")
            }
            "silent" => format!("{actor} does not answer: {reason}"),
            "refused" => format!("{actor} refused {message}, which came too late: {reason}"),
            "inject" => format!("{actor} was given a fault in {message}, as a test wants"),
            "skipped" => format!(
                "{} step {} skipped: no finite loss or gradient, {} in a row",
                self.text("stage").unwrap_or_default(),
                whole("step"),
                whole("in_a_row")
            ),
            "alarm" => format!("ALARM: {reason}"),
            "fallback" => format!("WARNING: {reason}"),
            "rollback" => format!("going back to the last commit: {reason}"),
            _ => return None,
        })
    }

    /// An event out of a JSON object that names one; keys that every line has are added. Anything
    /// else is handed back.
    pub fn from_value(value: Value) -> Result<Event, Value> {
        let Value::Object(keys) = value else { return Err(value) };
        match keys.get("event").and_then(Value::as_str) {
            None => Err(Value::Object(keys)),
            Some(name) => {
                let mut event = Event::new(name);
                event.0.extend(keys);
                Ok(event)
            }
        }
    }

    /// A step's event.
    pub fn step(stage: &str, kind: &str, step: u64) -> Event {
        Event::new("step").of_stage(stage, kind).with("step", step)
    }

    /// A measurement: `metric` is `pass_at_1`, `perplexity`, `accuracy` or `rate`.
    pub fn eval(
        stage: &str,
        kind: &str,
        step: u64,
        name: &str,
        metric: &str,
        value: f64,
        samples: u64,
    ) -> Event {
        let event = Event::new("eval").of_stage(stage, kind).with("step", step);
        event.with("name", name).with(metric, value).with("samples", samples)
    }

    /// The same event, in this stage.
    pub fn of_stage(self, stage: &str, kind: &str) -> Event {
        self.with("stage", stage).with("kind", kind)
    }

    /// The same event, at this time.
    pub fn at(self, time: f64) -> Event {
        self.with("time", time)
    }

    /// The same event with one key more. A float that is not finite becomes null, which is what
    /// JSON has.
    pub fn with(mut self, key: &str, value: impl Serialize) -> Event {
        let value = serde_json::to_value(value).expect("an event's values have string keys");
        self.0.insert(key.to_string(), value);
        self
    }

    /// Its name.
    pub fn name(&self) -> &str {
        self.text("event").unwrap_or_default()
    }

    /// A key's value.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.0.get(key).filter(|value| !value.is_null())
    }

    /// A key's text.
    pub fn text(&self, key: &str) -> Option<&str> {
        self.get(key)?.as_str()
    }

    /// A key's number.
    pub fn number(&self, key: &str) -> Option<f64> {
        self.get(key)?.as_f64()
    }

    /// A key's whole number.
    pub fn whole(&self, key: &str) -> Option<u64> {
        self.get(key)?.as_u64()
    }

    /// When it happened, in seconds since 1970.
    pub fn time(&self) -> f64 {
        self.number("time").unwrap_or_default()
    }

    /// Its metric's name and value, if it is an eval.
    pub fn measured(&self) -> Option<(&'static str, f64)> {
        ["pass_at_1", "perplexity", "accuracy", "rate"]
            .into_iter()
            .find_map(|key| Some((key, self.number(key)?)))
    }
}

/// Seconds since 1970, to the millisecond.
pub fn now() -> f64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    (since.as_secs_f64() * 1000.0).round() / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_event_has_the_five_keys() {
        for event in [
            Event::new("note"),
            Event::step("sft", "sft", 3),
            Event::from_value(json!({"event": "x", "actor": "a"})).expect("an event"),
        ] {
            let line = serde_json::to_value(&event).expect("JSON");
            for key in ["event", "time", "stage", "kind", "step"] {
                assert!(line.get(key).is_some(), "{key} in {line}");
            }
        }
        assert!(Event::from_value(json!({"step": 1})).is_err());
        assert!(Event::from_value(json!([1])).is_err());
    }

    #[test]
    fn a_number_that_json_has_not_becomes_null() {
        let event = Event::step("a", "sft", 1).with("loss", f64::NAN);
        assert_eq!(serde_json::to_value(&event).expect("JSON")["loss"], Value::Null);
        assert_eq!(event.number("loss"), None);
    }
}
