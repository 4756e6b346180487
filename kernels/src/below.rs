//! Copies of slabs below the device: in memory of the host, or on a disk.
//!
//! A copy on the host lies where [`HostMemory`] has room: in a file that is mapped while it is written or read, which the system
//! keeps in memory as long as it can, or page-locked where a GPU is to read it (`cuda::PinnedMemory`). A copy on disk is written
//! through and then given up by the system's cache, so that reading it takes a disk's time. Bytes move in pieces, between which
//! whoever asked may call it off. Knows no arena's budget and no thread.
//!
//! Invariants:
//!   * a slab comes back from its copy bit for bit, or with an error, or called off and then undefined
//!   * a copy that was called off or failed leaves no file

use crate::buffer::DType;
use crate::slab::{Slab, SlabReader};
use rustix::fs::{Advice, FallocateFlags, fadvise, fdatasync};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use std::fs::{File, OpenOptions};
use std::io::{Error, ErrorKind, Result};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Bytes that move between two looks at whether they still should.
pub const PIECE: usize = 4 << 20;

/// Where a copy is to be.
#[derive(Clone, Copy)]
pub enum Below<'a> {
    /// In memory of the host.
    Host(&'a dyn HostMemory),
    /// On a disk.
    Disk,
}

/// Memory of the host that has room for copies.
pub trait HostMemory: Send + Sync {
    /// Room for so many bytes. What is kept in a file is kept at `path`.
    fn room(&self, bytes: usize, path: &Path) -> Result<Box<dyn HostRoom>>;
}

/// Room for one copy. Dropping it gives it back, and removes its file if it has one.
pub trait HostRoom: Send {
    /// Writes a piece that begins at byte `start`, a multiple of [`PIECE`].
    fn put(&mut self, start: usize, piece: &[u8]) -> Result<()>;

    /// Reads a piece that begins at byte `start`, a multiple of [`PIECE`].
    fn get(&self, start: usize, piece: &mut [u8]) -> Result<()>;
}

/// A copy of a slab. Dropping it gives its room back.
pub struct SlabCopy {
    place: Place,
    dtype: DType,
    shapes: Vec<(usize, usize)>,
}

enum Place {
    Host(Box<dyn HostRoom>),
    Disk(CopyFile),
}

impl SlabCopy {
    /// Copies a slab of this form; `None` if `goes_on`, which is asked after each piece, called it off.
    pub fn write(
        slab: &SlabReader,
        form: (DType, &[(usize, usize)]),
        path: &Path,
        below: Below,
        goes_on: &dyn Fn() -> bool,
    ) -> Result<Option<SlabCopy>> {
        let (dtype, shapes) = form;
        let bytes = slab.bytes();
        let mut place = match below {
            Below::Host(memory) => Place::Host(memory.room(bytes.len(), path)?),
            Below::Disk => Place::Disk(CopyFile::new(path)?),
        };
        for (index, piece) in bytes.chunks(PIECE).enumerate() {
            if !goes_on() {
                return Ok(None);
            }
            match &mut place {
                Place::Host(room) => room.put(index * PIECE, piece)?,
                Place::Disk(copy) => write_through(&copy.file, index * PIECE, piece)?,
            }
        }
        let copy = SlabCopy { place, dtype, shapes: shapes.to_vec() };
        assert_eq!(bytes.len() as u64, copy.bytes(), "a copy has the form of its slab");
        Ok(Some(copy))
    }

    /// Reads the copy into a slab of the same form; false if `goes_on` called it off.
    pub fn read(&self, slab: &mut Slab, goes_on: &dyn Fn() -> bool) -> Result<bool> {
        assert_eq!((slab.dtype(), slab.shapes()), (self.dtype, &*self.shapes), "form of a copy");
        let bytes = slab.bytes_mut();
        for (index, piece) in bytes.chunks_mut(PIECE).enumerate() {
            if !goes_on() {
                return Ok(false);
            }
            match &self.place {
                Place::Host(room) => room.get(index * PIECE, piece)?,
                Place::Disk(copy) => {
                    copy.file.read_exact_at(piece, (index * PIECE) as u64)?;
                    forget(&copy.file);
                }
            }
        }
        Ok(true)
    }

    /// Element type of the slab.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Rows and columns of its tensors.
    pub fn shapes(&self) -> &[(usize, usize)] {
        &self.shapes
    }

    /// Its size.
    pub fn bytes(&self) -> u64 {
        let elements: usize = self.shapes.iter().map(|(rows, cols)| rows * cols).sum();
        (elements * self.dtype.size()) as u64
    }
}

/// A copy's file, which is removed with it.
struct CopyFile {
    path: PathBuf,
    file: File,
}

impl CopyFile {
    fn new(path: &Path) -> Result<CopyFile> {
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create(true).truncate(true).open(path)?;
        Ok(CopyFile { path: path.to_path_buf(), file })
    }
}

impl Drop for CopyFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Has the system's cache give up what it holds of a file; a cache that does not only makes the next read faster.
fn forget(file: &File) {
    let _ = fadvise(file, 0, None, Advice::DontNeed);
}

fn write_through(file: &File, start: usize, piece: &[u8]) -> Result<()> {
    file.write_all_at(piece, start as u64)?;
    fdatasync(file)?;
    forget(file);
    Ok(())
}

/// Host memory as files that are mapped piece by piece.
pub struct MappedFiles;

impl HostMemory for MappedFiles {
    fn room(&self, bytes: usize, path: &Path) -> Result<Box<dyn HostRoom>> {
        let copy = CopyFile::new(path)?;
        // Blocks are taken beforehand: a page without one would end the process when it is written to.
        if bytes > 0 {
            rustix::fs::fallocate(&copy.file, FallocateFlags::empty(), 0, bytes as u64)
                .or_else(|fault| grow(&copy.file, bytes, fault))?;
        }
        Ok(Box::new(copy))
    }
}

impl HostRoom for CopyFile {
    fn put(&mut self, start: usize, piece: &[u8]) -> Result<()> {
        let window =
            Window::new(&self.file, start, piece.len(), ProtFlags::READ | ProtFlags::WRITE)?;
        // SAFETY: the window is `piece.len()` bytes of a mapping that nobody else knows.
        unsafe { std::ptr::copy_nonoverlapping(piece.as_ptr(), window.address, piece.len()) };
        Ok(())
    }

    fn get(&self, start: usize, piece: &mut [u8]) -> Result<()> {
        // A page behind the file's end would end the process.
        if self.file.metadata()?.len() < (start + piece.len()) as u64 {
            return Err(Error::new(ErrorKind::UnexpectedEof, "the copy has become shorter"));
        }
        let window = Window::new(&self.file, start, piece.len(), ProtFlags::READ)?;
        // SAFETY: as for writing.
        unsafe { std::ptr::copy_nonoverlapping(window.address, piece.as_mut_ptr(), piece.len()) };
        Ok(())
    }
}

/// Takes the blocks of a file by writing zeros, where the file system cannot otherwise.
fn grow(file: &File, bytes: usize, fault: rustix::io::Errno) -> Result<()> {
    if fault != rustix::io::Errno::OPNOTSUPP {
        return Err(fault.into());
    }
    let zeros = vec![0; PIECE.min(bytes)];
    (0..bytes)
        .step_by(PIECE)
        .try_for_each(|start| file.write_all_at(&zeros[..PIECE.min(bytes - start)], start as u64))
}

/// A piece of a file in memory.
struct Window {
    address: *mut u8,
    bytes: usize,
}

impl Window {
    fn new(file: &File, start: usize, bytes: usize, protection: ProtFlags) -> Result<Window> {
        let flags = MapFlags::SHARED | MapFlags::POPULATE;
        // SAFETY: a fresh mapping aliases nothing of this process; the file is ours alone and keeps its size.
        let address =
            unsafe { mmap(std::ptr::null_mut(), bytes, protection, flags, file, start as u64) }?;
        Ok(Window { address: address.cast(), bytes })
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new` and nothing points to it any more.
        let _ = unsafe { munmap(self.address.cast(), self.bytes) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arena::{Arena, Kind};
    use std::cell::Cell;

    fn filled(arena: &Arena, rows: usize) -> Slab {
        let owner = arena.owner("reference", Kind::Weights);
        let mut slab = arena.slab(owner, DType::F32, &[(rows, 5), (1, 7), (2, 7)]).unwrap();
        for (i, byte) in slab.bytes_mut().iter_mut().enumerate() {
            *byte = (i * 31 % 251) as u8;
        }
        slab
    }

    fn place(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("rehearsal-{name}-{}", std::process::id()))
    }

    #[test]
    fn a_slab_comes_back_from_host_and_disk_bit_for_bit_and_leaves_no_file() {
        for (below, name) in [(Below::Host(&MappedFiles), "host"), (Below::Disk, "disk")] {
            // The second has a whole piece and a part of one.
            for rows in [3, PIECE / 20 + 11] {
                let arena = Arena::new(None);
                let slab = filled(&arena, rows);
                let before = slab.reader().bytes().to_vec();
                let path = place(name);
                let form = (slab.dtype(), slab.shapes());
                let copy = SlabCopy::write(&slab.reader(), form, &path, below, &|| true);
                let copy = copy.unwrap().unwrap();
                drop(slab);
                assert_eq!((arena.held(), copy.bytes()), (0, before.len() as u64));
                let owner = arena.owner("reference", Kind::Weights);
                let mut back = arena.slab_at_hand(owner, copy.dtype(), copy.shapes()).unwrap();
                assert!(copy.read(&mut back, &|| true).unwrap());
                assert!(back.reader().bytes() == before);
                drop(copy);
                assert!(!path.exists());
            }
        }
    }

    #[test]
    fn what_is_called_off_between_two_pieces_leaves_no_file() {
        let arena = Arena::new(None);
        let slab = filled(&arena, PIECE / 20 + 11);
        let path = place("off");
        for below in [Below::Host(&MappedFiles), Below::Disk] {
            let looks = Cell::new(0);
            let goes_on = || looks.replace(looks.get() + 1) < 1;
            let form = (slab.dtype(), slab.shapes());
            let copy = SlabCopy::write(&slab.reader(), form, &path, below, &goes_on).unwrap();
            assert!(copy.is_none() && !path.exists() && looks.get() == 2);
        }
    }

    #[test]
    fn a_copy_that_was_cut_short_is_an_error_and_not_the_end_of_the_process() {
        let arena = Arena::new(None);
        let mut slab = filled(&arena, PIECE / 20 + 11);
        for (below, name) in [(Below::Host(&MappedFiles), "short-host"), (Below::Disk, "short")] {
            let path = place(name);
            let form = (slab.dtype(), slab.shapes());
            let copy = SlabCopy::write(&slab.reader(), form, &path, below, &|| true);
            let copy = copy.unwrap().unwrap();
            File::options().write(true).open(&path).unwrap().set_len(PIECE as u64).unwrap();
            let fault = copy.read(&mut slab, &|| true).unwrap_err();
            assert_eq!(fault.kind(), ErrorKind::UnexpectedEof, "{fault}");
        }
    }

    #[test]
    #[should_panic(expected = "written to while it is copied")]
    fn a_slab_is_not_written_to_while_a_reader_lives() {
        let arena = Arena::new(None);
        let mut slab = filled(&arena, 3);
        let _reader = slab.reader();
        let _ = slab.whole_mut();
    }
}
