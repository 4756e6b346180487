//! Tests of the charts: well-formed, inside their frame, made of what the journal holds.

use super::*;

/// Walks the tags of an XML text: every tag closes, attributes are quoted, `&` and `<` stand
/// nowhere else.
pub fn check_well_formed(xml: &str) {
    let mut open: Vec<&str> = Vec::new();
    let mut rest = xml;
    let mut roots = 0;
    while let Some(start) = rest.find('<') {
        check_text(&rest[..start]);
        let end = rest[start..].find('>').expect("a tag ends") + start;
        let tag = &rest[start + 1..end];
        assert!(!tag.contains('<'), "<{tag}>");
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop(), Some(name));
        } else {
            let body = tag.strip_suffix('/');
            let name = body.unwrap_or(tag).split(' ').next().expect("a name");
            assert!(!name.is_empty() && name.bytes().all(|b| b.is_ascii_alphabetic()), "<{tag}>");
            assert_eq!(tag.matches('"').count() % 2, 0, "<{tag}>");
            tag.split('"').for_each(check_text);
            roots += usize::from(open.is_empty());
            if body.is_none() {
                open.push(name);
            }
        }
        rest = &rest[end + 1..];
    }
    assert!(open.is_empty() && roots == 1 && rest.trim().is_empty(), "{open:?}");
}

fn check_text(text: &str) {
    for (at, _) in text.match_indices('&') {
        let known = ["&amp;", "&lt;", "&gt;", "&quot;"];
        assert!(known.iter().any(|entity| text[at..].starts_with(entity)), "{text}");
    }
    assert!(text.chars().all(|c| c == '\n' || !c.is_control()), "{text:?}");
}

/// The numbers in all attributes of one name.
pub fn numbers_of(svg: &str, attribute: &str) -> Vec<f64> {
    let key = format!("{attribute}=\"");
    let values = svg.split(&key).skip(1).filter_map(|rest| rest.split('"').next());
    values.flat_map(|v| v.split([' ', ','])).filter_map(|n| n.parse().ok()).collect()
}

#[test]
fn a_chart_is_well_formed_and_inside_its_frame_whatever_its_figures() {
    let cases: Vec<Vec<(f64, f64)>> = vec![
        vec![],
        vec![(1.0, 2.0)],
        vec![(1.0, 2.0), (2.0, 2.0)],
        (0..5000).map(|i| (f64::from(i), f64::from(i).sin() * 1e9)).collect(),
        vec![(0.0, 1e-12), (1.0, -1e-12), (2.0, f64::NAN), (3.0, f64::INFINITY)],
    ];
    for points in cases {
        let series = Series { name: "a <b> & \"c\"\u{1b}".to_string(), points, dots: true };
        let marks = vec![(0.0, "<script>alert(1)</script>".to_string())];
        let chart =
            Chart { title: "t & <u>".into(), series: vec![series], marks, ..Chart::default() };
        let svg = chart.to_svg();
        check_well_formed(&svg);
        assert!(!svg.contains("<script") && svg.len() < 100_000, "{} bytes", svg.len());
        for (attribute, limit) in [("cx", WIDTH), ("cy", HEIGHT)] {
            assert!(numbers_of(&svg, attribute).iter().all(|n| (0.0..=limit).contains(n)), "{svg}");
        }
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
    }
}

#[test]
fn the_checker_itself_refuses_what_is_not_well_formed() {
    for bad in ["<a>", "<a></b>", "<a>&</a>", "<a/><b/>", "<a x=\"1></a>", "<a>\u{1}</a>"] {
        assert!(std::panic::catch_unwind(|| check_well_formed(bad)).is_err(), "{bad:?}");
    }
}

#[test]
fn ticks_are_round_and_inside() {
    assert_eq!(ticks(0.0, 1.0), [0.0, 0.2, 0.4, 0.6000000000000001, 0.8, 1.0]);
    assert_eq!(ticks(-7.0, 33.0), [0.0, 10.0, 20.0, 30.0]);
    assert!(ticks(0.001, 0.0011).len() >= 3);
}

#[test]
fn the_journal_becomes_loss_and_reward_curves() {
    let run = tempfile::tempdir().expect("a temporary folder");
    let mut events = Vec::new();
    for step in 1..=20 {
        events.push(Event::step("read", "pretrain", step).with("loss", 5.0 / step as f64));
    }
    for step in 1..=5 {
        events.push(Event::step("talk", "sft", step).with("loss", 1.0 / step as f64));
    }
    events.push(Event::eval("align", "grpo", 0, "held-out", "pass_at_1", 0.2, 300));
    for step in 1..=10 {
        events.push(
            Event::step("align", "grpo", step)
                .with("reward_mean", 0.05 * step as f64)
                .with("loss", 0.0),
        );
    }
    events.push(Event::eval("align", "grpo", 10, "held-out", "pass_at_1", 0.9, 300));
    let lines: Vec<String> =
        events.iter().map(|e| serde_json::to_string(e).expect("JSON") + "\n").collect();
    std::fs::write(run.path().join(JOURNAL_FILE), lines.concat()).expect("a journal");

    let files = write_curves(run.path()).expect("plots");
    assert_eq!(files, ["loss.svg", "reward.svg"].map(|name| run.path().join("plots").join(name)));
    for file in &files {
        check_well_formed(&std::fs::read_to_string(file).expect("a plot"));
    }
    let charts = charts(&events);
    let loss = &charts[0].1;
    assert_eq!(loss.marks, [(0.0, "read".to_string()), (20.0, "talk".to_string())]);
    assert_eq!(loss.series[0].points.len(), 25, "alignment's loss is another quantity");
    assert_eq!(loss.series[0].points[20], (21.0, 1.0));
    let reward = &charts[1].1;
    assert_eq!(reward.series[1].name, "held-out (pass@1)");
    assert_eq!(reward.series[1].points, [(0.0, 0.2), (10.0, 0.9)]);
}
