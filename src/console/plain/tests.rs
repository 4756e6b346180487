//! Tests of the plain console on a short invented run.

use super::*;
use serde_json::json;
use std::sync::{Arc, Mutex};

#[derive(Clone, Default)]
struct Screen(Arc<Mutex<Vec<u8>>>);

impl Write for Screen {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().expect("one thread").extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn replies(text: &str) -> serde_json::Value {
    let prompt = "<|user|>reverse: p u n k<|assistant|>";
    json!([{"prompt": prompt, "text": text, "answer": "k n u p", "score": 1.0}])
}

fn events() -> Vec<Event> {
    let read = |step, loss: f64| {
        Event::step("sft", "sft", step).with("loss", loss).with("learning_rate", 1e-3)
    };
    let align = |step, reward: f64| Event::step("align", "grpo", step).with("reward_mean", reward);
    let held_out =
        |step, value| Event::eval("align", "grpo", step, "held-out", "pass_at_1", value, 300);
    vec![
        Event::new("run").at(0.0).with("seed", 7).with(
            "stages",
            json!([
                {"name": "sft", "kind": "sft", "steps": 2},
                {"name": "align", "kind": "grpo", "steps": 2},
            ]),
        ),
        Event::new("stage-start").of_stage("sft", "sft").with("steps", 2).at(1.0),
        read(1, 1.25).at(2.0).with("tokens_per_second", 5120.4),
        read(2, 0.5).at(3.0).with("gradient_norm", 0.75),
        Event::new("stage-end").of_stage("sft", "sft").at(3.5),
        Event::new("stage-start").of_stage("align", "grpo").with("steps", 2).at(4.0),
        held_out(0, 0.25).at(4.5).with("replies", replies("Answer: k\x1b[2J")),
        align(1, 0.125).at(6.0).with("kl", 0.0004).with("length_mean", 12.25),
        Event::new("restart").at(7.0).with("actor", "reward-scorer").with("reason", "a panic"),
        align(2, 0.625).at(8.0).with("kl", 0.0021).with("length_mean", 28.5),
        held_out(2, 0.9).at(8.5).with("replies", replies("reverse: k n u p\nAnswer: k n u p")),
        Event::new("stage-end").of_stage("align", "grpo").at(9.0),
        Event::new("end").with("state", "finished").with("export", "runs/demo/export").at(9.5),
    ]
}

fn shown(terminal: bool, events: &[Event]) -> String {
    let screen = Screen::default();
    let mut plain = Plain::new(Box::new(screen.clone()), terminal, Path::new("runs/demo"));
    events.iter().for_each(|event| plain.show(event));
    let bytes = screen.0.lock().expect("one thread").clone();
    String::from_utf8(bytes).expect("text")
}

#[test]
fn a_log_has_one_tidy_line_per_step_and_no_control_characters() {
    let text = shown(false, &events());
    assert!(text.bytes().all(|b| b == b'\n' || (b' '..=b'~').contains(&b)), "{text:?}");
    assert!(text.lines().all(|line| line.len() <= 80), "{text}");
    for expected in [
        "run runs/demo begins, seed 7",
        "-- stage 1/2: sft (sft, 2 steps)",
        "sft 1/2  loss 1.250  lr 1.0e-3  5120 tok/s",
        "align 2/2  reward 0.625  kl 2.1e-3  len 28.5",
        "   eval held-out: pass@1 90.0 %  (300 examples)",
        "!! reward-scorer restarted: a panic",
        "exported model: runs/demo/export",
        "  rehearsal generate runs/demo/export",
        "  rehearsal status runs/demo",
    ] {
        assert!(text.lines().any(|line| line == expected), "{expected:?} in\n{text}");
    }
    assert_eq!(
        text.lines().filter(|line| line.starts_with("align ") && line.contains("/2  ")).count(),
        2,
        "{text}"
    );
}

#[test]
fn a_step_that_drops_tells_its_share_within_the_width() {
    let step = Event::step("pretraining-on-everything", "pretrain", 1000)
        .with("loss", 123.456)
        .with("learning_rate", 1.5e-4)
        .with("gradient_norm", 12.25)
        .with("tokens_per_second", 123_456.0)
        .with("dropped", 0.0314);
    let start = Event::new("stage-start").of_stage("pretraining-on-everything", "pretrain");
    let text = shown(false, &[start.with("steps", 1000), step]);
    let line = text.lines().last().expect("the step's line");
    assert!(line.ends_with("  loss 123  norm 12.2  drop 3.1 %  123456 tok/s"), "{line:?}");
    assert!(line.len() <= WIDTH, "{line:?}");
}

#[test]
fn a_step_tells_what_it_made_of_the_machine_within_the_width() {
    let line = |step: Event| {
        let (stage, kind) = (step.text("stage").unwrap(), step.text("kind").unwrap());
        let start = Event::new("stage-start").of_stage(stage, kind).with("steps", 1000);
        let text = shown(false, &[start, step]);
        let line = text.lines().last().expect("the step's line").to_string();
        assert!(line.len() <= WIDTH, "{line:?}");
        line
    };
    let figures = |step: Event| {
        step.with("learning_rate", 1.5e-4)
            .with("gradient_norm", 12.25)
            .with("tokens_per_second", 123_456.0)
    };
    let long = "reward-model-of-helpfulness";
    let trained = Event::step(long, "reward-model", 1000).with("loss", 0.693);
    let trained = figures(trained).with("accuracy", 0.5).with("useful_share", 0.347);
    let trained = line(trained);
    assert!(
        trained.ends_with("1000/1000  loss 0.693  acc 0.500  norm 12.2  123456 tok/s  use 34.7 %"),
        "{trained:?}"
    );
    let dropping = Event::step(long, "pretrain", 1000).with("loss", 123.456);
    let dropping = line(figures(dropping).with("dropped", 0.0314).with("useful_share", 0.25));
    assert!(dropping.ends_with("  drop 3.1 %  123456 tok/s  use 25.0 %"), "{dropping:?}");
    let aligned = Event::step("align", "grpo", 1000).with("reward_mean", 0.5).with("kl", 1e-3);
    let aligned = figures(aligned.with("entropy", 0.25).with("length_mean", 12.3));
    let aligned = line(aligned.with("rfu", 0.0432));
    assert_eq!(aligned, "align 1000/1000  reward 0.500  kl 1.0e-3  ent 0.250  len 12.3  rfu 4.3 %");
}

#[test]
fn replies_before_and_after_stand_side_by_side() {
    let text = shown(false, &events());
    let row = text
        .lines()
        .find(|line| line.contains("Answer: k\\x1b[2J") && line.contains("reverse: k n u p"));
    assert!(row.is_some(), "{text}");
    assert!(
        text.contains("first (align), 1.0000") && text.contains("now (align), 1.0000"),
        "{text}"
    );
}

#[test]
fn a_terminal_has_a_bar_with_the_time_left_which_the_next_line_covers() {
    let text = shown(true, &events()[..4]);
    assert!(
        text.contains("] 100%  stage 1/2 sft  0s left")
            && text.contains("[###############...............]  50%"),
        "{text:?}"
    );
    assert!(text.contains("1s left"), "{text:?}");
    for piece in text.split(['\r', '\n']) {
        assert!(piece.len() <= WIDTH, "{piece:?}");
    }
    let again = text.replace(&format!("\r{:<WIDTH$}\r", ""), "");
    assert!(!again.contains('\r'), "every bar is covered before the next line: {again:?}");
}

#[test]
fn the_time_left_of_a_resumed_stage_counts_only_what_this_process_saw() {
    let screen = Screen::default();
    let mut plain = Plain::new(Box::new(screen.clone()), true, Path::new("runs/demo"));
    plain.recall(&Event::new("stage-start").of_stage("sft", "sft").with("steps", 10).at(1.0));
    plain.recall(&Event::step("sft", "sft", 4).at(2.0));
    plain.show(&Event::new("run").with("resumed", true).at(1000.0));
    // The heading is shown again.
    plain.show(&Event::new("stage-start").of_stage("sft", "sft").with("steps", 10).at(1001.0));
    plain.show(&Event::step("sft", "sft", 5).at(1002.0));
    plain.show(&Event::step("sft", "sft", 6).at(1005.0));
    let bytes = screen.0.lock().expect("one thread").clone();
    let text = String::from_utf8(bytes).expect("text");
    assert!(text.contains("resumes") && text.ends_with("60%  stage 1/1 sft  8s left"), "{text:?}");
}

#[test]
fn a_launcher_s_terminal_is_told_from_a_file() {
    for device in ["/dev/pts/3", "/dev/tty1", "/dev/console"] {
        assert!(is_terminal(Path::new(device)), "{device}");
    }
    for device in ["", "/tmp/log", "pipe:[31]", "socket:[31]", "/dev/null"] {
        assert!(!is_terminal(Path::new(device)), "{device}");
    }
    let own = std::fs::read_link("/proc/self/fd/1").unwrap();
    assert_eq!(output_of(std::process::id()), own);
    assert_eq!(output_of(0), PathBuf::new());
}

#[test]
fn a_note_is_shown_to_its_end() {
    let note = "those ranks wait while the others train; set stage.align.max_staleness = 1 to have both at once";
    let text = shown(false, &[Event::new("note").with("text", note)]);
    assert_eq!(text.replace('\n', " ").trim(), format!("note: {note}"));
    assert!(text.lines().all(|line| line.len() <= WIDTH), "{text}");
}

#[test]
fn a_failed_run_says_why() {
    let mut events = events();
    events.pop();
    events.push(
        Event::new("end")
            .with("state", "failed")
            .with("reason", "gate \"held-out\" not reached: 0.2 < 0.3"),
    );
    let text = shown(false, &events);
    assert!(text.ends_with("gate \"held-out\" not reached: 0.2 < 0.3\n"), "{text}");
}

#[test]
fn a_terminal_that_is_gone_stops_nothing() {
    struct Gone;
    impl Write for Gone {
        fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
            Err(std::io::ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let mut plain = Plain::new(Box::new(Gone), true, Path::new("runs/demo"));
    events().iter().for_each(|event| plain.show(event));
    assert!(plain.gone);
}

#[test]
fn a_run_that_ended_early_says_how_to_go_on_unless_it_cannot() {
    let place = tempfile::tempdir().unwrap();
    let record =
        json!({"resume": {"directory": "/", "words": ["rehearsal", "run", "x", "--resume"]}});
    std::fs::write(place.path().join("run.json"), record.to_string()).unwrap();
    let ended = |state: &str, reason: &str| {
        let screen = Screen::default();
        let mut plain = Plain::new(Box::new(screen.clone()), false, place.path());
        plain.show(&Event::new("end").with("state", state).with("reason", reason));
        let bytes = screen.0.lock().expect("one thread").clone();
        String::from_utf8(bytes).unwrap()
    };
    let stopped = ended("stopped", "SIGINT");
    assert!(
        stopped.contains("\nSIGINT\ngo on with: cd / && rehearsal run x --resume\n"),
        "{stopped}"
    );
    let lost = ended("failed", "no checkpoint can be used; start again with --fresh");
    assert!(!lost.contains("--resume"), "{lost}");
}

#[test]
fn a_skipped_step_a_rollback_and_a_planted_fault_are_shown() {
    let text = shown(
        false,
        &[
            Event::step("sft", "sft", 7).with("loss", 1.0).with("skipped", true),
            Event::new("skipped").of_stage("sft", "sft").with("step", 7).with("in_a_row", 3),
            Event::new("rollback").with("reason", "steps 5 to 7 had no finite loss"),
            Event::new("inject").with("actor", "worker").with("message", "Train"),
            Event::step("align", "grpo", 1).with("reward_mean", 0.5).with("skipped_updates", 1),
        ],
    );
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(
        lines,
        [
            "sft     7  loss 1.000  SKIPPED: not finite",
            "!! sft step 7 skipped: no finite loss or gradient, 3 in a row",
            "!! going back to the last commit: steps 5 to 7 had no finite loss",
            "!! worker was given a fault in Train, as a test wants",
            "align     1  reward 0.500  1 of its updates SKIPPED: not finite",
        ]
    );
}
