//! The table of layouts: training in each is the training of one rank.
//!
//! Ranks are threads. Seconds are CPU seconds of the process, waiting not counted.

use crate::ranks::{Layout, Outcome, distance, layout, losses_apart, model, texts, train};
use rehearsal::cluster::Doing;
use rehearsal::cluster::timeline::overlap;
use rehearsal::config::ModelConfig;
use rehearsal::config::cluster::PipelineSchedule::*;
use std::time::Instant;

const STEPS: usize = 20;

fn layouts() -> Vec<Layout> {
    let line = OneForwardOneBackward;
    let flat = [(2, 1), (2, 2), (3, 1), (4, 1), (4, 2), (4, 4), (8, 1), (8, 4), (8, 8)];
    let mut all: Vec<Layout> = flat.map(|(data, expert)| layout(data, 1, expert, line)).into();
    for schedule in [line, ZeroBubbleH1, ZeroBubbleH2, ZeroBubbleV] {
        let deep = [(1, 2, 1), (1, 3, 1), (2, 2, 1), (2, 2, 2), (4, 2, 2), (2, 3, 2)];
        all.extend(deep.map(|(data, stages, expert)| layout(data, stages, expert, schedule)));
    }
    all.extend([
        layout(1, 6, 1, line),
        layout(1, 6, 1, ZeroBubbleH2),
        layout(4, 2, 4, ZeroBubbleH1),
        Layout { recompute: 1, ..layout(2, 2, 2, ZeroBubbleH1) },
        Layout { recompute: 3, ..layout(2, 2, 2, ZeroBubbleV) },
        Layout { is_serial: true, ..layout(4, 1, 4, line) },
    ]);
    all
}

fn timed(model: &ModelConfig, layout: Layout, in_f64: bool) -> (Outcome, f64) {
    let seconds = || {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
        now.tv_sec as f64 + now.tv_nsec as f64 * 1e-9
    };
    let began = seconds();
    let outcome = train(model, layout, in_f64, 2.0, &texts(model, STEPS));
    (outcome, seconds() - began)
}

fn named(layout: &Layout) -> String {
    let mut name = match (layout.sizes[1], layout.schedule) {
        (1, _) => "-",
        (_, OneForwardOneBackward) => "1F1B",
        (_, ZeroBubbleH1) => "ZB-H1",
        (_, ZeroBubbleH2) => "ZB-H2",
        (_, ZeroBubbleV) => "ZB-V",
    }
    .to_string();
    if layout.recompute > 0 {
        name += &format!(", {} recomputed", layout.recompute);
    }
    if layout.is_serial {
        name += ", serial";
    }
    name
}

/// The largest share of a rank's all-to-all that shared experts covered.
fn hidden(outcome: &Outcome) -> String {
    let of_rank = |spans: &Vec<_>| overlap(spans, Doing::AllToAll, Doing::SharedExperts);
    let most = outcome.spans.iter().filter_map(of_rank).reduce(f64::max);
    most.map_or("-".to_string(), |share| format!("{:.0} %", 100.0 * share))
}

#[test]
fn every_layout_trains_as_one_rank() {
    let (model, began) = (model(), Instant::now());
    let one = layout(1, 1, 1, OneForwardOneBackward);
    let [(one64, _), (one32, seconds)] = [true, false].map(|wide| timed(&model, one, wide));
    println!(
        "| D | P | E | schedule | gradients f64 | losses f64 | gradients f32 | losses f32 | taken back | moments/rank | \
         sent/step | hidden | CPU s |\n|{}",
        "---|".repeat(13)
    );
    println!("| 1 | 1 | 1 | - | 0 | 0 | 0 | 0 | 0 | {} | 0 | - | {seconds:.2} |", one32.moments[0]);
    for layout in layouts() {
        let [(many64, _), (many32, seconds)] =
            [true, false].map(|wide| timed(&model, layout, wide));
        let apart = |many: &Outcome, one: &Outcome| {
            [distance(&many.gradients, &one.gradients), losses_apart(many, one)]
        };
        let (wide, single) = (apart(&many64, &one64), apart(&many32, &one32));
        let taken_back = many32.reports.iter().filter(|report| report.was_taken_back).count();
        let [data, pipeline, expert] = layout.sizes;
        println!(
            "| {data} | {pipeline} | {expert} | {} | {:.1e} | {:.1e} | {:.1e} | {:.1e} | {taken_back} | {} | {} | {} | \
             {seconds:.2} |",
            named(&layout),
            wide[0],
            wide[1],
            single[0],
            single[1],
            many32.moments.iter().max().unwrap(),
            many32.sent / STEPS as u64,
            hidden(&many32),
        );
        assert!(wide[0] < 1e-6 && wide[1] < 1e-5, "{layout:?}: {wide:?} in f64");
        assert!(single[0] < 1e-6 && single[1] < 1e-3, "{layout:?}: {single:?} in f32");
    }
    println!("{} layouts in {:.0} s", layouts().len(), began.elapsed().as_secs_f64());
}
