//! Arena: the only maker of [`Buffer`]s of one device, and the count of who holds how many bytes.
//!
//! Memory comes from the operating system page by page and is touched at once, so that the arena's
//! count equals what the process really holds. Every byte has an owner (a role such as "policy" and a
//! [`Kind`]); a budget refuses an allocation before the system does.
//!
//! Invariants:
//!   * bytes held = sum over owners + bytes pooled <= budget
//!   * a pooled region is reused only for the same size class
//!   * a spilled slab comes back bit for bit

use crate::buffer::{Buffer, DType, View, ViewMut};
use rustix::mm::{MapFlags, ProtFlags};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{Read, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

/// What an allocation is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Master weights under their published names.
    Weights,
    /// Weights packed for products, stamped with a policy version; pooled between versions.
    Packed,
    /// Gradients of the weights.
    Gradients,
    /// First and second moments of the optimizer.
    Moments,
    /// Latent cache.
    Cache,
    /// Activations and scratch of a step; pooled between steps.
    Activations,
}

impl Kind {
    /// True if freed memory is kept for the next step, until the arena is trimmed.
    fn is_pooled(self) -> bool {
        matches!(self, Kind::Activations | Kind::Packed)
    }
}

/// Who holds an allocation: a role ("policy", "reference", "reward helpful") and a kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Owner(u32);

/// The arena's budget would be exceeded, or the system has no more memory.
#[derive(Debug, thiserror::Error)]
#[error("memory: {owner} asks for {asked} bytes, {held} {}", reason(*.budget))]
pub struct OutOfMemory {
    /// Role and kind of the asking owner.
    pub owner: String,
    /// Bytes asked for.
    pub asked: u64,
    /// Bytes held by all owners.
    pub held: u64,
    /// The budget in bytes; absent if the system refused.
    pub budget: Option<u64>,
}

fn reason(budget: Option<u64>) -> String {
    let Some(budget) = budget else {
        return "are held, and the system gives no more; lower a batch or offload more".into();
    };
    format!("of {budget} are held; raise engine.budget or offload more")
}

/// Makes buffers and counts them. Clones share one count.
#[derive(Clone)]
pub struct Arena {
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    budget: Option<u64>,
    held: u64,
    high_water: u64,
    owners: Vec<Holding>,
    pool: HashMap<usize, Vec<Mapping>>,
    pooled: u64,
}

struct Holding {
    role: String,
    kind: Kind,
    bytes: u64,
}

impl Default for Arena {
    fn default() -> Arena {
        Arena::new(None)
    }
}

impl Arena {
    /// An arena of host memory that holds at most `budget` bytes.
    pub fn new(budget: Option<u64>) -> Arena {
        Arena { state: Arc::new(Mutex::new(State { budget, ..State::default() })) }
    }

    /// The owner for a role and a kind.
    pub fn owner(&self, role: &str, kind: Kind) -> Owner {
        let mut state = self.lock();
        let found = state.owners.iter().position(|h| h.role == role && h.kind == kind);
        let index = found.unwrap_or_else(|| {
            state.owners.push(Holding { role: role.to_string(), kind, bytes: 0 });
            state.owners.len() - 1
        });
        Owner(index as u32)
    }

    /// A buffer of `rows x cols` elements whose contents are not defined.
    pub fn buffer(
        &self,
        owner: Owner,
        dtype: DType,
        rows: usize,
        cols: usize,
    ) -> Result<Buffer, OutOfMemory> {
        let region = self.region(owner, rows * cols * dtype.size())?;
        Ok(Buffer::new(region, 0, dtype, rows, cols))
    }

    /// Zeroed memory for a list of tensors, one after another without gaps.
    pub fn slab(
        &self,
        owner: Owner,
        dtype: DType,
        shapes: &[(usize, usize)],
    ) -> Result<Slab, OutOfMemory> {
        let elements: usize = shapes.iter().map(|(rows, cols)| rows * cols).sum();
        let region = self.region(owner, elements * dtype.size())?;
        let slab = Slab::new(region, dtype, shapes);
        slab.region.clear();
        Ok(slab)
    }

    /// Bytes held now, by role and kind; pooled memory under the role "pool".
    pub fn holdings(&self) -> BTreeMap<(String, Kind), u64> {
        let state = self.lock();
        let mut map: BTreeMap<_, _> = state
            .owners
            .iter()
            .filter(|h| h.bytes > 0)
            .map(|h| ((h.role.clone(), h.kind), h.bytes))
            .collect();
        if state.pooled > 0 {
            map.insert(("pool".to_string(), Kind::Activations), state.pooled);
        }
        map
    }

    /// Bytes of one kind over all roles.
    pub fn held_by(&self, kind: Kind) -> u64 {
        self.holdings().iter().filter(|((_, k), _)| *k == kind).map(|(_, bytes)| bytes).sum()
    }

    /// Bytes held now, pooled ones included.
    pub fn held(&self) -> u64 {
        self.lock().held
    }

    /// The most bytes ever held at once.
    pub fn high_water(&self) -> u64 {
        self.lock().high_water
    }

    /// The budget, if there is one.
    pub fn budget(&self) -> Option<u64> {
        self.lock().budget
    }

    /// Gives pooled memory back to the system.
    pub fn trim(&self) {
        let mut state = self.lock();
        state.trim();
    }

    fn region(&self, owner: Owner, bytes: usize) -> Result<Arc<Region>, OutOfMemory> {
        let mut state = self.lock();
        let pooled = state.owners[owner.0 as usize].kind.is_pooled();
        let size = if pooled { size_class(bytes) } else { pages(bytes) };
        let mapping = state.take(owner, size, pooled)?;
        state.owners[owner.0 as usize].bytes += size as u64;
        drop(state);
        Ok(Arc::new(Region { mapping: Some(mapping), owner, pooled, arena: self.clone() }))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl State {
    fn take(&mut self, owner: Owner, size: usize, pooled: bool) -> Result<Mapping, OutOfMemory> {
        if pooled && let Some(mapping) = self.pool.get_mut(&size).and_then(Vec::pop) {
            self.pooled -= size as u64;
            return Ok(mapping);
        }
        if self.budget.is_some_and(|budget| self.held + size as u64 > budget) {
            self.trim();
        }
        let budget = self.budget.unwrap_or(u64::MAX);
        let refuse = |held, budget| {
            let holding = &self.owners[owner.0 as usize];
            let owner = format!("{} {:?}", holding.role, holding.kind).to_lowercase();
            OutOfMemory { owner, asked: size as u64, held, budget }
        };
        if self.held + size as u64 > budget {
            return Err(refuse(self.held, Some(budget)));
        }
        let mapping = Mapping::new(size).ok_or_else(|| refuse(self.held, None))?;
        self.held += size as u64;
        self.high_water = self.high_water.max(self.held);
        Ok(mapping)
    }

    fn trim(&mut self) {
        self.pool.clear();
        self.held -= self.pooled;
        self.pooled = 0;
    }
}

fn pages(bytes: usize) -> usize {
    bytes.max(1).next_multiple_of(4096)
}

/// Rounds up so that step-to-step changes of shape reuse the same regions (at most an eighth is lost).
fn size_class(bytes: usize) -> usize {
    let size = pages(bytes);
    pages(size.next_multiple_of((size.next_power_of_two() / 16).max(4096)))
}

/// Private anonymous memory, touched at creation.
struct Mapping {
    address: usize,
    bytes: usize,
}

impl Mapping {
    fn new(bytes: usize) -> Option<Mapping> {
        // SAFETY: a fresh private anonymous mapping aliases nothing.
        let pointer = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::POPULATE,
            )
        };
        Some(Mapping { address: pointer.ok()? as usize, bytes })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new` and nothing points to it any more.
        let _ = unsafe { rustix::mm::munmap(self.address as *mut _, self.bytes) };
    }
}

/// One allocation; goes back to the pool or to the system when the last buffer on it is dropped.
pub(crate) struct Region {
    mapping: Option<Mapping>,
    owner: Owner,
    pooled: bool,
    arena: Arena,
}

impl Region {
    pub(crate) fn address(&self) -> usize {
        self.mapping().address
    }

    pub(crate) fn bytes(&self) -> usize {
        self.mapping().bytes
    }

    fn mapping(&self) -> &Mapping {
        self.mapping.as_ref().expect("a region has its mapping until it is dropped")
    }

    fn clear(&self) {
        // SAFETY: called on a region that no buffer shares yet.
        unsafe { std::ptr::write_bytes(self.address() as *mut u8, 0, self.bytes()) };
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        let Some(mapping) = self.mapping.take() else { return };
        let size = mapping.bytes;
        let mut state = self.arena.lock();
        state.owners[self.owner.0 as usize].bytes -= size as u64;
        if self.pooled {
            state.pool.entry(size).or_default().push(mapping);
            state.pooled += size as u64;
        } else {
            state.held -= size as u64;
            drop(mapping);
        }
    }
}

/// The tensors of one model and kind in one region, one after another.
pub struct Slab {
    region: Arc<Region>,
    dtype: DType,
    shapes: Vec<(usize, usize)>,
    starts: Vec<usize>,
}

impl Slab {
    fn new(region: Arc<Region>, dtype: DType, shapes: &[(usize, usize)]) -> Slab {
        let mut starts = vec![0];
        for (rows, cols) in shapes {
            starts.push(starts[starts.len() - 1] + rows * cols);
        }
        Slab { region, dtype, shapes: shapes.to_vec(), starts }
    }

    /// Number of tensors.
    pub fn count(&self) -> usize {
        self.shapes.len()
    }

    /// Elements of all tensors.
    pub fn elements(&self) -> usize {
        self.starts[self.shapes.len()]
    }

    /// Rows and columns of tensor `index`.
    pub fn shape(&self, index: usize) -> (usize, usize) {
        self.shapes[index]
    }

    /// Tensor `index`.
    pub fn tensor(&self, index: usize) -> View<'_> {
        self.span(index..index + 1)
    }

    /// Tensor `index`, to write to.
    pub fn tensor_mut(&mut self, index: usize) -> ViewMut<'_> {
        self.span_mut(index..index + 1)
    }

    /// Neighbouring tensors of one width as one matrix (gate over up, all experts of a layer).
    pub fn span(&self, range: Range<usize>) -> View<'_> {
        self.joined(range).into_view()
    }

    /// Neighbouring tensors of one width as one matrix, to write to.
    pub fn span_mut(&mut self, range: Range<usize>) -> ViewMut<'_> {
        self.joined(range).into_view_mut()
    }

    /// All elements as one row.
    pub fn whole(&self) -> View<'_> {
        Buffer::new(self.region.clone(), 0, self.dtype, 1, self.elements()).into_view()
    }

    /// All elements as one row, to write to.
    pub fn whole_mut(&mut self) -> ViewMut<'_> {
        Buffer::new(self.region.clone(), 0, self.dtype, 1, self.elements()).into_view_mut()
    }

    /// Moves the slab to a file and gives its memory back.
    pub fn spill(self, path: &Path) -> std::io::Result<Spilled> {
        let mut file = File::create(path)?;
        file.write_all(self.bytes())?;
        Ok(Spilled { path: path.to_path_buf(), dtype: self.dtype, shapes: self.shapes.clone() })
    }

    fn joined(&self, range: Range<usize>) -> Buffer {
        let cols = self.shapes[range.start].1;
        assert!(
            self.shapes[range.clone()].iter().all(|s| s.1 == cols),
            "a span joins tensors of one width"
        );
        let rows = self.shapes[range.clone()].iter().map(|s| s.0).sum();
        Buffer::new(
            self.region.clone(),
            self.starts[range.start] * self.dtype.size(),
            self.dtype,
            rows,
            cols,
        )
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: the slab's elements lie in its region, and `&self` keeps writers away.
        unsafe {
            std::slice::from_raw_parts(
                self.region.address() as *const u8,
                self.elements() * self.dtype.size(),
            )
        }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        let length = self.elements() * self.dtype.size();
        // SAFETY: as for `bytes`; `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.region.address() as *mut u8, length) }
    }
}

/// A slab that lives in a file while its model is idle. Dropping it removes the file.
pub struct Spilled {
    path: PathBuf,
    dtype: DType,
    shapes: Vec<(usize, usize)>,
}

impl Spilled {
    /// Brings the slab back into `arena`, bit for bit.
    pub fn restore(&self, arena: &Arena, owner: Owner) -> Result<Slab, RestoreError> {
        let mut slab = arena.slab(owner, self.dtype, &self.shapes)?;
        File::open(&self.path)?.read_exact(slab.bytes_mut())?;
        Ok(slab)
    }

    /// Bytes in the file.
    pub fn bytes(&self) -> u64 {
        self.shapes.iter().map(|(rows, cols)| (rows * cols * self.dtype.size()) as u64).sum()
    }
}

impl Drop for Spilled {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Why a spilled slab could not come back.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// No room in the arena.
    #[error(transparent)]
    Memory(#[from] OutOfMemory),
    /// The spill file could not be read.
    #[error("spilled weights: {0}")]
    File(#[from] std::io::Error),
}

#[cfg(test)]
mod tests {
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
    fn a_spilled_slab_comes_back_bit_for_bit() {
        let arena = Arena::new(None);
        let owner = arena.owner("reference", Kind::Weights);
        let mut slab = arena.slab(owner, DType::F32, &[(3, 5), (1, 7), (2, 7)]).unwrap();
        for (i, byte) in slab.bytes_mut().iter_mut().enumerate() {
            *byte = (i * 31 % 251) as u8;
        }
        let before = slab.bytes().to_vec();
        assert_eq!((slab.span(1..3).rows(), slab.span(1..3).cols()), (3, 7));
        let path = std::env::temp_dir().join(format!("rehearsal-spill-{}", std::process::id()));
        let spilled = slab.spill(&path).unwrap();
        assert_eq!(arena.held(), 0);
        let back = spilled.restore(&arena, owner).unwrap();
        assert_eq!(back.bytes(), before);
        drop(spilled);
        assert!(!path.exists());
    }
}
