//! Memory of the operating system: private, anonymous, touched at once.

use rustix::mm::{Advice, MapFlags, ProtFlags};

/// Bytes from which a mapping asks for huge pages: weights are read through once for each product, and with
/// small pages half of that time goes to address translation.
const HUGE: usize = 2 << 20;

/// Private anonymous memory, touched at creation.
pub(crate) struct Mapping {
    /// Of its first byte.
    pub(crate) address: usize,
    /// Its size.
    pub(crate) bytes: usize,
}

impl Mapping {
    /// So many zero bytes, if the system has them.
    pub(crate) fn new(bytes: usize) -> Option<Mapping> {
        let flags = if bytes < HUGE { MapFlags::POPULATE } else { MapFlags::empty() };
        // SAFETY: a fresh private anonymous mapping aliases nothing.
        let pointer = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | flags,
            )
        };
        let pointer = pointer.ok()?;
        if bytes >= HUGE {
            // SAFETY: advice about, and zeros to, a mapping that nobody else knows. A system without huge pages
            // refuses the advice, an old one to touch the pages for us: then each is touched here.
            unsafe {
                let _ = rustix::mm::madvise(pointer, bytes, Advice::LinuxHugepage);
                if rustix::mm::madvise(pointer, bytes, Advice::LinuxPopulateWrite).is_err() {
                    for page in (0..bytes).step_by(4096) {
                        pointer.cast::<u8>().add(page).write_volatile(0);
                    }
                }
            }
        }
        Some(Mapping { address: pointer as usize, bytes })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new` and nothing points to it any more.
        let _ = unsafe { rustix::mm::munmap(self.address as *mut _, self.bytes) };
    }
}
