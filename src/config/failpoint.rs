//! Named points at which a test kills, slows or stops what passes them, to show that nothing is lost or done twice.
//!
//! `REHEARSAL_FAIL_AT=name` or `name:n` kills at the n-th passage of the point (the first by
//! default) with SIGKILL, which no code of ours can soften. `REHEARSAL_FAIL_WITNESS=FILE` gets the
//! name just before: a test whose witness is empty has tested nothing. Without the variable a
//! passage costs one atomic read.
//!
//! `REHEARSAL_FAIL_HOW` says what else is to happen there: `delay:MS` sleeps so many milliseconds at this and every later
//! passage, `hang` never goes on, `panic` panics once.
//!
//! It stands on the lowest floor because every floor has places where a crash hurts.

use std::io::Write;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Kills the process here if the environment says so, or does what else it says.
pub fn failpoint(name: &str) {
    static PLAN: OnceLock<Option<Plan>> = OnceLock::new();
    let plan = PLAN.get_or_init(|| {
        let spec = std::env::var("REHEARSAL_FAIL_AT").ok().filter(|s| !s.is_empty())?;
        let witness = std::env::var_os("REHEARSAL_FAIL_WITNESS").map(PathBuf::from);
        let how = std::env::var("REHEARSAL_FAIL_HOW").unwrap_or_default();
        Some(Plan { how: How::parse(&how), ..Plan::parse(&spec, witness) })
    });
    if let Some(plan) = plan {
        plan.pass(name);
    }
}

#[derive(Debug)]
struct Plan {
    name: String,
    how: How,
    /// Passages that are still survived, plus one; 0 when the point has fired.
    left: AtomicU64,
    witness: Option<PathBuf>,
}

/// What happens at the point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    Kill,
    Delay(Duration),
    Hang,
    Panic,
}

impl How {
    fn parse(text: &str) -> How {
        let delay = text.strip_prefix("delay:").and_then(|millis| millis.parse().ok());
        match (text, delay) {
            ("" | "kill", _) => How::Kill,
            ("hang", _) => How::Hang,
            ("panic", _) => How::Panic,
            (_, Some(millis)) => How::Delay(Duration::from_millis(millis)),
            _ => panic!(
                "REHEARSAL_FAIL_HOW = {text:?}: expected kill, delay:MILLISECONDS, hang or panic"
            ),
        }
    }
}

impl Plan {
    fn parse(spec: &str, witness: Option<PathBuf>) -> Plan {
        let (name, passage) = match spec.split_once(':') {
            Some((name, count)) => (name, count.parse().ok().filter(|n| *n > 0)),
            None => (spec, Some(1)),
        };
        let passage = passage.unwrap_or_else(|| {
            panic!("REHEARSAL_FAIL_AT = {spec:?}: expected NAME or NAME:N with N at least 1")
        });
        let (name, how) = (name.to_string(), How::Kill);
        Plan { name, how, left: AtomicU64::new(passage), witness }
    }

    fn pass(&self, name: &str) {
        match self.how {
            How::Delay(long) if self.is_delayed(name) => std::thread::sleep(long),
            How::Kill if self.is_due(name) => self.kill(),
            How::Panic if self.is_due(name) => panic!("panic at the failpoint {}", self.name),
            How::Hang if self.is_due(name) => loop {
                std::thread::park();
            },
            _ => {}
        }
    }

    /// Whether this is the passage that is named, which is witnessed.
    fn is_due(&self, name: &str) -> bool {
        let one_less = |left: u64| left.checked_sub(1);
        let is_due = name == self.name
            && self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_less) == Ok(1);
        if is_due {
            self.testify();
        }
        is_due
    }

    /// Whether it is that one or a later one.
    fn is_delayed(&self, name: &str) -> bool {
        self.is_due(name) || name == self.name && self.left.load(Ordering::Relaxed) == 0
    }

    fn testify(&self) {
        if let Some(path) = &self.witness {
            let mut file = std::fs::OpenOptions::new()
                .create(true)
                .append(true)
                .open(path)
                .expect("the test names a witness file that can be written");
            writeln!(file, "{}", self.name).expect("the witness file can be written");
            // The kill below must not overtake the witness.
            file.sync_all().expect("the witness file can be written");
        }
    }

    fn kill(&self) -> ! {
        let me = rustix::process::getpid();
        rustix::process::kill_process(me, rustix::process::Signal::KILL)
            .expect("a process may kill itself");
        // The signal may be delivered to another thread first; this one must not go on.
        loop {
            std::thread::park();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_fires_once_at_the_passage_it_names() {
        let plan = Plan::parse("checkpoint-write:3", None);
        let fired: Vec<bool> = (0..5).map(|_| plan.is_due("checkpoint-write")).collect();
        assert_eq!(fired, [false, false, true, false, false]);
    }

    #[test]
    fn a_delay_begins_at_the_passage_that_is_named_and_lasts() {
        let plan = Plan::parse("layer-forward:3", None);
        assert!(!plan.is_delayed("layer-backward"));
        let delayed: Vec<bool> = (0..5).map(|_| plan.is_delayed("layer-forward")).collect();
        assert_eq!(delayed, [false, false, true, true, true]);
        assert!(!plan.is_delayed("layer-backward"));
        assert_eq!(How::parse("delay:70"), How::Delay(Duration::from_millis(70)));
        assert_eq!(["", "hang", "panic"].map(How::parse), [How::Kill, How::Hang, How::Panic]);
    }

    #[test]
    #[should_panic(expected = "expected kill, delay:MILLISECONDS, hang or panic")]
    fn an_unknown_way_to_fail_is_refused_too() {
        How::parse("delay:soon");
    }

    #[test]
    fn other_points_do_not_count() {
        let plan = Plan::parse("checkpoint-write", None);
        assert!(!plan.is_due("export-write"));
        assert!(plan.is_due("checkpoint-write"));
    }

    #[test]
    #[should_panic(expected = "expected NAME or NAME:N")]
    fn a_malformed_plan_is_refused_so_that_no_test_passes_by_accident() {
        Plan::parse("checkpoint-write:x", None);
    }
}
