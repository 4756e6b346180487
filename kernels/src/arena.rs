//! Arena: the only maker of [`Buffer`]s of one device, and the count of who holds how many bytes.
//!
//! Memory comes from the operating system page by page and is touched at once, so that the arena's
//! count equals what the process really holds. Every byte has an owner (a role such as "policy" and a
//! [`Kind`]); a budget refuses an allocation before the system does.
//!
//! Invariants:
//!   * bytes held = sum over owners + bytes pooled <= budget
//!   * who is short of memory asks for room once, and again as long as some is made, before it is refused
//!   * a pooled region is reused for requests of at least two thirds of its size, and under a budget what regions in use are
//!     larger than asked for is at most its [`WASTE`]th part; a request that finds none gives idle
//!     smaller ones back first, so that ragged batches do not pile up regions of every size

use crate::buffer::{Buffer, DType};
use crate::mapping::Mapping;
use crate::slab::Slab;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::ops::Deref;
use std::sync::{Arc, Mutex, MutexGuard};

/// What an allocation is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Master weights under their published names.
    Weights,
    /// Weights packed for products, stamped with a policy version; pooled between versions.
    Packed,
    /// Gradients of the weights; pooled between phases.
    Gradients,
    /// First and second moments of the optimizer.
    Moments,
    /// Latent cache; pooled between phases.
    Cache,
    /// Activations and scratch of a step; pooled between steps.
    Activations,
}

impl Kind {
    /// True if freed memory is kept for the next step, until the arena is trimmed.
    fn is_pooled(self) -> bool {
        !matches!(self, Kind::Weights | Kind::Moments)
    }

    /// True if its sizes change from step to step.
    fn is_ragged(self) -> bool {
        matches!(self, Kind::Activations | Kind::Packed)
    }
}

/// Under a budget, regions in use are larger than asked for by this part of it at most.
pub const WASTE: u64 = 64;

/// Who holds an allocation: a role ("policy", "reference", "reward helpful") and a kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Owner(u32);

/// The arena's budget would be exceeded, or the system gives no more.
#[derive(Debug, thiserror::Error)]
#[error("memory: {owner} asks for {asked} bytes, {held}{}", reason(*budget))]
pub struct OutOfMemory {
    /// Role and kind of the asking owner.
    pub owner: String,
    /// Bytes asked for.
    pub asked: u64,
    /// Bytes held by all owners.
    pub held: u64,
    /// The budget in bytes that would be exceeded; `None` if the system refused.
    pub budget: Option<u64>,
}

fn reason(budget: Option<u64>) -> String {
    match budget {
        Some(budget) => format!(" of {budget} are held; raise engine.budget or offload more"),
        None => " are held, and the system gives no more; free memory, raise the process's limit, or set engine.budget \
                 below it"
            .to_string(),
    }
}

/// Makes buffers and counts them. Clones share one count.
#[derive(Clone)]
pub struct Arena {
    state: Arc<Mutex<State>>,
}

/// Makes room for so many bytes by putting away what is not in use; says whether it did.
pub type RoomMaker = Arc<dyn Fn(u64) -> bool + Send + Sync>;

#[derive(Default)]
struct State {
    budget: Option<u64>,
    held: u64,
    high_water: u64,
    /// The most bytes in use at once.
    most_used: u64,
    /// Bytes that regions in use are larger than asked for.
    wasted: u64,
    /// Bytes of weights and moments, which are not pooled.
    lasting: u64,
    /// The most bytes of other kinds in use at once, since it was asked last.
    working: u64,
    room_maker: Option<RoomMaker>,
    /// Requests that may be refused for want of memory without asking for room.
    is_modest: bool,
    /// Bytes beside weights and moments that modest requests may bring in use.
    allowance: Option<u64>,
    owners: Vec<Holding>,
    /// Idle regions by size, which know no arena; a size stays when its last region leaves.
    pool: BTreeMap<usize, Vec<Arc<Region>>>,
    pooled: u64,
}

struct Holding {
    role: String,
    kind: Kind,
    bytes: u64,
    /// The most bytes that one request asked for.
    largest: u64,
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
            state.owners.push(Holding { role: role.to_string(), kind, bytes: 0, largest: 0 });
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

    /// `count` such buffers in one piece of memory, so that small ones too lie in huge pages together.
    pub fn buffers(
        &self,
        owner: Owner,
        dtype: DType,
        rows: usize,
        cols: usize,
        count: usize,
    ) -> Result<Vec<Buffer>, OutOfMemory> {
        let bytes = pages(rows * cols * dtype.size());
        let region = self.region(owner, bytes * count)?;
        let buffer = |index| Buffer::new(region.clone(), index * bytes, dtype, rows, cols);
        Ok((0..count).map(buffer).collect())
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
        region.clear();
        Ok(Slab::new(region, dtype, shapes))
    }

    /// The same with contents that are not defined; refused without asking for room.
    pub fn slab_at_hand(
        &self,
        owner: Owner,
        dtype: DType,
        shapes: &[(usize, usize)],
    ) -> Result<Slab, OutOfMemory> {
        let elements: usize = shapes.iter().map(|(rows, cols)| rows * cols).sum();
        let region = self.region_at_hand(owner, elements * dtype.size())?;
        Ok(Slab::new(region, dtype, shapes))
    }

    /// Whom to ask for room before a request is refused. It must not ask this arena for memory itself, and is asked on the
    /// thread that is short.
    pub fn ask_for_room(&self, maker: Option<RoomMaker>) {
        self.lock().room_maker = maker;
    }

    /// Has requests refused without asking for room, as long as the result lives: for who can do with less.
    pub fn modest(&self, is_modest: bool) -> Modest {
        let before = std::mem::replace(&mut self.lock().is_modest, is_modest);
        Modest(self.clone(), before)
    }

    /// Has modest requests refused that would bring more than so many bytes beside weights and moments in use.
    pub fn allow_working(&self, bytes: Option<u64>) {
        self.lock().allowance = bytes;
    }

    /// The most bytes beside weights and moments that were in use at once since this was asked last.
    pub fn working_peak(&self) -> u64 {
        let mut state = self.lock();
        let now = state.held - state.pooled - state.lasting;
        std::mem::replace(&mut state.working, now)
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

    /// Bytes held now that somebody uses: the others make room where a budget needs it.
    pub fn in_use(&self) -> u64 {
        let state = self.lock();
        state.held - state.pooled
    }

    /// The most bytes ever held at once.
    pub fn high_water(&self) -> u64 {
        self.lock().high_water
    }

    /// The most bytes that somebody ever used at once: with a budget of so many, nobody would have been refused.
    pub fn most_used(&self) -> u64 {
        self.lock().most_used
    }

    /// The most bytes that one request of a kind ever asked for, over all roles.
    pub fn largest(&self, kind: Kind) -> u64 {
        let state = self.lock();
        state.owners.iter().filter(|h| h.kind == kind).map(|h| h.largest).max().unwrap_or(0)
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

    fn region(&self, owner: Owner, bytes: usize) -> Result<Hold, OutOfMemory> {
        loop {
            let refused = match self.region_at_hand(owner, bytes) {
                Ok(region) => return Ok(region),
                Err(refused) => refused,
            };
            let state = self.lock();
            let maker = state.room_maker.clone().filter(|_| !state.is_modest);
            let missing = state.missing(bytes as u64);
            drop(state);
            if !maker.is_some_and(|make_room| make_room(missing)) {
                return Err(refused);
            }
        }
    }

    fn region_at_hand(&self, owner: Owner, bytes: usize) -> Result<Hold, OutOfMemory> {
        let mut state = self.lock();
        let kind = state.owners[owner.0 as usize].kind;
        let pooled = kind.is_pooled();
        let size = rounded(kind, bytes) as usize;
        let working = state.held - state.pooled - state.lasting + size as u64;
        if pooled && state.is_modest && state.allowance.is_some_and(|allowed| working > allowed) {
            return Err(state.refusal(owner, size, state.budget));
        }
        let mut region = state.take(owner, size, pooled)?;
        let holding = &mut state.owners[owner.0 as usize];
        holding.bytes += region.bytes() as u64;
        holding.largest = holding.largest.max(bytes as u64);
        state.lasting += if pooled { 0 } else { region.bytes() as u64 };
        state.working = state.working.max(state.held - state.pooled - state.lasting);
        state.most_used = state.most_used.max(state.held - state.pooled);
        drop(state);
        let idle = Arc::get_mut(&mut region).expect("nobody holds an idle region");
        (idle.owner, idle.pooled, idle.asked) = (owner, pooled, size);
        idle.arena = Some(self.clone());
        Ok(Hold(Some(region)))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl State {
    fn take(
        &mut self,
        owner: Owner,
        size: usize,
        pooled: bool,
    ) -> Result<Arc<Region>, OutOfMemory> {
        if pooled {
            let slack = self.budget.map_or(u64::MAX, |b| (b / WASTE).saturating_sub(self.wasted));
            let most = size + (size / 2).min(usize::try_from(slack).unwrap_or(usize::MAX));
            let mut fitting = self.pool.range_mut(size..=most);
            if let Some(region) = fitting.find_map(|(_, regions)| regions.pop()) {
                self.pooled -= region.bytes() as u64;
                self.wasted += (region.bytes() - size) as u64;
                return Ok(region);
            }
            self.evict(size);
        }
        if self.budget.is_some_and(|budget| self.held + size as u64 > budget) {
            self.trim();
        }
        if self.budget.is_some_and(|budget| self.held + size as u64 > budget) {
            return Err(self.refusal(owner, size, self.budget));
        }
        let mapping = Mapping::new(size).or_else(|| {
            self.trim();
            Mapping::new(size)
        });
        let mapping = mapping.ok_or_else(|| self.refusal(owner, size, None))?;
        self.held += size as u64;
        self.high_water = self.high_water.max(self.held);
        Ok(Arc::new(Region { mapping, owner, pooled, asked: size, arena: None }))
    }

    /// Bytes that others must give up before so many fit.
    fn missing(&self, bytes: u64) -> u64 {
        let held = self.held - self.pooled + bytes;
        self.budget.map_or(bytes, |budget| held.saturating_sub(budget))
    }

    /// Gives smaller pooled regions back to the system, the largest first, until they make up for `size`.
    fn evict(&mut self, size: usize) {
        let mut given = 0;
        let smaller = self.pool.range_mut(..size).rev().map(|(_, regions)| regions);
        for regions in smaller {
            while given < size
                && let Some(region) = regions.pop()
            {
                given += region.bytes();
            }
        }
        self.pooled -= given as u64;
        self.held -= given as u64;
    }

    fn refusal(&self, owner: Owner, size: usize, budget: Option<u64>) -> OutOfMemory {
        let holding = &self.owners[owner.0 as usize];
        let owner = format!("{} {:?}", holding.role, holding.kind).to_lowercase();
        OutOfMemory { owner, asked: size as u64, held: self.held, budget }
    }

    fn trim(&mut self) {
        self.pool.clear();
        self.held -= self.pooled;
        self.pooled = 0;
    }
}

/// Bytes that a request of a kind takes, unless a larger region is at hand.
pub(crate) fn rounded(kind: Kind, bytes: usize) -> u64 {
    let size = if kind.is_ragged() { size_class(bytes) } else { pages(bytes) };
    size as u64
}

fn pages(bytes: usize) -> usize {
    bytes.max(1).next_multiple_of(4096)
}

/// Rounds up so that step-to-step changes of shape reuse the same regions (at most an eighth is lost).
fn size_class(bytes: usize) -> usize {
    let size = pages(bytes);
    pages(size.next_multiple_of((size.next_power_of_two() / 16).max(4096)))
}

/// One allocation. In the pool it knows no arena.
pub(crate) struct Region {
    mapping: Mapping,
    owner: Owner,
    pooled: bool,
    /// Bytes that it was asked for with.
    asked: usize,
    arena: Option<Arena>,
}

impl Region {
    pub(crate) fn address(&self) -> usize {
        self.mapping.address
    }

    pub(crate) fn bytes(&self) -> usize {
        self.mapping.bytes
    }

    fn clear(&self) {
        // SAFETY: called on a region that no buffer shares yet.
        unsafe { std::ptr::write_bytes(self.address() as *mut u8, 0, self.bytes()) };
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        let Some(arena) = self.arena.take() else { return };
        let mut state = arena.lock();
        state.owners[self.owner.0 as usize].bytes -= self.bytes() as u64;
        state.held -= self.bytes() as u64;
        state.wasted -= (self.bytes() - self.asked) as u64;
        state.lasting -= if self.pooled { 0 } else { self.bytes() as u64 };
    }
}

/// See [`Arena::modest`].
pub struct Modest(Arena, bool);

impl Drop for Modest {
    fn drop(&mut self) {
        self.0.lock().is_modest = self.1;
    }
}

/// A buffer's hold on its region. The last one gives it to the pool as it is, so that the next buffer asks no heap
/// for anything; where two last ones go at the same moment, back to the system.
#[derive(Clone)]
pub(crate) struct Hold(Option<Arc<Region>>);

impl Deref for Hold {
    type Target = Region;
    fn deref(&self) -> &Region {
        self.0.as_ref().expect("a hold has its region until it is dropped")
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let Some(mut region) = self.0.take() else { return };
        let Some(last) = Arc::get_mut(&mut region).filter(|region| region.pooled) else { return };
        let Some(arena) = last.arena.take() else { return };
        let (owner, size) = (last.owner, last.bytes());
        let mut state = arena.lock();
        state.owners[owner.0 as usize].bytes -= size as u64;
        state.wasted -= (size - last.asked) as u64;
        state.pool.entry(size).or_default().push(region);
        state.pooled += size as u64;
    }
}

#[cfg(test)]
mod tests;
