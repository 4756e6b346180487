//! `latent_scaling`: factors at the width bottlenecks of MLA (deepseek_v2.md 1.8), a key of our own.
//!
//! The paper names "additional scaling factors" at the compressed latents, and its release has none in the code: they
//! are off, or folded into the weights of the latents' norms. So does our export.

use serde::de::{self, Deserializer, Visitor};
use serde::{Deserialize, Serialize, Serializer};
use std::fmt;

/// The factor behind the norm of a latent.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum LatentScaling {
    /// 1.
    #[default]
    Off,
    /// (d / width of the latent)^1/2: a latent as large as the residual stream that it was made from.
    Sqrt,
    /// The same number for both latents.
    Constant(f64),
}

impl LatentScaling {
    /// The factor of a latent of width `rank` in a stream of width `hidden`.
    pub fn factor(self, hidden: usize, rank: usize) -> f64 {
        match self {
            LatentScaling::Off => 1.0,
            LatentScaling::Sqrt => (hidden as f64 / rank as f64).sqrt(),
            LatentScaling::Constant(factor) => factor,
        }
    }
}

impl Serialize for LatentScaling {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            LatentScaling::Off => serializer.serialize_str("off"),
            LatentScaling::Sqrt => serializer.serialize_str("sqrt"),
            LatentScaling::Constant(factor) => serializer.serialize_f64(*factor),
        }
    }
}

impl<'de> Deserialize<'de> for LatentScaling {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<LatentScaling, D::Error> {
        deserializer.deserialize_any(Words)
    }
}

/// A word or a number.
struct Words;

impl Visitor<'_> for Words {
    type Value = LatentScaling;

    fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("\"off\", \"sqrt\" or a number")
    }

    fn visit_str<E: de::Error>(self, word: &str) -> Result<LatentScaling, E> {
        match word {
            "off" => Ok(LatentScaling::Off),
            "sqrt" => Ok(LatentScaling::Sqrt),
            other => Err(E::invalid_value(de::Unexpected::Str(other), &self)),
        }
    }

    fn visit_f64<E: de::Error>(self, factor: f64) -> Result<LatentScaling, E> {
        Ok(LatentScaling::Constant(factor))
    }

    fn visit_u64<E: de::Error>(self, factor: u64) -> Result<LatentScaling, E> {
        self.visit_f64(factor as f64)
    }

    fn visit_i64<E: de::Error>(self, factor: i64) -> Result<LatentScaling, E> {
        self.visit_f64(factor as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn words_and_numbers_come_back_as_they_were_written() {
        let read = |value| serde_json::from_value::<LatentScaling>(value);
        for (value, scaling) in [
            (json!("off"), LatentScaling::Off),
            (json!("sqrt"), LatentScaling::Sqrt),
            (json!(1.5), LatentScaling::Constant(1.5)),
            (json!(2), LatentScaling::Constant(2.0)),
        ] {
            assert_eq!(read(value).unwrap(), scaling);
            assert_eq!(read(serde_json::to_value(scaling).unwrap()).unwrap(), scaling);
        }
        assert!(read(json!("root")).is_err() && read(json!(true)).is_err());
    }

    #[test]
    fn the_root_makes_a_latent_of_v2_as_large_as_its_stream() {
        assert_eq!(LatentScaling::Sqrt.factor(5120, 512), 10.0f64.sqrt());
        assert_eq!(LatentScaling::Off.factor(5120, 512), 1.0);
        assert_eq!(LatentScaling::Constant(3.0).factor(5120, 512), 3.0);
    }
}
