//! What to type next: the command that goes on with a run, and the one that measures its model.
//!
//! The first is kept in `run.json` in the words that were typed, the second is made from the run's own `config.toml`.
//! Both are there to be copied: quoted for a shell, and never wrapped or cut.

use crate::config::data::FieldMap;
use crate::config::{DataConfig, RunConfig, Schema};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Name of the record of whose folder it is; see `cli::run_folder`, which writes it.
pub const RECORD_FILE: &str = "run.json";

/// A command line and the folder in which it was typed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TypedCommand {
    /// Where its relative paths start.
    pub directory: PathBuf,
    /// Program and arguments.
    pub words: Vec<String>,
}

impl TypedCommand {
    /// The command as it is typed in `here`.
    pub fn shown_in(&self, here: &Path) -> String {
        let command: Vec<String> = self.words.iter().map(|word| quoted(word)).collect();
        match self.directory == here {
            true => command.join(" "),
            false => {
                let directory = quoted(&self.directory.to_string_lossy());
                format!("cd {directory} && {}", command.join(" "))
            }
        }
    }
}

/// The command that goes on with the run in a folder, if its record has one.
pub fn resume_command(run_dir: &Path) -> Option<String> {
    #[derive(Deserialize)]
    struct Record {
        resume: Option<TypedCommand>,
    }
    let bytes = std::fs::read(run_dir.join(RECORD_FILE)).ok()?;
    let record: Record = serde_json::from_slice(&bytes).ok()?;
    Some(record.resume?.shown_in(&std::env::current_dir().unwrap_or_default()))
}

/// The command that measures the model in `export` as the last stage of the run did.
pub fn eval_command(run_dir: &Path, export: &str) -> String {
    let loaded = RunConfig::load(&run_dir.join("config.toml"), &[]).ok();
    let measure = loaded.as_ref().and_then(|loaded| {
        let policies = loaded.config.stages.iter().rev().filter(|stage| stage.kind.makes_policy());
        let eval = policies.flat_map(|stage| &stage.eval).find(|eval| eval.verifier.is_some())?;
        let (file, chat) = data(&loaded.config.data, &eval.data, run_dir)?;
        let verifier = eval.verifier?.name();
        Some(format!("--data {file} --verifier {verifier}{}", if chat { " --chat" } else { "" }))
    });
    let measure = measure.unwrap_or_else(|| "--data FILE.jsonl --metric perplexity".to_string());
    format!("rehearsal eval {} {measure}", quoted(export))
}

/// The file of a set as `eval` can read it, and whether its prompts are wrapped in the chat template. A set that is a
/// part of a file, or has other names for its fields, is no file for `eval`.
fn data(data: &DataConfig, name: &str, run_dir: &Path) -> Option<(String, bool)> {
    let set = data.sets.get(name).filter(|set| set.schema == Schema::Prompts)?;
    let whole = set.split.is_none() && set.fields == FieldMap::default();
    let file = match set.file.strip_prefix("run:") {
        _ if !whole => "FILE.jsonl".to_string(),
        Some(name) => quoted(&run_dir.join("data").join(name).to_string_lossy()),
        None => quoted(&set.file),
    };
    Some((file, set.chat))
}

/// A word as a shell takes it.
fn quoted(word: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,@%+".contains(c);
    match !word.is_empty() && word.chars().all(is_plain) {
        true => word.to_string(),
        false => format!("'{}'", word.replace('\'', "'\\''")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_come_out_of_a_shell_as_they_went_in() {
        let words =
            ["plain/path.toml", "", "a b", "it's", "$(rm x)", "stage.x.decay_at=[0.5, 0.9]", "ü"];
        let command = TypedCommand {
            directory: PathBuf::from("/tmp"),
            words: words.map(str::to_string).to_vec(),
        };
        let shown = command.shown_in(Path::new("/tmp"));
        assert!(shown.starts_with("plain/path.toml '' 'a b' 'it'\\''s' "), "{shown}");
        let script = format!("for word in {shown}; do printf '%s\\n' \"$word\"; done");
        let output = std::process::Command::new("sh").args(["-c", &script]).output().unwrap();
        assert_eq!(String::from_utf8(output.stdout).unwrap(), words.join("\n") + "\n");
        let elsewhere = command.shown_in(Path::new("/"));
        assert_eq!(elsewhere, format!("cd /tmp && {shown}"));
    }

    #[test]
    fn the_next_eval_has_the_verifier_the_file_and_the_template_of_the_run() {
        let place = tempfile::tempdir().unwrap();
        let smoke = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/smoke.toml");
        let write = |assignments: &[&str]| {
            let assignments: Vec<String> = assignments.iter().map(|a| a.to_string()).collect();
            let loaded = RunConfig::load(&smoke, &assignments).unwrap();
            std::fs::write(place.path().join("config.toml"), loaded.resolved_toml()).unwrap();
            eval_command(place.path(), "out/export")
                .replace(&place.path().display().to_string(), "RUN")
        };
        assert_eq!(
            write(&[]),
            "rehearsal eval out/export --data RUN/data/held-out.jsonl --verifier answer-line"
        );
        let other = ["stage.align.eval.solved.verifier=number", "data.sets.held-out.chat=true"];
        assert_eq!(
            write(&other),
            "rehearsal eval out/export --data RUN/data/held-out.jsonl --verifier number --chat"
        );
        let split = ["data.sets.held-out.split={of=2, from=0, to=1}"];
        assert!(write(&split).contains("--data FILE.jsonl --verifier answer-line"));
        std::fs::remove_file(place.path().join("config.toml")).unwrap();
        assert!(
            eval_command(place.path(), "e")
                .ends_with("eval e --data FILE.jsonl --metric perplexity")
        );
    }
}
