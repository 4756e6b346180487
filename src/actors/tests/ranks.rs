//! Runs of several ranks: threads with a company each, joined over TCP, with a stand-in for each device.

use super::fake_device::{Fake, Script};
use super::{Disturbance, Place, Result, all_steps, rollout_keys, utilisation};
use crate::actors::company::Seats;
use crate::actors::mail::Mail;
use crate::actors::messages::*;
use crate::cluster::{Broken, Ident, Local, Stop, join};
use std::sync::atomic::AtomicI32;
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(30);

/// Runs as many ranks as there are disturbances; the results in their order.
fn run_ranks(
    place: &Place,
    ranks: &[Disturbance],
    visit: impl Fn(usize, &Seats, &Arc<Stop>) + Sync,
) -> Vec<Result> {
    thread::scope(|scope| {
        let start = |(rank, link): (usize, Local)| {
            let visit = &visit;
            scope.spawn(move || {
                let ident = Ident { host: "here".into(), pid: rank as u32, ..Ident::default() };
                let stop = Arc::new(Stop::default());
                let joined = join(&link, ranks.len(), &ident, [PATIENCE; 2], stop.clone()).unwrap();
                let mail = Mail::new(joined.control, 64);
                let script = ranks[rank].script.clone();
                let mut fake = Fake::new(script, &place.config(ranks[rank].set));
                fake.rank = [rank, ranks.len()];
                let done = place.run_on(&fake, &ranks[rank], Some(mail.clone()), |seats| {
                    visit(rank, seats, &stop)
                });
                mail.part(&done.outcome);
                done
            })
        };
        let threads: Vec<_> = Local::new(ranks.len()).into_iter().enumerate().map(start).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn undisturbed() -> Vec<Disturbance> {
    // Each with a script of its own: clones share what they count.
    (0..3).map(|_| Disturbance::default()).collect()
}

/// What a device was told, sampling and scoring apart, of which each rank takes a share.
fn told(done: &Result) -> Vec<&String> {
    done.calls.iter().filter(|call| !call.starts_with("score")).collect()
}

#[test]
fn three_ranks_make_the_run_of_one_and_every_device_does_every_job() {
    let alone = Place::new();
    let expected = alone.run(&Disturbance::default());
    let place = Place::new();
    let ranks = run_ranks(&place, &undisturbed(), |_, _, _| {});
    for done in &ranks {
        assert_eq!(done.outcome, Outcome::Done);
        assert_eq!(told(done), told(&expected));
    }
    assert_eq!(ranks[0].steps(), all_steps());
    assert_eq!(place.weights(), alone.weights());
    assert!(rollout_keys(&place.run_folder()).values().all(|count| *count == 1));
    let rewards = |done: &Result| {
        let steps = done.named("step");
        steps.iter().map(|step| step.get("rewards").cloned()).collect::<Vec<_>>()
    };
    assert_eq!(rewards(&ranks[0]), rewards(&expected));
    // Three machines, of which each rank's sampling was of use, and one update.
    assert_eq!(ranks[0].named("run")[0].whole("ranks"), Some(3));
    for step in ranks[0].named("step").iter().filter(|step| step.text("kind") == Some("grpo")) {
        let number = |key: &str| step.number(key).unwrap();
        let found = number("rfu") * number("seconds") * 3.0 * utilisation::PRODUCTS;
        assert!((found - 14e6).abs() < 1.0, "{found}");
        assert!(number("rollout_bandwidth") < 0.1 + 1e-9, "no more than each of them alone");
    }
}

#[test]
fn an_actor_between_ranks_that_panics_loses_and_duplicates_nothing() {
    let alone = Place::new();
    alone.run(&Disturbance::default());
    for (rank, inject) in [
        (0, "panic:courier-1:3"),
        (0, "panic:courier-2:20"),
        (0, "panic:worker:9"),
        (0, "panic:director:30"),
        (1, "panic:worker:7"),
        (2, "panic:deputy:2"),
    ] {
        let place = Place::new();
        let mut disturbances = undisturbed();
        disturbances[rank].inject = inject;
        let ranks = run_ranks(&place, &disturbances, |_, _, _| {});
        for done in &ranks {
            assert_eq!(done.outcome, Outcome::Done, "{inject}");
        }
        assert_eq!(ranks[0].steps(), all_steps(), "{inject}");
        assert_eq!(place.weights(), alone.weights(), "{inject}");
        assert!(rollout_keys(&place.run_folder()).values().all(|count| *count == 1), "{inject}");
    }
}

#[test]
fn a_device_that_fails_on_one_rank_ends_the_run_on_all_of_them_with_its_name() {
    let place = Place::new();
    let mut disturbances = undisturbed();
    disturbances[1].script = Script { panic_in_train: Some(8), ..Script::default() };
    let ranks = run_ranks(&place, &disturbances, |_, _, _| {});
    for done in &ranks {
        let text = &done.failure().text;
        assert!(text.contains("rank 1: the device panicked in Train: a planted panic"), "{text}");
        assert!(!text.contains("rank 1: rank 1"), "{text}");
    }
    // The same command goes on from the last commit, with fewer ranks too.
    let alone = Place::new();
    alone.run(&Disturbance::default());
    let ranks = run_ranks(&place, &undisturbed()[..2], |_, _, _| {});
    assert_eq!(ranks[0].outcome, Outcome::Done);
    assert_eq!(ranks[0].steps(), all_steps());
    assert_eq!(place.weights(), alone.weights());
}

#[test]
fn a_signal_of_any_rank_ends_the_run_after_a_commit() {
    let place = Place::new();
    let stop = Arc::new(AtomicI32::new(0));
    let mut disturbances = undisturbed();
    disturbances[0].stop = Arc::clone(&stop);
    disturbances[0].script.signal_in_train = Some((5, stop));
    let ranks = run_ranks(&place, &disturbances, |_, _, _| {});
    for done in &ranks {
        assert_eq!(done.outcome, Outcome::Stopped(15));
    }
    assert_eq!(ranks[0].steps().len(), 5);
    assert_eq!(ranks[0].named("commit").last().unwrap().whole("step"), Some(2));
}

#[test]
fn a_rank_that_hangs_in_a_job_is_shown_as_busy_and_whoever_waits_for_it_names_it() {
    let place = Place::new();
    let mut disturbances = undisturbed();
    let script = Script { stuck_in_train: Some(2), ..Script::default() };
    disturbances[2].script = script.clone();
    disturbances[0].deadline = Some(Duration::from_secs(20));
    let desks = OnceLock::new();
    let ranks = thread::scope(|scope| {
        let looker = scope.spawn(|| {
            let began = Instant::now();
            let mut seen = [false; 2];
            while seen != [true; 2] && began.elapsed() < PATIENCE {
                if let Some((worker, courier)) = desks.get() {
                    let pulse = |desk: &Arc<crate::actors::port::Desk>| desk.pulse();
                    seen[0] |= pulse(worker).state == ActorState::Busy;
                    let waits = pulse(courier).waits;
                    seen[1] |= waits.iter().any(|w| w.actor == "rank 2" && w.message == "Train");
                }
                thread::yield_now();
            }
            script.release();
            seen
        });
        let ranks = run_ranks(&place, &disturbances, |rank, seats, _| {
            if rank == 0 {
                let desk = |name| seats.desk(name).unwrap();
                desks.set((desk("worker-2"), desk("courier-2"))).ok().unwrap();
            }
        });
        assert_eq!(looker.join().unwrap(), [true; 2], "rank 0 shows what rank 2 does");
        ranks
    });
    assert!(ranks.iter().all(|done| done.outcome == Outcome::Done), "it was released in time");
}

/// Stops the ranks from rank 0 on as soon as it is time, as where a control link closes.
fn stop_when(
    place: &Place,
    disturbances: &[Disturbance],
    is_time: impl Fn(&Seats) -> Box<dyn FnOnce() + Send> + Sync,
) {
    let gone = Broken::Gone { rank: 0, gone: 1, found: "its control link closed".to_string() };
    let ranks = run_ranks(place, disturbances, |rank, seats, stop| {
        if rank == 0 {
            let (wait, stop, gone) = (is_time(seats), Arc::clone(stop), gone.clone());
            thread::spawn(move || {
                wait();
                stop.set(&gone);
            });
        }
    });
    for done in &ranks {
        assert_eq!(done.failure().text, gone.to_string());
    }
}

#[test]
fn a_rank_that_is_gone_ends_the_run_on_all_others_in_the_same_words() {
    let mut disturbances = undisturbed();
    // While devices are at work, of which one does not end.
    let script = Script { stuck_in_train: Some(3), ..Script::default() };
    disturbances[1].script = script.clone();
    stop_when(&Place::new(), &disturbances, |_| {
        let script = script.clone();
        Box::new(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            runtime.block_on(script.reached());
        })
    });
    script.release();
    // And while none is, and the actors' thread is held.
    let mut disturbances = undisturbed();
    disturbances[0].inject = "hang:pretrainer:3";
    stop_when(&Place::new(), &disturbances, |seats| {
        let desk = seats.desk("pretrainer").unwrap();
        Box::new(move || {
            let held = Duration::from_millis(200);
            while desk.running().is_none_or(|(_, time)| time < held) {
                thread::yield_now();
            }
        })
    });
}
