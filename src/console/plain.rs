//! Progress as plain lines: one per step, which read well in a terminal and in the log of a CI job.
//!
//! On a terminal a bar with the time left stands below the last line. Everything fits into 80
//! columns of ASCII; control characters in a model's text are shown, not sent. A terminal that is
//! gone does not stop the run: after the first failed write nothing more is written.

use super::board::{Board, EvalRow, ReplyRow, StageState, replies_of};
use super::event::Event;
use super::next_steps::{eval_command, resume_command};
use super::text::{duration, figure, fitted, visible, wrapped};
use crate::config::fault::START_AGAIN;
use std::collections::BTreeMap;
use std::io::Write;
use std::os::unix::process::parent_id;
use std::path::{Path, PathBuf};

/// One column less than a terminal has, so that no line wraps.
const WIDTH: usize = 79;
const COLUMN: usize = 38;
const BAR: usize = 30;
/// Lines of a reply that are shown at most.
const REPLY_LINES: usize = 8;
const REPLIES: usize = 2;

/// Writes progress as lines.
pub struct Plain {
    out: Box<dyn Write + Send>,
    terminal: bool,
    run_dir: PathBuf,
    board: Board,
    /// Whether the bar stands on the last line.
    bar: bool,
    gone: bool,
    /// Event that this process saw first in the stage: its time and step, for the time left.
    pace: Option<(f64, u64)>,
    /// The last step's figures of each stage.
    last: BTreeMap<String, String>,
    /// By eval: the first replies with their stage, and the latest.
    replies: BTreeMap<String, [(String, Vec<ReplyRow>); 2]>,
}

impl Plain {
    /// Writes to `out`, with a bar if it is a terminal; `run_dir` is named in the next commands.
    pub fn new(out: Box<dyn Write + Send>, terminal: bool, run_dir: &Path) -> Plain {
        Plain {
            out,
            terminal,
            run_dir: run_dir.to_path_buf(),
            board: Board::default(),
            bar: false,
            gone: false,
            pace: None,
            last: BTreeMap::new(),
            replies: BTreeMap::new(),
        }
    }

    /// To standard output. Who launches several processes gives each a terminal of its own and passes on what comes there, be
    /// it into a file: where the launcher itself writes to decides.
    pub fn stdout(run_dir: &Path, is_launched: bool) -> Plain {
        let own = rustix::termios::isatty(rustix::stdio::stdout());
        let terminal = own && (!is_launched || is_terminal(&output_of(parent_id())));
        Plain::new(Box::new(std::io::stdout()), terminal, run_dir)
    }

    /// Enters an event that is not shown: what the journal of a resumed run holds already.
    pub fn recall(&mut self, event: &Event) {
        self.board.take(event);
        self.remember(event);
    }

    /// Shows an event.
    pub fn show(&mut self, event: &Event) {
        self.board.take(event);
        self.remember(event);
        let stage = event.text("stage").unwrap_or_default().to_string();
        match event.name() {
            "run" => {
                let resumed = event.get("resumed").and_then(|v| v.as_bool()).unwrap_or(false);
                let verb = if resumed { "resumes" } else { "begins" };
                let seed =
                    event.whole("seed").map_or(String::new(), |seed| format!(", seed {seed}"));
                self.line(&format!("run {} {verb}{seed}", self.run_dir.display()));
                let processes = event.text("processes").map(|text| wrapped(text, WIDTH));
                processes.iter().flatten().for_each(|line| self.line(line));
            }
            "stage-start" => self.stage_heading(&stage, event),
            "step" => {
                let (number, figures) = (self.step_number(&stage), step_figures(event));
                // A long name gives way to the figures.
                let room = WIDTH.saturating_sub(number.len() + figures.len() + 3);
                self.line(&format!("{} {number}  {figures}", fitted(&stage, room.clamp(8, 20))));
            }
            "eval" => self.eval_line(event),
            "stage-end" => self.before_and_after(&stage),
            "note" => self.all_of(&format!("note: {}", event.text("text").unwrap_or_default())),
            "end" => self.summary(),
            _ => match event.remark() {
                Some(remark) => self.warn(&remark),
                None => return,
            },
        }
        self.show_bar(event);
    }

    fn remember(&mut self, event: &Event) {
        if event.name() == "step" {
            self.last
                .insert(event.text("stage").unwrap_or_default().to_string(), step_figures(event));
        }
        match event.name() {
            "stage-start" => {
                let stage = event.text("stage").unwrap_or_default();
                let row = self.board.stages.iter().find(|row| row.name == stage);
                // A run that goes on is in the middle of it.
                self.pace = Some((event.time(), row.map_or(0, |row| row.step)));
            }
            "step" if self.pace.is_none() => {
                self.pace = Some((event.time(), event.whole("step").unwrap_or_default()))
            }
            "run" => self.pace = None,
            "eval" => {
                let replies = replies_of(event);
                if replies.is_empty() {
                    return;
                }
                let entry = (event.text("stage").unwrap_or_default().to_string(), replies);
                let name = event.text("name").unwrap_or_default().to_string();
                self.replies
                    .entry(name)
                    .and_modify(|both| both[1] = entry.clone())
                    .or_insert([entry.clone(), entry]);
            }
            _ => {}
        }
    }

    fn stage_heading(&mut self, stage: &str, event: &Event) {
        let number =
            self.board.stages.iter().position(|row| row.name == stage).map_or(0, |i| i + 1);
        let count = self.board.stages.len();
        let kind = event.text("kind").unwrap_or_default();
        let steps = event.whole("steps").map_or(String::new(), |steps| format!(", {steps} steps"));
        self.line("");
        self.line(&format!("-- stage {number}/{count}: {} ({kind}{steps})", fitted(stage, 40)));
    }

    fn step_number(&self, stage: &str) -> String {
        let row = self.board.stages.iter().find(|row| row.name == stage);
        let (step, steps) = row.map_or((0, None), |row| (row.step, row.steps));
        match steps {
            Some(steps) => format!("{step:>width$}/{steps}", width = steps.to_string().len()),
            None => format!("{step:>5}"),
        }
    }

    fn eval_line(&mut self, event: &Event) {
        let name = event.text("name").unwrap_or_default().to_string();
        let samples = event.whole("samples").map_or(String::new(), |n| format!("  ({n} examples)"));
        if let Some((metric, value)) = event.measured() {
            self.line(&format!(
                "   eval {}: {}{samples}",
                fitted(&name, 30),
                measured(metric, value)
            ));
        }
        let shown: Vec<String> = replies_of(event)
            .iter()
            .take(1)
            .flat_map(|reply| {
                let prompt = format!("   | {}", fitted(&reply.prompt, 70));
                let text = wrapped(&reply.text, 66)
                    .into_iter()
                    .take(REPLY_LINES)
                    .map(|l| format!("   |   {l}"));
                std::iter::once(prompt).chain(text).collect::<Vec<_>>()
            })
            .collect();
        shown.iter().for_each(|line| self.line(line));
    }

    /// The same prompts answered by the model of an earlier eval and by this stage's.
    fn before_and_after(&mut self, stage: &str) {
        let changed: Vec<[(String, Vec<ReplyRow>); 2]> = self
            .replies
            .values()
            .filter(|both| both[1].0 == stage && both[0].1 != both[1].1)
            .cloned()
            .collect();
        for [(first, before), (_, after)] in changed {
            let pairs = after
                .iter()
                .filter_map(|a| Some((before.iter().find(|b| b.prompt == a.prompt)?, a)));
            for (before, after) in pairs.take(REPLIES).collect::<Vec<_>>() {
                self.line("");
                self.line(&format!("   {}", fitted(&after.prompt, 75)));
                let heads = [
                    format!("first ({first}), {}", figure(before.score)),
                    format!("now ({stage}), {}", figure(after.score)),
                ];
                let mut columns =
                    [vec![fitted(&heads[0], COLUMN - 3)], vec![fitted(&heads[1], COLUMN - 3)]];
                for (column, reply) in columns.iter_mut().zip([before, after]) {
                    column.extend(wrapped(&reply.text, COLUMN - 3).into_iter().take(REPLY_LINES));
                }
                for row in 0..columns[0].len().max(columns[1].len()) {
                    let cell = |column: &[String]| column.get(row).cloned().unwrap_or_default();
                    self.line(&format!("   {:<COLUMN$}{}", cell(&columns[0]), cell(&columns[1])));
                }
            }
        }
    }

    fn warn(&mut self, remark: &str) {
        self.all_of(&format!("!! {remark}"));
    }

    /// What says what to do is not cut.
    fn all_of(&mut self, text: &str) {
        wrapped(text, WIDTH).iter().for_each(|line| self.line(line));
    }

    /// The table of the stages, and what to do next.
    fn summary(&mut self) {
        let mut lines = vec![
            String::new(),
            format!("{:<20} {:<13} {:>7} {:>8}  {}", "stage", "kind", "steps", "time", "last step"),
        ];
        for row in self.board.stages.iter().filter(|row| row.state != StageState::Waiting) {
            let last = self.last.get(&row.name).map_or("", String::as_str);
            let (name, kind) = (fitted(&row.name, 20), fitted(&row.kind, 13));
            lines.push(format!(
                "{name:<20} {kind:<13} {:>7} {:>8}  {}",
                row.step,
                duration(row.seconds),
                fitted(last, 27)
            ));
            let measured = last_evals(&self.board.evals, &row.name);
            lines.extend(
                measured
                    .iter()
                    .map(|(name, text)| format!("{:<20} {}: {text}", "", fitted(name, 34))),
            );
        }
        lines.push(String::new());
        match self.board.export.clone() {
            Some(export) => {
                lines.push(format!("exported model: {export}"));
                lines.push("next:".to_string());
                lines.push(format!("  rehearsal generate {export}"));
                lines.push(format!("  {}", eval_command(&self.run_dir, &export)));
                lines.push(format!("  rehearsal status {}", self.run_dir.display()));
            }
            None => {
                let reason =
                    self.board.reason.clone().unwrap_or_else(|| "the run ended early".to_string());
                lines.extend(wrapped(&reason, WIDTH));
                if !reason.contains(START_AGAIN) {
                    lines.extend(
                        resume_command(&self.run_dir)
                            .map(|command| format!("go on with: {command}")),
                    );
                }
            }
        }
        // Paths are not cut, for they are there to be copied.
        lines.iter().for_each(|line| self.put(&visible(line)));
    }

    fn show_bar(&mut self, event: &Event) {
        let Some((number, row)) = self.board.running().filter(|_| self.terminal) else { return };
        let Some(steps) = row.steps.filter(|steps| *steps > 0) else { return };
        let share = (row.step as f64 / steps as f64).min(1.0);
        let filled = (share * BAR as f64).round() as usize;
        let left = self.pace.map(|(time, step)| {
            let done = row.step.saturating_sub(step);
            let each = if done > 0 { (event.time() - time) / done as f64 } else { 0.0 };
            if done > 0 {
                format!("{} left", duration(each * steps.saturating_sub(row.step) as f64))
            } else {
                String::new()
            }
        });
        let bar = format!(
            "[{}{}] {:>3.0}%  stage {number}/{} {}  {}",
            "#".repeat(filled),
            ".".repeat(BAR - filled),
            100.0 * share,
            self.board.stages.len(),
            fitted(&row.name, 16),
            left.unwrap_or_default()
        );
        self.send(&fitted(&bar, WIDTH));
        self.bar = true;
    }

    fn line(&mut self, text: &str) {
        self.put(&fitted(text, WIDTH));
    }

    fn put(&mut self, text: &str) {
        // The line takes the bar's place; blanks cover what is longer.
        let covered = if self.bar { format!("\r{:<WIDTH$}\r", "") } else { String::new() };
        self.bar = false;
        self.send(&format!("{covered}{}\n", text.trim_end()));
    }

    fn send(&mut self, text: &str) {
        if !self.gone {
            self.gone =
                self.out.write_all(text.as_bytes()).and_then(|()| self.out.flush()).is_err();
        }
    }
}

/// What a process writes to, as far as the system tells.
fn output_of(process: u32) -> PathBuf {
    std::fs::read_link(format!("/proc/{process}/fd/1")).unwrap_or_default()
}

fn is_terminal(device: &Path) -> bool {
    let name = device.to_string_lossy();
    ["/dev/pts/", "/dev/tty", "/dev/console"].iter().any(|kind| name.starts_with(kind))
}

impl Drop for Plain {
    fn drop(&mut self) {
        // What is said after a run that ended without a word stands on a line of its own.
        if self.bar {
            self.send("\n");
        }
    }
}

/// What a step did, by what its event holds.
fn step_figures(event: &Event) -> String {
    let named = [
        ("reward_mean", "reward"),
        ("loss", "loss"),
        ("accuracy", "acc"),
        ("kl", "kl"),
        ("entropy", "ent"),
        ("length_mean", "len"),
        ("learning_rate", "lr"),
        ("gradient_norm", "norm"),
    ];
    let aligned = event.number("reward_mean").is_some();
    let dropped = event.number("dropped");
    // An alignment step's loss says little (its mean is near 0), and its line is full. A line that tells what was dropped
    // or how accurate it was has no room for the learning rate, which the config tells.
    let is_full = dropped.is_some() || event.number("accuracy").is_some();
    let left_out = |key: &str| {
        aligned && ["loss", "learning_rate", "gradient_norm"].contains(&key)
            || is_full && key == "learning_rate"
    };
    let mut parts: Vec<String> = named
        .iter()
        .filter(|(key, _)| !left_out(key))
        .filter_map(|(key, name)| Some(format!("{name} {}", short(event.number(key)?))))
        .collect();
    parts.extend(dropped.map(|share| format!("drop {:.1} %", 100.0 * share)));
    let rfu = event.number("rfu").map(|share| format!("rfu {:.1} %", 100.0 * share));
    // The tokens that an alignment step trains on say less of its speed than its useful FLOPs do.
    let rate = event.number("tokens_per_second").filter(|_| rfu.is_none());
    parts.extend(rate.map(|rate| format!("{rate:.0} tok/s")));
    parts.extend(rfu);
    parts.extend(event.number("useful_share").map(|share| format!("use {:.1} %", 100.0 * share)));
    if event.get("skipped").and_then(|v| v.as_bool()) == Some(true) {
        parts.push("SKIPPED: not finite".to_string());
    } else if let Some(skipped) = event.whole("skipped_updates").filter(|skipped| *skipped > 0) {
        parts.push(format!("{skipped} of its updates SKIPPED: not finite"));
    }
    parts.join("  ")
}

fn short(value: f64) -> String {
    match value.abs() {
        0.0 => "0".to_string(),
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 0.01 => format!("{value:.3}"),
        _ => format!("{value:.1e}"),
    }
}

fn measured(metric: &str, value: f64) -> String {
    match metric {
        "pass_at_1" => format!("pass@1 {:.1} %", 100.0 * value),
        "perplexity" => format!("perplexity {}", short(value)),
        _ => format!("{metric} {:.1} %", 100.0 * value),
    }
}

/// The last value of each eval of a stage.
fn last_evals(evals: &[EvalRow], stage: &str) -> BTreeMap<String, String> {
    evals
        .iter()
        .filter(|row| row.stage == stage)
        .map(|row| (row.name.clone(), measured(&row.metric, row.value)))
        .collect()
}

#[cfg(test)]
mod tests;
