//! What leaves the device in a step of alignment, and when: the engine's planner on estimates of the config.
//!
//! The engine plans each step from what it saw of the steps before; here bytes are those of `memory`, seconds those of
//! `estimate`, and the way to host and disk is taken to carry what the engine takes it to before it moved anything.

use super::estimate::{efficiency, example_tokens, sequence};
use super::memory::{Memory, Owners, others};
use crate::config::stage::GrpoStage;
use crate::config::{ModelConfig, RunConfig, StageKind};
use crate::engine::offload_plan::{
    Bandwidth, Item, PhaseNeeds, Plan, Problem, Tier, Transfer, least_device_bytes, plan_elastic,
};
use crate::engine::{RATE, Role, Stretch, changes, needs};
use crate::model::weight_bytes::{moment_bytes, weight_bytes};
use crate::model::{Layout, flops_per_token, forward_flops_per_token};
use serde::Serialize;
use std::collections::BTreeMap;

/// The plan of a stage's step.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct OffloadPlan {
    /// The stage.
    pub stage: String,
    /// The smallest budget that would do, with one example at a time.
    pub least_bytes: u64,
    /// Bytes a second that host and disk are taken to carry.
    pub bytes_per_second: f64,
    /// Its phases, in order.
    pub phases: Vec<PlannedPhase>,
    /// What moves, in order.
    pub transfers: Vec<Transfer>,
    /// Bytes moved in a step, both ways.
    pub moved_bytes: u64,
    /// Of a step.
    pub seconds: f64,
    /// The share of it in which the device waits.
    pub exposed_share: f64,
    /// Whether no plan exposes less; else by how much of the step one could at most.
    pub is_optimal: bool,
    /// See `is_optimal`.
    pub gap_share: f64,
}

/// A phase of it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PlannedPhase {
    /// Its name.
    pub name: String,
    /// Start and end, in seconds since the step began.
    pub at: [f64; 2],
    /// Packed weights, gradients, cache and activations.
    pub working_bytes: u64,
    /// Most bytes on the device in it and in the gap before it.
    pub peak_bytes: u64,
    /// Where everything is as it begins.
    pub places: BTreeMap<String, Tier>,
}

/// The plans of all stages with rollouts, under the run's budget; none without one, where `engine.offload` is a list, or
/// where the budget is too small.
pub fn offload(
    config: &RunConfig,
    models: &[ModelConfig],
    memory: &Memory,
    products: f64,
) -> Vec<OffloadPlan> {
    let (Some(budget), None) = (config.engine.budget, &config.engine.offload) else {
        return Vec::new();
    };
    let stages = config.stages.iter().zip(models).zip(&memory.stages);
    let planned = stages.filter_map(|((stage, model), held)| {
        let StageKind::Grpo(grpo) = &stage.kind else { return None };
        let sized = |sizes| problem((config, model, grpo), sizes, (budget.0, products));
        let (problem, least) = (sized(&held.phases), sized(&held.least));
        let working: Vec<u64> = least.phases.iter().map(|phase| phase.working_bytes).collect();
        let (plan, working) = plan_elastic(&problem, &working).ok()?;
        Some(told(&stage.name, &problem, plan, &working, least_device_bytes(&least).1))
    });
    planned.collect()
}

fn told(
    stage: &str,
    problem: &Problem,
    plan: Plan,
    working: &[u64],
    least_bytes: u64,
) -> OffloadPlan {
    let phase = |(index, needs): (usize, &PhaseNeeds)| {
        let names = problem.items.iter().map(|item| item.name.clone());
        PlannedPhase {
            name: needs.name.clone(),
            at: plan.phases[index],
            working_bytes: working[index],
            peak_bytes: plan.peaks[index],
            places: names.zip(plan.places[index].iter().copied()).collect(),
        }
    };
    OffloadPlan {
        stage: stage.to_string(),
        least_bytes,
        bytes_per_second: RATE,
        phases: problem.phases.iter().enumerate().map(phase).collect(),
        moved_bytes: plan.moved_bytes,
        seconds: plan.seconds,
        exposed_share: plan.exposed_share(),
        is_optimal: plan.is_optimal,
        gap_share: plan.gap_share(),
        transfers: plan.transfers,
    }
}

/// A step of `grpo`, with the working memory that `sizes` tells of each phase.
fn problem(
    (config, model, grpo): (&RunConfig, &ModelConfig, &GrpoStage),
    sizes: &BTreeMap<&'static str, Owners>,
    (device_bytes, products): (u64, f64),
) -> Problem {
    let role = |name: &String| match name.strip_prefix("reward ") {
        Some(reward) => Role::Reward(reward.to_string()),
        None => Role::Reference,
    };
    let mut scored: Vec<Role> = others(grpo).iter().map(role).collect();
    // As they are scored: the reference comes last.
    scored.sort_by_key(|role| *role == Role::Reference);
    let between = scored.iter().cloned().map(Stretch::Score).collect();
    let stretches = [vec![Stretch::Generate], between, vec![Stretch::Train]].concat();
    let layout = |role: &Role| Layout::new(model, matches!(role, Role::Reward(_)));
    let bytes = |role: &Role, is_moment: bool| match is_moment {
        true => moment_bytes(layout(role).elements()) / 2,
        false => weight_bytes(&layout(role)),
    };
    let item = |role: &Role, kind: &str, is_moment: bool| Item {
        name: format!("{}/{kind}", role.name()),
        bytes: bytes(role, is_moment),
        needed: stretches.iter().map(|stretch| needs(role, is_moment, stretch)).collect(),
        changed: stretches.iter().map(|stretch| changes(role, stretch)).collect(),
    };
    let mut items = vec![
        item(&Role::Policy, "weights", false),
        item(&Role::Policy, "moments-first", true),
        item(&Role::Policy, "moments-second", true),
    ];
    items.extend(scored.iter().map(|role| item(role, "weights", false)));
    let phases = stretches.iter().map(|stretch| PhaseNeeds {
        name: stretch.name(),
        seconds: operations(config, model, grpo, stretch) / products.max(1.0),
        working_bytes: working(sizes, stretch),
    });
    let way = Bandwidth { read: RATE, write: RATE };
    Problem {
        phases: phases.collect(),
        items,
        device_bytes,
        host_bytes: config.engine.host_budget.map_or(u64::MAX, |budget| budget.0),
        host: way,
        disk: way,
    }
}

/// Bytes that a phase holds and that are no item.
fn working(sizes: &BTreeMap<&'static str, Owners>, stretch: &Stretch) -> u64 {
    let phase = match stretch {
        Stretch::Generate => "generate",
        Stretch::Score(_) => "score",
        Stretch::Train => "train",
    };
    let is_model = |owner: &str| owner.ends_with("/weights") && owner != "rope/weights";
    let lasts = |owner: &str| is_model(owner) || owner.ends_with("/moments");
    let owners = sizes.get(phase).into_iter().flatten();
    owners.filter(|(owner, _)| !lasts(owner)).map(|(_, bytes)| bytes).sum()
}

/// Operations that a phase takes as long as, at the measured rate: a rollout uses half of its new tokens, as in `estimate`.
fn operations(config: &RunConfig, model: &ModelConfig, grpo: &GrpoStage, stretch: &Stretch) -> f64 {
    let rollouts = (grpo.prompts * grpo.group_size) as f64;
    let reply = (grpo.max_new_tokens as f64 / 2.0).ceil();
    let whole = rollouts * (reply + example_tokens(config) as f64 / 4.0);
    let (length, efficiency) = (sequence(config), efficiency(model));
    let forward = forward_flops_per_token(model, length);
    match stretch {
        Stretch::Generate => rollouts * reply * forward / efficiency.sampling,
        Stretch::Score(_) => whole * forward / efficiency.training,
        Stretch::Train => {
            grpo.updates as f64 * whole * flops_per_token(model, length) / efficiency.training
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::estimate::tests::{models, quickstart};
    use super::super::memory::total;
    use super::super::ranks::device_memory;
    use super::*;

    fn planned(assignment: &str) -> Vec<OffloadPlan> {
        let config = quickstart(&[assignment]);
        let models = models(&config);
        offload(&config, &models, &memory(&config, &models), 2e11)
    }

    fn memory(config: &RunConfig, models: &[ModelConfig]) -> Memory {
        device_memory(config, models, 1).unwrap().remove(0).memory
    }

    #[test]
    fn where_the_budget_has_room_nothing_moves() {
        let plans = planned("engine.budget=\"1.5 GiB\"");
        let stages: Vec<&str> = plans.iter().map(|plan| plan.stage.as_str()).collect();
        assert_eq!(stages, ["solve", "align"]);
        for plan in &plans {
            assert_eq!((plan.moved_bytes, plan.exposed_share), (0, 0.0));
            let mut places = plan.phases.iter().flat_map(|phase| phase.places.values());
            assert!(places.all(|tier| *tier == Tier::Device));
        }
        assert!(planned("engine.offload=[]").is_empty(), "a list is no plan");
    }

    #[test]
    fn the_least_budget_is_that_of_the_memory_and_has_a_plan_that_keeps_it() {
        let config = quickstart(&["engine.budget=1"]);
        let memory = memory(&config, &models(&config));
        for stage in ["solve", "align"] {
            let held = memory.stages.iter().find(|held| held.stage == stage).unwrap();
            let least = held.least.values().map(total).max().unwrap();
            let of = |budget: u64| {
                let mut plans = planned(&format!("engine.budget={budget}")).into_iter();
                plans.find(|plan| plan.stage == stage)
            };
            let plan = of(least).unwrap();
            assert_eq!(plan.least_bytes, least, "one truth");
            assert!(plan.phases.iter().all(|phase| phase.peak_bytes <= least), "{plan:?}");
            assert!(plan.moved_bytes > 0 && !plan.transfers.is_empty());
            assert_eq!(of(least - 1), None);
        }
    }
}
