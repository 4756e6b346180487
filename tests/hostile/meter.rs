//! What an input costs: the peak of memory and the processor's time of this thread.
//!
//! The allocator counts for the whole binary, thread by thread, and refuses a thread that is being
//! measured more than [`REFUSED`] bytes, so that a giant allocation ends the test and not the
//! machine.
#![allow(unsafe_code)] // The trait of allocators is unsafe; every call is passed on to the system's.

use rustix::time::{ClockId, clock_gettime};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

/// Most that a measured input may hold at once.
pub const REFUSED: isize = 2 << 30;

struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

thread_local! {
    static HELD: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
    static MEASURED: Cell<bool> = const { Cell::new(false) };
}

/// Counts `change` more bytes; false if they are too many.
fn count(change: isize) -> bool {
    let held = HELD.get() + change;
    if change > 0 && held > REFUSED && MEASURED.get() {
        return false;
    }
    HELD.set(held);
    if held > PEAK.get() {
        PEAK.set(held);
    }
    true
}

// SAFETY: memory comes from and goes back to the system's allocator with the caller's layout.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        match count(layout.size() as isize) {
            // SAFETY: as the caller promises.
            true => unsafe { System.alloc(layout) },
            false => std::ptr::null_mut(),
        }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        match count(layout.size() as isize) {
            // SAFETY: as the caller promises.
            true => unsafe { System.alloc_zeroed(layout) },
            false => std::ptr::null_mut(),
        }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: the pointer came from the system's allocator with this layout.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        match count(size as isize - layout.size() as isize) {
            // SAFETY: the pointer came from the system's allocator with this layout.
            true => unsafe { System.realloc(pointer, layout, size) },
            false => std::ptr::null_mut(),
        }
    }
}

/// What something cost.
#[derive(Clone, Copy, Debug)]
pub struct Cost {
    /// Most bytes that were held at once.
    pub peak_bytes: usize,
    /// Processor's time of the thread.
    pub seconds: f64,
}

/// Does `work` and measures it.
pub fn measured<T>(work: impl FnOnce() -> T) -> (T, Cost) {
    HELD.set(0);
    PEAK.set(0);
    MEASURED.set(true);
    let start = thread_seconds();
    let done = work();
    let seconds = thread_seconds() - start;
    MEASURED.set(false);
    (done, Cost { peak_bytes: PEAK.get().max(0) as usize, seconds })
}

/// Time that this thread has computed.
pub fn thread_seconds() -> f64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.tv_sec as f64 + 1e-9 * time.tv_nsec as f64
}
