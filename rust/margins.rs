//! From latents to margins: for a class k and a rival j the one number that the QP needs, r_kj = max_i (l_ij - l_ik), or a lower order
//! statistic of it. May use: problem, max_plus, order.
//!
//! All margins are first taken in float32, which gives an upper bound on each: its error has a bound of its own. Few of them ever matter to
//! the QP; those are computed again in float64, from the differences of the rows, at every sample that the float32 margins leave in doubt.

use std::sync::atomic::{AtomicBool, Ordering};

use multiversion::multiversion;
use rayon::prelude::*;

use crate::max_plus::{LANES, Lane, TILE, max_plus};
use crate::order::{Scratch, mth_largest};
use crate::problem::{Problem, ProblemError};

/// Samples per block: a panel of a block stays in the first-level cache, and the block of a maximum is soon searched.
const BLOCK: usize = 128;
/// Samples per GEMM: enough to pay for packing W.
const GEMM_BLOCKS: usize = 4;

/// Logits in float32 without biases, as blocks of samples x panels of classes, so that the max-plus kernel reads memory in order.
pub struct Logits {
    samples: usize,
    panels: usize,
    /// `[block][panel][sample in block]`; lanes past the last class hold -inf and never win a maximum.
    data: Vec<Lane>,
    /// Bound on the error of a logit, per unit of |w_j|.
    error: f64,
}

impl Logits {
    /// One GEMM, split over fixed blocks of samples: the result does not depend on the number of threads.
    pub fn new(problem: &Problem, cancel: &AtomicBool) -> Result<Self, ProblemError> {
        let (classes, dim, samples) = (problem.classes, problem.dim, problem.samples);
        let panels = classes.div_ceil(LANES);
        let blocks = samples.div_ceil(BLOCK);
        let weight: Vec<f32> = problem.weight.iter().map(|&v| v as f32).collect();
        let mut data = vec![[f32::NEG_INFINITY; LANES]; blocks * panels * BLOCK];
        let rows_at_once = GEMM_BLOCKS * BLOCK;
        data.par_chunks_mut(GEMM_BLOCKS * panels * BLOCK).enumerate().for_each_init(
            || (vec![0.0f32; rows_at_once * dim], vec![0.0f32; rows_at_once * classes]),
            |(latents, logits), (group, out)| {
                if cancel.load(Ordering::Relaxed) {
                    return;
                }
                let first = group * rows_at_once;
                let rows = rows_at_once.min(samples - first);
                problem.latents_into(first, &mut latents[..rows * dim]);
                multiply_transposed_f32(latents, &weight, logits, rows, dim, classes);
                for (block, rows) in logits[..rows * classes].chunks(BLOCK * classes).enumerate() {
                    scatter(rows, &mut out[block * panels * BLOCK..], classes);
                }
            },
        );
        if cancel.load(Ordering::Relaxed) {
            return Err(ProblemError::Cancelled);
        }
        // d products and sums in float32 in any order, after rounding W and Z to it (Higham 2002, sec. 3.1).
        let gamma = (dim as f64 + 4.0) * f64::from(f32::EPSILON);
        Ok(Logits {
            samples,
            panels,
            data,
            error: gamma * problem.longest_latent,
        })
    }

    fn panel(&self, block: usize, panel: usize) -> &[Lane] {
        let rows = BLOCK.min(self.samples - block * BLOCK);
        let start = (block * self.panels + panel) * BLOCK;
        &self.data[start..start + rows]
    }

    /// Bytes that [`Peaks`] holds for one target.
    pub fn peak_bytes(&self) -> usize {
        self.blocks() * self.panels * size_of::<Lane>()
    }

    fn blocks(&self) -> usize {
        self.samples.div_ceil(BLOCK)
    }

    /// (l_ij - l_ik) of the samples of a block, without biases.
    fn margins(&self, block: usize, k: usize, j: usize) -> impl Iterator<Item = f32> + '_ {
        let (pk, pj) = (self.panel(block, k / LANES), self.panel(block, j / LANES));
        let (lk, lj) = (k % LANES, j % LANES);
        pk.iter().zip(pj).map(move |(a, b)| b[lj] - a[lk])
    }
}

/// out (m x n) = a (m x d) times the transpose of b (n x d), all row-major, on this thread.
pub fn multiply_transposed(a: &[f64], b: &[f64], out: &mut [f64], m: usize, d: usize, n: usize) {
    assert!(a.len() >= m * d && b.len() >= n * d && out.len() >= m * n);
    let (d_, n_) = (d as isize, n as isize);
    // SAFETY: the assertion bounds every element that the strides reach.
    unsafe { matrixmultiply::dgemm(m, d, n, 1.0, a.as_ptr(), d_, 1, b.as_ptr(), 1, d_, 0.0, out.as_mut_ptr(), n_, 1) }
}

fn multiply_transposed_f32(a: &[f32], b: &[f32], out: &mut [f32], m: usize, d: usize, n: usize) {
    assert!(a.len() >= m * d && b.len() >= n * d && out.len() >= m * n);
    let (d_, n_) = (d as isize, n as isize);
    // SAFETY: the assertion bounds every element that the strides reach.
    unsafe { matrixmultiply::sgemm(m, d, n, 1.0, a.as_ptr(), d_, 1, b.as_ptr(), 1, d_, 0.0, out.as_mut_ptr(), n_, 1) }
}

/// Rows of one block into its panels.
fn scatter(logits: &[f32], out: &mut [Lane], classes: usize) {
    for (i, row) in logits.chunks_exact(classes).enumerate() {
        for (panel, values) in row.chunks(LANES).enumerate() {
            out[panel * BLOCK + i][..values.len()].copy_from_slice(values);
        }
    }
}

/// The float32 margins of a few target classes against all rivals, by block of samples.
pub struct Peaks<'a, 'p> {
    logits: &'a Logits,
    problem: &'a Problem<'p>,
    targets: &'a [usize],
    /// Position of the order statistic, in increasing order.
    rank: usize,
    /// `[tile][panel][block][target in tile]`: the largest margin within the block. Empty where the rank is not the last.
    data: Vec<Lane>,
    /// `[target][panel]`: the order statistic itself. Empty where the rank is the last: then it is the largest of `data`.
    ranked: Vec<Lane>,
}

impl<'a, 'p> Peaks<'a, 'p> {
    pub fn new(logits: &'a Logits, problem: &'a Problem<'p>, targets: &'a [usize], quantile: f64) -> Self {
        let rank = rank(logits.samples, quantile);
        let mut peaks = Peaks {
            logits,
            problem,
            targets,
            rank,
            data: Vec::new(),
            ranked: Vec::new(),
        };
        if peaks.is_max() {
            peaks.fill_maxima();
        } else {
            peaks.fill_ranked();
        }
        peaks
    }

    fn is_max(&self) -> bool {
        self.rank + 1 == self.logits.samples
    }

    fn fill_maxima(&mut self) {
        let (logits, targets) = (self.logits, self.targets);
        let (blocks, panels) = (logits.blocks(), logits.panels);
        self.data = vec![[f32::NEG_INFINITY; LANES]; targets.len().div_ceil(TILE) * panels * blocks * TILE];
        let mut keys = vec![[0.0; TILE]; BLOCK];
        for block in 0..blocks {
            for (tile, group) in targets.chunks(TILE).enumerate() {
                for t in 0..TILE {
                    // A short last group repeats its first class; the surplus rows are never read.
                    let class = group.get(t).copied().unwrap_or(group[0]);
                    for (key, values) in keys.iter_mut().zip(logits.panel(block, class / LANES)) {
                        key[t] = values[class % LANES];
                    }
                }
                for panel in 0..panels {
                    let values = logits.panel(block, panel);
                    let start = ((tile * panels + panel) * blocks + block) * TILE;
                    let out = (&mut self.data[start..start + TILE]).try_into().expect("a tile");
                    max_plus(&keys[..values.len()], values, out);
                }
            }
        }
    }

    fn fill_ranked(&mut self) {
        let logits = self.logits;
        let (m, mut scratch) = (logits.samples - self.rank, Scratch::default());
        for &k in self.targets {
            let own: Vec<f32> = (0..logits.blocks())
                .flat_map(|block| logits.panel(block, k / LANES).iter().map(|v| v[k % LANES]))
                .collect();
            for panel in 0..logits.panels {
                let blocks: Vec<(&[f32], &[Lane])> = own
                    .chunks(BLOCK)
                    .enumerate()
                    .map(|(block, keys)| (keys, logits.panel(block, panel)))
                    .collect();
                self.ranked.push(mth_largest(&blocks, m, &mut scratch));
            }
        }
    }

    /// Largest float32 margin of rival j over each block of samples, for the t-th target.
    fn of(&self, t: usize, j: usize) -> impl Iterator<Item = f32> + '_ {
        let blocks = self.logits.blocks();
        let start = ((t / TILE * self.logits.panels + j / LANES) * blocks) * TILE + t % TILE;
        (0..blocks).map(move |block| self.data[start + block * TILE][j % LANES])
    }

    /// Upper bounds on the margins of all rivals, for the t-th target; -inf at the target itself.
    pub fn upper_bounds(&self, t: usize) -> Vec<f64> {
        let (k, bias) = (self.targets[t], &self.problem.bias);
        let tops: Vec<Lane> = (0..self.logits.panels).map(|panel| self.top(t, panel)).collect();
        (0..bias.len())
            .map(|j| {
                if j == k {
                    f64::NEG_INFINITY
                } else {
                    f64::from(tops[j / LANES][j % LANES]) + self.doubt(k, j) + (bias[j] - bias[k])
                }
            })
            .collect()
    }

    /// Float32 margins of a panel of rivals, for the t-th target.
    fn top(&self, t: usize, panel: usize) -> Lane {
        if !self.is_max() {
            return self.ranked[t * self.logits.panels + panel];
        }
        let blocks = self.logits.blocks();
        let start = ((t / TILE * self.logits.panels + panel) * blocks) * TILE + t % TILE;
        let mut top = [f32::NEG_INFINITY; LANES];
        for block in 0..blocks {
            for (a, b) in top.iter_mut().zip(&self.data[start + block * TILE]) {
                *a = if *b > *a { *b } else { *a };
            }
        }
        top
    }

    /// Bound on the error of a float32 margin.
    fn doubt(&self, k: usize, j: usize) -> f64 {
        // The last term covers products that vanish in float32: entries are below 2.
        let vanished = 8.0 * (self.problem.dim as f64 + 1.0) * f64::from(f32::MIN_POSITIVE);
        self.logits.error * (self.problem.row_length(k) + self.problem.row_length(j)) + vanished
    }

    /// r_kj in float64 and the (first) sample that attains it.
    pub fn exact(&self, t: usize, j: usize) -> (f64, usize) {
        let k = self.targets[t];
        let offset = self.problem.bias[j] - self.problem.bias[k];
        if self.problem.row(k) == self.problem.row(j) {
            return (offset, 0);
        }
        let near = self.top(t, j / LANES)[j % LANES];
        let (margin, sample) = if self.is_max() {
            self.exact_max(t, k, j, near)
        } else {
            self.exact_rank(k, j, near)
        };
        (margin + offset, sample)
    }

    fn exact_max(&self, t: usize, k: usize, j: usize, top: f32) -> (f64, usize) {
        let floor = (f64::from(top) - 2.0 * self.doubt(k, j)) as f32;
        let floor = floor.next_down();
        let mut best = (f64::NEG_INFINITY, 0);
        for (block, peak) in self.of(t, j).enumerate() {
            if peak < floor {
                continue;
            }
            for (i, margin) in self.logits.margins(block, k, j).enumerate() {
                let sample = block * BLOCK + i;
                if margin >= floor {
                    let exact = self.problem.margin(k, j, sample);
                    if exact > best.0 {
                        best = (exact, sample);
                    }
                }
            }
        }
        best
    }

    fn exact_rank(&self, k: usize, j: usize, near: f32) -> (f64, usize) {
        let doubt = 2.0 * self.doubt(k, j);
        // Rounded outwards, so that the comparison below may stay in float32.
        let low = ((f64::from(near) - doubt) as f32).next_down();
        let high = ((f64::from(near) + doubt) as f32).next_up();
        // What is surely below keeps its place; only those in doubt must be put in order exactly.
        let mut below = 0;
        let mut open: Vec<(f64, usize)> = Vec::new();
        for block in 0..self.logits.blocks() {
            for (i, margin) in self.logits.margins(block, k, j).enumerate() {
                if margin < low {
                    below += 1;
                } else if margin <= high {
                    let sample = block * BLOCK + i;
                    open.push((self.problem.margin(k, j, sample), sample));
                }
            }
        }
        *open
            .select_nth_unstable_by(self.rank - below, |a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)))
            .1
    }
}

/// Position, in increasing order, of the order statistic at `quantile`: no interpolation.
fn rank(samples: usize, quantile: f64) -> usize {
    ((quantile * samples as f64).ceil() as usize).clamp(1, samples) - 1
}

#[multiversion(targets("x86_64+avx512f+avx512vl", "x86_64+avx2+fma", "aarch64+neon"))]
pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    // Sixteen accumulators: the order of summation is fixed, and the compiler can vectorise it.
    let mut acc = [0.0; 16];
    let (a16, b16) = (a.chunks_exact(16), b.chunks_exact(16));
    let mut tail = 0.0;
    for (x, y) in a16.remainder().iter().zip(b16.remainder()) {
        tail += x * y;
    }
    for (x, y) in a16.zip(b16) {
        for t in 0..16 {
            acc[t] += x[t] * y[t];
        }
    }
    let mut sum = tail;
    for v in acc {
        sum += v;
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rank_is_the_order_statistic_without_interpolation() {
        assert_eq!(rank(100, 1.0), 99);
        assert_eq!(rank(100, 0.99), 98);
        assert_eq!(rank(100, 1e-9), 0);
        assert_eq!(rank(1, 0.5), 0);
    }

    #[test]
    fn dot_matches_the_plain_sum() {
        for len in [0, 1, 15, 16, 17, 63] {
            let a: Vec<f64> = (0..len).map(f64::from).collect();
            let plain: f64 = a.iter().map(|v| v * v).sum();
            assert_eq!(dot(&a, &a), plain);
        }
    }
}
