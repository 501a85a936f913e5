//! What a running solve and its caller tell each other. Uses nothing.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Instant;

/// Shared with the caller's thread, which may ask the solve to stop and look how far it is.
#[derive(Default)]
pub struct Control {
    cancel: Arc<AtomicBool>,
    done: AtomicUsize,
    nanoseconds: [AtomicU64; STAGES.len()],
}

/// The parts of a solve, by the order of [`STAGES`].
#[derive(Debug, Clone, Copy)]
pub enum Stage {
    Logits,
    Gram,
    Collapse,
    Qp,
}

/// Names of the stages. The last two run side by side on all workers: their times are summed over these. Making a margin exact belongs to the
/// collapse, whenever the QP asks for it.
pub const STAGES: [&str; 4] = ["logits", "gram", "collapse", "qp"];

thread_local! {
    /// Nanoseconds that this thread has booked so far.
    static BOOKED: Cell<u64> = const { Cell::new(0) };
}

impl Control {
    pub fn cancel(&self) {
        self.cancel.store(true, Ordering::Relaxed);
    }

    pub fn cancelled(&self) -> bool {
        self.cancel.load(Ordering::Relaxed)
    }

    /// The flag itself, for what must own it.
    pub fn flag(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.cancel)
    }

    /// QPs that are finished.
    pub fn done(&self) -> usize {
        self.done.load(Ordering::Relaxed)
    }

    pub fn advance(&self, by: usize) {
        self.done.fetch_add(by, Ordering::Relaxed);
    }

    /// Runs `work` and books its time, less what it books for another stage meanwhile.
    pub fn timed<T>(&self, stage: Stage, work: impl FnOnce() -> T) -> T {
        let (start, before) = (Instant::now(), BOOKED.get());
        let result = work();
        let spent = u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let inner = BOOKED.get() - before;
        self.nanoseconds[stage as usize].fetch_add(spent.saturating_sub(inner), Ordering::Relaxed);
        BOOKED.set(before + spent);
        result
    }

    /// Seconds by stage.
    pub fn seconds(&self) -> [f64; STAGES.len()] {
        std::array::from_fn(|i| self.nanoseconds[i].load(Ordering::Relaxed) as f64 * 1e-9)
    }
}
