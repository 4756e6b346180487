//! `journal.jsonl`: the run's event log, appended to by one writer, read by everybody.
//!
//! Opening it after a crash trims a torn last line and remembers what stands in it; a resumed run
//! that computes a step again finds it there and does not write it again. Nothing else is ever
//! removed.
//!
//! A kill loses no line. A sync takes some milliseconds, a tenth of a small model's step, so that a step's line is synced
//! by [`Journal::sync`] before the commit that relies on it: what a power cut takes is computed again.
//!
//! Invariants:
//!   * every line but a torn last one is a whole JSON object; `append` returns after the line is
//!     whole on the disk (eval and stage events) or with the operating system (the others)
//!   * a step stands in it once, and so do an eval of a step and the start and end of a stage

use super::event::Event;
use crate::config::Fault;
use anyhow::{Context, Result};
use serde_json::Value;
use std::collections::{HashMap, HashSet};
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// Events that a resumed run makes again: each stands in the journal once for a stage, step and
/// name.
const ONCE: [&str; 3] = ["eval", "stage-start", "stage-end"];

/// The writer.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
    length: u64,
    lines: u64,
    /// Greatest step of each stage.
    steps: HashMap<String, u64>,
    /// Evals and stages that are in it.
    seen: HashSet<(String, String, u64, String)>,
}

impl Journal {
    /// Opens or creates the journal and trims a torn last line.
    pub fn open(path: &Path) -> Result<Journal> {
        let at = path.display();
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(path)
            .with_context(|| format!("failed to open {at}"))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).with_context(|| format!("failed to read {at}"))?;
        let whole = bytes.iter().rposition(|b| *b == b'\n').map_or(0, |end| end + 1);
        if whole < bytes.len() {
            file.set_len(whole as u64).with_context(|| format!("failed to trim {at}"))?;
            file.sync_all().with_context(|| format!("failed to sync {at}"))?;
        }
        file.seek(SeekFrom::Start(whole as u64))
            .with_context(|| format!("failed to seek in {at}"))?;
        let mut journal = Journal {
            path: path.to_path_buf(),
            file,
            length: whole as u64,
            lines: 0,
            steps: HashMap::new(),
            seen: HashSet::new(),
        };
        for event in parse_lines(path, &bytes[..whole])? {
            journal.remember(&event);
        }
        Ok(journal)
    }

    /// Appends an event and says whether it was written: a step, eval or stage that stands there
    /// already is not.
    pub fn append(&mut self, event: &Event) -> Result<bool> {
        if self.holds(event) {
            return Ok(false);
        }
        let mut line = serde_json::to_vec(event).expect("an event is plain JSON");
        line.push(b'\n');
        let write = |file: &mut File| {
            file.write_all(&line)?;
            if ONCE.contains(&event.name()) { file.sync_data() } else { Ok(()) }
        };
        if let Err(error) = write(&mut self.file) {
            // The next line must not be glued to half of this one.
            let _ = self
                .file
                .set_len(self.length)
                .and_then(|()| self.file.seek(SeekFrom::Start(self.length)));
            return Err(self.fault(error));
        }
        self.length += line.len() as u64;
        self.remember(event);
        Ok(true)
    }

    /// Returns when every line so far is on the disk.
    pub fn sync(&mut self) -> Result<()> {
        self.file.sync_data().map_err(|error| self.fault(error))
    }

    /// The greatest step of a stage.
    pub fn last_step(&self, stage: &str) -> Option<u64> {
        self.steps.get(stage).copied()
    }

    /// Lines so far.
    pub fn lines(&self) -> u64 {
        self.lines
    }

    fn holds(&self, event: &Event) -> bool {
        if event.name() == "step" {
            let (stage, step) = stage_and_step(event);
            return self.steps.get(stage).is_some_and(|last| step <= *last);
        }
        ONCE.contains(&event.name()) && self.seen.contains(&once_key(event))
    }

    fn remember(&mut self, event: &Event) {
        self.lines += 1;
        if event.name() == "step" {
            let (stage, step) = stage_and_step(event);
            let last = self.steps.entry(stage.to_string()).or_default();
            *last = step.max(*last);
        } else if ONCE.contains(&event.name()) {
            self.seen.insert(once_key(event));
        }
    }

    fn fault(&self, error: std::io::Error) -> anyhow::Error {
        match error.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge => {
                Fault::resources(format!(
                    "no room left to append to {}: {error}; free some space and run again with \
                     --resume",
                    self.path.display()
                ))
            }
            _ => anyhow::Error::new(error)
                .context(format!("failed to append to {}", self.path.display())),
        }
    }
}

/// Reads a journal; a torn last line is left out, and a damaged one elsewhere is an error with its
/// number.
pub fn read_events(path: &Path) -> Result<Vec<Event>> {
    let bytes = std::fs::read(path).map_err(|e| match e.kind() {
        ErrorKind::NotFound => {
            Fault::user(format!("{}: no such file; is this the folder of a run?", path.display()))
        }
        _ => anyhow::Error::new(e).context(format!("failed to read {}", path.display())),
    })?;
    let whole = bytes.iter().rposition(|b| *b == b'\n').map_or(0, |end| end + 1);
    parse_lines(path, &bytes[..whole])
}

fn parse_lines(path: &Path, bytes: &[u8]) -> Result<Vec<Event>> {
    let mut events = Vec::new();
    for (index, line) in bytes.split_inclusive(|b| *b == b'\n').enumerate() {
        let fault = |reason: String| {
            Fault::user(format!(
                "{}:{}: {reason}; remove the line to go on without it",
                path.display(),
                index + 1
            ))
        };
        let value: Value =
            serde_json::from_slice(line).map_err(|e| fault(format!("not valid JSON: {e}")))?;
        let complete =
            ["event", "time", "stage", "kind", "step"].iter().all(|key| value.get(key).is_some());
        match Event::from_value(value) {
            Ok(event) if complete => events.push(event),
            _ => return Err(fault("not an event of a journal".to_string())),
        }
    }
    Ok(events)
}

fn stage_and_step(event: &Event) -> (&str, u64) {
    (event.text("stage").unwrap_or_default(), event.whole("step").unwrap_or_default())
}

fn once_key(event: &Event) -> (String, String, u64, String) {
    let (stage, step) = stage_and_step(event);
    (
        event.name().to_string(),
        stage.to_string(),
        step,
        event.text("name").unwrap_or_default().to_string(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(stage: &str, step: u64) -> Event {
        Event::step(stage, "sft", step).with("loss", 1.0 / step as f64).at(step as f64)
    }

    fn filled(path: &Path) -> Vec<u8> {
        let mut journal = Journal::open(path).expect("a new journal");
        for event in [
            Event::new("stage-start").of_stage("sft", "sft"),
            step("sft", 1),
            Event::eval("sft", "sft", 1, "held-out", "pass_at_1", 0.5, 300),
            step("sft", 2),
        ] {
            assert!(journal.append(&event).expect("written"));
        }
        std::fs::read(path).expect("the journal")
    }

    #[test]
    fn a_torn_last_line_is_trimmed_wherever_it_was_torn_and_nothing_else() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("journal.jsonl");
        let whole = filled(&path);
        for length in 0..=whole.len() {
            std::fs::write(&path, &whole[..length]).expect("a cut journal");
            let kept = whole[..length].iter().rposition(|b| *b == b'\n').map_or(0, |end| end + 1);
            let lines = whole[..kept].iter().filter(|b| **b == b'\n').count();
            assert_eq!(read_events(&path).expect("whole lines").len(), lines);
            let mut journal = Journal::open(&path).expect("a torn journal opens");
            assert_eq!(journal.lines(), lines as u64);
            let trimmed = std::fs::read(&path).expect("the journal");
            assert_eq!(trimmed, whole[..kept], "cut at {length}");
            assert!(journal.append(&step("sft", 3)).expect("written"));
            let bytes = std::fs::read(&path).expect("the journal");
            assert_eq!(bytes[..kept], whole[..kept], "cut at {length}");
            assert_eq!(
                read_events(&path).expect("whole lines").len(),
                lines + 1,
                "cut at {length}"
            );
        }
    }

    #[test]
    fn a_resumed_run_writes_no_step_and_no_eval_twice() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("journal.jsonl");
        let before = filled(&path);
        let mut journal = Journal::open(&path).expect("the journal");
        assert_eq!(journal.last_step("sft"), Some(2));
        for event in [
            Event::new("stage-start").of_stage("sft", "sft"),
            step("sft", 1),
            Event::eval("sft", "sft", 1, "held-out", "pass_at_1", 0.5, 300),
            step("sft", 2),
        ] {
            assert!(!journal.append(&event).expect("left out"), "{event:?}");
        }
        assert_eq!(std::fs::read(&path).expect("the journal"), before);
        assert!(journal.append(&step("sft", 3)).expect("written"));
        assert!(journal.append(&step("align", 1)).expect("another stage counts for itself"));
        let other = Event::eval("sft", "sft", 1, "secrets", "rate", 0.5, 100);
        assert!(journal.append(&other).expect("another eval of the same step is written"));
        let restart = Event::new("restart").with("actor", "reward-scorer");
        assert!(
            journal.append(&restart).expect("written")
                && journal.append(&restart).expect("written")
        );
    }

    #[test]
    fn a_damaged_line_in_the_middle_is_named_and_kept() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("journal.jsonl");
        let mut bytes = filled(&path);
        let second = bytes.iter().position(|b| *b == b'\n').expect("a line") + 1;
        bytes[second] = b'#';
        std::fs::write(&path, &bytes).expect("a damaged journal");
        let error = Journal::open(&path).expect_err("a damaged journal is refused");
        assert!(format!("{error:#}").contains("journal.jsonl:2:"), "{error:#}");
        assert_eq!(std::fs::read(&path).expect("the journal"), bytes);
    }

    #[test]
    fn a_full_disk_is_a_lack_of_resources() {
        let file = OpenOptions::new().write(true).open("/dev/full").expect("a full device");
        let mut journal = Journal {
            path: PathBuf::from("/dev/full"),
            file,
            length: 0,
            lines: 0,
            steps: HashMap::new(),
            seen: HashSet::new(),
        };
        let error = journal.append(&step("sft", 1)).expect_err("no room");
        assert!(matches!(error.downcast_ref(), Some(Fault::Resources(_))), "{error:#}");
        assert_eq!(
            journal.last_step("sft"),
            None,
            "a step that was not written may be written later"
        );
    }
}
