//! What the journal tells of the machine, of a device whose reports are known.

use super::{Disturbance, Place};
use crate::engine::offload_plan::Tier;
use crate::engine::phase::{DecodePasses, GenerateReport, Phase, PhaseReport, StepReport};
use crate::engine::timeline::{Moved, Span, Timeline};
use crate::engine::utilisation::{Chores, Switched};
use crate::engine::{Machine, Rates};
use serde_json::json;

/// f32 operations a second of the invented machine.
pub const PRODUCTS: f64 = 1e9;
/// Useful FLOPs of an alignment step on the fake device.
pub const FLOPS: f64 = 8e6;

pub fn machine() -> Machine {
    let all_threads = Rates {
        threads: 2,
        f32_flops_per_second: PRODUCTS,
        l2_bytes_per_second: 400.0,
        ..Rates::default()
    };
    Machine { l2_cache_bytes: 1 << 20, all_threads, ..Machine::default() }
}

fn chores(pack_seconds: f64, offload_seconds: f64, reference_seconds: f64) -> Chores {
    Chores { pack_seconds, offload_seconds, reference_seconds, ..Chores::default() }
}

/// Bytes that the policy's way to the layout of sampling takes where it scores its own rollouts.
pub const SWITCHED: u64 = 7;

/// What a device reports that is asked for the phase that it is in.
pub fn stayed(phase: Phase) -> PhaseReport {
    let mut left = match phase {
        Phase::Train => chores(256.0, 512.0, 0.0),
        _ => chores(1e4, 1e4, 1e4),
    };
    if phase == Phase::Score {
        left.switched = Switched { moved_bytes: SWITCHED, ..Switched::default() };
    }
    PhaseReport { left, timeline: timeline(phase), ..PhaseReport::default() }
}

/// What a change of phase reports; each part is a power of two, so that a sum tells what is in it.
pub fn entered(phase: Phase) -> PhaseReport {
    let (chores, left) = match phase {
        Phase::Generate => (chores(1.0, 2.0, 0.0), chores(1e3, 1e3, 1e3)),
        Phase::Score => (chores(0.0, 4.0, 0.0), chores(0.0, 1024.0, 0.0)),
        Phase::Train => (chores(8.0, 16.0, 0.0), chores(32.0, 64.0, 128.0)),
        Phase::Idle => (Chores::default(), Chores::default()),
    };
    PhaseReport { chores, left, timeline: timeline(phase), ..PhaseReport::default() }
}

/// A step of ten seconds in which two were waited for, of four in which something moved. Told in Train alone.
fn timeline(phase: Phase) -> Timeline {
    if phase != Phase::Train {
        return Timeline::default();
    }
    let span = |phase: &str, at| Span { phase: phase.to_string(), at };
    let (item, to, copy) = ("reference/weights".to_string(), Tier::Device, Tier::Host);
    Timeline {
        seconds: 10.0,
        computed: vec![span("generate", [0.0, 4.0]), span("train", [5.0, 10.0])],
        waited: vec![[5.0, 7.0]],
        moved: vec![Moved { item, to, copy, bytes: 64, at: [3.0, 7.0] }],
    }
}

/// What sampling reports beside tokens.
pub fn sampled(seconds: f64) -> GenerateReport {
    let full = DecodePasses { rows: 4, passes: 3, seconds: 3.0, cached_tokens: 0 };
    let tail = DecodePasses { rows: 1, passes: 4, seconds: 1.0, cached_tokens: 0 };
    GenerateReport {
        seconds,
        useful_flops: 3e6,
        // A tenth of what the second-level caches give in that time.
        least_bytes: 40.0 * seconds,
        decode: vec![tail, full],
        ..GenerateReport::default()
    }
}

/// What an update reports beside its loss.
pub fn updated() -> StepReport {
    StepReport { useful_flops: 5e6, rows: 10, unique_rows: 8, ..StepReport::default() }
}

fn close(found: f64, wanted: f64) {
    assert!((found - wanted).abs() <= 1e-9 * wanted.abs(), "{found} is not {wanted}");
}

#[test]
fn every_step_tells_its_share_of_the_rates_that_stand_in_the_first_line() {
    let done = Place::new().run(&Disturbance::default());
    let rates = &done.named("run")[0].get("machine").unwrap()["all_threads"];
    assert_eq!(rates["f32_flops_per_second"].as_f64(), Some(PRODUCTS));
    for step in done.named("step") {
        let aligned = step.text("kind") == Some("grpo");
        let (key, flops) = if aligned { ("rfu", FLOPS) } else { ("useful_share", 5e6) };
        let number = |key: &str| step.number(key).unwrap_or_else(|| panic!("{key} in {step:?}"));
        close(number(key) * number("seconds") * PRODUCTS, flops);
        assert!(step.get(if aligned { "useful_share" } else { "rfu" }).is_none(), "{step:?}");
        if !aligned {
            continue;
        }
        close(number("rollout_bandwidth"), 0.1);
        close(number("padding_share"), 0.2);
        // Sixteen tokens at the quarter of a second that each of twelve took.
        close(number("tail_factor"), 1.0);
        let exposed = step.get("exposed_seconds").unwrap();
        let seconds = |name: &str| exposed[name].as_f64().unwrap();
        // Steps 1 and 3 come after an eval of replies, which readied the sampler for them.
        let readied = if step.whole("step") == Some(2) { [1.0, 2.0] } else { [0.0; 2] };
        assert_eq!(seconds("sync"), readied[0] + 8.0 + 32.0 + 256.0);
        assert_eq!(seconds("offload"), readied[1] + 4.0 + 16.0 + 64.0 + 512.0 + 1024.0);
        assert_eq!(seconds("reference"), 128.0);
        // Judging is exposed from the end of sampling on. What the device did beside rewards in scoring, by its report,
        // is longer than all of scoring.
        let intervals = step.get("intervals").unwrap();
        let at = |name: &str, end: usize| intervals[name][end].as_f64().unwrap();
        let sampled = at("generate", 1);
        assert!(at("generate", 0) < sampled, "a wrong beginning shows: {intervals}");
        assert_eq!(seconds("reward"), (at("judge", 1) - sampled).max(0.0), "{exposed}");
        close(number("offload_exposed_share"), 0.2);
        let moves = step.get("offload").unwrap();
        assert_eq!(moves["moved"][0], json!(["reference/weights", "read", "host", 3.0, 7.0, 64]));
        assert_eq!((&moves["bytes_in"], &moves["bytes_out"]), (&json!(64), &json!(0)));
        assert_eq!(moves["computed"], json!([["generate", 0.0, 4.0], ["train", 5.0, 10.0]]));
        close(moves["overlap_share"].as_f64().unwrap(), 0.25);
    }
}

#[test]
fn a_step_that_changed_no_weight_was_of_no_use_but_for_what_it_sampled() {
    let script = super::Script { not_finite: vec![11], ..super::Script::default() };
    let done = Place::new().run(&Disturbance { script, ..Disturbance::default() });
    let aligned = |event: &&&crate::console::Event| event.text("kind") == Some("grpo");
    let steps = done.named("step");
    let flops: Vec<f64> = steps
        .iter()
        .filter(aligned)
        .map(|step| step.number("rfu").unwrap() * step.number("seconds").unwrap() * PRODUCTS)
        .collect();
    [FLOPS, 3e6, FLOPS].iter().zip(flops).for_each(|(wanted, found)| close(found, *wanted));
}
