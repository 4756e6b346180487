//! Steps, tokens, seconds and disk of a run.
//!
//! What is assumed, and told beside the figures:
//!   * an example is as long as a pretraining row of the run (256 tokens without one)
//!   * a rollout uses half of `max_new_tokens`
//!   * trained, scored and sampled tokens take the share of the products that were measured on this machine that
//!     [`efficiency`] tells; evaluations are left out

use crate::config::stage::GrpoStage;
use crate::config::{ModelConfig, Offload, RunConfig, Stage, StageKind};
use crate::model::{flops_per_token, forward_flops_per_token, parameters};
use serde::Serialize;
use std::collections::BTreeMap;

/// Shares of the measured f32 products that a model's useful FLOPs are taken to make use of.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Efficiency {
    /// In training and scoring.
    pub training: f64,
    /// In sampling, many sequences at once.
    pub sampling: f64,
}

/// One line for all models, drawn through what was measured (docs/performance.md, "What a step made of the machine"): larger
/// products are nearer to their peak, by as much for each doubling of the active parameters from one to 64 million.
pub fn efficiency(model: &ModelConfig) -> Efficiency {
    let millions = parameters(model).active_without_input_embedding as f64 / 1e6;
    let way = millions.log2().clamp(0.0, 6.0) / 6.0;
    Efficiency { training: 0.40 + 0.25 * way, sampling: 0.25 + 0.35 * way }
}

/// Lines of data sets, by name.
pub type Lines = BTreeMap<String, u64>;

/// What one stage takes. What depends on a data set whose length is not known is absent.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StageEstimate {
    /// The stage's name.
    pub name: String,
    /// Its kind.
    pub kind: &'static str,
    /// Optimizer steps.
    pub steps: Option<u64>,
    /// Tokens that are trained on.
    pub trained_tokens: Option<u64>,
    /// Tokens that are sampled.
    pub sampled_tokens: u64,
    /// Tokens that other models score.
    pub scored_tokens: u64,
    /// Seconds on this many threads.
    pub seconds: Option<f64>,
}

/// What a run takes.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Estimate {
    /// Of every stage.
    pub stages: Vec<StageEstimate>,
    /// Tokens that are trained on in all stages whose data is known.
    pub tokens: u64,
    /// Seconds of all stages; absent if a stage's are.
    pub seconds: Option<f64>,
    /// Threads that the seconds are for.
    pub threads: usize,
    /// What the run's model is taken to make of them.
    pub efficiency: Efficiency,
    /// f32 operations a second that they were measured at together; another machine has others, so that they are told as
    /// text alone.
    #[serde(skip)]
    pub products: f64,
    /// Most bytes that the run folder holds.
    pub disk_bytes: u64,
}

/// Estimates a run on `threads` threads that do `products` f32 operations a second together, with the models of its stages and the lines of the sets that were counted.
pub fn estimate(
    config: &RunConfig,
    models: &[ModelConfig],
    counted: &Lines,
    threads: usize,
    products: f64,
) -> Estimate {
    let mut lines = generated_lines(config);
    lines.extend(counted.iter().map(|(name, count)| (name.clone(), *count)));
    let stages: Vec<StageEstimate> = config
        .stages
        .iter()
        .zip(models)
        .map(|(each, model)| stage(config, each, model, &lines, products))
        .collect();
    Estimate {
        tokens: stages.iter().filter_map(|stage| stage.trained_tokens).sum(),
        seconds: stages.iter().map(|stage| stage.seconds).sum(),
        threads,
        efficiency: efficiency(&config.model),
        products,
        disk_bytes: disk_bytes(config, models, &stages),
        stages,
    }
}

/// The sequence length whose FLOPs are told for a run: pretraining's, else the longest of its stages'.
pub fn sequence(config: &RunConfig) -> usize {
    let of = |stage: &Stage| match &stage.kind {
        StageKind::Pretrain(stage) => Some(stage.sequence),
        StageKind::LongContext(stage) => Some(stage.sequence),
        _ => None,
    };
    config.stages.iter().find_map(of).unwrap_or_else(|| example_tokens(config))
}

/// Tokens that an example is taken to have.
pub fn example_tokens(config: &RunConfig) -> usize {
    let rows = config.stages.iter().find_map(|stage| match &stage.kind {
        StageKind::Pretrain(stage) => Some(stage.sequence),
        _ => None,
    });
    rows.unwrap_or(config.model.max_position_embeddings.min(256))
}

/// Lines of the sets that the generated tasks will write.
pub fn generated_lines(config: &RunConfig) -> Lines {
    let (machine, needle) = (config.data.word_machine.as_ref(), config.data.needle.as_ref());
    let count = |file: &str| match file {
        "pages.jsonl" => machine.map(|task| task.pages),
        "conversations.jsonl" => machine.map(|task| task.conversations),
        "helpful.jsonl" | "safety.jsonl" => machine.map(|task| task.pairs),
        "helpful-held-out.jsonl" | "safety-held-out.jsonl" => {
            machine.map(|task| task.held_out_pairs)
        }
        "helpful-calibration.jsonl" | "safety-calibration.jsonl" => {
            machine.map(|task| task.held_out_pairs)
        }
        "held-out.jsonl" => machine.map(|task| task.held_out),
        "prompts.jsonl" | "prompts-mixed.jsonl" => machine.map(|task| task.prompts),
        "needle-pages.jsonl" => needle.map(|task| task.pages),
        "needle-long-pages.jsonl" => needle.map(|task| task.long_pages),
        "needle.jsonl" | "needle-long.jsonl" => needle.map(|task| task.held_out),
        _ => None,
    };
    let sets = config.data.sets.iter().filter_map(|(name, set)| {
        let lines = set.file.strip_prefix("run:").and_then(count)? as u64;
        let kept = set
            .split
            .map_or(lines, |split| lines * (split.to - split.from) as u64 / split.of as u64);
        Some((name.clone(), kept))
    });
    sets.collect()
}

fn stage(
    config: &RunConfig,
    stage: &Stage,
    model: &ModelConfig,
    lines: &Lines,
    products: f64,
) -> StageEstimate {
    let example = example_tokens(config) as u64;
    let passes = |set: &str, epochs: u64, batch: usize, tokens: u64| {
        let examples = lines.get(set).map(|lines| lines * epochs);
        (
            examples.map(|examples| examples.div_ceil(batch as u64)),
            examples.map(|examples| examples * tokens),
        )
    };
    let (mut sampled_tokens, mut scored_tokens) = (0, 0);
    let (steps, trained_tokens) = match &stage.kind {
        StageKind::Pretrain(stage) => {
            let ramp =
                stage.batch_ramp * stage.steps as f64 * f64::from(u8::from(stage.batch_start > 0));
            let missing = ramp * (stage.batch - stage.batch_start.min(stage.batch)) as f64 / 2.0;
            let rows = stage.steps as f64 * stage.batch as f64 - missing;
            (Some(stage.steps), Some(rows as u64 * stage.sequence as u64))
        }
        StageKind::LongContext(stage) => {
            (Some(stage.steps), Some(stage.steps * (stage.batch * stage.sequence) as u64))
        }
        StageKind::Sft(stage) => passes(&stage.data, stage.epochs, stage.batch, example),
        StageKind::RewardModel(stage) => {
            passes(&stage.data, stage.epochs, stage.batch, 2 * example)
        }
        StageKind::Grpo(stage) => {
            let each = reply_tokens(stage) + prompt_tokens(config, stage);
            sampled_tokens = rollouts(stage) * reply_tokens(stage);
            let models = stage.reward.iter().filter(|entry| entry.model.is_some()).count();
            scored_tokens =
                rollouts(stage) * each * (models as u64 + u64::from(stage.kl_weight > 0.0));
            (Some(stage.steps * stage.updates), Some(rollouts(stage) * each * stage.updates))
        }
    };
    let length = sequence(config);
    let forward = forward_flops_per_token(model, length);
    let Efficiency { training, sampling } = efficiency(model);
    let seconds = trained_tokens.map(|trained| {
        let trained = trained as f64 * flops_per_token(model, length);
        let scored = scored_tokens as f64 * forward;
        let sampled = sampled_tokens as f64 * forward;
        ((trained + scored) / training + sampled / sampling) / products.max(1.0)
    });
    StageEstimate {
        name: stage.name.clone(),
        kind: stage.kind.name(),
        steps,
        trained_tokens,
        sampled_tokens,
        scored_tokens,
        seconds,
    }
}

fn rollouts(stage: &GrpoStage) -> u64 {
    stage.steps * (stage.prompts * stage.group_size) as u64
}

/// Tokens that a rollout is taken to have.
pub(super) fn reply_tokens(stage: &GrpoStage) -> u64 {
    (stage.max_new_tokens as u64).div_ceil(2)
}

/// A quarter of an example is its prompt.
pub(super) fn prompt_tokens(config: &RunConfig, stage: &GrpoStage) -> u64 {
    let room = stage_room(config, stage);
    (example_tokens(config) as u64 / 4).clamp(1, room.max(1))
}

fn stage_room(config: &RunConfig, stage: &GrpoStage) -> u64 {
    config.model.max_position_embeddings.saturating_sub(stage.max_new_tokens) as u64
}

/// Checkpoints with moments (one more than is kept while one is written), artefacts, the export beside the one that it
/// replaces, offloaded models, rollouts, generated data and the journal. Each model has a tokenizer beside it, and each
/// file is rounded up to blocks.
fn disk_bytes(config: &RunConfig, models: &[ModelConfig], stages: &[StageEstimate]) -> u64 {
    let count = parameters(&config.model);
    // A reward model has a row more.
    let weights = 4 * (count.total + config.model.hidden_size as u64);
    let beside = model_folder_bytes(config.model.vocab_size as u64, count.tensors);
    let checkpoints = (config.checkpoint.keep as u64 + 1) * (3 * weights + beside);
    // Beside those of the stages: initial weights, and two exports.
    let artefacts = (stages.len() as u64 + 3) * (weights + beside);
    let offloads = |what| config.engine.offloads(what);
    let others = config.stages.iter().map(|stage| match &stage.kind {
        StageKind::Grpo(stage) => {
            let models = stage.reward.iter().filter(|entry| entry.model.is_some()).count() as u64;
            u64::from(offloads(Offload::Reference))
                + models * u64::from(offloads(Offload::RewardModels))
        }
        _ => 0,
    });
    let spilled =
        weights * (others.max().unwrap_or(0) + 2 * u64::from(offloads(Offload::Optimizer)));
    let kept_rollouts: u64 = config
        .stages
        .iter()
        .map(|stage| match &stage.kind {
            StageKind::Grpo(stage) => rollouts(stage) * (600 + 8 * reply_tokens(stage)),
            _ => 0,
        })
        .sum();
    let steps: u64 = stages.iter().filter_map(|stage| stage.steps).sum();
    let generated = generated_lines(config).values().sum::<u64>() * GENERATED_LINE;
    let longest = models.iter().map(|model| model.max_position_embeddings as u64).max();
    // Beside the files of models: config, record, board, plots, and the replies that evals show.
    let few = 64 * BLOCK + 64 * longest.unwrap_or(0);
    checkpoints + artefacts + spilled + kept_rollouts + steps * JOURNAL_STEP + generated + few
}

/// Bytes of a step's lines in the journal.
const JOURNAL_STEP: u64 = 3072;
/// Bytes of a generated example, with what the other files of its kind hold.
const GENERATED_LINE: u64 = 2048;
/// Files are rounded up to it.
const BLOCK: u64 = 4096;

/// What a model's folder holds beside numbers: tokenizer (a token and its merge take up to 100 bytes), headers of up to
/// 200 bytes a tensor (of weights and both moments), and a block for the end of each of its files.
fn model_folder_bytes(vocabulary: u64, tensors: u64) -> u64 {
    100 * vocabulary + 3 * 200 * tensors + 12 * BLOCK
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::model::parameters::tests::preset;
    use std::path::Path;

    pub fn quickstart(assignments: &[&str]) -> RunConfig {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
        let assignments: Vec<String> = assignments.iter().map(|text| text.to_string()).collect();
        RunConfig::load(&folder.join("configs/quickstart.toml"), &assignments).unwrap().config
    }

    pub fn models(config: &RunConfig) -> Vec<ModelConfig> {
        vec![config.model.clone(); config.stages.len()]
    }

    fn planned(assignments: &[&str], counted: &Lines, threads: usize) -> Estimate {
        let config = quickstart(assignments);
        estimate(&config, &models(&config), counted, threads, 1e11 * threads as f64)
    }

    fn of<'a>(estimate: &'a Estimate, name: &str) -> &'a StageEstimate {
        estimate.stages.iter().find(|stage| stage.name == name).unwrap()
    }

    #[test]
    fn tokens_of_pretraining_are_steps_times_rows_times_length() {
        let run = planned(&["stage.base.steps=1600"], &Lines::new(), 2);
        assert_eq!(of(&run, "base").trained_tokens, Some(1600 * 8 * 64));
        let ramp =
            ["stage.base.steps=1600", "stage.base.batch_start=4", "stage.base.batch_ramp=0.5"];
        let run = planned(&ramp, &Lines::new(), 2);
        assert_eq!(of(&run, "base").trained_tokens, Some((1600 * 8 - 800 * 4 / 2) * 64));
    }

    #[test]
    fn steps_of_epochs_follow_the_lines_that_were_counted() {
        let counted = Lines::from([("conversations".to_string(), 100)]);
        let run = planned(&["stage.sft.batch=32", "stage.sft.epochs=2"], &counted, 2);
        assert_eq!(of(&run, "sft").steps, Some(7));
        assert_eq!(of(&run, "sft").trained_tokens, Some(200 * 64));
    }

    #[test]
    fn a_trained_token_takes_its_flops_at_the_share_of_the_measured_products() {
        let run = planned(&[], &Lines::new(), 2);
        let base = of(&run, "base");
        let model = quickstart(&[]).model;
        let flops = base.trained_tokens.unwrap() as f64 * flops_per_token(&model, 64);
        let seconds = flops / (efficiency(&model).training * 2e11);
        assert!((base.seconds.unwrap() / seconds - 1.0).abs() < 1e-12, "{:?}", base.seconds);
    }

    #[test]
    fn larger_models_are_taken_to_be_more_efficient_within_a_tenth_of_what_was_measured() {
        // The table of docs/performance.md.
        let measured = [
            ("quickstart", 0.46, 0.34),
            ("tiny", 0.47, 0.31),
            ("gsm8k", 0.55, 0.40),
            ("small-30m", 0.60, 0.51),
            ("small-64m", 0.63, 0.60),
        ];
        let mut before = Efficiency { training: 0.0, sampling: 0.0 };
        for (name, training, sampling) in measured {
            let found = efficiency(&preset(&format!("{name}.json")));
            assert!((found.training - training).abs() < 0.1, "{name}: {found:?}");
            assert!((found.sampling - sampling).abs() < 0.1, "{name}: {found:?}");
            let rises = found.training >= before.training && found.sampling >= before.sampling;
            assert!(rises && found.training < 0.7, "{name}: {found:?}");
            before = found;
        }
        let largest = efficiency(&preset("deepseek-v2.json"));
        assert_eq!(largest, Efficiency { training: 0.65, sampling: 0.60 });
    }

    #[test]
    fn twice_the_threads_take_half_the_seconds() {
        let (one, two) = (planned(&[], &Lines::new(), 1), planned(&[], &Lines::new(), 2));
        assert!((one.seconds.unwrap() - 2.0 * two.seconds.unwrap()).abs() < 1e-9);
        assert!(two.seconds.unwrap() < 700.0, "{:?}", two.seconds);
    }
}
