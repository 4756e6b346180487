//! Control: what ranks say to each other beside their numbers, over TCP: that they are alive, why all stop, and letters.
//!
//! A star: rank 0 has a connection with every other rank, and passes on why one stops, and how far each is. Every frame is sealed (`wire`). A rank that
//! dies is known by its connection, which closes; one that hangs by its silence, for it has a thread that speaks whatever else
//! it does. Letters are for whoever listens; what is in them is no concern of this file.
//!
//! Invariants:
//!   * no frame is acted on before its seal is opened; one that is refused stops the run by name
//!   * a rank that goes without leave, or is silent for the deadline, stops all others with the same words
//!   * letters on their way are bounded in number and size, and who sends more is refused; why all stop is never refused (`outbox`)

use super::link::Broken;
use super::outbox::{MOST_LETTERS, Next, Outbox, Untaken};
use super::progress::{Board, Seen, Waited};
use super::stop::Stop;
use super::wait::standing;
use super::wire::{LONGEST, Seal, WireError, decode, encode, read_frame};
use serde::{Deserialize, Serialize};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::{Duration, Instant};

/// Letters that may come before somebody listens.
const MOST_EARLY: usize = 64;

/// Longest time between two signs of life.
const BEAT: Duration = Duration::from_millis(250);

/// How long a rank that stops waits until its words are sent.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// What ranks say to each other.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Word {
    /// Still there, and so far, by rank: this one, and at rank 0 all that told it.
    Beat(Vec<(usize, Seen)>),
    /// All stop, for this reason.
    Stop(Broken),
    /// Goes, as agreed.
    Leave,
}

/// A message of some length from one rank to another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Letter {
    /// Number of the request that it belongs to.
    pub correlation: u64,
    /// MessagePack.
    pub body: Vec<u8>,
}

/// First byte of what a frame carries.
const WORD: u8 = 0;
const LETTER: u8 = 1;

/// A connection whose other end has shown who it is.
pub struct Connection {
    /// The other rank.
    pub rank: usize,
    /// How to call it in messages, e.g. "process 71 on node-3".
    pub name: String,
    /// The stream.
    pub stream: TcpStream,
    /// Seals what is sent.
    pub close: Seal,
    /// Opens what comes.
    pub open: Seal,
}

type Listener = Arc<dyn Fn(usize, Letter) -> Result<(), String> + Send + Sync>;

/// This rank's control links. They close when it is dropped.
pub struct Control {
    shared: Arc<Shared>,
}

struct Shared {
    rank: usize,
    stop: Arc<Stop>,
    board: Arc<Board>,
    deadline: Duration,
    peers: Vec<Peer>,
    listener: Mutex<Heard>,
}

/// Who listens, or what came before somebody did.
enum Heard {
    Early(Vec<(usize, Letter)>),
    By(Listener),
}

struct Peer {
    rank: usize,
    name: String,
    out: Arc<Outbox>,
    stream: TcpStream,
    /// When something came last.
    heard: Mutex<Instant>,
    has_left: AtomicBool,
}

impl Control {
    /// The links of `rank`. A rank that is silent for `deadline` is taken to hang.
    pub fn new(
        rank: usize,
        connections: Vec<Connection>,
        deadline: Duration,
        board: Arc<Board>,
        stop: Arc<Stop>,
    ) -> std::io::Result<Arc<Control>> {
        let (mut peers, mut ends) = (Vec::new(), Vec::new());
        for Connection { rank, name, stream, close, open } in connections {
            stream.set_nodelay(true)?;
            stream.set_read_timeout(None)?;
            stream.set_write_timeout(Some(deadline))?;
            let out = Arc::<Outbox>::default();
            ends.push((stream.try_clone()?, close, Arc::clone(&out), open));
            let (heard, has_left) = (Mutex::new(Instant::now()), AtomicBool::new(false));
            peers.push(Peer { rank, name, out, stream, heard, has_left });
        }
        let listener = Mutex::new(Heard::Early(Vec::new()));
        let shared = Arc::new(Shared { rank, stop, board, deadline, peers, listener });
        let beat = (deadline / 16).min(BEAT);
        // From a rank to rank 0, and from there to the others.
        shared.board.tells_within(beat * 2);
        for (at, (stream, close, outbox, open)) in ends.into_iter().enumerate() {
            let (reader, from) = (Arc::clone(&shared), stream.try_clone()?);
            let told = Told::new(&shared, at);
            spawn("control-out", move || speak(stream, close, &outbox, beat, told))?;
            spawn("control-in", move || reader.read_all(at, from, open))?;
        }
        let watcher = Arc::downgrade(&shared);
        spawn("control-watch", move || watch(&watcher, beat))?;
        let told = Arc::downgrade(&shared);
        shared.stop.on_stop(move |why| {
            if let Some(shared) = told.upgrade() {
                let word = carried(&Word::Stop(why.clone()));
                shared.peers.iter().for_each(|peer| peer.out.word_first(word.clone()));
            }
        });
        Ok(Arc::new(Control { shared }))
    }

    /// This rank.
    pub fn rank(&self) -> usize {
        self.shared.rank
    }

    /// The ranks that this one is connected with, and how they are called.
    pub fn peers(&self) -> impl Iterator<Item = (usize, &str)> {
        self.shared.peers.iter().map(|peer| (peer.rank, peer.name.as_str()))
    }

    /// For whom this rank waits, in which call and since when, if it has waited for a while.
    pub fn waits(&self) -> Option<(Waited, Instant)> {
        self.shared.board.waits_since(self.shared.rank)
    }

    /// What all waits of this rank look at.
    pub fn stop(&self) -> &Arc<Stop> {
        &self.shared.stop
    }

    /// Sends a letter; does not wait until it is there.
    pub fn send(&self, to: usize, letter: &Letter) -> Result<(), Broken> {
        if let Some(why) = self.shared.stop.why() {
            return Err(why);
        }
        let failed = |why: String| Broken::Failed { rank: self.shared.rank, why, code: 1 };
        if letter.body.len() + 1024 > LONGEST {
            let (bytes, most) = (letter.body.len(), LONGEST);
            return Err(failed(format!(
                "a letter to rank {to}: {}",
                WireError::Long { bytes, most }
            )));
        }
        let peer = self.shared.peers.iter().find(|peer| peer.rank == to);
        let peer = peer.expect("letters go to ranks that this one is connected with");
        let mut carried = Vec::with_capacity(9 + letter.body.len());
        carried.push(LETTER);
        carried.extend_from_slice(&letter.correlation.to_le_bytes());
        carried.extend_from_slice(&letter.body);
        peer.out.letter(carried).map_err(|untaken| match untaken {
            Untaken::Full => failed(format!(
                "{MOST_LETTERS} letters to rank {to} are on their way; it takes none"
            )),
            Untaken::Closed => self.shared.gone(peer),
        })
    }

    /// Hands every letter to `listen`, on the thread that reads: it must not wait. What it refuses stops the run.
    pub fn listen(
        &self,
        listen: impl Fn(usize, Letter) -> Result<(), String> + Send + Sync + 'static,
    ) {
        let listen: Listener = Arc::new(listen);
        let mut heard = lock(&self.shared.listener);
        if let Heard::Early(early) = &mut *heard {
            for (from, letter) in std::mem::take(early) {
                self.shared.refused(from, listen(from, letter));
            }
        }
        *heard = Heard::By(listen);
    }

    /// Tells the others that this rank goes as agreed: no silence of theirs or its own is a fault any more.
    pub fn leave(&self) {
        for peer in &self.shared.peers {
            peer.has_left.store(true, Ordering::SeqCst);
            peer.out.word(carried(&Word::Leave));
        }
    }

    /// Waits a moment until what was said is on its way.
    pub fn flush(&self) {
        let until = Instant::now() + LAST_WORDS;
        self.shared.peers.iter().for_each(|peer| peer.out.flush(until));
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.flush();
        for peer in &self.shared.peers {
            peer.has_left.store(true, Ordering::SeqCst);
            peer.out.close();
            let _ = peer.stream.shutdown(Shutdown::Both);
        }
    }
}

/// What a frame with this word carries.
fn carried(word: &Word) -> Vec<u8> {
    [&[WORD], &encode(word)[..]].concat()
}

impl Shared {
    fn gone(&self, peer: &Peer) -> Broken {
        let found = format!("the control link of {} with rank {} closed", peer.name, self.rank);
        Broken::Gone { rank: self.rank, gone: peer.rank, found }
    }

    /// Reads what a peer says until it goes.
    fn read_all(&self, at: usize, stream: TcpStream, mut open: Seal) {
        let peer = &self.peers[at];
        let mut stream = Listening { stream, heard: &peer.heard };
        loop {
            let frame = match read_frame(&mut stream, LONGEST) {
                Ok(Some(frame)) => frame,
                Ok(None) => break,
                Err(error) if error.kind() == std::io::ErrorKind::InvalidData => {
                    return self.refuse(peer, &error.to_string());
                }
                Err(_) => break,
            };
            let acted = open.open(&frame).map_err(|error| error.to_string());
            if let Err(why) = acted.and_then(|carried| self.act(peer, carried)) {
                return self.refuse(peer, &why);
            }
        }
        if !peer.has_left.load(Ordering::SeqCst) {
            self.stop.set(&self.gone(peer));
        }
    }

    fn act(&self, peer: &Peer, carried: &[u8]) -> Result<(), String> {
        match carried.split_first() {
            Some((&WORD, word)) => match decode(word).map_err(|error| error.to_string())? {
                Word::Beat(all) => {
                    // Rank 0 knows of all, the others of themselves.
                    let is_known = |rank| peer.rank == 0 || rank == peer.rank;
                    all.into_iter()
                        .filter(|(rank, _)| *rank != self.rank && is_known(*rank))
                        .for_each(|(rank, seen)| self.board.note(rank, seen));
                }
                Word::Stop(why) => drop(self.stop.set(&why)),
                Word::Leave => peer.has_left.store(true, Ordering::SeqCst),
            },
            Some((&LETTER, letter)) if letter.len() >= 8 => {
                let (correlation, body) = letter.split_at(8);
                let correlation = u64::from_le_bytes(correlation.try_into().expect("8 bytes"));
                self.hand_out(peer.rank, Letter { correlation, body: body.to_vec() })?;
            }
            _ => return Err("a frame of no known kind".to_string()),
        }
        Ok(())
    }

    fn hand_out(&self, from: usize, letter: Letter) -> Result<(), String> {
        let mut heard = lock(&self.listener);
        match &mut *heard {
            Heard::By(listen) => {
                let listen = Arc::clone(listen);
                drop(heard);
                listen(from, letter)
            }
            Heard::Early(early) if early.len() < MOST_EARLY => {
                early.push((from, letter));
                Ok(())
            }
            Heard::Early(_) => Err(format!("{MOST_EARLY} letters came before anybody listened")),
        }
    }

    fn refused(&self, from: usize, taken: Result<(), String>) {
        let peer = self.peers.iter().find(|peer| peer.rank == from).expect("a letter has a sender");
        if let Err(why) = taken {
            self.refuse(peer, &why);
        }
    }

    fn refuse(&self, peer: &Peer, why: &str) {
        let why = format!("control link with rank {}, {}: {why}; refused", peer.rank, peer.name);
        self.stop.set(&Broken::Failed { rank: self.rank, why, code: 1 });
        let _ = peer.stream.shutdown(Shutdown::Both);
    }

    /// Names a peer that has been silent for the deadline.
    fn look(&self) {
        for peer in &self.peers {
            let silence = lock(&peer.heard).elapsed();
            if silence > self.deadline && !peer.has_left.load(Ordering::SeqCst) {
                self.stop.set(&Broken::Silent {
                    rank: self.rank,
                    missing: peer.rank,
                    name: peer.name.clone(),
                    seconds: self.deadline.as_secs(),
                    last: standing(&self.board, peer.rank),
                });
            }
        }
    }
}

/// What a peer is told of how far ranks are, and what it was told last.
struct Told {
    board: Arc<Board>,
    ranks: Vec<usize>,
    last: Vec<Seen>,
}

impl Told {
    fn new(shared: &Shared, to: usize) -> Told {
        let (own, other) = (shared.rank, shared.peers[to].rank);
        let ranks: Vec<usize> = match own {
            0 => (0..shared.board.ranks()).filter(|rank| *rank != other).collect(),
            own => vec![own],
        };
        Told { board: Arc::clone(&shared.board), last: vec![Seen::default(); ranks.len()], ranks }
    }

    /// What changed since.
    fn news(&mut self) -> Word {
        let mut news = Vec::new();
        for (rank, last) in self.ranks.iter().zip(&mut self.last) {
            let seen = self.board.seen(*rank);
            if seen != *last {
                news.push((*rank, seen.clone()));
                *last = seen;
            }
        }
        Word::Beat(news)
    }
}

/// Writes what is to be said to a peer, and every so often a sign of life.
fn speak(mut stream: TcpStream, mut close: Seal, outbox: &Outbox, beat: Duration, mut told: Told) {
    let mut next = Instant::now() + beat;
    loop {
        let carried = match outbox.next(next) {
            Next::Carried(carried) => carried,
            Next::Nothing => {
                next = Instant::now() + beat;
                carried(&told.news())
            }
            Next::Closed => return,
        };
        if stream.write_all(&close.close(&carried)).is_err() {
            // That the other end is closed, or silent, is found out by whoever reads.
            return outbox.close();
        }
    }
}

/// Looks for silence every so often, for as long as the links are there.
fn watch(shared: &Weak<Shared>, every: Duration) {
    let mut last = Instant::now();
    loop {
        std::thread::sleep(every);
        let Some(shared) = shared.upgrade() else { return };
        // Whoever was stopped itself has heard nobody meanwhile.
        if last.elapsed() > shared.deadline / 2 {
            shared.peers.iter().for_each(|peer| *lock(&peer.heard) = Instant::now());
        }
        last = Instant::now();
        shared.look();
    }
}

/// A stream that notes when something comes.
struct Listening<'a> {
    stream: TcpStream,
    heard: &'a Mutex<Instant>,
}

impl Read for Listening<'_> {
    fn read(&mut self, to: &mut [u8]) -> std::io::Result<usize> {
        let bytes = self.stream.read(to)?;
        *lock(self.heard) = Instant::now();
        Ok(bytes)
    }
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> std::io::Result<()> {
    std::thread::Builder::new().name(name.to_string()).spawn(work).map(drop)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}
