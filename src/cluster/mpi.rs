//! Mpi: ranks that are processes, started by mpirun or srun.
//!
//! A thread of its own makes every call of the library (`mpi_calls`), none of which blocks: `Isend`, `Improbe`, `Imrecv` and
//! `Test`. So a rank that has sent goes on computing and its frame still arrives, every wait ends at its deadline or with the
//! run, and the library needs no more than `MPI_THREAD_FUNNELED`. The thread looks less often the longer nothing comes: it
//! sleeps for an eighth of the silence.
//!
//! A frame travels as its bytes, then lane and call in MessagePack, then their length: nothing is copied where it is sent or
//! taken. Frames longer than a message of MPI may be go in pieces.
//!
//! Invariant: frames of a rank are handed out in the order in which they were sent, whichever transfer ends first.

use super::link::{Broken, Call, Frame, Lane, Link};
use super::mpi_calls::{Transfer, World};
use super::progress::Board;
use super::stop::Stop;
use super::wire::{decode, encode};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Bytes of one message of MPI at most, whose counts are 31 bits.
const PIECE: usize = 1 << 30;

/// Tags of messages: the last piece of a frame, or one that others follow.
const LAST: i32 = 1;
const MORE: i32 = 2;

/// Longest sleep of the thread; shorter while somebody waits, and while a transfer is under way, which only the thread moves.
const SLEEP: Duration = Duration::from_millis(5);
const SLEEP_IN_WAIT: Duration = Duration::from_millis(1);
const SLEEP_IN_TRANSFER: Duration = Duration::from_micros(100);

/// Below this the thread yields rather than sleeps: a sleep takes longer than it says.
const SHORTEST_SLEEP: Duration = Duration::from_micros(10);

/// How long an error of the library waits for a control link to name who is gone.
const GRACE: Duration = Duration::from_secs(2);

/// This process's end of the links.
pub struct Mpi {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
    library: String,
}

/// What the thread and the callers share.
struct Shared {
    rank: usize,
    stop: Arc<Stop>,
    outbox: Mutex<Outbox>,
    /// Something is in the outbox, or somebody began to wait.
    changed: Condvar,
    /// By sender.
    inboxes: Vec<Inbox>,
    waiting: AtomicUsize,
    board: Arc<Board>,
}

#[derive(Default)]
struct Outbox {
    frames: VecDeque<(usize, Vec<u8>)>,
    /// Until when to try to take leave of the others.
    leave: Option<Instant>,
}

#[derive(Default)]
struct Inbox {
    frames: Mutex<VecDeque<Frame>>,
    arrived: Condvar,
}

impl Mpi {
    /// Starts the library, which must be up by `deadline`; `stop` is what all waits of this rank look at.
    pub fn start(deadline: Duration, stop: Arc<Stop>) -> Result<Arc<Mpi>, String> {
        Mpi::start_in_pieces(deadline, stop, PIECE)
    }

    /// The same, with pieces of so many bytes.
    pub fn start_in_pieces(
        deadline: Duration,
        stop: Arc<Stop>,
        piece: usize,
    ) -> Result<Arc<Mpi>, String> {
        let (ready, started) = sync_channel(1);
        let own = Arc::clone(&stop);
        let work = move || {
            if let Some((world, shared)) = begin(&ready, own) {
                Driver::new(world, shared, piece).drive();
            }
        };
        let thread = std::thread::Builder::new().name("mpi".to_string()).spawn(work);
        let thread = thread.map_err(|error| format!("the system gives no thread: {error}"))?;
        let late = |_| {
            let seconds = deadline.as_secs();
            format!("MPI has not started within {seconds} s: a process or a host does not answer")
        };
        let (shared, library) = started.recv_timeout(deadline).map_err(late)??;
        // Whoever waits for a frame hears of a stop at once.
        let waiters = Arc::downgrade(&shared);
        stop.on_stop(move |_| {
            for inbox in waiters.upgrade().iter().flat_map(|shared| &shared.inboxes) {
                let _frames = lock(&inbox.frames);
                inbox.arrived.notify_all();
            }
        });
        Ok(Arc::new(Mpi { shared, thread: Mutex::new(Some(thread)), library }))
    }

    /// How many ranks there are.
    pub fn ranks(&self) -> usize {
        self.shared.inboxes.len()
    }

    /// The library by name and version, e.g. "Open MPI v4.1.4".
    pub fn library(&self) -> &str {
        &self.library
    }

    /// Takes leave of the other ranks and closes the library, once all of them do; false if one does not by then.
    pub fn leave(&self, deadline: Duration) -> bool {
        lock(&self.shared.outbox).leave = Some(Instant::now() + deadline);
        self.shared.changed.notify_all();
        let thread = lock(&self.thread).take();
        thread.is_some_and(|thread| thread.join().is_ok()) && self.shared.stop.why().is_none()
    }
}

impl Link for Mpi {
    fn rank(&self) -> usize {
        self.shared.rank
    }

    fn send(&self, to: usize, frame: Frame) -> Result<(), Broken> {
        if let Some(why) = self.shared.stop.why() {
            return Err(why);
        }
        if to == self.shared.rank {
            self.shared.hand_out(to, frame);
            return Ok(());
        }
        let Frame { lane, call, mut bytes } = frame;
        let head = encode(&(lane, call));
        bytes.extend_from_slice(&head);
        bytes.extend_from_slice(&(head.len() as u32).to_le_bytes());
        lock(&self.shared.outbox).frames.push_back((to, bytes));
        self.shared.changed.notify_all();
        Ok(())
    }

    fn take(
        &self,
        from: usize,
        lane: Lane,
        _: &Call,
        until: Instant,
    ) -> Result<Option<Frame>, Broken> {
        let shared = &self.shared;
        let inbox = &shared.inboxes[from];
        let take = |frames: &mut VecDeque<Frame>| {
            let place = frames.iter().position(|frame| frame.lane == lane)?;
            frames.remove(place)
        };
        if let Some(frame) = take(&mut lock(&inbox.frames)) {
            return Ok(Some(frame));
        }
        let _waiting = Waiting::new(shared);
        let mut frames = lock(&inbox.frames);
        loop {
            if let Some(frame) = take(&mut frames) {
                return Ok(Some(frame));
            }
            if let Some(why) = shared.stop.why() {
                return Err(why);
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            let waited = inbox.arrived.wait_timeout(frames, left);
            frames = waited.unwrap_or_else(|e| e.into_inner()).0;
        }
    }

    fn board(&self) -> &Arc<Board> {
        &self.shared.board
    }

    fn stop(&self, why: &Broken) {
        self.shared.stop.set(why);
    }

    fn stopped(&self) -> Option<Broken> {
        self.shared.stop.why()
    }
}

impl Shared {
    fn hand_out(&self, from: usize, frame: Frame) {
        let inbox = &self.inboxes[from];
        lock(&inbox.frames).push_back(frame);
        inbox.arrived.notify_all();
    }
}

/// Somebody waits for a frame, so that the thread looks often.
struct Waiting<'a>(&'a Shared);

impl Waiting<'_> {
    fn new(shared: &Shared) -> Waiting<'_> {
        if shared.waiting.fetch_add(1, Ordering::SeqCst) == 0 {
            // Under the lock, or the thread might just have looked and go to sleep.
            let _outbox = lock(&shared.outbox);
            shared.changed.notify_all();
        }
        Waiting(shared)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::SeqCst);
    }
}

/// What the thread works with.
struct Driver {
    world: World,
    shared: Arc<Shared>,
    piece: usize,
    sending: Vec<Transfer>,
    /// By sender, in the order in which they were sent.
    taking: Vec<VecDeque<Transfer>>,
    /// By sender, the pieces so far of a frame.
    begun: Vec<Vec<u8>>,
    last_event: Instant,
    /// The library's first error, and since when.
    error: Option<(Instant, String)>,
}

impl Driver {
    fn new(world: World, shared: Arc<Shared>, piece: usize) -> Driver {
        let ranks = shared.inboxes.len();
        let (taking, begun) = (0..ranks).map(|_| (VecDeque::new(), Vec::new())).unzip();
        let (sending, last_event) = (Vec::new(), Instant::now());
        Driver { world, shared, piece, sending, taking, begun, last_event, error: None }
    }

    /// Moves frames until leave is taken.
    fn drive(&mut self) {
        let shared = Arc::clone(&self.shared);
        loop {
            let (frames, leave) = {
                let mut outbox = lock(&shared.outbox);
                let is_quiet = outbox.frames.is_empty() && outbox.leave.is_none();
                let pause = self.pause(shared.waiting.load(Ordering::SeqCst) > 0);
                if is_quiet && pause >= SHORTEST_SLEEP {
                    let slept = shared.changed.wait_timeout(outbox, pause);
                    outbox = slept.unwrap_or_else(|e| e.into_inner()).0;
                }
                (std::mem::take(&mut outbox.frames), outbox.leave)
            };
            if let Some(until) = leave {
                return self.take_leave(until, frames);
            }
            let is_idle = frames.is_empty();
            let moved = self.step(frames);
            self.settle(moved);
            if is_idle && self.pause(false) < SHORTEST_SLEEP {
                std::thread::yield_now();
            }
        }
    }

    /// How long to sleep if nothing is to be sent.
    fn pause(&self, somebody_waits: bool) -> Duration {
        let silence = self.last_event.elapsed() / 8;
        let is_moving =
            !self.sending.is_empty() || self.taking.iter().any(|queue| !queue.is_empty());
        match (is_moving, somebody_waits) {
            (true, _) => silence.min(SLEEP_IN_TRANSFER),
            (false, true) => silence.min(SLEEP_IN_WAIT),
            (false, false) => silence.min(SLEEP),
        }
    }

    /// Sends these frames, takes what has come, ends what is through; true if anything happened.
    fn step(&mut self, frames: VecDeque<(usize, Vec<u8>)>) -> Result<bool, String> {
        let mut is_event = !frames.is_empty();
        for (to, bytes) in frames {
            self.send(to, bytes)?;
        }
        while let Some((from, transfer)) = self.world.take()? {
            self.taking[from].push_back(transfer);
            is_event = true;
        }
        let before = self.sending.len();
        let mut failed = None;
        self.sending.retain_mut(|transfer| match transfer.is_through() {
            Ok(is_through) => !is_through,
            Err(error) => {
                failed = Some(error);
                true
            }
        });
        if let Some(error) = failed {
            return Err(error);
        }
        is_event |= self.sending.len() < before;
        for from in 0..self.taking.len() {
            // Only from the front: a short frame that came whole waits for the long one before it.
            while let Some(transfer) = self.taking[from].front_mut()
                && transfer.is_through()?
            {
                let transfer = self.taking[from].pop_front().expect("it was there");
                let tag = transfer.tag;
                self.arrived(from, transfer.into_bytes(), tag)?;
                is_event = true;
            }
        }
        Ok(is_event)
    }

    fn send(&mut self, to: usize, bytes: Vec<u8>) -> Result<(), String> {
        if bytes.len() <= self.piece {
            self.sending.push(self.world.send(to, bytes, LAST)?);
            return Ok(());
        }
        let pieces = bytes.len().div_ceil(self.piece);
        for (number, piece) in bytes.chunks(self.piece).enumerate() {
            let tag = if number + 1 == pieces { LAST } else { MORE };
            self.sending.push(self.world.send(to, piece.to_vec(), tag)?);
        }
        Ok(())
    }

    fn arrived(&mut self, from: usize, bytes: Vec<u8>, tag: i32) -> Result<(), String> {
        let whole = match (tag, self.begun[from].is_empty()) {
            (MORE, _) => {
                self.begun[from].extend_from_slice(&bytes);
                return Ok(());
            }
            (_, true) => bytes,
            (_, false) => {
                let mut whole = std::mem::take(&mut self.begun[from]);
                whole.extend_from_slice(&bytes);
                whole
            }
        };
        let frame = frame_of(whole).map_err(|why| format!("{why} from rank {from}"))?;
        self.shared.hand_out(from, frame);
        Ok(())
    }

    /// Notes what a step came to. An error is told only if nobody names who is gone: the control links know better.
    fn settle(&mut self, moved: Result<bool, String>) {
        match moved {
            Ok(false) => {}
            Ok(true) => {
                self.last_event = Instant::now();
                // A long frame that comes in pieces is progress, too.
                self.shared.board.moved(self.shared.rank);
            }
            Err(text) => drop(self.error.get_or_insert((Instant::now(), text))),
        }
        if let Some((since, text)) = &self.error
            && since.elapsed() > GRACE
        {
            let why = format!("MPI failed: {text}");
            let rank = self.shared.rank;
            self.shared.stop.set(&Broken::Failed { rank, why, code: 1 });
        }
    }

    /// Sends what is left, waits for all others to come here, and closes the library.
    fn take_leave(&mut self, until: Instant, frames: VecDeque<(usize, Vec<u8>)>) {
        let is_whole = |driver: &Driver| {
            Instant::now() < until && driver.shared.stop.why().is_none() && driver.error.is_none()
        };
        let mut moved = self.step(frames);
        loop {
            self.settle(moved);
            if !is_whole(self) {
                return;
            }
            if self.sending.is_empty() {
                break;
            }
            std::thread::sleep(SLEEP_IN_TRANSFER);
            moved = self.step(VecDeque::new());
        }
        let Ok(mut all_here) = self.world.barrier() else { return };
        while let Ok(false) = all_here.is_through() {
            if !is_whole(self) {
                return;
            }
            std::thread::sleep(SLEEP_IN_TRANSFER);
        }
        self.world.finalize();
    }
}

/// Reads lane and call off the end of what has come.
fn frame_of(mut bytes: Vec<u8>) -> Result<Frame, String> {
    let broken = || "a frame that cannot be read".to_string();
    let at = bytes.len().checked_sub(4).ok_or_else(broken)?;
    let length = u32::from_le_bytes(bytes[at..].try_into().expect("4 bytes")) as usize;
    let head = at.checked_sub(length).ok_or_else(broken)?;
    let (lane, call) = decode(&bytes[head..at]).map_err(|error| error.to_string())?;
    bytes.truncate(head);
    Ok(Frame { lane, call, bytes })
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

/// What the thread has to begin with: the shared state, and the library's name.
type Started = Result<(Arc<Shared>, String), String>;

/// Starts the library on this thread, and says so.
fn begin(ready: &SyncSender<Started>, stop: Arc<Stop>) -> Option<(World, Arc<Shared>)> {
    let world = match World::start() {
        Ok(world) => world,
        Err(error) => {
            let _ = ready.send(Err(error));
            return None;
        }
    };
    let shared = Arc::new(Shared {
        rank: world.rank(),
        stop,
        outbox: Mutex::default(),
        changed: Condvar::new(),
        inboxes: (0..world.ranks()).map(|_| Inbox::default()).collect(),
        waiting: AtomicUsize::new(0),
        board: Board::new(world.ranks()),
    });
    // If nobody takes it the deadline has passed.
    ready.send(Ok((Arc::clone(&shared), World::library()))).ok()?;
    Some((world, shared))
}
