//! How a problem is solved, how a class can end, and what is wrong with an input. Uses nothing.

use thiserror::Error;

/// Malformed input. How a well-formed problem ended is a [`Status`], never an error.
#[derive(Debug, Error, Clone, PartialEq)]
pub enum ProblemError {
    #[error("weight must have at least 2 rows (classes) and 1 column, got {classes} x {dim}")]
    WeightShape { classes: usize, dim: usize },
    #[error("bias must have one entry per row of weight ({classes}), got {got}")]
    BiasShape { classes: usize, got: usize },
    #[error("latents must have {dim} columns to match weight, got {got}")]
    LatentShape { dim: usize, got: usize },
    #[error("latents must have at least one row (sample), got none")]
    NoSamples,
    #[error("{argument} must be finite, found {value} in row {row}")]
    NotFinite { argument: &'static str, row: usize, value: f64 },
    #[error("{argument} are too large: their lengths overflow float64")]
    TooLarge { argument: &'static str },
    #[error("classes must be in 0..{classes}, got {got}")]
    ClassRange { classes: usize, got: usize },
    #[error("labels must have one entry per sample ({samples}), got {got}")]
    LabelCount { samples: usize, got: usize },
    #[error("labels must be in 0..{classes}, got {got}")]
    LabelRange { classes: usize, got: usize },
    #[error("margins and samples must be {targets} x {classes}, got {rows} x {columns}")]
    MarginShape {
        targets: usize,
        classes: usize,
        rows: usize,
        columns: usize,
    },
    #[error("quantile must be in (0, 1], got {got}")]
    Quantile { got: f64 },
    #[error("tol must be in [1e-12, 1e-2], got {got}")]
    Tolerance { got: f64 },
    #[error("threads must be between 1 and 1024, got {got}")]
    Threads { got: usize },
    #[error("the solve was cancelled")]
    Cancelled,
}

/// Which solver works on a class.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Engine {
    /// The active-set kernel, and Clarabel for what its certificate does not cover.
    Auto,
    /// The project's dual active-set kernel on the shared Gram matrix.
    ActiveSet,
    /// Clarabel on the constraints that matter.
    Clarabel,
    /// Clarabel on all C-1 constraints at once: the slow oracle of tests and benchmarks.
    ClarabelFull,
}

/// How a class ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// A shift whose certificate meets the tolerance.
    Solved,
    /// The zero shift suffices: every sample is already sent to the class.
    Trivial,
    /// No shift suffices, or only one larger than [`REACH`] times the latents, with a proven bound.
    Unreachable,
    /// No engine could certify its answer to the tolerance.
    NotConverged,
}

/// A class is unreachable when its proven norm exceeds this multiple of the largest latent norm.
pub const REACH: f64 = 1e9;

#[derive(Debug, Clone)]
pub struct Settings {
    /// Which order statistic of the samples' margins a constraint uses; 1 is the maximum.
    pub quantile: f64,
    pub engine: Engine,
    /// Largest relative residual and gap of a solved class.
    pub tol: f64,
    /// Worker threads, for `batch::on_threads`; `None` is one per core.
    pub threads: Option<usize>,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            quantile: 1.0,
            engine: Engine::Auto,
            tol: 1e-9,
            threads: None,
        }
    }
}

impl Settings {
    pub fn check(&self) -> Result<(), ProblemError> {
        if !(self.quantile > 0.0 && self.quantile <= 1.0) {
            return Err(ProblemError::Quantile { got: self.quantile });
        }
        if !(1e-12..=1e-2).contains(&self.tol) {
            return Err(ProblemError::Tolerance { got: self.tol });
        }
        match self.threads {
            Some(got) if got == 0 || got > 1024 => Err(ProblemError::Threads { got }),
            _ => Ok(()),
        }
    }
}
