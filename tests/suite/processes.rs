//! Several processes over MPI: collectives as over threads, transfers beside computation, deadlines, and who is named when a
//! rank dies, hangs, or is at another call.
//!
//! A test starts this binary under mpirun, where [`as_a_rank`] makes the check that the environment names. Without MPI the
//! tests fail: `.ci/run` installs it.

use crate::mpirun::{CHECK, check_command, ranks_check, text};
use rehearsal::cluster::link::{Call, Frame, Lane, Operation};
use rehearsal::cluster::{
    Broken, Group, Ident, Joined, Link, Mpi, Stop, Work, join, made, work_for,
};
use rustix::process::{Signal, getpid, kill_process};
use std::sync::Arc;
use std::time::{Duration, Instant};

const DEADLINE: Duration = Duration::from_secs(20);

/// What a rank has to work with.
struct Rank {
    mpi: Arc<Mpi>,
    stop: Arc<Stop>,
}

impl Rank {
    fn start(piece: Option<usize>) -> Rank {
        let stop = Arc::new(Stop::default());
        let mpi = match piece {
            Some(bytes) => Mpi::start_in_pieces(DEADLINE, stop.clone(), bytes).unwrap(),
            None => Mpi::start(DEADLINE, stop.clone()).unwrap(),
        };
        Rank { mpi, stop }
    }

    fn rank(&self) -> usize {
        self.mpi.rank()
    }

    fn group(&self, deadline: Duration) -> Group {
        Group::new(self.mpi.clone(), (0..self.mpi.ranks()).collect(), deadline)
    }

    /// Makes the ranks a run whose control links bear a silence of two seconds.
    fn join(&self) -> Joined {
        let ident = Ident { host: "here".to_string(), pid: std::process::id(), ..Ident::default() };
        let deadlines = [DEADLINE, Duration::from_secs(2)];
        join(self.mpi.as_ref(), self.mpi.ranks(), &ident, deadlines, self.stop.clone()).unwrap()
    }

    /// Says that the check is through, and leaves.
    fn passed(self, check: &str) {
        println!("rank {} passed {check}", self.rank());
        assert!(self.mpi.leave(DEADLINE), "the others leave too: {:?}", self.stop.why());
    }
}

/// Not a test by itself: what each rank does.
#[test]
fn as_a_rank() {
    let Ok(check) = std::env::var(CHECK) else { return };
    match check.as_str() {
        "collectives" => collectives(Rank::start(None)),
        "pieces" => collectives(Rank::start(Some(999))),
        "lanes" => lanes(Rank::start(None)),
        "overlap" => overlap(Rank::start(None)),
        "late" => late(Rank::start(None)),
        "slow" => slow(Rank::start(None)),
        "stuck" => stuck(Rank::start(None)),
        "apart" => apart(Rank::start(None)),
        "killed" => lost(Rank::start(None), Signal::KILL),
        "stopped" => lost(Rank::start(None), Signal::STOP),
        "speed" => speed(Rank::start(None)),
        other => panic!("no check {other:?}"),
    }
}

fn value(rank: usize, i: usize) -> f32 {
    ((rank * 7919 + i * 104_729) % 1000) as f32 * 0.37 - 150.0
}

/// Sums have the bits of a sum in order of the ranks; parts travel to whom they are for.
fn collectives(rank: Rank) {
    let (group, ranks) = (rank.group(DEADLINE), rank.mpi.ranks());
    for elements in [0, 1, 3, 17, 1000, 100_000] {
        let mut values: Vec<f32> = (0..elements).map(|i| value(group.own(), i)).collect();
        group.all_reduce("gradients", &mut values).unwrap();
        let naive = |i| (1..ranks).fold(value(0, i), |sum, rank| sum + value(rank, i));
        for (i, value) in values.iter().enumerate() {
            assert_eq!(value.to_bits(), naive(i).to_bits(), "element {i} of {elements}");
        }
    }
    let own = group.own();
    for round in 0..20 {
        let part = |from: usize, to: usize| vec![(10 * from + to) as u32; (from + to + round) % 3];
        let values: Vec<Vec<u32>> = (0..ranks).map(|to| part(own, to)).collect();
        let expected: Vec<Vec<u32>> = (0..ranks).map(|from| part(from, own)).collect();
        assert_eq!(group.all_to_all("tokens", &values).unwrap(), expected);
        let mut word = [own as u64; 3];
        group.broadcast("plan", ranks - 1, &mut word).unwrap();
        assert_eq!(word, [ranks as u64 - 1; 3]);
        group.barrier("end").unwrap();
    }
    rank.passed("collectives");
}

fn frame(lane: Lane, number: u64, bytes: Vec<u8>) -> Frame {
    let call = Call {
        name: "activations".to_string(),
        operation: Operation::Pass,
        number,
        elements: bytes.len(),
        width: 1,
    };
    Frame { lane, call, bytes }
}

/// Frames keep their order within a lane, long ones and short ones, and those of another lane wait.
fn lanes(rank: Rank) {
    let (own, ranks) = (rank.rank(), rank.mpi.ranks());
    let bytes = |lane: usize, number: u64| {
        if (lane + number as usize).is_multiple_of(2) { 700_000 } else { 5 }
    };
    let lanes = [Lane::Up(0), Lane::Down(0), Lane::Up(1)];
    let to = (own + 1) % ranks;
    for number in 0..6 {
        for (at, lane) in lanes.into_iter().enumerate() {
            let frame = frame(lane, number, vec![number as u8; bytes(at, number)]);
            rank.mpi.send(to, frame).unwrap();
        }
    }
    let from = (own + ranks - 1) % ranks;
    for (at, lane) in lanes.into_iter().enumerate().rev() {
        for number in 0..6 {
            let wanted = frame(lane, number, Vec::new()).call;
            let got = rank.mpi.receive(from, lane, &wanted, DEADLINE).unwrap();
            assert_eq!((got.lane, got.call.number), (lane, number));
            assert!(got.bytes == vec![number as u8; bytes(at, number)], "{lane:?} {number}");
        }
    }
    rank.passed("lanes");
}

/// A frame arrives while its sender computes and calls nothing.
fn overlap(rank: Rank) {
    rank.group(DEADLINE).barrier("begin").unwrap();
    let began = Instant::now();
    let call = frame(Lane::Up(0), 0, Vec::new()).call;
    if rank.rank() == 0 {
        rank.mpi.send(1, frame(Lane::Up(0), 0, vec![3; 4 << 20])).unwrap();
        while began.elapsed() < Duration::from_millis(1500) {
            std::hint::black_box(value(1, 2));
        }
    } else {
        rank.mpi.receive(0, Lane::Up(0), &call, DEADLINE).unwrap();
        let seconds = began.elapsed().as_secs_f64();
        assert!(seconds < 1.2, "it came after {seconds} s, when the sender was through");
    }
    rank.group(DEADLINE).barrier("end").unwrap();
    rank.passed("overlap");
}

/// Who does not come is named at the deadline.
fn late(rank: Rank) {
    let group = rank.group(Duration::from_secs(1));
    group.barrier("begin").unwrap();
    let began = Instant::now();
    let last = rank.mpi.ranks() - 1;
    if rank.rank() == last {
        while began.elapsed() < Duration::from_millis(1900) {
            std::thread::yield_now();
        }
    } else {
        let why = group.barrier("step 7").unwrap_err();
        assert!(
            matches!(why, Broken::Late { missing, seconds: 1, .. } if missing == last),
            "{why}"
        );
        assert!(why.to_string().contains("step 7"), "{why}");
        assert!(began.elapsed() < Duration::from_millis(1800), "{:?}", began.elapsed());
    }
    println!("rank {} passed late", rank.rank());
    // mpirun ends all others when the first one goes without leave.
    while began.elapsed() < Duration::from_millis(2500) {
        std::thread::yield_now();
    }
    std::process::exit(0);
}

/// A silence of two seconds is borne. A rank that works for five, piece by piece, is waited for: in a call with it, and by
/// one that waits for another that waits for it. Rank 0 tells them of each other.
fn slow(rank: Rank) {
    let joined = rank.join();
    let group = rank.group(Duration::from_secs(2));
    group.barrier("begin").unwrap();
    work_for(rank.mpi.board(), rank.rank());
    let (last, began) = (rank.mpi.ranks() - 1, Instant::now());
    if rank.rank() == last {
        for _ in 0..10 {
            std::thread::sleep(Duration::from_millis(500));
            made(Work::Backward);
        }
    }
    let seconds = Duration::from_secs(2);
    let pair = |ranks: [usize; 2]| Group::new(rank.mpi.clone(), ranks.to_vec(), seconds);
    if rank.rank() > 0 {
        pair([1, last]).barrier("gradients").unwrap();
    }
    if rank.rank() < 2 {
        pair([0, 1]).barrier("tokens").unwrap();
    }
    group.barrier("end").unwrap();
    assert!(began.elapsed() > Duration::from_secs(5), "{:?}", began.elapsed());
    joined.control.leave();
    rank.passed("slow");
}

/// A rank that does nothing any more, though its process speaks, is named on all others: also on one that waits for another.
fn stuck(rank: Rank) {
    let joined = rank.join();
    let deadline = Duration::from_secs(2);
    rank.group(DEADLINE).barrier("begin").unwrap();
    let (last, began) = (rank.mpi.ranks() - 1, Instant::now());
    let pair = |ranks: [usize; 2], deadline| Group::new(rank.mpi.clone(), ranks.to_vec(), deadline);
    let why = match rank.rank() {
        // Rank 0 alone would give up, and cannot see more of the last rank than what is told.
        0 => pair([0, 1], deadline).barrier("tokens").unwrap_err(),
        1 => pair([1, last], DEADLINE).barrier("gradients").unwrap_err(),
        _ => {
            rank.mpi.board().made(last, Work::Pack);
            while began.elapsed() < Duration::from_secs(5) {
                std::thread::yield_now();
            }
            rank.stop.why().expect("it was named, and hears of it")
        }
    };
    let seconds = began.elapsed().as_secs_f64();
    assert!(rank.rank() == last || seconds < 4.0, "after {seconds} s: {why}");
    assert!(matches!(why, Broken::Late { rank: 0, missing, .. } if missing == last), "{why}");
    let text = why.to_string();
    for part in ["tokens for rank 1, which waits in", "gradients for rank 2", "to pack a layer's"] {
        assert!(text.contains(part), "{text}");
    }
    println!("rank {} passed after {seconds:.2} s: {why}", rank.rank());
    joined.control.flush();
    while began.elapsed() < Duration::from_secs(6) {
        std::thread::yield_now();
    }
    std::process::exit(0);
}

/// Who is at another call is named on every rank, though only one of them sees it.
fn apart(rank: Rank) {
    let joined = rank.join();
    let group = rank.group(DEADLINE);
    let elements = if rank.rank() == 1 { 8 } else { 9 };
    let why = group.all_reduce("gradients of stage 0", &mut vec![1.0_f32; elements]).unwrap_err();
    let text = why.to_string();
    for part in ["gradients of stage 0", "8 elements", "9 elements", "rank 1"] {
        assert!(text.contains(part), "{text}");
    }
    println!("rank {} passed apart", rank.rank());
    // The words of the first rank are on their way to all others.
    joined.control.flush();
    wait_for_all(&rank);
}

/// mpirun ends all others when the first one goes without leave.
fn wait_for_all(rank: &Rank) {
    std::thread::sleep(Duration::from_millis(500 + 200 * rank.rank() as u64));
    std::process::exit(0);
}

/// A rank that dies, or is stopped, is named on all others within the silence that is borne.
fn lost(rank: Rank, signal: Signal) {
    let _joined = rank.join();
    let group = rank.group(DEADLINE);
    group.barrier("begin").unwrap();
    let (began, last) = (Instant::now(), rank.mpi.ranks() - 1);
    let ready = frame(Lane::Up(0), 0, Vec::new());
    if rank.rank() < last {
        rank.mpi.send(last, ready).unwrap();
    } else {
        // Not before all others have left the barrier, where they would hear of it.
        for other in 0..last {
            rank.mpi.receive(other, ready.lane, &ready.call, DEADLINE).unwrap();
        }
        kill_process(getpid(), signal).unwrap();
        // The signal may come to another thread first; this one must not go on.
        loop {
            std::thread::park();
        }
    }
    let why = group.all_reduce("gradients", &mut [1.0_f32; 5]).unwrap_err();
    let seconds = began.elapsed().as_secs_f64();
    let (is_named, longest) = match (signal, &why) {
        (Signal::KILL, Broken::Gone { gone, .. }) => (*gone == last, 1.0),
        (Signal::STOP, Broken::Silent { missing, .. } | Broken::Late { missing, .. }) => {
            (*missing == last, 4.0)
        }
        _ => (false, 0.0),
    };
    assert!(is_named && seconds < longest, "after {seconds} s: {why}");
    println!("rank {} passed after {seconds:.2} s: {why}", rank.rank());
    wait_for_all(&rank);
}

/// CPU seconds of this process so far.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    [11, 12].iter().map(|field| fields[*field].parse::<f64>().unwrap() / 100.0).sum()
}

/// Figures, not a test: latency, the cost of a wait, and of 4 MiB all-reduced.
fn speed(rank: Rank) {
    let group = rank.group(DEADLINE);
    let timed = |name: &str, times: u32, work: &dyn Fn()| {
        group.barrier("begin").unwrap();
        let (began, cpu) = (Instant::now(), cpu_seconds());
        (0..times).for_each(|_| work());
        let each = 1e6 / f64::from(times);
        let (wall, cpu) = (began.elapsed().as_secs_f64() * each, (cpu_seconds() - cpu) * each);
        if rank.rank() == 0 {
            println!("{name}: {wall:.0} us, {cpu:.0} us of CPU on rank 0");
        }
    };
    timed("barrier", 1000, &|| group.barrier("now").unwrap());
    let numbers = vec![1.0_f32; 1 << 20];
    timed("all-reduce of 4 MiB", 20, &|| group.all_reduce("sum", &mut numbers.clone()).unwrap());
    timed("wait of 5 s", 1, &|| {
        if rank.rank() == 1 {
            std::thread::sleep(Duration::from_secs(5));
        }
        group.barrier("wait").unwrap();
    });
    timed("nothing for 5 s", 1, &|| std::thread::sleep(Duration::from_secs(5)));
    rank.passed("speed");
}

/// Every rank makes the check, passes it and takes leave.
fn check_passes(ranks: usize, check: &str) {
    let output = ranks_check(ranks, check);
    assert!(output.status.success(), "{}", text(&output));
    check_passed(ranks, &text(&output));
}

/// So many ranks, from the first on, say that they passed.
pub fn check_passed(ranks: usize, said: &str) {
    let passed = (0..ranks).filter(|rank| said.contains(&format!("rank {rank} passed")));
    assert_eq!(passed.count(), ranks, "{said}");
}

#[test]
fn collectives_over_mpi_are_those_over_threads() {
    [2, 4, 8].into_iter().for_each(|ranks| check_passes(ranks, "collectives"));
}

#[test]
fn frames_longer_than_a_message_go_in_pieces() {
    check_passes(3, "pieces");
}

#[test]
fn frames_keep_their_order_within_a_lane() {
    check_passes(3, "lanes");
    // Where memory is not shared a long frame is still coming when the short one after it is there.
    let output = check_command(3, &["--mca", "btl", "self,tcp"], "lanes").output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    check_passed(3, &text(&output));
}

#[test]
fn a_frame_arrives_while_its_sender_computes() {
    check_passes(2, "overlap");
}

#[test]
fn a_process_that_does_not_come_is_named_at_the_deadline() {
    check_passed(3, &text(&ranks_check(3, "late")));
}

#[test]
fn a_process_that_works_for_longer_than_the_deadline_is_waited_for() {
    check_passes(3, "slow");
}

#[test]
fn a_process_that_is_stuck_is_named_by_one_that_waits_for_who_waits_for_it() {
    check_passed(3, &text(&ranks_check(3, "stuck")));
}

#[test]
fn a_process_at_another_call_is_named_on_all_of_them() {
    check_passed(4, &text(&ranks_check(4, "apart")));
}

#[test]
fn a_process_that_is_killed_is_named_on_all_others_at_once() {
    // mpirun is to leave the others alone, so that they can tell.
    let output = check_command(4, &["--enable-recovery"], "killed").output().unwrap();
    check_passed(3, &text(&output));
}

#[test]
fn a_process_that_hangs_is_named_on_all_others_within_the_deadline() {
    check_passed(2, &text(&ranks_check(3, "stopped")));
}
