//! Stop: why the ranks of a run no longer work together, and who has to hear of it.
//!
//! Invariants:
//!   * the first reason stays; whoever asks later, or listens later, is told the same
//!   * everyone who listens is told once

use super::link::Broken;
use std::sync::{Mutex, MutexGuard};

type Listener = Box<dyn Fn(&Broken) + Send>;

/// Shared by all that waits on behalf of one rank.
#[derive(Default)]
pub struct Stop {
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    why: Option<Broken>,
    listeners: Vec<Listener>,
}

impl Stop {
    /// The reason, once there is one.
    pub fn why(&self) -> Option<Broken> {
        self.lock().why.clone()
    }

    /// Sets the reason and tells all who listen; false if there was one before.
    pub fn set(&self, why: &Broken) -> bool {
        let listeners = {
            let mut inner = self.lock();
            if inner.why.is_some() {
                return false;
            }
            inner.why = Some(why.clone());
            std::mem::take(&mut inner.listeners)
        };
        // Unlocked: a listener may ask for the reason.
        listeners.iter().for_each(|tell| tell(why));
        true
    }

    /// Calls `tell` with the reason, at once if there is one.
    pub fn on_stop(&self, tell: impl Fn(&Broken) + Send + 'static) {
        let mut inner = self.lock();
        match inner.why.clone() {
            None => inner.listeners.push(Box::new(tell)),
            Some(why) => {
                drop(inner);
                tell(&why);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(|e| e.into_inner())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn the_first_reason_stays_and_everyone_hears_it_once() {
        let (stop, told) = (Stop::default(), Arc::new(AtomicUsize::new(0)));
        let failed = |rank| Broken::Failed { rank, why: "no room".to_string(), code: 4 };
        let listen = || {
            let told = told.clone();
            stop.on_stop(move |why| {
                assert_eq!(why, &failed(1));
                told.fetch_add(1, Ordering::Relaxed);
            });
        };
        listen();
        assert!(stop.why().is_none() && stop.set(&failed(1)) && !stop.set(&failed(2)));
        listen();
        assert_eq!((stop.why(), told.load(Ordering::Relaxed)), (Some(failed(1)), 2));
    }
}
