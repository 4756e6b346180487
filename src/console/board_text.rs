//! The board as text: at most 80 columns of plain ASCII.

use super::board::{ActorRow, Board, RunState, StageRow, StageState};
use super::text::{bytes, duration, figure, fitted, visible};
use std::fmt::{Display, Formatter, Result};

const WIDTH: usize = 80;
const LEVELS: &[u8] = b"_.-:=+*#%@";

impl Display for Board {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        let state = state_name(self.state);
        let phase =
            if self.phase.is_empty() { String::new() } else { format!("  phase {}", self.phase) };
        let elapsed = duration(self.updated - self.started);
        let process =
            if self.pid == 0 { String::new() } else { format!("  {}", self.process().trim_end()) };
        line(f, &format!("run {}  {state}{phase}  {elapsed}{process}", fitted(&self.run, 24)))?;
        if let Some(reason) = &self.reason {
            for part in super::text::wrapped(reason, WIDTH - 2) {
                line(f, &format!("  {part}"))?;
            }
        }
        // A command is there to be copied: it is not wrapped.
        if let Some(command) = &self.resume {
            writeln!(f, "  go on with: {}", visible(command))?;
        }
        self.fmt_stages(f)?;
        self.fmt_actors(f)?;
        self.fmt_memory(f)?;
        self.fmt_curves(f)?;
        self.fmt_results(f)
    }
}

impl Board {
    fn fmt_stages(&self, f: &mut Formatter<'_>) -> Result {
        heading(
            f,
            &format!("{:<22} {:<13} {:<8} {:>13} {:>8}", "stage", "kind", "state", "step", "time"),
        )?;
        for row in &self.stages {
            line(f, &stage_line(row))?;
        }
        Ok(())
    }

    fn fmt_actors(&self, f: &mut Formatter<'_>) -> Result {
        if self.actors.is_empty() {
            return Ok(());
        }
        heading(
            f,
            &format!(
                "{:<19} {:<16} {:>8} {:>8} {:>4}  last message",
                "actor", "state", "mailbox", "handled", "rst"
            ),
        )?;
        for row in &self.actors {
            line(f, &actor_line(row))?;
            if let Some(reason) = &row.reason {
                line(f, &format!("    {reason}"))?;
            }
        }
        for row in &self.actors {
            for wait in &row.waits {
                let (who, whom, since) =
                    (fitted(&row.name, 19), fitted(&wait.actor, 19), duration(wait.seconds));
                // Most are of few letters, and leave their room to the last.
                let rest = format!("  {who} waits for {whom} () since {since}");
                let what = fitted(&wait.message, WIDTH.saturating_sub(rest.len()).max(8));
                line(f, &format!("  {who} waits for {whom} ({what}) since {since}"))?;
            }
        }
        Ok(())
    }

    fn fmt_memory(&self, f: &mut Formatter<'_>) -> Result {
        if self.memory.is_empty() {
            return Ok(());
        }
        let held = bytes(self.memory.values().sum());
        let budget = self.memory_budget.map_or(String::new(), |b| format!(", budget {}", bytes(b)));
        heading(f, &format!("memory {held}, at most {}{budget}", bytes(self.memory_high_water)))?;
        for (owner, held) in &self.memory {
            line(f, &format!("{:<40} {:>14}", fitted(owner, 40), bytes(*held)))?;
        }
        if let Some(row) = &self.offload {
            let exposed = 100.0 * row.exposed_seconds / row.seconds.max(1e-9);
            let beside = row.overlap_share.unwrap_or_default() * 100.0;
            let (read, written) = (bytes(row.bytes_in), bytes(row.bytes_out));
            line(f, &format!("a step moves {read} in and {written} out: {beside:.0} % beside"))?;
            line(f, &format!("computation, and waits {exposed:.1} % of its time for the rest"))?;
        }
        if let Some(row) = &self.switch {
            let (moved, least) = (bytes(row.moved_bytes), bytes(row.least_bytes));
            let spent = row.cpu_seconds_per_byte.map_or(String::new(), |seconds| {
                format!(", {:.2} ns of CPU a byte", 1e9 * seconds)
            });
            line(f, &format!("the last switch moved {moved} of at least {least}{spent}"))?;
        }
        Ok(())
    }

    fn fmt_curves(&self, f: &mut Formatter<'_>) -> Result {
        if self.curves.is_empty() {
            return Ok(());
        }
        heading(f, &format!("{:<20} {:>10}  over the stage's last steps", "curve", "now"))?;
        for (name, points) in &self.curves {
            let now = points.last().map_or(String::new(), |(_, value)| figure(*value));
            line(f, &format!("{:<20} {now:>10}  {}", fitted(name, 20), spark(points, 44)))?;
        }
        Ok(())
    }

    fn fmt_results(&self, f: &mut Formatter<'_>) -> Result {
        if !self.evals.is_empty() {
            heading(
                f,
                &format!(
                    "{:<22} {:>6}  {:<26} {:<10} {:>8}",
                    "eval of stage", "step", "name", "metric", "value"
                ),
            )?;
        }
        for row in self.evals.iter().rev().take(12).rev() {
            let (stage, name) = (fitted(&row.stage, 22), fitted(&row.name, 26));
            line(
                f,
                &format!(
                    "{stage:<22} {:>6}  {name:<26} {:<10} {:>8}",
                    row.step,
                    row.metric,
                    figure(row.value)
                ),
            )?;
        }
        if !self.replies.is_empty() {
            heading(f, "last replies")?;
        }
        for reply in self.replies.iter().take(3) {
            line(f, &format!("  {}", reply.prompt))?;
            line(f, &format!("    -> {}  ({})", fitted(&reply.text, 60), figure(reply.score)))?;
        }
        for (name, folder) in [("last commit", &self.commit), ("exported model", &self.export)] {
            if let Some(folder) = folder {
                heading(f, &format!("{name}: {folder}"))?;
            }
        }
        if !self.notes.is_empty() {
            heading(f, "notes")?;
        }
        // The end of a note is what to do.
        for note in &self.notes {
            for (number, part) in super::text::wrapped(note, WIDTH - 4).iter().enumerate() {
                line(f, &format!("{}{part}", if number == 0 { "  " } else { "    " }))?;
            }
        }
        Ok(())
    }
}

fn state_name(state: RunState) -> &'static str {
    match state {
        RunState::Running => "running",
        RunState::Stopped => "stopped",
        RunState::Finished => "finished",
        RunState::Failed => "failed",
        RunState::Lost => "lost",
    }
}

fn stage_line(row: &StageRow) -> String {
    let state = match row.state {
        StageState::Waiting => "waiting",
        StageState::Running => "running",
        StageState::Stopped => "stopped",
        StageState::Done => "done",
    };
    let steps = row.steps.map_or("?".to_string(), |steps| steps.to_string());
    let time = if row.state == StageState::Waiting { String::new() } else { duration(row.seconds) };
    let (name, kind) = (fitted(&row.name, 22), fitted(&row.kind, 13));
    format!("{name:<22} {kind:<13} {state:<8} {:>13} {time:>8}", format!("{}/{steps}", row.step))
}

fn actor_line(row: &ActorRow) -> String {
    let state = fitted(&format!("{} {}", row.state, duration(row.since)), 16);
    let mailbox = format!("{}/{}", row.mailbox, row.mailbox_bound);
    let last = row.last_message.as_deref().unwrap_or("-");
    format!(
        "{:<19} {state:<16} {mailbox:>8} {:>8} {:>4}  {last}",
        fitted(&row.name, 19),
        row.handled,
        row.restarts
    )
}

/// The last points as characters of rising weight.
fn spark(points: &[(u64, f64)], width: usize) -> String {
    let shown: Vec<f64> = points
        .iter()
        .rev()
        .take(width)
        .rev()
        .map(|(_, value)| *value)
        .filter(|v| v.is_finite())
        .collect();
    let low = shown.iter().copied().fold(f64::INFINITY, f64::min);
    let high = shown.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let level = |value: f64| {
        let share = if high > low { (value - low) / (high - low) } else { 0.0 };
        LEVELS[(share * (LEVELS.len() - 1) as f64).round() as usize] as char
    };
    shown.into_iter().map(level).collect()
}

fn heading(f: &mut Formatter<'_>, text: &str) -> Result {
    writeln!(f)?;
    line(f, text)
}

fn line(f: &mut Formatter<'_>, text: &str) -> Result {
    // What stands in a run came from files and from models.
    writeln!(f, "{}", fitted(text, WIDTH).trim_end())
}
