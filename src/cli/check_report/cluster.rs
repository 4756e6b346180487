//! The plan for a cluster, as text of 80 columns that fits on a screen of 24 lines.

use super::super::output::grouped;
use super::CheckReport;
use crate::config::Bytes;
use crate::config::cluster::RolloutLayout;
use crate::plan::ClusterPlan;
use crate::plan::cluster::alignment::AlignmentPlan;
use crate::plan::cluster::step::StepPlan;
use crate::plan::memory::total;
use std::fmt::{self, Formatter};

/// Columns of a line.
const WIDTH: usize = 80;
/// Columns before a line's text.
const MARGIN: usize = 10;

/// Writes what a run on a cluster takes: the model in short, then the plan.
pub fn write_cluster(
    out: &mut Formatter<'_>,
    report: &CheckReport,
    plan: &ClusterPlan,
) -> fmt::Result {
    let (layout, counts) = (&plan.layout, &report.parameters);
    line(
        out,
        "model",
        &format!(
            "{} parameters, {} active; {}FLOP a token at {} tokens",
            count(counts.total as f64),
            count(counts.active_without_input_embedding as f64),
            scaled(plan.flops_per_token),
            grouped(report.sequence as u64)
        ),
    )?;
    let RolloutLayout { tensor, expert } = layout.rollout;
    let rollouts = match plan.alignment.is_empty() {
        true => String::new(),
        false => format!("; rollouts {tensor} x {expert}"),
    };
    line(
        out,
        "cluster",
        &format!(
            "{} ranks: {} data x {} stages ({}), experts over {}{rollouts}",
            plan.ranks, layout.data, layout.pipeline, layout.schedule, layout.expert
        ),
    )?;
    write_bytes(out, plan)?;
    report.write_devices(out)?;
    plan.training.iter().try_for_each(|step| write_step(out, step))?;
    if let (Some(hours), Some(published), Some(error)) = (
        plan.gpu_hours_per_trillion_tokens,
        plan.published_gpu_hours_per_trillion_tokens,
        plan.relative_error,
    ) {
        let (hours, published, error) = (hours / 1e3, published / 1e3, 100.0 * error);
        let text = format!(
            "{hours:.1} K GPU hours / T tokens predicted, {published:.1} K published ({error:+.1} %)"
        );
        line(out, "hours", &text)?;
    }
    plan.alignment.iter().try_for_each(|step| write_alignment(out, step))?;
    if let Some(hardware) = &plan.assumptions {
        let text = format!(
            "{} as [cluster.hardware] says; seconds and hours are predictions",
            hardware.device
        );
        line(out, "assumed", &text)?;
    }
    report.unread.iter().chain(&plan.notes).try_for_each(|note| line(out, "note", note))
}

fn write_bytes(out: &mut Formatter<'_>, plan: &ClusterPlan) -> fmt::Result {
    let peak = &plan.peak;
    let bytes = Bytes(peak.bytes);
    let text =
        format!("{bytes} at most, on rank {} in {} of {}", peak.rank, peak.phase, peak.stage);
    line(out, "device", &text)?;
    let phase = |phase: &str| {
        let bytes = plan.bytes.iter().filter_map(|stage| stage.phases.get(phase)).map(total);
        let (least, most) = (bytes.clone().min()?, bytes.max()?);
        Some(format!("{phase} {}", range(least, most)))
    };
    let phases: Vec<String> =
        ["train", "generate", "score"].into_iter().filter_map(phase).collect();
    line(out, "", &phases.join(", "))?;
    let (held, once) = (plan.weight_bytes_held, plan.weight_bytes_once);
    let host = match plan.host_bytes_per_node {
        0 => String::new(),
        bytes => format!("; host {} a node", Bytes(bytes)),
    };
    let weights = format!("{} a rank, {} if held once{host}", amount(held), amount(once));
    line(out, "weights", &weights)
}

/// Bytes of the ranks that hold least and most, with one unit.
fn range(least: u64, most: u64) -> String {
    let most = Bytes(most).to_string();
    let (number, unit) = most.split_once(' ').unwrap_or((&most, ""));
    let of_unit = Bytes::parse(&format!("1 {unit}")).map_or(1, |unit| unit.0) as f64;
    let least = format!("{:.1}", least as f64 / of_unit);
    let number = number.parse().map_or(0.0, |number: f64| number);
    format!("{least}-{number:.1} {unit}")
}

fn write_step(out: &mut Formatter<'_>, step: &StepPlan) -> fmt::Result {
    let traffic = &step.traffic;
    line(
        out,
        &step.stage,
        &format!(
            "{} micro-batches, {} tokens; bubbles {:.1} % ({:.1} % uneven stages)",
            step.micro_batches,
            count(step.step_tokens),
            100.0 * step.bubble_share,
            100.0 * step.uneven_share
        ),
    )?;
    let sums = amount(traffic.gradients + traffic.weights);
    let experts = amount(traffic.all_to_all);
    line(out, "", &format!("all-to-all {experts}, gradients and weights {sums} a step"))?;
    let Some(simulated) = step.simulated else { return Ok(()) };
    line(
        out,
        "",
        &format!(
            "{:.1} s a step, {:.1} % of the peak, {:.1} K GPU hours / T tokens",
            simulated.step_seconds,
            100.0 * simulated.share_of_peak,
            simulated.gpu_hours_per_trillion_tokens / 1e3
        ),
    )
}

fn write_alignment(out: &mut Formatter<'_>, step: &AlignmentPlan) -> fmt::Result {
    line(
        out,
        &step.stage,
        &format!(
            "{} rollouts, {} new tokens, {} other models; switch {}",
            step.rollouts,
            count(step.new_tokens as f64),
            step.models.len(),
            amount(step.switch.bytes)
        ),
    )?;
    let Some(simulated) = &step.simulated else { return Ok(()) };
    let phase = |(phase, seconds): &(&str, f64)| format!("{phase} {seconds:.1}");
    let phases: Vec<String> = simulated.seconds.iter().map(phase).collect();
    line(out, "", &format!("{:.1} s: {}", simulated.step_seconds, phases.join(", ")))?;
    line(
        out,
        "",
        &format!(
            "{:.0} new tokens a second and GPU, {:.1} % of the peak, {:.1} % for the host",
            simulated.tokens_per_second_and_gpu,
            100.0 * simulated.rfu,
            100.0 * simulated.exposed_offload_share
        ),
    )
}

/// Bytes that travel, in powers of ten as links are told.
fn amount(bytes: f64) -> String {
    format!("{}B", scaled(bytes))
}

/// A number with the prefix of its power of ten.
fn scaled(number: f64) -> String {
    let units = [("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)];
    match units.into_iter().find(|(_, unit)| number >= *unit) {
        Some((prefix, unit)) => format!("{:.1} {prefix}", number / unit),
        None => format!("{number:.0} "),
    }
}

/// A count, in billions where it is one.
fn count(number: f64) -> String {
    let text = scaled(number).replace('G', "B").replace('k', "K");
    text.trim_end().to_string()
}

/// A label and a text, broken between words.
fn line(out: &mut Formatter<'_>, label: &str, text: &str) -> fmt::Result {
    // A long label has a line of its own.
    let mut row = match label.chars().count() < MARGIN {
        true => format!("{label:<MARGIN$}"),
        false => {
            writeln!(out, "{label}")?;
            " ".repeat(MARGIN)
        }
    };
    let mut has_word = false;
    for word in text.split(' ') {
        if has_word && row.chars().count() + 1 + word.chars().count() > WIDTH {
            writeln!(out, "{row}")?;
            row = " ".repeat(MARGIN);
            has_word = false;
        }
        row += if has_word { " " } else { "" };
        row += word;
        has_word = true;
    }
    writeln!(out, "{row}")
}
