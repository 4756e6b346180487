//! What this machine has left to hold: memory that is free, limits of the process and of its container, disk; and what it
//! does in a second.
//!
//! Knows no run. A source that is not there (another system, no container) sets no limit.

use super::command::cores;
use crate::checkpoint::disk_fault;
use anyhow::{Context, Result};
use rehearsal_kernels::machine::{Effort, Machine, measure, measure_products};
use rustix::process::{Resource, getrlimit};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Bytes that can still be held here without being refused or killed; `None` where nothing says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FreeMemory {
    /// Of the machine and of the container, for all of its processes together.
    pub shared: Option<u64>,
    /// What limits of a process leave this one, whatever others hold.
    pub own: Option<u64>,
}

impl FreeMemory {
    /// Of this process, now.
    pub fn here() -> FreeMemory {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let left = |resource, used: &str| {
            let limit = getrlimit(resource).current?;
            Some(limit.saturating_sub(kibibytes(&status, used).unwrap_or(0)))
        };
        let available = std::fs::read_to_string("/proc/meminfo").ok();
        let available = available.and_then(|text| kibibytes(&text, "MemAvailable:"));
        let least = |of: [Option<u64>; 2]| of.into_iter().flatten().min();
        FreeMemory {
            shared: least([available, container_memory()]),
            own: least([left(Resource::As, "VmSize:"), left(Resource::Data, "VmData:")]),
        }
    }

    /// What each of so many processes like this one can hold.
    pub fn of_each(self, processes: usize) -> Option<u64> {
        let part = self.shared.map(|bytes| bytes / processes as u64);
        part.into_iter().chain(self.own).min()
    }
}

/// Bytes that this process can still hold, if it is alone.
pub fn free_memory() -> Option<u64> {
    FreeMemory::here().of_each(1)
}

/// The share of free memory that the arenas of a run without a budget may take: nine tenths.
pub fn share_for_arenas(free: u64) -> u64 {
    free / 10 * 9
}

/// What this machine does in a second on so many threads; memory is measured if a quarter of what is free suffices.
pub fn measured(threads: usize, effort: fn(u64) -> Effort) -> Machine {
    measure(threads, &effort(free_memory().map_or(0, |free| free / 4)))
}

/// The same for a run that will hold so many bytes itself: measuring memory takes no more, so that a small run stays small.
pub fn measured_for_run(threads: usize, run_bytes: u64) -> Machine {
    let room = free_memory().map_or(0, |free| free / 4).min(run_bytes);
    measure(threads, &Effort::brief(room))
}

/// f32 operations of products that so many threads do in a second; of more threads than cores those of the cores, which is
/// what they share.
pub fn measured_products(threads: usize) -> f64 {
    measure_products(threads.min(cores()), &Effort::brief(0))
}

/// A line `NAME   NUMBER kB`, in bytes.
fn kibibytes(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
}

/// What the control groups above this process leave it.
fn container_memory() -> Option<u64> {
    let groups = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    let second = groups.lines().find_map(|line| line.strip_prefix("0::"));
    let first = groups.lines().find_map(|line| line.split_once(":memory:").map(|(_, path)| path));
    let left = |root: &str, path: Option<&str>, names: [&str; 3]| {
        group_memory(Path::new(root), path?, names)
    };
    let unified =
        left("/sys/fs/cgroup", second, ["memory.max", "memory.current", "inactive_file "]);
    let legacy = ["memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file "];
    [unified, left("/sys/fs/cgroup/memory", first, legacy)].into_iter().flatten().min()
}

/// The least that a group and those above it leave: their limit less what they hold, files that can be dropped apart.
fn group_memory(root: &Path, path: &str, [limit, used, files]: [&str; 3]) -> Option<u64> {
    let own = root.join(path.trim_start_matches('/'));
    let left = |group: &Path| {
        let read = |name: &str| std::fs::read_to_string(group.join(name)).ok();
        let number = |name: &str| read(name)?.trim().parse::<u64>().ok();
        let droppable = || {
            let stat = read("memory.stat")?;
            stat.lines().find_map(|line| line.strip_prefix(files))?.trim().parse::<u64>().ok()
        };
        let held = number(used).unwrap_or(0).saturating_sub(droppable().unwrap_or(0));
        Some(number(limit)?.saturating_sub(held))
    };
    own.ancestors().take_while(|group| group.starts_with(root)).filter_map(left).min()
}

/// Free bytes of the disk where a folder is or will be.
pub fn free_disk(folder: &Path) -> Result<u64> {
    let folder = std::path::absolute(folder)?;
    let exists = folder.ancestors().find(|ancestor| ancestor.is_dir()).unwrap_or(Path::new("/"));
    let disk = rustix::fs::statvfs(exists)
        .with_context(|| format!("failed to measure the disk of {}", exists.display()))?;
    Ok(disk.f_bavail.saturating_mul(disk.f_frsize))
}

/// Bytes of disk that a folder holds, block by block; 0 if it is not there.
pub fn held_disk(folder: &Path) -> Result<u64> {
    let mut bytes = 0;
    let mut folders = vec![folder.to_path_buf()];
    while let Some(folder) = folders.pop() {
        let entries = match std::fs::read_dir(&folder) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            entries => entries.map_err(|error| disk_fault("list", &folder, error))?,
        };
        for entry in entries {
            let entry = entry.map_err(|error| disk_fault("list", &folder, error))?;
            // What vanishes meanwhile holds nothing.
            let Ok(metadata) = entry.metadata() else { continue };
            bytes += 512 * metadata.blocks();
            if metadata.is_dir() {
                folders.push(entry.path());
            }
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_counted_in_bytes_and_only_where_a_line_says_so() {
        let text = "MemTotal:       24000 kB\nMemAvailable:    1000 kB\n";
        assert_eq!(kibibytes(text, "MemAvailable:"), Some(1_024_000));
        assert_eq!(kibibytes(text, "SwapFree:"), None);
        assert!(free_memory().is_some_and(|bytes| bytes > 1 << 20));
        assert_eq!(share_for_arenas(1000), 900);
    }

    #[test]
    fn processes_share_what_the_machine_has_and_each_has_what_its_limits_leave_it() {
        let free = |shared, own| FreeMemory { shared, own };
        let of = |free: FreeMemory| [1, 4].map(|processes| free.of_each(processes));
        assert_eq!(of(free(Some(1000), None)), [Some(1000), Some(250)]);
        assert_eq!(of(free(None, Some(400))), [Some(400), Some(400)]);
        assert_eq!(of(free(Some(1000), Some(400))), [Some(400), Some(250)]);
        assert_eq!(of(free(None, None)), [None, None]);
    }

    #[test]
    fn a_group_leaves_its_limit_less_what_it_holds_and_never_more_than_the_group_above() {
        let root = tempfile::tempdir().unwrap();
        let names = ["memory.max", "memory.current", "inactive_file "];
        let group = |path: &str, max: &str, current: &str, files: &str| {
            let folder = root.path().join(path);
            std::fs::create_dir_all(&folder).unwrap();
            std::fs::write(folder.join("memory.max"), max).unwrap();
            std::fs::write(folder.join("memory.current"), current).unwrap();
            std::fs::write(folder.join("memory.stat"), format!("anon 1\n{files}\n")).unwrap();
        };
        group("outer", "1000\n", "400\n", "inactive_file 100");
        group("outer/inner", "max\n", "300\n", "");
        assert_eq!(group_memory(root.path(), "/outer/inner", names), Some(700));
        group("outer/inner", "500\n", "300\n", "");
        assert_eq!(group_memory(root.path(), "/outer/inner", names), Some(200));
        assert_eq!(group_memory(root.path(), "/absent", names), None);
    }

    #[test]
    fn disk_is_measured_where_a_folder_is_or_will_be() {
        let place = tempfile::tempdir().unwrap();
        assert!(free_disk(&place.path().join("not/yet/there")).unwrap() > 0);
        assert_eq!(held_disk(&place.path().join("absent")).unwrap(), 0);
        std::fs::create_dir(place.path().join("inner")).unwrap();
        std::fs::write(place.path().join("inner/file"), vec![1; 100_000]).unwrap();
        assert!(held_disk(place.path()).unwrap() >= 100_000);
    }
}
