//! Tests of the grid: its lengths, its haystacks in tokens, its shares, table and picture.

use super::*;
use crate::cli::Cli;
use crate::cli::command::Command;
use crate::config::TokenizerConfig;
use clap::Parser;

fn args(line: &str) -> EvalArgs {
    let line = format!("rehearsal eval m --verifier needle {line}");
    match Cli::try_parse_from(line.split_whitespace()).unwrap().command {
        Command::Eval(args) => args,
        other => panic!("{other:?}"),
    }
}

/// A tokenizer that knows no word of the task: bytes.
fn bytes() -> Tokenizer {
    let settings = TokenizerConfig { vocab_size: Some(261), ..TokenizerConfig::default() };
    Tokenizer::train(&settings, &["some text".to_string()]).unwrap()
}

fn refused(line: &str, wordings: &Wordings<'_>, context: usize) -> String {
    Grid::of(&args(line), wordings, context).unwrap_err().to_string()
}

#[test]
fn lengths_come_from_the_context_unless_they_are_given() {
    let tokenizer = bytes();
    let wordings = Wordings::of(&tokenizer).unwrap();
    let grid = |line: &str, context| Grid::of(&args(line), &wordings, context).unwrap();
    let all = grid("", 1024);
    assert_eq!(all.lengths, [128, 256, 512, 1024]);
    assert_eq!((all.depths, all.needles), (vec![0, 25, 50, 75, 100], 10));
    assert_eq!(grid("", 100).lengths, [100], "shorter ones hold no needle");
    let given = grid("--lengths 300,80,300 --depths 100,0 --needles 3", 300);
    assert_eq!((given.lengths, given.depths, given.needles), (vec![80, 300], vec![0, 100], 3));
}

#[test]
fn lengths_that_cannot_be_measured_are_refused_with_the_way_out() {
    let tokenizer = bytes();
    let wordings = Wordings::of(&tokenizer).unwrap();
    assert_eq!(
        wordings.least,
        " Cora hid the candle.".len() + " What did Cora hide? The".len() + " candle".len() + 1
    );
    let told = refused("--lengths 12,64", &wordings, 1024);
    assert!(told.contains("12 tokens hold no needle") && told.contains("take 53"), "{told}");
    let told = refused("--lengths 64,2048", &wordings, 1024);
    assert!(told.contains("2048 tokens are more than the model's context of 1024"), "{told}");
    assert!(told.contains("--extend-to 2048"), "{told}");
    let told = refused("", &wordings, 40);
    assert!(told.contains("context of 40 tokens holds no needle"), "{told}");
}

#[test]
fn what_needle_does_not_take_is_refused_before_the_model_is_read() {
    let told = |line: &str| check(&args(line)).unwrap_err().to_string();
    assert!(told("--data f").contains("takes no --data"));
    assert!(told("--samples 2").contains("leave out --samples"));
    assert!(told("--chat").contains("--chat"));
    assert!(told("--depths 0,1,2,3,4,5,6,7,8,9,10,11").contains("at most 11 depths"));
    assert!(told("--picture /nowhere/at/all.svg").contains("there is no folder /nowhere/at"));
    assert!(check(&args("--picture here.svg --depths 0,10,20,30,40,50,60,70,80,90,100")).is_ok());
}

#[test]
fn a_prompt_and_its_reply_have_the_length_to_the_token_and_the_fact_its_depth() {
    let tokenizer = bytes();
    let wordings = Wordings::of(&tokenizer).unwrap();
    let grid = Grid::of(&args("--lengths 60,200,777 --needles 4"), &wordings, 1024).unwrap();
    for cell in grid.cells() {
        for (needle, prompt) in grid.haystacks(cell, &wordings) {
            assert_eq!(prompt.len() + " candle".len() + 1, grid.lengths[cell.0]);
            let text = tokenizer.decode(&prompt);
            assert_eq!(tokenizer.encode_text(&text), prompt, "as the whole text is encoded");
            assert_eq!(text.matches(" hid the ").count(), 1);
            assert!(text.ends_with(&needle.question()), "{text}");
            let hay = prompt.len() - needle.fact().len() - needle.question().len();
            let wanted = hay as f64 * grid.depths[cell.1] as f64 / 100.0;
            let at = text.find(&needle.fact()).unwrap() as f64;
            assert!((at - wanted).abs() <= 13.0, "{at} and not {wanted} in {text}");
        }
    }
}

#[test]
fn a_cell_is_the_same_in_every_grid_and_another_under_another_seed() {
    let tokenizer = bytes();
    let wordings = Wordings::of(&tokenizer).unwrap();
    let cell = |line: &str, cell| {
        Grid::of(&args(line), &wordings, 1024).unwrap().haystacks(cell, &wordings)
    };
    let alone = cell("--lengths 200 --depths 50 --needles 2", (0, 0));
    let among = cell("--lengths 100,200 --depths 0,50 --needles 5", (1, 1));
    assert_eq!(alone[..], among[..2]);
    assert_ne!(alone, cell("--lengths 200 --depths 50 --needles 2 --seed 2", (0, 0)));
}

fn found(lengths: &str, depths: &str, right: impl Fn(usize) -> bool) -> Found {
    let tokenizer = bytes();
    let line = format!("--lengths {lengths} --depths {depths} --needles 4");
    let grid = Grid::of(&args(&line), &Wordings::of(&tokenizer).unwrap(), 1 << 20).unwrap();
    let haystacks = grid.cells().count() * 4;
    grid.found(&(0..haystacks).map(right).collect::<Vec<_>>())
}

#[test]
fn shares_are_those_of_their_cells() {
    let found = found("100,200", "0,50,100", |index| index < 12 || index % 4 <= (index - 12) / 4);
    assert_eq!(found.shares, [[1.0, 1.0, 1.0], [0.25, 0.5, 0.75]]);
    assert_eq!((found.by_length.clone(), found.found, found.haystacks), (vec![1.0, 0.5], 0.75, 24));
    let picture = found.picture();
    assert_eq!(picture.cells, [[1.0, 0.25], [1.0, 0.5], [1.0, 0.75]], "lengths go across");
    assert_eq!(
        (picture.columns, picture.rows),
        (
            vec!["100".to_string(), "200".to_string()],
            vec!["0 %".to_string(), "50 %".to_string(), "100 %".to_string()]
        )
    );
}

#[test]
fn the_table_fits_a_terminal_and_ends_with_the_summary() {
    let depths = "0,10,20,30,40,50,60,70,80,90,100";
    let table = found("100,1048576", depths, |index| index != 0).table();
    assert!(table.lines().all(|line| line.len() <= 80 && line.is_ascii()), "{table}");
    let lines: Vec<&str> = table.lines().collect();
    assert!(
        lines[1].starts_with("  tokens     0    10") && lines[1].ends_with("   100   all"),
        "{table}"
    );
    assert!(
        lines[2].starts_with("     100  75.0 100.0") && lines[2].ends_with(" 100.0  97.7"),
        "{table}"
    );
    assert!(lines[3].starts_with(" 1048576 100.0"), "{table}");
    assert_eq!(*lines.last().unwrap(), "found 98.9 % of 88 needles, 4 a cell");
}

#[test]
fn the_keys_of_json_are_stable() {
    let value = serde_json::to_value(found("100", "0", |_| true)).unwrap();
    let keys: Vec<&String> = value.as_object().unwrap().keys().collect();
    let wanted = [
        "found",
        "haystacks",
        "needles",
        "seed",
        "context",
        "lengths",
        "depths",
        "by_length",
        "shares",
    ];
    assert_eq!(keys, wanted);
}
