//! A file mapped into memory, for reading only: the one file of `src/` with `unsafe`.
//!
//! A model's bytes stay in the page cache, where every process shares them and from where the system takes them back at
//! need; what a reader holds of its own is the one tensor that it has turned into numbers. Knows no format.
//!
//! The files of a checkpoint or an export are written aside and renamed, never changed in place. One that another
//! program cuts short all the same is noticed before each read; if it is cut during one, the system ends the process.

use anyhow::{Context, Result};
use memmap2::{Mmap, UncheckedAdvice};
use std::fs::File;
use std::path::{Path, PathBuf};

use crate::config::Fault;

/// Bytes that are given back together; a multiple of the system's page.
const PAGE: usize = 1 << 16;

/// See the module.
#[derive(Debug)]
pub(super) struct MappedFile {
    path: PathBuf,
    file: File,
    map: Mmap,
}

impl MappedFile {
    /// Maps a file as a whole.
    #[allow(unsafe_code)]
    pub(super) fn open(path: &Path) -> Result<MappedFile> {
        let at = path.display();
        let file = File::open(path).map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => Fault::user(format!("{at}: no such file")),
            _ => anyhow::Error::new(e).context(format!("failed to open {at}")),
        })?;
        // SAFETY: the map is only read, byte by byte and into numbers for which every pattern of bits is valid; that
        // nobody changes the file meanwhile is the rule for files of a model (see the module).
        let map = unsafe { Mmap::map(&file) }
            .with_context(|| format!("failed to map {at} into memory"))?;
        Ok(MappedFile { path: path.to_path_buf(), file, map })
    }

    /// The file.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Its bytes when it was opened.
    pub(super) fn length(&self) -> u64 {
        self.map.len() as u64
    }

    /// `count` bytes from `start` on.
    pub(super) fn bytes(&self, start: u64, count: usize) -> Result<&[u8]> {
        let whole = usize::try_from(start).ok().and_then(|start| {
            let end = start.checked_add(count)?;
            self.map.get(start..end)
        });
        let now = self.file.metadata().map(|found| found.len());
        let now = now.with_context(|| format!("failed to look at {}", self.path.display()))?;
        match whole {
            Some(bytes) if start + count as u64 <= now => Ok(bytes),
            _ => Err(Fault::user(format!(
                "{}: has {now} bytes, fewer than when it was opened; it was cut short while it was read",
                self.path.display()
            ))),
        }
    }

    /// Gives the memory of these bytes back, those of whole pages: what was read of a file must not count as this
    /// process's own until the system needs room. Read again they come from the page cache.
    #[allow(unsafe_code)]
    pub(super) fn forget(&self, start: u64, count: usize) {
        let first = (start as usize).next_multiple_of(PAGE);
        let end = (start as usize + count) / PAGE * PAGE;
        if first < end {
            // SAFETY: the map is shared and only read, so that what is given back is read again as it was. It is no
            // more than advice: that it was not taken changes nothing.
            let _ = unsafe {
                self.map.unchecked_advise_range(UncheckedAdvice::DontNeed, first, end - first)
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_cut_while_it_is_open_is_an_error_and_no_signal() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("x");
        std::fs::write(&path, vec![7; 1 << 16]).expect("a file");
        let mapped = MappedFile::open(&path).expect("a map");
        assert_eq!(mapped.bytes(65_530, 6).expect("the end"), [7; 6]);
        assert!(mapped.bytes(65_530, 7).is_err() && mapped.bytes(u64::MAX, 1).is_err());
        File::options().write(true).open(&path).and_then(|f| f.set_len(100)).expect("a cut");
        let error = mapped.bytes(65_530, 6).expect_err("the end is gone");
        assert!(
            matches!(error.downcast_ref(), Some(Fault::User(m)) if m.contains("has 100 bytes")),
            "{error:#}"
        );
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = MappedFile::open(Path::new("/nonexistent/x")).expect_err("nothing there");
        assert!(error.to_string().contains("/nonexistent/x: no such file"), "{error:#}");
    }
}
