//! Needles in haystacks: the eval through the binary, and the miniature of a long-context stage.

use crate::runs::{check_refused, done, events, finished, rehearsal};
use serde_json::Value;
use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;
use tempfile::TempDir;

fn needle(model: &Path, extra: &str) -> Command {
    let mut command = rehearsal(&["eval"]);
    command.arg(model).args(["--verifier", "needle"]).args(extra.split_whitespace());
    command
}

/// The figures of a grid.
fn measured(model: &Path, extra: &str) -> Value {
    let output = done(needle(model, &format!("{extra} --json")));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn a_grid_is_measured_printed_and_drawn() {
    let model = finished().join("export");
    let folder = TempDir::new().unwrap();
    let picture = folder.path().join("grid.svg");
    let grid = "--lengths 100,200 --depths 0,50,100 --needles 2 --seed 5";
    let drawn = format!("{grid} --picture {} --threads 1", picture.display());
    let text = String::from_utf8(done(needle(&model, &drawn)).stdout).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 5, "{text}");
    assert!(lines[2].starts_with("     100 ") && lines[3].starts_with("     200 "), "{text}");
    assert!(lines[4].ends_with("of 12 needles, 2 a cell"), "{text}");
    let svg = std::fs::read_to_string(&picture).unwrap();
    assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"), "{svg}");
    assert_eq!(svg.matches(" %</text>").count(), 6 + 3, "cells and rows: {svg}");

    let figures = measured(&model, &format!("{grid} --threads 1"));
    assert_eq!(figures, measured(&model, &format!("{grid} --threads 2")));
    assert_eq!(figures["lengths"], serde_json::json!([100, 200]));
    assert_eq!(figures["shares"].as_array().unwrap().len(), 2);
    assert_eq!((&figures["haystacks"], &figures["context"]), (&12.into(), &256.into()));
}

#[test]
fn what_cannot_be_measured_is_refused_and_more_positions_are_given() {
    let model = finished().join("export");
    for (extra, said) in [
        ("--lengths 512", "512 tokens are more than the model's context of 256"),
        ("--lengths 8", "8 tokens hold no needle"),
        ("--data some.jsonl", "takes no --data"),
        ("--extend-to 256", "lengthens nothing"),
        ("--picture nowhere/grid.svg", "there is no folder nowhere"),
    ] {
        check_refused(needle(&model, extra), 2, &[said]);
    }
    let mut other = rehearsal(&["eval"]);
    other.arg(&model).args(["--metric", "perplexity", "--data", "f", "--needles", "3"]);
    check_refused(other, 2, &["--needles is for --verifier needle"]);
    for yarn in ["", "--no-yarn"] {
        let longer = format!("--extend-to 512 {yarn} --lengths 512 --depths 50 --needles 1");
        assert_eq!(measured(&model, &longer)["context"], 512);
    }
}

/// The miniature, trained once.
fn miniature() -> &'static Path {
    static RUN: OnceLock<TempDir> = OnceLock::new();
    let folder = RUN.get_or_init(|| {
        let folder = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let mut command = rehearsal(&["run", "configs/small/needle.toml", "--console", "off"]);
        command.arg("--out").arg(folder.path().join("run"));
        done(command);
        folder
    });
    folder.path()
}

#[test]
fn needles_are_found_at_four_times_the_trained_length_with_yarn_and_not_without_it() {
    let run = miniature().join("run");
    let (base, long) = (run.join("stages/01-base"), run.join("export"));
    let found = |model: &Path, extra: &str| measured(model, extra)["found"].as_f64().unwrap();

    // The run measured the same: at the length that was trained, and at four times that length.
    let journal: Vec<(String, f64)> = events(&run, "eval")
        .iter()
        .map(|e| (e["name"].as_str().unwrap().to_string(), e["pass_at_1"].as_f64().unwrap()))
        .collect();
    assert_eq!(journal.len(), 5, "{journal:?}");
    assert!(journal[0].1 >= 0.95, "{journal:?}");
    assert!(journal[4].0 == "found at 256" && journal[4].1 >= 0.95, "{journal:?}");

    let trained = found(&base, "--lengths 32,64");
    assert!(trained >= 0.95, "at the length of training: {trained}");
    let with = found(&long, "--lengths 256");
    assert!(with >= 0.95, "with YaRN: {with}");
    let without = found(&base, "--extend-to 256 --no-yarn --lengths 256");
    assert!(without < 0.5, "without YaRN: {without}");
    // YaRN alone, with nothing longer than the original length ever trained.
    let alone = found(&base, "--extend-to 256 --lengths 256");
    assert!(alone > without + 0.3, "YaRN alone: {alone}, without it: {without}");
}

/// Perplexity of held-out haystacks and its change against f32, KL in nats, and needles found.
fn in_few_bits(formats: &str) -> [f64; 3] {
    let run = miniature().join("run");
    let held_out = run.join("data/needle-long.jsonl");
    let text: Vec<String> = std::fs::read_to_string(held_out)
        .unwrap()
        .lines()
        .take(20)
        .map(|line| {
            let prompt: Value = serde_json::from_str(line).unwrap();
            let part = |key: &str| prompt[key].as_str().unwrap().to_string();
            serde_json::json!({ "text": part("prompt") + " " + &part("answer") }).to_string()
        })
        .collect();
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("held-out.jsonl");
    std::fs::write(&file, text.join("\n")).unwrap();
    let mut command = rehearsal(&["eval"]);
    command.arg(run.join("export")).args(["--metric", "perplexity", "--against-f32", "--json"]);
    command.arg("--data").arg(&file).args(formats.split_whitespace());
    let measured_now: Value = serde_json::from_slice(&done(command).stdout).unwrap();
    let figure = |key: &str| measured_now["against_f32"][key].as_f64().unwrap();
    let found = measured(&run.join("export"), &format!("--lengths 256 --needles 4 {formats}"));
    [figure("delta"), figure("kl"), found["found"].as_f64().unwrap()]
}

#[test]
fn few_bits_cost_the_miniature_a_bounded_share_of_its_perplexity_and_no_needle() {
    for (formats, most_delta, most_kl) in [
        ("--dtype bf16", 5e-4, 1e-4),
        ("--dtype fp8", 5e-3, 1e-3),
        ("--dtype fp8-block", 5e-3, 1e-3),
        ("--dtype int8", 2e-3, 5e-4),
        ("--cache-dtype fp8", 2e-3, 5e-4),
        ("--cache-dtype 6bit", 3e-3, 1e-3),
        ("--dtype fp8 --cache-dtype 6bit", 8e-3, 2e-3),
    ] {
        let [delta, kl, found] = in_few_bits(formats);
        println!("{formats}: perplexity {delta:+.2e}, KL {kl:.2e}, found {found}");
        assert!(delta.abs() < most_delta, "{formats}: perplexity changes by {delta:e}");
        assert!((0.0..most_kl).contains(&kl), "{formats}: KL {kl:e}");
        assert!(found >= 0.95, "{formats}: {found} of the needles are found");
    }
}
