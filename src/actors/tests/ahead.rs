//! Steps whose batch was sampled beside the one before: what their lines tell, and what ends the run.

use super::utilisation::SWITCHED;
use super::*;
use std::time::Instant;

const AHEAD: &[&str] = &["stage.align.max_staleness=1", "checkpoint.every_steps=1"];

fn at(value: &serde_json::Value) -> [f64; 2] {
    [0, 1].map(|end| value[end].as_f64().unwrap())
}

fn aligned(done: &Result) -> Vec<&Event> {
    let steps = done.named("step").into_iter();
    steps.filter(|event| event.text("stage") == Some("align")).collect()
}

#[test]
fn a_step_tells_what_was_done_in_its_time_and_where_its_batch_was_sampled() {
    let done = Place::new().run(&Disturbance { set: AHEAD, ..Disturbance::default() });
    assert_eq!(done.outcome, Outcome::Done);
    let steps = aligned(&done);
    for step in &steps {
        let [start, end] = at(step.get("window").unwrap());
        for (name, interval) in step.get("intervals").unwrap().as_object().unwrap() {
            let [began, ended] = at(interval);
            assert!(start <= began && began <= ended && ended <= end, "{name}: {step:?}");
        }
    }
    let sampled = |step: &Event, key: &str| step.get("sampled").unwrap()[key].clone();
    let told: Vec<_> = steps.iter().map(|step| sampled(step, "step")).collect();
    assert_eq!(told, [1, 1, 2], "the second batch was sampled in the first step");
    for pair in steps.windows(2) {
        assert_eq!(sampled(pair[1], "generate"), pair[0].get("intervals").unwrap()["ahead"]);
        assert_eq!(sampled(pair[1], "judge"), pair[0].get("intervals").unwrap()["judge_ahead"]);
    }
    // Two prompts, two replies of two tokens each a batch: the first step samples two, the last one none.
    let tokens: Vec<_> = steps.iter().map(|step| step.whole("new_tokens").unwrap()).collect();
    assert_eq!(tokens, [16, 8, 0]);
    let seconds = |step: &&Event| step.get("phase_seconds").unwrap()["generate"].as_f64().unwrap();
    assert_eq!(seconds(&steps[2]), 0.0);
    assert_eq!(steps[2].number("tail_factor"), None);
}

#[test]
fn what_comparing_did_beside_is_told_as_comparing_but_for_what_it_moved() {
    let done = Place::new().run(&Disturbance { set: AHEAD, ..Disturbance::default() });
    let steps = aligned(&done);
    let told = |key: &str, name: &str| {
        let figure = |step: &&Event| step.get(key).and_then(|told| told[name].as_f64());
        steps.iter().map(figure).collect::<Vec<_>>()
    };
    // The first two steps compare a batch, in the phase that then scores; the second one readies the sampler as well.
    let (update, scored) = ([8.0 + 256.0, 16.0 + 512.0], [32.0, 64.0]);
    let [sync, offload] = [0, 1].map(|of| update[of] + scored[of]);
    assert_eq!(told("exposed_seconds", "sync"), [Some(sync), Some(1.0 + sync), Some(sync)]);
    let sampled = [1024.0, 2.0 + 1024.0, 4.0 + 1024.0];
    assert_eq!(told("exposed_seconds", "offload"), sampled.map(|more| Some(offload + more)));
    assert_eq!(
        told("switch", "moved_bytes"),
        [Some(SWITCHED as f64); 2].into_iter().chain([None]).collect::<Vec<_>>()
    );
}

#[test]
fn a_device_that_fails_to_hand_over_ends_the_run_though_the_other_one_waits_for_it() {
    let place = Place::new();
    let script = Script::default();
    let set = &["stage.align.max_staleness=1", "cluster.samplers=1"];
    let began = Instant::now();
    let disturbance = Disturbance { script: script.clone(), set, ..Disturbance::default() };
    let done = place.run(&disturbance);
    // Where the process would wait until the other one gives up that is ten seconds.
    assert!(began.elapsed() < Duration::from_secs(8), "{:?}", began.elapsed());
    script.release();
    let failure = done.failure();
    assert_eq!(failure.kind, FailureKind::Resources);
    assert_eq!(failure.text, "a planted want of memory");
    assert_eq!(done.steps().last(), Some(&("align".to_string(), 1)));
}

/// The policy scores what it has sampled in the first and in the second step of the stage.
fn differing(place: &Place, set: &'static [&'static str]) -> Result {
    let script = Script { gap_in_score: Some((2, 0.25)), ..Script::default() };
    place.run(&Disturbance { script, set, ..Disturbance::default() })
}

#[test]
fn a_gap_in_what_is_sampled_ahead_stops_an_exact_run_in_the_step_that_samples_it() {
    let (undisturbed, place) = (Place::new(), Place::new());
    undisturbed.run(&Disturbance { set: AHEAD, ..Disturbance::default() });
    let failed = differing(&place, AHEAD);
    assert_eq!(failed.failure().kind, FailureKind::Inexact);
    for text in ["stage \"align\", step 2", "was sampled for the next step", "2.5e-1"] {
        assert!(failed.failure().text.contains(text), "{text}: {}", failed.failure().text);
    }
    assert_eq!(failed.named("alarm").len(), 1);
    assert_eq!(failed.steps(), all_steps()[..10], "its step stands nowhere");
    // The batch goes with the step.
    assert_eq!(
        place.run(&Disturbance { set: AHEAD, ..Disturbance::default() }).outcome,
        Outcome::Done
    );
    assert_eq!(place.weights(), undisturbed.weights());
}

#[test]
fn where_nothing_was_promised_the_gap_stands_in_the_line_of_the_step_that_has_the_batch() {
    let done = differing(&Place::new(), &["stage.align.max_staleness=1", "engine.exact=false"]);
    assert_eq!(done.outcome, Outcome::Done);
    let gaps: Vec<_> = aligned(&done).iter().map(|step| step.number("logprob_gap_max")).collect();
    assert_eq!(gaps, [Some(0.0), Some(0.0), Some(0.25)]);
    let drifts: Vec<_> = aligned(&done).iter().map(|step| step.number("stale_gap_max")).collect();
    assert_eq!(drifts, [None, Some(0.0), Some(0.0)]);
}
