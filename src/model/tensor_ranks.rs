//! Tensor parallelism: ranks that have the same rows share heads, inner widths and the vocabulary (deepseek_v2.md 4.5).
//!
//! Every matrix is cut by its outputs, and its inputs are gathered before it: a number is one chain over all of its inputs
//! on one rank, as it would be if that rank had everything. No rank ever adds what others have added up, so that all
//! numbers are those of one rank to the bit. That gathers twice for each half of a layer, where adding partial sums would
//! reduce once.
//!
//! Invariants:
//!   * all ranks of a group have the same rows, and after each call here the same numbers in all columns that it names
//!   * without rows nothing is sent: ranks that stand by for others' experts do not wait for each other

use super::pass::{PassError, floats};
use crate::cluster::layout::Share;
use crate::cluster::link::Operation;
use crate::cluster::mesh::cut;
use crate::cluster::{Broken, Doing, Group, Timeline};
use rehearsal_kernels::{Buffer, Kernels};
use std::ops::Range;
use std::sync::Arc;

/// The ranks of a tensor group.
pub struct TensorRanks {
    /// They, in order of their shares.
    pub group: Group,
    /// Where it is written down when rows were under way.
    pub timeline: Arc<Timeline>,
}

/// Rows and columns of a matrix.
type Block = (Range<usize>, Range<usize>);

impl TensorRanks {
    /// This rank's share.
    pub fn share(&self) -> Share {
        Share { of: self.group.ranks().len(), place: self.group.own() }
    }

    /// The rank's own of so many rows or columns.
    pub fn own(&self, count: usize) -> Range<usize> {
        self.of(count, self.group.own())
    }

    fn of(&self, count: usize, place: usize) -> Range<usize> {
        cut(count, self.group.ranks().len(), place)
    }

    /// Of `x`, which has this rank's columns, all `cols` columns.
    pub fn widened(
        &self,
        kernels: &dyn Kernels,
        name: &str,
        x: &Buffer,
        cols: usize,
    ) -> Result<Buffer, PassError> {
        let mut all = floats(kernels, x.rows(), cols)?;
        kernels.copy(x, &mut all.cols_of_mut(self.own(cols)));
        self.gather_columns(kernels, name, &mut all)?;
        Ok(all)
    }

    /// Fills the other ranks' columns of `y`, in which this rank has its own.
    pub fn gather_columns(
        &self,
        kernels: &dyn Kernels,
        name: &str,
        y: &mut Buffer,
    ) -> Result<(), Broken> {
        let (rows, cols) = (y.rows(), y.cols());
        let own = (0..rows, self.own(cols));
        self.exchange(kernels, name, y, |_| own.clone(), |from| (0..rows, self.of(cols, from)))
    }

    /// Fills the other ranks' rows of `y`, in which this rank has its own.
    pub fn gather_rows(
        &self,
        kernels: &dyn Kernels,
        name: &str,
        y: &mut Buffer,
    ) -> Result<(), Broken> {
        let (rows, cols) = (y.rows(), y.cols());
        let own = (self.own(rows), 0..cols);
        self.exchange(kernels, name, y, |_| own.clone(), |from| (self.of(rows, from), 0..cols))
    }

    /// Fills this rank's columns of the other ranks' rows of `y`, in which this rank has its own rows. The other columns of
    /// those rows mean nothing afterwards.
    pub fn rows_to_columns(
        &self,
        kernels: &dyn Kernels,
        name: &str,
        y: &mut Buffer,
    ) -> Result<(), Broken> {
        let (rows, cols) = (y.rows(), y.cols());
        let (own_rows, own_cols) = (self.own(rows), self.own(cols));
        let give = |to| (own_rows.clone(), self.of(cols, to));
        self.exchange(kernels, name, y, give, |from| (self.of(rows, from), own_cols.clone()))
    }

    /// Sends each rank a block of `y` and takes one from each.
    fn exchange(
        &self,
        kernels: &dyn Kernels,
        name: &str,
        y: &mut Buffer,
        give: impl Fn(usize) -> Block,
        take: impl Fn(usize) -> Block,
    ) -> Result<(), Broken> {
        if y.rows() == 0 {
            return Ok(());
        }
        let (since, elements, width) = (self.timeline.now(), y.len(), kernels.float().size());
        let bytes = |to| {
            let (rows, cols) = give(to);
            kernels.download_bytes(&y.block(rows, cols))
        };
        let sent = self.group.send_to_all(name, Operation::AllGather, elements, width, bytes)?;
        for (place, bytes) in sent.take()?.into_iter().enumerate() {
            if let Some(bytes) = bytes {
                let (rows, cols) = take(place);
                kernels.upload_bytes(&bytes, &mut y.block_mut(rows, cols));
            }
        }
        self.timeline.add(Doing::TensorGather, since);
        Ok(())
    }

    /// The least of what the ranks have.
    pub fn least(&self, name: &str, own: u64) -> Result<u64, Broken> {
        let all = self.group.all_to_all(name, &vec![vec![own]; self.group.ranks().len()])?;
        Ok(all.into_iter().flatten().min().expect("each rank has a number"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::Local;
    use rehearsal_kernels::{Arena, CpuKernels};
    use std::thread;
    use std::time::{Duration, Instant};

    const ROWS: usize = 7;
    const COLS: usize = 10;

    /// Runs `work` on three ranks with kernels and a matrix whose element is known by its place, elsewhere than in
    /// `has` of the rank -1.
    fn on_three(
        has: fn(&TensorRanks) -> Block,
        work: impl Fn(&TensorRanks, &dyn Kernels, &mut Buffer) + Sync,
    ) -> Vec<Vec<f64>> {
        thread::scope(|scope| {
            let start = |link: Local| {
                let work = &work;
                scope.spawn(move || {
                    let kernels = CpuKernels::new(1, Arena::new(None));
                    let group = Group::new(Arc::new(link), vec![0, 1, 2], Duration::from_secs(20));
                    let timeline = Arc::new(Timeline::since(Instant::now()));
                    let ranks = TensorRanks { group, timeline };
                    let mut y = floats(&kernels, ROWS, COLS).unwrap();
                    let (rows, cols) = has(&ranks);
                    let value = |i: usize| {
                        let is_own = rows.contains(&(i / COLS)) && cols.contains(&(i % COLS));
                        if is_own { i as f64 } else { -1.0 }
                    };
                    kernels.upload_f64(&(0..ROWS * COLS).map(value).collect::<Vec<_>>(), &mut y);
                    work(&ranks, &kernels, &mut y);
                    kernels.download_f64(&y)
                })
            };
            let threads: Vec<_> = Local::new(3).into_iter().map(start).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }

    #[test]
    fn each_rank_gets_the_rows_or_columns_of_the_others_also_where_they_do_not_divide() {
        let all: Vec<f64> = (0..ROWS * COLS).map(|i| i as f64).collect();
        let columns = on_three(
            |ranks| (0..ROWS, ranks.own(COLS)),
            |ranks, kernels, y| ranks.gather_columns(kernels, "columns", y).unwrap(),
        );
        let rows = on_three(
            |ranks| (ranks.own(ROWS), 0..COLS),
            |ranks, kernels, y| ranks.gather_rows(kernels, "rows", y).unwrap(),
        );
        assert_eq!((columns, rows), (vec![all.clone(); 3], vec![all.clone(); 3]));
        let turned = on_three(
            |ranks| (ranks.own(ROWS), 0..COLS),
            |ranks, kernels, y| ranks.rows_to_columns(kernels, "both", y).unwrap(),
        );
        for (place, turned) in turned.iter().enumerate() {
            let own = cut(COLS, 3, place);
            let mut own = (0..ROWS * COLS).filter(|i| own.contains(&(i % COLS)));
            assert!(own.all(|i| turned[i] == all[i]), "rank {place}: {turned:?}");
        }
    }

    #[test]
    fn without_rows_nobody_is_waited_for_and_the_least_is_the_same_everywhere() {
        on_three(
            |_| (0..ROWS, 0..COLS),
            |ranks, kernels, _| {
                let own = ranks.group.own() as u64;
                if own == 1 {
                    let mut none = floats(kernels, 0, COLS).unwrap();
                    ranks.gather_columns(kernels, "nothing", &mut none).unwrap();
                }
                assert_eq!(ranks.least("pages", 7 - own).unwrap(), 5);
            },
        );
    }
}
