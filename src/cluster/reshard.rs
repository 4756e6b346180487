//! What a change of layout sends: which rank sends which part of which tensor to whom (deepseek_v2.md 4.5).
//!
//! Pure data; who executes it is somebody else. A rank that holds a part already copies it and receives nothing, every
//! other part is received once, from the holder that has sent least so far.
//!
//! Invariants (checked against brute force):
//!   * after the plan every rank has what it wants, bit for bit, and no element is received twice
//!   * no plan sends fewer elements: what is sent is what ranks want and do not hold
//!   * in a round nobody sends, and nobody receives, more than a bucket

use super::layout::{Slice, Tensor};
use std::ops::Range;

/// A part on its way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Moved {
    /// Rank that holds it.
    pub from: usize,
    /// Rank that wants it.
    pub to: usize,
    /// The part.
    pub part: Slice,
}

/// A change of layout.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Parts that stay on their rank.
    pub kept: Vec<(usize, Slice)>,
    /// What goes together, in order.
    pub rounds: Vec<Vec<Moved>>,
}

/// Ranks want a part that nobody holds.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("rank {to} wants rows {rows:?} of tensor {tensor}, which no rank holds")]
pub struct Missing {
    /// Who wants it.
    pub to: usize,
    /// Index of the tensor.
    pub tensor: usize,
    /// Its rows.
    pub rows: Range<usize>,
}

impl Plan {
    /// From what each rank holds to what each wants, with at most `bucket` elements sent and received by a rank at once
    /// (a row that is longer than a bucket goes alone).
    pub fn new(
        tensors: &[Tensor],
        held: &[Vec<Slice>],
        wanted: &[Vec<Slice>],
        bucket: usize,
    ) -> Result<Plan, Missing> {
        let mut plan = Plan::default();
        let mut sent = vec![0; held.len()];
        let mut moves = Vec::new();
        let (holders, wants) = (by_tensor(tensors.len(), held), by_tensor(tensors.len(), wanted));
        for (tensor, (holders, wants)) in holders.iter().zip(&wants).enumerate() {
            for (to, want) in wants {
                let mut open = vec![(*want).clone()];
                for (_, slice) in own(holders, *to) {
                    let kept = take(&mut open, slice);
                    plan.kept.extend(kept.into_iter().map(|part| (*to, part)));
                }
                while let Some(part) = open.first().cloned() {
                    let (from, slice) = least_busy(holders, &part, &sent).ok_or(Missing {
                        to: *to,
                        tensor,
                        rows: part.rows,
                    })?;
                    for part in take(&mut open, slice) {
                        sent[from] += part.elements();
                        moves.push(Moved { from, to: *to, part });
                    }
                }
            }
        }
        plan.rounds = rounds(moves, held.len(), bucket);
        Ok(plan)
    }

    /// Elements that go from rank to rank.
    pub fn sent(&self) -> usize {
        self.rounds.iter().flatten().map(|moved| moved.part.elements()).sum()
    }

    /// The most elements that a rank sends and receives in a round.
    pub fn widest(&self) -> usize {
        let ranks = self.rounds.iter().flatten().map(|moved| moved.from.max(moved.to) + 1).max();
        let mut loads = vec![[0; 2]; ranks.unwrap_or(0)];
        let mut widest = 0;
        for round in &self.rounds {
            for moved in round {
                for (side, rank) in [moved.from, moved.to].into_iter().enumerate() {
                    loads[rank][side] += moved.part.elements();
                    widest = widest.max(loads[rank][side]);
                }
            }
            round.iter().flat_map(|moved| [moved.from, moved.to]).for_each(|r| loads[r] = [0; 2]);
        }
        widest
    }
}

/// Elements that any plan has to send at least: what is wanted and not held, rank by rank.
pub fn least(held: &[Vec<Slice>], wanted: &[Vec<Slice>]) -> usize {
    let missing = |(held, wanted): (&Vec<Slice>, &Vec<Slice>)| {
        let last = held.iter().chain(wanted).map(|slice| slice.tensor).max();
        let held = by_tensor(last.map_or(0, |last| last + 1), std::slice::from_ref(held));
        let open = |want: &Slice| {
            let mut open = vec![want.clone()];
            held[want.tensor].iter().for_each(|(_, slice)| drop(take(&mut open, slice)));
            open.iter().map(Slice::elements).sum::<usize>()
        };
        wanted.iter().map(open).sum::<usize>()
    };
    held.iter().zip(wanted).map(missing).sum()
}

/// The parts of each tensor with their ranks, lowest rank first.
fn by_tensor(tensors: usize, ranks: &[Vec<Slice>]) -> Vec<Vec<(usize, &Slice)>> {
    let mut parts = vec![Vec::new(); tensors];
    for (rank, slices) in ranks.iter().enumerate() {
        for slice in slices {
            parts[slice.tensor].push((rank, slice));
        }
    }
    parts
}

/// A rank's own parts among those of a tensor.
fn own<'a>(holders: &'a [(usize, &'a Slice)], rank: usize) -> &'a [(usize, &'a Slice)] {
    let first = holders.partition_point(|(holder, _)| *holder < rank);
    let end = first + holders[first..].partition_point(|(holder, _)| *holder == rank);
    &holders[first..end]
}

/// The holder of some of a part that has sent least so far; the lowest rank among equals.
fn least_busy<'a>(
    holders: &[(usize, &'a Slice)],
    part: &Slice,
    sent: &[usize],
) -> Option<(usize, &'a Slice)> {
    let some = holders.iter().filter(|(_, slice)| !both(slice, part).is_empty());
    some.min_by_key(|(rank, _)| (sent[*rank], *rank)).map(|(rank, slice)| (*rank, *slice))
}

fn both(a: &Slice, b: &Slice) -> Slice {
    let both = |a: &Range<usize>, b: &Range<usize>| {
        let first = a.start.max(b.start);
        first..a.end.min(b.end).max(first)
    };
    Slice { tensor: a.tensor, rows: both(&a.rows, &b.rows), cols: both(&a.cols, &b.cols) }
}

/// Takes what lies in `slice` out of the open parts and returns it; what is left of a part stays, in up to four pieces.
fn take(open: &mut Vec<Slice>, slice: &Slice) -> Vec<Slice> {
    let (mut left, mut taken) = (Vec::with_capacity(open.len()), Vec::new());
    for part in open.drain(..) {
        let inner = both(&part, slice);
        if part.tensor != slice.tensor || inner.is_empty() {
            left.push(part);
            continue;
        }
        let pieces = [
            Slice { rows: part.rows.start..inner.rows.start, ..part.clone() },
            Slice { cols: part.cols.start..inner.cols.start, ..inner.clone() },
            Slice { cols: inner.cols.end..part.cols.end, ..inner.clone() },
            Slice { rows: inner.rows.end..part.rows.end, ..part.clone() },
        ];
        left.extend(pieces.into_iter().filter(|piece| !piece.is_empty()));
        taken.push(inner);
    }
    *open = left;
    taken
}

/// Parts cut to at most a bucket, and put into the first round where sender and receiver have room.
fn rounds(moves: Vec<Moved>, ranks: usize, bucket: usize) -> Vec<Vec<Moved>> {
    let mut rounds: Vec<Vec<Moved>> = Vec::new();
    // What each rank may still send and receive in each round.
    let mut rooms: [Vec<Room>; 2] = [0, 1].map(|_| vec![Room::new(bucket); ranks]);
    for moved in moves.into_iter().flat_map(|moved| pieces(moved, bucket)) {
        // A row that is longer than a bucket takes one that is empty.
        let size = moved.part.elements().min(bucket);
        let mut place = 0;
        loop {
            let sender = rooms[0][moved.from].first(place, size);
            place = rooms[1][moved.to].first(sender, size);
            if place == sender {
                break;
            }
        }
        rooms[0][moved.from].take(place, size);
        rooms[1][moved.to].take(place, size);
        if place >= rounds.len() {
            rounds.resize(place + 1, Vec::new());
        }
        rounds[place].push(moved);
    }
    rounds
}

/// What one rank may still send, or receive, in each round; every round that was not asked for yet is empty.
///
/// A tree of maxima over the rounds, so that the first one with room is found in logarithmic time: a search from one end
/// makes the plan quadratic, because rounds are rarely filled to their last element.
#[derive(Clone)]
struct Room {
    bucket: usize,
    /// Node 1 is the root, node n has 2n and 2n + 1; the second half of the list are the rounds.
    most: Vec<usize>,
}

impl Room {
    fn new(bucket: usize) -> Room {
        Room { bucket, most: vec![bucket; 2] }
    }

    fn rounds(&self) -> usize {
        self.most.len() / 2
    }

    /// The first round from `from` on with room for `size`.
    fn first(&self, from: usize, size: usize) -> usize {
        let leaves = self.rounds();
        if from >= leaves {
            return from;
        }
        // 1. Up to the first subtree on the right that has room, 2. down in it.
        let mut node = leaves + from;
        while self.most[node] < size {
            while node % 2 == 1 {
                node /= 2;
                if node <= 1 {
                    return leaves;
                }
            }
            node += 1;
        }
        while node < leaves {
            node *= 2;
            node += usize::from(self.most[node] < size);
        }
        node - leaves
    }

    fn take(&mut self, round: usize, size: usize) {
        while round >= self.rounds() {
            self.double();
        }
        let mut node = self.rounds() + round;
        self.most[node] -= size;
        while node > 1 {
            node /= 2;
            self.most[node] = self.most[2 * node].max(self.most[2 * node + 1]);
        }
    }

    fn double(&mut self) {
        let leaves = self.rounds();
        let mut most = vec![self.bucket; 4 * leaves];
        most[2 * leaves..3 * leaves].copy_from_slice(&self.most[leaves..]);
        for node in (1..2 * leaves).rev() {
            most[node] = most[2 * node].max(most[2 * node + 1]);
        }
        self.most = most;
    }
}

fn pieces(moved: Moved, bucket: usize) -> impl Iterator<Item = Moved> {
    let step = (bucket / moved.part.cols.len()).max(1);
    let rows = moved.part.rows.clone();
    rows.clone().step_by(step).map(move |row| Moved {
        part: Slice { rows: row..rows.end.min(row + step), ..moved.part.clone() },
        ..moved
    })
}

#[cfg(test)]
mod tests {
    use super::super::layout::tests::{layout, meshes, model};
    use super::super::layout::{Sampling, Training};
    use super::*;
    use proptest::prelude::*;

    /// Elements of a tensor that slices hold.
    fn elements(tensors: &[Tensor], slices: &[Slice]) -> Vec<(usize, usize)> {
        let mut all = Vec::new();
        for slice in slices {
            for row in slice.rows.clone() {
                let at = move |col| (slice.tensor, row * tensors[slice.tensor].cols + col);
                all.extend(slice.cols.clone().map(at));
            }
        }
        all.sort_unstable();
        all
    }

    /// Carries a plan out element by element, and counts against what brute force says.
    fn check(tensors: &[Tensor], held: &[Vec<Slice>], wanted: &[Vec<Slice>], bucket: usize) {
        let plan = Plan::new(tensors, held, wanted, bucket).unwrap();
        let mut got: Vec<Vec<Slice>> = vec![Vec::new(); held.len()];
        for (rank, part) in &plan.kept {
            got[*rank].push(part.clone());
        }
        for moved in plan.rounds.iter().flatten() {
            let from = elements(tensors, &held[moved.from]);
            let sent = elements(tensors, std::slice::from_ref(&moved.part));
            assert!(sent.iter().all(|element| from.binary_search(element).is_ok()), "{moved:?}");
            got[moved.to].push(moved.part.clone());
        }
        let mut bound = 0;
        for rank in 0..held.len() {
            let (held, wanted) = (elements(tensors, &held[rank]), elements(tensors, &wanted[rank]));
            assert_eq!(elements(tensors, &got[rank]), wanted, "rank {rank}: each element once");
            bound += wanted.iter().filter(|element| held.binary_search(element).is_err()).count();
        }
        assert_eq!((plan.sent(), least(held, wanted)), (bound, bound));
        let longest = tensors.iter().map(|tensor| tensor.cols).max().unwrap();
        assert!(plan.widest() <= bucket.max(longest), "{} in a round", plan.widest());
    }

    fn sampling(layout: &Training, tensor: usize) -> Sampling {
        let ranks = layout.mesh().ranks();
        let tensor = if ranks.is_multiple_of(tensor) { tensor } else { 1 };
        let expert = [4, 2, 1].into_iter().find(|e| ranks.is_multiple_of(*e)).unwrap();
        Sampling { ranks, tensor, expert }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(60) })]
        #[test]
        fn a_plan_and_the_way_back_bring_each_element_once_and_send_no_more_than_they_must(
            (sizes, layers, tied) in meshes(), v in any::<bool>(), tensor in 1usize..4, bucket in 1usize..80,
        ) {
            let (layout, tensors) = (layout(sizes, layers, v), model(layers, 4, tied));
            let sampling = sampling(&layout, tensor);
            let ranks = 0..layout.mesh().ranks();
            let train: Vec<_> = ranks.clone().map(|rank| layout.weights(rank, &tensors)).collect();
            let sample: Vec<_> = ranks.map(|rank| sampling.weights(rank, &tensors)).collect();
            check(&tensors, &train, &sample, bucket);
            check(&tensors, &sample, &train, bucket);
        }
    }

    #[test]
    fn the_first_round_with_room_is_the_one_that_a_search_from_the_front_finds() {
        let mut room = Room::new(10);
        let mut plain = vec![10; 40];
        // A fixed mixture of sizes and of places to search from.
        for step in 0..60usize {
            let (size, from) = (1 + step * 7 % 10, step * 5 % 13);
            let wanted = (from..).find(|round| plain[*round] >= size).unwrap();
            assert_eq!(room.first(from, size), wanted, "step {step}");
            room.take(wanted, size);
            plain[wanted] -= size;
        }
        assert_eq!(room.first(1000, 10), 1000, "what was never asked for is empty");
    }

    #[test]
    fn holders_take_turns_and_no_rank_gathers_a_model() {
        // Each half of the experts has two holders among four ranks; every rank is to have all of them.
        let (layout, tensors) = (layout([4, 1, 2], 4, false), model(4, 4, false));
        let sampling = Sampling { ranks: 4, tensor: 1, expert: 1 };
        let train: Vec<_> = (0..4).map(|rank| layout.weights(rank, &tensors)).collect();
        let sample: Vec<_> = (0..4).map(|rank| sampling.weights(rank, &tensors)).collect();
        let plan = Plan::new(&tensors, &train, &sample, 30).unwrap();
        let sent_by = |rank| -> usize {
            let moved = plan.rounds.iter().flatten().filter(|moved| moved.from == rank);
            moved.map(|moved| moved.part.elements()).sum()
        };
        assert_eq!(
            (0..4).map(sent_by).collect::<Vec<_>>(),
            [120; 4],
            "15 elements, 4 layers, 2 experts"
        );
        let missing = Plan::new(&tensors, &[vec![], vec![]], &[vec![], sample[0].clone()], 30);
        assert_eq!(
            missing.unwrap_err().to_string(),
            "rank 1 wants rows 0..12 of tensor 0, which no rank holds"
        );
    }
}
