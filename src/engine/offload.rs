//! A slab that is on the device while it is needed, and has a copy below it otherwise: on the host or on disk.
//!
//! The device's thread takes a slab out of its slot and puts it back; the transfers' thread fills and empties slots meanwhile.
//! Whoever takes a slab that is on its way waits for it, or moves it if nobody has begun: the wait is told as exposed.
//!
//! Invariants:
//!   * a slab is in its slot, or taken, or in its copy, or several of these with equal bytes
//!   * a slab leaves the device only after its copy is whole, and comes back bit for bit
//!   * what is changed has no copy: one that is being made is called off before the change

use super::offload_plan::Tier;
use super::transfers::{HostRoom, Job, Transfers};
use crate::cluster::{Work, made};
use crate::config::fault::Fault;
use anyhow::Result;
use rehearsal_kernels::{Arena, Below, DType, Owner, Slab, SlabCopy, SlabReader};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Instant;

/// A slab with a place to go.
pub struct Parked(pub(super) Arc<Slot>);

/// What the device's thread and that of the transfers share of a slab.
pub(super) struct Slot {
    name: String,
    owner: Owner,
    path: PathBuf,
    form: (DType, Vec<(usize, usize)>),
    transfers: Arc<Transfers>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    slab: Option<Slab>,
    is_taken: bool,
    copy: Option<Copy>,
    asked: Asked,
    moving: Option<Moving>,
    /// Why it could not be copied last.
    fault: Option<String>,
}

struct Copy {
    slab: SlabCopy,
    tier: Tier,
    _room: Option<HostRoom>,
}

/// What the thread was asked for and has not begun.
#[derive(Default)]
enum Asked {
    #[default]
    Nothing,
    Write(SlabReader),
    Read,
}

/// A transfer that is being made.
#[derive(Clone)]
struct Moving {
    is_read: bool,
    called_off: Arc<AtomicBool>,
}

impl Moving {
    fn new(is_read: bool) -> Moving {
        Moving { is_read, called_off: Arc::default() }
    }

    /// Asked between pieces of it.
    fn goes_on(&self) -> bool {
        made(Work::Park);
        !self.called_off.load(Ordering::Relaxed)
    }
}

impl Parked {
    /// A resident slab of this name in the ledger; `file` is the name of its copy.
    pub(super) fn new(
        transfers: &Arc<Transfers>,
        name: String,
        owner: Owner,
        file: &str,
        slab: Slab,
    ) -> Parked {
        Parked(Arc::new(Slot {
            name,
            owner,
            path: transfers.folder.join(file),
            form: (slab.dtype(), slab.shapes().to_vec()),
            transfers: transfers.clone(),
            state: Mutex::new(State { slab: Some(slab), ..State::default() }),
            changed: Condvar::new(),
        }))
    }

    /// Takes the slab out to read it, bringing it back from its copy if it is there. Returns the bytes read.
    pub fn take(&mut self, arena: &Arena) -> Result<(Slab, u64)> {
        self.0.take(arena)
    }

    /// The same to change it: no copy of it is made meanwhile.
    pub fn take_to_change(&mut self, arena: &Arena) -> Result<(Slab, u64)> {
        self.0.stop_writing()?;
        self.0.take(arena)
    }

    /// Puts a slab back that was changed: its copy, if any, is out of date.
    pub fn put_changed(&mut self, slab: Slab) {
        let mut state = self.0.lock();
        (state.copy, state.is_taken, state.slab) = (None, false, Some(slab));
    }

    /// Puts a slab back that was only read.
    pub fn put(&mut self, slab: Slab) {
        let mut state = self.0.lock();
        (state.is_taken, state.slab) = (false, Some(slab));
    }

    /// Makes the slab leave the device at once. Returns the bytes that it gives back. A slab that could not be written stays.
    pub fn release(&mut self) -> Result<u64> {
        self.0.release(Tier::Host)
    }
}

impl Slot {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Its name in the ledger.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its size.
    pub fn bytes(&self) -> u64 {
        let elements: usize = self.form.1.iter().map(|(rows, cols)| rows * cols).sum();
        (elements * self.form.0.size()) as u64
    }

    /// Where it is, a slab on its way to the device as being there.
    pub fn tier(&self) -> Tier {
        let state = self.lock();
        let is_coming = state.moving.as_ref().is_some_and(|moving| moving.is_read);
        match &state.copy {
            Some(copy) if state.slab.is_none() && !state.is_taken && !is_coming => copy.tier,
            _ => Tier::Device,
        }
    }

    /// Whether it takes room on the device that it could do without: it is not in use.
    pub fn is_idle_on_device(&self) -> bool {
        self.tier() == Tier::Device && !self.lock().is_taken
    }

    /// Whether it has a copy.
    #[cfg(test)]
    pub fn has_copy(&self) -> bool {
        self.lock().copy.is_some()
    }

    fn take(&self, arena: &Arena) -> Result<(Slab, u64)> {
        let began = Instant::now();
        let mut state = self.settled(self.lock(), began, |moving| moving.is_read)?;
        if let Some(slab) = state.slab.take() {
            state.is_taken = true;
            return Ok((slab, 0));
        }
        // The thread has not begun: there is no sense in waiting for it.
        state.asked = Asked::Nothing;
        drop(state);
        let began = Instant::now();
        let out_of_memory =
            |fault: rehearsal_kernels::OutOfMemory| Fault::resources(fault.to_string());
        let slab = arena.slab(self.owner, self.form.0, &self.form.1).map_err(out_of_memory)?;
        let moving = Moving::new(true);
        let slab = self.read(slab, &moving).map_err(|fault| self.unreadable(&fault))?;
        self.transfers.record.waited_since(began);
        self.lock().is_taken = true;
        Ok((slab.expect("nobody called it off"), self.bytes()))
    }

    fn unreadable(&self, fault: &std::io::Error) -> anyhow::Error {
        Fault::resources(format!("failed to read {} ({}): {fault}", self.path.display(), self.name))
    }

    /// The state when no transfer of this kind is being made any more. What is waited for is told.
    fn settled<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        began: Instant,
        kind: impl Fn(&Moving) -> bool,
    ) -> Result<MutexGuard<'a, State>> {
        let mut has_waited = false;
        while state.moving.as_ref().is_some_and(&kind) {
            has_waited = true;
            let Some(left) = self.transfers.deadline.checked_sub(began.elapsed()) else {
                return Err(Fault::resources(format!(
                    "the transfer of {} took longer than engine.deadline_seconds; see whether the disk of {} answers",
                    self.name,
                    self.path.display()
                )));
            };
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(|poisoned| poisoned.into_inner()).0;
        }
        if has_waited {
            self.transfers.record.waited_since(began);
        }
        Ok(state)
    }

    /// Calls off a copy that is being made or was asked for.
    fn stop_writing(&self) -> Result<()> {
        let mut state = self.lock();
        if matches!(state.asked, Asked::Write(_)) {
            state.asked = Asked::Nothing;
        }
        if let Some(moving) = state.moving.as_ref().filter(|moving| !moving.is_read) {
            moving.called_off.store(true, Ordering::Relaxed);
        }
        self.settled(state, Instant::now(), |moving| !moving.is_read).map(drop)
    }

    /// Asks the thread for a copy, if there is none. On the device's thread, which alone changes slabs.
    pub fn ask_to_write(self: &Arc<Self>, tier: Tier) {
        let mut state = self.lock();
        let is_free = state.copy.is_none() && state.moving.is_none();
        if let (true, Some(slab)) = (is_free, &state.slab) {
            state.asked = Asked::Write(slab.reader());
            drop(state);
            self.transfers.ask(Job::Write(self.clone(), tier));
        }
    }

    /// Asks the thread to read it into the place of others, if it is not there.
    pub fn ask_to_read(self: &Arc<Self>, leave: Vec<Arc<Slot>>) {
        let mut state = self.lock();
        if state.slab.is_none() && !state.is_taken && state.moving.is_none() {
            state.asked = Asked::Read;
            drop(state);
            self.transfers.ask(Job::Read(self.clone(), leave));
        }
    }

    /// What was asked for is not wanted any more.
    pub fn forget_asked(&self) {
        self.lock().asked = Asked::Nothing;
    }

    /// On the thread: makes the copy that was asked for, if it still is.
    pub fn write_asked(&self, tier: Tier) {
        let mut state = self.lock();
        let Asked::Write(reader) = std::mem::take(&mut state.asked) else { return };
        let moving = Moving::new(false);
        state.moving = Some(moving.clone());
        drop(state);
        self.write(reader, tier, &moving);
    }

    /// On the thread: reads the copy, if that is still wanted and memory is at hand.
    pub fn read_asked(&self) {
        let mut state = self.lock();
        if !matches!(state.asked, Asked::Read) || state.slab.is_some() || state.copy.is_none() {
            return;
        }
        let slab = self.transfers.arena.slab_at_hand(self.owner, self.form.0, &self.form.1);
        let Ok(slab) = slab else { return };
        let moving = Moving::new(true);
        state.moving = Some(moving.clone());
        drop(state);
        // A copy that cannot be read now is tried again, and told, by whoever needs it.
        let slab = self.read(slab, &moving).ok().flatten();
        let mut state = self.lock();
        (state.slab, state.moving) = (slab, None);
        self.changed.notify_all();
    }

    /// Copies what `reader` shows and ends `moving`; a fault is kept.
    fn write(&self, reader: SlabReader, tier: Tier, moving: &Moving) {
        let began = Instant::now();
        let (tier, room) = self.transfers.room_below(tier, self.bytes());
        let below = match tier {
            Tier::Host => Below::Host(&*self.transfers.host),
            _ => Below::Disk,
        };
        let form = (self.form.0, &*self.form.1);
        let copy = SlabCopy::write(&reader, form, &self.path, below, &|| moving.goes_on());
        drop(reader);
        let mut state = self.lock();
        match copy {
            Ok(Some(slab)) => {
                self.transfers.learn(tier, false, self.bytes(), began.elapsed().as_secs_f64());
                self.transfers.record.moved_since(began, &self.name, [tier; 2], self.bytes());
                state.copy = Some(Copy { slab, tier, _room: room });
                state.fault = None;
            }
            Ok(None) => {}
            Err(fault) => {
                let path = self.path.display();
                state.fault = Some(format!("failed to offload {} to {path}: {fault}", self.name));
            }
        }
        state.moving = None;
        self.changed.notify_all();
    }

    fn read(&self, mut slab: Slab, moving: &Moving) -> std::io::Result<Option<Slab>> {
        let began = Instant::now();
        // A copy goes nowhere while its slab is not on the device.
        let copy = self.lock().copy.take().expect("a slab that is not on the device has a copy");
        let whole = copy.slab.read(&mut slab, &|| moving.goes_on());
        let tier = copy.tier;
        self.lock().copy = Some(copy);
        if whole? {
            self.transfers.learn(tier, true, self.bytes(), began.elapsed().as_secs_f64());
            let way = [Tier::Device, tier];
            self.transfers.record.moved_since(began, &self.name, way, self.bytes());
            return Ok(Some(slab));
        }
        Ok(None)
    }

    /// Leaves the device if a copy is below and nobody uses it. Returns the bytes that it gives back.
    pub fn leave_if_copied(&self) -> u64 {
        let mut state = self.lock();
        let is_free = state.copy.is_some() && state.moving.is_none();
        match is_free && state.slab.take().is_some() {
            true => self.bytes(),
            false => 0,
        }
    }

    /// Calls off its reading. Returns the bytes that this gives back.
    pub fn stop_reading(&self) -> Result<u64> {
        let state = self.lock();
        let moving = state.moving.clone().filter(|moving| moving.is_read);
        let Some(moving) = moving else { return Ok(0) };
        moving.called_off.store(true, Ordering::Relaxed);
        drop(self.settled(state, Instant::now(), |moving| moving.is_read)?);
        // It may have been whole by then.
        Ok(self.leave_if_copied().max(1))
    }

    /// Makes it leave the device at once, with a copy in `tier` if it has none. Returns the bytes that it gives back.
    pub fn release(&self, tier: Tier) -> Result<u64> {
        let began = Instant::now();
        let mut state = self.settled(self.lock(), began, |_| true)?;
        if state.slab.is_none() {
            return Ok(0);
        }
        if state.copy.is_none() {
            // A copy that was asked for is made here.
            state.asked = Asked::Nothing;
            let reader = state.slab.as_ref().expect("it is there").reader();
            let began = Instant::now();
            let moving = Moving::new(false);
            state.moving = Some(moving.clone());
            drop(state);
            self.write(reader, tier, &moving);
            self.transfers.record.waited_since(began);
            if let Some(fault) = self.lock().fault.take() {
                return Err(Fault::resources(fault));
            }
        } else {
            drop(state);
        }
        Ok(self.leave_if_copied())
    }
}

#[cfg(test)]
mod tests;
