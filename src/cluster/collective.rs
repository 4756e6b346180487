//! Collectives: what ranks of a group do together with numbers, each call with a name, and a deadline for ranks that stand still.
//!
//! Sums have one order: each rank adds the parts that it is responsible for in order of the ranks, and hands the sum to
//! all others. So a sum has the same bits on all ranks and for any link, and each number is sent twice at most, which is as
//! little as can be.
//!
//! Invariants:
//!   * all ranks of a group make the same calls in the same order; the first that sees otherwise tells all of them
//!   * after an error no rank of the run goes on

use super::carrier::{Carrier, announce, announced};
use super::link::{Broken, Call, Frame, Lane, Link, Operation};
use super::mesh::cut;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Ranks that work together, as one of them sees it.
pub struct Group {
    link: Arc<dyn Link>,
    ranks: Vec<usize>,
    own: usize,
    calls: AtomicU64,
    deadline: Duration,
}

/// A number that travels.
pub trait Number: Copy + Default + std::ops::AddAssign + 'static {
    /// Its bytes.
    const WIDTH: usize;
    /// Appends its bytes.
    fn write(self, to: &mut Vec<u8>);
    /// Reads it from as many bytes.
    fn read(from: &[u8]) -> Self;
}

macro_rules! number {
    ($($kind:ty),*) => {$(
        impl Number for $kind {
            const WIDTH: usize = size_of::<$kind>();
            fn write(self, to: &mut Vec<u8>) {
                to.extend_from_slice(&self.to_le_bytes());
            }
            fn read(from: &[u8]) -> Self {
                <$kind>::from_le_bytes(from.try_into().expect("cut to its width"))
            }
        }
    )*};
}
number!(u8, f32, f64, u32, u64);

impl Group {
    /// The group of `ranks`, this link's among them; no call waits longer than `deadline` for a rank that makes no progress.
    pub fn new(link: Arc<dyn Link>, ranks: Vec<usize>, deadline: Duration) -> Group {
        let own = ranks.iter().position(|rank| *rank == link.rank()).expect("a group of its own");
        Group { link, ranks, own, calls: AtomicU64::new(0), deadline }
    }

    /// The ranks, in the order of sums.
    pub fn ranks(&self) -> &[usize] {
        &self.ranks
    }

    /// This rank's place among them.
    pub fn own(&self) -> usize {
        self.own
    }

    /// Waits until all ranks are here.
    pub fn barrier(&self, name: &str) -> Result<(), Broken> {
        let turn = self.begin::<u32>(name, Operation::Barrier, 0);
        turn.exchange(|_| Vec::new()).map(drop)
    }

    /// The numbers of the rank at place `from`, on all ranks.
    pub fn broadcast<T: Number>(
        &self,
        name: &str,
        from: usize,
        values: &mut [T],
    ) -> Result<(), Broken> {
        let turn = self.begin::<T>(name, Operation::Broadcast, values.len());
        if from != self.own {
            let frame = turn.receive(from)?;
            return turn.unpack(from, &frame, values);
        }
        (0..self.ranks.len())
            .filter(|to| *to != from)
            .try_for_each(|to| turn.send(to, pack(values)))
    }

    /// The part of `values` that the rank at `place` answers for.
    pub fn part(&self, elements: usize, place: usize) -> Range<usize> {
        cut(elements, self.ranks.len(), place)
    }

    /// Replaces this rank's part of `values` by the sum over all ranks; the others' parts stay.
    pub fn reduce_scatter<T: Number>(&self, name: &str, values: &mut [T]) -> Result<(), Broken> {
        let turn = self.begin::<T>(name, Operation::ReduceScatter, values.len());
        let parts = turn.exchange(|to| pack(&values[self.part(values.len(), to)]))?;
        let own = self.part(values.len(), self.own);
        let mut sum = vec![T::default(); own.len()];
        let mut other = vec![T::default(); own.len()];
        for (place, frame) in parts.iter().enumerate() {
            match frame {
                Some(frame) => turn.unpack(place, frame, &mut other)?,
                None => other.copy_from_slice(&values[own.clone()]),
            }
            for (sum, other) in sum.iter_mut().zip(&other) {
                // The first summand is taken as it is: 0 + -0 would lose the sign.
                if place == 0 {
                    *sum = *other;
                } else {
                    *sum += *other;
                }
            }
        }
        values[own].copy_from_slice(&sum);
        Ok(())
    }

    /// Replaces each rank's part of `values` by what that rank has there.
    pub fn all_gather<T: Number>(&self, name: &str, values: &mut [T]) -> Result<(), Broken> {
        let turn = self.begin::<T>(name, Operation::AllGather, values.len());
        let own = pack(&values[self.part(values.len(), self.own)]);
        let parts = turn.exchange(|_| own.clone())?;
        for (place, frame) in parts.iter().enumerate() {
            if let Some(frame) = frame {
                let part = self.part(values.len(), place);
                turn.unpack(place, frame, &mut values[part])?;
            }
        }
        Ok(())
    }

    /// Replaces `values` by the sum over all ranks.
    pub fn all_reduce<T: Number>(&self, name: &str, values: &mut [T]) -> Result<(), Broken> {
        self.reduce_scatter(name, values)?;
        self.all_gather(name, values)
    }

    /// Sends each other rank its bytes. What they have for this one is taken with [`Sent::take`], with other work between.
    pub fn send_to_all(
        &self,
        name: &str,
        operation: Operation,
        elements: usize,
        width: usize,
        bytes: impl Fn(usize) -> Vec<u8>,
    ) -> Result<Sent<'_>, Broken> {
        let turn = self.turn(name, operation, elements, width);
        let beside = turn.send_to_all(bytes)?;
        Ok(Sent { turn, beside })
    }

    /// What all ranks have, in order of the ranks, at the rank of place `to`; nothing at the others.
    pub fn gather(&self, name: &str, to: usize, own: Vec<u8>) -> Result<Vec<Vec<u8>>, Broken> {
        let turn = self.begin::<u8>(name, Operation::Gather, 0);
        if self.own != to {
            return turn.send(to, own).map(|()| Vec::new());
        }
        let mut own = Some(own);
        let taken = |from| match from == to {
            true => Ok(own.take().expect("one place is the own one")),
            false => turn.receive(from).map(|frame| frame.bytes),
        };
        (0..self.ranks.len()).map(taken).collect()
    }

    /// What each rank has for this one, in order of the ranks, for what this one has for each.
    pub fn all_to_all<T: Number>(
        &self,
        name: &str,
        values: &[Vec<T>],
    ) -> Result<Vec<Vec<T>>, Broken> {
        assert_eq!(values.len(), self.ranks.len(), "all-to-all: something for each rank");
        // How many there are is the sender's to know; the call is the same for all.
        let turn = self.begin::<T>(name, Operation::AllToAll, 0);
        let parts = turn.exchange(|to| pack(&values[to]))?;
        let taken = |(place, frame): (usize, Option<Frame>)| match frame {
            Some(frame) => frame.bytes.chunks_exact(T::WIDTH).map(T::read).collect(),
            None => values[place].clone(),
        };
        Ok(parts.into_iter().enumerate().map(taken).collect())
    }

    fn begin<T: Number>(&self, name: &str, operation: Operation, elements: usize) -> Turn<'_> {
        self.turn(name, operation, elements, T::WIDTH)
    }

    fn turn(&self, name: &str, operation: Operation, elements: usize, width: usize) -> Turn<'_> {
        let number = self.calls.fetch_add(1, Ordering::Relaxed);
        let call = Call { name: name.to_string(), operation, number, elements, width };
        Turn { group: self, call }
    }
}

/// A call whose bytes are sent and whose answers are still to be taken.
pub struct Sent<'a> {
    turn: Turn<'a>,
    beside: Beside,
}

/// What a carrier takes to which places once all ranks are at the call.
type Beside = Vec<(usize, Vec<u8>)>;

impl Sent<'_> {
    /// The other ranks' bytes, in order of the ranks; `None` in this rank's own place. Waits until they are here.
    pub fn take(self) -> Result<Vec<Option<Vec<u8>>>, Broken> {
        let bytes = |frame: Option<Frame>| frame.map(|frame| frame.bytes);
        Ok(self.turn.receive_from_all(self.beside)?.into_iter().map(bytes).collect())
    }
}

/// One call of one group.
struct Turn<'a> {
    group: &'a Group,
    call: Call,
}

impl Turn<'_> {
    fn send(&self, to: usize, bytes: Vec<u8>) -> Result<(), Broken> {
        let frame = Frame { lane: Lane::Groups, call: self.call.clone(), bytes };
        let sent = self.group.link.send(self.group.ranks[to], frame);
        sent.inspect_err(|why| self.group.link.stop(why))
    }

    fn receive(&self, from: usize) -> Result<Frame, Broken> {
        let (link, other) = (&self.group.link, self.group.ranks[from]);
        let frame = link.receive(other, Lane::Groups, &self.call, self.group.deadline);
        let frame = frame.inspect_err(|why| link.stop(why))?;
        if frame.call == self.call {
            return Ok(frame);
        }
        self.apart(from, &frame.call.to_string())
    }

    fn apart<T>(&self, other: usize, theirs: &str) -> Result<T, Broken> {
        let why = Broken::Apart {
            rank: self.group.link.rank(),
            call: self.call.to_string(),
            other: self.group.ranks[other],
            theirs: theirs.to_string(),
        };
        self.group.link.stop(&why);
        Err(why)
    }

    fn send_to_all(&self, bytes: impl Fn(usize) -> Vec<u8>) -> Result<Beside, Broken> {
        let (own, count) = (self.group.own, self.group.ranks.len());
        let carrier = self.group.link.carrier();
        let mut beside = Vec::new();
        // Each begins with its right neighbour, so that not all send to the same rank at once.
        for to in (1..count).map(|step| (own + step) % count) {
            let mut frame = bytes(to);
            if let Some(carrier) = carrier {
                let (announced, payload) = announce(frame, carrier.shortest());
                beside.extend(payload.map(|payload| (to, payload)));
                frame = announced;
            }
            self.send(to, frame)?;
        }
        Ok(beside)
    }

    /// The others' frames; `None` in this rank's own place.
    fn receive_from_all(&self, beside: Beside) -> Result<Vec<Option<Frame>>, Broken> {
        let (own, count) = (self.group.own, self.group.ranks.len());
        let frame = |from| if from == own { Ok(None) } else { self.receive(from).map(Some) };
        let frames = (0..count).map(frame).collect::<Result<_, _>>()?;
        match self.group.link.carrier() {
            Some(carrier) => self.receive_beside(carrier, beside, frames),
            None => Ok(frames),
        }
    }

    /// Takes what frames announce from the carrier, which gives the others what was announced to them.
    fn receive_beside(
        &self,
        carrier: &dyn Carrier,
        beside: Beside,
        mut frames: Vec<Option<Frame>>,
    ) -> Result<Vec<Option<Frame>>, Broken> {
        let rank = |place: usize| self.group.ranks[place];
        let (mut places, mut into) = (Vec::new(), Vec::new());
        for (place, frame) in frames.iter_mut().enumerate() {
            let Some(frame) = frame else { continue };
            match announced(&mut frame.bytes) {
                Some(None) => {}
                Some(Some(length)) => {
                    places.push(place);
                    into.push((rank(place), length));
                }
                None => return self.apart(place, &format!("{} with no payload", frame.call)),
            }
        }
        if beside.is_empty() && into.is_empty() {
            return Ok(frames);
        }
        let out: Vec<_> = beside.into_iter().map(|(to, payload)| (rank(to), payload)).collect();
        // Everybody is at the call by now, so that the deadline begins anew.
        let taken = carrier.exchange(&self.call, &out, &into, self.group.deadline)?;
        for (place, bytes) in places.into_iter().zip(taken) {
            frames[place].as_mut().expect("it announced a payload").bytes = bytes;
        }
        Ok(frames)
    }

    fn exchange(&self, bytes: impl Fn(usize) -> Vec<u8>) -> Result<Vec<Option<Frame>>, Broken> {
        let beside = self.send_to_all(bytes)?;
        self.receive_from_all(beside)
    }

    fn unpack<T: Number>(&self, from: usize, frame: &Frame, to: &mut [T]) -> Result<(), Broken> {
        if frame.bytes.len() != to.len() * T::WIDTH {
            return self.apart(from, &format!("{} with {} bytes", frame.call, frame.bytes.len()));
        }
        for (to, bytes) in to.iter_mut().zip(frame.bytes.chunks_exact(T::WIDTH)) {
            *to = T::read(bytes);
        }
        Ok(())
    }
}

fn pack<T: Number>(values: &[T]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(values.len() * T::WIDTH);
    values.iter().for_each(|value| value.write(&mut bytes));
    bytes
}

#[cfg(test)]
mod tests {
    use super::super::local::Local;
    use super::*;
    use std::thread;
    use std::time::Instant;

    /// Runs `work` on each of so many ranks, each with the group of all.
    fn on_ranks<T: Send>(ranks: usize, work: impl Fn(&Group) -> T + Sync) -> Vec<T> {
        let links = Local::new(ranks);
        thread::scope(|scope| {
            let start = |link| {
                let work = &work;
                scope.spawn(move || {
                    let group =
                        Group::new(Arc::new(link), (0..ranks).collect(), Duration::from_secs(1));
                    work(&group)
                })
            };
            let threads: Vec<_> = links.into_iter().map(start).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }

    fn value(rank: usize, i: usize) -> f32 {
        ((rank * 7919 + i * 104_729) % 1000) as f32 * 0.37 - 150.0
    }

    #[test]
    fn sums_have_the_same_bits_on_all_ranks_in_the_order_of_the_ranks() {
        for ranks in 1..6 {
            for elements in [0, 1, 3, 17, 100] {
                let sums = on_ranks(ranks, |group| {
                    let mut values: Vec<f32> =
                        (0..elements).map(|i| value(group.own(), i)).collect();
                    group.all_reduce("gradients", &mut values).unwrap();
                    values.iter().map(|x| x.to_bits()).collect::<Vec<_>>()
                });
                let naive =
                    |i| (1..ranks).fold(value(0, i), |sum, rank| sum + value(rank, i)).to_bits();
                let expected: Vec<u32> = (0..elements).map(naive).collect();
                assert!(
                    sums.iter().all(|sum| *sum == expected),
                    "{ranks} ranks, {elements} elements"
                );
            }
        }
    }

    #[test]
    fn parts_travel_to_whom_they_are_for() {
        let got = on_ranks(4, |group| {
            let own = group.own();
            let to = |place: usize| vec![(10 * own + place) as u32; (own + place) % 3];
            let parts = group.all_to_all("tokens", &(0..4).map(to).collect::<Vec<_>>()).unwrap();
            let mut word = [own as u64; 3];
            group.broadcast("plan", 2, &mut word).unwrap();
            group.barrier("end").unwrap();
            let gathered = group.gather("figures", 1, vec![own as u8; own]).unwrap();
            let all: Vec<Vec<u8>> = (0..4).map(|rank| vec![rank as u8; rank]).collect();
            assert_eq!(gathered, if own == 1 { all } else { Vec::new() });
            (parts, word)
        });
        for (own, (parts, word)) in got.into_iter().enumerate() {
            let from = |place: usize| vec![(10 * place + own) as u32; (own + place) % 3];
            assert_eq!((parts, word), ((0..4).map(from).collect(), [2; 3]));
        }
    }

    #[test]
    fn ranks_at_different_calls_are_named_on_every_rank() {
        let errors = on_ranks(3, |group| {
            let mut values = vec![1.0_f32; if group.own() == 1 { 8 } else { 9 }];
            group.all_reduce("gradients of stage 0", &mut values).unwrap_err().to_string()
        });
        for error in &errors {
            assert!(error.contains("8 elements") && error.contains("9 elements"), "{errors:?}");
            assert!(error.contains("gradients of stage 0") && error.contains("rank 1"), "{error}");
        }
        let errors = on_ranks(2, |group| {
            if group.own() == 0 {
                group.barrier("commit").unwrap_err().to_string()
            } else {
                group.all_gather("weights", &mut [0.0_f32; 4]).unwrap_err().to_string()
            }
        });
        assert!(
            errors.iter().all(|e| e.contains("Barrier") && e.contains("AllGather")),
            "{errors:?}"
        );
    }

    #[test]
    fn a_rank_that_does_not_come_is_named_within_the_deadline_on_all_others() {
        let began = Instant::now();
        let errors = on_ranks(3, |group| {
            if group.own() == 2 {
                // Still there, but busy with something else.
                while began.elapsed() < Duration::from_millis(1200) {
                    thread::yield_now();
                }
                return None;
            }
            group.barrier("step 7").err()
        });
        assert!(began.elapsed() < Duration::from_secs(3));
        for error in errors[..2].iter().flatten() {
            assert!(matches!(error, Broken::Late { missing: 2, seconds: 1, .. }), "{error}");
        }
        assert!(errors[0].is_some() && errors[1].is_some() && errors[2].is_none());
    }

    #[test]
    fn a_rank_that_ended_is_named_at_once() {
        let began = Instant::now();
        let errors = on_ranks(3, |group| match group.own() {
            2 => None,
            _ => group.all_reduce("gradients", &mut [1.0_f32; 5]).err(),
        });
        assert!(began.elapsed() < Duration::from_millis(900), "no deadline was waited for");
        let named = |error: &Option<Broken>| matches!(error, Some(Broken::Gone { gone: 2, .. }));
        assert!(errors[..2].iter().all(named), "{errors:?}");
    }
}
