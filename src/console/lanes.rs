//! Intervals as SVG, a lane for each worker: the ranks of a step that was trained over several, and sampling beside training
//! over some steps, both from the journal alone; and the stages of a planned pipeline, for `check --timeline`.

use super::event::Event;
use super::plot::{LEFT, RIGHT, STYLE, TOP, WIDTH, escaped, label, push};
use serde_json::Value;

const ROW: f64 = 26.0;
const BAR: f64 = 18.0;
/// Steps of a picture of sampling at most.
const STEPS: usize = 6;
/// What a rank does in a step of training, measured or planned; told apart without colour vision.
const PASSES: [(&str, &str); 7] = [
    ("forward", "#0b5394"),
    ("input gradients", "#c55a11"),
    ("weight gradients", "#8fbc5a"),
    ("exchange", "#f1c232"),
    ("sum", "#741b47"),
    ("update", "#7f7f7f"),
    ("gather", "#c9a0bd"),
];
const WORK: [(&str, &str); 5] = [
    ("sampling", "#0b5394"),
    ("comparing", "#8db4dc"),
    ("handing over", "#741b47"),
    ("scoring", "#8fbc5a"),
    ("updating", "#c55a11"),
];

/// What a worker did, by name, and when.
pub type Lane<'a> = (String, Vec<(&'a str, [f64; 2])>);

/// What each rank did in the last step whose passes were taken down; `None` if none were.
pub fn ranks_timeline(events: &[Event]) -> Option<String> {
    let passes =
        |event: &Event| event.get("ranks")?.as_array().filter(|all| !all.is_empty()).cloned();
    let (step, passes) = events.iter().rev().find_map(|event| Some((event, passes(event)?)))?;
    let mut lanes: Vec<Lane<'_>> = Vec::new();
    for pass in &passes {
        let rank = pass[0].as_u64()? as usize;
        while lanes.len() <= rank {
            lanes.push((format!("rank {}", lanes.len()), Vec::new()));
        }
        lanes[rank].1.push((pass[1].as_str()?, [pass[2].as_f64()?, pass[3].as_f64()?]));
    }
    let title = format!("{}: what the ranks did, as measured", place(step));
    Some(passes_timeline(&title, &lanes, "seconds"))
}

/// Passes of ranks or of stages, at times of some unit.
pub fn passes_timeline(title: &str, lanes: &[Lane<'_>], unit: &str) -> String {
    draw(title, &PASSES, lanes, unit)
}

/// Sampling and training of the last steps of a stage whose rollouts are sampled a batch ahead; `None` without such.
pub fn sampling_timeline(events: &[Event]) -> Option<String> {
    let is_ahead = |event: &&Event| event.get("intervals").is_some_and(|at| at["ahead"].is_array());
    let last = events.iter().rev().find(is_ahead)?;
    let of_stage = |event: &&Event| event.text("stage") == last.text("stage");
    let mut steps: Vec<&Event> =
        events.iter().rev().filter(is_ahead).filter(of_stage).take(STEPS).collect();
    steps.reverse();
    let (mut sampling, mut training) = (Vec::new(), Vec::new());
    for step in &steps {
        let intervals = step.get("intervals")?;
        let names =
            [("ahead", "sampling"), ("compare", "comparing"), ("hand_over", "handing over")];
        let at = |key: &str| interval(&intervals[key]);
        sampling.extend(names.iter().filter_map(|(key, name)| Some((*name, at(key)?))));
        let names = [("hand_over", "handing over"), ("score", "scoring"), ("train", "updating")];
        training.extend(names.iter().filter_map(|(key, name)| Some((*name, at(key)?))));
    }
    let shares = steps.iter().filter_map(|step| step.number("sampling_overlap"));
    let share = 100.0 * shares.sum::<f64>() / steps.len() as f64;
    let lanes = [("samplers".to_string(), sampling), ("trainers".to_string(), training)];
    let title =
        format!("up to {}: {share:.0} % of the updates' time has sampling beside it", place(last));
    Some(draw(&title, &WORK, &lanes, "seconds"))
}

fn interval(value: &Value) -> Option<[f64; 2]> {
    Some([value[0].as_f64()?, value[1].as_f64()?])
}

fn place(step: &Event) -> String {
    let stage = step.text("stage").unwrap_or_default();
    format!("{stage}, step {}", step.whole("step").unwrap_or_default())
}

fn draw(title: &str, legend: &[(&str, &str)], lanes: &[Lane<'_>], unit: &str) -> String {
    let all = || lanes.iter().flat_map(|(_, bars)| bars.iter().map(|(_, at)| *at));
    let start = all().map(|at| at[0]).fold(f64::INFINITY, f64::min);
    let seconds = (all().map(|at| at[1]).fold(start, f64::max) - start).max(1e-9);
    let x = |at: f64| LEFT + (at - start) / seconds * (WIDTH - LEFT - RIGHT);
    let bottom = TOP + 12.0 + ROW * lanes.len() as f64;
    let height = bottom + 56.0;
    let mut svg = String::new();
    let view = format!(r#"viewBox="0 0 {WIDTH} {height:.0}""#);
    push(&mut svg, format_args!(r#"<svg xmlns="http://www.w3.org/2000/svg" {view} {STYLE}>"#));
    push(&mut svg, format_args!("<title>{}</title>", escaped(title)));
    push(
        &mut svg,
        format_args!(r##"<rect width="{WIDTH}" height="{height:.0}" fill="#ffffff"/>"##),
    );
    label(&mut svg, (LEFT - 60.0, 20.0), r#"font-size="15""#, title);
    let occurs = |what: &str| lanes.iter().any(|(_, bars)| bars.iter().any(|bar| bar.0 == what));
    for (index, (name, colour)) in legend.iter().filter(|one| occurs(one.0)).enumerate() {
        let left = LEFT - 60.0 + 115.0 * index as f64;
        bar(&mut svg, [left, left + 14.0], 32.0, 8.0, colour);
        label(&mut svg, (left + 20.0, 40.0), "", name);
    }
    for (row, (name, bars)) in lanes.iter().enumerate() {
        let top = TOP + 12.0 + ROW * row as f64;
        label(&mut svg, (LEFT - 60.0, top + 13.0), "", name);
        for (what, at) in bars {
            let colour =
                legend.iter().find(|(name, _)| name == what).map_or("#222222", |one| one.1);
            bar(&mut svg, at.map(x), top, BAR, colour);
        }
    }
    for part in 0..=5 {
        let share = f64::from(part) / 5.0;
        let left = LEFT + share * (WIDTH - LEFT - RIGHT);
        let text = format!("{:.3}", seconds * share);
        label(&mut svg, (left, bottom + 18.0), r#"text-anchor="middle""#, &text);
        bar(&mut svg, [left, left], bottom, 5.0, "#222222");
    }
    label(&mut svg, (LEFT, bottom + 38.0), "", unit);
    svg.push_str("</svg>\n");
    svg
}

fn bar(svg: &mut String, [left, right]: [f64; 2], top: f64, height: f64, colour: &str) {
    // Whatever happened is to be seen, and neighbours of a colour apart.
    let width = (right - left - 0.4).max(0.4);
    push(
        svg,
        format_args!(
            r#"<rect x="{left:.1}" y="{top:.1}" width="{width:.1}" height="{height:.1}" fill="{colour}"/>"#
        ),
    );
}

#[cfg(test)]
mod tests {
    use super::super::plot::tests::check_well_formed;
    use super::*;
    use serde_json::json;

    #[test]
    fn each_rank_has_a_lane_of_the_last_step_that_was_taken_down() {
        let passes = json!([
            [0, "forward", 0.0, 1.0, 0, 0],
            [1, "forward", 1.0, 2.0, 0, 0],
            [1, "update", 3.0, 4.0, null, null],
        ]);
        let old =
            Event::step("base", "pretrain", 1).with("ranks", json!([[0, "forward", 0.0, 9.0]]));
        let none = Event::step("base", "pretrain", 3).with("ranks", Value::Null);
        let events = [old, Event::step("base", "pretrain", 2).with("ranks", passes), none.clone()];
        let svg = ranks_timeline(&events).unwrap();
        check_well_formed(&svg);
        assert!(svg.contains("base, step 2") && svg.contains("rank 1") && !svg.contains("rank 2"));
        // The second of four seconds, in the second lane; one more of the colour is in the legend.
        let width = (WIDTH - LEFT - RIGHT) / 4.0;
        let (left, top) = (LEFT + width, TOP + 12.0 + ROW);
        let wanted = format!(r#"<rect x="{left:.1}" y="{top:.1}" width="{:.1}""#, width - 0.4);
        assert!(svg.contains(&wanted), "{wanted}: {svg}");
        assert_eq!(svg.matches(PASSES[0].1).count(), 3);
        assert_eq!(ranks_timeline(&[none]), None);
    }

    #[test]
    fn sampling_and_training_stand_one_above_the_other_on_one_clock() {
        let step = |number: u64, from: f64| {
            let intervals = json!({
                "hand_over": [from, from + 1.0],
                "ahead": [from + 1.0, from + 3.0],
                "compare": [from + 3.0, from + 4.0],
                "score": [from + 1.0, from + 2.0],
                "train": [from + 2.0, from + 5.0],
            });
            let step = Event::step("solve", "grpo", number).with("intervals", intervals);
            step.with("sampling_overlap", 0.5)
        };
        let last =
            Event::step("solve", "grpo", 9).with("intervals", json!({"train": [60.0, 61.0]}));
        let steps: Vec<Event> =
            (0..8).map(|n| step(n, 1e9 + 5.0 * n as f64)).chain([last]).collect();
        let svg = sampling_timeline(&steps).unwrap();
        check_well_formed(&svg);
        assert!(
            svg.contains("solve, step 7: 50 % of the updates") && svg.contains("samplers"),
            "{svg}"
        );
        // Six steps and the legend; a hand-over stands in both lanes.
        let count = |place: usize| svg.matches(WORK[place].1).count();
        assert_eq!([0, 1, 2, 3, 4].map(count), [7, 7, 13, 7, 7]);
        assert_eq!(sampling_timeline(&steps[8..]), None);
    }
}
