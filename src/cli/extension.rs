//! `--extend-to` and `--no-yarn`: a model over more positions than its config has.

use super::generate::at_least_one;
use crate::config::{Fault, MOST_POSITIONS, ModelConfig};
use anyhow::Result;
use clap::Args;

/// Positions beyond those of the model's config.
#[derive(Clone, Copy, Debug, Default, Args)]
pub struct Extension {
    /// Give the model so many positions, by YaRN over the length that it was trained at
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    pub extend_to: Option<usize>,
    /// With --extend-to: leave its frequencies as they are, to see what YaRN is good for
    #[arg(long, requires = "extend_to")]
    pub no_yarn: bool,
}

impl Extension {
    /// The model with its positions; `None` if it keeps its own.
    pub fn of(self, model: &ModelConfig) -> Result<Option<ModelConfig>> {
        let Some(positions) = self.extend_to else { return Ok(None) };
        let present = model.max_position_embeddings;
        if positions <= present {
            return Err(Fault::user(format!(
                "--extend-to {positions} lengthens nothing: the model has {present} positions; leave it out"
            )));
        }
        if positions > MOST_POSITIONS {
            return Err(Fault::user(format!(
                "--extend-to {positions} is too many; use at most {MOST_POSITIONS} positions"
            )));
        }
        Ok(Some(match self.no_yarn {
            true => ModelConfig { max_position_embeddings: positions, ..model.clone() },
            false => model.extended_to(positions),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::load_model;
    use std::path::Path;

    #[test]
    fn a_model_gets_positions_with_yarn_or_without_it_and_never_fewer() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/model/smoke.json");
        let model = load_model(&path).unwrap();
        let extended = |extend_to, no_yarn| Extension { extend_to, no_yarn }.of(&model);
        assert_eq!(extended(None, false).unwrap(), None);
        let plain = extended(Some(512), true).unwrap().unwrap();
        assert_eq!((plain.max_position_embeddings, &plain.rope_scaling), (512, &None));
        let long = extended(Some(512), false).unwrap().unwrap();
        let yarn = long.rope_scaling.clone().unwrap();
        assert_eq!(long.max_position_embeddings, 512);
        assert_eq!((yarn.factor, yarn.original_max_position_embeddings), (4.0, 128));
        assert_eq!(
            (yarn.beta_fast, yarn.beta_slow, yarn.mscale, yarn.mscale_all_dim),
            (32.0, 1.0, 0.707, 0.707)
        );
        let told = extended(Some(128), false).unwrap_err().to_string();
        assert!(told.contains("--extend-to 128 lengthens nothing: the model has 128"), "{told}");
        let told = extended(Some(1 << 23), false).unwrap_err().to_string();
        assert!(told.contains("use at most 4194304 positions"), "{told}");
        let again = Extension { extend_to: Some(1024), no_yarn: false }.of(&long).unwrap().unwrap();
        assert_eq!(again.rope_scaling.unwrap().factor, 8.0, "over the length that was trained");
    }
}
