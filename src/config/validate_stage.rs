//! Rules of stages: their own keys, and what they take from the stages before them.
//!
//! Those of GRPO are in `validate_grpo`.

use super::data::Schema;
use super::document::ConfigError;
use super::nearest::listed;
use super::stage::{EvalConfig, LongContextStage, Metric, MixtureEntry, OptimizerConfig};
use super::validate::Rules;
use super::validate_model::MOST_POSITIONS;
use super::{Stage, StageKind, load_model, model_folder};

/// Checks every stage, in order.
pub fn stages(rules: &Rules<'_>) -> Result<(), ConfigError> {
    // The longest sequence of each stage's result; a long-context stage lengthens it.
    let mut reaches = Vec::new();
    for (index, stage) in rules.config.stages.iter().enumerate() {
        let checked = StageRules {
            rules,
            stage,
            index: index.to_string(),
            earlier: &rules.config.stages[..index],
        };
        let before = match checked.start()? {
            Some(from) => reaches[from],
            None => checked.first_reach(),
        };
        reaches.push(checked.kind(before)?);
        checked.evals(reaches[index])?;
        checked.gate()?;
    }
    Ok(())
}

/// Most tokens (or examples) of a stage.
const MOST_TOKENS: f64 = 1e15;

/// Schemas that next-token training and perplexity take.
const DOCUMENTS: [Schema; 3] = [Schema::Text, Schema::Messages, Schema::Prompts];

/// A stage with what runs before it.
pub(super) struct StageRules<'a> {
    pub(super) rules: &'a Rules<'a>,
    stage: &'a Stage,
    index: String,
    pub(super) earlier: &'a [Stage],
}

impl StageRules<'_> {
    pub(super) fn require(
        &self,
        holds: bool,
        path: &[&str],
        message: impl FnOnce(String) -> String,
    ) -> Result<(), ConfigError> {
        self.rules.require(holds, &self.path(path), || message(self.key(path)))
    }

    fn path<'b>(&'b self, path: &[&'b str]) -> Vec<&'b str> {
        ["stage", self.index.as_str()].into_iter().chain(path.iter().copied()).collect()
    }

    /// The key as messages name it.
    fn key(&self, path: &[&str]) -> String {
        format!("stage.{}.{}", self.stage.name, path.join("."))
    }

    pub(super) fn set(
        &self,
        path: &[&str],
        name: &str,
        schemas: &[Schema],
    ) -> Result<(), ConfigError> {
        self.rules.set(&self.path(path), &self.key(path), name, schemas).map(|_| ())
    }

    pub(super) fn above_zero(&self, counts: &[(&str, u64)]) -> Result<(), ConfigError> {
        for (name, count) in counts {
            self.require(*count > 0, &[name], |key| format!("{key} = 0 must be at least 1"))?;
        }
        Ok(())
    }

    /// Counts whose product can be counted with: far above any run, far below what overflows.
    pub(super) fn moderate(&self, counts: &[(&str, u64)]) -> Result<(), ConfigError> {
        let product: f64 = counts.iter().map(|(_, count)| (*count).max(1) as f64).product();
        // The largest is the one that was mistyped.
        let (name, count) =
            counts.iter().max_by_key(|(_, count)| *count).copied().unwrap_or(("", 0));
        self.require(product <= MOST_TOKENS, &[name], |key| {
            let names: Vec<&str> = counts.iter().map(|(name, _)| *name).collect();
            format!(
                "{key} = {count} is too many: {} together are {product:.1e}, more than the {MOST_TOKENS:.0e} that can be \
                 counted with",
                listed(&names)
            )
        })
    }

    /// The earlier stage that this one starts from, if it starts from a stage.
    fn start(&self) -> Result<Option<usize>, ConfigError> {
        let name = &self.stage.name;
        let Some(start) = &self.stage.start_from else {
            let last = self.earlier.iter().rposition(|stage| stage.kind.makes_policy());
            return Ok(last);
        };
        if let Some(index) = self.earlier.iter().position(|stage| stage.name == *start) {
            self.require(self.earlier[index].kind.makes_policy(), &["start_from"], |_| {
                format!("stage {name} starts from {start:?}, which is a reward model and no policy; name another stage")
            })?;
            return Ok(Some(index));
        }
        let later = self.rules.config.stages.iter().any(|stage| stage.name == *start);
        self.require(!later, &["start_from"], |_| {
            format!("stage {name} starts from {start:?}, which does not run before it; put that stage first")
        })?;
        self.require(self.rules.folder.join(start).is_dir(), &["start_from"], |_| {
            format!(
                "stage {name} starts from {start:?}, which is neither an earlier stage nor a folder"
            )
        })?;
        self.continued(start)?;
        Ok(None)
    }

    /// The model in a folder is a policy, and the run's model computes the same with its weights.
    fn continued(&self, start: &str) -> Result<(), ConfigError> {
        let name = &self.stage.name;
        let folder = model_folder(&self.rules.folder.join(start));
        self.require(!folder.join("reward.json").exists(), &["start_from"], |_| {
            format!("stage {name} starts from {start:?}, which is a reward model and no policy (it has a reward.json); name another folder")
        })?;
        // A folder without a model is refused where the files are looked at.
        let config = folder.join("config.json");
        if !config.is_file() {
            return Ok(());
        }
        let saved = load_model(&config)?;
        let difference = self.rules.config.model.continued_from(&saved).err();
        self.require(difference.is_none(), &["start_from"], |_| {
            difference.map_or_else(String::new, |difference| difference.told(&config))
        })
    }

    /// The longest sequence of a model that comes from a folder, if its config says so, or of the run's own.
    fn first_reach(&self) -> usize {
        let folder = self.stage.start_from.as_ref().map(|folder| self.rules.folder.join(folder));
        let model =
            folder.and_then(|folder| load_model(&model_folder(&folder).join("config.json")).ok());
        model.as_ref().unwrap_or(&self.rules.config.model).max_position_embeddings
    }

    /// The rules of the kind; returns the longest sequence of the stage's result.
    fn kind(&self, reach: usize) -> Result<usize, ConfigError> {
        match &self.stage.kind {
            StageKind::Pretrain(stage) => {
                self.mixture(&stage.data)?;
                self.above_zero(&[("steps", stage.steps), ("batch", stage.batch as u64)])?;
                self.sequence(stage.sequence, reach)?;
                let (batch, sequence) = (stage.batch as u64, stage.sequence as u64);
                self.moderate(&[("steps", stage.steps), ("batch", batch), ("sequence", sequence)])?;
                self.require(stage.batch_start <= stage.batch, &["batch_start"], |key| {
                    format!(
                        "{key} = {} exceeds batch = {}; a ramp grows to `batch`",
                        stage.batch_start, stage.batch
                    )
                })?;
                self.share("batch_ramp", stage.batch_ramp)?;
                self.balance(&stage.balance)?;
                self.capacity(stage.capacity_factor)?;
                self.optimizer(&stage.optimizer, Some(stage.steps))?;
            }
            StageKind::LongContext(stage) => return self.long_context(stage, reach),
            StageKind::Sft(stage) => {
                self.set(&["data"], &stage.data, &[Schema::Messages, Schema::Prompts])?;
                self.above_zero(&[("epochs", stage.epochs), ("batch", stage.batch as u64)])?;
                self.moderate(&[("epochs", stage.epochs), ("batch", stage.batch as u64)])?;
                self.balance(&stage.balance)?;
                self.optimizer(&stage.optimizer, None)?;
            }
            StageKind::RewardModel(stage) => {
                self.set(&["data"], &stage.data, &[Schema::Preferences])?;
                if let Some(set) = &stage.calibration {
                    self.set(&["calibration"], set, &[Schema::Preferences])?;
                }
                self.above_zero(&[("epochs", stage.epochs), ("batch", stage.batch as u64)])?;
                self.moderate(&[("epochs", stage.epochs), ("batch", stage.batch as u64)])?;
                self.optimizer(&stage.optimizer, None)?;
            }
            StageKind::Grpo(stage) => self.grpo(stage, reach)?,
        }
        Ok(reach)
    }

    fn long_context(&self, stage: &LongContextStage, reach: usize) -> Result<usize, ConfigError> {
        self.mixture(&stage.data)?;
        self.above_zero(&[("steps", stage.steps), ("batch", stage.batch as u64)])?;
        self.require(stage.factor >= 1.0, &["factor"], |key| {
            format!("{key} = {} must be at least 1: YaRN only lengthens", stage.factor)
        })?;
        self.require(stage.beta_fast > stage.beta_slow && stage.beta_slow > 0.0, &["beta_fast"], |key| {
            format!("{key} = {} must be above beta_slow = {}, and that above 0; the paper's are 32 and 1", stage.beta_fast, stage.beta_slow)
        })?;
        self.require(stage.mscale >= 0.0, &["mscale"], |key| {
            format!("{key} = {} must not be negative", stage.mscale)
        })?;
        let longer = (reach as f64 * stage.factor).round() as usize;
        self.require(longer <= MOST_POSITIONS, &["factor"], |key| {
            let factor = stage.factor;
            format!("{key} = {factor} makes {longer} positions of {reach}; use at most {MOST_POSITIONS} positions")
        })?;
        let (batch, sequence) = (stage.batch as u64, stage.sequence as u64);
        self.moderate(&[("steps", stage.steps), ("batch", batch), ("sequence", sequence)])?;
        self.require(stage.sequence <= longer, &["sequence"], |key| {
            let sequence = stage.sequence;
            format!("{key} = {sequence} exceeds {longer}, {reach} positions times factor = {}; raise factor", stage.factor)
        })?;
        self.require(stage.sequence >= 2, &["sequence"], |key| {
            format!("{key} = {} must be at least 2", stage.sequence)
        })?;
        self.balance(&stage.balance)?;
        self.capacity(stage.capacity_factor)?;
        self.optimizer(&stage.optimizer, Some(stage.steps))?;
        Ok(longer)
    }

    fn mixture(&self, entries: &[MixtureEntry]) -> Result<(), ConfigError> {
        self.require(!entries.is_empty(), &["data"], |key| {
            format!("{key} is empty; add an entry such as {{ set = \"NAME\", share = 1.0 }}")
        })?;
        for (index, entry) in entries.iter().enumerate() {
            let at = index.to_string();
            self.set(&["data", &at, "set"], &entry.set, &DOCUMENTS)?;
            self.require(entry.share > 0.0, &["data", &at, "share"], |key| {
                format!(
                    "{key} = {} must be above 0; to leave a set out, remove its entry",
                    entry.share
                )
            })?;
        }
        Ok(())
    }

    fn sequence(&self, sequence: usize, reach: usize) -> Result<(), ConfigError> {
        self.require(sequence >= 2, &["sequence"], |key| {
            format!("{key} = {sequence} must be at least 2")
        })?;
        self.require(sequence <= reach, &["sequence"], |key| {
            format!("{key} = {sequence} exceeds the model's {reach} positions; lower it or raise model.max_position_embeddings")
        })
    }

    pub(super) fn new_tokens(
        &self,
        path: &[&str],
        tokens: usize,
        reach: usize,
    ) -> Result<(), ConfigError> {
        self.require(tokens < reach, path, |key| {
            format!("{key} = {tokens} leaves no room for a prompt in the model's {reach} positions; lower it")
        })
    }

    fn share(&self, name: &str, share: f64) -> Result<(), ConfigError> {
        self.require((0.0..=1.0).contains(&share), &[name], |key| {
            format!("{key} = {share} is a share; it must lie between 0 and 1")
        })
    }

    pub(super) fn optimizer(
        &self,
        optimizer: &OptimizerConfig,
        steps: Option<u64>,
    ) -> Result<(), ConfigError> {
        let path = |name| ["optimizer", name];
        let above_zero =
            [("learning_rate", optimizer.learning_rate), ("epsilon", optimizer.epsilon)];
        for (name, value) in above_zero {
            self.require(value > 0.0, &path(name), |key| {
                format!("{key} = {value} must be above 0")
            })?;
        }
        for (name, value) in [("beta1", optimizer.beta1), ("beta2", optimizer.beta2)] {
            self.require((0.0..1.0).contains(&value), &path(name), |key| {
                format!("{key} = {value} must be at least 0 and below 1")
            })?;
        }
        for (name, value) in [("weight_decay", optimizer.weight_decay), ("clip", optimizer.clip)] {
            self.require(value >= 0.0, &path(name), |key| {
                format!("{key} = {value} must not be negative; 0 is none")
            })?;
        }
        self.require((0.0..=1.0).contains(&optimizer.final_share), &path("final_share"), |key| {
            format!(
                "{key} = {} is a share of the peak; it must lie between 0 and 1",
                optimizer.final_share
            )
        })?;
        self.require(
            optimizer.decay_factor > 0.0 && optimizer.decay_factor <= 1.0,
            &path("decay_factor"),
            |key| format!("{key} = {} must be above 0 and at most 1", optimizer.decay_factor),
        )?;
        let rising = optimizer.decay_at.is_sorted_by(|a, b| a < b);
        let shares = optimizer.decay_at.iter().all(|share| (0.0..=1.0).contains(share));
        self.require(rising && shares, &path("decay_at"), |key| {
            format!(
                "{key} = {:?} must be rising shares between 0 and 1, as in [0.6, 0.9]",
                optimizer.decay_at
            )
        })?;
        self.require(
            steps.is_none_or(|steps| optimizer.warmup_steps <= steps),
            &path("warmup_steps"),
            |key| {
                let steps = steps.unwrap_or_default();
                format!(
                    "{key} = {} exceeds the stage's {steps} updates; lower it",
                    optimizer.warmup_steps
                )
            },
        )
    }

    fn evals(&self, reach: usize) -> Result<(), ConfigError> {
        for (index, eval) in self.stage.eval.iter().enumerate() {
            let at = index.to_string();
            let twice = self.stage.eval[..index].iter().any(|earlier| earlier.name == eval.name);
            self.require(!twice && !eval.name.is_empty(), &["eval", &at, "name"], |key| {
                format!(
                    "{key} = {:?} must be a name that no other eval of the stage has",
                    eval.name
                )
            })?;
            self.measure(eval, &at, reach)?;
        }
        Ok(())
    }

    fn measure(&self, eval: &EvalConfig, at: &str, reach: usize) -> Result<(), ConfigError> {
        let policy = self.stage.kind.makes_policy();
        self.require(eval.verifier.is_some() != eval.metric.is_some(), &["eval", at], |key| {
            format!("{key} takes exactly one of `verifier` (replies to prompts) and `metric` (perplexity or accuracy)")
        })?;
        let schemas: &[Schema] = match eval.metric {
            None => &[Schema::Prompts],
            Some(Metric::Perplexity) => &DOCUMENTS,
            Some(Metric::Accuracy) => &[Schema::Preferences],
        };
        let fits = (eval.metric == Some(Metric::Accuracy)) != policy;
        self.require(fits, &["eval", at], |key| match policy {
            true => format!("{key} measures accuracy, which only a reward-model stage has; use a verifier or perplexity"),
            false => format!("{key} needs a policy, and a reward model answers nothing; use metric = \"accuracy\""),
        })?;
        self.set(&["eval", at, "data"], &eval.data, schemas)?;
        self.require(!eval.as_rate || eval.verifier.is_some(), &["eval", at, "as_rate"], |key| {
            format!("{key} is for verifiers; leave it out with a metric")
        })?;
        if eval.verifier.is_some() {
            self.require(eval.max_new_tokens > 0, &["eval", at, "max_new_tokens"], |key| {
                format!("{key} = 0 must be at least 1")
            })?;
            self.new_tokens(&["eval", at, "max_new_tokens"], eval.max_new_tokens, reach)?;
        }
        Ok(())
    }

    fn gate(&self) -> Result<(), ConfigError> {
        let Some(gate) = &self.stage.gate else { return Ok(()) };
        let names: Vec<&str> = self.stage.eval.iter().map(|eval| eval.name.as_str()).collect();
        self.require(names.contains(&gate.eval.as_str()), &["gate", "eval"], |key| {
            format!("{key} = {:?} is no eval of the stage; it has {}", gate.eval, listed(&names))
        })?;
        self.require(gate.minimum.is_some() || gate.maximum.is_some(), &["gate"], |key| {
            format!("{key} has neither `minimum` nor `maximum`, so it stops nothing; add one")
        })?;
        let (least, most) = (gate.minimum.unwrap_or(f64::MIN), gate.maximum.unwrap_or(f64::MAX));
        self.require(least <= most, &["gate", "minimum"], |key| {
            format!("{key} = {least} exceeds maximum = {most}; nothing can pass")
        })
    }
}
