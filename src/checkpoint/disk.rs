//! Writing so that it survives a power cut, and what the disk's errors mean to a person.
//!
//! A full disk, a quota or a read-only place is a lack of resources (exit code 4), a place that cannot be a folder or
//! may not be written is the user's to change (2); every other error of the operating system is passed on with the
//! path and what was being done.

use crate::config::Fault;
use crate::config::limited::{self, Unread};
use anyhow::Result;
use std::fs::File;
use std::io::{ErrorKind, Write};
use std::path::Path;

/// Says what an error of the disk means.
pub fn disk_fault(doing: &str, path: &Path, error: std::io::Error) -> anyhow::Error {
    let path = path.display();
    match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge => {
            Fault::resources(format!(
                "no room left to {doing} {path}: {error}; free some space (or lower \
                 checkpoint.keep) and run again with --resume"
            ))
        }
        ErrorKind::ReadOnlyFilesystem => Fault::resources(format!(
            "cannot {doing} {path}: {error}; choose another place with --out"
        )),
        ErrorKind::NotADirectory | ErrorKind::AlreadyExists | ErrorKind::PermissionDenied => {
            Fault::user(format!("cannot {doing} {path}: {error}; choose another place with --out"))
        }
        _ => anyhow::Error::new(error).context(format!("failed to {doing} {path}")),
    }
}

/// Forces a file's content to the disk.
pub(super) fn sync_file(path: &Path) -> Result<()> {
    File::open(path).and_then(|file| file.sync_all()).map_err(|e| disk_fault("sync", path, e))
}

/// Forces a folder's list of names to the disk.
pub(super) fn sync_folder(path: &Path) -> Result<()> {
    sync_file(path)
}

/// Writes a whole file and forces it to the disk.
pub(super) fn write_synced(path: &Path, bytes: &[u8]) -> Result<()> {
    let write = || -> std::io::Result<()> {
        let mut file = File::create(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(|e| disk_fault("write", path, e))
}

/// Renames within one folder and forces the new name to the disk.
pub(super) fn rename_synced(from: &Path, to: &Path) -> Result<()> {
    std::fs::rename(from, to).map_err(|e| disk_fault("rename into", to, e))?;
    sync_folder(to.parent().expect("a renamed path has a parent"))
}

/// Reads a small file of text; a larger one than `limit` is not what it claims to be.
pub(super) fn read_limited(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let at = path.display();
    limited::read_limited(path, limit).map_err(|unread| match unread {
        Unread::Io(e) if e.kind() == ErrorKind::NotFound => {
            Fault::user(format!("{at}: no such file"))
        }
        Unread::Io(e) => anyhow::Error::new(e).context(format!("failed to read {at}")),
        larger => Fault::user(format!("{at}: {larger}")),
    })
}

/// True for a name that stays in the folder it is looked up in.
pub(super) fn is_plain_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 255
        && !name.starts_with('.')
        && !name.contains("..")
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_a_lack_of_resources() {
        let error =
            write_synced(Path::new("/dev/full"), &[0; 4096]).expect_err("/dev/full has no room");
        assert!(
            matches!(error.downcast_ref(), Some(Fault::Resources(m)) if m.contains("/dev/full")),
            "{error:#}"
        );
    }

    #[test]
    fn each_error_of_the_system_has_the_code_of_whose_it_is() {
        let code = |kind: ErrorKind| {
            let error = disk_fault("create", Path::new("x"), kind.into());
            error.downcast_ref::<Fault>().map(Fault::exit_code)
        };
        assert_eq!(code(ErrorKind::ReadOnlyFilesystem), Some(4));
        assert_eq!(code(ErrorKind::StorageFull), Some(4));
        assert_eq!(code(ErrorKind::NotADirectory), Some(2));
        assert_eq!(code(ErrorKind::PermissionDenied), Some(2));
        assert_eq!(code(ErrorKind::TimedOut), None);
    }

    #[test]
    fn a_name_may_not_leave_its_folder() {
        for name in
            ["", ".", "..", "a/b", "/etc/passwd", "a\\b", "..x", "a..b", ".hidden", "a\nb", "é"]
        {
            assert!(!is_plain_name(name), "{name:?}");
        }
        for name in ["model.safetensors", "model-00001-of-00002.safetensors", "reward.json"] {
            assert!(is_plain_name(name), "{name:?}");
        }
    }
}
