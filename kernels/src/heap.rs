//! What the process asks of its heap and of the system's pages: two counts, of all threads together.
//!
//! A program that makes [`CountingAllocator`] its global allocator counts; in any other the count stays 0. The memory of
//! buffers comes from arenas and is not in it.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicU64, Ordering};

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

/// The system's allocator, with a count of its calls that give memory.
pub struct CountingAllocator;

// SAFETY: every call goes to the system's allocator as it is; a count is no memory.
unsafe impl GlobalAlloc for CountingAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise; the memory is the system allocator's.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise; the memory is the system allocator's.
        unsafe { System.realloc(pointer, layout, bytes) }
    }
}

/// Allocations and reallocations since the process began; 0 without a [`CountingAllocator`].
pub fn allocations() -> u64 {
    ALLOCATIONS.load(Ordering::Relaxed)
}

/// Pages that the process touched for the first time, or again after giving them back, since it began (minor faults);
/// 0 where the system does not tell.
pub fn page_faults() -> u64 {
    minor_faults(&std::fs::read_to_string("/proc/self/stat").unwrap_or_default()).unwrap_or(0)
}

/// The tenth field of `/proc/self/stat`; the second is a name in brackets, which may hold blanks and brackets.
fn minor_faults(stat: &str) -> Option<u64> {
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_whitespace().nth(7)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_allocator_counts_what_gives_memory_and_hands_it_on_whole() {
        let before = allocations();
        let layout = Layout::from_size_align(64, 16).unwrap();
        // SAFETY: the layout is not empty, and each piece is given back once with its layout.
        unsafe {
            let first = CountingAllocator.alloc(layout);
            first.write_bytes(7, 64);
            let first = CountingAllocator.realloc(first, layout, 4096);
            assert!(std::slice::from_raw_parts(first, 64).iter().all(|byte| *byte == 7));
            let zeroed = CountingAllocator.alloc_zeroed(layout);
            assert!(std::slice::from_raw_parts(zeroed, 64).iter().all(|byte| *byte == 0));
            CountingAllocator.dealloc(first, Layout::from_size_align(4096, 16).unwrap());
            CountingAllocator.dealloc(zeroed, layout);
        }
        assert_eq!(allocations() - before, 3);
    }

    #[test]
    fn a_page_that_is_touched_first_is_a_fault() {
        let stat = "12 (a) b (c) S 1 12 12 0 -1 4194560 345 0 6 0 1 2 0 0 20 0";
        assert_eq!(minor_faults(stat), Some(345));
        assert_eq!(minor_faults(""), None);
        if cfg!(target_os = "linux") {
            let before = page_faults();
            let memory = vec![1_u8; 64 << 20];
            std::hint::black_box(&memory);
            assert!(page_faults() > before, "{before}");
        }
    }
}
