//! The complete picture of a run as data: what `board.json` holds and `rehearsal status` prints.
//!
//! The Monitor owns one [`Board`]: events fill stages, curves, evals and replies ([`Board::take`]);
//! phase, actors and memory it sets itself. Another process reads the file, or rebuilds what the
//! journal tells, and says so if the run's process is gone.
//!
//! Invariant: its size is bounded, however long the run is.

use super::alive::{host, is_alive};
use super::event::{Event, now};
use super::journal::read_events;
use super::next_steps::resume_command;
use crate::config::Fault;
use crate::config::fault::START_AGAIN;
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Name of the file in the run's folder.
pub const BOARD_FILE: &str = "board.json";
/// Name of the journal in the run's folder.
pub const JOURNAL_FILE: &str = "journal.jsonl";
/// Name of the file whose lock a running process holds.
pub const LOCK_FILE: &str = "lock";

/// Points that a curve keeps.
const CURVE_POINTS: usize = 240;
const REPLIES: usize = 8;
const EVALS: usize = 64;
const NOTES: usize = 16;
/// Time between two writes of the file at least.
const WRITE_INTERVAL: Duration = Duration::from_millis(250);
/// Keys of a step that become curves.
const CURVES: [&str; 11] = [
    "loss",
    "reward_mean",
    "accuracy",
    "kl",
    "entropy",
    "length_mean",
    "gradient_norm",
    "tokens_per_second",
    "rfu",
    "useful_share",
    "offload_exposed_share",
];

/// The picture.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Board {
    /// Name of the run's folder.
    pub run: String,
    /// How it goes.
    pub state: RunState,
    /// Why it stopped or failed, and what to do.
    pub reason: Option<String>,
    /// The command that goes on with it, if it can go on.
    pub resume: Option<String>,
    /// Its process, and the host of that.
    pub pid: u32,
    /// See `pid`.
    pub host: String,
    /// Seconds since 1970 at the start, and of the last change.
    pub started: f64,
    /// See `started`.
    pub updated: f64,
    /// The stages, in order.
    pub stages: Vec<StageRow>,
    /// What the device is doing.
    pub phase: String,
    /// The actors.
    pub actors: Vec<ActorRow>,
    /// Bytes held, by owner.
    pub memory: BTreeMap<String, u64>,
    /// Most bytes held at once.
    pub memory_high_water: u64,
    /// Bytes that may be held.
    pub memory_budget: Option<u64>,
    /// What the last step moved off the device and back, if anything.
    pub offload: Option<OffloadRow>,
    /// What the last change of layout moved, or hand-over to those that only sample.
    pub switch: Option<SwitchRow>,
    /// Figures over the current stage's steps.
    pub curves: BTreeMap<String, Vec<(u64, f64)>>,
    /// Measurements, the last one last.
    pub evals: Vec<EvalRow>,
    /// The last replies that were shown.
    pub replies: Vec<ReplyRow>,
    /// Folder of the last commit.
    pub commit: Option<String>,
    /// Folder of the exported model.
    pub export: Option<String>,
    /// Notes and remarks (restarts, skipped steps, rejected checkpoints): the last ones.
    pub notes: Vec<String>,
}

/// How a run goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RunState {
    /// At work.
    #[default]
    Running,
    /// Ended by a signal, after a commit.
    Stopped,
    /// Every stage is done.
    Finished,
    /// It could not go on.
    Failed,
    /// Its process is gone without a word.
    Lost,
}

/// How a stage goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StageState {
    /// Not begun.
    #[default]
    Waiting,
    /// Begun.
    Running,
    /// Begun, and the run has stopped.
    Stopped,
    /// Done.
    Done,
}

/// A stage.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct StageRow {
    /// Name.
    pub name: String,
    /// Kind.
    pub kind: String,
    /// How it goes.
    pub state: StageState,
    /// Steps that are done, and all of them if that is known.
    pub step: u64,
    /// See `step`.
    pub steps: Option<u64>,
    /// Seconds from its first to its last event.
    pub seconds: f64,
    /// When it began, in seconds since 1970.
    pub started: f64,
}

/// An actor.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ActorRow {
    /// Name.
    pub name: String,
    /// `idle`, `busy`, `restarting` or `stopped`.
    pub state: String,
    /// Seconds since it began to do so.
    pub since: f64,
    /// Messages that wait.
    pub mailbox: u64,
    /// Messages that may wait.
    pub mailbox_bound: u64,
    /// Messages it has taken.
    pub handled: u64,
    /// The last one's name.
    pub last_message: Option<String>,
    /// Times it was restarted.
    pub restarts: u64,
    /// For whom it waits.
    pub waits: Vec<WaitRow>,
    /// Why it died or stopped last.
    pub reason: Option<String>,
}

/// An answer that an actor waits for.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct WaitRow {
    /// Who has to answer.
    pub actor: String,
    /// What was asked.
    pub message: String,
    /// Seconds since.
    pub seconds: f64,
}

/// A measurement.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct EvalRow {
    /// Stage.
    pub stage: String,
    /// Steps of the stage that were done.
    pub step: u64,
    /// The eval's name.
    pub name: String,
    /// `pass_at_1`, `perplexity`, `accuracy` or `rate`.
    pub metric: String,
    /// The figure.
    pub value: f64,
}

/// What a step moved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct OffloadRow {
    /// Bytes that came to the device, and that left it.
    pub bytes_in: u64,
    /// See `bytes_in`.
    pub bytes_out: u64,
    /// Seconds in which the device waited, and those of the step.
    pub exposed_seconds: f64,
    /// See `exposed_seconds`.
    pub seconds: f64,
    /// Share of the transfers' seconds in which the device computed.
    pub overlap_share: Option<f64>,
}

/// A change of the layout of ranks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SwitchRow {
    /// Bytes that all ranks sent.
    pub moved_bytes: u64,
    /// The least that any plan would have sent.
    pub least_bytes: u64,
    /// Seconds of a processor for each of them.
    pub cpu_seconds_per_byte: Option<f64>,
}

/// A reply.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ReplyRow {
    /// The prompt's text.
    pub prompt: String,
    /// The reply's text.
    pub text: String,
    /// What was expected.
    pub answer: Option<String>,
    /// What it earned.
    pub score: f64,
}

impl Board {
    /// A board of a run that this process begins or resumes.
    pub fn new(run_dir: &Path) -> Board {
        let time = now();
        let run =
            run_dir.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let (pid, host) = (std::process::id(), host());
        Board { run, pid, host, started: time, updated: time, ..Board::default() }
    }

    /// Enters what an event says.
    pub fn take(&mut self, event: &Event) {
        self.updated = self.updated.max(event.time());
        let stage = event.text("stage").unwrap_or_default().to_string();
        match event.name() {
            "run" => self.take_run(event),
            "stage-start" => {
                let row = self.stage(&stage, event);
                row.state = StageState::Running;
                row.steps = event.whole("steps").or(row.steps);
                row.started = event.time();
                self.curves.clear();
            }
            "stage-end" => {
                let row = self.stage(&stage, event);
                row.state = StageState::Done;
                row.seconds = event.number("seconds").unwrap_or(event.time() - row.started);
            }
            "step" => self.take_step(&stage, event),
            "eval" => self.take_eval(stage, event),
            "phase" => self.phase = event.text("phase").unwrap_or_default().to_string(),
            "commit" => self.commit = event.text("folder").map(str::to_string),
            "end" => {
                self.state = match event.text("state") {
                    Some("finished") => RunState::Finished,
                    Some("stopped") => RunState::Stopped,
                    _ => RunState::Failed,
                };
                self.reason = event.text("reason").map(str::to_string);
                self.export = event.text("export").map(str::to_string);
                self.rest();
            }
            "note" => self.note(event.text("text").unwrap_or_default().to_string()),
            _ => event.remark().into_iter().for_each(|remark| self.note(remark)),
        }
    }

    fn note(&mut self, text: String) {
        self.notes.push(text);
        keep_last(&mut self.notes, NOTES);
    }

    /// Reads the picture of a run from its folder: the file, or what the journal tells.
    pub fn read(run_dir: &Path) -> Result<Board> {
        let file = std::fs::read(run_dir.join(BOARD_FILE)).ok();
        // A board that cannot be read is no loss: the journal is the truth.
        let mut board = match file.and_then(|bytes| serde_json::from_slice::<Board>(&bytes).ok()) {
            Some(board) => board,
            None => Board::from_journal(run_dir)?,
        };
        if board.state == RunState::Running && !is_alive(run_dir, board.pid, &board.host) {
            board.state = RunState::Lost;
            board.rest();
            board.reason = Some(format!("its {}is gone without a word", board.process()));
        }
        let starts_over = board.reason.as_ref().is_some_and(|why| why.contains(START_AGAIN));
        if !matches!(board.state, RunState::Running | RunState::Finished) && !starts_over {
            board.resume = resume_command(run_dir);
        }
        Ok(board)
    }

    /// Its process, by number, and by host where that is another.
    pub(super) fn process(&self) -> String {
        match self.pid {
            0 => "process ".to_string(),
            pid if self.host.is_empty() || self.host == host() => format!("process {pid} "),
            pid => format!("process {pid} on {} ", self.host),
        }
    }

    /// What the journal alone tells: no actors, no process.
    pub fn from_journal(run_dir: &Path) -> Result<Board> {
        let path = run_dir.join(JOURNAL_FILE);
        if !path.is_file() {
            return Err(Fault::user(format!(
                "{}: holds neither {BOARD_FILE} nor {JOURNAL_FILE}; name the folder of a run \
                 (runs/NAME)",
                run_dir.display()
            )));
        }
        let events = read_events(&path)?;
        let mut board = Board { pid: 0, host: String::new(), ..Board::new(run_dir) };
        board.started = events.first().map_or(board.started, Event::time);
        board.updated = board.started;
        for event in &events {
            board.take(event);
        }
        Ok(board)
    }

    /// The stage that is running, with its number from 1.
    pub fn running(&self) -> Option<(usize, &StageRow)> {
        let index = self.stages.iter().position(|row| row.state == StageState::Running)?;
        Some((index + 1, &self.stages[index]))
    }

    /// Nobody works any more.
    fn rest(&mut self) {
        self.phase.clear();
        for row in self.stages.iter_mut().filter(|row| row.state == StageState::Running) {
            row.state = StageState::Stopped;
        }
    }

    fn take_run(&mut self, event: &Event) {
        (self.state, self.reason) = (RunState::Running, None);
        let listed = event
            .get("stages")
            .and_then(|stages| serde_json::from_value::<Vec<StageRow>>(stages.clone()).ok());
        for listed in listed.unwrap_or_default() {
            let row = self.stage(&listed.name, event);
            row.kind = listed.kind;
            row.steps = listed.steps.or(row.steps);
        }
    }

    fn take_step(&mut self, stage: &str, event: &Event) {
        let step = event.whole("step").unwrap_or_default();
        let row = self.stage(stage, event);
        row.state = StageState::Running;
        row.step = row.step.max(step);
        row.seconds = (event.time() - row.started).max(0.0);
        for key in CURVES {
            if let Some(value) = event.number(key) {
                let curve = self.curves.entry(key.to_string()).or_default();
                curve.push((step, value));
                keep_last(curve, CURVE_POINTS);
            }
        }
        let moved = event.get("offload").and_then(|row| serde_json::from_value(row.clone()).ok());
        self.offload = moved.unwrap_or_default();
        let switch = event.get("switch").and_then(|row| serde_json::from_value(row.clone()).ok());
        self.switch = switch.flatten().or(self.switch);
        if let Some(memory) =
            event.get("memory").and_then(|m| serde_json::from_value(m.clone()).ok())
        {
            self.memory = memory;
            self.memory_high_water = self.memory_high_water.max(self.memory.values().sum());
        }
        self.memory_high_water =
            event.whole("memory_high_water").unwrap_or(0).max(self.memory_high_water);
    }

    fn take_eval(&mut self, stage: String, event: &Event) {
        if let Some((metric, value)) = event.measured() {
            let name = event.text("name").unwrap_or_default().to_string();
            let step = event.whole("step").unwrap_or_default();
            self.evals.push(EvalRow { stage, step, name, metric: metric.to_string(), value });
            keep_last(&mut self.evals, EVALS);
        }
        let replies = replies_of(event);
        if !replies.is_empty() {
            self.replies = replies;
            self.replies.truncate(REPLIES);
        }
    }

    fn stage(&mut self, name: &str, event: &Event) -> &mut StageRow {
        let index = match self.stages.iter().position(|row| row.name == name) {
            Some(index) => index,
            None => {
                let kind = event.text("kind").unwrap_or_default().to_string();
                self.stages.push(StageRow {
                    name: name.to_string(),
                    kind,
                    started: event.time(),
                    ..StageRow::default()
                });
                self.stages.len() - 1
            }
        };
        &mut self.stages[index]
    }
}

/// The replies that an eval shows.
pub(super) fn replies_of(event: &Event) -> Vec<ReplyRow> {
    event
        .get("replies")
        .and_then(|replies| serde_json::from_value(replies.clone()).ok())
        .unwrap_or_default()
}

fn keep_last<T>(list: &mut Vec<T>, count: usize) {
    let surplus = list.len().saturating_sub(count);
    list.drain(..surplus);
}

/// Writes the board's file, seldom enough to cost nothing.
#[derive(Debug)]
pub struct BoardWriter {
    path: PathBuf,
    last: Option<Instant>,
}

impl BoardWriter {
    /// For the run in this folder.
    pub fn new(run_dir: &Path) -> BoardWriter {
        BoardWriter { path: run_dir.join(BOARD_FILE), last: None }
    }

    /// Writes the file unless it was written less than 250 ms before `now`; says whether it did.
    pub fn offer(&mut self, board: &Board, now: Instant) -> Result<bool> {
        if self.last.is_some_and(|last| now.duration_since(last) < WRITE_INTERVAL) {
            return Ok(false);
        }
        self.last = Some(now);
        self.write(board).map(|()| true)
    }

    /// Writes the file: at the end of a run, whatever the time.
    pub fn write(&self, board: &Board) -> Result<()> {
        let bytes = serde_json::to_vec(board).expect("a board is plain data");
        replace_file(&self.path, &bytes)
    }
}

/// Gives a file a new content at once: a reader sees the old or the new one. It is not synced, for
/// what it holds can be made again from the journal.
pub(super) fn replace_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let aside = path.with_extension("tmp");
    std::fs::write(&aside, bytes)
        .and_then(|()| std::fs::rename(&aside, path))
        .with_context(|| format!("failed to write {}", path.display()))
}

#[cfg(test)]
mod tests;
