//! Every example that a stage will read, tried before anything is trained.
//!
//! Knows no step: it encodes what a stage's data and evals name, and keeps nothing of it.

use crate::config::stage::{EvalConfig, MixtureEntry};
use crate::config::{Schema, Stage, StageKind};
use crate::data::Loader;
use crate::data::lines::fault_at;
use crate::rl::verifiers::check_answer;
use anyhow::Result;

use super::reader::{Measured, measured};

/// Encodes every example of the sets of `stage` that `wanted` names; the first that cannot be used ends it with file
/// and line.
pub fn check_stage_data(
    loader: &Loader,
    stage: &Stage,
    wanted: &dyn Fn(&str) -> bool,
) -> Result<()> {
    match &stage.kind {
        StageKind::Pretrain(s) => mixture(loader, &s.data, wanted)?,
        StageKind::LongContext(s) => mixture(loader, &s.data, wanted)?,
        StageKind::Sft(s) if wanted(&s.data) => drop(loader.conversations(&s.data)?),
        StageKind::RewardModel(s) => {
            for set in std::iter::once(&s.data).chain(&s.calibration).filter(|set| wanted(set)) {
                loader.pairs(set, 0)?;
            }
        }
        StageKind::Grpo(s) if wanted(&s.data) => drop(loader.prompts(&s.data, 0)?),
        StageKind::Sft(_) | StageKind::Grpo(_) => {}
    }
    stage.eval.iter().filter(|eval| wanted(&eval.data)).try_for_each(|eval| measure(loader, eval))
}

/// Conversations must fit; a text of any length is cut into rows.
fn mixture(loader: &Loader, entries: &[MixtureEntry], wanted: &dyn Fn(&str) -> bool) -> Result<()> {
    for entry in entries.iter().filter(|entry| wanted(&entry.set)) {
        if loader.sources.set(&entry.set)?.1.schema != Schema::Text {
            loader.documents(&entry.set)?.try_for_each(|document| document.map(drop))?;
        }
    }
    Ok(())
}

fn measure(loader: &Loader, eval: &EvalConfig) -> Result<()> {
    match measured(eval)? {
        Measured::Texts => drop(loader.texts(&eval.data, eval.limit)?),
        Measured::Pairs => drop(loader.pairs(&eval.data, eval.limit)?),
        Measured::Replies => {
            let path = loader.sources.set(&eval.data)?.0;
            let prompts = loader.prompts(&eval.data, eval.limit)?;
            let Some(verifier) = eval.verifier else { return Ok(()) };
            for prompt in prompts {
                let Some(answer) = &prompt.answer else { continue };
                check_answer(verifier, answer)
                    .map_err(|reason| fault_at(&path, prompt.index, &reason))?;
            }
        }
    }
    Ok(())
}
