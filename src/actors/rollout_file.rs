//! `rollouts/<stage>.jsonl`: every sampled reply with its reward and advantage, one line each.
//!
//! Invariants:
//!   * a step stands in it once, also if it is brought again because the Director died before the
//!     journal had it; a resumed run first drops the lines of steps that the journal does not have,
//!     for they are computed again
//!   * `append` returns when the lines are on the disk: the step's line in the journal comes after
//!     them, and a power cut must not leave it alone

use crate::rl::rollout::ScoredGroup;
use anyhow::{Context, Result};
use serde_json::{Value, json};
use std::fs::{File, OpenOptions};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

/// The rollouts of one stage.
pub struct RolloutFile {
    stage: String,
    path: PathBuf,
    file: File,
    /// The last step that is in it, or that need not be.
    last: u64,
}

impl RolloutFile {
    /// Opens a stage's file in the run's folder and drops what comes after step `last`.
    pub fn open(run: &Path, stage: &str, last: u64) -> Result<RolloutFile> {
        let folder = run.join("rollouts");
        std::fs::create_dir_all(&folder)
            .with_context(|| format!("failed to create {}", folder.display()))?;
        let path = folder.join(format!("{stage}.jsonl"));
        if path.exists() {
            trim(&path, last)?;
        }
        let file = OpenOptions::new().create(true).append(true).open(&path);
        let file = file.with_context(|| format!("failed to open {}", path.display()))?;
        // The file's name and its folder's are to survive what its content survives.
        for parent in [folder.as_path(), run] {
            File::open(parent)
                .and_then(|parent| parent.sync_all())
                .with_context(|| format!("failed to sync {}", parent.display()))?;
        }
        Ok(RolloutFile { stage: stage.to_string(), path, file, last })
    }

    /// The stage's name.
    pub fn stage(&self) -> &str {
        &self.stage
    }

    /// Appends a step's rollouts unless it has them; they are on the disk when this returns.
    pub fn append(&mut self, step: u64, groups: &[ScoredGroup]) -> Result<()> {
        if step <= self.last {
            return Ok(());
        }
        let mut lines = Vec::new();
        for scored in groups {
            for (index, rollout) in scored.group.rollouts.iter().enumerate() {
                let line = json!({
                    "step": step,
                    "slot": scored.group.slot,
                    "sample": rollout.sample,
                    "prompt": scored.group.prompt.text,
                    "answer": scored.group.prompt.answer,
                    "text": rollout.text,
                    "tokens": rollout.tokens.len(),
                    "stop": rollout.stop,
                    "components": scored.components[index],
                    "reward": scored.rewards[index],
                    "advantage": scored.advantages[index],
                });
                writeln!(lines, "{line}").expect("memory takes every byte");
            }
        }
        self.file
            .write_all(&lines)
            .and_then(|()| self.file.sync_data())
            .with_context(|| format!("failed to append to {}", self.path.display()))?;
        self.last = step;
        Ok(())
    }
}

/// Keeps the whole lines of steps up to `last`.
fn trim(path: &Path, last: u64) -> Result<()> {
    let text = std::fs::read(path).with_context(|| format!("failed to read {}", path.display()))?;
    let aside = path.with_extension("tmp");
    let write = || -> std::io::Result<()> {
        let mut kept = BufWriter::new(File::create(&aside)?);
        for line in text.split_inclusive(|byte| *byte == b'\n') {
            let step =
                serde_json::from_slice::<Value>(line).ok().and_then(|line| line["step"].as_u64());
            if step.is_some_and(|step| step <= last) && line.ends_with(b"\n") {
                kept.write_all(line)?;
            }
        }
        kept.into_inner()?.sync_all()?;
        std::fs::rename(&aside, path)
    };
    write().with_context(|| format!("failed to trim {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::example::Prompt;
    use crate::rl::rollout::{Group, Rollout, Stop};

    fn group(text: &str) -> ScoredGroup {
        let prompt = Prompt { index: 3, text: "p".to_string(), tokens: vec![1], answer: None };
        let rollout = Rollout {
            sample: 0,
            tokens: vec![5],
            logprobs: vec![-1.0],
            stop: Stop::Eos,
            text: text.to_string(),
        };
        ScoredGroup {
            group: Group {
                slot: 0,
                prompt: prompt.into(),
                policy_version: 1,
                rollouts: [rollout].into(),
            },
            components: vec![vec![Some(1.0)]],
            rewards: vec![1.0],
            advantages: vec![0.0],
            reference: Vec::new(),
        }
    }

    #[test]
    fn a_resumed_run_drops_steps_that_are_computed_again_and_a_torn_line() {
        let folder = tempfile::tempdir().unwrap();
        let mut file = RolloutFile::open(folder.path(), "align", 0).unwrap();
        for step in 1..=3 {
            file.append(step, &[group(&format!("reply {step}"))]).unwrap();
        }
        file.append(3, &[group("brought again")]).unwrap();
        let path = folder.path().join("rollouts/align.jsonl");
        let mut bytes = std::fs::read(&path).unwrap();
        bytes.extend(b"{\"step\":1");
        std::fs::write(&path, &bytes).unwrap();
        let mut file = RolloutFile::open(folder.path(), "align", 2).unwrap();
        file.append(3, &[group("again")]).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        let steps: Vec<u64> = text
            .lines()
            .map(|line| serde_json::from_str::<Value>(line).unwrap()["step"].as_u64().unwrap())
            .collect();
        assert_eq!(steps, [1, 2, 3]);
        assert!(text.contains("again") && !text.contains("reply 3"), "{text}");
    }
}
