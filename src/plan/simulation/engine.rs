//! The discrete events: lines of work that follow their lists, send over links that take time, and meet.
//!
//! A rank has one line that computes and may have others that copy to and from its host. A line runs its acts in order. What
//! it sends leaves when its own outgoing port and the receiver's incoming one are free, while the line goes on; what it
//! receives it waits for. A meeting holds all of its lines until the last one is there and the longest of their times is over.
//!
//! Sends are taken in order of time, equal times in order of lines, so that the outcome depends on the programs alone.
//!
//! Invariants (tested):
//!   * what is sent is received, byte for byte
//!   * lines that wait for each other are found and told
//!   * where links cost nothing, a pipeline runs as `Schedule::simulate` says, to the bit

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap, HashSet, VecDeque};

/// What a line does next.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Act {
    /// Works.
    Run {
        /// For so long.
        seconds: f64,
        /// At what.
        what: What,
    },
    /// Sends and goes on.
    Send {
        /// To this line.
        to: usize,
        /// As what.
        channel: Channel,
        /// So many bytes; none between lines of one rank.
        bytes: f64,
    },
    /// Waits for the next message of a line.
    Receive {
        /// From this line.
        from: usize,
        /// As what.
        channel: Channel,
    },
    /// Waits for all lines of a group; it then takes as long as the longest of their times.
    Meet {
        /// Number of the group.
        group: usize,
        /// This line's time.
        seconds: f64,
        /// At what.
        what: What,
    },
}

/// What time goes into.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum What {
    /// A forward pass of a micro-batch.
    Forward(usize),
    /// The gradients of its activations.
    BackwardInput(usize),
    /// The gradients of its weights.
    BackwardWeight(usize),
    /// Tokens on their way to experts and back, as far as nothing is computed meanwhile.
    Exchange,
    /// Sums of gradients, and weights that come back.
    Reduce,
    /// The optimizer.
    Update,
    /// Prompts of rollouts.
    Prefill,
    /// New tokens of rollouts.
    Decode,
    /// From the host.
    Load,
    /// To the host.
    Store,
    /// The end of a phase, for which all wait.
    Phase(usize),
}

/// Kinds of messages between two lines; those of a kind arrive in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Channel {
    /// Activations into a piece of the stack.
    Activations(usize),
    /// Gradients into a piece of the stack.
    Gradients(usize),
    /// Weights in a change of layout.
    Weights,
    /// Word that something is on the device.
    Loaded,
    /// Word that room is there, for one of several things.
    Freed(usize),
}

/// What joins ranks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Links {
    /// Neighbouring ranks that the faster links join.
    pub node: usize,
    /// Bytes a second within a node, in each direction of each rank.
    pub node_rate: f64,
    /// Seconds until the first byte is there.
    pub node_latency: f64,
    /// The same between nodes.
    pub network_rate: f64,
    /// Seconds until the first byte is there.
    pub network_latency: f64,
}

impl Links {
    /// Links that cost nothing.
    pub const FREE: Links = Links {
        node: usize::MAX,
        node_rate: f64::INFINITY,
        node_latency: 0.0,
        network_rate: f64::INFINITY,
        network_latency: 0.0,
    };

    /// Bytes a second at which each of a group sends evenly to all others, and seconds before the first one. `ranks` are in
    /// order; the slower of the links that they share decides.
    pub fn spread(&self, ranks: &[usize]) -> (f64, f64) {
        let node = |rank: &usize| rank / self.node;
        let beside = |rank: &usize| ranks.iter().filter(|other| node(other) == node(rank)).count();
        let fewest = ranks.iter().map(beside).min().unwrap_or(1);
        let others = ranks.len().saturating_sub(1).max(1) as f64;
        let outside = (ranks.len() - fewest) as f64 / others;
        let seconds = ((1.0 - outside) / self.node_rate).max(outside / self.network_rate);
        let latency = if outside > 0.0 { self.network_latency } else { self.node_latency };
        (1.0 / seconds, latency)
    }

    /// Bytes a second and seconds before the first one between two ranks.
    pub fn between(&self, a: usize, b: usize) -> (f64, f64) {
        match a / self.node == b / self.node {
            true => (self.node_rate, self.node_latency),
            false => (self.network_rate, self.network_latency),
        }
    }
}

/// All lines and who meets.
#[derive(Clone, Debug, Default)]
pub struct Program {
    /// The rank of each line.
    pub ranks: Vec<usize>,
    /// What each line does.
    pub lines: Vec<Vec<Act>>,
    /// Lines of each group that meets.
    pub groups: Vec<Vec<usize>>,
}

/// A time that a line was busy.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Span {
    /// With what.
    pub what: What,
    /// Seconds from the start.
    pub start: f64,
    /// The same of its end.
    pub end: f64,
}

/// What came of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// Seconds until the last line ended.
    pub seconds: f64,
    /// What each line was busy with, in order; meetings as far as they took time.
    pub spans: Vec<Vec<Span>>,
    /// When each phase ended, by its number.
    pub phases: BTreeMap<usize, f64>,
    /// Seconds that each line waited for word that something is on the device.
    pub waited_for_loads: Vec<f64>,
    /// Bytes that each rank sent within its node and to others.
    pub sent: Vec<[f64; 2]>,
    /// Bytes that each rank received.
    pub received: Vec<[f64; 2]>,
    /// Acts that were taken.
    pub acts: usize,
}

/// Lines wait for each other.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("line {line} of rank {rank} waits for ever at its act {act}: {what:?}")]
pub struct Stuck {
    line: usize,
    rank: usize,
    act: usize,
    what: Act,
}

/// Runs a program to its end.
pub fn simulate(program: &Program, links: &Links) -> Result<Outcome, Stuck> {
    let mut world = World::new(program, links);
    (0..program.lines.len()).for_each(|line| world.advance(line));
    while let Some(Reverse((_, line))) = world.sends.pop() {
        world.send(line);
        world.advance(line);
    }
    world.outcome()
}

/// A time that never is NaN, so that it has an order.
#[derive(Clone, Copy, PartialEq)]
struct Moment(f64);

impl Eq for Moment {}

impl PartialOrd for Moment {
    fn partial_cmp(&self, other: &Moment) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Moment {
    fn cmp(&self, other: &Moment) -> std::cmp::Ordering {
        self.0.total_cmp(&other.0)
    }
}

#[derive(Clone, Copy, Default)]
struct Meeting {
    there: usize,
    last: f64,
    longest: f64,
}

struct World<'a> {
    program: &'a Program,
    links: &'a Links,
    /// Next act and time of each line.
    next: Vec<usize>,
    now: Vec<f64>,
    /// Lines that are about to send.
    sends: BinaryHeap<Reverse<(Moment, usize)>>,
    /// Arrivals by sender, receiver and kind, and who waits for one.
    arrivals: HashMap<(usize, usize, Channel), VecDeque<f64>>,
    waiting: HashSet<(usize, usize, Channel)>,
    meetings: Vec<Meeting>,
    /// When the ports of each rank are free: to and from its node, to and from the network.
    out: Vec<[f64; 2]>,
    into: Vec<[f64; 2]>,
    outcome: Outcome,
}

impl<'a> World<'a> {
    fn new(program: &'a Program, links: &'a Links) -> World<'a> {
        let lines = program.lines.len();
        let ranks = program.ranks.iter().max().map_or(0, |most| most + 1);
        World {
            program,
            links,
            next: vec![0; lines],
            now: vec![0.0; lines],
            sends: BinaryHeap::new(),
            arrivals: HashMap::new(),
            waiting: HashSet::new(),
            meetings: vec![Meeting::default(); program.groups.len()],
            out: vec![[0.0; 2]; ranks],
            into: vec![[0.0; 2]; ranks],
            outcome: Outcome {
                seconds: 0.0,
                spans: vec![Vec::new(); lines],
                phases: BTreeMap::new(),
                waited_for_loads: vec![0.0; lines],
                sent: vec![[0.0; 2]; ranks],
                received: vec![[0.0; 2]; ranks],
                acts: 0,
            },
        }
    }

    /// Takes a line's acts until it waits, ends, or has to send: sends go in order of time.
    fn advance(&mut self, line: usize) {
        let program = self.program;
        while let Some(act) = program.lines[line].get(self.next[line]) {
            match *act {
                Act::Run { seconds, what } => self.run(line, seconds, what),
                Act::Send { .. } => {
                    self.sends.push(Reverse((Moment(self.now[line]), line)));
                    return;
                }
                Act::Receive { from, channel } => {
                    let key = (from, line, channel);
                    let Some(arrival) = self.arrivals.get_mut(&key).and_then(VecDeque::pop_front)
                    else {
                        self.waiting.insert(key);
                        return;
                    };
                    if channel == Channel::Loaded {
                        self.outcome.waited_for_loads[line] += (arrival - self.now[line]).max(0.0);
                    }
                    self.now[line] = self.now[line].max(arrival);
                }
                Act::Meet { group, seconds, .. } => {
                    if !self.meet(line, group, seconds) {
                        return;
                    }
                    continue;
                }
            }
            self.next[line] += 1;
        }
    }

    fn run(&mut self, line: usize, seconds: f64, what: What) {
        let start = self.now[line];
        self.now[line] = start + seconds;
        if seconds > 0.0 {
            self.outcome.spans[line].push(Span { what, start, end: self.now[line] });
        }
    }

    /// Counts a line in; the last one lets all go on. False for a line that has to wait.
    fn meet(&mut self, line: usize, group: usize, seconds: f64) -> bool {
        let members = &self.program.groups[group];
        let meeting = &mut self.meetings[group];
        meeting.there += 1;
        meeting.last = meeting.last.max(self.now[line]);
        meeting.longest = meeting.longest.max(seconds);
        if meeting.there < members.len() {
            return false;
        }
        let Meeting { last, longest, .. } = std::mem::take(meeting);
        for member in members {
            let Act::Meet { what, .. } = self.program.lines[*member][self.next[*member]] else {
                unreachable!("a line that was counted in stands at its meeting")
            };
            self.now[*member] = last;
            self.run(*member, longest, what);
            if let What::Phase(number) = what {
                self.outcome.phases.insert(number, self.now[*member]);
            }
            self.next[*member] += 1;
        }
        for member in members.iter().filter(|member| **member != line) {
            self.advance(*member);
        }
        true
    }

    /// Takes the send that a line stands at, and wakes who waits for it.
    fn send(&mut self, line: usize) {
        let Act::Send { to, channel, bytes } = self.program.lines[line][self.next[line]] else {
            unreachable!("only lines that are about to send are in the heap")
        };
        self.next[line] += 1;
        let (from_rank, to_rank) = (self.program.ranks[line], self.program.ranks[to]);
        let mut arrival = self.now[line];
        if from_rank != to_rank {
            let link = usize::from(from_rank / self.links.node != to_rank / self.links.node);
            let (rate, latency) = self.links.between(from_rank, to_rank);
            let (out, into) = (self.out[from_rank][link], self.into[to_rank][link]);
            let end = self.now[line].max(out).max(into) + bytes / rate;
            (self.out[from_rank][link], self.into[to_rank][link]) = (end, end);
            self.outcome.sent[from_rank][link] += bytes;
            self.outcome.received[to_rank][link] += bytes;
            arrival = end + latency;
        }
        let key = (line, to, channel);
        self.arrivals.entry(key).or_default().push_back(arrival);
        if self.waiting.remove(&key) {
            self.advance(to);
        }
    }

    fn outcome(mut self) -> Result<Outcome, Stuck> {
        let unfinished = |line: &usize| self.next[*line] < self.program.lines[*line].len();
        if let Some(line) = (0..self.next.len()).find(unfinished) {
            let act = self.next[line];
            let (rank, what) = (self.program.ranks[line], self.program.lines[line][act]);
            return Err(Stuck { line, rank, act, what });
        }
        self.outcome.seconds = self.now.iter().copied().fold(0.0, f64::max);
        self.outcome.acts = self.next.iter().sum();
        Ok(self.outcome)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SLOW: Links = Links {
        node: 2,
        node_rate: 100.0,
        node_latency: 0.5,
        network_rate: 10.0,
        network_latency: 2.0,
    };

    fn run(seconds: f64) -> Act {
        Act::Run { seconds, what: What::Update }
    }

    fn send(to: usize, bytes: f64) -> Act {
        Act::Send { to, channel: Channel::Weights, bytes }
    }

    fn receive(from: usize) -> Act {
        Act::Receive { from, channel: Channel::Weights }
    }

    fn program(lines: &[&[Act]]) -> Program {
        let lines: Vec<Vec<Act>> = lines.iter().map(|line| line.to_vec()).collect();
        Program { ranks: (0..lines.len()).collect(), lines, groups: Vec::new() }
    }

    #[test]
    fn a_message_takes_its_bytes_over_the_rate_and_the_latency_of_its_link() {
        // Rank 1 is of rank 0's node, rank 2 is not.
        for (to, seconds) in [(1, 1.0 + 0.5 + 0.5), (2, 1.0 + 5.0 + 2.0)] {
            let lines: &[&[Act]] = match to {
                1 => &[&[run(1.0), send(1, 50.0)], &[receive(0)], &[]],
                _ => &[&[run(1.0), send(2, 50.0)], &[], &[receive(0)]],
            };
            assert_eq!(simulate(&program(lines), &SLOW).unwrap().seconds, seconds);
        }
    }

    #[test]
    fn ports_are_busy_one_message_at_a_time_and_the_sender_goes_on() {
        // Both send 100 bytes over the network to rank 4: the second waits for its port.
        let lines: &[&[Act]] =
            &[&[send(4, 100.0), run(3.0)], &[], &[send(4, 100.0)], &[], &[receive(0), receive(2)]];
        let outcome = simulate(&program(lines), &SLOW).unwrap();
        assert_eq!(outcome.seconds, 10.0 + 10.0 + 2.0);
        assert_eq!(outcome.spans[0], [Span { what: What::Update, start: 0.0, end: 3.0 }]);
        assert_eq!((outcome.sent[0], outcome.received[4]), ([0.0, 100.0], [0.0, 200.0]));
    }

    #[test]
    fn a_meeting_waits_for_the_last_and_takes_the_longest() {
        let meet = |seconds| Act::Meet { group: 0, seconds, what: What::Exchange };
        let mut program = program(&[&[run(1.0), meet(5.0), run(1.0)], &[run(4.0), meet(0.5)]]);
        program.groups = vec![vec![0, 1]];
        let outcome = simulate(&program, &SLOW).unwrap();
        assert_eq!(outcome.seconds, 4.0 + 5.0 + 1.0);
        assert_eq!(outcome.spans[1][1], Span { what: What::Exchange, start: 4.0, end: 9.0 });
    }

    #[test]
    fn lines_that_wait_for_each_other_are_told() {
        let stuck = simulate(&program(&[&[receive(1), send(1, 1.0)], &[receive(0)]]), &SLOW);
        let text = stuck.unwrap_err().to_string();
        assert!(text.starts_with("line 0 of rank 0 waits for ever at its act 0"), "{text}");
        let alone = Act::Meet { group: 0, seconds: 0.0, what: What::Exchange };
        let mut one = program(&[&[alone], &[]]);
        one.groups = vec![vec![0, 1]];
        assert!(simulate(&one, &SLOW).is_err());
    }

    #[test]
    fn word_between_lines_of_a_rank_takes_no_time_and_waits_are_told() {
        let loaded = |to| Act::Send { to, channel: Channel::Loaded, bytes: 9e9 };
        let mut two = program(&[
            &[run(1.0), Act::Receive { from: 1, channel: Channel::Loaded }],
            &[run(3.0), loaded(0)],
        ]);
        two.ranks = vec![0, 0];
        let outcome = simulate(&two, &SLOW).unwrap();
        assert_eq!((outcome.seconds, outcome.waited_for_loads[0]), (3.0, 2.0));
        assert_eq!(outcome.sent[0], [0.0, 0.0]);
    }
}
