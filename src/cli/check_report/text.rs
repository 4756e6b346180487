//! What `check` found, as text.

use super::super::machine::share_for_arenas;
use super::super::output::{duration, grouped};
use super::cluster::write_cluster;
use super::{Against, CheckReport};
use crate::config::Bytes;
use crate::engine::offload_plan::Tier;
use crate::plan::cost::PEAK_FLOPS;
use crate::plan::{Estimate, OffloadPlan};
use std::fmt;

/// What `engine.exact` means for rollouts.
const EXACT: &str = "exact: sampled and trained in one form of attention, the same log-probabilities to the bit,\n          compared in each step";
/// What its absence means.
const FAST: &str =
    "fast: trained as engine.attention says, prompts by cost; log-probabilities agree to rounding";

impl fmt::Display for CheckReport {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counts = &self.parameters;
        writeln!(out, "{}: right", self.file)?;
        if let Some(plan) = &self.cluster {
            return write_cluster(out, self, plan);
        }
        writeln!(
            out,
            "model     {} parameters in {} tensors",
            grouped(counts.total),
            grouped(counts.tensors)
        )?;
        writeln!(
            out,
            "          {} active in a token, {} without the input embedding",
            grouped(counts.active),
            grouped(counts.active_without_input_embedding)
        )?;
        writeln!(
            out,
            "cache     {} bytes a token ({}), {} elements",
            grouped(self.cache_bytes_per_token),
            self.cache_dtype,
            grouped(self.cache_elements_per_token)
        )?;
        for (kind, bytes) in &self.cache_bytes_by_type {
            if *kind != self.cache_dtype {
                writeln!(out, "          {} bytes in {kind}", grouped(*bytes))?;
            }
        }
        writeln!(
            out,
            "training  {} a token at {} tokens",
            flops(self.flops_per_token),
            grouped(self.sequence as u64)
        )?;
        if let Some(found) = &self.utilisation {
            writeln!(
                out,
                "          {:.1} tokens a second and GPU, {:.1} % of {:.1} TFLOP/s (an H100 or H800 in bf16)",
                found.tokens_per_second,
                100.0 * found.share_of_peak,
                PEAK_FLOPS / 1e12
            )?;
        }
        if let Some(against) = &self.comparison {
            write_comparison(out, against)?;
        }
        for (name, lines) in &self.lines {
            writeln!(out, "data      {name}: {} examples", grouped(*lines))?;
        }
        self.write_memory(out)?;
        self.write_run(out)
    }
}

impl CheckReport {
    /// What only a run has: its bounds, and what it takes.
    fn write_run(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.budget_bytes, self.free.and_then(|free| free.of_each(1))) {
            (Some(budget), _) => writeln!(out, "budget    {}", Bytes(budget))?,
            (None, Some(free)) => writeln!(
                out,
                "budget    none; here the arenas take at most {}, nine tenths of what is free",
                Bytes(share_for_arenas(free))
            )?,
            (None, None) => {}
        }
        if let Some(exact) = self.exact {
            writeln!(out, "rollouts  {}", if exact { EXACT } else { FAST })?;
        }
        if !self.sampled_ahead.is_empty() {
            let stages = self.sampled_ahead.join(", ");
            writeln!(
                out,
                "          those of stage {stages} (max_staleness) are compared by one more forward"
            )?;
            writeln!(
                out,
                "          pass where they were sampled, beside the update before theirs"
            )?;
        }
        if let Some(text) = &self.idle_samplers {
            writeln!(out, "samplers  {text}")?;
        }
        self.write_peak(out)?;
        self.offload.iter().try_for_each(|plan| write_offload(out, plan))?;
        self.estimate.as_ref().map_or(Ok(()), |estimate| write_estimate(out, estimate))
    }
}

/// What of a step's plan fits in a line for each phase.
fn write_offload(out: &mut fmt::Formatter<'_>, plan: &OffloadPlan) -> fmt::Result {
    writeln!(
        out,
        "offload   {}: {} moved a step, {:.1} % of it exposed; a budget of {} would do",
        plan.stage,
        Bytes(plan.moved_bytes),
        100.0 * plan.exposed_share,
        Bytes(plan.least_bytes)
    )?;
    for phase in plan.phases.iter().filter(|_| plan.moved_bytes > 0) {
        let away = phase.places.iter().filter(|(_, tier)| **tier != Tier::Device);
        let away: Vec<&str> = away.map(|(name, _)| name.as_str()).collect();
        let away = if away.is_empty() { "nothing".to_string() } else { away.join(", ") };
        let (name, peak) = (&phase.name, Bytes(phase.peak_bytes).to_string());
        writeln!(out, "            {name:<24} {peak:>12}, away: {away}")?;
    }
    Ok(())
}

fn write_comparison(out: &mut fmt::Formatter<'_>, against: &Against) -> fmt::Result {
    let (found, paper) = (&against.ratios, &against.paper);
    let percent = |share: f64| format!("{:.2} %", 100.0 * share);
    writeln!(out, "against   {}; in brackets DeepSeek-V2 against DeepSeek 67B", against.file)?;
    for (what, found, paper) in [
        ("active parameters", found.active, paper.active),
        ("parameters", found.total, paper.total),
        ("cached elements", found.cache_elements, paper.cache_elements),
        ("training FLOPs", found.flops, paper.flops),
    ] {
        writeln!(out, "          {found:.4} of its {what} ({paper})")?;
    }
    writeln!(
        out,
        "          {} of its cache saved in elements ({})",
        percent(found.cache_saved),
        percent(paper.cache_saved)
    )?;
    if let (Some(found), Some(paper)) = (found.cache_saved_at_6_bits, paper.cache_saved_at_6_bits) {
        writeln!(
            out,
            "          {} of its cache saved in bytes, 6 bits against bf16 ({})",
            percent(found),
            percent(paper)
        )?;
    }
    Ok(())
}

fn write_estimate(out: &mut fmt::Formatter<'_>, estimate: &Estimate) -> fmt::Result {
    let unknown = || "?".to_string();
    for stage in &estimate.stages {
        let steps = stage.steps.map_or_else(unknown, grouped);
        let tokens = stage.trained_tokens.map_or_else(unknown, grouped);
        let seconds = stage.seconds.map_or_else(unknown, duration);
        write!(
            out,
            "stage     {:<16} {:<13} {steps:>7} steps {tokens:>12} tokens",
            stage.name, stage.kind
        )?;
        if stage.sampled_tokens > 0 {
            write!(out, ", {} sampled", grouped(stage.sampled_tokens))?;
        }
        writeln!(out, ", about {seconds}")?;
    }
    writeln!(out, "tokens    {} trained", grouped(estimate.tokens))?;
    writeln!(out, "disk      {} at most", Bytes(estimate.disk_bytes))?;
    let rate = format!(
        "{} thread(s), at {:.0} % (sampling {:.0} %) of the {:.1} GFLOP/s that each was measured at",
        estimate.threads,
        100.0 * estimate.efficiency.training,
        100.0 * estimate.efficiency.sampling,
        estimate.products / estimate.threads.max(1) as f64 / 1e9
    );
    match estimate.seconds {
        Some(seconds) => {
            writeln!(out, "time      about {} on {rate}, without evaluations", duration(seconds))
        }
        None => writeln!(out, "time      not known before every data set is read"),
    }
}

/// FLOPs with a unit.
fn flops(number: f64) -> String {
    let units = [("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6), ("kFLOP", 1e3)];
    let (name, unit) = units.into_iter().find(|(_, unit)| number >= *unit).unwrap_or(("FLOP", 1.0));
    format!("{:.4} {name}", number / unit).replace(".0000", "")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flops_have_readable_units() {
        assert_eq!(flops(155.3e9), "155.3000 GFLOP");
        assert_eq!(flops(10e9), "10 GFLOP");
        assert_eq!(flops(12.0), "12 FLOP");
    }
}
