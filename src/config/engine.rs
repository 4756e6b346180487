//! `[engine]`: devices, memory, offload, deadlines.

use serde::de::Visitor;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use std::fmt;

/// `[engine]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EngineConfig {
    /// Threads of the CPU device; all cores if absent, which is 0 here and nowhere written. Changes no result.
    #[serde(skip_serializing_if = "is_absent")]
    pub threads: usize,
    /// Bytes that the arenas may hold, e.g. "1.5 GiB"; absent for no limit.
    pub budget: Option<Bytes>,
    /// What leaves the device in phases that do not use it: "auto", or absent, has a planner decide what must leave to keep the
    /// budget, where to and when, beside computation; a list has these leave at every change of phase. Changes no result.
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "auto_or_list")]
    pub offload: Option<Vec<Offload>>,
    /// Bytes of copies that rest in the host's memory, e.g. "4 GiB"; those beyond are on disk. Absent for no limit. Changes no
    /// result.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host_budget: Option<Bytes>,
    /// Whether what moves by plan does so beside computation; `false` has the device wait for each transfer. Changes no result.
    pub overlap: bool,
    /// Form of attention in training; `grpo` stages use the absorbed one, the sampler's, where `exact` is on.
    pub attention: AttentionForm,
    /// Whether `grpo` stages compute everything in the sampler's form, so that its log-probabilities are the trainer's to
    /// the bit; a step in which they are not stops the run. `false` trains and scores in the form that `attention` names
    /// and takes prompts by cost, as other stages do: the two then agree to rounding.
    pub exact: bool,
    /// Layers of the model (of each piece of a pipeline's stages), from the lowest, whose activations a training step
    /// computes again instead of keeping them: less memory for more time. Changes no result.
    pub recompute: usize,
    /// Tokens of a cache page.
    pub page_tokens: usize,
    /// Sequences that decode together at most.
    pub decode_batch: usize,
    /// Messages that wait in an actor's mailbox or a worker's channel at most.
    pub mailbox: usize,
    /// Seconds that a request to another actor may take before it is named and fails.
    pub deadline_seconds: u64,
    /// Restarts of one actor within `restart_window_seconds` before the run stops.
    pub restarts: usize,
    /// See `restarts`.
    pub restart_window_seconds: u64,
}

impl EngineConfig {
    /// Whether this leaves the device in phases that do not use it.
    pub fn offloads(&self, what: Offload) -> bool {
        match &self.offload {
            Some(listed) => listed.contains(&what),
            None => self.budget.is_some(),
        }
    }

    /// Whether anything does.
    pub fn offloads_any(&self) -> bool {
        Offload::ALL.into_iter().any(|what| self.offloads(what))
    }

    /// Form of attention in which a `grpo` stage trains and scores, and that of its sampler's prompts. New tokens are
    /// absorbed in either mode.
    pub fn grpo_forms(&self) -> (AttentionForm, Prefill) {
        match self.exact {
            true => (AttentionForm::Absorbed, Prefill::Absorbed),
            false => (self.attention, Prefill::ByCost),
        }
    }
}

impl Default for EngineConfig {
    fn default() -> Self {
        EngineConfig {
            threads: 0,
            budget: None,
            offload: None,
            host_budget: None,
            overlap: true,
            attention: AttentionForm::Expanded,
            exact: true,
            recompute: 0,
            page_tokens: 16,
            decode_batch: 128,
            mailbox: 64,
            deadline_seconds: 600,
            restarts: 3,
            restart_window_seconds: 60,
        }
    }
}

fn auto_or_list<'de, D: Deserializer<'de>>(input: D) -> Result<Option<Vec<Offload>>, D::Error> {
    struct AutoOrList;
    impl<'de> Visitor<'de> for AutoOrList {
        type Value = Option<Vec<Offload>>;

        fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
            out.write_str("\"auto\" or a list of what leaves, as in [\"optimizer\", \"reference\"]")
        }

        fn visit_str<E: de::Error>(self, text: &str) -> Result<Self::Value, E> {
            match text {
                "auto" => Ok(None),
                _ => Err(E::invalid_value(de::Unexpected::Str(text), &self)),
            }
        }

        fn visit_none<E: de::Error>(self) -> Result<Self::Value, E> {
            Ok(None)
        }

        fn visit_seq<A: de::SeqAccess<'de>>(self, list: A) -> Result<Self::Value, A::Error> {
            Vec::deserialize(de::value::SeqAccessDeserializer::new(list)).map(Some)
        }
    }
    input.deserialize_any(AutoOrList)
}

fn is_absent(threads: &usize) -> bool {
    *threads == 0
}

/// Something that can be offloaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Offload {
    /// Optimizer moments, outside Train.
    Optimizer,
    /// The reference model, outside Score.
    Reference,
    /// Reward models, outside Score.
    RewardModels,
}

impl Offload {
    /// All that can leave.
    pub const ALL: [Offload; 3] = [Offload::Optimizer, Offload::Reference, Offload::RewardModels];
}

/// Form of MLA in training and scoring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AttentionForm {
    /// Keys and values expanded per head (deepseek_v2.md 1.2).
    Expanded,
    /// W_UK absorbed into the query (1.5): the sampler's form.
    Absorbed,
}

/// How prompts go through the sampler. A new token's row is always absorbed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Prefill {
    /// Absorbed too, so that log-probabilities are those of a trainer in that form, to the bit.
    Absorbed,
    /// Each chunk of a prompt in the form that costs less.
    ByCost,
}

/// A number of bytes, written "1.5 GiB", "512 MiB" or as an integer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bytes(pub u64);

/// The units of [`Bytes`], largest first.
const UNITS: [(&str, u64); 4] = [("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1)];

impl Bytes {
    /// Reads "1.5 GiB", "512 MiB", "64 KiB", "100 B" or "100".
    pub fn parse(text: &str) -> Option<Bytes> {
        let number_end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (number, unit) = text.split_at(number_end);
        let number: f64 = number.parse().ok()?;
        let unit = match unit.trim() {
            "" => 1,
            word => UNITS.iter().find(|(name, _)| *name == word)?.1,
        };
        let bytes = number * unit as f64;
        (bytes < u64::MAX as f64).then_some(Bytes(bytes as u64))
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, unit) = UNITS.into_iter().find(|(_, unit)| self.0 >= *unit).unwrap_or(("B", 1));
        match unit {
            1 => write!(out, "{} B", self.0),
            _ => write!(out, "{:.2} {name}", self.0 as f64 / unit as f64),
        }
    }
}

impl Serialize for Bytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(self.0)
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Bytes, D::Error> {
        struct BytesVisitor;
        impl de::Visitor<'_> for BytesVisitor {
            type Value = Bytes;

            fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
                out.write_str("bytes, as in \"1.5 GiB\", \"512 MiB\" or 1000000")
            }

            fn visit_u64<E: de::Error>(self, bytes: u64) -> Result<Bytes, E> {
                Ok(Bytes(bytes))
            }

            fn visit_i64<E: de::Error>(self, bytes: i64) -> Result<Bytes, E> {
                let wrong = || E::invalid_value(de::Unexpected::Signed(bytes), &self);
                u64::try_from(bytes).map(Bytes).map_err(|_| wrong())
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Bytes, E> {
                Bytes::parse(text).ok_or_else(|| E::invalid_value(de::Unexpected::Str(text), &self))
            }
        }
        deserializer.deserialize_any(BytesVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_read_with_their_units() {
        for (text, bytes) in [
            ("1.5 GiB", Some(1_610_612_736)),
            ("512 MiB", Some(536_870_912)),
            ("64KiB", Some(65_536)),
            ("9 B", Some(9)),
            ("77", Some(77)),
            ("1.5 GB", None),
            ("GiB", None),
            ("-1 B", None),
            ("1e9 GiB", None),
            ("", None),
        ] {
            assert_eq!(Bytes::parse(text), bytes.map(Bytes), "{text}");
        }
        assert_eq!(Bytes(1_610_612_736).to_string(), "1.50 GiB");
        assert_eq!(Bytes(12).to_string(), "12 B");
    }
}
