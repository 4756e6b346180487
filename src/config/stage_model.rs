//! The model of each stage: the run's, with the positions of what the stage starts from and, after a long-context stage,
//! more of them.
//!
//! Reads the config.json of a folder that `start_from` names, and no weights.

use super::run::{ConfigError, Place, RunConfig, load_model};
use super::stage::{
    LongContextStage, PAPERS_BETA_FAST, PAPERS_BETA_SLOW, PAPERS_MSCALE, StageKind,
};
use super::{Attention, ModelConfig, ModelType, RopeScaling};
use std::path::{Path, PathBuf};

impl RunConfig {
    /// The stage whose result stage number `index` starts from, if it is one of the run's.
    pub fn predecessor(&self, index: usize) -> Option<usize> {
        match &self.stages[index].start_from {
            Some(name) => self.stages[..index].iter().position(|stage| stage.name == *name),
            None => self.stages[..index].iter().rposition(|stage| stage.kind.makes_policy()),
        }
    }

    /// The folder of weights that stage number `index` starts from, if it starts from no stage of the run.
    pub fn start_folder(&self, folder: &Path, index: usize) -> Option<PathBuf> {
        let start = self.stages[index].start_from.as_ref()?;
        match self.predecessor(index) {
            Some(_) => None,
            None => Some(model_folder(&folder.join(start))),
        }
    }

    /// The model in stage number `index`; `folder` is the TOML's, where relative paths start.
    pub fn stage_model(&self, folder: &Path, index: usize) -> Result<ModelConfig, ConfigError> {
        let stage = &self.stages[index];
        let before = match (self.predecessor(index), &stage.start_from) {
            (Some(before), _) => self.stage_model(folder, before)?,
            (None, None) => self.model.clone(),
            (None, Some(path)) => {
                let config = model_folder(&folder.join(path)).join("config.json");
                self.model.continued_from(&load_model(&config)?).map_err(|difference| {
                    let place = Place::File(config.display().to_string().into());
                    ConfigError { place, message: difference.told(&config) }
                })?
            }
        };
        Ok(match &stage.kind {
            StageKind::LongContext(long) => before.lengthened(long),
            _ => before,
        })
    }
}

impl ModelConfig {
    /// The same model over the positions of `other`, whose weights it continues; refused if it would compute something
    /// else with them.
    pub fn continued_from(&self, other: &ModelConfig) -> Result<ModelConfig, ModelDifference> {
        let (ours, theirs) = (keys(self), keys(other));
        let differs = |key: &&String| {
            !TAKEN_OR_TRAINING.contains(&key.as_str()) && ours.get(*key) != theirs.get(*key)
        };
        // Models of one architecture have the same keys, and the first of all says which it is.
        if let Some(key) = ours.keys().find(differs) {
            let shown = |keys: &serde_json::Map<_, _>| keys[key].to_string();
            let (ours, theirs) = (shown(&ours), shown(&theirs));
            return Err(ModelDifference { key: key.clone(), ours, theirs });
        }
        Ok(ModelConfig {
            rope_scaling: other.rope_scaling.clone(),
            max_position_embeddings: other.max_position_embeddings,
            ..self.clone()
        })
    }

    /// The model that a long-context stage trains: `factor` times the positions, by YaRN over the length that was trained
    /// without it. A second extension therefore multiplies the factor of the first.
    pub fn lengthened(&self, long: &LongContextStage) -> ModelConfig {
        let longest = (self.max_position_embeddings as f64 * long.factor).round() as usize;
        self.stretched(longest, long.beta_fast, long.beta_slow, long.mscale)
    }

    /// The model that a long-context stage with the paper's YaRN would begin with, over so many positions.
    pub fn extended_to(&self, positions: usize) -> ModelConfig {
        self.stretched(positions, PAPERS_BETA_FAST, PAPERS_BETA_SLOW, PAPERS_MSCALE)
    }

    fn stretched(
        &self,
        longest: usize,
        beta_fast: f64,
        beta_slow: f64,
        mscale: f64,
    ) -> ModelConfig {
        let original = self
            .rope_scaling
            .as_ref()
            .map_or(self.max_position_embeddings, |yarn| yarn.original_max_position_embeddings);
        let factor = longest as f64 / original as f64;
        // The same temperature of attention in both: DeepSeek-V2 has it in the softmax scale, a Llama in cos and sin.
        let (mscale, mscale_all_dim, attention_factor) = match self.model_type {
            ModelType::DeepseekV2 => (mscale, mscale, None),
            ModelType::Llama => (1.0, 0.0, Some(RopeScaling::mscale(factor, mscale))),
        };
        let yarn = RopeScaling {
            kind: "yarn".to_string(),
            factor,
            original_max_position_embeddings: original,
            beta_fast,
            beta_slow,
            mscale,
            mscale_all_dim,
            attention_factor,
        };
        ModelConfig { rope_scaling: Some(yarn), max_position_embeddings: longest, ..self.clone() }
    }
}

/// Keys that a stage takes from what it starts from (positions), and keys that only say how a model is trained or where
/// its replies end.
const TAKEN_OR_TRAINING: [&str; 8] = [
    "rope_scaling",
    "max_position_embeddings",
    "aux_loss_alpha",
    "seq_aux",
    "initializer_range",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
];

/// A key in which two models compute different things with the same weights.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelDifference {
    /// The key.
    pub key: String,
    /// What the run's model has.
    pub ours: String,
    /// What the model it continues has.
    pub theirs: String,
}

impl ModelDifference {
    /// What differs, and the way out; `config` is the file of the model that is continued.
    pub fn told(&self, config: &Path) -> String {
        let ModelDifference { key, ours, theirs } = self;
        format!(
            "model.{key} = {ours} in the run, {theirs} in {}, whose weights are continued; take that model with [model] \
             config = \"{}\"",
            config.display(),
            config.display()
        )
    }
}

fn keys(model: &ModelConfig) -> serde_json::Map<String, serde_json::Value> {
    match serde_json::to_value(model) {
        Ok(serde_json::Value::Object(mut keys)) => {
            if model.attention() == Attention::Mla {
                // Published, and without meaning.
                keys.retain(|key, _| !["num_key_value_heads", "head_dim"].contains(&key.as_str()));
            }
            keys
        }
        _ => unreachable!("a model is a table of plain values"),
    }
}

/// The model in a folder that a person names: a run's export, or the folder itself.
pub fn model_folder(folder: &Path) -> PathBuf {
    let export = folder.join("export");
    if folder.join("journal.jsonl").exists() && export.exists() {
        export
    } else {
        folder.to_path_buf()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn smoke(assignments: &[&str]) -> RunConfig {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/smoke.toml");
        let assignments: Vec<String> = assignments.iter().map(|text| text.to_string()).collect();
        RunConfig::load(&path, &assignments).unwrap().config
    }

    fn positions(model: &ModelConfig) -> (usize, Option<(f64, usize)>) {
        let yarn = model.rope_scaling.as_ref();
        let yarn = yarn.map(|yarn| (yarn.factor, yarn.original_max_position_embeddings));
        (model.max_position_embeddings, yarn)
    }

    #[test]
    fn a_second_extension_multiplies_the_factor_over_the_same_original_length() {
        let config = smoke(&[]);
        let long = config.stages.iter().find_map(|stage| match &stage.kind {
            StageKind::LongContext(long) => Some(long.clone()),
            _ => None,
        });
        let (long, mut model) = (long.unwrap(), config.model.clone());
        (model.max_position_embeddings, model.rope_scaling) = (100, None);
        let once = model.lengthened(&LongContextStage { factor: 2.0, ..long.clone() });
        assert_eq!(positions(&once), (200, Some((2.0, 100))));
        let twice = once.lengthened(&LongContextStage { factor: 1.5, ..long });
        assert_eq!(positions(&twice), (300, Some((3.0, 100))));
    }

    #[test]
    fn every_key_that_changes_what_is_computed_must_be_that_of_the_weights() {
        let run = smoke(&[]).model;
        type Change = fn(&mut ModelConfig);
        let change: [(&str, Change); 5] = [
            ("num_experts_per_tok", |model| model.num_experts_per_tok = 1),
            ("rms_norm_eps", |model| model.rms_norm_eps = 1e-3),
            ("routed_scaling_factor", |model| model.routed_scaling_factor = 16.0),
            ("rope_theta", |model| model.rope_theta = 1e4),
            ("norm_topk_prob", |model| model.norm_topk_prob = true),
        ];
        for (key, change) in change {
            let mut saved = run.clone();
            change(&mut saved);
            let difference = run.continued_from(&saved).unwrap_err();
            assert_eq!(difference.key, key);
            let told = difference.told(Path::new("old/config.json"));
            assert!(
                told.ends_with("take that model with [model] config = \"old/config.json\""),
                "{told}"
            );
        }
        let mut trained_otherwise = run.clone();
        (trained_otherwise.aux_loss_alpha, trained_otherwise.initializer_range) = (0.5, 0.5);
        trained_otherwise.max_position_embeddings = 7;
        assert_eq!(run.continued_from(&trained_otherwise).unwrap().max_position_embeddings, 7);
    }

    #[test]
    fn a_stage_that_starts_from_a_folder_has_its_positions() {
        let folder = tempfile::tempdir().unwrap();
        let mut saved = smoke(&[]).model;
        saved.max_position_embeddings = 48;
        let text = serde_json::to_string(&saved).unwrap();
        std::fs::write(folder.path().join("config.json"), text).unwrap();
        let mut config = smoke(&[]);
        let long = config.stages.iter().position(|s| s.kind.name() == "long-context").unwrap();
        let StageKind::LongContext(stage) = &config.stages[long].kind else { unreachable!() };
        let factor = stage.factor;
        config.stages[long].start_from = Some(folder.path().to_str().unwrap().to_string());
        let model = |index| config.stage_model(Path::new("/"), index).unwrap();
        assert_eq!(positions(&model(0)), (config.model.max_position_embeddings, None));
        let longest = (48.0 * factor) as usize;
        assert_eq!(positions(&model(long)), (longest, Some((factor, 48))));
        assert_eq!(positions(&model(long + 1)), positions(&model(long)), "handed on");
    }
}
