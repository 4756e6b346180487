//! A step's timeline as SVG: what was computed above, what moved beside it below, and in red what the device waited for.
//!
//! Drawn from the journal alone: the last step that moved anything.

use super::event::Event;
use super::plot::{LEFT, RIGHT, STYLE, TOP, WIDTH, escaped, label, push};
use serde_json::Value;

const ROW: f64 = 26.0;
const BAR: f64 = 16.0;
/// Names of items stand here.
const NAMES: f64 = LEFT + 110.0;
/// Told apart without colour vision.
const COMPUTED: &str = "#b4c7dc";
const READ: &str = "#0b5394";
const WRITTEN: &str = "#c55a11";
const WAITED: &str = "#cc0000";

/// The picture of the last step that moved something; `None` if no step did.
pub fn offload_timeline(events: &[Event]) -> Option<String> {
    let moved = |event: &&Event| event.get("offload").is_some_and(Value::is_object);
    let step = events.iter().rev().find(moved)?;
    let title = format!(
        "{}, step {}: {:.1} % of it exposed",
        step.text("stage").unwrap_or_default(),
        step.whole("step").unwrap_or_default(),
        100.0 * step.number("offload_exposed_share").unwrap_or_default()
    );
    Some(draw(&title, step.get("offload")?))
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_default()
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map(Vec::as_slice).unwrap_or_default()
}

fn draw(title: &str, moves: &Value) -> String {
    let seconds = number(&moves["seconds"]).max(1e-9);
    let x = |at: f64| NAMES + at.clamp(0.0, seconds) / seconds * (WIDTH - NAMES - RIGHT);
    let mut items: Vec<&str> = Vec::new();
    for name in list(&moves["moved"]).iter().filter_map(|moved| moved[0].as_str()) {
        if !items.contains(&name) {
            items.push(name);
        }
    }
    items.sort_unstable();
    let bottom = TOP + 12.0 + ROW * (items.len() + 1) as f64;
    let mut svg = String::new();
    head(&mut svg, title, bottom + 56.0);
    for [start, end] in list(&moves["waited"]).iter().map(|at| [number(&at[0]), number(&at[1])]) {
        bar(&mut svg, [x(start), x(end)], [TOP + 8.0, bottom], WAITED, r#"fill-opacity="0.25""#);
    }
    let top = |row: usize| TOP + 12.0 + ROW * row as f64;
    label(&mut svg, (LEFT - 60.0, top(0) + 12.0), "", "computed");
    for span in list(&moves["computed"]) {
        let at = [x(number(&span[1])), x(number(&span[2]))];
        bar(&mut svg, at, [top(0), top(0) + BAR], COMPUTED, r##"stroke="#ffffff""##);
        // A name that does not fit would hide its neighbours.
        let name = span[0].as_str().unwrap_or_default();
        if at[1] - at[0] > 5.5 * name.len() as f64 {
            label(&mut svg, (at[0] + 3.0, top(0) + 12.0), r#"font-size="10""#, name);
        }
    }
    for moved in list(&moves["moved"]) {
        let row = 1 + items.iter().position(|name| moved[0] == **name).unwrap_or_default();
        let colour = if moved[1] == "read" { READ } else { WRITTEN };
        let at = [x(number(&moved[3])), x(number(&moved[4]))];
        let dash =
            if moved[2] == "disk" { r##"stroke="#222222" stroke-dasharray="3 2""## } else { "" };
        bar(&mut svg, at, [top(row), top(row) + BAR], colour, dash);
    }
    for (index, name) in items.iter().enumerate() {
        label(&mut svg, (LEFT - 60.0, top(index + 1) + 12.0), r#"font-size="11""#, name);
    }
    axis(&mut svg, bottom, seconds, &x);
    svg.push_str("</svg>\n");
    svg
}

fn head(svg: &mut String, title: &str, height: f64) {
    let view = format!(r#"viewBox="0 0 {WIDTH} {height:.0}""#);
    push(svg, format_args!(r#"<svg xmlns="http://www.w3.org/2000/svg" {view} {STYLE}>"#));
    push(svg, format_args!("<title>{}</title>", escaped(title)));
    push(svg, format_args!(r##"<rect width="{WIDTH}" height="{height:.0}" fill="#ffffff"/>"##));
    label(svg, (LEFT - 60.0, 20.0), r#"font-size="15""#, title);
    let legend =
        [(COMPUTED, "computed"), (READ, "read"), (WRITTEN, "written"), (WAITED, "waited for")];
    for (index, (colour, name)) in legend.into_iter().enumerate() {
        let left = LEFT - 60.0 + 110.0 * index as f64;
        bar(svg, [left, left + 14.0], [32.0, 40.0], colour, "");
        label(svg, (left + 20.0, 40.0), "", name);
    }
    label(svg, (LEFT + 380.0, 40.0), r##"fill="#666666""##, "dashed: a copy on disk");
}

fn bar(
    svg: &mut String,
    [left, right]: [f64; 2],
    [top, bottom]: [f64; 2],
    colour: &str,
    more: &str,
) {
    // Whatever happened is to be seen.
    let (width, height) = ((right - left).max(0.8), bottom - top);
    push(
        svg,
        format_args!(
            r#"<rect x="{left:.1}" y="{top:.1}" width="{width:.1}" height="{height:.1}" fill="{colour}" {more}/>"#
        ),
    );
}

fn axis(svg: &mut String, bottom: f64, seconds: f64, x: &dyn Fn(f64) -> f64) {
    for part in 0..=5 {
        let at = seconds * f64::from(part) / 5.0;
        let text = format!("{at:.3}");
        label(svg, (x(at), bottom + 18.0), r#"text-anchor="middle""#, &text);
        bar(svg, [x(at), x(at)], [bottom, bottom + 5.0], "#222222", "");
    }
    label(svg, (NAMES, bottom + 38.0), "", "seconds since the step began");
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn step(waited: &Value) -> Event {
        let moves = json!({
            "seconds": 2.0,
            "computed": [["generate", 0.0, 1.0], ["train", 1.2, 2.0]],
            "waited": waited,
            "moved": [["a<b/weights", "read", "host", 0.5, 1.2, 64], ["policy/moments", "write", "disk", 0.0, 0.4, 64]],
        });
        Event::step("align", "grpo", 3).with("offload", moves).with("offload_exposed_share", 0.1)
    }

    #[test]
    fn the_last_step_that_moved_something_is_drawn_and_what_was_waited_for_is_red() {
        let plain = Event::step("align", "grpo", 4).with("offload", Value::Null);
        let events = [step(&json!([[1.0, 1.2]])), plain.clone()];
        let svg = offload_timeline(&events).unwrap();
        assert!(svg.contains("align, step 3: 10.0 % of it exposed") && svg.ends_with("</svg>\n"));
        assert!(svg.contains("a&lt;b/weights") && !svg.contains("a<b"), "{svg}");
        let reds = |svg: &str| svg.matches(WAITED).count();
        // One in the legend.
        assert_eq!(reds(&svg), 2);
        assert_eq!(reds(&offload_timeline(&[step(&json!([]))]).unwrap()), 1);
        // 0.5 to 1.2 of 2 seconds, and its width of the picture's.
        let (left, width) =
            (NAMES + 0.25 * (WIDTH - NAMES - RIGHT), 0.35 * (WIDTH - NAMES - RIGHT));
        assert!(
            svg.contains(&format!(r#"<rect x="{left:.1}" y="86.0" width="{width:.1}""#)),
            "{svg}"
        );
        assert_eq!(offload_timeline(&[plain]), None);
    }
}
