//! Who is waited for, for how long, and who is named in the end: threads as ranks.

use super::super::link::Operation;
use super::super::progress::{made, work_for};
use super::super::{Group, Local};
use super::*;
use std::sync::Arc;
use std::thread;

const DEADLINE: Duration = Duration::from_millis(400);

/// Runs `work` on each of so many ranks, each with the group of all; its outcome and how long it took.
fn on_ranks<T: Send>(ranks: usize, work: impl Fn(&Group, usize) -> T + Sync) -> Vec<(T, Duration)> {
    thread::scope(|scope| {
        let start = |(rank, link): (usize, Local)| {
            let work = &work;
            scope.spawn(move || {
                work_for(link.board(), rank);
                let group = Group::new(Arc::new(link), (0..ranks).collect(), DEADLINE);
                let began = Instant::now();
                (work(&group, rank), began.elapsed())
            })
        };
        let threads: Vec<_> = Local::new(ranks).into_iter().enumerate().map(start).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// Stays for so long without a piece of work.
fn spin(long: Duration) {
    let began = Instant::now();
    while began.elapsed() < long {
        std::hint::spin_loop();
        thread::yield_now();
    }
}

#[test]
fn a_rank_that_goes_on_is_waited_for_longer_than_the_deadline() {
    let ended = on_ranks(3, |group, rank| {
        for _ in 0..if rank == 2 { 12 } else { 0 } {
            thread::sleep(DEADLINE / 4);
            made(Work::Forward);
        }
        group.barrier("step 7")
    });
    for (outcome, took) in ended {
        outcome.unwrap();
        assert!(took > 2 * DEADLINE, "{took:?}");
    }
}

#[test]
fn a_rank_that_stands_still_is_named_on_all_others_with_what_it_did_last() {
    let ended = on_ranks(3, |group, rank| {
        if rank == 2 {
            made(Work::Backward);
            spin(3 * DEADLINE);
            return None;
        }
        group.barrier("step 7").err()
    });
    for (why, took) in &ended[..2] {
        let why = why.as_ref().unwrap();
        assert!(matches!(why, Broken::Late { missing: 2, .. }), "{why}");
        let text = why.to_string();
        assert!(text.ends_with("the last that it did was a layer's backward pass"), "{text}");
        assert!(*took < 2 * DEADLINE, "{took:?}");
    }
}

#[test]
fn what_is_told_late_is_waited_for() {
    let call = &Call {
        name: "step 7".into(),
        operation: Operation::Pass,
        number: 0,
        elements: 0,
        width: 1,
    };
    let links = Local::new(2);
    links[0].board().tells_within(DEADLINE);
    let began = Instant::now();
    let why = links[0].receive(1, Lane::Up(0), call, DEADLINE).unwrap_err();
    assert!(matches!(why, Broken::Late { missing: 1, .. }), "{why}");
    assert!(began.elapsed() >= 2 * DEADLINE, "{:?}", began.elapsed());
}

#[test]
fn who_waits_for_a_rank_that_is_stuck_is_not_the_one_that_is_named() {
    // Rank 0 waits for rank 1 in a call of theirs, rank 1 for rank 2 in another.
    let links: Vec<Arc<dyn Link>> =
        Local::new(3).into_iter().map(|link| -> Arc<dyn Link> { Arc::new(link) }).collect();
    let pair = |own: usize, other: usize| {
        let deadline = if own == 0 { DEADLINE } else { 20 * DEADLINE };
        Group::new(links[own].clone(), vec![own.min(other), own.max(other)], deadline)
    };
    let errors = thread::scope(|scope| {
        let between = scope.spawn(|| pair(1, 2).barrier("tokens").unwrap_err().to_string());
        let first = scope.spawn(|| pair(0, 1).barrier("gradients").unwrap_err().to_string());
        [first.join().unwrap(), between.join().unwrap()]
    });
    assert_eq!(errors[0], errors[1], "all are told the same");
    for part in
        ["gradients for rank 1, which waits in", "tokens for rank 2, which made no progress for"]
    {
        assert!(errors[0].contains(part), "{}", errors[0]);
    }
    assert!(errors[0].ends_with("it has done nothing yet"), "{}", errors[0]);
}

#[test]
fn a_rank_is_waited_for_that_waits_for_one_that_goes_on() {
    let links: Vec<Arc<dyn Link>> =
        Local::new(3).into_iter().map(|link| -> Arc<dyn Link> { Arc::new(link) }).collect();
    let pair = |own: usize, other: usize| {
        Group::new(links[own].clone(), vec![own.min(other), own.max(other)], DEADLINE)
    };
    thread::scope(|scope| {
        scope.spawn(|| pair(0, 1).barrier("gradients").unwrap());
        scope.spawn(|| {
            pair(1, 2).barrier("tokens").unwrap();
            pair(1, 0).barrier("gradients").unwrap();
        });
        scope.spawn(|| {
            for _ in 0..8 {
                thread::sleep(DEADLINE / 4);
                links[2].board().made(2, Work::Read);
            }
            pair(2, 1).barrier("tokens").unwrap();
        });
    });
}

#[test]
fn ranks_that_wait_for_each_other_stand_still_both() {
    // Each waits for what the other would only send later.
    let (name, operation) = ("crossed".to_string(), Operation::Pass);
    let call = &Call { name, operation, number: 0, elements: 0, width: 1 };
    let links = Local::new(2);
    let errors: Vec<Broken> = thread::scope(|scope| {
        let wait = |link: &'_ Local| {
            let why = link.receive(1 - link.rank(), Lane::Up(0), call, DEADLINE).unwrap_err();
            link.stop(&why);
            why
        };
        let threads: Vec<_> = links.iter().map(|link| scope.spawn(move || wait(link))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    for why in errors {
        let Broken::Late { rank, missing, .. } = &why else { panic!("{why}") };
        assert_ne!(rank, missing);
        assert!(why.to_string().contains("it waits in call 0, Pass"), "{why}");
    }
}
