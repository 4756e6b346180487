//! Line charts as SVG, written by hand: no scripts, no fonts, a light background.
//!
//! [`write_curves`] draws what the journal holds into `plots/`: the loss of every stage that learns
//! from text or pairs, the reward and pass@1 of alignment, its KL and length, what the last step that moved models off
//! the device and back did when, what the ranks of a run over several did, and what was sampled beside training. The same journal gives the same bytes.

use super::board::{JOURNAL_FILE, replace_file};
use super::event::Event;
use super::journal::read_events;
use super::lanes::{ranks_timeline, sampling_timeline};
use super::text::figure;
use super::timeline::offload_timeline;
use anyhow::{Context, Result};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};

pub(super) const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 400.0;
pub(super) const LEFT: f64 = 72.0;
pub(super) const RIGHT: f64 = 24.0;
pub(super) const TOP: f64 = 48.0;
const BOTTOM: f64 = 56.0;
/// More points than pixels only make the file large.
const POINTS: usize = 600;
pub(super) const STYLE: &str = r##"font-family="sans-serif" font-size="12" fill="#222222""##;
/// Told apart without colour vision.
const COLOURS: [&str; 4] = ["#0b5394", "#c55a11", "#38761d", "#741b47"];

/// A chart.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Chart {
    /// Above it.
    pub title: String,
    /// Below it.
    pub x_label: String,
    /// Beside it.
    pub y_label: String,
    /// The lines.
    pub series: Vec<Series>,
    /// Where a stage begins, with its name.
    pub marks: Vec<(f64, String)>,
}

/// One line of a chart.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Series {
    /// In the legend.
    pub name: String,
    /// In order of x.
    pub points: Vec<(f64, f64)>,
    /// Show the points too: for measurements that are few.
    pub dots: bool,
}

/// Draws the curves of a run into `plots/`; gives the files.
pub fn write_curves(run_dir: &Path) -> Result<Vec<PathBuf>> {
    let events = read_events(&run_dir.join(JOURNAL_FILE))?;
    let folder = run_dir.join("plots");
    std::fs::create_dir_all(&folder)
        .with_context(|| format!("failed to create {}", folder.display()))?;
    let mut written = Vec::new();
    for (file, chart) in charts(&events) {
        if chart.series.iter().any(|series| series.points.len() > 1) {
            let path = folder.join(file);
            replace_file(&path, chart.to_svg().as_bytes())?;
            written.push(path);
        }
    }
    let pictures = [
        ("offload.svg", offload_timeline(&events)),
        ("ranks.svg", ranks_timeline(&events)),
        ("sampling.svg", sampling_timeline(&events)),
    ];
    for (file, picture) in pictures {
        let (path, Some(picture)) = (folder.join(file), picture) else { continue };
        replace_file(&path, picture.as_bytes())?;
        written.push(path);
    }
    Ok(written)
}

fn charts(events: &[Event]) -> Vec<(&'static str, Chart)> {
    let learns = |e: &Event| e.text("kind").is_some_and(|kind| kind != "grpo");
    let aligns = |e: &Event| e.text("kind") == Some("grpo");
    let mut loss = over_steps(events, &learns, "Loss", &["loss"]);
    loss.1.y_label = "loss (nats)".to_string();
    let mut reward = over_steps(events, &aligns, "Reward and held-out score", &["reward_mean"]);
    add_evals(events, &aligns, &mut reward);
    let kl = over_steps(events, &aligns, "KL to the reference", &["kl"]);
    let length = over_steps(events, &aligns, "Tokens of a reply", &["length_mean"]);
    vec![("loss.svg", loss.1), ("reward.svg", reward.1), ("kl.svg", kl.1), ("length.svg", length.1)]
}

/// First x of each stage, and the chart.
type Placed = (BTreeMap<String, f64>, Chart);

/// Figures of the steps of several stages, one stage after the other.
fn over_steps(
    events: &[Event],
    wanted: &dyn Fn(&Event) -> bool,
    title: &str,
    keys: &[&str],
) -> Placed {
    let mut starts = BTreeMap::new();
    let mut chart = Chart {
        title: title.to_string(),
        x_label: "step".to_string(),
        y_label: keys.join(", "),
        series: keys
            .iter()
            .map(|key| Series { name: key.to_string(), ..Series::default() })
            .collect(),
        marks: Vec::new(),
    };
    let mut end = 0.0;
    for event in events.iter().filter(|e| e.name() == "step" && wanted(e)) {
        let stage = event.text("stage").unwrap_or_default();
        let start = *starts.entry(stage.to_string()).or_insert_with(|| {
            chart.marks.push((end, stage.to_string()));
            end
        });
        let x = start + event.number("step").unwrap_or_default();
        for (series, key) in chart.series.iter_mut().zip(keys) {
            series.points.extend(event.number(key).map(|y| (x, y)));
        }
        end = end.max(x);
    }
    (starts, chart)
}

/// Adds pass@1 and rates of the same stages, each eval a line.
fn add_evals(events: &[Event], wanted: &dyn Fn(&Event) -> bool, placed: &mut Placed) {
    let (starts, chart) = placed;
    let mut lines: BTreeMap<String, Vec<(f64, f64)>> = BTreeMap::new();
    for event in events.iter().filter(|e| e.name() == "eval" && wanted(e)) {
        let Some(start) = event.text("stage").and_then(|stage| starts.get(stage)) else { continue };
        if let Some((metric @ ("pass_at_1" | "rate"), value)) = event.measured() {
            let name = format!(
                "{} ({})",
                event.text("name").unwrap_or_default(),
                metric.replace("pass_at_1", "pass@1")
            );
            lines
                .entry(name)
                .or_default()
                .push((start + event.number("step").unwrap_or_default(), value));
        }
    }
    let room = COLOURS.len() - chart.series.len();
    let lines = lines.into_iter().filter(|(_, points)| points.len() > 1).take(room);
    chart.series.extend(lines.map(|(name, points)| Series { name, points, dots: true }));
    if chart.series.len() > 1 {
        chart.y_label = "reward, share".to_string();
    }
}

impl Chart {
    /// The picture.
    pub fn to_svg(&self) -> String {
        let scale = Scale::of(&self.series);
        let mut svg = String::new();
        self.frame(&mut svg, &scale);
        for (index, series) in self.series.iter().enumerate() {
            let colour = COLOURS[index % COLOURS.len()];
            let points = thinned(&series.points);
            let path: Vec<String> =
                points.iter().map(|p| format!("{:.1},{:.1}", scale.x(p.0), scale.y(p.1))).collect();
            push(
                &mut svg,
                format_args!(
                    r#"<polyline points="{}" fill="none" stroke="{colour}" stroke-width="2"/>"#,
                    path.join(" ")
                ),
            );
            for (x, y) in points.iter().filter(|_| series.dots) {
                push(
                    &mut svg,
                    format_args!(
                        r#"<circle cx="{:.1}" cy="{:.1}" r="4" fill="{colour}"/>"#,
                        scale.x(*x),
                        scale.y(*y)
                    ),
                );
            }
            let x = LEFT + 12.0 + 160.0 * index as f64;
            push(
                &mut svg,
                format_args!(r#"<rect x="{x}" y="32" width="14" height="4" fill="{colour}"/>"#),
            );
            push(
                &mut svg,
                format_args!(r#"<text x="{}" y="38">{}</text>"#, x + 20.0, escaped(&series.name)),
            );
        }
        svg.push_str("</svg>\n");
        svg
    }

    /// Background, title, and the names of the axes.
    fn frame(&self, svg: &mut String, scale: &Scale) {
        let (right, bottom) = (WIDTH - RIGHT, HEIGHT - BOTTOM);
        push(
            svg,
            format_args!(
                r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" {STYLE}>"#
            ),
        );
        push(svg, format_args!("<title>{}</title>", escaped(&self.title)));
        push(svg, format_args!(r##"<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>"##));
        label(svg, (LEFT, 20.0), r#"font-size="15""#, &self.title);
        self.axes(svg, scale);
        let middle = ((LEFT + right) / 2.0, HEIGHT - 12.0);
        label(svg, middle, r#"text-anchor="middle""#, &self.x_label);
        let middle = (TOP + bottom) / 2.0;
        let upright = format!(r#"text-anchor="middle" transform="rotate(-90 16 {middle})""#);
        label(svg, (16.0, middle), &upright, &self.y_label);
    }

    /// Axes with ticks, and the stages' marks.
    fn axes(&self, svg: &mut String, scale: &Scale) {
        let (right, bottom) = (WIDTH - RIGHT, HEIGHT - BOTTOM);
        for value in ticks(scale.low.1, scale.high.1) {
            let y = scale.y(value);
            rule(svg, (LEFT, y), (right, y), r##"stroke="#dddddd""##);
            label(svg, (LEFT - 8.0, y + 4.0), r#"text-anchor="end""#, &tick_text(value));
        }
        for value in ticks(scale.low.0, scale.high.0) {
            let x = scale.x(value);
            rule(svg, (x, bottom), (x, bottom + 5.0), r##"stroke="#222222""##);
            label(svg, (x, bottom + 20.0), r#"text-anchor="middle""#, &tick_text(value));
        }
        for (at, name) in &self.marks {
            let x = scale.x(*at);
            rule(svg, (x, TOP), (x, bottom), r##"stroke="#999999" stroke-dasharray="4 4""##);
            label(svg, (x + 4.0, TOP + 12.0), r##"font-size="11" fill="#666666""##, name);
        }
        rule(svg, (LEFT, TOP), (LEFT, bottom), r##"stroke="#222222""##);
        rule(svg, (LEFT, bottom), (right, bottom), r##"stroke="#222222""##);
    }
}

/// From figures to pixels.
struct Scale {
    low: (f64, f64),
    high: (f64, f64),
}

impl Scale {
    fn of(series: &[Series]) -> Scale {
        let points = || {
            series.iter().flat_map(|s| &s.points).filter(|(x, y)| x.is_finite() && y.is_finite())
        };
        let range = |of: &dyn Fn(&(f64, f64)) -> f64| {
            let low = points().map(of).fold(f64::INFINITY, f64::min);
            let high = points().map(of).fold(f64::NEG_INFINITY, f64::max);
            if low > high {
                (0.0, 1.0)
            } else if low == high {
                (low - 0.5, high + 0.5)
            } else {
                (low, high)
            }
        };
        let ((x_low, x_high), (y_low, y_high)) = (range(&|p| p.0), range(&|p| p.1));
        // A line on the frame is hard to see.
        let air = 0.05 * (y_high - y_low);
        Scale { low: (x_low, y_low - air), high: (x_high, y_high + air) }
    }

    fn x(&self, value: f64) -> f64 {
        LEFT + (value - self.low.0) / (self.high.0 - self.low.0) * (WIDTH - LEFT - RIGHT)
    }

    fn y(&self, value: f64) -> f64 {
        HEIGHT
            - BOTTOM
            - (value - self.low.1) / (self.high.1 - self.low.1) * (HEIGHT - TOP - BOTTOM)
    }
}

/// Round values within a range: steps of 1, 2 or 5 times a power of ten.
fn ticks(low: f64, high: f64) -> Vec<f64> {
    let rough = (high - low) / 5.0;
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0]
        .map(|m| m * power)
        .into_iter()
        .find(|s| *s >= rough)
        .unwrap_or(10.0 * power);
    let first = (low / step).ceil() as i64;
    let last = (high / step).floor() as i64;
    (first..=last).map(|i| i as f64 * step).collect()
}

fn tick_text(value: f64) -> String {
    let text = figure(value);
    if text.contains('.') && !text.contains('e') {
        text.trim_end_matches('0').trim_end_matches('.').to_string()
    } else {
        text
    }
}

/// At most [`POINTS`] means of neighbours, without what is no number.
fn thinned(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let points: Vec<(f64, f64)> =
        points.iter().copied().filter(|(x, y)| x.is_finite() && y.is_finite()).collect();
    let size = points.len().div_ceil(POINTS).max(1);
    let mean = |piece: &[(f64, f64)]| {
        let n = piece.len() as f64;
        (piece.iter().map(|p| p.0).sum::<f64>() / n, piece.iter().map(|p| p.1).sum::<f64>() / n)
    };
    points.chunks(size).map(mean).collect()
}

pub(super) fn escaped(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            // XML has no such characters, escaped or not.
            c if c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}') => out.push(' '),
            c => out.push(c),
        }
    }
    out
}

pub(super) fn label(svg: &mut String, at: (f64, f64), attributes: &str, text: &str) {
    let (x, y) = at;
    let text = escaped(text);
    push(svg, format_args!(r#"<text x="{x:.1}" y="{y:.1}" {attributes}>{text}</text>"#));
}

fn rule(svg: &mut String, from: (f64, f64), to: (f64, f64), attributes: &str) {
    let ((x1, y1), (x2, y2)) = (from, to);
    push(
        svg,
        format_args!(r#"<line x1="{x1:.1}" y1="{y1:.1}" x2="{x2:.1}" y2="{y2:.1}" {attributes}/>"#),
    );
}

pub(super) fn push(svg: &mut String, part: std::fmt::Arguments) {
    svg.write_fmt(part).expect("a string takes every write");
    svg.push('\n');
}

#[cfg(test)]
pub(super) mod tests;
