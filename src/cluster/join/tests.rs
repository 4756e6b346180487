//! Joining and control links, with threads as ranks and TCP on the loopback between them.

use super::*;
use crate::cluster::progress::Seen;
use crate::cluster::{Board, Letter, Local, Work};
use std::sync::mpsc::Receiver;
use std::thread;

const PATIENCE: Duration = Duration::from_secs(20);

fn ident(rank: usize) -> Ident {
    Ident {
        host: "here".to_string(),
        pid: 100 + rank as u32,
        processes: 3,
        binary: "b".repeat(64),
        config: BTreeMap::from([("seed".to_string(), "1".to_string())]),
        memory: Some(1000 - rank as u64),
        lacks_integers: rank == 1,
    }
}

/// Joins so many ranks, each as `ident` says.
fn joined(
    ranks: usize,
    silence: Duration,
    ident: impl Fn(usize) -> Ident + Sync,
) -> Vec<Result<Joined, Broken>> {
    thread::scope(|scope| {
        let start = |(rank, link): (usize, Local)| {
            let ident = &ident;
            let stop = Arc::new(Stop::default());
            scope.spawn(move || join(&link, ranks, &ident(rank), [PATIENCE, silence], stop))
        };
        let threads: Vec<_> = Local::new(ranks).into_iter().enumerate().map(start).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn run(ranks: usize, silence: Duration) -> Vec<Joined> {
    joined(ranks, silence, ident)
        .into_iter()
        .map(|rank| rank.unwrap_or_else(|e| panic!("{e}")))
        .collect()
}

/// Waits until a rank stops, and tells why.
fn why(joined: &Joined) -> Broken {
    let (told, wait) = channel();
    joined.control.stop().on_stop(move |why| drop(told.send(why.clone())));
    wait.recv_timeout(PATIENCE).expect("the rank stops")
}

fn letters(joined: &Joined) -> Receiver<(usize, Letter)> {
    let (heard, letters) = channel();
    let heard = std::sync::Mutex::new(heard);
    joined.control.listen(move |from, letter| {
        heard.lock().unwrap().send((from, letter)).map_err(|error| error.to_string())
    });
    letters
}

#[test]
fn ranks_know_each_other_and_their_letters_arrive_in_order() {
    let ranks = run(3, PATIENCE);
    for joined in &ranks {
        assert_eq!(joined.names[2], "process 102 on here");
        assert_eq!(joined.memory, Some(998), "the least of all ranks");
        assert_eq!(joined.lack_integers, [1]);
    }
    let letter = |correlation| Letter { correlation, body: vec![correlation as u8; 1 << 20] };
    // Before anybody listens.
    ranks[1].control.send(0, &letter(0)).unwrap();
    let at_zero = letters(&ranks[0]);
    (1..4).for_each(|number| ranks[1].control.send(0, &letter(number)).unwrap());
    for number in 0..4 {
        assert_eq!(at_zero.recv_timeout(PATIENCE).unwrap(), (1, letter(number)));
    }
    let at_two = letters(&ranks[2]);
    ranks[0].control.send(2, &letter(9)).unwrap();
    assert_eq!(at_two.recv_timeout(PATIENCE).unwrap(), (0, letter(9)));
}

#[test]
fn why_one_rank_stops_is_told_to_all_in_the_same_words() {
    let ranks = run(3, PATIENCE);
    let apart = Broken::Apart {
        rank: 2,
        call: "gradients".to_string(),
        other: 1,
        theirs: "a barrier".to_string(),
    };
    ranks[2].control.stop().set(&apart);
    ranks.iter().for_each(|rank| assert_eq!(why(rank), apart));
    let refused = ranks[0].control.send(1, &Letter { correlation: 0, body: Vec::new() });
    assert_eq!(refused, Err(apart), "nothing goes on");
}

#[test]
fn a_rank_that_goes_without_leave_is_named_on_all_others_and_one_with_leave_is_not() {
    let mut ranks = run(3, PATIENCE);
    drop(ranks.pop());
    for rank in &ranks {
        let why = why(rank);
        assert!(matches!(why, Broken::Gone { gone: 2, .. }), "{why}");
        assert!(why.to_string().contains("process 102 on here"), "{why}");
    }
    let mut ranks = run(2, Duration::from_millis(400));
    let last = ranks.pop().unwrap();
    ranks[0].control.leave();
    last.control.leave();
    last.control.flush();
    drop(last);
    thread::sleep(Duration::from_millis(600));
    assert_eq!(ranks[0].control.stop().why(), None);
}

/// A sign of life that tells so many pieces of work of ranks.
fn beat(ranks: &[(usize, u64)]) -> Vec<u8> {
    let seen = |count| Seen { count, last: Work::Forward, waits: None };
    let told: Vec<(usize, Seen)> =
        ranks.iter().map(|(rank, count)| (*rank, seen(*count))).collect();
    [&[0][..], &encode(&BTreeMap::from([("Beat", told)]))].concat()
}

#[test]
fn silence_is_named_at_its_deadline_and_a_beat_is_none() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (mut silent, _) = listener.accept().unwrap();
    let secret = Secret { key: [1; 32], epoch: 2 };
    let stop = Arc::new(Stop::default());
    let (close, open) = (Seal::new(secret, 0, 1), Seal::new(secret, 1, 0));
    let connection = Connection { rank: 1, name: "process 7 on there".into(), stream, close, open };
    let deadline = Duration::from_secs(1);
    let board = Board::new(3);
    let control = Control::new(0, vec![connection], deadline, board.clone(), stop.clone()).unwrap();
    assert_eq!(board.patience(deadline), deadline + Duration::from_millis(125), "two beats");
    let began = Instant::now();
    // It speaks for some time, and then no more.
    let mut seal = Seal::new(secret, 1, 0);
    for count in 0..8 {
        thread::sleep(Duration::from_millis(200));
        silent.write_all(&seal.close(&beat(&[(1, count), (2, 9), (7, 9)]))).unwrap();
    }
    while board.count(1) < 7 && began.elapsed() < PATIENCE {
        thread::sleep(LOOK);
    }
    assert_eq!(stop.why(), None, "it was heard");
    assert_eq!([0, 1, 2].map(|rank| board.count(rank)), [0, 7, 0], "it tells of itself alone");
    let joined = Joined { control, names: Vec::new(), memory: None, lack_integers: Vec::new() };
    let why = why(&joined);
    assert!(matches!(why, Broken::Silent { missing: 1, seconds: 1, .. }), "{why}");
    for part in ["process 7 on there", "; the last that it did was a layer's forward pass"] {
        assert!(why.to_string().contains(part), "{why}");
    }
    assert!(began.elapsed() > Duration::from_millis(2500));
}

#[test]
fn why_all_stop_is_told_to_a_rank_that_takes_no_letters() {
    let (control, mut other, secret) = linked();
    let letter = Letter { correlation: 3, body: vec![7; 1 << 16] };
    // It reads nothing: first the system's buffers are full, then the outbox.
    let refused = loop {
        if let Err(refused) = control.send(1, &letter) {
            break refused.to_string();
        }
    };
    assert!(
        refused.contains("1024 letters to rank 1 are on their way; it takes none"),
        "{refused}"
    );
    let why = Broken::Failed { rank: 0, why: "no room left: x".to_string(), code: 4 };
    control.stop().set(&why);
    other.set_read_timeout(Some(PATIENCE)).unwrap();
    let expected = [&[0][..], &encode(&BTreeMap::from([("Stop", why)]))].concat();
    let mut open = Seal::new(secret, 0, 1);
    let mut carried = || {
        let frame = read_frame(&mut other, 1 << 20).unwrap()?;
        Some(open.open(&frame).unwrap().to_vec())
    };
    let until = Instant::now() + PATIENCE;
    let mut read = std::iter::from_fn(&mut carried).take_while(|_| Instant::now() < until);
    assert!(read.any(|carried| carried == expected));
}

/// Rank 0's control links with rank 1, whose end is in the test's hands.
fn linked() -> (Arc<Control>, TcpStream, Secret) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (other, _) = listener.accept().unwrap();
    let (secret, stop) = (Secret { key: [1; 32], epoch: 2 }, Arc::new(Stop::default()));
    let (close, open) = (Seal::new(secret, 0, 1), Seal::new(secret, 1, 0));
    let connection = Connection { rank: 1, name: "process 7 on there".into(), stream, close, open };
    let control = Control::new(0, vec![connection], PATIENCE, Board::new(2), stop).unwrap();
    (control, other, secret)
}

/// What rank 0 makes of bytes from rank 1.
fn refused(frames: impl FnOnce(Secret) -> Vec<Vec<u8>>) -> String {
    let (control, mut other, secret) = linked();
    frames(secret).iter().for_each(|frame| other.write_all(frame).unwrap());
    why(&Joined { control, names: Vec::new(), memory: None, lack_integers: Vec::new() }).to_string()
}

#[test]
fn a_frame_without_the_secret_of_another_run_or_replayed_is_refused_by_name() {
    let beat = beat(&[]);
    let text = refused(|secret| {
        let wrong = Secret { key: [9; 32], ..secret };
        vec![Seal::new(wrong, 1, 0).close(&beat)]
    });
    assert!(
        text.contains("rank 1, process 7 on there: a frame with a wrong tag; refused"),
        "{text}"
    );
    let text = refused(|secret| vec![Seal::new(Secret { epoch: 3, ..secret }, 1, 0).close(&beat)]);
    assert!(text.contains("a frame of run 0000000000000003"), "{text}");
    let text = refused(|secret| vec![Seal::new(secret, 1, 0).close(&beat); 2]);
    assert!(text.contains("frame 0, where 1 is next"), "{text}");
    let text = refused(|_| vec![u32::MAX.to_le_bytes().to_vec()]);
    assert!(text.contains("bytes, where 268435456 are the most"), "{text}");
    let text = refused(|secret| vec![Seal::new(secret, 1, 0).close(&[7, 7])]);
    assert!(text.contains("a frame of no known kind"), "{text}");
}

#[test]
fn another_binary_or_config_is_refused_on_every_rank_with_what_differs() {
    let refusals = |change: fn(&mut Ident)| {
        let changed = move |rank| {
            let mut ident = ident(rank);
            if rank == 2 {
                change(&mut ident);
            }
            ident
        };
        let ranks = joined(3, PATIENCE, changed);
        let texts: Vec<String> = ranks.into_iter().map(|r| r.err().unwrap().to_string()).collect();
        assert!(texts.iter().all(|text| *text == texts[0]), "{texts:?}");
        texts[0].clone()
    };
    let text = refusals(|ident| ident.binary = "c".repeat(64));
    assert!(text.starts_with("rank 2: process 102 on here is not taken: its binary"), "{text}");
    assert!(text.contains("cccccccccccc") && text.contains("bbbbbbbbbbbb"), "{text}");
    let text = refusals(|ident| drop(ident.config.insert("seed".into(), "2".into())));
    assert!(text.contains("seed = 2 instead of 1"), "{text}");
    let text = refusals(|ident| drop(ident.config.insert("cluster.data".into(), "4".into())));
    assert!(text.contains("cluster.data = 4 instead of nothing"), "{text}");
    let text = refusals(|ident| ident.processes = 5);
    assert!(text.contains("it was told of 5 processes, rank 0 of 3"), "{text}");
}

const SHORT: Duration = Duration::from_millis(300);

#[test]
fn a_rank_that_does_not_answer_is_named_on_all_others() {
    // Rank 2 is there and says nothing.
    let mut links = Local::new(3).into_iter();
    let (zero, one, _two) = (links.next().unwrap(), links.next().unwrap(), links.next().unwrap());
    let deadlines = [SHORT, PATIENCE];
    let join = |link, rank| join(link, 3, &ident(rank), deadlines, Arc::default()).err().unwrap();
    let told = thread::scope(|scope| {
        let other = scope.spawn(|| join(&one, 1));
        [join(&zero, 0), other.join().unwrap()]
    });
    assert!(matches!(told[0], Broken::Absent { rank: 0, missing: 2, .. }), "{}", told[0]);
    assert_eq!(told[0], told[1], "rank 1 waits for rank 0, and hears whom that one waited for");
    let text = told[0].to_string();
    assert!(
        text.starts_with("rank 2 did not answer rank 0") && text.contains("who is there"),
        "{text}"
    );
}

#[test]
fn a_rank_whose_control_link_does_not_come_is_named_on_all_others() {
    // Rank 2 answers over the link only.
    let mut links = Local::new(3).into_iter();
    let (zero, one, two) = (links.next().unwrap(), links.next().unwrap(), links.next().unwrap());
    let join = |link: &Local, rank, deadline, stop| {
        join(link, 3, &ident(rank), [deadline, PATIENCE], stop)
    };
    let joining =
        Joining { link: &two, ranks: 3, longest: PATIENCE, until: Instant::now() + PATIENCE };
    joining.send(0, "who is there", &ident(2)).unwrap();
    let (zero_told, one_told) = thread::scope(|scope| {
        let other = scope.spawn(|| why(&join(&one, 1, PATIENCE, Arc::default()).unwrap()));
        let told = join(&zero, 0, 3 * SHORT, Arc::default()).err().unwrap();
        (told, other.join().unwrap())
    });
    assert_eq!(zero_told, one_told, "rank 1 has joined");
    assert!(matches!(zero_told, Broken::Absent { rank: 0, missing: 2, .. }), "{zero_told}");
    assert!(
        zero_told.to_string().contains("the control link of process 102 on here"),
        "{zero_told}"
    );
    // And rank 0 where nobody listens any more, or somebody else does.
    let terms: Terms = match joining.receive(0, "who is taken").unwrap() {
        Verdict::Taken(terms) => terms,
        Verdict::Refused(why) => panic!("{why}"),
    };
    let joining = Joining { until: Instant::now() + SHORT, ..joining };
    let why = joining.connect(&terms, &ident(2)).err().unwrap();
    assert!(matches!(why, Broken::Absent { rank: 2, missing: 0, .. }), "{why}");
    assert!(why.to_string().contains(&format!("127.0.0.1:{}", terms.port)), "{why}");
}

#[test]
fn a_routing_table_tells_the_host_s_own_addresses() {
    let table = "Main:\n  +-- 0.0.0.0/0 3 0 5\n     |-- 0.0.0.0\n        /0 universe UNICAST\n     |-- 10.77.0.1\n        \
                 /32 host LOCAL\n     |-- 10.77.0.255\n        /32 link BROADCAST\n     |-- 127.0.0.1\n        /32 host LOCAL\n";
    let expected = [Ipv4Addr::new(10, 77, 0, 1), Ipv4Addr::LOCALHOST];
    assert_eq!(local_addresses(table), expected);
    assert!(own_addresses().ends_with(&[Ipv4Addr::LOCALHOST]));
}
