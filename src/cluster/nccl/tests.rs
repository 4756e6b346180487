//! What NCCL is used for, with threads as ranks and a table in place of GPUs: the calls that a GPU makes stand in
//! `rehearsal_kernels::cuda` and are tested there, where there is one.

use super::*;
use crate::cluster::Local;
use crate::cluster::link::Operation;
use crate::cluster::progress::Work;
use rehearsal_kernels::MappedFiles;
use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

const PATIENCE: Duration = Duration::from_secs(20);

/// Payloads under way, by sender and receiver.
type UnderWay = BTreeMap<(usize, usize), VecDeque<Vec<u8>>>;

/// What is under way, and what was done.
#[derive(Default)]
struct Table {
    under_way: Mutex<UnderWay>,
    joined: Mutex<Vec<Vec<u8>>>,
    carried: AtomicUsize,
    aborted: AtomicUsize,
}

/// What goes wrong with a rank's GPU.
#[derive(Clone, Copy, PartialEq)]
enum Fault {
    None,
    Absent,
    Shared,
    Silent,
    Broken,
}

struct Fake {
    table: Arc<Table>,
    rank: usize,
    fault: Fault,
}

struct FakeCommunicator {
    device: Fake,
    ranks: usize,
    into: Option<Vec<(usize, usize)>>,
}

impl Device for Fake {
    type Communicator = FakeCommunicator;
    fn name(&self) -> String {
        format!("gpu of {}", self.rank)
    }
    fn uuid(&self) -> Result<[u8; 16], String> {
        Ok([if self.fault == Fault::Shared { 0 } else { self.rank as u8 }; 16])
    }
    fn unique_id(&self) -> Result<Vec<u8>, String> {
        assert_eq!(self.rank, 0, "only rank 0 makes an id");
        Ok(b"the id".to_vec())
    }
    fn connect(self, id: &[u8], rank: usize, ranks: usize) -> Result<FakeCommunicator, String> {
        assert_eq!(rank, self.rank);
        self.table.joined.lock().unwrap().push(id.to_vec());
        Ok(FakeCommunicator { device: self, ranks, into: None })
    }
    fn host_memory(&self) -> Arc<dyn HostMemory> {
        Arc::new(MappedFiles)
    }
}

impl Communicator for FakeCommunicator {
    fn begin(&mut self, out: &[(usize, Vec<u8>)], into: &[(usize, usize)]) -> Result<(), String> {
        let (table, rank) = (&self.device.table, self.device.rank);
        let out = if self.device.fault == Fault::Silent { &[] } else { out };
        let mut under_way = table.under_way.lock().unwrap();
        for (to, payload) in out {
            assert!(payload.len() >= SHORTEST, "a short payload is not worth a copy");
            table.carried.fetch_add(payload.len(), Ordering::Relaxed);
            under_way.entry((rank, *to)).or_default().push_back(payload.clone());
        }
        self.into = Some(into.to_vec());
        Ok(())
    }

    fn poll(&mut self) -> Result<bool, String> {
        let (table, rank) = (&self.device.table, self.device.rank);
        let Some(into) = &self.into else {
            return Ok(table.joined.lock().unwrap().len() == self.ranks);
        };
        match self.device.fault {
            Fault::Silent => return Ok(false),
            Fault::Broken => return Err("unhandled cuda error".to_string()),
            _ => {}
        }
        let under_way = table.under_way.lock().unwrap();
        let has_come = |(from, length): &(usize, usize)| {
            let first = under_way.get(&(*from, rank)).and_then(VecDeque::front);
            first.is_some_and(|payload| payload.len() == *length)
        };
        Ok(into.iter().all(has_come))
    }

    fn take(&mut self) -> Vec<Vec<u8>> {
        let mut under_way = self.device.table.under_way.lock().unwrap();
        let into = self.into.take().expect("an exchange is through");
        let mut first =
            |from: usize| under_way.get_mut(&(from, self.device.rank)).unwrap().pop_front();
        into.into_iter().map(|(from, _)| first(from).unwrap()).collect()
    }

    fn abort(&mut self) {
        self.device.table.aborted.fetch_add(1, Ordering::Relaxed);
    }
}

/// Joins so many ranks with the faults that `fault` says, and runs `work` on those that did.
fn on_ranks<T: Send>(
    ranks: usize,
    deadline: Duration,
    fault: impl Fn(usize) -> Fault + Sync,
    work: impl Fn(&Group, &dyn Link) -> T + Sync,
) -> (Vec<anyhow::Result<T>>, Arc<Table>) {
    let table = Arc::new(Table::default());
    let results = thread::scope(|scope| {
        let start = |link: Local| {
            let (table, fault, work) = (table.clone(), &fault, &work);
            scope.spawn(move || {
                let (rank, below) = (link.rank(), Arc::new(link));
                let open = || match fault(rank) {
                    Fault::Absent => Err("no cuda device: there is none".to_string()),
                    fault => Ok(Fake { table, rank, fault }),
                };
                let nccl = Arc::new(Nccl::join(below, ranks, PATIENCE, open)?);
                assert_eq!(nccl.gpus()[ranks - 1], format!("gpu of {}", ranks - 1));
                let group = Group::new(nccl.clone(), (0..ranks).collect(), deadline);
                Ok(work(&group, &*nccl))
            })
        };
        let threads: Vec<_> = Local::new(ranks).into_iter().map(start).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    (results, table)
}

fn none(_: usize) -> Fault {
    Fault::None
}

fn value(rank: usize, i: usize) -> f32 {
    ((rank * 7919 + i * 104_729) % 1000) as f32 * 0.37 - 150.0
}

#[test]
fn sums_over_nccl_have_the_bits_of_sums_over_the_link_whatever_goes_which_way() {
    // Parts that all go beside the link, of which one is shorter and does not, and none.
    for (elements, goes_beside) in
        [(3 * SHORTEST / 4, true), (3 * SHORTEST / 4 - 1, true), (90, false)]
    {
        let (sums, table) = on_ranks(3, PATIENCE, none, |group, _| {
            let mut values: Vec<f32> = (0..elements).map(|i| value(group.own(), i)).collect();
            group.all_reduce("gradients", &mut values).unwrap();
            values.iter().map(|x| x.to_bits()).collect::<Vec<_>>()
        });
        let naive = |i| (1..3).fold(value(0, i), |sum, rank| sum + value(rank, i)).to_bits();
        let expected: Vec<u32> = (0..elements).map(naive).collect();
        assert!(sums.into_iter().all(|sum| sum.unwrap() == expected), "{elements}");
        assert_eq!(table.carried.load(Ordering::Relaxed) > 0, goes_beside);
        assert_eq!(*table.joined.lock().unwrap(), vec![b"the id".to_vec(); 3]);
    }
}

#[test]
fn each_pair_of_ranks_goes_the_way_that_its_payload_is_long_enough_for() {
    // Lengths that differ by pair, from nothing to several times the shortest.
    let length = |from: usize, to: usize| (2 * from + to) % 5 * SHORTEST / 2;
    let (got, table) = on_ranks(4, PATIENCE, none, |group, _| {
        let own = group.own();
        for _ in 0..3 {
            let payload = |to: usize| vec![(10 * own + to) as u8; length(own, to)];
            let sent = group.send_to_all("rows", Operation::AllToAll, 0, 4, payload).unwrap();
            for (from, bytes) in sent.take().unwrap().into_iter().enumerate() {
                let expected =
                    (from != own).then(|| vec![(10 * from + own) as u8; length(from, own)]);
                assert!(bytes == expected, "from {from} to {own}");
            }
        }
        group.gather("figures", 0, vec![own as u8; 2 * SHORTEST]).unwrap().len()
    });
    assert_eq!(got.into_iter().map(Result::unwrap).collect::<Vec<_>>(), [4, 0, 0, 0]);
    let pairs = (0..4).flat_map(|from| (0..4).map(move |to| (from, to)));
    let long = pairs.filter(|(from, to)| from != to).map(|(from, to)| length(from, to));
    let expected: usize = long.filter(|length| *length >= SHORTEST).sum();
    assert_eq!(table.carried.load(Ordering::Relaxed), 3 * expected);
}

fn call() -> Call {
    let (name, operation) = ("another".to_string(), Operation::AllToAll);
    Call { name, operation, number: 9, elements: 0, width: 4 }
}

fn exchange(group: &Group) -> Broken {
    let sent = group.send_to_all("sums", Operation::AllToAll, 0, 4, |_| vec![1; SHORTEST]);
    sent.and_then(|sent| sent.take()).unwrap_err()
}

#[test]
fn a_transfer_that_does_not_end_is_aborted_at_its_deadline_and_named_on_all_ranks() {
    let began = Instant::now();
    let silent = |rank| if rank == 1 { Fault::Silent } else { Fault::None };
    let deadline = Duration::from_secs(1);
    let (errors, table) = on_ranks(3, deadline, silent, |group, link| {
        let why = exchange(group);
        assert_eq!(link.stopped(), Some(why.clone()));
        // No communicator is left that anything could wait for.
        let again = link.carrier().unwrap().exchange(&call(), &[], &[], PATIENCE);
        assert_eq!(again, Err(why.clone()));
        why.to_string()
    });
    let errors: Vec<String> = errors.into_iter().map(Result::unwrap).collect();
    for text in &errors {
        assert!(
            text.contains("AllToAll") && text.contains("made progress for 1 s: rank"),
            "{text}"
        );
        assert_eq!(*text, errors[0]);
    }
    assert!(began.elapsed() < Duration::from_secs(10));
    assert_eq!(table.aborted.load(Ordering::Relaxed), 3);
}

#[test]
fn a_rank_that_works_before_it_comes_is_waited_for_and_told_of() {
    let deadline = Duration::from_millis(600);
    let (results, _) = on_ranks(3, deadline, none, |group, link| {
        let sent = group.send_to_all("sums", Operation::AllToAll, 0, 4, |_| vec![1; SHORTEST]);
        let (sent, began, mut told) = (sent.unwrap(), Instant::now(), false);
        while group.own() == 1 && began.elapsed() < 3 * deadline {
            thread::sleep(deadline / 20);
            link.board().made(1, Work::Forward);
            told |= link.board().waits(0).is_some_and(|waited| waited.rank == 1);
        }
        let is_whole = sent.take().unwrap().iter().flatten().all(|part| part.len() == SHORTEST);
        (is_whole, told == (group.own() == 1))
    });
    assert!(results.into_iter().all(|result| result.unwrap() == (true, true)));
}

#[test]
fn an_error_of_nccl_gives_way_to_a_link_that_knows_who_is_gone() {
    let broken = |_| Fault::Broken;
    let gone = Broken::Gone { rank: 0, gone: 1, found: "its control link closed".to_string() };
    let (errors, _) = on_ranks(2, PATIENCE, broken, |group, link| {
        if group.own() == 1 {
            // Its frame comes, and then no more of it.
            let sent = group.send_to_all("sums", Operation::AllToAll, 0, 4, |_| vec![1; SHORTEST]);
            drop(sent.unwrap());
            thread::sleep(Duration::from_millis(300));
            link.stop(&gone);
            return gone.clone();
        }
        exchange(group)
    });
    assert!(errors.into_iter().all(|why| why.unwrap() == gone));
    let (errors, table) = on_ranks(2, PATIENCE, broken, |group, _| exchange(group).to_string());
    for text in errors.into_iter().map(Result::unwrap) {
        assert!(text.contains("NCCL failed") && text.contains("unhandled cuda error"), "{text}");
    }
    assert_eq!(table.aborted.load(Ordering::Relaxed), 2);
}

#[test]
fn ranks_at_different_calls_are_named_and_nothing_is_exchanged() {
    let (errors, table) = on_ranks(2, PATIENCE, none, |group, _| {
        let mut values = vec![1.0_f32; SHORTEST + group.own()];
        group.all_reduce("gradients of stage 0", &mut values).unwrap_err().to_string()
    });
    for text in errors.into_iter().map(Result::unwrap) {
        assert!(text.contains("65536 elements") && text.contains("65537 elements"), "{text}");
    }
    assert_eq!(table.carried.load(Ordering::Relaxed), 0);
}

#[test]
fn a_rank_without_a_gpu_or_with_anothers_ends_the_run_on_all_in_the_same_words() {
    let refusals = |fault: fn(usize) -> Fault| {
        let (results, table) = on_ranks(3, PATIENCE, fault, |_, _| ());
        assert!(table.joined.lock().unwrap().is_empty(), "nobody joins alone");
        let errors: Vec<_> = results.into_iter().map(|result| result.unwrap_err()).collect();
        assert!(errors.iter().all(|e| e.to_string() == errors[0].to_string()), "{errors:?}");
        assert!(matches!(errors[2].downcast_ref(), Some(crate::config::Fault::User(_))));
        errors[0].to_string()
    };
    let text = refusals(|rank| if rank == 1 { Fault::Absent } else { Fault::None });
    assert!(text.starts_with("rank 1: cluster.backend = \"nccl\": no cuda device"), "{text}");
    assert!(text.ends_with("or leave the key out: exchanges then go over MPI"), "{text}");
    let text = refusals(|rank| if rank == 2 { Fault::Shared } else { Fault::None });
    assert!(text.contains("ranks 0 and 2 have the same GPU, gpu of 2"), "{text}");
}
