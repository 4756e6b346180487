//! Tests of the plan and of what it refuses; `tests/suite/rank_memory.rs` holds it against arenas.

use super::super::estimate::tests::{models, quickstart};
use super::*;
use crate::config::Bytes;

fn planned(set: &[&str]) -> (RunConfig, Vec<DeviceMemory>) {
    let config = quickstart(set);
    let devices = device_memory(&config, &models(&config), 1).unwrap();
    (config, devices)
}

fn least(devices: &[DeviceMemory]) -> u64 {
    devices.iter().filter_map(|device| device.least()).map(|(_, _, bytes)| bytes).max().unwrap()
}

fn refused(config: &RunConfig, room: Room, is_shared: bool) -> Option<Refusal> {
    let models = models(config);
    let devices = device_memory(config, &models, 1).unwrap();
    refusal(config, &models, (&devices, 1), room, is_shared)
}

#[test]
fn ranks_of_a_stage_are_planned_once_however_many_they_are() {
    let count = |set: &[&str]| planned(set).1.len();
    assert_eq!(count(&[]), 1);
    for data in ["cluster.data=2", "cluster.data=4", "cluster.data=8"] {
        assert_eq!(count(&[data, "stage.base.batch=32"]), 1);
        assert_eq!(count(&[data, "cluster.pipeline=3", "cluster.samplers=4"]), 4);
    }
    let (_, devices) = planned(&["cluster.data=2", "cluster.pipeline=2", "cluster.samplers=1"]);
    let ranks: Vec<_> = devices.iter().map(|d| (d.first_rank, d.last_rank, d.samples)).collect();
    assert_eq!(ranks, [(0, 1, false), (2, 3, false), (4, 4, true)]);
}

#[test]
fn more_ranks_hold_less_and_who_only_samples_has_no_moments() {
    let of = |set: &[&str]| planned(set).1;
    let [two, four] = ["cluster.data=2", "cluster.data=4"].map(|set| least(&of(&[set])));
    assert!(four < two, "{four} {two}");
    let devices = of(&["cluster.samplers=1"]);
    let owners = |device: &DeviceMemory, phase| device.memory.stages[4].phases.get(phase).cloned();
    assert!(owners(&devices[0], "generate").is_none() && owners(&devices[1], "train").is_none());
    let sampler = owners(&devices[1], "generate").unwrap();
    assert!(sampler.contains_key("policy/cache") && !sampler.contains_key("policy/moments"));
    assert!(!sampler.contains_key("reference/weights"));
    // What is sampled ahead is scored by who sampled it.
    assert!(owners(&devices[1], "score").is_none());
    let ahead = of(&["cluster.samplers=1", "stage.solve.max_staleness=1"]);
    let compared = owners(&ahead[1], "score").unwrap();
    assert!(compared.contains_key("policy/packed") && !compared.contains_key("reference/weights"));
}

#[test]
fn a_refusal_names_who_and_where_and_its_ways_out_are_right() {
    let (config, devices) = planned(&["cluster.data=2", "cluster.pipeline=2"]);
    let need = least(&devices);
    assert_eq!(refused(&config, Room::Budget(need), false), None);
    let Refusal { text, least_bytes } = refused(&config, Room::Budget(need - 1), false).unwrap();
    assert_eq!(least_bytes, need);
    let (stage, phase, _) =
        devices.iter().filter_map(|d| d.least()).max_by_key(|(_, _, bytes)| *bytes).unwrap();
    let who = format!("needs {} in phase {phase} of stage {stage}, and ", Bytes(need));
    assert!(text.starts_with("rank ") && text.contains(&who), "{text}");
    assert!(text.contains(&format!("set engine.budget = {need} (")), "{text}");
    // What it says would fit does, and needs what it says.
    let said = text.split(", or set ").skip(1).collect::<Vec<_>>();
    assert!(!said.is_empty(), "{text}");
    for way in said {
        let (keys, bytes) = way.split_once(", which needs ").unwrap();
        let sets: Vec<String> = keys.split(" with ").map(|set| set.replace(" = ", "=")).collect();
        let sets: Vec<&str> = sets.iter().map(String::as_str).collect();
        let other = planned(&[&["cluster.data=2", "cluster.pipeline=2"], &sets[..]].concat()).1;
        let bytes = bytes.split("; or").next().unwrap();
        assert!(least(&other) < need && Bytes(least(&other)).to_string() == bytes, "{way}");
    }
    let text = refused(&config, Room::Memory(need - 1), false).unwrap().text;
    assert!(
        text.contains("its part of what is free") && text.contains("fewer processes"),
        "{text}"
    );
}

#[test]
fn two_devices_of_one_process_have_half_of_the_budget_each() {
    let (config, devices) = planned(&["cluster.samplers=1"]);
    let need = least(&devices);
    assert_eq!(refused(&config, Room::Budget(2 * need), true), None);
    let Refusal { text, least_bytes } = refused(&config, Room::Budget(2 * need - 1), true).unwrap();
    assert_eq!(least_bytes, 2 * need);
    assert!(text.starts_with("the device that trains needs "), "{text}");
    assert!(text.contains("half of engine.budget leaves it"), "{text}");
}

#[test]
fn the_layout_of_rollouts_is_of_the_samplers_where_there_are_some_and_else_of_all_ranks() {
    let plan = |set: &[&str]| {
        let config = quickstart(set);
        device_memory(&config, &models(&config), 1).map_err(|error| error.message)
    };
    // The quickstart's model has experts and heads for each of these.
    assert!(plan(&["cluster.data=4", "cluster.rollout.expert=4"]).is_ok());
    let ranks = plan(&["cluster.data=2", "cluster.rollout.expert=4"]).unwrap_err();
    assert!(ranks.contains("does not divide the number of ranks = 2"), "{ranks}");
    let samplers = ["cluster.data=4", "cluster.samplers=2"];
    assert!(plan(&[&samplers[..], &["cluster.rollout.expert=2"]].concat()).is_ok());
    let text = plan(&[&samplers[..], &["cluster.rollout.expert=4"]].concat()).unwrap_err();
    assert!(text.contains("does not divide the number of ranks = 2"), "{text}");
    // One process with a sampler: it samples alone.
    let text = plan(&["cluster.samplers=1", "cluster.rollout.tensor=2"]).unwrap_err();
    assert!(text.contains("does not divide the number of ranks = 1"), "{text}");
}

#[test]
fn more_micro_batches_in_flight_and_less_computed_again_hold_more() {
    let held = |set: &[&str]| {
        let set = [&["cluster.pipeline=3", "stage.base.batch=24"], set].concat();
        let devices = planned(&set).1;
        devices[0].memory.stages[0].phases["train"]["policy/activations"]
    };
    let kept = held(&[]);
    assert!(held(&["engine.recompute=1"]) < kept);
    assert!(held(&["cluster.schedule=zb-h2"]) > kept);
}

/// Owners of a phase of a run of one device, of the stage that holds most in it.
fn alone(set: &[&str], phase: &str) -> Owners {
    planned(set).1[0].memory.by_phase()[phase].clone()
}

#[test]
fn one_device_holds_gradients_and_moments_in_training_and_neither_in_sampling() {
    let (train, generate) = (alone(&[], "train"), alone(&[], "generate"));
    let weights = train["policy/weights"];
    // 896 208 parameters, in whole pages.
    assert!((4 * 896_208..4 * 896_208 + 8192).contains(&weights), "{weights}");
    assert_eq!([train["policy/gradients"], train["policy/moments"] / 2], [weights; 2]);
    assert!(train["policy/packed"] > generate["policy/packed"]);
    assert!(!train.contains_key("policy/cache") && generate["policy/cache"] > 0);
    assert!(!generate.contains_key("policy/gradients"));
    assert!(!generate.contains_key("policy/moments"), "under a budget they leave");
    let stays = ["engine.offload=[]"];
    assert_eq!(alone(&stays, "generate")["policy/moments"], 2 * weights);
    assert!(alone(&stays, "train").contains_key("reward safety/weights"));
    assert!(alone(&stays, "generate").contains_key("reference/weights"));
}

#[test]
fn rollouts_that_need_not_be_exact_pack_kv_b_for_both_forms_and_in_few_bits_less() {
    let packed = |set: &[&str]| {
        let mut config = quickstart(set);
        config.stages.iter_mut().for_each(|stage| stage.eval.clear());
        let devices = device_memory(&config, &models(&config), 1).unwrap();
        devices[0].memory.stages[5].phases["generate"]["policy/packed"]
    };
    let (exact, fast) = (packed(&[]), packed(&["engine.exact=false"]));
    let kv_b = 4 * crate::model::parameters::keys_and_values(&quickstart(&[]).model);
    assert!(((kv_b..kv_b + (64 << 10)).contains(&(fast - exact))), "{exact} {fast} {kv_b}");
    // The head has 16 bits; a processor without instructions for integers samples from f32.
    for (dtype, share) in [("bf16", 0.5), ("fp8", 0.25), ("int8", 1.0)] {
        let dtype = format!("stage.align.rollout_dtype={dtype}");
        let few = packed(&["engine.exact=false", &dtype]) as f64 / fast as f64;
        assert!((share..share + 0.08).contains(&few), "{dtype}: {few}");
    }
}

#[test]
fn a_list_of_what_is_offloaded_is_told_to_be_left_out_where_that_is_enough() {
    let stays = ["engine.offload=[]"];
    let (config, devices) = planned(&stays);
    let (need, by_plan) = (least(&devices), least(&planned(&[]).1));
    assert!(by_plan < need);
    let text = refused(&config, Room::Budget(by_plan), false).unwrap().text;
    assert!(
        text.starts_with("the run needs ") && text.contains("leave engine.offload out"),
        "{text}"
    );
    let text = refused(&config, Room::Budget(by_plan - 1), false).unwrap().text;
    assert!(!text.contains("leave engine.offload out"), "{text}");
}
