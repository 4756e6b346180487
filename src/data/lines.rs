//! Lines of a text file, plain or gzip, one at a time; and the writing of generated ones.
//!
//! Reads no JSON. Whether a file is gzip is told by its first two bytes, never by its name.
//!
//! Invariants:
//!   * at most [`LINE_LIMIT`] bytes of a line are ever in memory
//!   * every fault names the file and the line, counted from 1

use crate::config::fault::Fault;
use anyhow::{Context, Result};
use flate2::bufread::MultiGzDecoder;
use serde_json::Value;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

/// Longest line that is read.
pub const LINE_LIMIT: usize = 16 << 20;

/// An iterator over the lines of a file; see the module.
pub struct Lines {
    path: PathBuf,
    input: Box<dyn BufRead + Send>,
    next: u64,
    done: bool,
}

/// One line without its line break.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// Index from 0; messages show it plus one.
    pub index: u64,
    /// The text.
    pub text: String,
}

impl Lines {
    /// Opens a file.
    pub fn open(path: &Path) -> Result<Lines> {
        let fault = |error: std::io::Error| {
            Fault::user(format!("{}: cannot be read: {error}", path.display()))
        };
        let file = File::open(path).map_err(fault)?;
        if file.metadata().map_err(fault)?.is_dir() {
            return Err(Fault::user(format!("{}: is a folder; name a file", path.display())));
        }
        let mut plain = BufReader::with_capacity(1 << 16, file);
        let gzip = plain.fill_buf().map_err(fault)?.starts_with(&[0x1f, 0x8b]);
        let input: Box<dyn BufRead + Send> = if gzip {
            Box::new(BufReader::with_capacity(1 << 16, MultiGzDecoder::new(plain)))
        } else {
            Box::new(plain)
        };
        Ok(Lines { path: path.to_path_buf(), input, next: 0, done: false })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A user's fault at a line of this file.
    pub fn fault(&self, index: u64, reason: &str) -> anyhow::Error {
        fault_at(&self.path, index, reason)
    }

    fn read(&mut self) -> Result<Option<Line>> {
        let index = self.next;
        let mut bytes = Vec::new();
        let mut ended = false;
        while !ended {
            let available = match self.input.fill_buf() {
                Ok(available) => available,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    let reason = format!("cannot be read: {error} (cut off or no gzip?)");
                    return Err(fault_at(&self.path, index, &reason));
                }
            };
            if available.is_empty() {
                if bytes.is_empty() {
                    return Ok(None);
                }
                break;
            }
            let end = available.iter().position(|byte| *byte == b'\n');
            let taken = end.map_or(available.len(), |end| end + 1);
            bytes.extend_from_slice(&available[..end.unwrap_or(available.len())]);
            ended = end.is_some();
            self.input.consume(taken);
            if bytes.len() > LINE_LIMIT {
                let reason = format!("the line is longer than {} MiB", LINE_LIMIT >> 20);
                return Err(fault_at(&self.path, index, &reason));
            }
        }
        if bytes.last() == Some(&b'\r') {
            bytes.pop();
        }
        // Some editors put a mark of the encoding before a text.
        if index == 0 && bytes.starts_with(b"\xef\xbb\xbf") {
            bytes.drain(..3);
        }
        self.next += 1;
        match String::from_utf8(bytes) {
            Ok(text) => Ok(Some(Line { index, text })),
            Err(error) => {
                let place = error.utf8_error().valid_up_to() + 1;
                let reason = format!("byte {place} of the line is not UTF-8; convert the file");
                Err(fault_at(&self.path, index, &reason))
            }
        }
    }
}

impl Iterator for Lines {
    type Item = Result<Line>;

    fn next(&mut self) -> Option<Result<Line>> {
        if self.done {
            return None;
        }
        let line = self.read().transpose();
        // After a fault the place in the stream is lost: nothing more is handed out.
        self.done = !matches!(line, Some(Ok(_)));
        line
    }
}

/// Writes values as a file of one JSON a line.
pub fn write_lines(path: &Path, lines: &[Value]) -> Result<()> {
    let write = || -> std::io::Result<()> {
        let mut file = std::io::BufWriter::new(File::create(path)?);
        lines.iter().try_for_each(|line| writeln!(file, "{line}"))?;
        file.flush()
    };
    write().with_context(|| format!("failed to write {}", path.display()))
}

/// A user's fault at line `index` (from 0) of a file.
pub fn fault_at(path: &Path, index: u64, reason: &str) -> anyhow::Error {
    Fault::user(format!("{}:{}: {reason}", path.display(), index + 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(bytes: &[u8]) -> Result<Vec<String>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lines.txt");
        std::fs::write(&path, bytes).unwrap();
        Lines::open(&path)?.map(|line| line.map(|line| line.text)).collect()
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn plain_and_gzip_files_give_the_same_lines_with_or_without_a_last_line_break() {
        let lines = vec!["one".to_string(), String::new(), "drei ☃".to_string()];
        for text in ["one\n\ndrei ☃\n", "one\n\ndrei ☃", "one\r\n\r\ndrei ☃\r\n"] {
            assert_eq!(read(text.as_bytes()).unwrap(), lines);
            assert_eq!(read(&gzip(text.as_bytes())).unwrap(), lines);
        }
        assert_eq!(
            read("\u{feff}one\n\n\u{feff}two".as_bytes()).unwrap(),
            ["one", "", "\u{feff}two"]
        );
        let mut twice = gzip(b"one\n\n");
        twice.extend(gzip("drei ☃".as_bytes()));
        assert_eq!(read(&twice).unwrap(), lines, "a gzip file may have several members");
        assert!(read(b"").unwrap().is_empty());
    }

    #[test]
    fn broken_input_is_named_by_file_and_line() {
        let fault = |bytes: &[u8]| read(bytes).unwrap_err().to_string();
        let broken = fault(b"fine\nb\xffd\n");
        assert!(broken.contains("lines.txt:2: byte 2 of the line is not UTF-8"), "{broken}");
        let cut = gzip(&b"a line\n".repeat(50_000));
        let cut = fault(&cut[..cut.len() / 2]);
        assert!(cut.contains("lines.txt:") && cut.contains("cannot be read"), "{cut}");
        let mut long = b"short\n".to_vec();
        long.resize(LINE_LIMIT + 10, b'x');
        let long = fault(&long);
        assert!(long.contains("lines.txt:2: the line is longer than 16 MiB"), "{long}");
        let absent = Lines::open(Path::new("/nonexistent/a.jsonl")).err().unwrap();
        assert!(absent.to_string().contains("/nonexistent/a.jsonl: cannot be read"));
        assert!(absent.downcast_ref::<Fault>().is_some_and(|f| f.exit_code() == 2));
    }
}
