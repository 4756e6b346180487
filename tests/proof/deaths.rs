//! The campaign of deaths: before any kind of job each of two processes is killed, the other one names it, and the run goes on to
//! the end that it would have had.

use crate::process_runs::{Death, check_deaths};
use std::time::Instant;

const TWO: [&str; 1] = ["cluster.data=2"];
const STAGES: [&str; 1] = ["cluster.pipeline=2"];
/// One that trains and one that samples.
const APART: [&str; 1] = ["cluster.samplers=1"];

/// Jobs before which a process dies, over two data ranks.
const JOBS: [&str; 11] = [
    "PrepareDevice:1",
    "PrepareDevice:3",
    "EnterPhase:2",
    "EnterPhase:9",
    "EnterPhase:14",
    "Save:2",
    "Save:9",
    "Calibrate:1",
    "Generate:4",
    "Score:1",
    "Train:40",
];

#[test]
fn a_process_may_die_before_any_kind_of_job() {
    let began = Instant::now();
    println!("| layout | dies | before | goes on over | steps again | s |\n|{}", "---|".repeat(6));
    let mut count = 0;
    let mut check = |settings: &[&str], deaths: &[Death], rest: (usize, &[&str])| {
        let began = Instant::now();
        let again = check_deaths(settings, deaths, rest);
        let (dying, job) = deaths.last().unwrap();
        let (layout, seconds) = (settings.join(" "), began.elapsed().as_secs_f64());
        println!("| {layout} | rank {dying} | {job} | {} | {again} | {seconds:.1} |", rest.0);
        count += deaths.len();
    };
    for dying in [0, 1] {
        for (at, job) in JOBS.into_iter().enumerate() {
            let rest: (usize, &[&str]) = if at % 2 == 0 { (2, &TWO) } else { (1, &[]) };
            check(&TWO, &[(dying, job)], rest);
        }
        // Only a run that goes on restores, and only one that samples apart hands over.
        check(&TWO, &[(1, "Train:8"), (dying, "Restore:1")], (2, &STAGES));
        check(&STAGES, &[(dying, "Train:8"), (dying, "Restore:1")], (1, &[]));
        check(&APART, &[(dying, "HandOver:1")], (2, &APART));
        check(&APART, &[(dying, "HandOver:2")], (2, &TWO));
    }
    println!("{count} deaths in {:.0} s", began.elapsed().as_secs_f64());
}
