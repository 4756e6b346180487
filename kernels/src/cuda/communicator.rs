//! A rank's end of an NCCL communicator: bytes from the host of one rank through its GPU to another's.
//!
//! Payloads are copied into page-locked memory and from there to the GPU, go between GPUs as one group of sends and receives,
//! and come back the same way, all on one stream of its own. No call waits for any of it: `poll` looks.
//!
//! Invariants:
//!   * memory that the stream may still use is neither written to nor given back
//!   * an aborted communicator does nothing any more

use super::nccl::{Nccl, Passage};
use super::pinned::{Pinned, PinnedMemory};
use cudarc::driver::{CudaContext, CudaStream, DriverError, result, sys};
use cudarc::nccl::sys::ncclComm_t;
use std::sync::Arc;

/// A GPU that is to join a communicator.
pub struct NcclDevice {
    nccl: &'static Nccl,
    context: Arc<CudaContext>,
    name: String,
}

impl NcclDevice {
    /// The GPU of the process that is number `local` on its host, and the library; `Err` says what is missing. Where
    /// processes see fewer GPUs than there are processes, a launcher has given each its own, or two have the same.
    pub fn open(local: usize) -> Result<NcclDevice, String> {
        let index = local % super::devices()?;
        let (context, nccl) = (super::context(index)?, Nccl::open()?);
        let name = context.name().map_err(|fault| format!("cuda {index}: {fault}"))?;
        Ok(NcclDevice { nccl, context, name: format!("cuda {index} ({name})") })
    }

    /// "cuda 0 (name of the GPU)".
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What no other GPU has.
    pub fn uuid(&self) -> Result<[u8; 16], String> {
        let uuid = self.context.uuid().map_err(|fault| format!("{}: {fault}", self.name))?;
        Ok(uuid.bytes.map(|byte| byte as u8))
    }

    /// An id for a communicator.
    pub fn unique_id(&self) -> Result<Vec<u8>, String> {
        self.nccl.unique_id()
    }

    /// Memory of the host that this GPU reads by itself.
    pub fn host_memory(&self) -> PinnedMemory {
        PinnedMemory::of(self.context.clone())
    }

    /// Begins to join the ranks that have the same id; through once `poll` says so.
    pub fn connect(self, id: &[u8], rank: usize, ranks: usize) -> Result<NcclCommunicator, String> {
        let failed = |fault: DriverError| format!("{}: {fault}", self.name);
        let stream = self.context.new_stream().map_err(failed)?;
        self.context.bind_to_thread().map_err(failed)?;
        let communicator = self.nccl.join(id, rank, ranks)?;
        let state = State::Settling(Then::Nothing);
        let (out, into) = (Staging::new(&self.context), Staging::new(&self.context));
        Ok(NcclCommunicator { communicator, device: self, stream, state, out, into })
    }
}

/// See the module.
pub struct NcclCommunicator {
    communicator: ncclComm_t,
    device: NcclDevice,
    stream: Arc<CudaStream>,
    state: State,
    out: Staging,
    into: Staging,
}

// SAFETY: NCCL takes calls about a communicator from any thread, one at a time, and every call here binds the context first.
unsafe impl Send for NcclCommunicator {}

enum State {
    /// NCCL takes up what it was asked for.
    Settling(Then),
    /// The stream works; so many bytes come from each of the ranks.
    Moving(Vec<usize>),
    /// What was begun is through.
    Through(Vec<usize>),
    Aborted,
}

/// What follows when NCCL has taken up what it was asked for.
enum Then {
    Nothing,
    Moving(Vec<usize>),
}

impl NcclCommunicator {
    /// Begins an exchange: payloads to ranks, and as many bytes from ranks.
    pub fn begin(
        &mut self,
        out: &[(usize, Vec<u8>)],
        into: &[(usize, usize)],
    ) -> Result<(), String> {
        assert!(matches!(self.state, State::Through(_)), "one exchange at a time");
        let stream = self.stream.cu_stream();
        let begun = self.bind().and_then(|()| {
            let lengths: Vec<usize> = into.iter().map(|(_, length)| *length).collect();
            self.into.require(lengths.iter().sum())?;
            let (leaving, coming) = (self.out.fill(out, stream)?, self.into.passages(into));
            Ok((leaving, coming, lengths))
        });
        let (leaving, coming, lengths) = begun.map_err(|fault| self.failed(fault))?;
        // Before NCCL is asked: what it was asked for must be waited for or aborted.
        self.state = State::Settling(Then::Moving(lengths));
        // SAFETY: the communicator is settled; the passages are of this GPU's staging memory, which stays as it is until
        // `poll` has found the stream idle or the communicator was aborted.
        unsafe { self.device.nccl.exchange(self.communicator, stream.cast(), &leaving, &coming) }
    }

    /// Whether what was begun, or joining, is through.
    pub fn poll(&mut self) -> Result<bool, String> {
        if let State::Aborted = self.state {
            return Err("the communicator was aborted".to_string());
        }
        self.bind().map_err(|fault| self.failed(fault))?;
        // SAFETY: the communicator is one of `join` that was not aborted.
        if !unsafe { self.device.nccl.is_settled(self.communicator) }? {
            return Ok(false);
        }
        let stream = self.stream.cu_stream();
        if let State::Settling(then) = &mut self.state {
            self.state = match std::mem::replace(then, Then::Nothing) {
                Then::Nothing => State::Through(Vec::new()),
                Then::Moving(lengths) => {
                    // Only now does the stream have NCCL's part: what follows it comes behind.
                    let fetched = self.into.fetch(lengths.iter().sum(), stream);
                    fetched.map_err(|fault| self.failed(fault))?;
                    State::Moving(lengths)
                }
            };
        }
        if let State::Moving(lengths) = &mut self.state {
            // SAFETY: the stream lives as long as this.
            match unsafe { sys::cuStreamQuery(stream) }.result() {
                Ok(()) => self.state = State::Through(std::mem::take(lengths)),
                Err(DriverError(sys::CUresult::CUDA_ERROR_NOT_READY)) => return Ok(false),
                Err(fault) => return Err(self.failed(fault)),
            }
        }
        Ok(true)
    }

    /// What came in the exchange that is through, in the order in which its ranks were named.
    pub fn take(&mut self) -> Vec<Vec<u8>> {
        let State::Through(lengths) = &mut self.state else { panic!("an exchange is through") };
        let mut left = self.into.host.as_ref().map_or(&[][..], Pinned::bytes);
        let payload = |length: usize| {
            let (payload, rest) = left.split_at(length);
            left = rest;
            payload.to_vec()
        };
        std::mem::take(lengths).into_iter().map(payload).collect()
    }

    /// Ends whatever is under way.
    pub fn abort(&mut self) {
        if matches!(self.state, State::Aborted) {
            return;
        }
        self.state = State::Aborted;
        // What does not bind has no GPU any more.
        if self.bind().is_ok() {
            // SAFETY: it was joined once, and the state keeps it from being used again.
            unsafe { self.device.nccl.abort(self.communicator) };
        }
    }

    fn bind(&self) -> Result<(), DriverError> {
        self.device.context.bind_to_thread()
    }

    fn failed(&self, fault: DriverError) -> String {
        format!("{}: {fault}", self.device.name)
    }
}

impl Drop for NcclCommunicator {
    fn drop(&mut self) {
        self.abort();
    }
}

/// Memory on both sides of the way between host and GPU, as large as the largest exchange so far.
struct Staging {
    context: Arc<CudaContext>,
    host: Option<Pinned>,
    device: sys::CUdeviceptr,
    bytes: usize,
}

impl Staging {
    fn new(context: &Arc<CudaContext>) -> Staging {
        Staging { context: context.clone(), host: None, device: 0, bytes: 0 }
    }

    /// Has room for so many bytes; what was there is lost.
    fn require(&mut self, bytes: usize) -> Result<(), DriverError> {
        if bytes <= self.bytes {
            return Ok(());
        }
        self.clear();
        let bytes = bytes.next_power_of_two();
        self.host = Some(Pinned::new(&self.context, bytes)?);
        // SAFETY: the context is bound by `Pinned::new`.
        self.device = unsafe { result::malloc_sync(bytes) }?;
        self.bytes = bytes;
        Ok(())
    }

    /// Has payloads copied to the GPU, one behind the other.
    fn fill(
        &mut self,
        payloads: &[(usize, Vec<u8>)],
        stream: sys::CUstream,
    ) -> Result<Vec<Passage>, DriverError> {
        let lengths: Vec<_> = payloads.iter().map(|(rank, bytes)| (*rank, bytes.len())).collect();
        let total = lengths.iter().map(|(_, length)| length).sum();
        self.require(total)?;
        let Some(host) = &mut self.host else { return Ok(Vec::new()) };
        let mut left = &mut host.bytes_mut()[..total];
        for (_, payload) in payloads {
            let (to, rest) = left.split_at_mut(payload.len());
            to.copy_from_slice(payload);
            left = rest;
        }
        // SAFETY: both sides have `total` bytes, and stay as they are until the stream has passed the copy.
        unsafe { result::memcpy_htod_async(self.device, &host.bytes()[..total], stream) }?;
        Ok(self.passages(&lengths))
    }

    /// Places on the GPU, one behind the other.
    fn passages(&self, lengths: &[(usize, usize)]) -> Vec<Passage> {
        let mut address = self.device;
        let passage = |(rank, bytes): &(usize, usize)| {
            let passage = Passage { address, bytes: *bytes, rank: *rank };
            address += *bytes as u64;
            passage
        };
        lengths.iter().map(passage).collect()
    }

    /// Has so many bytes copied to the host.
    fn fetch(&mut self, bytes: usize, stream: sys::CUstream) -> Result<(), DriverError> {
        let Some(host) = &mut self.host else { return Ok(()) };
        // SAFETY: as for `fill`; nobody reads the host's side before the stream is idle.
        unsafe { result::memcpy_dtoh_async(&mut host.bytes_mut()[..bytes], self.device, stream) }
    }

    fn clear(&mut self) {
        if self.device != 0 && self.context.bind_to_thread().is_ok() {
            // SAFETY: it was given once and is given back once; the driver waits for work that still uses it.
            let _ = unsafe { result::free_sync(self.device) };
        }
        (self.host, self.device, self.bytes) = (None, 0, 0);
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        self.clear();
    }
}
