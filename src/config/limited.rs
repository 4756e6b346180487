//! Reading a small file whole, and no more of it than such a file may have.
//!
//! It stands on the lowest floor because every floor reads files that somebody else wrote.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// Why a file was not read; the caller names it.
#[derive(Debug)]
pub enum Unread {
    /// The operating system says so.
    Io(std::io::Error),
    /// It is larger than so many bytes.
    Larger(u64),
}

impl fmt::Display for Unread {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Unread::Io(error) => write!(out, "cannot be read: {error}"),
            Unread::Larger(limit) => {
                write!(out, "larger than the {limit} bytes that such a file may have")
            }
        }
    }
}

/// Reads a file of at most `limit` bytes.
pub fn read_limited(path: &Path, limit: u64) -> Result<Vec<u8>, Unread> {
    let file = File::open(path).map_err(Unread::Io)?;
    let mut bytes = Vec::new();
    // One byte more than allowed tells a file of exactly `limit` bytes from a longer one.
    file.take(limit + 1).read_to_end(&mut bytes).map_err(Unread::Io)?;
    match bytes.len() as u64 > limit {
        true => Err(Unread::Larger(limit)),
        false => Ok(bytes),
    }
}

/// [`read_limited`] of a text.
pub fn read_limited_text(path: &Path, limit: u64) -> Result<String, Unread> {
    let not_text = |error| Unread::Io(std::io::Error::new(std::io::ErrorKind::InvalidData, error));
    String::from_utf8(read_limited(path, limit)?).map_err(not_text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_read_up_to_its_limit_and_not_beyond() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        std::fs::write(&path, "eight by").unwrap();
        assert_eq!(read_limited_text(&path, 8).unwrap(), "eight by");
        let why = read_limited(&path, 7).unwrap_err().to_string();
        assert!(why.contains("larger than the 7 bytes"), "{why}");
        // A file without an end.
        assert!(matches!(read_limited(Path::new("/dev/zero"), 1 << 16), Err(Unread::Larger(_))));
        std::fs::write(&path, [0xff]).unwrap();
        let why = read_limited_text(&path, 8).unwrap_err().to_string();
        assert!(why.contains("cannot be read: invalid utf-8"), "{why}");
        assert!(matches!(read_limited(folder.path(), 8), Err(Unread::Io(_))));
    }
}
