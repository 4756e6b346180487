//! `--profile`: where the time went, as a table of 80 columns and as JSON.
//!
//! One block for each activity of the engine, one row for each operation of it (products by their widths). Knows no
//! operation: what was counted comes from the kernels, what the machine can do from its measurement.

use crate::checkpoint::disk_fault;
use anyhow::Result;
use rehearsal_kernels::profiled::{ActivityProfile, ClockKind, Count};
use rehearsal_kernels::{Activity, Machine, Profile};
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What was counted, beside what the machine could have done.
#[derive(Debug, Serialize)]
pub struct ProfileReport {
    /// Which seconds these are: the processor's where one thread computes, else those on the wall.
    pub clock: ClockKind,
    /// Seconds in the engine, of which shares are.
    pub seconds: f64,
    /// Seconds that counting took; they are left out everywhere else.
    pub overhead_seconds: f64,
    /// Seconds during which the engine waited for its callers.
    pub outside_seconds: f64,
    /// By activity, in order of a step.
    pub activities: Vec<ActivityReport>,
    /// The same of a device of the process that only samples.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sampler: Option<Box<ProfileReport>>,
}

/// One activity.
#[derive(Debug, Serialize)]
pub struct ActivityReport {
    /// Which.
    pub activity: Activity,
    /// Seconds of it.
    pub seconds: f64,
    /// Their share of all seconds in the engine.
    pub share: f64,
    /// Seconds of it that no operation took.
    pub between_seconds: f64,
    /// Bytes of weights, gradients, moments and cache that the device held.
    pub resting_bytes: u64,
    /// Its operations, the longest first.
    pub operations: Vec<OperationReport>,
}

/// One operation of one activity.
#[derive(Debug, Serialize)]
pub struct OperationReport {
    /// Its name in the kernels.
    pub operation: &'static str,
    /// Widths of a product, in and out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shape: Option<[usize; 2]>,
    /// Calls.
    pub calls: u64,
    /// Seconds in them.
    pub seconds: f64,
    /// Their share of all seconds in the engine.
    pub share: f64,
    /// Operations of floats (of integers, for int8 weights) that nothing else has made.
    pub flops: f64,
    /// Operations that repeat earlier ones.
    pub recomputed_flops: f64,
    /// Bytes of weights, gradients, moments and cache that are touched at least.
    pub resting_bytes: f64,
    /// Bytes of activations that are touched at least.
    pub passing_bytes: f64,
    /// Both kinds of operations in a second.
    pub flops_per_second: f64,
    /// Both kinds of bytes in a second.
    pub bytes_per_second: f64,
    /// Seconds that the machine needs at least.
    pub roof_seconds: f64,
    /// Their share of the seconds taken.
    pub roof_share: f64,
}

/// A profile of a device with so many threads, if one is asked.
pub fn counting(asked: bool, threads: usize) -> Option<Arc<Profile>> {
    asked.then(|| Arc::new(Profile::new(threads)))
}

impl ProfileReport {
    /// Writes the table and the JSON into a folder; tells both paths.
    pub fn write(&self, folder: &Path) -> Result<[PathBuf; 2]> {
        let paths = ["profile.txt", "profile.json"].map(|name| folder.join(name));
        let texts = [self.lines().join("\n"), serde_json::to_string_pretty(self)?];
        for (path, text) in paths.iter().zip(texts) {
            std::fs::write(path, text + "\n").map_err(|error| disk_fault("write", path, error))?;
        }
        Ok(paths)
    }

    /// What `profile` counted, on `machine`.
    pub fn new(profile: &Profile, machine: &Machine) -> ProfileReport {
        let counted = profile.activities();
        let (outside, inside): (Vec<_>, Vec<_>) =
            counted.iter().partition(|one| one.activity == Activity::Outside);
        let sum = |profiles: &[&ActivityProfile]| profiles.iter().map(|one| one.seconds).sum();
        let seconds: f64 = sum(&inside);
        let activity = |one: &&ActivityProfile| {
            let mut operations: Vec<_> =
                one.operations.iter().map(|row| operation(one, row, seconds, machine)).collect();
            operations.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
            ActivityReport {
                activity: one.activity,
                seconds: one.seconds,
                share: share(one.seconds, seconds),
                between_seconds: one.between_seconds(),
                resting_bytes: one.resting_bytes,
                operations,
            }
        };
        ProfileReport {
            clock: profile.clock(),
            seconds,
            overhead_seconds: counted.iter().map(|one| one.overhead_seconds).sum(),
            outside_seconds: sum(&outside),
            activities: inside.iter().map(activity).collect(),
            sampler: None,
        }
    }

    /// The same, with what a second device did that only samples.
    pub fn beside(self, sampler: Option<ProfileReport>) -> ProfileReport {
        ProfileReport { sampler: sampler.map(Box::new), ..self }
    }

    /// The table.
    pub fn lines(&self) -> Vec<String> {
        let cells = |cells: [&str; 7]| {
            let [name, calls, seconds, share, flops, bytes, roof] = cells;
            format!("{name:<33}{calls:>8}{seconds:>10}{share:>7}{flops:>8}{bytes:>7}{roof:>7}")
        };
        let mut lines =
            vec![cells(["operation", "calls", "seconds", "time %", "GFLOP/s", "GB/s", "roof %"])];
        for activity in &self.activities {
            let row = |name: &str, seconds: f64| {
                let share = percent(share(seconds, self.seconds));
                cells([name, "", &format!("{seconds:.4}"), &share, "", "", ""])
            };
            lines.push(String::new());
            lines.push(row(activity.activity.name(), activity.seconds));
            for operation in &activity.operations {
                let number = |value: f64| format!("{:.1}", value * 1e-9);
                lines.push(cells([
                    &format!("  {}", operation.label()),
                    &operation.calls.to_string(),
                    &format!("{:.4}", operation.seconds),
                    &percent(operation.share),
                    &number(operation.flops_per_second),
                    &number(operation.bytes_per_second),
                    &percent(operation.roof_share),
                ]));
            }
            lines.push(row("  between operations", activity.between_seconds));
        }
        lines.push(String::new());
        lines.extend(self.notes());
        if let Some(sampler) = &self.sampler {
            lines.extend([String::new(), "The device that only samples:".to_string()]);
            lines.extend(sampler.lines());
        }
        lines
    }
}

impl ProfileReport {
    /// What stands below the table.
    fn notes(&self) -> [String; 4] {
        let clock = match self.clock {
            ClockKind::Processor => "of the processor",
            ClockKind::Wall => "on the wall",
        };
        let ProfileReport { seconds, outside_seconds, overhead_seconds, .. } = self;
        [
            format!(
                "Seconds {clock}: {seconds:.3} in the engine, {outside_seconds:.3} outside of it;"
            ),
            format!(
                "counting took {overhead_seconds:.3} more. Roof: the time that the machine needs at"
            ),
            "least, at the peak of its products or at the speed at which it reads the bytes,"
                .to_string(),
            "whichever is longer, in percent of the time taken.".to_string(),
        ]
    }
}

impl OperationReport {
    /// Its name in a table: "linear_experts dw 512->1024".
    fn label(&self) -> String {
        let name = self.operation.replace("_backward_weight", " dw");
        let name = name.replace("_backward_input", " dx").replace("_backward", " backward");
        match self.shape {
            Some([inputs, outputs]) => format!("{name} {inputs}->{outputs}"),
            None => name,
        }
    }
}

fn operation(
    activity: &ActivityProfile,
    (name, count): &(&'static str, Count),
    all_seconds: f64,
    machine: &Machine,
) -> OperationReport {
    let Count { calls, seconds, cost } = *count;
    let roof_seconds = activity.roof_seconds(count, machine);
    OperationReport {
        operation: name,
        shape: (cost.shape != [0, 0]).then_some(cost.shape),
        calls,
        seconds,
        share: share(seconds, all_seconds),
        flops: cost.flops,
        recomputed_flops: cost.recomputed,
        resting_bytes: cost.resting,
        passing_bytes: cost.passing,
        flops_per_second: share(cost.flops + cost.recomputed, seconds),
        bytes_per_second: share(cost.resting + cost.passing, seconds),
        roof_seconds,
        roof_share: share(roof_seconds, seconds),
    }
}

/// Part of a whole, 0 of nothing.
fn share(part: f64, whole: f64) -> f64 {
    if whole > 0.0 { part / whole } else { 0.0 }
}

fn percent(share: f64) -> String {
    format!("{:.1}", 100.0 * share)
}
