//! Runs in which an actor or the device dies, hangs, is stopped, or computes nonsense.

use super::fake_device::Script;
use super::{Disturbance, Place, all_steps, rollout_keys};
use crate::actors::messages::*;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

#[test]
fn an_actor_that_panics_loses_and_duplicates_nothing() {
    let undisturbed = Place::new();
    let expected = undisturbed.run(&Disturbance::default());
    for inject in [
        "panic:reward-scorer:3",
        "panic:rollout-generator:5",
        "panic:rollout-generator:6",
        "panic:policy-updater:2",
        "panic:worker:9",
        "panic:worker:40",
        "panic:pretrainer:4",
        "panic:fine-tuner:3",
        "panic:monitor:7",
    ] {
        let place = Place::new();
        let done = place.run(&Disturbance { inject, ..Disturbance::default() });
        assert_eq!(done.outcome, Outcome::Done, "{inject}");
        let actor = inject.split(':').nth(1).unwrap();
        let restarts = done.named("restart");
        assert_eq!(restarts.len(), 1, "{inject}");
        assert_eq!(
            (restarts[0].text("actor"), restarts[0].whole("count")),
            (Some(actor), Some(1)),
            "{inject}"
        );
        assert!(
            restarts[0].text("reason").unwrap().contains("injected fault"),
            "{:?}",
            restarts[0]
        );
        let witnesses = done.named("inject").len();
        assert_eq!(witnesses, usize::from(actor != "monitor"), "{inject}");
        assert_eq!(done.steps(), all_steps(), "{inject}");
        assert_eq!(done.calls, expected.calls, "{inject}");
        assert_eq!(place.weights(), undisturbed.weights(), "{inject}");
        assert!(rollout_keys(&place.run_folder()).values().all(|count| *count == 1), "{inject}");
    }
}

#[test]
fn a_director_checkpointer_or_device_that_panics_goes_on_from_the_last_commit() {
    let undisturbed = Place::new();
    undisturbed.run(&Disturbance::default());
    let panicking = Script { panic_in_train: Some(8), ..Script::default() };
    for (inject, script) in [
        ("panic:checkpointer:4", Script::default()),
        ("panic:director:1", Script::default()),
        ("", panicking),
    ] {
        let place = Place::new();
        let done = place.run(&Disturbance { inject, script, ..Disturbance::default() });
        assert_eq!(done.outcome, Outcome::Done, "{inject}");
        assert_eq!(done.named("restart").len(), 1, "{inject}");
        assert_eq!(done.steps(), all_steps(), "{inject}");
        assert_eq!(place.weights(), undisturbed.weights(), "{inject}");
    }
}

#[test]
fn a_director_that_dies_after_any_of_its_requests_changes_nothing() {
    let undisturbed = Place::new();
    let expected = undisturbed.run(&Disturbance::default());
    let names = |done: &super::Result| done.named("stage-end").len();
    // Every third of its requests, from the first on, until none is left to die in.
    for number in (1..).step_by(3) {
        let inject: &'static str = format!("panic:director:{number}").leak();
        let place = Place::new();
        let done = place.run(&Disturbance { inject, ..Disturbance::default() });
        assert_eq!(done.outcome, Outcome::Done, "{inject}");
        let witness = done.named("inject");
        let died = witness.first().and_then(|event| event.text("message"));
        assert_eq!(done.steps(), all_steps(), "{inject}: {died:?}");
        assert_eq!(place.weights(), undisturbed.weights(), "{inject}: {died:?}");
        assert_eq!(names(&done), names(&expected), "{inject}: {died:?}");
        let rollouts = rollout_keys(&place.run_folder());
        assert_eq!(rollouts, rollout_keys(&undisturbed.run_folder()), "{inject}: {died:?}");
        if witness.is_empty() {
            assert!(number > 60, "the Director sends more than {number} requests");
            return;
        }
        assert_eq!(done.named("restart").len(), usize::from(died != Some("EndRun")), "{inject}");
    }
}

#[test]
fn an_update_that_a_dead_director_wanted_is_refused_however_late_it_comes() {
    let two_updates = &["stage.align.updates=2"];
    let undisturbed = Place::new();
    let expected = undisturbed.run(&Disturbance { set: two_updates, ..Disturbance::default() });
    let first = expected.calls.iter().filter(|call| call.starts_with("train")).count() - 6 + 1;
    let place = Place::new();
    // The first step of the stage: what the next Director prepares is not restored afterwards, so
    // that a late update would be trained on top of it.
    let script = Script { late_after_train: Some(first as u64), ..Script::default() };
    let watched = script.clone();
    let disturbance = Disturbance {
        inject: "panic:director:UpdatePolicy:1",
        script,
        set: two_updates,
        ..Disturbance::default()
    };
    let done =
        place.run_visited(&disturbance, |seats| watched.watch(&seats.desk("worker").unwrap()));
    assert_eq!(done.outcome, Outcome::Done);
    assert_eq!(place.weights(), undisturbed.weights());
    let restarts: Vec<_> = done.named("restart").iter().map(|event| event.text("actor")).collect();
    assert_eq!(restarts, [Some("director")], "the device has nothing to complain of");
    let told = |key| done.named("refused").iter().map(|e| e.text(key)).collect::<Vec<_>>();
    assert_eq!(told("message"), [Some("Train")]);
    let reason = "Train of director 1 came after work of director 2, which has taken its place";
    assert_eq!(told("reason"), [Some(reason)]);
}

#[test]
fn who_waits_for_whom_is_named_when_a_deadline_passes() {
    let place = Place::new();
    let script = Script { stuck_in_train: Some(11), ..Script::default() };
    let release = script.clone();
    let deadline = Some(Duration::from_millis(400));
    let failed = place.run(&Disturbance { script, deadline, ..Disturbance::default() });
    release.release();
    let text = &failed.failure().text;
    assert!(text.contains("waited 0.4 s for") && text.contains("worker"), "{text}");
    assert!(text.contains("policy-updater") && text.contains("engine.deadline_seconds"), "{text}");
}

#[test]
fn any_actor_that_is_stopped_by_name_ends_its_work_by_name_and_a_busy_one_answers() {
    for name in [
        "supervisor",
        "director",
        "pretrainer",
        "fine-tuner",
        "rollout-generator",
        "reward-scorer",
        "policy-updater",
        "worker",
        "checkpointer",
        "monitor",
    ] {
        let place = Place::new();
        // The device is held in the first update: everybody's work is still to come.
        let script = Script { stuck_in_train: Some(1), ..Script::default() };
        let (release, reached) = (script.clone(), script.clone());
        let began = Instant::now();
        let failed =
            place.run_visited(&Disturbance { script, ..Disturbance::default() }, |seats| {
                let (stop, status) = (seats.port_to_stop(), seats.port_to_ask_worker());
                actix::spawn(async move {
                    reached.reached().await;
                    let pulse = status.ask(AskStatus {}).await.unwrap();
                    assert_eq!(
                        (pulse.state, pulse.last_message.as_deref()),
                        (ActorState::Busy, Some("Train"))
                    );
                    stop.ask(StopActor { name: name.to_string() }).await.unwrap();
                    release.release();
                });
            });
        assert_eq!(failed.failure().text, format!("{name} was stopped by name"));
        assert!(began.elapsed() < Duration::from_secs(30), "{name}: no deadline was waited for");
        assert!(failed.named("restart").is_empty(), "{name}");
    }
}

#[test]
fn an_actor_that_hangs_is_named_though_it_stops_every_clock_of_its_thread() {
    let place = Place::new();
    let hung = place.run(&Disturbance {
        inject: "hang:reward-scorer:JudgeGroup:2",
        deadline: Some(Duration::from_millis(1500)),
        ..Disturbance::default()
    });
    let text = &hung.failure().text;
    assert!(text.starts_with("reward-scorer has not answered for "), "{text}");
    assert!(text.contains("JudgeGroup has held its thread for "), "{text}");
    assert_eq!(hung.named("inject").len(), 1);
}

#[test]
fn a_question_how_an_actor_is_waits_in_no_mailbox() {
    let place = Place::new();
    let script = Script { stuck_in_train: Some(1), ..Script::default() };
    let (release, reached) = (script.clone(), script.clone());
    let seen = Arc::new(OnceLock::new());
    let pulse = Arc::clone(&seen);
    place.run_visited(&Disturbance { script, ..Disturbance::default() }, |seats| {
        let (desk, status) = (seats.desk("worker").unwrap(), seats.port_to_ask_worker());
        actix::spawn(async move {
            reached.reached().await;
            for _ in 0..3 {
                status.ask(AskStatus {}).await.unwrap();
            }
            pulse.set(desk.pulse()).unwrap();
            release.release();
        });
    });
    let pulse = seen.get().expect("the worker was looked at");
    assert_eq!((pulse.queued, pulse.last_message.as_deref()), (0, Some("Train")));
}

#[test]
fn an_actor_that_dies_again_and_again_ends_the_run_with_its_name() {
    let place = Place::new();
    let script = Script { wrong_slot: true, ..Script::default() };
    let failed = place.run(&Disturbance { script, ..Disturbance::default() });
    let text = &failed.failure().text;
    assert!(
        text.contains("rollout-generator died") && text.contains("index out of bounds"),
        "{text}"
    );
    assert_eq!(failed.named("restart").len(), 2, "engine.restarts = 2");
}

#[test]
fn three_steps_without_a_finite_loss_roll_back_once_and_then_stop_with_advice() {
    let place = Place::new();
    let script = Script { not_finite_from: Some(4), ..Script::default() };
    let failed = place.run(&Disturbance {
        script,
        set: &["checkpoint.every_steps=1"],
        ..Disturbance::default()
    });
    assert_eq!(failed.failure().kind, FailureKind::NotFinite);
    assert!(
        failed.failure().text.contains("lower the stage's optimizer.learning_rate"),
        "{:?}",
        failed.outcome
    );
    assert_eq!(failed.named("rollback").len(), 1);
    assert!(failed.failure().text.contains("stage \"talk\": steps 1 to 3"), "{:?}", failed.outcome);
    assert_eq!(failed.named("skipped").len(), 6, "no commit was made in the midst of them");
}

#[test]
fn a_step_with_one_skipped_update_of_two_is_no_skipped_step() {
    let place = Place::new();
    // The second update of each of the three steps of the last stage.
    let script = Script { not_finite: vec![11, 13, 15], ..Script::default() };
    let set = &["stage.align.updates=2", "checkpoint.every_steps=1"];
    let done = place.run(&Disturbance { script, set, ..Disturbance::default() });
    assert_eq!(done.outcome, Outcome::Done);
    assert!(done.named("skipped").is_empty() && done.named("rollback").is_empty());
    for step in done.named("step").iter().filter(|event| event.text("stage") == Some("align")) {
        let counted = (step.whole("updates"), step.whole("skipped_updates"));
        assert_eq!(counted, (Some(2), Some(1)));
        assert_eq!(step.get("skipped").and_then(|skipped| skipped.as_bool()), Some(false));
    }
    let commits = done.named("commit").iter().filter(|e| e.text("stage") == Some("align")).count();
    assert_eq!(commits, 3, "a commit after every step");
}

/// A run that commits after every step and whose sampler and trainer differ in this update; 11 is the second of `align`.
fn differing(place: &Place, gap: (u64, f64), set: &'static [&'static str]) -> super::Result {
    let script = Script { gap_in_train: Some(gap), ..Script::default() };
    place.run(&Disturbance { script, set, ..Disturbance::default() })
}

#[test]
fn a_gap_in_one_bit_stops_an_exact_run_before_anything_of_the_step_is_kept() {
    let (undisturbed, place) = (Place::new(), Place::new());
    undisturbed.run(&Disturbance::default());
    // The second run goes on from the commit before the step, so that its first update is that step's.
    for (update, gap) in [(11, 5.9e-8), (1, f64::NAN)] {
        let failed = differing(&place, (update, gap), &["checkpoint.every_steps=1"]);
        let failure = failed.failure();
        assert_eq!(failure.kind, FailureKind::Inexact);
        for text in ["stage \"align\", step 2", &format!("{gap:e}"), "engine.exact = false"] {
            assert!(failure.text.contains(text), "{text}: {}", failure.text);
        }
        assert!(failure.clone().into_error().downcast_ref::<crate::config::Fault>().is_none());
        let alarms = failed.named("alarm");
        let last = alarms.last().expect("an alarm stands in the journal");
        assert_eq!((last.text("stage"), last.whole("step")), (Some("align"), Some(2)));
        assert_eq!(last.number("logprob_gap_max"), Some(gap).filter(|gap| gap.is_finite()));
        assert!(last.remark().is_some_and(|text| text.starts_with("ALARM: stage")), "{last:?}");
        assert_eq!(failed.steps(), all_steps()[..10], "its step stands nowhere");
        assert!(rollout_keys(&place.run_folder()).keys().all(|(step, ..)| *step == 1));
        // A fault of one bit may not be the machine's for good: nothing is tried again in silence.
        assert!(failed.named("restart").is_empty() && failed.named("rollback").is_empty());
        // After the update the device is asked what moved, and nothing is saved.
        let last: Vec<&str> = failed.calls.iter().rev().take(2).map(|call| &call[..5]).collect();
        assert_eq!(last, ["phase", "train"]);
    }
    // What is left is whole: without the fault the run goes on from the commit before it.
    assert_eq!(place.run(&Disturbance::default()).outcome, Outcome::Done);
    assert_eq!(place.weights(), undisturbed.weights());
}

#[test]
fn a_gap_is_no_alarm_where_nothing_was_promised_or_the_policy_has_moved() {
    for (update, set) in [
        (11, &["engine.exact=false"] as &[&str]),
        // Two updates a step: 10 and 11 are the first step's.
        (11, &["stage.align.updates=2"]),
    ] {
        let done = differing(&Place::new(), (update, 0.5), set);
        assert_eq!(done.outcome, Outcome::Done, "{set:?}");
        assert!(done.named("alarm").is_empty());
    }
    let first_of_two = differing(&Place::new(), (12, 0.5), &["stage.align.updates=2"]);
    assert_eq!(first_of_two.failure().kind, FailureKind::Inexact);
}
