//! The sampling loop with continuous batching: admit, run, sample, retire.
//!
//! Knows plans and tokens; the model is behind [`Forward`]. A group leaves the moment its last
//! rollout ends.
//!
//! Invariants:
//!   * no token is sampled from weights of another policy version than the job's
//!   * the rollouts depend on the job and the weights alone: not on batch, pages, order or threads

use super::job::{GenerateJob, GenerateReport, TokenGroup};
use super::scheduler::{Plan, Scheduler};
use crate::model::cache::DecodeRows;
use anyhow::{Result, ensure};
use rehearsal_kernels::{Activity, SampleRow, Sampled};
use std::time::Instant;

/// A model with its cache, as the sampler sees it.
pub trait Forward {
    /// Policy version of the packed weights.
    fn version(&self) -> u64;
    /// Says what the next passes are for, to who counts time.
    fn enter(&mut self, _activity: Activity) {}
    /// Whether there is another pass, for this rank or for one that shares its experts.
    fn go_on(&mut self, has_rows: bool) -> Result<bool> {
        Ok(has_rows)
    }
    /// Takes part in a pass of other ranks.
    fn stand_by(&mut self) -> Result<()> {
        Ok(())
    }
    /// Copies the first `tokens` entries of cache page `from` to page `to`.
    fn copy_page(&mut self, from: u32, to: u32, tokens: usize);
    /// Writes the rows' cache entries, then samples one token per wanted row, in order. May want
    /// none.
    fn forward(&mut self, rows: &DecodeRows, sampling: &[SampleRow]) -> Result<Vec<Sampled>>;
}

/// What bounds a generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Rollouts that decode together at most.
    pub decode_batch: usize,
    /// Tokens of the longest sequence.
    pub context: usize,
    /// Pages of the cache.
    pub page_count: usize,
    /// Tokens of a page.
    pub page_tokens: usize,
}

/// Samples the job's rollouts; each group is handed out when its last rollout ends.
pub fn generate(
    forward: &mut dyn Forward,
    job: &GenerateJob,
    limits: &Limits,
    on_group: &mut dyn FnMut(TokenGroup),
) -> Result<GenerateReport> {
    let began = Instant::now();
    let (packed, wanted) = (forward.version(), job.policy_version);
    ensure!(
        packed == wanted,
        "the packed weights are policy version {packed}, the job wants {wanted}; pack them again first"
    );
    let mut scheduler = Scheduler::new(job, limits)?;
    let (mut report, mut plan) = (GenerateReport::default(), Plan::default());
    while forward.go_on(!scheduler.is_done())? {
        if scheduler.is_done() {
            forward.stand_by()?;
            continue;
        }
        scheduler.admit();
        let is_prefill = scheduler.prefill(&mut plan);
        forward.enter(if is_prefill { Activity::Prefill } else { Activity::Decode });
        if !is_prefill {
            scheduler.decode(&mut plan);
        }
        let pass_began = Instant::now();
        let sampled = execute(forward, &plan)?;
        let (rows, seconds) = (plan.rows.len() as u64, pass_began.elapsed().as_secs_f64());
        if is_prefill {
            report.prefill_seconds += seconds;
            report.prompt_tokens += rows;
        } else {
            report.count(rows, seconds, plan.cached_tokens);
        }
        report.new_tokens += sampled.len() as u64;
        scheduler.record(&plan, &sampled).into_iter().for_each(&mut *on_group);
    }
    assert_eq!(scheduler.pages().held(), 0, "every page was given back");
    report.pages_high_water = scheduler.pages().high_water();
    report.seconds = began.elapsed().as_secs_f64();
    Ok(report)
}

fn execute(forward: &mut dyn Forward, plan: &Plan) -> Result<Vec<Sampled>> {
    for copy in &plan.copies {
        forward.copy_page(copy.from, copy.to, copy.tokens);
    }
    forward.forward(&plan.rows, &plan.sampling)
}

#[cfg(test)]
mod tests {
    use super::super::job::GenerateRequest;
    use super::super::oracle::{Machine, naive_rollout};
    use super::*;
    use crate::config::fault::Fault;
    use crate::rl::rollout::Stop;
    use proptest::prelude::*;
    use rehearsal_kernels::random::{Draws, Stream};

    /// Prompts of the given (tokens, samples); slots and counters differ from the order.
    fn job(prompts: &[(usize, u32)], max_new_tokens: usize) -> GenerateJob {
        let request = |(i, (tokens, samples)): (usize, &(usize, u32))| GenerateRequest {
            slot: 100 + i as u32,
            tokens: (0..*tokens).map(|t| ((t * t + i) % 23) as u32).collect(),
            prompt: 1000 + 3 * i as u64,
            samples: *samples,
        };
        GenerateJob {
            requests: prompts.iter().enumerate().map(request).collect(),
            max_new_tokens,
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            stop_tokens: vec![3, 11],
            seed: 5,
            step: 2,
            policy_version: 7,
        }
    }

    fn run(job: &GenerateJob, limits: &Limits) -> (Vec<TokenGroup>, GenerateReport, Machine) {
        let mut machine = Machine::new(limits);
        let mut groups = Vec::new();
        let report = generate(&mut machine, job, limits, &mut |group| groups.push(group)).unwrap();
        groups.sort_by_key(|group| group.slot);
        (groups, report, machine)
    }

    fn naive(job: &GenerateJob, context: usize) -> Vec<TokenGroup> {
        let mut groups: Vec<TokenGroup> = job
            .requests
            .iter()
            .map(|r| TokenGroup {
                slot: r.slot,
                rollouts: (0..r.samples)
                    .map(|sample| naive_rollout(job, r, sample, context))
                    .collect(),
                policy_version: job.policy_version,
            })
            .collect();
        groups.sort_by_key(|group| group.slot);
        groups
    }

    /// Pages that let the most demanding group run alone, one rollout at a time.
    fn fewest_pages(job: &GenerateJob, context: usize, page_tokens: usize) -> usize {
        let need = |r: &GenerateRequest| {
            let (prompt, longest) =
                (r.tokens.len(), (r.tokens.len() + job.max_new_tokens).min(context) - 1);
            // The prompt's last page is held beside a rollout's copy of it.
            let is_copied = r.samples > 1 && prompt % page_tokens != 0 && longest > prompt;
            longest.div_ceil(page_tokens) + usize::from(is_copied)
        };
        job.requests.iter().map(need).max().unwrap()
    }

    #[test]
    fn the_same_rollouts_come_out_for_any_batch_page_size_and_order() {
        let mut job = job(&[(5, 4), (16, 3), (1, 8), (31, 1), (48, 2), (17, 5), (16, 1)], 24);
        let expected = naive(&job, 64);
        let stops = expected.iter().flat_map(|g| &g.rollouts).map(|r| r.stop);
        assert!(stops.clone().any(|s| s == Stop::Eos) && stops.clone().any(|s| s == Stop::Length));
        let mut order = Draws::new(1, Stream::Data, [0, 0, 0]);
        for decode_batch in [1, 3, 64] {
            for page_tokens in [1, 3, 16, 64] {
                order.shuffle(&mut job.requests);
                for page_count in [fewest_pages(&job, 64, page_tokens), 90, 2000] {
                    let limits = Limits { decode_batch, context: 64, page_count, page_tokens };
                    let (groups, report, machine) = run(&job, &limits);
                    assert_eq!(groups, expected, "{limits:?}");
                    assert!(report.pages_high_water <= page_count);
                    assert!(machine.batch <= decode_batch.max(job.requests.len()));
                }
            }
        }
    }

    proptest! {
        #![proptest_config(super::super::oracle::fixed(300))]
        #[test]
        fn any_job_that_is_accepted_ends_with_the_naive_rollouts(
            prompts in prop::collection::vec((1usize..30, 1u32..5), 1..7),
            max_new_tokens in 1usize..20, context in 31usize..40, page_tokens in 1usize..9,
            decode_batch in 1usize..9, extra_pages in 0usize..12,
        ) {
            let job = job(&prompts, max_new_tokens);
            let page_count = fewest_pages(&job, context, page_tokens) + extra_pages;
            let limits = Limits { decode_batch, context, page_count, page_tokens };
            prop_assert_eq!(run(&job, &limits).0, naive(&job, context));
        }
    }

    #[test]
    fn a_prompt_goes_through_the_model_once_and_its_pages_are_held_once() {
        let mut job = job(&[(35, 8)], 9);
        job.stop_tokens.clear();
        let limits = Limits { decode_batch: 64, context: 64, page_count: 100, page_tokens: 4 };
        let (groups, report, machine) = run(&job, &limits);
        assert_eq!(groups, naive(&job, 64));
        // The last of the nine tokens never enters the cache.
        assert_eq!((report.prompt_tokens, report.new_tokens, machine.rows), (35, 72, 35 + 8 * 8));
        // Eight passes of eight rows. Of the prompt 32 tokens fill pages, which are seen once a pass; each rollout sees
        // the other 3 and from 1 to 8 of its own.
        let [passes] = report.decode[..] else { panic!("{:?}", report.decode) };
        assert_eq!((passes.rows, passes.passes), (8, 8));
        assert_eq!(passes.cached_tokens, 8 * (32 + 8 * 3) + 8 * (1..=8).sum::<u64>());
        // 8 whole pages of the prompt, and for each rollout the pages of positions 32 to 42.
        assert_eq!(report.pages_high_water, 8 + 8 * 3);
        job.requests[0].samples = 1;
        assert_eq!(run(&job, &limits).1.pages_high_water, 11);
    }

    #[test]
    fn a_group_leaves_in_the_pass_that_ends_its_last_rollout() {
        let job = job(&[(4, 2), (6, 3), (5, 1), (9, 4)], 40);
        let limits = Limits { decode_batch: 64, context: 64, page_count: 400, page_tokens: 4 };
        let mut machine = Machine::new(&limits);
        let passes = machine.passes.clone();
        let mut left = Vec::new();
        generate(&mut machine, &job, &limits, &mut |group| left.push((passes.get(), group)))
            .unwrap();
        for (pass, group) in &left {
            // One pass takes all prompts in and draws the first tokens; each later one draws one
            // more.
            let longest = group.rollouts.iter().map(|r| r.tokens.len()).max().unwrap();
            assert_eq!(*pass, longest, "slot {}", group.slot);
        }
        assert!(left.first().unwrap().0 < left.last().unwrap().0, "the groups differ in length");
    }

    #[test]
    fn nothing_follows_the_end_token_and_no_rollout_passes_the_context() {
        let mut job = job(&[(20, 16), (29, 16)], 50);
        let limits = Limits { decode_batch: 8, context: 30, page_count: 200, page_tokens: 4 };
        let (groups, ..) = run(&job, &limits);
        for rollout in groups.iter().flat_map(|group| &group.rollouts) {
            let ends = rollout.tokens.iter().position(|token| job.stop_tokens.contains(token));
            assert_eq!(ends.is_some(), rollout.stop == Stop::Eos);
            assert!(ends.is_none_or(|end| end + 1 == rollout.tokens.len()));
            assert_eq!(rollout.tokens.len(), rollout.logprobs.len());
        }
        assert!(groups[0].rollouts.iter().any(|r| r.stop == Stop::Length && r.tokens.len() == 10));
        assert!(groups[1].rollouts.iter().all(|r| r.tokens.len() == 1));
        job.requests[1].tokens.push(1);
        let error = generate(&mut Machine::new(&limits), &job, &limits, &mut |_| {}).unwrap_err();
        assert_eq!(error.downcast_ref::<Fault>().unwrap().exit_code(), 2);
        let text = error.to_string();
        assert!(
            text.contains("prompt 101 has 30 tokens") && text.contains("context is 30"),
            "{text}"
        );
    }

    #[test]
    fn a_long_prompt_goes_in_by_pieces() {
        let job = job(&[(700, 2), (300, 1), (513, 2)], 3);
        let limits = Limits { decode_batch: 8, context: 1024, page_count: 200, page_tokens: 16 };
        let (groups, report, machine) = run(&job, &limits);
        assert_eq!(groups, naive(&job, 1024));
        assert_eq!((report.prompt_tokens, machine.widest), (1513, 512));
    }

    #[test]
    fn a_prompt_is_cut_at_the_same_tokens_whatever_shares_its_passes() {
        let prompts = [(700, 2), (40, 1), (1300, 1), (513, 2), (512, 1), (9, 3)];
        let runs = |prompts: &[(usize, u32)], page_count, decode_batch| {
            let limits = Limits { decode_batch, context: 2048, page_count, page_tokens: 16 };
            let mut runs = run(&job(prompts, 1), &limits).2.runs;
            runs.sort_unstable();
            runs
        };
        let mut alone: Vec<(u32, usize)> =
            prompts.iter().flat_map(|prompt| runs(&[*prompt], 200, 8)).collect();
        alone.sort_unstable();
        for (page_count, decode_batch) in [(200, 1), (90, 8), (200, 64)] {
            assert_eq!(runs(&prompts, page_count, decode_batch), alone);
        }
        assert!(alone.contains(&(1024, 276)) && alone.contains(&(512, 1)), "{alone:?}");
    }

    #[test]
    fn weights_of_another_version_are_refused_before_the_first_token() {
        let job = GenerateJob { policy_version: 8, ..job(&[(4, 1)], 4) };
        let limits = Limits { decode_batch: 8, context: 30, page_count: 20, page_tokens: 4 };
        let mut machine = Machine::new(&limits);
        let error = generate(&mut machine, &job, &limits, &mut |_| panic!("no group may leave"))
            .unwrap_err();
        assert!(error.to_string().contains("policy version 7, the job wants 8"), "{error}");
        assert_eq!(machine.passes.get(), 0);
    }

    #[test]
    fn a_group_that_could_never_fit_is_refused_before_the_first_token() {
        let job = job(&[(4, 1), (18, 2)], 10);
        let enough = fewest_pages(&job, 64, 4);
        let limits =
            Limits { decode_batch: 8, context: 64, page_count: enough - 1, page_tokens: 4 };
        let mut machine = Machine::new(&limits);
        let error = generate(&mut machine, &job, &limits, &mut |_| panic!("no group may leave"))
            .unwrap_err();
        assert_eq!(error.downcast_ref::<Fault>().unwrap().exit_code(), 4);
        let wanted = format!(
            "prompt 101 needs {enough} cache pages for one rollout, the cache has {}",
            enough - 1
        );
        assert!(error.to_string().contains(&wanted), "{error}");
        assert_eq!(machine.passes.get(), 0);
    }

    #[test]
    fn a_prompt_without_tokens_and_a_job_without_new_tokens_are_refused() {
        let limits = Limits { decode_batch: 8, context: 64, page_count: 20, page_tokens: 4 };
        for (job, wanted) in
            [(job(&[(0, 1)], 4), "prompt 100 has no token"), (job(&[(4, 1)], 0), "0 new tokens")]
        {
            let error =
                generate(&mut Machine::new(&limits), &job, &limits, &mut |_| {}).unwrap_err();
            assert!(error.to_string().contains(wanted), "{error}");
        }
    }
}
