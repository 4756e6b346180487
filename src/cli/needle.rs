//! `rehearsal eval --verifier needle`: what a model finds in haystacks of several lengths, at several depths.
//!
//! The haystacks are made in tokens of the model's own tokenizer, and the model answers greedily through the sampler.
//!
//! Invariants:
//!   * a haystack, its question and the room for the reply have the asked length together, to the token
//!   * the haystacks of a cell depend on the seed, the cell's length and its depth alone

use super::eval::EvalArgs;
use super::generate::at_least_one;
use super::open_model::{Ask, OpenModel};
use super::output::{say, say_json};
use crate::config::Fault;
use crate::console::HeatMap;
use crate::data::needle::{NAMES, Needle, THINGS, haystack};
use crate::data::tokenizer::Tokenizer;
use anyhow::Result;
use clap::Args;
use rehearsal_kernels::random::{Draws, Stream};
use serde::Serialize;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Columns of the table that 80 characters hold.
const MOST_DEPTHS: usize = 11;

/// Depths without `--depths`, in percent.
const DEPTHS: [usize; 5] = [0, 25, 50, 75, 100];

/// Haystacks of a cell without `--needles`.
const NEEDLES: usize = 10;

/// What only `--verifier needle` takes.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "With --verifier needle")]
pub struct NeedleArgs {
    /// Lengths in tokens, the reply counted; an eighth, a quarter, a half and all of the context if absent
    #[arg(long, value_name = "N,N", value_delimiter = ',', value_parser = at_least_one)]
    pub lengths: Vec<usize>,
    /// Depths in percent, at most 11 of them; 0,25,50,75,100 if absent
    #[arg(long, value_name = "P,P", value_delimiter = ',', value_parser = percent)]
    pub depths: Vec<usize>,
    /// Haystacks of each length and depth; 10 if absent
    #[arg(long, value_name = "K", value_parser = at_least_one)]
    pub needles: Option<usize>,
    /// Draw the grid
    #[arg(long, value_name = "FILE.svg")]
    pub picture: Option<PathBuf>,
}

fn percent(text: &str) -> Result<usize, String> {
    let number = text.parse().ok().filter(|number| *number <= 100);
    number.ok_or_else(|| "expected whole numbers from 0 to 100".to_string())
}

impl NeedleArgs {
    /// An option that was given, if one was.
    pub fn given(&self) -> Option<&'static str> {
        let options = [
            ("--lengths", !self.lengths.is_empty()),
            ("--depths", !self.depths.is_empty()),
            ("--needles", self.needles.is_some()),
            ("--picture", self.picture.is_some()),
        ];
        options.into_iter().find(|(_, given)| *given).map(|(name, _)| name)
    }
}

/// What was found. Stable keys of `--json`.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct Found {
    /// Of all needles.
    found: f64,
    haystacks: usize,
    /// Of a cell.
    needles: usize,
    seed: u64,
    /// The model's positions.
    context: usize,
    lengths: Vec<usize>,
    /// In percent.
    depths: Vec<usize>,
    by_length: Vec<f64>,
    /// `shares[length][depth]`.
    shares: Vec<Vec<f64>>,
}

/// Measures.
pub fn run(args: &EvalArgs) -> Result<()> {
    check(args)?;
    let mut model =
        OpenModel::open_extended(&args.checkpoint, args.threads.count(), args.extension)?;
    args.formats.apply(&mut model.engine)?;
    let tokenizer = Arc::clone(&model.tokenizer);
    let wordings = Wordings::of(&tokenizer)
        .map_err(|why| Fault::user(format!("{}: {why}", args.checkpoint.display())))?;
    let grid = Grid::of(args, &wordings, model.config.max_position_embeddings)?;
    let found = grid.measure(&mut model, &wordings)?;
    if let Some(path) = &args.needle.picture {
        found.picture().write(path)?;
    }
    if args.json { say_json(&found) } else { say(&found.table()) }
}

/// Refuses what needle does not take, before the model is read.
fn check(args: &EvalArgs) -> Result<()> {
    let refused = |what: &str| Err(Fault::user(format!("--verifier needle {what}")));
    if args.data.is_some() {
        return refused("makes its own haystacks and takes no --data; leave it out");
    }
    if args.samples != 1 || args.chat {
        return refused("takes one greedy reply to a plain text; leave out --samples and --chat");
    }
    if args.needle.depths.len() > MOST_DEPTHS {
        let given = args.needle.depths.len();
        return refused(&format!("takes at most {MOST_DEPTHS} depths, and --depths has {given}"));
    }
    let folder = args.needle.picture.as_deref().and_then(Path::parent);
    match folder.filter(|folder| !folder.as_os_str().is_empty() && !folder.is_dir()) {
        Some(folder) => Err(Fault::user(format!(
            "--picture: there is no folder {}; make it first",
            folder.display()
        ))),
        None => Ok(()),
    }
}

/// The sizes of the task's words in a model's tokens.
struct Wordings<'a> {
    tokenizer: &'a Tokenizer,
    /// Tokens that are kept free for a reply: the longest answer, and what shows that it ends there.
    reply: usize,
    /// The least length that holds every needle.
    least: usize,
}

impl Wordings<'_> {
    fn of(tokenizer: &Tokenizer) -> Result<Wordings<'_>, String> {
        let size = |text: &str| tokenizer.encode_content(text).len();
        let (mut fact, mut question, mut answer) = (0, 0, 0);
        for (name, thing) in NAMES.iter().flat_map(|name| THINGS.map(|thing| (*name, thing))) {
            let needle = Needle { name, thing };
            for text in [needle.fact(), needle.question(), needle.answer()] {
                let back = tokenizer.decode(&tokenizer.encode_content(&text));
                if back != text {
                    return Err(format!(
                        "the tokenizer gives {back:?} back for {text:?}, so that no answer could be compared"
                    ));
                }
            }
            fact = fact.max(size(&needle.fact()));
            question = question.max(size(&needle.question()));
            answer = answer.max(size(&needle.answer()));
        }
        let (reply, bos) = (answer + 1, usize::from(tokenizer.added_bos().is_some()));
        Ok(Wordings { tokenizer, reply, least: bos + fact + question + reply })
    }

    /// The prompt of one haystack.
    fn prompt(&self, needle: Needle, length: usize, depth: usize, draws: &mut Draws) -> Vec<u32> {
        let bos = self.tokenizer.added_bos();
        let room = length - self.reply - usize::from(bos.is_some());
        let units = |text: &str| self.tokenizer.encode_content(text);
        let stack = haystack(&units, &[needle], room, depth as f64 / 100.0, draws)
            .expect("a grid's lengths hold every needle");
        bos.into_iter().chain(stack.units).collect()
    }
}

/// What is measured.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Grid {
    lengths: Vec<usize>,
    depths: Vec<usize>,
    needles: usize,
    seed: u64,
    context: usize,
}

impl Grid {
    fn of(args: &EvalArgs, wordings: &Wordings<'_>, context: usize) -> Result<Grid> {
        let given = &args.needle;
        let rising = |mut numbers: Vec<usize>| {
            numbers.sort_unstable();
            numbers.dedup();
            numbers
        };
        let lengths = match given.lengths.is_empty() {
            false => rising(given.lengths.clone()),
            true => default_lengths(context, wordings.least),
        };
        let (Some(shortest), Some(longest)) = (lengths.first(), lengths.last()) else {
            return Err(Fault::user(format!(
                "the model's context of {context} tokens holds no needle: the shortest haystack takes {}",
                wordings.least
            )));
        };
        if *shortest < wordings.least {
            return Err(Fault::user(format!(
                "--lengths: {shortest} tokens hold no needle; a fact, its question and the reply take {} of this model's",
                wordings.least
            )));
        }
        if *longest > context {
            return Err(Fault::user(format!(
                "--lengths: {longest} tokens are more than the model's context of {context}; give it more with --extend-to \
                 {longest}, or measure shorter ones"
            )));
        }
        let depths = if given.depths.is_empty() { DEPTHS.to_vec() } else { given.depths.clone() };
        let needles = given.needles.unwrap_or(NEEDLES);
        Ok(Grid { lengths, depths: rising(depths), needles, seed: args.seed, context })
    }

    fn cells(&self) -> impl Iterator<Item = (usize, usize)> {
        let depths = 0..self.depths.len();
        (0..self.lengths.len()).flat_map(move |length| depths.clone().map(move |d| (length, d)))
    }

    /// The needles of a cell with their prompts.
    fn haystacks(&self, cell: (usize, usize), wordings: &Wordings<'_>) -> Vec<(Needle, Vec<u32>)> {
        let (length, depth) = (self.lengths[cell.0], self.depths[cell.1]);
        let make = |index: usize| {
            let key = [length as u64, depth as u64, index as u64];
            let draws = &mut Draws::new(self.seed, Stream::Data, key);
            let needle = Needle::draw(1, draws)[0];
            (needle, wordings.prompt(needle, length, depth, draws))
        };
        (0..self.needles).map(make).collect()
    }

    fn measure(&self, model: &mut OpenModel, wordings: &Wordings<'_>) -> Result<Found> {
        let asked: Vec<(Needle, Vec<u32>)> =
            self.cells().flat_map(|cell| self.haystacks(cell, wordings)).collect();
        let (needles, prompts): (Vec<Needle>, Vec<Vec<u32>>) = asked.into_iter().unzip();
        let ask = Ask { max_tokens: wordings.reply, temperature: 0.0, top_p: 1.0, seed: self.seed };
        let (groups, _) = model.answer(&prompts, 1, &ask)?;
        let right: Vec<bool> = needles
            .iter()
            .zip(&groups)
            .map(|(needle, group)| needle.is_found(&group.rollouts[0].text))
            .collect();
        Ok(self.found(&right))
    }

    /// The shares of what was found, in the order of the cells.
    fn found(&self, right: &[bool]) -> Found {
        let share = |right: &[bool]| {
            right.iter().filter(|found| **found).count() as f64 / right.len() as f64
        };
        let lines = right.chunks(self.depths.len() * self.needles);
        Found {
            found: share(right),
            haystacks: right.len(),
            needles: self.needles,
            seed: self.seed,
            context: self.context,
            lengths: self.lengths.clone(),
            depths: self.depths.clone(),
            by_length: lines.clone().map(share).collect(),
            shares: lines.map(|line| line.chunks(self.needles).map(share).collect()).collect(),
        }
    }
}

/// From an eighth of the context to all of it, without what is too short.
fn default_lengths(context: usize, least: usize) -> Vec<usize> {
    let mut lengths: Vec<usize> = [8, 4, 2, 1].map(|part| context / part).to_vec();
    lengths.retain(|length| *length >= least);
    lengths.dedup();
    lengths
}

impl Found {
    /// At most 80 characters wide.
    fn table(&self) -> String {
        let mut out = String::from("found, in %, by tokens (down) and depth in % (across)\n");
        let line = |out: &mut String, name: &str, figures: Vec<String>| {
            let figures: String = figures.iter().map(|figure| format!("{figure:>6}")).collect();
            writeln!(out, "{name:>8}{figures}").expect("a string takes every write");
        };
        let percent = |share: &f64| format!("{:.1}", 100.0 * share);
        let head = self.depths.iter().map(usize::to_string).chain(["all".to_string()]);
        line(&mut out, "tokens", head.collect());
        for ((length, shares), all) in self.lengths.iter().zip(&self.shares).zip(&self.by_length) {
            let figures = shares.iter().chain([all]).map(percent).collect();
            line(&mut out, &length.to_string(), figures);
        }
        let Found { found, haystacks, needles, .. } = self;
        write!(out, "found {:.1} % of {haystacks} needles, {needles} a cell", 100.0 * found)
            .expect("a string takes every write");
        out
    }

    fn picture(&self) -> HeatMap {
        let column = |depth: usize| self.shares.iter().map(|line| line[depth]).collect();
        HeatMap {
            title: format!(
                "Needles found in haystacks: {:.1} % of {}",
                100.0 * self.found,
                self.haystacks
            ),
            x_label: "length of the haystack in tokens".to_string(),
            y_label: "depth of the needle".to_string(),
            columns: self.lengths.iter().map(usize::to_string).collect(),
            rows: self.depths.iter().map(|depth| format!("{depth} %")).collect(),
            cells: (0..self.depths.len()).map(column).collect(),
        }
    }
}

#[cfg(test)]
mod tests;
