//! The smallest shift of latent space that sends every clean sample to a class, for every class.
//!
//! For a classifier whose last layer is \\( \ell_i = W z_i + b \\), with \\(W \in \mathbb{R}^{C\times d}\\), and for a class
//! \\(k\\), the convex quadratic program of arXiv:2511.08944 (with the bias, which the network really uses) is
//!
//! \\[ s_k = \arg\min_s \tfrac12\|s\|^2 \quad\text{s.t.}\quad (w_k-w_j)^\top (s+z_i) + b_k - b_j \ge 0
//!    \qquad \forall j\ne k,\ \forall i. \\]
//!
//! The shift is shared by all samples, so only the worst sample of each rival class counts:
//! with \\( r_{kj} = \max_i(\ell_{ij}-\ell_{ik}) \\) and \\( a_j = w_k - w_j \\) the constraints are
//! \\( a_j^\top s \ge r_{kj} \\), and the dual is
//! \\( \max_{\lambda\ge 0}\ r^\top\lambda - \tfrac12\|\sum_j\lambda_j a_j\|^2 \\) with \\( s=\sum_j\lambda_j a_j \\).
//!
//! The rooms, each of which may use those above it:
//!
//! * `settings`, `latents`, `rows`, [`problem`]: how and what is solved, checked and in units that suit float64.
//! * [`control`]: how far a solve is, where its time went, and the wish to stop it.
//! * `max_plus`: the kernel whose cost is \\(nC^2\\), in the machine's widest registers.
//! * `order`: selection of an order statistic, for quantiles below 1.
//! * `linalg`, `layout`: products in a fixed order; samples by group and block.
//! * `logits`, `margins`: logits and their collapse to \\(r\\).
//! * `gram`: the shared \\(M=WW^\top\\), and differences of rows where it loses digits.
//! * `factor`: an up- and down-dated Cholesky factor.
//! * `prices`: how far a shift is from each constraint, and which are worst.
//! * `working_set`: a class's QP and working sets of its constraints.
//! * `active_set`, `interior`: the two engines.
//! * `generation`: constraints added until none is violated, around either engine.
//! * `certificate`: refinement of multipliers and the proof of what is returned.
//! * [`batch`]: all classes, in parallel.
//! * `py`: the bindings.

// A type that is shown to benchmarks alone need not be complete.
#![cfg_attr(feature = "bench", allow(clippy::len_without_is_empty))]

pub mod batch;
pub mod control;
pub mod problem;

mod active_set;
mod certificate;
mod factor;
mod generation;
mod gram;
mod interior;
mod latents;
mod layout;
mod linalg;
mod logits;
mod margins;
mod max_plus;
mod order;
mod prices;
mod rows;
mod settings;
mod working_set;

#[cfg(feature = "python")]
mod py;

/// The kernels that `benches/kernels.rs` times; no part of the interface.
#[cfg(feature = "bench")]
#[doc(hidden)]
pub mod bench_internals {
    pub use crate::factor::Factor;
    pub use crate::max_plus::{LANES, Lane, TILE, max_plus};
    pub use crate::order::{Own, Panel, Scratch, mth_largest};
}
