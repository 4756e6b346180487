//! Which rows go through the model next: admission, prefill, decoding, retirement.
//!
//! Plans are data; `generate` executes them. Requests are admitted in their order. A prompt goes
//! through the model once; its rollouts share its pages and copy the partly filled last one before
//! they write to it.
//!
//! Nothing is ever evicted. A page is given away only if afterwards every running rollout can still
//! reach its longest reply in some order, and the largest unstarted one after them (the banker's
//! rule, `is_safe`); who gets no page waits a step. Rollouts do not depend on any of this.
//!
//! Invariants:
//!   * after every plan `is_safe` holds: some sequence can always run
//!   * at the end no page is held

use super::generate::Limits;
use super::job::{GenerateJob, TokenGroup};
use super::pages::{PageTable, Write};
use super::sampler::{draw, ending, new_tokens_limit};
use super::sequence::{PromptGroup, Sequence};
use crate::config::fault::Fault;
use crate::model::cache::DecodeRows;
use crate::rl::rollout::Stop;
use anyhow::Result;
use rehearsal_kernels::{SampleRow, Sampled};
use std::collections::{BTreeMap, VecDeque};

/// Prompt rows that go through the model at once, and tokens from one cut of a prompt to the next.
pub const PREFILL_ROWS: usize = 512;

/// Tokens, or pages, that a sequence's lists have room for from the start.
const RESERVED: usize = 512;

/// The first `tokens` entries of a page, to be copied before the rows run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageCopy {
    /// Page that others still hold.
    pub from: u32,
    /// The writer's new page.
    pub to: u32,
    /// Entries to copy.
    pub tokens: usize,
}

/// One forward pass.
#[derive(Debug, Default)]
pub struct Plan {
    /// Copies that come first.
    pub copies: Vec<PageCopy>,
    /// The rows.
    pub rows: DecodeRows,
    /// How each wanted row is sampled.
    pub sampling: Vec<SampleRow>,
    /// Cached tokens that the rows of rollouts see, their own included and what is shared counted once.
    pub cached_tokens: u64,
    drawn: Vec<Drawn>,
}

impl Plan {
    /// Takes everything out; the lists keep their memory.
    fn clear(&mut self) {
        self.copies.clear();
        self.rows.clear();
        self.sampling.clear();
        self.cached_tokens = 0;
        self.drawn.clear();
    }
}

/// What a sampled token is.
#[derive(Clone, Copy, Debug)]
enum Drawn {
    /// The first token of a reply.
    First { request: usize, sample: u32 },
    /// The next token of a running sequence, by its place in the list.
    Next { place: usize },
}

/// The state of a generation between forward passes.
pub struct Scheduler<'a> {
    job: &'a GenerateJob,
    limits: &'a Limits,
    pages: PageTable,
    waiting: VecDeque<usize>,
    /// Admitted groups by index of request.
    groups: BTreeMap<usize, PromptGroup>,
    /// Rollouts with a first token and no pages yet.
    ready: VecDeque<Sequence>,
    running: Vec<Sequence>,
    /// Claims of the running sequences, when they are asked for; and of each request, whether the pass has a row of it.
    claims: Vec<Claim>,
    seen: Vec<bool>,
}

impl<'a> Scheduler<'a> {
    /// Checks that every request can be served, before anything runs.
    pub fn new(job: &'a GenerateJob, limits: &'a Limits) -> Result<Scheduler<'a>> {
        assert!(
            limits.decode_batch > 0 && limits.page_tokens > 0,
            "the config's checks keep these above 0"
        );
        let pages = PageTable::new(limits.page_count);
        let waiting = (0..job.requests.len()).collect();
        let scheduler = Scheduler {
            job,
            limits,
            pages,
            waiting,
            groups: BTreeMap::new(),
            ready: VecDeque::new(),
            running: Vec::new(),
            claims: Vec::new(),
            seen: vec![false; job.requests.len()],
        };
        scheduler.check()?;
        Ok(scheduler)
    }

    /// True if every group was handed out.
    pub fn is_done(&self) -> bool {
        self.waiting.is_empty() && self.groups.is_empty()
    }

    /// The page table, for its counts.
    pub fn pages(&self) -> &PageTable {
        &self.pages
    }

    /// Admits waiting requests while the batch has room for their rollouts and the cache for their
    /// prompts.
    pub fn admit(&mut self) {
        while let Some(request) = self.waiting.front().copied() {
            let unstarted: usize = self.groups.values().map(|group| group.unstarted).sum();
            let (prompt_pages, growth) = (self.prompt_pages(request), self.growth(request));
            let has_room = self.running.len() + unstarted < self.limits.decode_batch
                && prompt_pages <= self.pages.free()
                && {
                    let growth = growth.max(self.largest_unstarted());
                    self.list_claims();
                    is_safe(self.pages.free() - prompt_pages, &mut self.claims, growth)
                };
            if !has_room {
                break;
            }
            self.waiting.pop_front();
            let pages =
                (0..prompt_pages).map(|_| self.pages.alloc().expect("counted above")).collect();
            let samples = self.job.requests[request].samples as usize;
            let rollouts = vec![None; samples];
            self.groups.insert(
                request,
                PromptGroup { pages, prefilled: 0, unstarted: samples, growth, rollouts },
            );
        }
    }

    /// Plans the next rows of admitted prompts; false if all are in the cache. A prompt is cut at multiples of
    /// PREFILL_ROWS and nowhere else, whatever shares the pass. Its last row is wanted once per sample: each
    /// draws its first token there.
    pub fn prefill(&mut self, plan: &mut Plan) -> bool {
        plan.clear();
        for (request, group) in &mut self.groups {
            let asked = &self.job.requests[*request];
            let end = asked.tokens.len().min(group.prefilled + PREFILL_ROWS);
            if group.prefilled == end || plan.rows.len() + end - group.prefilled > PREFILL_ROWS {
                continue;
            }
            plan.rows.begin(&group.pages[..end.div_ceil(self.limits.page_tokens)]);
            for position in group.prefilled..end {
                plan.rows.push(asked.tokens[position], position, self.limits.page_tokens);
            }
            group.prefilled = end;
            if end == asked.tokens.len() {
                for sample in 0..asked.samples {
                    plan.rows.want_last();
                    plan.sampling.push(draw(self.job, asked.prompt, sample, 0));
                    plan.drawn.push(Drawn::First { request: *request, sample });
                }
            }
        }
        !plan.rows.is_empty()
    }

    /// Plans one row per running rollout that has a page for it.
    pub fn decode(&mut self, plan: &mut Plan) {
        plan.clear();
        while self.running.len() < self.limits.decode_batch
            && let Some(sequence) = self.ready.pop_front()
        {
            self.start(sequence);
        }
        self.seen.fill(false);
        for place in 0..self.running.len() {
            if !self.make_room(place, &mut plan.copies) {
                continue;
            }
            let sequence = &self.running[place];
            plan.rows.begin(&sequence.pages);
            plan.rows.push(sequence.last(), sequence.cached, self.limits.page_tokens);
            plan.rows.want_last();
            let shared = sequence.shared * self.limits.page_tokens;
            let seen = std::mem::replace(&mut self.seen[sequence.request], true);
            let unseen = sequence.cached + 1 - if seen { shared } else { 0 };
            plan.cached_tokens += unseen as u64;
            let prompt = self.job.requests[sequence.request].prompt;
            plan.sampling.push(draw(self.job, prompt, sequence.sample, sequence.tokens.len()));
            plan.drawn.push(Drawn::Next { place });
        }
        assert!(!plan.rows.is_empty(), "the banker's rule lets some sequence run");
    }

    /// Takes in the tokens drawn for a plan; returns the groups whose last rollout ended.
    pub fn record(&mut self, plan: &Plan, sampled: &[Sampled]) -> Vec<TokenGroup> {
        assert_eq!(plan.drawn.len(), sampled.len(), "one token per wanted row");
        for (drawn, sampled) in plan.drawn.iter().zip(sampled) {
            match *drawn {
                Drawn::First { request, sample } => self.record_first(request, sample, sampled),
                Drawn::Next { place } => {
                    self.running[place].push(sampled);
                    self.running[place].cached += 1;
                }
            }
        }
        let mut place = 0;
        while let Some(sequence) = self.running.get(place) {
            match ending(self.job, sequence.limit, sequence.last(), sequence.tokens.len()) {
                Some(stop) => {
                    let sequence = self.running.remove(place);
                    self.retire(sequence, stop);
                }
                None => place += 1,
            }
        }
        let mut complete = Vec::new();
        self.groups.retain(|request, group| {
            let rollouts = group.complete();
            let slot = self.job.requests[*request].slot;
            let policy_version = self.job.policy_version;
            let is_open = rollouts.is_none();
            complete.extend(rollouts.map(|rollouts| TokenGroup { slot, rollouts, policy_version }));
            is_open
        });
        complete
    }

    fn record_first(&mut self, request: usize, sample: u32, sampled: &Sampled) {
        let prompt = self.job.requests[request].tokens.len();
        let limit = self.new_tokens(request);
        let mut sequence = Sequence {
            request,
            sample,
            tokens: Vec::with_capacity(limit.min(RESERVED)),
            logprobs: Vec::with_capacity(limit.min(RESERVED)),
            limit,
            pages: Vec::new(),
            cached: prompt,
            shared: prompt / self.limits.page_tokens,
            own: 0,
            most_pages: self.most_pages(request),
        };
        sequence.push(sampled);
        match ending(self.job, limit, sequence.last(), 1) {
            Some(stop) => {
                self.leave_prompt(request);
                self.retire(sequence, stop);
            }
            None => self.ready.push_back(sequence),
        }
    }

    fn retire(&mut self, sequence: Sequence, stop: Stop) {
        for page in &sequence.pages {
            self.pages.release(*page);
        }
        let group = self.groups.get_mut(&sequence.request).expect("a group outlives its rollouts");
        let place = sequence.sample as usize;
        group.rollouts[place] = Some(sequence.finish(stop));
    }

    /// Gives a ready rollout its prompt's pages. That takes no page and breaks no promise: room for
    /// the largest unstarted rollout is always kept.
    fn start(&mut self, mut sequence: Sequence) {
        sequence.pages.reserve(sequence.most_pages.min(RESERVED));
        sequence.pages.extend_from_slice(&self.groups[&sequence.request].pages);
        for page in &sequence.pages {
            self.pages.share(*page);
        }
        self.leave_prompt(sequence.request);
        self.running.push(sequence);
    }

    /// One rollout less waits for the prompt; the last one ends the group's own hold on its pages.
    fn leave_prompt(&mut self, request: usize) {
        let group = self.groups.get_mut(&request).expect("a group outlives its rollouts");
        group.unstarted -= 1;
        if group.unstarted == 0 {
            for page in group.pages.drain(..) {
                self.pages.release(page);
            }
        }
    }

    /// Sees to it that a running sequence may write its next entry; false if it has to wait a step.
    fn make_room(&mut self, place: usize, copies: &mut Vec<PageCopy>) -> bool {
        let sequence = &self.running[place];
        let index = sequence.cached / self.limits.page_tokens;
        let shared = sequence.pages.get(index).copied().filter(|_| sequence.own == 0);
        if index < sequence.pages.len()
            && shared.is_none_or(|page| self.pages.write(page) == Write::InPlace)
        {
            self.running[place].own = self.running[place].own.max(1);
            return true;
        }
        self.list_claims();
        self.claims[place].need -= 1;
        self.claims[place].own += 1;
        let last = self.largest_unstarted();
        if self.pages.free() == 0 || !is_safe(self.pages.free() - 1, &mut self.claims, last) {
            return false;
        }
        let to = self.pages.alloc().expect("counted above");
        let sequence = &mut self.running[place];
        sequence.own += 1;
        match shared {
            Some(from) => {
                copies.push(PageCopy {
                    from,
                    to,
                    tokens: sequence.cached % self.limits.page_tokens,
                });
                sequence.pages[index] = to;
                self.pages.release(from);
            }
            None => sequence.pages.push(to),
        }
        true
    }

    fn list_claims(&mut self) {
        let claim = |sequence: &Sequence| Claim { need: sequence.need(), own: sequence.own };
        self.claims.clear();
        self.claims.extend(self.running.iter().map(claim));
    }

    /// Pages that the most demanding rollout that has not started would take.
    fn largest_unstarted(&self) -> usize {
        let unstarted = self.groups.values().filter(|group| group.unstarted > 0);
        unstarted.map(|group| group.growth).max().unwrap_or(0)
    }

    fn new_tokens(&self, request: usize) -> usize {
        new_tokens_limit(self.job, self.limits.context, self.job.requests[request].tokens.len())
    }

    fn prompt_pages(&self, request: usize) -> usize {
        self.job.requests[request].tokens.len().div_ceil(self.limits.page_tokens)
    }

    /// Pages of a request's longest reply with its prompt. The last token never enters the cache.
    fn most_pages(&self, request: usize) -> usize {
        let tokens = self.job.requests[request].tokens.len() + self.new_tokens(request) - 1;
        tokens.div_ceil(self.limits.page_tokens)
    }

    /// Pages that one rollout takes at most while the group holds the prompt.
    fn growth(&self, request: usize) -> usize {
        let asked = &self.job.requests[request];
        if self.new_tokens(request) <= 1 {
            return 0;
        }
        let full = asked.tokens.len() / self.limits.page_tokens;
        let kept = if asked.samples == 1 { self.prompt_pages(request) } else { full };
        self.most_pages(request) - kept
    }

    fn check(&self) -> Result<()> {
        if self.job.max_new_tokens == 0 {
            return Err(Fault::user("0 new tokens are asked for; ask for at least 1"));
        }
        for (request, asked) in self.job.requests.iter().enumerate() {
            assert!(asked.samples > 0, "a request asks for at least one rollout");
            let (slot, tokens, context) = (asked.slot, asked.tokens.len(), self.limits.context);
            if tokens == 0 {
                return Err(Fault::user(format!(
                    "prompt {slot} has no token; write at least one character"
                )));
            }
            if tokens >= context {
                let text = format!(
                    "prompt {slot} has {tokens} tokens and the model's context is {context}"
                );
                return Err(Fault::user(format!("{text}; shorten it to at most {}", context - 1)));
            }
            let (needed, held) =
                (self.prompt_pages(request) + self.growth(request), self.limits.page_count);
            if needed > held {
                let text = format!(
                    "prompt {slot} needs {needed} cache pages for one rollout, the cache has {held}"
                );
                return Err(Fault::resources(format!(
                    "{text}; raise engine.budget or lower max_new_tokens"
                )));
            }
        }
        Ok(())
    }
}

/// What a running sequence may still take, and what it gives back at its end.
#[derive(Clone, Copy, Debug)]
struct Claim {
    need: usize,
    own: usize,
}

/// The banker's rule for one resource: true if all claims can be met one after another, each giving
/// back its own pages at its end, and `last` pages after that. The smallest need first is as good
/// as any order.
fn is_safe(free: usize, claims: &mut [Claim], last: usize) -> bool {
    claims.sort_unstable_by_key(|claim| claim.need);
    let mut free = free;
    for claim in claims {
        if claim.need > free {
            return false;
        }
        free += claim.own;
    }
    last <= free
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Tries every order.
    fn has_an_order(free: usize, claims: &[(usize, usize)], last: usize) -> bool {
        if claims.is_empty() {
            return last <= free;
        }
        (0..claims.len()).filter(|i| claims[*i].0 <= free).any(|i| {
            let mut rest = claims.to_vec();
            let (_, own) = rest.remove(i);
            has_an_order(free + own, &rest, last)
        })
    }

    proptest! {
        #![proptest_config(super::super::oracle::fixed(256))]
        #[test]
        fn the_bankers_rule_finds_an_order_if_there_is_one(
            free in 0usize..6, claims in prop::collection::vec((0usize..8, 0usize..4), 0..6), last in 0usize..12,
        ) {
            let asked = claims.iter().map(|(need, own)| Claim { need: *need, own: *own });
            let mut asked: Vec<Claim> = asked.collect();
            prop_assert_eq!(is_safe(free, &mut asked, last), has_an_order(free, &claims, last));
        }
    }
}
