//! NCCL's library, opened when somebody asks for it, and those of its calls that are made here.
//!
//! cudarc knows NCCL's types, but asks the system for names of which `libnccl.so.2`, the only one that NVIDIA's wheels and
//! packages install, is none, and panics where there is no library. So the library is opened here.
//!
//! Invariant: every call but the search for the library returns at once; a communicator is made with `blocking = 0`.

use cudarc::nccl::sys::{ncclComm_t, ncclConfig_t, ncclDataType_t, ncclUniqueId};
use libloading::Library;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::OnceLock;

/// Names under which systems have it.
const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];

/// The oldest version whose configuration has the fields of cudarc's `ncclConfig_t`, as NCCL numbers versions; newer
/// libraries take it as it is.
const OLDEST: c_int = 2_17_00;

/// What marks a configuration as one (`NCCL_API_MAGIC` of nccl.h).
const MAGIC: u32 = 0xcafe_beef;

/// Codes that are no error: done, and under way.
const SUCCESS: c_int = 0;
const IN_PROGRESS: c_int = 7;

/// A result of NCCL: a newer library may have codes that no enum here knows.
type Code = c_int;

/// Pointers to the library's functions by its names for them.
macro_rules! calls {
    ($($name:ident: $symbol:literal ($($argument:ty),*) -> $result:ty;)*) => {
        struct Calls { $($name: unsafe extern "C" fn($($argument),*) -> $result,)* }

        impl Calls {
            /// # Safety
            /// The library must be NCCL, and stay open as long as the pointers are used.
            unsafe fn of(library: &Library) -> Result<Calls, libloading::Error> {
                // SAFETY: types of nccl.h, which has not changed any of them since 2.17.
                Ok(unsafe { Calls { $($name: *library.get($symbol)?,)* } })
            }
        }
    };
}

calls! {
    version: "ncclGetVersion" (*mut c_int) -> Code;
    unique_id: "ncclGetUniqueId" (*mut ncclUniqueId) -> Code;
    join: "ncclCommInitRankConfig" (*mut ncclComm_t, c_int, ncclUniqueId, c_int, *mut ncclConfig_t) -> Code;
    state: "ncclCommGetAsyncError" (ncclComm_t, *mut Code) -> Code;
    abort: "ncclCommAbort" (ncclComm_t) -> Code;
    group_start: "ncclGroupStart" () -> Code;
    group_end: "ncclGroupEnd" () -> Code;
    send: "ncclSend" (*const c_void, usize, ncclDataType_t, c_int, ncclComm_t, *mut c_void) -> Code;
    receive: "ncclRecv" (*mut c_void, usize, ncclDataType_t, c_int, ncclComm_t, *mut c_void) -> Code;
    error_string: "ncclGetErrorString" (Code) -> *const c_char;
    last_error: "ncclGetLastError" (ncclComm_t) -> *const c_char;
}

/// The open library.
pub(super) struct Nccl {
    calls: Calls,
    version: c_int,
    /// What the pointers point into.
    _library: Library,
}

/// Bytes on a device on their way to a rank, or from one.
pub(super) struct Passage {
    pub address: u64,
    pub bytes: usize,
    pub rank: usize,
}

/// NCCL's version, e.g. "2.28.3"; `Err` says why there is none.
pub fn version() -> Result<String, String> {
    Nccl::open().map(Nccl::version)
}

impl Nccl {
    /// The library, opened at the first call; `Err` says what is missing.
    pub(super) fn open() -> Result<&'static Nccl, String> {
        static NCCL: OnceLock<Result<Nccl, String>> = OnceLock::new();
        NCCL.get_or_init(Nccl::find).as_ref().map_err(String::clone)
    }

    fn find() -> Result<Nccl, String> {
        // SAFETY: opening a library runs what it does at its start; NCCL's is made for that.
        let found = NAMES.iter().find_map(|name| unsafe { Library::new(*name) }.ok());
        let library = found.ok_or_else(|| {
            format!(
                "NCCL is not there: the system finds no {}; install it (`pip install nvidia-nccl-cu13`) and name its \
                 folder in LD_LIBRARY_PATH",
                NAMES[0]
            )
        })?;
        // SAFETY: the library is NCCL, and is kept beside the pointers.
        let calls = unsafe { Calls::of(&library) };
        let calls =
            calls.map_err(|fault| format!("NCCL has not all calls that are needed: {fault}"))?;
        let mut version = 0;
        // SAFETY: the pointer is to a local.
        let code = unsafe { (calls.version)(&mut version) };
        let nccl = Nccl { calls, version, _library: library };
        nccl.require(code, None)?;
        match version >= OLDEST {
            true => Ok(nccl),
            false => Err(format!("NCCL is {}, and 2.17 is the oldest that serves", nccl.version())),
        }
    }

    fn version(&self) -> String {
        let (major, rest) = (self.version / 10_000, self.version % 10_000);
        format!("{major}.{}.{}", rest / 100, rest % 100)
    }

    /// An id for a communicator, which any of its ranks makes and gives to the others.
    pub(super) fn unique_id(&self) -> Result<Vec<u8>, String> {
        let mut id = ncclUniqueId { internal: [0; 128] };
        // SAFETY: the pointer is to a local.
        self.require(unsafe { (self.calls.unique_id)(&mut id) }, None)?;
        Ok(id.internal.map(|byte| byte as u8).to_vec())
    }

    /// Begins to join a communicator with the thread's current GPU.
    pub(super) fn join(&self, id: &[u8], rank: usize, ranks: usize) -> Result<ncclComm_t, String> {
        let bytes: [u8; 128] =
            id.try_into().map_err(|_| format!("an id of {} bytes is none of NCCL", id.len()))?;
        let id = ncclUniqueId { internal: bytes.map(|byte| byte as c_char) };
        let mut config = ncclConfig_t {
            size: size_of::<ncclConfig_t>(),
            magic: MAGIC,
            version: OLDEST as u32,
            blocking: 0,
            // Nothing said, in nccl.h's way.
            cgaClusterSize: c_int::MIN,
            minCTAs: c_int::MIN,
            maxCTAs: c_int::MIN,
            netName: std::ptr::null(),
            splitShare: c_int::MIN,
        };
        let mut communicator = std::ptr::null_mut();
        let (rank, ranks) = (rank as c_int, ranks as c_int);
        // SAFETY: the pointers are to locals, which NCCL reads and writes during the call alone.
        let code = unsafe { (self.calls.join)(&mut communicator, ranks, id, rank, &mut config) };
        self.require(code, None)?;
        Ok(communicator)
    }

    /// Whether what a communicator was last asked for has been taken up, or why it never will be.
    ///
    /// # Safety
    /// The communicator must be one of `join` that was not aborted.
    pub(super) unsafe fn is_settled(&self, communicator: ncclComm_t) -> Result<bool, String> {
        let mut state = SUCCESS;
        // SAFETY: by this function's contract; the pointer is to a local.
        let code = unsafe { (self.calls.state)(communicator, &mut state) };
        self.require(code, Some(communicator))?;
        self.require(state, Some(communicator))?;
        Ok(state != IN_PROGRESS)
    }

    /// Puts sends and receives on a stream as one group, in which none waits for another.
    ///
    /// # Safety
    /// The communicator must be settled; addresses must be its GPU's, hold so many bytes, and be left alone until the stream
    /// has passed the group or the communicator was aborted.
    pub(super) unsafe fn exchange(
        &self,
        communicator: ncclComm_t,
        stream: *mut c_void,
        out: &[Passage],
        into: &[Passage],
    ) -> Result<(), String> {
        let (byte, calls) = (ncclDataType_t::ncclUint8, &self.calls);
        // SAFETY: by this function's contract. A group that was begun is ended whatever happens in it.
        let codes = unsafe {
            let mut codes = vec![(calls.group_start)()];
            for Passage { address, bytes, rank } in out {
                let (from, to) = (*address as *const c_void, *rank as c_int);
                codes.push((calls.send)(from, *bytes, byte, to, communicator, stream));
            }
            for Passage { address, bytes, rank } in into {
                let (to, from) = (*address as *mut c_void, *rank as c_int);
                codes.push((calls.receive)(to, *bytes, byte, from, communicator, stream));
            }
            codes.push((calls.group_end)());
            codes
        };
        codes.into_iter().try_for_each(|code| self.require(code, Some(communicator)))
    }

    /// Ends whatever a communicator does, and it.
    ///
    /// # Safety
    /// The communicator must be one of `join`, and is not used again.
    pub(super) unsafe fn abort(&self, communicator: ncclComm_t) {
        // SAFETY: by this function's contract. What it says does not matter any more.
        unsafe { (self.calls.abort)(communicator) };
    }

    /// What a code says, unless it is none of an error.
    fn require(&self, code: Code, communicator: Option<ncclComm_t>) -> Result<(), String> {
        if code == SUCCESS || code == IN_PROGRESS {
            return Ok(());
        }
        // SAFETY: NCCL gives texts that end with a zero and stay; both calls take any code and any communicator, none too.
        let [text, last] = unsafe {
            let communicator = communicator.unwrap_or(std::ptr::null_mut());
            [(self.calls.error_string)(code), (self.calls.last_error)(communicator)].map(|text| {
                match text.is_null() {
                    true => String::new(),
                    false => CStr::from_ptr(text).to_string_lossy().trim().to_string(),
                }
            })
        };
        Err(if last.is_empty() { text } else { format!("{text} ({last})") })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nccl_is_there_with_a_version_or_says_what_is_missing() {
        match version() {
            Ok(version) => assert!(version.starts_with("2."), "{version}"),
            Err(reason) => assert!(reason.contains("libnccl.so.2"), "{reason}"),
        }
    }

    #[test]
    fn an_id_of_another_length_is_refused_before_nccl_sees_it() {
        let Ok(nccl) = Nccl::open() else { return };
        assert_eq!(nccl.join(&[0; 5], 0, 1), Err("an id of 5 bytes is none of NCCL".to_string()));
        // Without a GPU NCCL has an error, in its own words, for the rest.
        if super::super::devices().is_err() {
            let refused = nccl.unique_id().and_then(|id| nccl.join(&id, 0, 1)).unwrap_err();
            assert!(refused.contains("cuda"), "{refused}");
        }
    }
}
