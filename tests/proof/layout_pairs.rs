//! The table of pairs of layouts: saved half-way from one, resumed in another, the training is that of one rank which never
//! stopped.
//!
//! Ranks are threads.

use crate::checkpoints::Leg;
use crate::ranks::{CLIP, Layout, Outcome, distance, layout, losses_apart, model, texts};
use crate::ranks::{train, train_leg};
use rehearsal::config::cluster::PipelineSchedule::*;
use std::time::Instant;
use tempfile::TempDir;

const STEPS: usize = 20;

fn layouts() -> [(&'static str, Layout); 8] {
    let line = OneForwardOneBackward;
    [
        ("1", layout(1, 1, 1, line)),
        ("2 data", layout(2, 1, 1, line)),
        ("3 data", layout(3, 1, 1, line)),
        ("4 data, E 4", layout(4, 1, 4, line)),
        ("3 stages ZB-H1", layout(1, 3, 1, ZeroBubbleH1)),
        ("3 stages ZB-V", layout(1, 3, 1, ZeroBubbleV)),
        ("2 x 2, E 2, 1F1B", layout(2, 2, 2, line)),
        ("4 x 2, E 2, ZB-V", layout(4, 2, 2, ZeroBubbleV)),
    ]
}

/// Largest distances of losses over all steps and of weights after the last one.
fn apart(first: &Outcome, mut second: Outcome, straight: &Outcome) -> [f64; 2] {
    second.reports.splice(0..0, first.reports.iter().cloned());
    assert_eq!(second.reports.len(), STEPS);
    [losses_apart(&second, straight), distance(&second.weights, &straight.weights)]
}

#[test]
fn saved_from_any_layout_a_training_goes_on_in_any_other() {
    let (model, batches, began) = (model(), texts(&model(), STEPS), Instant::now());
    let one = layout(1, 1, 1, OneForwardOneBackward);
    let straight = [true, false].map(|wide| train(&model, one, wide, CLIP, &batches));
    println!(
        "| from | to | losses f64 | weights f64 | losses f32 | weights f32 |\n|{}",
        "---|".repeat(6)
    );
    let mut pairs = 0;
    for (from_name, from) in layouts() {
        let folders = [(); 2].map(|()| TempDir::new().unwrap());
        let leg = |place: usize, layout, is_first: bool| {
            let folder = Some(folders[place].path());
            let leg = match is_first {
                true => Leg { steps: 0..STEPS / 2, from: None, to: folder },
                false => Leg { steps: STEPS / 2..STEPS, from: folder, to: None },
            };
            train_leg(&model, layout, place == 0, CLIP, &batches, &leg)
        };
        let first = [0, 1].map(|place| leg(place, from, true));
        for (to_name, to) in layouts().into_iter().filter(|(name, _)| *name != from_name) {
            let found = [0, 1].map(|i| apart(&first[i], leg(i, to, false), &straight[i]));
            let [wide, single] = found;
            println!(
                "| {from_name} | {to_name} | {:.1e} | {:.1e} | {:.1e} | {:.1e} |",
                wide[0], wide[1], single[0], single[1]
            );
            assert!(wide[0] < 1e-5 && single[0] < 1e-3, "{from_name} to {to_name}: {found:?}");
            pairs += 1;
        }
    }
    println!("{pairs} pairs in {:.0} s", began.elapsed().as_secs_f64());
}
