//! Rules of GRPO stages: sampling that the ratio allows, and rewards that exist.

use super::data::Schema;
use super::document::ConfigError;
use super::dtype::Dtype;
use super::nearest::hint;
use super::stage::GrpoStage;
use super::validate_stage::StageRules;

/// Models that judge rollouts at most: what a plan of offloading moves is told apart by 32 bits, of which four are of the
/// policy's weights, its two moments and the reference.
const MOST_MODELS: usize = 28;

impl StageRules<'_> {
    /// The rules of GRPO and its reward.
    pub(super) fn grpo(&self, stage: &GrpoStage, reach: usize) -> Result<(), ConfigError> {
        self.set(&["data"], &stage.data, &[Schema::Prompts])?;
        let tokens = stage.max_new_tokens;
        self.above_zero(&[
            ("steps", stage.steps),
            ("prompts", stage.prompts as u64),
            ("max_new_tokens", tokens as u64),
            ("updates", stage.updates),
        ])?;
        self.require(stage.group_size >= 2, &["group_size"], |key| {
            format!(
                "{key} = {} must be at least 2: an advantage compares the rollouts of a group",
                stage.group_size
            )
        })?;
        self.new_tokens(&["max_new_tokens"], tokens, reach)?;
        self.moderate(&[
            ("steps", stage.steps),
            ("prompts", stage.prompts as u64),
            ("group_size", stage.group_size as u64),
            ("updates", stage.updates),
            ("max_new_tokens", tokens as u64),
        ])?;
        self.require(stage.temperature > 0.0, &["temperature"], |key| {
            format!(
                "{key} = {} must be above 0: greedy rollouts of a group are all equal",
                stage.temperature
            )
        })?;
        self.require(stage.top_p == 1.0, &["top_p"], |key| {
            format!(
                "{key} = {} is refused: truncated sampling biases the ratio; use 1",
                stage.top_p
            )
        })?;
        self.require(stage.top_k == 0, &["top_k"], |key| {
            format!(
                "{key} = {} is refused: truncated sampling biases the ratio; use 0",
                stage.top_k
            )
        })?;
        self.require(stage.clip > 0.0 && stage.clip < 1.0, &["clip"], |key| {
            format!("{key} = {} must lie between 0 and 1; the usual value is 0.2", stage.clip)
        })?;
        self.require(stage.kl_weight >= 0.0, &["kl_weight"], |key| {
            format!("{key} = {} must not be negative; 0 needs no reference model", stage.kl_weight)
        })?;
        self.require(stage.deviation_epsilon > 0.0, &["deviation_epsilon"], |key| {
            format!(
                "{key} = {} must be above 0, or a group of equal rewards divides by 0",
                stage.deviation_epsilon
            )
        })?;
        if let Some(after) = &stage.after {
            let ran =
                self.earlier.iter().any(|stage| stage.name == *after && stage.kind.makes_policy());
            self.require(ran, &["after"], |key| {
                format!("{key} = {after:?} is no policy stage that runs before this one; put it first or leave `after` out")
            })?;
        }
        self.require(stage.max_staleness <= 1, &["max_staleness"], |key| {
            format!(
                "{key} = {} is more than is kept ahead; use 1 to sample the next batch before the update, or 0",
                stage.max_staleness
            )
        })?;
        self.rollouts(stage)?;
        self.rewards(stage)?;
        self.optimizer(&stage.optimizer, Some(stage.steps.saturating_mul(stage.updates)))
    }

    /// Rollouts from other numbers than the trainer's.
    fn rollouts(&self, stage: &GrpoStage) -> Result<(), ConfigError> {
        let dtype = stage.rollout_dtype.name();
        if stage.rollout_dtype == Dtype::F32 {
            return self.require(stage.importance_limit.is_none(), &["importance_limit"], |key| {
                format!(
                    "{key} changes nothing: rollouts in f32 have no importance weights; leave it out, or name another \
                     rollout_dtype"
                )
            });
        }
        self.require(!self.rules.config.engine.exact, &["rollout_dtype"], |key| {
            format!(
                "{key} = \"{dtype}\" samples from other numbers than the trainer's, and engine.exact promises the same; set \
                 exact = false in [engine], or sample in f32"
            )
        })?;
        self.require(stage.updates == 1, &["updates"], |key| {
            format!(
                "{key} = {} does not go with rollout_dtype = \"{dtype}\": a second update needs the trainer's own \
                 log-probabilities of before the first, which nothing computes; use 1, or sample in f32",
                stage.updates
            )
        })?;
        let limit = stage.importance_limit.unwrap_or(1.0);
        self.require(limit >= 1.0, &["importance_limit"], |key| {
            format!("{key} = {limit} must be at least 1, the weight of a token on which sampler and trainer agree; 2 is usual")
        })
    }

    fn rewards(&self, stage: &GrpoStage) -> Result<(), ConfigError> {
        self.require(!stage.reward.is_empty(), &["reward"], |key| {
            format!("{key} is empty; add an entry such as {{ verifier = \"exact\", weight = 1.0 }}")
        })?;
        let models: Vec<&str> = self
            .earlier
            .iter()
            .filter(|stage| !stage.kind.makes_policy())
            .map(|stage| stage.name.as_str())
            .collect();
        for (index, entry) in stage.reward.iter().enumerate() {
            let at = index.to_string();
            self.require(entry.verifier.is_some() != entry.model.is_some(), &["reward", &at], |key| {
                format!("{key} takes exactly one of `verifier` (a program) and `model` (a reward-model stage)")
            })?;
            if let Some(model) = &entry.model {
                self.require(models.contains(&model.as_str()), &["reward", &at, "model"], |key| {
                    let known = match models.is_empty() {
                        true => "; no reward-model stage runs before this one".to_string(),
                        false => hint(model, &models),
                    };
                    format!("{key} = {model:?} is no earlier reward-model stage{known}")
                })?;
                self.require(entry.partial == 0.0, &["reward", &at, "partial"], |key| {
                    format!("{key} is for verifiers; a model's score has no partly right answer")
                })?;
            }
            self.require(
                (0.0..=1.0).contains(&entry.partial),
                &["reward", &at, "partial"],
                |key| format!("{key} = {} is a share; it must lie between 0 and 1", entry.partial),
            )?;
            let name = entry.name();
            let twice = stage.reward[..index].iter().any(|earlier| earlier.name() == name);
            self.require(!twice, &["reward", &at], |key| {
                format!("{key} is the second reward named {name:?}; join them into one with the sum of their weights")
            })?;
        }
        let judges = stage.reward.iter().filter(|entry| entry.model.is_some()).count();
        self.require(judges <= MOST_MODELS, &["reward"], |key| {
            format!("{key} names {judges} reward models; use at most {MOST_MODELS}")
        })?;
        self.require(stage.reward.iter().any(|entry| entry.weight != 0.0), &["reward"], |key| {
            format!("{key} has only weights of 0, so nothing would be learned; raise one")
        })
    }
}
