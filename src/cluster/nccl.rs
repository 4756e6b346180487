//! Nccl: long payloads of exchanges go between the GPUs of the ranks, everything else over the link below.
//!
//! One communicator for all ranks, made when they join: rank 0's unique id, and which GPU everybody has, go over the link in
//! one agreement, so that a rank without GPU or library ends the run on all of them in the same words. Of NCCL's operations
//! only send and receive are used, those of a call as one group; which pairs take part is known from the frames that announced
//! them. `ncclAllReduce` is not: its algorithm and the size of a message choose the order in which it adds, and so the bits.
//!
//! No call of a communicator waits. It is looked at until it is through, or the run stops, or nobody whom it
//! is with made progress for the deadline; then it is aborted.
//!
//! Invariants:
//!   * one exchange at a time; ranks that exchange are at the same call
//!   * after an error there is no communicator any more

use super::carrier::Carrier;
use super::collective::Group;
use super::link::{Broken, Call, Frame, Lane, Link};
use super::progress::{Board, Told};
use super::wait::{Stillness, standing};
use crate::config::Fault;
use rehearsal_kernels::HostMemory;
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Bytes below which a payload is sooner there over the link: two copies and a kernel on each side take longer.
const SHORTEST: usize = 64 << 10;

/// Longest pause between two looks at a communicator; shorter ones grow with the time that has passed.
const PAUSE: Duration = Duration::from_millis(1);

/// Below this a look yields rather than sleeps: a sleep takes longer than it says.
const SHORTEST_PAUSE: Duration = Duration::from_micros(10);

/// How long an exchange takes whose other ranks have come; longer is worth telling.
const SOON: Duration = Duration::from_millis(100);

/// How long an error of NCCL waits for a control link to name who is gone.
const GRACE: Duration = Duration::from_secs(2);

/// A rank's GPU, as far as joining needs it; NCCL's own is `rehearsal_kernels::cuda::NcclDevice`.
pub trait Device {
    /// What it makes.
    type Communicator: Communicator;
    /// How a person knows it, e.g. "cuda 0 (name)".
    fn name(&self) -> String;
    /// What no other GPU has.
    fn uuid(&self) -> Result<[u8; 16], String>;
    /// Makes an id for a communicator of several ranks.
    fn unique_id(&self) -> Result<Vec<u8>, String>;
    /// Begins to join the others; through once `poll` says so.
    fn connect(self, id: &[u8], rank: usize, ranks: usize) -> Result<Self::Communicator, String>;
    /// Memory of the host that the GPU reads by itself.
    fn host_memory(&self) -> Arc<dyn HostMemory>;
}

/// A rank's end of a communicator. None of its calls waits.
pub trait Communicator: Send {
    /// Begins an exchange: payloads to ranks, and as many bytes from ranks.
    fn begin(&mut self, out: &[(usize, Vec<u8>)], into: &[(usize, usize)]) -> Result<(), String>;
    /// Whether what was begun, or joining, is through.
    fn poll(&mut self) -> Result<bool, String>;
    /// What came in the exchange that is through.
    fn take(&mut self) -> Vec<Vec<u8>>;
    /// Ends whatever is under way.
    fn abort(&mut self);
}

/// See the module.
pub struct Nccl<C> {
    below: Arc<dyn Link>,
    communicator: Mutex<Option<C>>,
    host: Arc<dyn HostMemory>,
    /// Every rank's GPU.
    gpus: Vec<String>,
}

/// What a rank tells of itself.
#[derive(Serialize, Deserialize)]
struct Gpu {
    name: String,
    uuid: [u8; 16],
    /// Of rank 0.
    id: Option<Vec<u8>>,
}

impl<C: Communicator> Nccl<C> {
    /// Joins the ranks of a link with the GPU that `open` finds; all of them do, or none.
    pub fn join<D: Device<Communicator = C>>(
        below: Arc<dyn Link>,
        ranks: usize,
        deadline: Duration,
        open: impl FnOnce() -> Result<D, String>,
    ) -> anyhow::Result<Nccl<C>> {
        let rank = below.rank();
        let opened = open().and_then(|device| {
            let id = if rank == 0 { Some(device.unique_id()?) } else { None };
            let gpu = Gpu { name: device.name(), uuid: device.uuid()?, id };
            Ok((device, super::wire::encode(&gpu)))
        });
        let (device, told) = match opened {
            Ok((device, told)) => (Some(device), Ok(told)),
            Err(why) => (None, Err(Fault::user(refusal(&why)))),
        };
        let all = Group::new(below.clone(), (0..ranks).collect(), deadline);
        let all = all.agree("the ranks' GPUs", told)?;
        let gpus: Vec<Gpu> = all
            .iter()
            .map(|told| super::wire::decode(told).map_err(anyhow::Error::new))
            .collect::<anyhow::Result<_>>()?;
        require_one_each(&gpus)?;
        let device = device.expect("who has none has not agreed");
        let id = gpus[0].id.as_deref().expect("rank 0 tells an id");
        let host = device.host_memory();
        let failed = |why: String| {
            let why = Broken::Failed { rank, why: format!("NCCL: {why}"), code: 1 };
            below.stop(&why);
            why
        };
        let communicator = device.connect(id, rank, ranks).map_err(failed)?;
        let nccl = Nccl {
            below,
            communicator: Mutex::new(Some(communicator)),
            host,
            gpus: gpus.into_iter().map(|gpu| gpu.name).collect(),
        };
        let others = (0..ranks).collect();
        nccl.with("joining its communicator", others, deadline, |_| Ok(()), |_| ())?;
        Ok(nccl)
    }

    /// Every rank's GPU, in order.
    pub fn gpus(&self) -> &[String] {
        &self.gpus
    }

    /// Begins something with other ranks and waits until it is through: for as long as one of them makes progress, as it may
    /// not have come yet, and then the deadline.
    fn with<T>(
        &self,
        what: &str,
        ranks: Vec<usize>,
        deadline: Duration,
        begin: impl FnOnce(&mut C) -> Result<(), String>,
        end: impl FnOnce(&mut C) -> T,
    ) -> Result<T, Broken> {
        let mut others = Others::new(&self.below, ranks, deadline);
        let mut place = self.communicator.lock().unwrap_or_else(|e| e.into_inner());
        let gone = || self.failed(format!("NCCL was ended before {what}"));
        let communicator =
            place.as_mut().ok_or_else(|| self.below.stopped().unwrap_or_else(gone))?;
        let mut error = begin(communicator).err().map(|text| (Instant::now(), text));
        let why = loop {
            if error.is_none() {
                match communicator.poll() {
                    Ok(true) => return Ok(end(communicator)),
                    Ok(false) => {}
                    Err(text) => error = Some((Instant::now(), text)),
                }
            }
            // A link that knows who is gone says more than NCCL, which only knows that something is.
            if let Some(why) = self.below.stopped() {
                break why;
            }
            if let Some((since, text)) = &error
                && since.elapsed() > GRACE
            {
                break self.failed(format!("NCCL failed in {what}: {text}"));
            }
            if others.stand_still(what) && error.is_none() {
                break self.failed(format!("NCCL did not end {what}, {}", others.late(deadline)));
            }
            match others.still.began.elapsed() / 8 {
                short if short < SHORTEST_PAUSE => std::thread::yield_now(),
                pause => std::thread::sleep(pause.min(PAUSE)),
            }
        };
        communicator.abort();
        *place = None;
        self.below.stop(&why);
        Err(why)
    }

    fn failed(&self, why: String) -> Broken {
        Broken::Failed { rank: self.below.rank(), why, code: 1 }
    }
}

/// The other ranks of an exchange, and since when none of them made progress.
struct Others<'a> {
    board: &'a Board,
    own: usize,
    ranks: Vec<usize>,
    counts: Vec<u64>,
    still: Stillness,
    /// Tells the ranks which of these made progress last: whoever waits for this rank is patient for as long as it is.
    told: Option<Told<'a>>,
}

impl<'a> Others<'a> {
    fn new(link: &'a Arc<dyn Link>, mut ranks: Vec<usize>, deadline: Duration) -> Others<'a> {
        let (board, own) = (&**link.board(), link.rank());
        let still = Stillness::new(board, deadline);
        ranks.sort_unstable();
        ranks.dedup();
        ranks.retain(|rank| *rank != own);
        let counts = ranks.iter().map(|rank| board.count(*rank)).collect();
        Others { board, own, ranks, counts, still, told: None }
    }

    /// Whether none of them made progress for too long.
    fn stand_still(&mut self, what: &str) -> bool {
        // What comes soon is not worth telling that it is waited for.
        let is_late = self.still.began.elapsed() > SOON;
        let is_to_tell = self.told.is_none() && is_late;
        let mut moved = is_to_tell.then(|| self.ranks.first().copied()).flatten();
        let mut is_changed = false;
        for (rank, count) in self.ranks.iter().zip(&mut self.counts) {
            let now = self.board.count(*rank);
            if std::mem::replace(count, now) != now {
                (is_changed, moved) = (true, Some(*rank));
            }
        }
        if let Some(rank) = moved.filter(|_| is_late) {
            // First the old one: what it told ends with it.
            self.told = None;
            self.told = Some(self.board.wait_for(self.own, rank, what.to_string()));
        }
        self.still.lasts(is_changed)
    }

    /// What they are at, for the end of a sentence.
    fn late(&self, deadline: Duration) -> String {
        let at = |rank: &usize| format!("rank {rank}{}", standing(self.board, *rank));
        let (seconds, at) = (deadline.as_secs(), self.ranks.iter().map(at).collect::<Vec<_>>());
        format!("and none of the others made progress for {seconds} s: {}", at.join(", "))
    }
}

fn refusal(why: &str) -> String {
    format!("cluster.backend = \"nccl\": {why}; or leave the key out: exchanges then go over MPI")
}

/// Refuses two ranks with one GPU, which NCCL does not serve.
fn require_one_each(gpus: &[Gpu]) -> anyhow::Result<()> {
    for (rank, gpu) in gpus.iter().enumerate() {
        if let Some(other) = gpus[..rank].iter().position(|other| other.uuid == gpu.uuid) {
            return Err(Fault::user(refusal(&format!(
                "ranks {other} and {rank} have the same GPU, {}, and NCCL wants one for each rank; start as many \
                 processes on a host as it has GPUs",
                gpu.name
            ))));
        }
    }
    Ok(())
}

impl<C: Communicator> Carrier for Nccl<C> {
    fn shortest(&self) -> usize {
        SHORTEST
    }

    fn exchange(
        &self,
        call: &Call,
        out: &[(usize, Vec<u8>)],
        into: &[(usize, usize)],
        deadline: Duration,
    ) -> Result<Vec<Vec<u8>>, Broken> {
        let others =
            out.iter().map(|(to, _)| *to).chain(into.iter().map(|(from, _)| *from)).collect();
        let begin = |communicator: &mut C| communicator.begin(out, into);
        self.with(&call.to_string(), others, deadline, begin, C::take)
    }

    fn host_memory(&self) -> Arc<dyn HostMemory> {
        self.host.clone()
    }
}

impl<C: Communicator> Link for Nccl<C> {
    fn rank(&self) -> usize {
        self.below.rank()
    }

    fn send(&self, to: usize, frame: Frame) -> Result<(), Broken> {
        self.below.send(to, frame)
    }

    fn take(
        &self,
        from: usize,
        lane: Lane,
        call: &Call,
        until: Instant,
    ) -> Result<Option<Frame>, Broken> {
        self.below.take(from, lane, call, until)
    }

    fn board(&self) -> &Arc<Board> {
        self.below.board()
    }

    fn stop(&self, why: &Broken) {
        self.below.stop(why);
    }

    fn stopped(&self) -> Option<Broken> {
        self.below.stopped()
    }

    fn carrier(&self) -> Option<&dyn Carrier> {
        Some(self)
    }
}

/// NCCL itself.
#[cfg(feature = "cuda")]
mod over_cuda {
    use super::*;
    use rehearsal_kernels::cuda::{NcclCommunicator, NcclDevice};

    impl Device for NcclDevice {
        type Communicator = NcclCommunicator;
        fn name(&self) -> String {
            self.name().to_string()
        }
        fn uuid(&self) -> Result<[u8; 16], String> {
            self.uuid()
        }
        fn unique_id(&self) -> Result<Vec<u8>, String> {
            self.unique_id()
        }
        fn connect(self, id: &[u8], rank: usize, ranks: usize) -> Result<NcclCommunicator, String> {
            self.connect(id, rank, ranks)
        }
        fn host_memory(&self) -> Arc<dyn HostMemory> {
            Arc::new(self.host_memory())
        }
    }

    impl Communicator for NcclCommunicator {
        fn begin(
            &mut self,
            out: &[(usize, Vec<u8>)],
            into: &[(usize, usize)],
        ) -> Result<(), String> {
            self.begin(out, into)
        }
        fn poll(&mut self) -> Result<bool, String> {
            self.poll()
        }
        fn take(&mut self) -> Vec<Vec<u8>> {
            self.take()
        }
        fn abort(&mut self) {
            self.abort();
        }
    }
}

#[cfg(test)]
mod tests;
