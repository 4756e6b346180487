//! Nothing that computes goes untimed, costs are those that a naive count finds, and times add up.

use super::*;
use crate::cpu::CpuKernels;
use crate::packed::Product;
use crate::profiled::clock::ClockKind;
use std::collections::BTreeMap;
use std::time::Instant;

/// Methods that do no work on numbers, or have another do it.
const UNTIMED: [&str; 8] = [
    "name",
    "float",
    "arena",
    "scratch",
    "multiplies_integers",
    "enter",
    "cache_shape",
    "download_bytes",
];

#[test]
fn every_method_of_the_trait_is_timed_or_does_no_work() {
    let text = include_str!("../kernels.rs");
    let body = text.split_once("pub trait Kernels").expect("the trait is there").1;
    let methods: Vec<&str> = body
        .split("\n    fn ")
        .skip(1)
        .map(|rest| rest.split(['(', '<']).next().expect("a name"))
        .filter(|name| !UNTIMED.contains(name))
        .collect();
    assert!(methods.len() > 40, "{methods:?}");
    assert_eq!(methods, OPERATIONS);
}

/// Plain kernels and a profile of them.
fn profiled(threads: usize) -> (Profiled, Arc<Profile>) {
    let profile = Arc::new(Profile::new(threads));
    let plain = CpuKernels::new(threads, Arena::new(None));
    (Profiled::new(Box::new(plain), profile.clone()), profile)
}

fn floats(kernels: &dyn Kernels, rows: usize, cols: usize) -> Buffer {
    let mut buffer = kernels.arena().buffer(kernels.scratch(), DType::F32, rows, cols).unwrap();
    kernels.upload(&vec![0.5; rows * cols], &mut buffer);
    buffer
}

fn indices(kernels: &dyn Kernels, cols: usize, values: &[u32]) -> Buffer {
    let rows = values.len() / cols;
    let mut buffer = kernels.arena().buffer(kernels.scratch(), DType::U32, rows, cols).unwrap();
    kernels.upload_indices(values, &mut buffer);
    buffer
}

/// Of every activity, the counts by name.
fn counts(profile: &Profile) -> BTreeMap<(Activity, &'static str), Count> {
    let of = |one: ActivityProfile| {
        one.operations.into_iter().map(move |(name, count)| ((one.activity, name), count))
    };
    profile.activities().into_iter().flat_map(of).collect()
}

#[test]
fn operations_and_what_lies_between_them_are_the_time_of_the_clock() {
    for threads in [1, 2] {
        let (kernels, profile) = profiled(threads);
        let [x, mut y] = [0, 1].map(|_| floats(&kernels, 64, 64));
        kernels.enter(Activity::Forward);
        let outer = Instant::now();
        profile.clear();
        let inner = Instant::now();
        let spinning = || (0..20_000).fold(0.0, |sum, i| std::hint::black_box(sum + f64::from(i)));
        let mut around = 0.0;
        for _ in 0..50 {
            let began = Instant::now();
            kernels.add(&x, &mut y);
            around += began.elapsed().as_secs_f64();
            spinning();
        }
        let least = inner.elapsed().as_secs_f64();
        let found = profile.activities();
        let most = outer.elapsed().as_secs_f64();
        let forward = found.iter().find(|one| one.activity == Activity::Forward).unwrap();
        let [(name, count)] = forward.operations[..] else { panic!("{found:?}") };
        assert_eq!((name, count.calls, found.len()), ("add", 50, 1));
        let (operations, between) = (count.seconds, forward.between_seconds());
        assert!(operations > 0.0 && between > operations, "{forward:?}");
        let all = operations + between + forward.overhead_seconds;
        match profile.clock() {
            ClockKind::Wall => {
                assert!(least <= all && all <= most, "{least} {all} {most}");
                assert!(operations <= around, "{operations} {around}");
            }
            // Of the whole process, in which other tests compute.
            ClockKind::Processor => assert!(all > 0.0),
        }
        assert_eq!(profile.clock() == ClockKind::Processor, threads == 1);
    }
}

#[test]
fn an_activity_counts_its_own_calls_and_what_rests_beside_it() {
    let (kernels, profile) = profiled(2);
    let weights = kernels.arena().owner("policy", Kind::Weights);
    let held = kernels.arena().buffer(weights, DType::F32, 4096, 4).unwrap();
    let shared: Arc<dyn Kernels> = Arc::new(kernels);
    let mut x = floats(shared.as_ref(), 4, 4);
    profile.clear();
    {
        let _during = Activity::Decode.begin(&shared);
        shared.fill(&mut x, 1.0);
        shared.enter(Activity::Score);
        shared.fill(&mut x, 2.0);
        shared.fill(&mut x, 2.0);
    }
    shared.fill(&mut x, 3.0);
    let calls = |activity| counts(&profile)[&(activity, "fill")].calls;
    assert_eq!([Activity::Decode, Activity::Score, Activity::Outside].map(calls), [1, 2, 1]);
    let decode = profile.activities().into_iter().find(|one| one.activity == Activity::Decode);
    assert_eq!(decode.unwrap().resting_bytes, (held.len() * 4) as u64);
}

#[test]
fn attention_counts_the_pairs_that_are_seen_and_the_cache_rows_once() {
    let (kernels, profile) = profiled(1);
    let shape = AttentionShape {
        heads: 2,
        sharing: 2,
        key_width: 3,
        rope_width: 2,
        value_width: 3,
        head_stride: 0,
        value_offset: 0,
        scale: 0.3,
    };
    let pair = 2.0 * 2.0 * (5.0 + 3.0);
    // A stem of three rows, two replies of two and one that continue it, and a sequence of two.
    let start = [[0, 0], [0, 0], [0, 0], [3, 0], [3, 0], [5, 0], [6, 6], [6, 6]];
    let start = indices(&kernels, 2, start.as_flattened());
    let (q, kv, k_rope) = (floats(&kernels, 8, 10), floats(&kernels, 8, 3), floats(&kernels, 8, 2));
    let (mut o, mut lse) = (floats(&kernels, 8, 6), floats(&kernels, 8, 2));
    kernels.mla_train(&shape, &q, &kv, &k_rope, &start, &mut o, &mut lse).unwrap();
    let seen = f64::from((1 + 2 + 3) + (4 + 5) + 4 + (1 + 2));
    let train = counts(&profile)[&(Activity::Outside, "mla_train")].cost;
    assert_eq!(train.flops, pair * seen);
    assert_eq!(train.passing, 4.0 * f64::from(8 * (2 + 10 + 3 + 2 + 6 + 2)));

    // Two rows share page 1 of two tokens; the second goes on to page 2, the third has page 0.
    let cache = floats(&kernels, 8, 5);
    let tables = indices(&kernels, 2, &[1, 0, 1, 2, 0, 0]);
    let (sequence, length) = (indices(&kernels, 1, &[0, 1, 2]), indices(&kernels, 1, &[2, 3, 1]));
    let batch =
        DecodeBatch { tables: &tables, sequence: &sequence, length: &length, page_tokens: 2 };
    let layout = CacheLayout { format: Default::default(), latent: 3, rope: 2 };
    let spec = CacheSpec { layout, channels: None };
    let (q, mut o) = (floats(&kernels, 3, 10), floats(&kernels, 3, 6));
    kernels.mla_decode(&shape, &q, &spec, &cache, &batch, &mut o).unwrap();
    let decode = counts(&profile)[&(Activity::Outside, "mla_decode")].cost;
    assert_eq!((decode.flops, decode.resting), (pair * 6.0, 4.0 * 5.0 * 4.0));

    // Keys 4 to 7 of a prompt, of which rows of length 3, 6 and 20 see 0, 2 and all four.
    let (kv, k_rope) = (floats(&kernels, 4, 3), floats(&kernels, 4, 2));
    let (length, mut lse) = (indices(&kernels, 1, &[3, 6, 20]), floats(&kernels, 3, 2));
    kernels
        .mla_prefill(&shape, &q, &kv, &k_rope, 4, &length, &mut o, &mut lse, Store::Set)
        .unwrap();
    let prefill = counts(&profile)[&(Activity::Outside, "mla_prefill")].cost;
    assert_eq!(prefill.flops, pair * 6.0);
}

#[test]
fn experts_count_slots_and_the_weights_of_those_that_have_any() {
    let (kernels, profile) = profiled(1);
    // Four tokens choose two of four experts each; nobody takes expert 3, and one pair was dropped.
    let chosen = indices(&kernels, 2, &[0, 1, 0, 2, 1, crate::DROPPED, 2, 0]);
    let routes = kernels.routes(&chosen, 4).unwrap();
    let weight = floats(&kernels, 4 * 16, 32);
    let pack = Pack::blocks(Product::Transposed, &weight, 4);
    let packed = kernels.pack(kernels.scratch(), &weight, pack, WeightFormat::F32, 1).unwrap();
    let (x, mut y) = (floats(&kernels, 7, 32), floats(&kernels, 7, 16));
    kernels.linear_experts(&x, &packed, &routes, &mut y);
    let cost = counts(&profile)[&(Activity::Outside, "linear_experts")].cost;
    assert_eq!((cost.flops, cost.shape), (2.0 * f64::from(7 * 32 * 16), [32, 16]));
    assert_eq!(cost.resting, 0.75 * packed.bytes() as f64);
    assert_eq!(cost.passing, f64::from(4 * 7 * (32 + 16)));
}

#[test]
fn a_roof_is_what_takes_longer_of_products_and_bytes_where_they_lie() {
    let all_threads = crate::Rates {
        threads: 1,
        f32_flops_per_second: 100.0,
        int8_ops_per_second: 400.0,
        l2_bytes_per_second: 30.0,
        l3_bytes_per_second: 20.0,
        dram_bytes_per_second: Some(10.0),
        ..Default::default()
    };
    let machine = crate::Machine {
        l2_cache_bytes: 50,
        l3_cache_bytes: 500,
        all_threads,
        ..Default::default()
    };
    let activity = |resting_bytes| ActivityProfile {
        activity: Activity::Decode,
        seconds: 1.0,
        overhead_seconds: 0.0,
        resting_bytes,
        operations: Vec::new(),
    };
    let seconds = |flops: f64, is_int8: bool, resting_bytes: u64, passing: f64| {
        let recomputed = flops / 2.0;
        let cost = Cost { flops, recomputed, is_int8, resting: 60.0, passing, shape: [0, 0] };
        let count = Count { calls: 2, seconds: 1.0, cost };
        activity(resting_bytes).roof_seconds(&count, &machine)
    };
    assert_eq!(seconds(1000.0, false, 50, 0.0), 15.0);
    assert_eq!(seconds(1000.0, true, 50, 0.0), 3.75);
    assert_eq!([50, 51, 501].map(|rests| seconds(0.0, false, rests, 0.0)), [2.0, 3.0, 6.0]);
    // 90 bytes in two calls: each call's fit into the second cache, all together do not.
    assert_eq!(seconds(0.0, false, 50, 90.0), 2.0 + 3.0);
}
