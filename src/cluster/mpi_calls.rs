//! Calls of the MPI library, each of which returns at once, as safe functions.
//!
//! Knows no frames. Everything here happens on the thread that started the library.
//!
//! Invariant: a buffer lives until the library is done with it, or for ever.

#![allow(unsafe_code)]

use mpi::ffi::*;
use std::ffi::{c_char, c_int};

/// All ranks, as the library knows them. Lives on the thread that started it.
pub struct World {
    communicator: MPI_Comm,
    rank: usize,
    ranks: usize,
}

impl World {
    /// Starts the library, on the thread that then makes all other calls.
    pub fn start() -> Result<World, String> {
        let (mut provided, mut rank, mut ranks) = (0, 0, 0);
        let none = std::ptr::null_mut();
        // SAFETY: called once in the process, on the thread that makes all other calls; the library takes null arguments.
        unsafe {
            check(MPI_Init_thread(none, none.cast(), RSMPI_THREAD_FUNNELED, &mut provided))?;
        }
        if provided < funneled() {
            return Err("the MPI library serves programs of one thread only".to_string());
        }
        // SAFETY: the library has started; the pointers are to locals.
        let communicator = unsafe {
            let world = RSMPI_COMM_WORLD;
            // Errors come back as codes; by default they would end the process.
            check(MPI_Comm_set_errhandler(world, RSMPI_ERRORS_RETURN))?;
            check(MPI_Comm_rank(world, &mut rank))?;
            check(MPI_Comm_size(world, &mut ranks))?;
            world
        };
        Ok(World { communicator, rank: rank as usize, ranks: ranks as usize })
    }

    /// This rank.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// How many there are.
    pub fn ranks(&self) -> usize {
        self.ranks
    }

    /// Name and version of the library, without its date and the like.
    pub fn library() -> String {
        let mut text = vec![0_u8; MPI_MAX_LIBRARY_VERSION_STRING as usize];
        let mut length = 0;
        // SAFETY: the buffer has the length that the standard asks for.
        unsafe { MPI_Get_library_version(text.as_mut_ptr().cast::<c_char>(), &mut length) };
        text.truncate(usize::try_from(length).unwrap_or(0));
        let text = String::from_utf8_lossy(&text).into_owned();
        text.split([',', '\n', '\0']).next().unwrap_or_default().trim().to_string()
    }

    /// Begins to send a message.
    pub fn send(&self, to: usize, bytes: Vec<u8>, tag: i32) -> Result<Transfer, String> {
        let mut transfer = Transfer::new(bytes, tag);
        // SAFETY: `Transfer` keeps the bytes until the request is through.
        unsafe {
            check(MPI_Isend(
                transfer.bytes.as_ptr().cast(),
                transfer.bytes.len() as c_int,
                RSMPI_UINT8_T,
                to as c_int,
                tag,
                self.communicator,
                &mut transfer.request,
            ))?;
        }
        transfer.is_begun = true;
        Ok(transfer)
    }

    /// Begins to take the next message of anybody, if one has come.
    pub fn take(&self) -> Result<Option<(usize, Transfer)>, String> {
        let (mut is_there, mut count) = (0, 0);
        // SAFETY: an all-zero status and null handles are values that the library writes over; the pointers are to locals,
        // and `Transfer` keeps the bytes until the request is through.
        unsafe {
            let (mut message, mut status) = (RSMPI_MESSAGE_NULL, std::mem::zeroed::<MPI_Status>());
            let (anybody, anything) = (RSMPI_ANY_SOURCE, RSMPI_ANY_TAG);
            let all = self.communicator;
            check(MPI_Improbe(anybody, anything, all, &mut is_there, &mut message, &mut status))?;
            if is_there == 0 {
                return Ok(None);
            }
            check(MPI_Get_count(&status, RSMPI_UINT8_T, &mut count))?;
            let bytes = usize::try_from(count).unwrap_or(0);
            let mut transfer = Transfer::new(vec![0; bytes], status.MPI_TAG);
            check(MPI_Imrecv(
                transfer.bytes.as_mut_ptr().cast(),
                count,
                RSMPI_UINT8_T,
                &mut message,
                &mut transfer.request,
            ))?;
            transfer.is_begun = true;
            Ok(Some((status.MPI_SOURCE as usize, transfer)))
        }
    }

    /// Begins to wait until all ranks are here.
    pub fn barrier(&self) -> Result<Transfer, String> {
        let mut transfer = Transfer::new(Vec::new(), 0);
        // SAFETY: the pointer is to a field that outlives the request.
        unsafe { check(MPI_Ibarrier(self.communicator, &mut transfer.request))? };
        transfer.is_begun = true;
        Ok(transfer)
    }

    /// Closes the library; waits for the other ranks to do so.
    pub fn finalize(&self) {
        // SAFETY: no transfer is under way, and this thread started the library.
        unsafe { MPI_Finalize() };
    }
}

/// The level of threads that this file needs.
fn funneled() -> c_int {
    // SAFETY: a constant of the library.
    unsafe { RSMPI_THREAD_FUNNELED }
}

/// Bytes on their way, out or in.
pub struct Transfer {
    request: MPI_Request,
    /// What travels; of one that comes in, whole once it is through.
    bytes: Vec<u8>,
    /// The message's tag.
    pub tag: i32,
    is_begun: bool,
}

impl Transfer {
    fn new(bytes: Vec<u8>, tag: i32) -> Transfer {
        // SAFETY: a constant of the library.
        Transfer { request: unsafe { RSMPI_REQUEST_NULL }, bytes, tag, is_begun: false }
    }

    /// True once the library is done with the bytes.
    pub fn is_through(&mut self) -> Result<bool, String> {
        let mut flag = 0;
        // SAFETY: an all-zero status is a value that the library writes over.
        unsafe {
            let mut status = std::mem::zeroed::<MPI_Status>();
            check(MPI_Test(&mut self.request, &mut flag, &mut status))?;
        }
        self.is_begun &= flag == 0;
        Ok(flag != 0)
    }

    /// What came, once it is through.
    pub fn into_bytes(mut self) -> Vec<u8> {
        assert!(!self.is_begun, "the library still writes them");
        std::mem::take(&mut self.bytes)
    }
}

impl Drop for Transfer {
    fn drop(&mut self) {
        if self.is_begun {
            // The library may still read or write them.
            std::mem::forget(std::mem::take(&mut self.bytes));
        }
    }
}

/// What a code of the library says.
fn check(code: c_int) -> Result<(), String> {
    if code == MPI_SUCCESS as c_int {
        return Ok(());
    }
    let mut text = vec![0_u8; MPI_MAX_ERROR_STRING as usize];
    let mut length = 0;
    // SAFETY: the buffer has the length that the standard asks for.
    unsafe { MPI_Error_string(code, text.as_mut_ptr().cast::<c_char>(), &mut length) };
    text.truncate(usize::try_from(length).unwrap_or(0));
    Err(String::from_utf8_lossy(&text).into_owned())
}
