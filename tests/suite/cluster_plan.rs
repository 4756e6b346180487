//! `check` of runs on clusters: the paper's own set-ups with their golden figures, and what each assumption does.

use super::ranks;
use super::tiny::documents;
use rehearsal::cluster::layout::{Sampling, Training};
use rehearsal::cluster::mesh::{self, Mesh};
use rehearsal::config::cluster::PipelineSchedule;
use rehearsal::model::placement;
use rehearsal::plan::cluster::batch::Batch;
use rehearsal::plan::cluster::bytes::Layouts;
use rehearsal::plan::cluster::load::Load;
use rehearsal::plan::cluster::traffic::Traffic;
use serde_json::Value;
use std::process::Command;
use std::sync::OnceLock;

fn check(config: &str, extra: &[&str]) -> (bool, String) {
    let file = format!("{}/configs/{config}", env!("CARGO_MANIFEST_DIR"));
    let output = Command::new(env!("CARGO_BIN_EXE_rehearsal"))
        .args(["check", &file])
        .args(extra)
        .output()
        .unwrap();
    let text = if output.status.success() { output.stdout } else { output.stderr };
    (output.status.success(), String::from_utf8(text).unwrap())
}

fn report(config: &str, set: &[&str]) -> Value {
    let set: Vec<&str> = set.iter().flat_map(|assignment| ["--set", assignment]).collect();
    let (ok, text) = check(config, &[&set[..], &["--json"]].concat());
    assert!(ok, "{text}");
    serde_json::from_str(&text).unwrap()
}

const V2: &str = "paper/deepseek-v2-236b.toml";
const DENSE: &str = "paper/deepseek-67b.toml";

/// The plan of DeepSeek-V2, made once.
fn v2() -> &'static Value {
    static PLAN: OnceLock<Value> = OnceLock::new();
    PLAN.get_or_init(|| report(V2, &[])["plan"].clone())
}

fn dense() -> &'static Value {
    static PLAN: OnceLock<Value> = OnceLock::new();
    PLAN.get_or_init(|| report(DENSE, &[])["plan"].clone())
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

#[test]
fn data_of_other_machines_need_not_be_here_and_those_of_this_one_must() {
    let unread = "data.sets.code-and-mathematics is not here: no data were read";
    assert_eq!(report(V2, &[])["unread"], unread);
    let told = |more: &[&str]| {
        let (ok, text) = check(V2, more);
        assert!(ok, "{text}");
        text.contains(&format!("\nnote      {unread}\n"))
    };
    assert_eq!([told(&[]), told(&["--plan-only"])], [true, false]);
    let (ok, text) = check("smoke.toml", &["--set", "data.sets.pages.file=nowhere.txt"]);
    assert!(!ok && text.contains("cannot be read"), "{text}");
}

#[test]
fn the_plan_has_its_stable_keys() {
    for key in [
        "ranks",
        "layout",
        "peak_device_bytes",
        "peak",
        "fits",
        "host_bytes_per_node",
        "bytes",
        "flops_per_token",
        "bubble_share",
        "all_to_all_bytes",
        "reshard_bytes",
        "gpu_hours_per_trillion_tokens",
        "published_gpu_hours_per_trillion_tokens",
        "relative_error",
        "training",
        "alignment",
        "notes",
        "assumptions",
    ] {
        assert!(!v2()[key].is_null(), "{key}");
    }
    assert!(report("smoke.toml", &[])["plan"].is_null(), "one process has no cluster to plan");
}

#[test]
fn v2_has_the_papers_layout_weights_and_flops() {
    let plan = v2();
    assert_eq!((&plan["ranks"], plan["bytes"].as_array().unwrap().len()), (&128.into(), 16));
    // 235.74 billion parameters in bf16 over 128 ranks; experts alone are held once.
    assert_eq!(number(&plan["weight_bytes_once"]), 2.0 * 235_741_434_880.0 / 128.0);
    assert_eq!(format!("{:.2}", number(&plan["weight_bytes_once"]) / 1e9), "3.68");
    let experts = 59 * 160 * 23_592_960_u64;
    let rest = 235_741_434_880 - experts;
    let held = 2.0 * (experts + 8 * rest) as f64 / 128.0;
    assert_eq!(number(&plan["weight_bytes_held"]), held);
    assert_eq!(format!("{:.1}", number(&plan["flops_per_token"]) / 1e9), "155.3");
    assert_eq!(format!("{:.1}", number(&dense()["flops_per_token"]) / 1e9), "418.6");
    // M = 3 of 8 devices, of which one in eight is the token's own; there and back, forward and backward, in 59 layers.
    let per_token = 59.0 * 4.0 * 3.0 * 7.0 / 8.0 * 5120.0 * 2.0;
    let traffic = &plan["training"][0]["traffic"];
    assert_eq!(number(&traffic["all_to_all_per_token"]), per_token);
    assert_eq!(number(&plan["all_to_all_bytes"]), per_token * 9216.0 * 4096.0);
    // 15 boundaries of stages, activations and their gradients.
    let boundary = 15.0 * 2.0 * 5120.0 * 2.0 * 9216.0 * 4096.0;
    assert_eq!(number(&traffic["stages"]), boundary);
}

#[test]
fn the_bytes_of_v2s_first_rank_are_those_counted_by_hand() {
    let owners = &v2()["bytes"][0]["phases"]["train"];
    let (attention, norms, expert) = (149_227_520, 2 * 5120, 23_592_960_u64);
    // Embedding, one dense layer, three layers with a router, two shared and 20 of 160 experts.
    let shared = 524_288_000
        + (attention + norms + 188_743_680)
        + 3 * (attention + norms + 160 * 5120 + 2 * expert);
    let experts = 3 * 20 * expert;
    assert_eq!(owners["policy/weights"], 2 * (shared + experts));
    assert_eq!(owners["policy/gradients"], 4 * (shared + experts));
    // ZeRO-1: eight ranks hold the same but for experts, which nobody else has.
    assert_eq!(owners["policy/moments"], 8 * (shared / 8 + experts));
    assert_eq!(owners["policy/masters"], 4 * (shared / 8 + experts));
    let bytes = v2()["bytes"].as_array().unwrap();
    let total = |stage: &Value| -> u64 {
        let sum = |owners: &Value| -> u64 {
            owners.as_object().unwrap().values().map(|bytes| bytes.as_u64().unwrap()).sum()
        };
        stage["phases"].as_object().unwrap().values().map(sum).max().unwrap()
    };
    let peak = bytes.iter().map(total).max().unwrap();
    assert_eq!(v2()["peak_device_bytes"], peak);
}

#[test]
fn the_same_assumptions_give_both_models_hours_within_seven_percent_and_the_papers_saving() {
    let (mut moe, mut other) = (v2()["assumptions"].clone(), dense()["assumptions"].clone());
    for assumptions in [&mut moe, &mut other] {
        // Neither has to do with training.
        for key in ["published_gpu_hours", "cache_bits"] {
            assumptions[key] = Value::Null;
        }
    }
    assert_eq!(moe, other, "no figure is fitted to one of them");
    let hours = |plan: &Value| number(&plan["gpu_hours_per_trillion_tokens"]);
    for (plan, published) in [(v2(), 172_800.0), (dense(), 300_600.0)] {
        let error = hours(plan) / published - 1.0;
        assert!((0.0..0.07).contains(&error), "{error}");
        assert!((number(&plan["relative_error"]) - error).abs() < 1e-12);
    }
    let saving = 100.0 * (1.0 - hours(v2()) / hours(dense()));
    assert!((saving - 42.5).abs() < 1.5, "{saving}");
}

#[test]
fn bubbles_fall_from_schedule_to_schedule_down_to_what_uneven_stages_leave() {
    for plan in [v2(), dense()] {
        let step = &plan["training"][0];
        let share = |name: &str| number(&step["bubble_shares"][name]);
        let uneven = number(&step["uneven_share"]);
        let shares = ["1f1b", "zb-h1", "zb-h2"].map(share);
        assert!(shares.is_sorted_by(|a, b| a > b), "{shares:?}");
        assert!(shares[2] > uneven && shares[2] < uneven + 0.01, "{shares:?} {uneven}");
        let own = plan["layout"]["schedule"].as_str().unwrap();
        assert_eq!(number(&step["bubble_share"]), share(own));
        let simulated = &step["simulated"];
        let idle = number(&simulated["idle_share"]);
        assert!(idle > share(own) && idle < share(own) + 0.01, "messages cost a little: {idle}");
        let parts = ["compute_share", "exchange_share", "update_share", "idle_share"];
        let sum: f64 = parts.iter().map(|part| number(&simulated[part])).sum();
        assert!((sum - 1.0).abs() < 1e-9, "{sum}");
    }
}

#[test]
fn an_rl_step_of_v2_has_its_phases_models_and_the_least_switch() {
    let step = &v2()["alignment"][1];
    assert_eq!(step["models"].as_array().unwrap().len(), 3, "reference and two reward models");
    assert_eq!(step["switch"]["bytes"], step["switch"]["least_bytes"]);
    assert_eq!(step["switch"]["bytes"], v2()["reshard_bytes"]);
    let simulated = &step["simulated"];
    let seconds = simulated["seconds"].as_array().unwrap();
    let names: Vec<&str> = seconds.iter().map(|phase| phase[0].as_str().unwrap()).collect();
    assert_eq!(names, ["switch", "generate", "score", "train", "update"]);
    let sum: f64 = seconds.iter().map(|phase| number(&phase[1])).sum();
    assert!((sum / number(&simulated["step_seconds"]) - 1.0).abs() < 1e-9);
    // A rank receives at the rate of its adapter at best.
    let received = number(&step["switch"]["most_received"]) / 50e9;
    assert!(number(&seconds[0][1]) > received, "{seconds:?}");
    let exposed = number(&simulated["exposed_offload_share"]);
    assert!(exposed > 0.0 && exposed < 0.05, "{exposed}");
    let generate = &v2()["bytes"][0]["phases"]["generate"];
    assert!(generate["policy/moments"].is_null(), "moments are offloaded");
    assert!(number(&generate["policy/sampler"]) > 4e10, "DP attention and a twentieth of experts");
}

/// Machines for a small model, so that a plan takes no time.
const HARDWARE: &str = "cluster.hardware={device=\"X\", devices_per_node=2, device_memory=\"1 GiB\", \
    memory_bytes_per_second=1e9, peak_flops=1e10, dense_efficiency=0.4, moe_efficiency=0.2, efficiency_sequence=64, \
    node_bytes_per_second=1e8, node_latency_seconds=1e-6, network_bytes_per_second=1e7, network_latency_seconds=1e-5, \
    host_memory=\"1 GiB\", host_bytes_per_second=1e8, compute_dtype=\"bf16\", gradient_dtype=\"f32\", cache_bits=16, \
    published_gpu_hours=100}";

fn small(more: &[&str]) -> Value {
    let layout = ["cluster.data=2", "cluster.pipeline=2", "cluster.expert=2", HARDWARE];
    let offload = ["engine.offload=[\"optimizer\", \"reference\"]"];
    report("smoke.toml", &[&layout[..], &offload, more].concat())["plan"].clone()
}

#[test]
fn every_assumption_and_every_size_of_the_layout_acts() {
    let usual = small(&[]);
    assert_eq!(usual, small(&[]), "the same config gives the same plan");
    let without = |plan: &Value| {
        let mut plan = plan.clone();
        plan["assumptions"] = Value::Null;
        plan
    };
    for assignment in [
        "cluster.hardware.devices_per_node=1",
        "cluster.hardware.device_memory=\"1 MiB\"",
        "cluster.hardware.memory_bytes_per_second=2e9",
        "cluster.hardware.peak_flops=2e10",
        "cluster.hardware.dense_efficiency=0.5",
        "cluster.hardware.moe_efficiency=0.3",
        "cluster.hardware.efficiency_sequence=32",
        "cluster.hardware.node_bytes_per_second=1e5",
        "cluster.hardware.node_latency_seconds=0.5",
        "cluster.hardware.network_bytes_per_second=2e7",
        "cluster.hardware.network_latency_seconds=0.5",
        "cluster.hardware.host_memory=\"1 KiB\"",
        "cluster.hardware.host_bytes_per_second=2e8",
        "cluster.hardware.compute_dtype=\"f32\"",
        "cluster.hardware.gradient_dtype=\"bf16\"",
        "cluster.hardware.cache_bits=6",
        "cluster.hardware.published_gpu_hours=101",
        "cluster.data=4",
        "cluster.pipeline=1",
        "cluster.expert=1",
        "cluster.schedule=zb-h1",
        "cluster.rollout.tensor=2",
        "cluster.rollout.expert=2",
    ] {
        assert_ne!(without(&usual), without(&small(&[assignment])), "{assignment}");
    }
}

#[test]
fn without_machines_a_plan_tells_bytes_and_bubbles_and_no_hours() {
    let plan = report("smoke.toml", &["cluster.data=2", "cluster.pipeline=2"])["plan"].clone();
    assert!(number(&plan["bubble_share"]) > 0.0 && number(&plan["peak_device_bytes"]) > 0.0);
    for key in ["gpu_hours_per_trillion_tokens", "relative_error", "fits", "assumptions"] {
        assert!(plan[key].is_null(), "{key}");
    }
    assert!(plan["training"][0]["simulated"].is_null());
}

#[test]
fn tensor_parallel_sampling_repeats_the_latent_cache_and_the_plan_says_so() {
    let cache = |plan: &Value| number(&plan["bytes"][0]["phases"]["generate"]["policy/cache"]);
    let (one, two) = (small(&[]), small(&["cluster.rollout.tensor=2"]));
    assert_eq!(cache(&two), 2.0 * cache(&one), "two ranks hold the sequences of both");
    assert_eq!(
        (&one["alignment"][0]["cache_copies"], one["notes"].to_string()),
        (&1.into(), "[]".into())
    );
    assert_eq!(two["alignment"][0]["cache_copies"], 2);
    let notes = two["notes"].to_string();
    assert!(notes.contains("holds the latent cache of every sequence 2 times"), "{notes}");
    assert!(notes.contains("tensor = 1") && notes.contains("expert = 2"), "{notes}");
}

#[test]
fn what_does_not_fit_is_told_with_a_way_out() {
    let plan = small(&["cluster.hardware.device_memory=\"16 KiB\""]);
    let notes = plan["notes"].to_string();
    assert_eq!(plan["fits"], false);
    assert!(notes.contains("and the X has 16.00 KiB; try"), "{notes}");
    let plan = small(&["cluster.hardware.host_memory=\"1 KiB\""]);
    assert_eq!(plan["fits"], false);
    assert!(plan["notes"].to_string().contains("offload less"), "{}", plan["notes"]);
}

#[test]
fn a_step_of_a_billion_rollouts_is_planned_at_once_and_without_seconds() {
    let set = ["cluster.data=2", "stage.align.prompts=100000000"];
    let report = report("quickstart.toml", &set);
    let step = &report["plan"]["alignment"][1];
    // Each of 8 rollouts of a prompt has half of 56 new tokens, and the half of one that rounding adds.
    assert_eq!(number(&step["rollouts"]), 8e8);
    assert!((number(&step["new_tokens"]) / 8e8 - 28.5).abs() < 0.01, "{step}");
    let set = ["--set", "stage.align.prompts=10000000"];
    let (ok, text) = check("smoke.toml", &[&["--set", HARDWARE][..], &set].concat());
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(
        ok && text.contains("a step of 40000000 rollouts is too long to be simulated"),
        "{text}"
    );
}

#[test]
fn layouts_and_assumptions_that_cannot_be_are_refused_with_those_that_can() {
    for (set, told) in [
        ("cluster.expert=3", "does not divide cluster.data = 8; use 1, 2, 4 or 8"),
        ("cluster.pipeline=61", "the model has 60; use 60 or less"),
        ("cluster.rollout.expert=3", "does not divide the number of ranks = 128; use 1, 2"),
        ("cluster.rollout.tensor=3", "does not divide the number of ranks = 128; use 1, 2"),
        ("cluster.hardware.peak_flops=0", "must be above 0"),
        ("cluster.hardware.moe_efficiency=1.5", "is a share of peak_flops"),
        ("cluster.hardware.node_latency_seconds=1", "must lie between 0 and 1"),
        ("cluster.hardware.device_memory=0", "holds nothing"),
        ("cluster.hardware.devices_per_node=0", "must be from 1 to 1024"),
        ("cluster.hardware.cache_bits=33", "must be from 1 to 32"),
        ("cluster.hardware.compute_dtype=fp9", "did you mean"),
        ("cluster.hardware.peak_flop=1", "did you mean `peak_flops`?"),
        ("cluster.hardware={device=\"X\"}", "has no key `devices_per_node`"),
        (
            "cluster.pipeline=40 cluster.schedule=zb-v",
            "two pieces of the stack, and the model has 60 layers",
        ),
    ] {
        let extra: Vec<&str> = set.split(' ').flat_map(|set| ["--set", set]).collect();
        let (ok, text) = check(V2, &extra);
        assert!(!ok && text.contains(told), "{set:?}: {text}");
    }
}

#[test]
fn the_text_fits_a_screen_of_80_columns_and_24_lines() {
    for config in [V2, DENSE] {
        let (ok, text) = check(config, &[]);
        assert!(ok && text.contains("predicted") && text.contains("published"), "{text}");
        assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
        assert!(text.lines().count() <= 24, "{} lines:\n{text}", text.lines().count());
    }
}

#[test]
fn the_bytes_that_ranks_of_a_real_training_send_are_those_of_the_plan() {
    let model = ranks::model();
    for ([data, pipeline, expert], schedule) in [
        ([4, 1, 1], PipelineSchedule::OneForwardOneBackward),
        ([1, 3, 1], PipelineSchedule::ZeroBubbleH1),
        ([2, 2, 1], PipelineSchedule::OneForwardOneBackward),
        ([2, 3, 1], PipelineSchedule::ZeroBubbleV),
        ([4, 1, 4], PipelineSchedule::OneForwardOneBackward),
        ([4, 2, 2], PipelineSchedule::ZeroBubbleH1),
    ] {
        let documents = documents(&model, &[40; 24]);
        let tokens: usize = documents.iter().map(|document| document.tokens.len()).sum();
        let load = Load { model: &model, hardware: None, expert };
        let sizes = mesh::Load { layers: model.num_hidden_layers, experts: model.n_routed_experts };
        let mesh = Mesh::new([data, pipeline, expert], data * pipeline, sizes).unwrap();
        let training = Training::new(mesh, model.num_hidden_layers).in_chunks(schedule.chunks());
        let sampling = Sampling { ranks: mesh.ranks(), tensor: 1, expert: 1 };
        let tensors = placement::of_model(&model, false);
        let layouts = Layouts::new(training, sampling, tensors);
        let batch = Batch {
            micro_batches: 1,
            tokens: tokens as f64,
            tokens_held: tokens,
            sequence: 8,
            step_tokens: tokens as f64,
        };
        let planned = Traffic::new(&load, &mesh, &layouts.held, &batch, schedule.chunks());
        let planned =
            planned.stages + planned.gradients + planned.weights + planned.all_to_all_by_expert;
        let layout = ranks::layout(data, pipeline, expert, schedule);
        let batch = ranks::Batch::Documents(documents);
        let sent = ranks::train(&model, layout, false, 1.0, &[batch]).sent as f64;
        let difference = sent / planned - 1.0;
        println!("{data} x {pipeline}, experts over {expert}: {sent} sent, {difference:+.4}");
        // On top come sums of a few numbers, and counts of rows.
        assert!(
            (0.0..0.05).contains(&difference),
            "{data} x {pipeline}, {expert}: {planned} planned"
        );
    }
}

#[test]
fn a_step_is_drawn_and_a_model_alone_has_none() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("step.svg");
    let path = file.to_str().unwrap();
    let set = ["--set", "cluster.data=2", "--set", "cluster.pipeline=2"];
    let (ok, text) = check("smoke.toml", &[&set[..], &["--timeline", path]].concat());
    assert!(ok, "{text}");
    let svg = std::fs::read_to_string(&file).unwrap();
    assert!(svg.starts_with("<svg") && svg.contains("4 micro-batches through 2 stages"), "{svg}");
    // Three passes of each on two stages, and the background, three colours of the legend and six marks below.
    assert_eq!(svg.matches("<rect").count(), 4 * 3 * 2 + 1 + 3 + 6, "{svg}");
    let (ok, text) = check("model/smoke.json", &["--timeline", path]);
    assert!(!ok && text.contains("name a run's TOML"), "{text}");
    let (ok, text) = check("smoke.toml", &["--timeline", "/no/such/folder/x.svg"]);
    assert!(!ok && text.contains("cannot be written"), "{text}");
}
