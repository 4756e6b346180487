//! Tests of the count, the budget and the pool.

use super::*;

#[test]
fn holdings_follow_buffers_and_the_budget_refuses() {
    let arena = Arena::new(Some(64 * 1024));
    let weights = arena.owner("policy", Kind::Weights);
    let first = arena.buffer(weights, DType::F32, 1, 8 * 1024).unwrap();
    assert_eq!(arena.held_by(Kind::Weights), 32 * 1024);
    let refused = arena.buffer(weights, DType::F32, 1, 16 * 1024).unwrap_err();
    assert!(refused.to_string().contains("policy weights"), "{refused}");
    drop(first);
    assert_eq!(arena.held(), 0);
    assert_eq!(arena.high_water(), 32 * 1024);
}

#[test]
fn buffers_in_one_piece_are_disjoint_and_counted_once() {
    let arena = Arena::new(Some(64 * 1024));
    let cache = arena.owner("policy", Kind::Cache);
    let mut buffers = arena.buffers(cache, DType::F32, 3, 1000, 4).unwrap();
    let addresses: Vec<usize> = buffers.iter().map(|buffer| buffer.address()).collect();
    assert!(addresses.windows(2).all(|pair| pair[1] - pair[0] == 12 * 1024), "{addresses:?}");
    assert_eq!(arena.held_by(Kind::Cache), 48 * 1024);
    assert!(arena.buffers(cache, DType::F32, 3, 1000, 2).is_err(), "the budget holds for all");
    buffers.truncate(1);
    assert_eq!(arena.held_by(Kind::Cache), 48 * 1024, "the piece stays while a part of it does");
    drop(buffers);
    assert_eq!(
        (arena.in_use(), arena.held()),
        (0, 48 * 1024),
        "a cache is there for its next time"
    );
    arena.trim();
    assert_eq!(arena.held(), 0);
}

#[test]
fn requests_of_ever_other_sizes_do_not_pile_up() {
    let arena = Arena::new(None);
    let scratch = arena.owner("step", Kind::Activations);
    let mut largest = 0;
    for step in 0..200 {
        let rows = 500 + 37 * step % 499;
        let live: Vec<Buffer> =
            (1..4).map(|i| arena.buffer(scratch, DType::F32, i * rows, 64).unwrap()).collect();
        largest = largest.max(live.iter().map(|b| (b.len() * 4) as u64).sum());
        drop(live);
    }
    assert!(arena.high_water() < 2 * largest, "{} {largest}", arena.high_water());
    assert_eq!(arena.holdings().values().sum::<u64>(), arena.held());
    arena.trim();
    assert_eq!(arena.held(), 0);
}

#[test]
fn pooled_activations_are_reused_and_trimmed() {
    let arena = Arena::new(None);
    let scratch = arena.owner("step", Kind::Activations);
    let address = arena.buffer(scratch, DType::F32, 10, 1000).unwrap().address();
    let held = arena.held();
    let again = arena.buffer(scratch, DType::F32, 1000, 10).unwrap();
    assert_eq!((again.address(), arena.held()), (address, held));
    drop(again);
    arena.trim();
    assert_eq!(arena.held(), 0);
}

#[test]
fn who_is_short_asks_for_room_as_long_as_some_is_made() {
    let arena = Arena::new(Some(64 * 1024));
    let owner = arena.owner("policy", Kind::Weights);
    let idle = Arc::new(Mutex::new(Vec::new()));
    for _ in 0..4 {
        idle.lock().unwrap().push(arena.buffer(owner, DType::F32, 1, 4 * 1024).unwrap());
    }
    let (shelf, asked) = (idle.clone(), Arc::new(Mutex::new(Vec::new())));
    let log = asked.clone();
    arena.ask_for_room(Some(Arc::new(move |missing| {
        log.lock().unwrap().push(missing);
        shelf.lock().unwrap().pop().is_some()
    })));
    {
        let _modest = arena.modest(true);
        assert!(arena.buffer(owner, DType::F32, 1, 8 * 1024).is_err(), "who can do with less");
    }
    assert!(asked.lock().unwrap().is_empty());
    let cache = arena.owner("policy", Kind::Cache);
    arena.allow_working(Some(4096));
    assert!(arena.buffer(cache, DType::F32, 1, 2048).is_ok(), "not for who must have it");
    {
        let _modest = arena.modest(true);
        assert!(arena.buffer(cache, DType::F32, 1, 1024).is_ok());
        assert!(arena.buffer(cache, DType::F32, 1, 2048).is_err(), "more than is allowed");
    }
    arena.allow_working(None);
    arena.trim();
    asked.lock().unwrap().clear();
    while idle.lock().unwrap().len() < 4 {
        idle.lock().unwrap().push(arena.buffer(owner, DType::F32, 1, 4 * 1024).unwrap());
    }
    let large = arena.buffer(owner, DType::F32, 1, 8 * 1024).unwrap();
    assert_eq!(*asked.lock().unwrap(), [32 * 1024, 16 * 1024]);
    assert_eq!(idle.lock().unwrap().len(), 2);
    drop(large);
    assert!(arena.buffer(owner, DType::F32, 1, 17 * 1024).is_err(), "more than there is");
    assert!(idle.lock().unwrap().is_empty() && arena.high_water() <= 64 * 1024);
}

#[test]
fn the_working_peak_counts_what_is_in_use_beside_weights_and_moments() {
    let arena = Arena::new(None);
    let (weights, cache) =
        (arena.owner("policy", Kind::Weights), arena.owner("policy", Kind::Cache));
    let _kept = arena.buffer(weights, DType::F32, 1, 1024).unwrap();
    drop(arena.buffer(cache, DType::F32, 1, 2048).unwrap());
    assert_eq!(arena.working_peak(), 8192);
    assert_eq!(arena.working_peak(), 0, "what waits in the pool is not in use");
    let _again = arena.buffer(cache, DType::F32, 1, 2048).unwrap();
    assert_eq!([arena.working_peak(), arena.working_peak()], [8192, 8192]);
}

#[test]
fn under_a_budget_larger_regions_serve_as_far_as_its_waste_goes() {
    const PAGE: usize = 4096;
    let served = |budget: Option<u64>| {
        let arena = Arena::new(budget);
        let owner = arena.owner("scratch", Kind::Activations);
        let buffer = |pages: usize| arena.buffer(owner, DType::U8, pages * PAGE, 1).unwrap();
        drop([buffer(12), buffer(12)]);
        let both = [buffer(10), buffer(10)];
        let used = (arena.in_use() / PAGE as u64, arena.most_used() / PAGE as u64);
        drop(both);
        assert_eq!(arena.lock().wasted, 0);
        used
    };
    assert_eq!(served(None), (24, 24));
    // Of 128 pages two are a 64th.
    assert_eq!(served(Some(128 * PAGE as u64)), (22, 24));
    assert_eq!(served(Some(127 * PAGE as u64)), (20, 24));
}
