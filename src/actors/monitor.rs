//! Monitor: the journal's one writer, the board's keeper, and what a person sees.
//!
//! Events come as acknowledged messages and are written before the reply; what actors are doing is
//! read from their desks, where the latest value wins. Knows nothing of what an event means to the
//! run.
//!
//! Invariants:
//!   * a step's rollouts are in their file before its line is in the journal, and in it once also
//!     after a resume
//!   * what the journal leaves out (a step that is computed again) is not shown either

use super::messages::*;
use super::port::Desk;
use super::post::{Post, answers_for_itself, aside};
use super::rollout_file::RolloutFile;
use crate::config::ConsoleMode;
use crate::console::board::{ActorRow, Board, JOURNAL_FILE, WaitRow};
use crate::console::{BoardWriter, Event, Journal, Plain, read_events, write_curves};
use actix::{AsyncContext, Handler, ResponseActFuture};
use anyhow::Result;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// How often the board looks at the desks.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);

/// See the module.
pub struct Monitor {
    post: Post,
    notes: Arc<Notes>,
}

impl Monitor {
    /// A monitor that goes on with these notes.
    pub fn new(post: Post, notes: Arc<Notes>) -> Monitor {
        Monitor { post, notes }
    }
}

// The interval lives in the actor's context and ends with it.
answers_for_itself!(Monitor, |context| context
    .run_interval(LOOK_INTERVAL, |monitor, _| monitor.notes.look()));

impl Handler<Record> for Monitor {
    type Result = ResponseActFuture<Self, Result<(), Failure>>;

    fn handle(&mut self, message: Record, _: &mut Self::Context) -> Self::Result {
        let notes = Arc::clone(&self.notes);
        self.post.work(Record::NAME, aside(move || notes.record(&message.event)))
    }
}

impl Handler<RecordRollouts> for Monitor {
    type Result = ResponseActFuture<Self, Result<(), Failure>>;

    fn handle(&mut self, message: RecordRollouts, _: &mut Self::Context) -> Self::Result {
        let notes = Arc::clone(&self.notes);
        self.post.work(RecordRollouts::NAME, aside(move || notes.record_rollouts(&message)))
    }
}

impl Handler<SyncJournal> for Monitor {
    type Result = ResponseActFuture<Self, Result<(), Failure>>;

    fn handle(&mut self, _: SyncJournal, _: &mut Self::Context) -> Self::Result {
        let notes = Arc::clone(&self.notes);
        self.post.work(SyncJournal::NAME, aside(move || notes.sync()))
    }
}

/// What has been noted of a run. It outlives the actor, so that a new one goes on with it.
pub struct Notes {
    folder: PathBuf,
    desks: Vec<Arc<Desk>>,
    mailbox: usize,
    /// `None` for a run that keeps no journal.
    open: Mutex<Option<Open>>,
}

struct Open {
    journal: Journal,
    board: Board,
    writer: BoardWriter,
    plain: Option<Plain>,
    rollouts: Option<RolloutFile>,
}

impl Notes {
    /// Opens the journal of the run in `folder`; without a console mode nothing is kept. `is_launched` says whether the process
    /// is one of several.
    pub fn open(
        mode: Option<ConsoleMode>,
        folder: &Path,
        desks: Vec<Arc<Desk>>,
        mailbox: usize,
        budget: Option<u64>,
        is_launched: bool,
    ) -> Result<Notes> {
        let open = match mode {
            None => None,
            Some(mode) => {
                let path = folder.join(JOURNAL_FILE);
                let journal = Journal::open(&path)?;
                let mut board = Board { memory_budget: budget, ..Board::new(folder) };
                let mut plain =
                    (mode != ConsoleMode::Off).then(|| Plain::stdout(folder, is_launched));
                for event in read_events(&path)? {
                    board.take(&event);
                    if let Some(plain) = &mut plain {
                        plain.recall(&event);
                    }
                }
                Some(Open {
                    journal,
                    board,
                    writer: BoardWriter::new(folder),
                    plain,
                    rollouts: None,
                })
            }
        };
        Ok(Notes { folder: folder.to_path_buf(), desks, mailbox, open: Mutex::new(open) })
    }

    /// Brings the journal to the disk.
    fn sync(&self) -> Result<()> {
        let mut open = self.open.lock().expect(PROOF);
        open.as_mut().map_or(Ok(()), |open| open.journal.sync())
    }

    /// Writes an event. What no resumed run would make again is on the disk when this returns.
    fn record(&self, event: &Event) -> Result<()> {
        let mut open = self.open.lock().expect(PROOF);
        let Some(open) = &mut *open else { return Ok(()) };
        let is_new = open.journal.append(event)?;
        if let Some(plain) = &mut open.plain
            && (is_new || event.name() == "stage-start")
        {
            // The heading of a stage is wanted also when the run goes on in its middle.
            plain.show(event);
        }
        if !is_new {
            return Ok(());
        }
        open.board.take(event);
        if event.name() == "end" {
            self.refresh(&mut open.board);
            open.writer.write(&open.board)?;
        }
        if ["end", "stage-end"].contains(&event.name()) {
            write_curves(&self.folder)?;
        }
        Ok(())
    }

    /// Writes a step's rollouts unless the journal has the step.
    fn record_rollouts(&self, message: &RecordRollouts) -> Result<()> {
        let mut open = self.open.lock().expect(PROOF);
        let Some(Open { journal, rollouts, .. }) = &mut *open else { return Ok(()) };
        let last = journal.last_step(&message.stage).unwrap_or(0);
        if message.step <= last {
            return Ok(());
        }
        let file = match rollouts {
            Some(file) if file.stage() == message.stage => file,
            other => other.insert(RolloutFile::open(&self.folder, &message.stage, last)?),
        };
        file.append(message.step, &message.groups)
    }

    /// Brings the board's actors up to date and offers it to its file.
    fn look(&self) {
        // While an event is being written the actors' thread must not wait for the disk.
        let Ok(mut open) = self.open.try_lock() else { return };
        let Some(Open { board, writer, .. }) = &mut *open else { return };
        self.refresh(board);
        // The board is made again in half a second; a full disk is reported where something is lost
        // by it.
        let _ = writer.offer(board, Instant::now());
    }

    fn refresh(&self, board: &mut Board) {
        let pulses: Vec<Pulse> = self.desks.iter().map(|desk| desk.pulse()).collect();
        if let Some(phase) = pulses.iter().find_map(|pulse| pulse.doing.clone()) {
            board.phase = phase;
        }
        board.actors = pulses.into_iter().map(|pulse| row(pulse, self.mailbox)).collect();
    }
}

const PROOF: &str = "a panic here ends the run: its journal could not be trusted";

fn row(pulse: Pulse, mailbox: usize) -> ActorRow {
    let wait =
        |wait: Wait| WaitRow { actor: wait.actor, message: wait.message, seconds: wait.seconds };
    ActorRow {
        name: pulse.actor,
        state: pulse.state.word().to_string(),
        since: pulse.since,
        mailbox: pulse.queued,
        mailbox_bound: mailbox as u64,
        handled: pulse.handled,
        last_message: pulse.last_message,
        restarts: pulse.restarts,
        waits: pulse.waits.into_iter().map(wait).collect(),
        reason: pulse.reason,
    }
}
