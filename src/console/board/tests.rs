//! Tests of the board: what events make of it, its file, its text.

use super::*;
use rustix::fs::{FlockOperation, flock};
use serde_json::json;
use std::fs::File;

fn events() -> Vec<Event> {
    let mut events = vec![
        Event::new("run").at(100.0).with(
            "stages",
            json!([
                {"name": "sft", "kind": "sft", "steps": 3},
                {"name": "align", "kind": "grpo", "steps": null},
            ]),
        ),
        Event::new("stage-start").of_stage("sft", "sft").with("steps", 3).at(101.0),
    ];
    for step in 1..=3 {
        let event = Event::step("sft", "sft", step).at(101.0 + step as f64);
        events.push(
            event
                .with("loss", 3.0 / step as f64)
                .with("memory", json!({"policy/weights": 1 << 20})),
        );
    }
    events.push(Event::eval("sft", "sft", 3, "held-out", "pass_at_1", 0.25, 300).at(105.0).with(
        "replies",
        json!([{"prompt": "p\u{1b}[2J", "text": "r\u{7}\nx", "answer": "a", "score": 1.0}]),
    ));
    events.push(Event::new("stage-end").of_stage("sft", "sft").at(106.0));
    events
}

fn filled() -> Board {
    let mut board = Board {
        run: "demo".to_string(),
        started: 100.0,
        updated: 100.0,
        pid: 42,
        ..Board::default()
    };
    for event in events() {
        board.take(&event);
    }
    board
}

#[test]
fn events_fill_the_board() {
    let board = filled();
    assert_eq!(board.stages.len(), 2);
    let sft = &board.stages[0];
    assert_eq!((sft.state, sft.step, sft.steps, sft.seconds), (StageState::Done, 3, Some(3), 5.0));
    assert_eq!(
        (board.stages[1].state, board.stages[1].kind.as_str()),
        (StageState::Waiting, "grpo")
    );
    assert_eq!(board.curves["loss"], [(1, 3.0), (2, 1.5), (3, 1.0)]);
    assert_eq!(board.evals[0].value, 0.25);
    assert_eq!(board.replies[0].answer.as_deref(), Some("a"));
    assert_eq!((board.memory["policy/weights"], board.memory_high_water), (1 << 20, 1 << 20));
    assert_eq!(board.updated, 106.0);
}

#[test]
fn what_a_step_moved_is_told_until_one_moves_nothing() {
    let moves = serde_json::json!({
        "bytes_in": 3 << 20, "bytes_out": 0, "exposed_seconds": 0.5, "seconds": 10.0, "overlap_share": 0.75,
        "moved": [["reference/weights", "read", "host", 0.0, 2.0, 3 << 20]],
    });
    let mut board = filled();
    let step = Event::step("align", "grpo", 1).with("offload", moves);
    board.take(&step.with("offload_exposed_share", 0.05));
    assert_eq!(board.curves["offload_exposed_share"], [(1, 0.05)]);
    let text = board.to_string();
    assert!(text.contains("moves 3.0 MiB in and 0.0 MiB out: 75 % beside"), "{text}");
    assert!(text.contains("waits 5.0 % of its time"), "{text}");
    board.take(&Event::step("align", "grpo", 2).with("offload", serde_json::Value::Null));
    assert!(board.offload.is_none() && !board.to_string().contains("a step moves"));
}

#[test]
fn what_the_last_switch_moved_stays_told() {
    let switch = serde_json::json!({
        "moved_bytes": 3 << 20, "least_bytes": 2 << 20, "seconds": 0.5, "cpu_seconds": 0.01,
        "cpu_seconds_per_byte": 3.25e-9,
    });
    let mut board = filled();
    board.take(&Event::step("align", "grpo", 1).with("switch", switch));
    // Nothing is switched in a stage's last step.
    board.take(&Event::step("align", "grpo", 2).with("switch", serde_json::Value::Null));
    let told = "the last switch moved 3.0 MiB of at least 2.0 MiB, 3.25 ns of CPU a byte";
    assert!(board.to_string().contains(told), "{board}");
}

#[test]
fn a_note_is_told_to_its_end() {
    let mut board = filled();
    let note = "those ranks wait while the others train; set stage.align.max_staleness = 1 to have both at once";
    board.take(&Event::new("note").with("text", note));
    let text = board.to_string();
    let told = text.lines().rev().take(2).map(str::trim).collect::<Vec<_>>();
    assert_eq!(format!("{} {}", told[1], told[0]), note, "{text}");
}

#[test]
fn the_text_is_ascii_of_at_most_eighty_columns_whatever_a_model_says() {
    let mut board = filled();
    let long = "x\u{1b}]52;c;\u{202e}é".repeat(40);
    board.run = long.clone();
    board.reason = Some(long.clone());
    board.phase = "generate".to_string();
    board.commit = Some(long.clone());
    board.notes.push(long.clone());
    board.memory.insert(long.clone(), u64::MAX / 2);
    board.curves.insert(long.clone(), (0..500).map(|i| (i, f64::from(i as u32).sin())).collect());
    board.curves.insert("flat".to_string(), vec![(1, 2.0), (2, 2.0), (3, f64::NAN)]);
    board.stages[0].name = long.clone();
    let wait = WaitRow { actor: long.clone(), message: long.clone(), seconds: 1e9 };
    board.actors.push(ActorRow {
        name: long.clone(),
        state: long.clone(),
        last_message: Some(long.clone()),
        waits: vec![wait],
        reason: Some(long.clone()),
        handled: u64::MAX,
        ..ActorRow::default()
    });
    board.evals.push(EvalRow {
        name: long.clone(),
        stage: long,
        metric: "perplexity".to_string(),
        ..EvalRow::default()
    });
    let text = board.to_string();
    for line in text.lines() {
        assert!(line.len() <= 80, "{} columns: {line}", line.len());
        assert!(line.bytes().all(|b| (b' '..=b'~').contains(&b)), "{line:?}");
    }
    assert!(text.contains("held-out") && text.contains("waits for"), "{text}");
}

#[test]
fn the_board_does_not_grow_with_the_run() {
    let mut board = Board::default();
    for step in 1..=5000 {
        board.take(&Event::step("a", "sft", step).with("loss", 1.0));
        board.take(&Event::eval("a", "sft", step, "e", "rate", 0.5, 1));
        board.take(&Event::new("note").with("text", "x"));
    }
    assert_eq!(
        (board.curves["loss"].len(), board.evals.len(), board.notes.len()),
        (CURVE_POINTS, EVALS, NOTES)
    );
    assert_eq!(board.curves["loss"].last(), Some(&(5000, 1.0)));
}

#[test]
fn the_file_is_written_at_most_every_quarter_second() {
    let run = tempfile::tempdir().expect("a temporary folder");
    let mut writer = BoardWriter::new(run.path());
    let start = Instant::now();
    let offered: Vec<bool> = [0, 100, 249, 250, 300, 600]
        .map(|ms| writer.offer(&filled(), start + Duration::from_millis(ms)).expect("written"))
        .to_vec();
    assert_eq!(offered, [true, false, false, true, false, true]);
    assert_eq!(
        std::fs::read_dir(run.path()).expect("a folder").count(),
        1,
        "nothing is left aside"
    );
}

#[test]
fn a_run_whose_process_is_gone_or_holds_no_lock_is_lost() {
    let run = tempfile::tempdir().expect("a temporary folder");
    let writer = BoardWriter::new(run.path());
    let lock = File::create(run.path().join(LOCK_FILE)).expect("a lock");
    let mut board = Board { pid: std::process::id(), ..filled() };
    writer.write(&board).expect("written");
    assert_eq!(
        Board::read(run.path()).expect("a board").state,
        RunState::Lost,
        "nobody holds the lock"
    );
    flock(&lock, FlockOperation::NonBlockingLockExclusive).expect("the lock is free again");
    assert_eq!(Board::read(run.path()).expect("a board"), board);
    // No process has a number this large (the kernel's limit is 2^22).
    board.pid = 1 << 30;
    writer.write(&board).expect("written");
    let record =
        serde_json::json!({"resume": {"directory": "/", "words": ["rehearsal", "run", "a b"]}});
    std::fs::write(run.path().join("run.json"), record.to_string()).expect("a record");
    let found = Board::read(run.path()).expect("a board");
    assert_eq!(found.state, RunState::Lost);
    assert_eq!(found.resume.as_deref(), Some("cd / && rehearsal run 'a b'"));
    assert!(found.to_string().contains("\n  go on with: cd / && rehearsal run 'a b'\n"), "{found}");
    assert!(found.stages.iter().all(|row| row.state != StageState::Running));
    board.state = RunState::Finished;
    writer.write(&board).expect("written");
    assert_eq!(Board::read(run.path()).expect("a board").state, RunState::Finished);
}

#[test]
fn a_process_of_another_host_lives_for_as_long_as_it_writes() {
    let run = tempfile::tempdir().expect("a temporary folder");
    // A process of this number is here, too, and nobody holds a lock.
    let board = Board { pid: std::process::id(), host: "node-3".to_string(), ..filled() };
    BoardWriter::new(run.path()).write(&board).expect("written");
    let number = std::process::id();
    let found = Board::read(run.path()).expect("a board");
    assert_eq!(found, board);
    assert!(found.to_string().contains(&format!("process {number} on node-3\n")), "{found}");
    let file = File::options().append(true).open(run.path().join(BOARD_FILE)).expect("the board");
    let hour = Duration::from_secs(3600);
    file.set_modified(std::time::SystemTime::now() - hour).expect("another time");
    let found = Board::read(run.path()).expect("a board");
    assert_eq!(found.state, RunState::Lost);
    let told = format!("its process {number} on node-3 is gone without a word");
    assert_eq!(found.reason.as_deref(), Some(&*told));
    file.set_modified(std::time::SystemTime::now() + hour).expect("another time");
    assert_eq!(Board::read(run.path()).expect("a board").state, RunState::Running);
}

#[test]
fn without_a_board_the_journal_tells_what_it_can() {
    let run = tempfile::tempdir().expect("a temporary folder");
    let lines: Vec<String> =
        events().iter().map(|e| serde_json::to_string(e).expect("JSON")).collect();
    std::fs::write(run.path().join(JOURNAL_FILE), lines.join("\n") + "\n").expect("a journal");
    std::fs::write(run.path().join(BOARD_FILE), "{\"run\":").expect("half a board");
    let board = Board::read(run.path()).expect("a board");
    assert_eq!(
        (board.state, board.pid, board.started, board.updated),
        (RunState::Lost, 0, 100.0, 106.0)
    );
    assert_eq!(
        (board.stages.len(), board.curves, board.evals),
        (filled().stages.len(), filled().curves, filled().evals)
    );
}

#[test]
fn a_folder_that_is_no_run_is_refused() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let error = Board::read(folder.path()).expect_err("no run");
    assert!(matches!(error.downcast_ref(), Some(Fault::User(_))), "{error:#}");
}

#[test]
fn a_stopped_run_has_no_running_stage_and_names_the_whole_command() {
    let mut board = filled();
    board.take(&Event::new("stage-start").of_stage("align", "grpo"));
    assert!(board.running().is_some());
    let long =
        "/a/place/with/a/name/that/is/longer/than/any/line/of/a/terminal/could/ever/be/runs/demo";
    board.take(&Event::new("end").with("state", "stopped").with("reason", "SIGINT"));
    board.resume = Some(format!("rehearsal run a.toml --out {long} --resume"));
    assert!(board.running().is_none());
    assert!(board.stages.iter().any(|row| row.state == StageState::Stopped));
    let text = board.to_string();
    assert!(
        text.contains(&format!("go on with: rehearsal run a.toml --out {long} --resume\n")),
        "{text}"
    );
    assert!(text.contains("  SIGINT\n"), "{text}");
}

/// Every kind of remark, and how it reads.
fn remarks() -> Vec<(Event, &'static str)> {
    let of = |name: &str| Event::new(name).with("actor", "worker").with("reason", "a panic");
    vec![
        (of("restart"), "worker restarted: a panic"),
        (of("silent"), "worker does not answer: a panic"),
        (of("rejected").with("folder", "c/1"), "c/1 checkpoint rejected: a panic"),
        (
            of("refused").with("message", "Train"),
            "worker refused Train, which came too late: a panic",
        ),
        (
            of("inject").with("message", "Train"),
            "worker was given a fault in Train, as a test wants",
        ),
        (of("rollback"), "going back to the last commit: a panic"),
        (
            Event::new("skipped").of_stage("sft", "sft").with("step", 7).with("in_a_row", 2),
            "sft step 7 skipped: no finite loss or gradient, 2 in a row",
        ),
    ]
}

#[test]
fn remarks_become_notes_of_one_line() {
    let mut board = filled();
    remarks().iter().for_each(|(event, _)| board.take(event));
    let expected: Vec<&str> = remarks().iter().map(|(_, text)| *text).collect();
    assert_eq!(board.notes, expected);
    let text = board.to_string();
    assert!(expected.iter().all(|note| text.contains(&format!("  {note}\n"))), "{text}");
}
