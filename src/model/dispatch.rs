//! Dispatch: tokens go to the ranks of their experts, and what the experts made of them comes back (deepseek_v2.md 3).
//!
//! The slots of a pass are sorted by expert, and a rank's experts are neighbours: what goes to a rank are neighbouring
//! rows. It sorts what it gets by expert, and within an expert by rank and slot. So each row is the same for its expert as
//! on one rank, and what comes back lies in the same slots, whoever computed it.
//!
//! Invariants:
//!   * `give_back` undoes the order of `take`
//!   * a rank without a row takes part all the same

use super::pass::{PassError, floats, indices};
use crate::cluster::collective::Sent;
use crate::cluster::link::Operation;
use crate::cluster::mesh::cut;
use crate::cluster::{Broken, Doing, Group, Timeline};
use rehearsal_kernels::{Buffer, Kernels, Routes};
use std::ops::Range;
use std::sync::Arc;

/// The ranks that share the routed experts of a layer.
pub struct ExpertRanks {
    /// They, in order of their experts.
    pub group: Group,
    /// Where it is written down when tokens were under way.
    pub timeline: Arc<Timeline>,
    /// Whether nothing is computed while tokens are under way. Changes no result.
    pub is_serial: bool,
}

/// Where the rows are that this rank's experts work on.
pub struct Dispatched {
    /// The slots that went to each rank.
    sent: Vec<Range<usize>>,
    /// The rows that came from each, in order of their coming.
    received: Vec<Range<usize>>,
    /// Those rows by expert.
    pub routes: Routes,
}

/// Rows under way to the ranks of their experts.
pub struct Sending<'a> {
    ranks: &'a ExpertRanks,
    sent: Sent<'a>,
    since: f64,
}

/// Rows of a layer's slots that were sent, or that stay because this rank has all experts.
pub enum Slots<'a> {
    /// All experts are here.
    Here(Buffer),
    /// They are on their way.
    Away {
        /// The rows as they were sent.
        rows: Buffer,
        /// Their slots, by rank.
        slots: Vec<Range<usize>>,
        /// Rows of each expert.
        counts: Vec<u32>,
        /// What was sent.
        sending: Sending<'a>,
    },
}

impl ExpertRanks {
    /// Whether any rank has rows for another pass. Ranks whose rows are all through take part in the passes of the others.
    pub fn go_on(&self, has_rows: bool) -> Result<bool, Broken> {
        let own = vec![vec![u8::from(has_rows)]; self.group.ranks().len()];
        let all = self.group.all_to_all("who has rows", &own)?;
        Ok(all.into_iter().flatten().any(|has_rows| has_rows == 1))
    }

    /// Sends the rows of the slots of `routes` to the ranks of their experts.
    pub fn send(
        &self,
        kernels: &dyn Kernels,
        rows: Buffer,
        routes: &Routes,
    ) -> Result<Slots<'_>, PassError> {
        let offsets = kernels.download_indices(&routes.offsets);
        let counts: Vec<u32> = offsets.windows(2).map(|pair| pair[1] - pair[0]).collect();
        let size = self.group.ranks().len();
        let experts = |place| cut(routes.experts, size, place);
        let slots: Vec<Range<usize>> = (0..size)
            .map(|place| {
                let Range { start, end } = experts(place);
                offsets[start] as usize..offsets[end] as usize
            })
            .collect();
        let bytes = |place: usize| {
            let mut bytes: Vec<u8> =
                counts[experts(place)].iter().flat_map(|count| count.to_le_bytes()).collect();
            kernels.append_bytes(&rows.rows_of(slots[place].clone()), &mut bytes);
            bytes
        };
        let sending = self.begin(kernels, "tokens to experts", &bytes)?;
        Ok(Slots::Away { rows, slots, counts, sending })
    }

    /// Sends rows of the same slots once more (gradients of the experts' outputs).
    pub fn send_again(
        &self,
        kernels: &dyn Kernels,
        rows: &Buffer,
        dispatched: &Dispatched,
    ) -> Result<Sending<'_>, PassError> {
        let bytes =
            |place: usize| kernels.download_bytes(&rows.rows_of(dispatched.sent[place].clone()));
        Ok(self.begin(kernels, "gradients to experts", &bytes)?)
    }

    /// What the experts here made of the rows goes back to where they came from; the rows of this rank's slots come.
    pub fn give_back(
        &self,
        kernels: &dyn Kernels,
        made: &Buffer,
        dispatched: &Dispatched,
    ) -> Result<Buffer, PassError> {
        let Dispatched { sent, received, routes } = dispatched;
        let mut rows = floats(kernels, made.rows(), made.cols())?;
        kernels.gather_rows(made, &routes.slot, &mut rows);
        let bytes = |place: usize| kernels.download_bytes(&rows.rows_of(received[place].clone()));
        let sending = self.begin(kernels, "rows back from experts", &bytes)?;
        let slots = sent.last().map_or(0, |last| last.end);
        let mut back = floats(kernels, slots, made.cols())?;
        sending.take(kernels, &rows, received, sent, &mut back)?;
        Ok(back)
    }

    fn begin(
        &self,
        kernels: &dyn Kernels,
        name: &str,
        bytes: &dyn Fn(usize) -> Vec<u8>,
    ) -> Result<Sending<'_>, Broken> {
        let (since, width) = (self.timeline.now(), kernels.float().size());
        let sent = self.group.send_to_all(name, Operation::AllToAll, 0, width, bytes)?;
        Ok(Sending { ranks: self, sent, since })
    }
}

impl Sending<'_> {
    /// Takes the other ranks' rows into `to`, those of place p at `places[p]`; this rank's own are `own[from]` of its place.
    fn take(
        self,
        kernels: &dyn Kernels,
        own: &Buffer,
        from: &[Range<usize>],
        places: &[Range<usize>],
        to: &mut Buffer,
    ) -> Result<(), Broken> {
        lay(kernels, &self.frames()?, 0, own, from, places, to);
        Ok(())
    }

    fn frames(self) -> Result<Vec<Option<Vec<u8>>>, Broken> {
        let frames = self.sent.take()?;
        self.ranks.timeline.add(Doing::AllToAll, self.since);
        Ok(frames)
    }

    /// Takes gradients of rows that were dispatched before, in the order of the experts here.
    pub fn take_again(
        self,
        kernels: &dyn Kernels,
        own: &Buffer,
        dispatched: &Dispatched,
    ) -> Result<Buffer, PassError> {
        let Dispatched { sent, received, routes } = dispatched;
        let mut rows = floats(kernels, routes.slots(), own.cols())?;
        self.take(kernels, own, sent, received, &mut rows)?;
        Ok(by_expert(kernels, &rows, routes)?)
    }
}

impl Slots<'_> {
    /// The rows that the experts here work on, by expert; where they came from, if others' are among them.
    pub fn take(self, kernels: &dyn Kernels) -> Result<(Buffer, Option<Dispatched>), PassError> {
        let (rows, slots, counts, sending) = match self {
            Slots::Here(rows) => return Ok((rows, None)),
            Slots::Away { rows, slots, counts, sending } => (rows, slots, counts, sending),
        };
        let group = &sending.ranks.group;
        let (own, experts) = (group.own(), cut(counts.len(), slots.len(), group.own()));
        let parts = sending.frames()?;
        let header = experts.len() * 4;
        // The local number of each row's expert, and the range of each rank's rows.
        let (mut chosen, mut received) = (Vec::new(), Vec::new());
        for (place, part) in parts.iter().enumerate() {
            let counts: Vec<u32> = match part {
                Some(bytes) => bytes[..header]
                    .chunks_exact(4)
                    .map(|count| u32::from_le_bytes(count.try_into().expect("four bytes")))
                    .collect(),
                None => counts[experts.clone()].to_vec(),
            };
            let first = chosen.len();
            for (expert, count) in counts.iter().enumerate() {
                chosen.extend(std::iter::repeat_n(expert as u32, *count as usize));
            }
            assert!(place == own || part.is_some(), "only the own part is not sent");
            received.push(first..chosen.len());
        }
        let mut gathered = floats(kernels, chosen.len(), rows.cols())?;
        lay(kernels, &parts, header, &rows, &slots, &received, &mut gathered);
        let routes = kernels.routes(&indices(kernels, &chosen)?, experts.len())?;
        let x = by_expert(kernels, &gathered, &routes)?;
        Ok((x, Some(Dispatched { sent: slots, received, routes })))
    }
}

/// Lays each rank's rows, which begin behind `header` bytes, at its place in `to`; this rank's own are rows of `own`.
fn lay(
    kernels: &dyn Kernels,
    parts: &[Option<Vec<u8>>],
    header: usize,
    own: &Buffer,
    from: &[Range<usize>],
    places: &[Range<usize>],
    to: &mut Buffer,
) {
    for (place, part) in parts.iter().enumerate() {
        let mut to = to.rows_of_mut(places[place].clone());
        match part {
            Some(bytes) => kernels.upload_bytes(&bytes[header..], &mut to),
            None => kernels.copy(&own.rows_of(from[place].clone()), &mut to),
        }
    }
}

fn by_expert(
    kernels: &dyn Kernels,
    rows: &Buffer,
    routes: &Routes,
) -> Result<Buffer, rehearsal_kernels::OutOfMemory> {
    let mut x = floats(kernels, rows.rows(), rows.cols())?;
    kernels.gather_rows(rows, &routes.token, &mut x);
    Ok(x)
}
