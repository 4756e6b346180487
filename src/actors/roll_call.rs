//! Roll call: every actor is asked how it is every few seconds, and one that does not answer is
//! named.
//!
//! Actors answer at once, also while the device is at work for minutes: heavy work has threads of
//! its own. One that does not answer has a handler that blocks or never ends, and the others on its
//! thread are silent with it, their deadlines too: the one whose handler runs is named, and a
//! silence longer than the deadline ends the run. Knows no actor by type.

use super::messages::{ActorState, AskStatus, Failure, FailureKind};
use super::port::{Desk, Port};
use crate::console::Event;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::time::{sleep, timeout};

/// Bounds of the time between two questions, and of that for an answer.
const PATIENCE: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(5)];

/// The questions to one actor.
pub struct RollCall {
    /// Asks it.
    pub status: Port<AskStatus>,
    /// What can be seen of it.
    pub desk: Arc<Desk>,
    /// Everybody on its thread.
    pub everybody: Vec<Arc<Desk>>,
    /// How long a silence may last.
    pub deadline: Duration,
}

impl RollCall {
    /// Asks until the actor is stopped or silent for too long. A silence is told once, to
    /// `on_silence`; its failure is the result.
    pub async fn keep(self, on_silence: impl Fn(Event)) -> Result<(), Failure> {
        let patience = (self.deadline / 4).clamp(PATIENCE[0], PATIENCE[1]);
        let mut silent_since: Option<Instant> = None;
        loop {
            sleep(patience).await;
            if self.desk.pulse().state == ActorState::Stopped {
                return Ok(());
            }
            let asked = Instant::now();
            if let Ok(Ok(_)) = timeout(patience, self.status.ask(AskStatus {})).await {
                silent_since = None;
                continue;
            }
            // The others on the thread of a culprit have nothing to answer for.
            let Some(reason) = self.reason(patience) else { continue };
            let Some(since) = silent_since else {
                // One question is not enough to end a run: the whole process may have been stopped.
                silent_since = Some(asked);
                let event = Event::new("silent").with("actor", self.desk.name());
                on_silence(event.with("reason", reason));
                continue;
            };
            if since.elapsed() > self.deadline {
                let (name, seconds) = (self.desk.name(), since.elapsed().as_secs_f64());
                let text = format!("{name} has not answered for {seconds:.0} s: {reason}");
                return Err(Failure::new(FailureKind::Actor, text));
            }
        }
    }

    /// Why it does not answer; `None` if somebody else is to blame.
    fn reason(&self, patience: Duration) -> Option<String> {
        let blocks = |desk: &Arc<Desk>| desk.running().filter(|(_, time)| *time >= patience);
        match blocks(&self.desk) {
            Some((message, time)) => {
                Some(format!("{message} has held its thread for {:.1} s", time.as_secs_f64()))
            }
            None if self.everybody.iter().any(|desk| blocks(desk).is_some()) => None,
            None => Some("no handler of it is running, and its thread does not come to it".into()),
        }
    }
}
