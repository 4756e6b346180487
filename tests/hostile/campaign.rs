//! A campaign: so many inputs against the targets of one name, each input measured.
//!
//! What must hold for each: no panic; the file is accepted, or refused by an error that is the
//! user's to mend and names the file; at most the file's size and the target's bound of memory; at
//! most [`MOST_SECONDS`] of the processor. A failure is told by the number of its input, which makes
//! it again.

use super::meter::{measured, thread_seconds};
use super::targets::{Target, targets};
use rehearsal::cli::failure::exit_code;
use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

/// Most time of the processor for an input.
pub const MOST_SECONDS: f64 = 1.0;

/// An input that is not done after so long never will be.
const HANGS: Duration = Duration::from_secs(120);

/// What a campaign found.
#[derive(Clone, Debug, Default)]
pub struct Figures {
    /// Inputs that were tried.
    pub inputs: u64,
    /// Those that were accepted.
    pub accepted: u64,
    /// Most bytes that were held beyond an input's own.
    pub peak_bytes: usize,
    /// The longest that an input took.
    pub slowest: f64,
    /// Time of the processor that the readers took.
    pub reading: f64,
    /// And the whole campaign, the making of inputs included.
    pub computing: f64,
    /// What must not be.
    pub failures: Vec<String>,
}

/// Tries `inputs` inputs; panics if one hangs.
pub fn run(campaign: &'static str, inputs: u64) -> Figures {
    let (done, result) = channel();
    let at = Arc::new(AtomicU64::new(0));
    let seen = at.clone();
    std::thread::spawn(move || {
        // Whoever waits for it may have given up.
        let _ = done.send(try_all(campaign, inputs, &seen));
    });
    let mut before = u64::MAX;
    loop {
        match result.recv_timeout(HANGS) {
            Ok(figures) => return figures,
            Err(RecvTimeoutError::Disconnected) => panic!("{campaign}: the campaign itself failed"),
            Err(RecvTimeoutError::Timeout) => {
                let now = at.load(Ordering::Relaxed);
                assert_ne!(now, before, "{campaign}: input {now} hangs");
                before = now;
            }
        }
    }
}

/// Asserts that a campaign of so many inputs finds nothing, and prints its figures.
pub fn must_hold(campaign: &'static str, inputs: u64) {
    let figures = run(campaign, inputs);
    println!(
        "{campaign}: {} inputs, {} accepted, {:.0} a second of reading, {:.0} s in all, {} KiB beyond the file at most, {:.0} ms at most, {} failures",
        figures.inputs,
        figures.accepted,
        figures.inputs as f64 / figures.reading,
        figures.computing,
        figures.peak_bytes >> 10,
        1000.0 * figures.slowest,
        figures.failures.len()
    );
    assert!(figures.failures.is_empty(), "{}", figures.failures.join("\n"));
    assert_eq!(figures.inputs, inputs);
    // A campaign whose inputs all fall at the first check shows nothing, nor does one that changes nothing.
    let accepted = figures.accepted as f64 / figures.inputs as f64;
    assert!((0.01..0.9).contains(&accepted), "{campaign}: {accepted} of the inputs are accepted");
}

fn try_all(campaign: &'static str, inputs: u64, at: &AtomicU64) -> Figures {
    let targets = targets(campaign);
    let mut figures = Figures::default();
    for target in &targets {
        for file in target.corpus.files() {
            target.try_on(file).unwrap_or_else(|error| panic!("a valid file: {error:#}"));
        }
    }
    let start = thread_seconds();
    for index in 0..inputs {
        at.store(index, Ordering::Relaxed);
        let target = &targets[index as usize % targets.len()];
        let input = target.corpus.input(number(campaign), index);
        if let Some(failure) = try_one(target, &input, &mut figures) {
            let path = std::env::temp_dir().join(format!("hostile-{campaign}-{index}"));
            let kept = std::fs::write(&path, &input)
                .map_or(String::new(), |()| format!(" (kept as {})", path.display()));
            figures.failures.push(format!("{campaign}, input {index}{kept}: {failure}"));
            if figures.failures.len() == 10 {
                break;
            }
        }
    }
    figures.computing = thread_seconds() - start;
    figures
}

/// Tries one input; says what must not be.
pub fn try_one(target: &Target, input: &[u8], figures: &mut Figures) -> Option<String> {
    let (result, cost) = measured(|| catch_unwind(AssertUnwindSafe(|| target.try_on(input))));
    let beyond = cost.peak_bytes.saturating_sub(input.len());
    figures.inputs += 1;
    figures.peak_bytes = figures.peak_bytes.max(beyond);
    figures.slowest = figures.slowest.max(cost.seconds);
    figures.reading += cost.seconds;
    if beyond > target.bound {
        return Some(format!("{beyond} bytes beyond its own {}", input.len()));
    }
    if cost.seconds > MOST_SECONDS {
        return Some(format!("{:.1} s", cost.seconds));
    }
    match result {
        Err(panic) => {
            let said = panic.downcast_ref::<String>().map(String::as_str);
            let said = said.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("?");
            Some(format!("panic: {said}"))
        }
        Ok(Ok(())) => {
            figures.accepted += 1;
            None
        }
        Ok(Err(error)) => {
            let text = format!("{error:#}");
            let named = text.contains(&target.folder().display().to_string());
            match (exit_code(&error), named) {
                (2, true) => None,
                (code, true) => Some(format!("exit code {code}: {text}")),
                (_, false) => Some(format!("no file is named: {text}")),
            }
        }
    }
}

/// A campaign's own random numbers.
fn number(campaign: &str) -> u64 {
    campaign.bytes().fold(1, |number, byte| number * 31 % 1_000_003 + u64::from(byte))
}

/// Tries one input of a fuzzer, whose first byte chooses the target if there are several; panics at
/// a failure. `REHEARSAL_SEEDS=FOLDER` gets the valid files before the first.
pub fn fuzz(campaign: &'static str, input: &[u8]) {
    thread_local! {
        static TARGETS: RefCell<Vec<Target>> = const { RefCell::new(Vec::new()) };
    }
    TARGETS.with_borrow_mut(|all| {
        if all.is_empty() {
            *all = targets(campaign);
            if let Some(folder) = std::env::var_os("REHEARSAL_SEEDS") {
                write_seeds(all, Path::new(&folder));
            }
        }
        let (choice, input) = match all.len() {
            1 => (0, input),
            _ => input.split_first().map_or((0, input), |(first, rest)| (*first as usize, rest)),
        };
        let target = &all[choice % all.len()];
        if let Some(failure) = try_one(target, input, &mut Figures::default()) {
            panic!("{campaign}: {failure}");
        }
    });
}

fn write_seeds(targets: &[Target], folder: &Path) {
    for (choice, target) in targets.iter().enumerate() {
        for (index, file) in target.corpus.files().enumerate() {
            let first = if targets.len() > 1 { vec![choice as u8] } else { Vec::new() };
            let path = folder.join(format!("{choice}-{index}"));
            std::fs::write(path, [&first[..], file].concat()).expect("the folder takes files");
        }
    }
}
