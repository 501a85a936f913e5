//! From latents to margins: the logits of the clean samples, and for a class k the one number per rival that the QP needs,
//! r_kj = max_i (l_ij - l_ik), or a lower order statistic of it. May use: problem, gram.

use std::sync::atomic::{AtomicBool, Ordering};

use multiversion::multiversion;
use rayon::prelude::*;

use crate::gram::Gram;
use crate::problem::{Problem, ProblemError};

/// Classes per panel: two AVX-512 registers of float64.
const LANES: usize = 16;
/// Samples per block: one panel of a block stays in the first-level cache.
const BLOCK: usize = 256;
/// Rows of the result that the kernel keeps in registers.
const TILE: usize = 4;

/// Logits in float64, as blocks of samples x panels of classes, so that the max-plus kernel reads memory in order.
pub struct Logits {
    classes: usize,
    samples: usize,
    panels: usize,
    /// `[block][panel][sample in block][lane]`; lanes past the last class hold -inf and never win a maximum.
    data: Vec<[f64; LANES]>,
}

impl Logits {
    /// One GEMM, split over fixed blocks of samples: the result does not depend on the number of threads.
    pub fn new(problem: &Problem, cancel: &AtomicBool) -> Result<Self, ProblemError> {
        let (classes, dim, samples) = (problem.classes, problem.dim, problem.samples);
        let panels = classes.div_ceil(LANES);
        let blocks = samples.div_ceil(BLOCK);
        let mut data = vec![[f64::NEG_INFINITY; LANES]; blocks * panels * BLOCK];
        data.par_chunks_mut(panels * BLOCK).enumerate().for_each_init(
            || (vec![0.0; BLOCK * dim], vec![0.0; BLOCK * classes]),
            |(latents, logits), (block, out)| {
                if cancel.load(Ordering::Relaxed) {
                    return;
                }
                let first = block * BLOCK;
                let rows = BLOCK.min(samples - first);
                for (i, row) in latents.chunks_exact_mut(dim).take(rows).enumerate() {
                    problem.latent_into(first + i, row);
                }
                multiply_transposed(latents, &problem.weight, logits, rows, dim, classes);
                scatter(logits, &problem.bias, out, rows, classes);
            },
        );
        if cancel.load(Ordering::Relaxed) {
            return Err(ProblemError::Cancelled);
        }
        Ok(Logits {
            classes,
            samples,
            panels,
            data,
        })
    }

    fn panel(&self, block: usize, panel: usize) -> &[[f64; LANES]] {
        let rows = BLOCK.min(self.samples - block * BLOCK);
        let start = (block * self.panels + panel) * BLOCK;
        &self.data[start..start + rows]
    }

    fn blocks(&self) -> usize {
        self.samples.div_ceil(BLOCK)
    }

    /// All samples' logits of one class, in order.
    fn column(&self, class: usize) -> impl Iterator<Item = f64> + '_ {
        let (panel, lane) = (class / LANES, class % LANES);
        (0..self.blocks()).flat_map(move |block| self.panel(block, panel).iter().map(move |v| v[lane]))
    }
}

/// out (m x n) = a (m x d) times the transpose of b (n x d), all row-major, on this thread.
pub fn multiply_transposed(a: &[f64], b: &[f64], out: &mut [f64], m: usize, d: usize, n: usize) {
    assert!(a.len() >= m * d && b.len() >= n * d && out.len() >= m * n);
    // SAFETY: the assertion bounds every element that the strides reach.
    unsafe {
        matrixmultiply::dgemm(
            m,
            d,
            n,
            1.0,
            a.as_ptr(),
            d as isize,
            1,
            b.as_ptr(),
            1,
            d as isize,
            0.0,
            out.as_mut_ptr(),
            n as isize,
            1,
        );
    }
}

fn scatter(logits: &[f64], bias: &[f64], out: &mut [[f64; LANES]], rows: usize, classes: usize) {
    for (i, row) in logits.chunks_exact(classes).take(rows).enumerate() {
        for (panel, (values, biases)) in row.chunks(LANES).zip(bias.chunks(LANES)).enumerate() {
            let cell = &mut out[panel * BLOCK + i];
            for ((o, v), b) in cell.iter_mut().zip(values).zip(biases) {
                *o = v + b;
            }
        }
    }
}

/// r for a few classes at once: `rows[t * classes + j]` belongs to the t-th of `targets`; its own entry is -inf.
pub fn collapse(logits: &Logits, problem: &Problem, gram: &Gram, targets: &[usize], quantile: f64) -> Vec<f64> {
    let c = logits.classes;
    let mut rows = if quantile >= 1.0 {
        collapse_max(logits, targets)
    } else {
        collapse_quantile(logits, targets, rank(logits.samples, quantile))
    };
    for (t, &k) in targets.iter().enumerate() {
        let row = &mut rows[t * c..(t + 1) * c];
        row[k] = f64::NEG_INFINITY;
        for &j in gram.close_to(k) {
            row[j] = order_statistic(direct_margins(problem, k, j), quantile).0;
        }
    }
    rows
}

/// The sample that attains r_kj (the first of them), and r_kj itself.
pub fn attaining_sample(logits: &Logits, problem: &Problem, gram: &Gram, k: usize, j: usize, quantile: f64) -> (f64, usize) {
    if gram.close_to(k).contains(&j) {
        return order_statistic(direct_margins(problem, k, j), quantile);
    }
    let margins = logits.column(j).zip(logits.column(k)).map(|(lj, lk)| lj - lk);
    order_statistic(margins.collect(), quantile)
}

/// Position, in increasing order, of the order statistic at `quantile`: no interpolation.
fn rank(samples: usize, quantile: f64) -> usize {
    ((quantile * samples as f64).ceil() as usize).clamp(1, samples) - 1
}

fn order_statistic(margins: Vec<f64>, quantile: f64) -> (f64, usize) {
    let value = if quantile >= 1.0 {
        margins.iter().copied().fold(f64::NEG_INFINITY, f64::max)
    } else {
        let mut sorted = margins.clone();
        let at = rank(margins.len(), quantile);
        *sorted.select_nth_unstable_by(at, f64::total_cmp).1
    };
    let sample = margins.iter().position(|&v| v == value).unwrap_or(0);
    (value, sample)
}

/// Margins l_ij - l_ik of all samples from the difference of the rows. Subtracting two logits would leave rounding of the size of the
/// logits, enough to make two identical classes look as if one could never beat the other.
fn direct_margins(problem: &Problem, k: usize, j: usize) -> Vec<f64> {
    let difference: Vec<f64> = problem.row(j).iter().zip(problem.row(k)).map(|(a, b)| a - b).collect();
    let offset = problem.bias[j] - problem.bias[k];
    let mut z = vec![0.0; problem.dim];
    (0..problem.samples)
        .map(|i| {
            problem.latent_into(i, &mut z);
            offset + dot(&difference, &z)
        })
        .collect()
}

pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    // Eight accumulators: the order of summation is fixed, and the compiler can vectorise it.
    let mut acc = [0.0; 8];
    let (a8, b8) = (a.chunks_exact(8), b.chunks_exact(8));
    let tail: f64 = a8.remainder().iter().zip(b8.remainder()).map(|(x, y)| x * y).sum();
    for (x, y) in a8.zip(b8) {
        for t in 0..8 {
            acc[t] += x[t] * y[t];
        }
    }
    acc.iter().sum::<f64>() + tail
}

fn collapse_max(logits: &Logits, targets: &[usize]) -> Vec<f64> {
    let padded = targets.len().div_ceil(TILE) * TILE;
    let mut acc = vec![[f64::NEG_INFINITY; LANES]; padded * logits.panels];
    let mut keys = vec![[0.0; TILE]; BLOCK];
    for block in 0..logits.blocks() {
        for (tile, group) in targets.chunks(TILE).enumerate() {
            for t in 0..TILE {
                // A short last group repeats its first class; the surplus rows are never read.
                let class = group.get(t).copied().unwrap_or(group[0]);
                let panel = logits.panel(block, class / LANES);
                for (key, values) in keys.iter_mut().zip(panel) {
                    key[t] = values[class % LANES];
                }
            }
            for panel in 0..logits.panels {
                let values = logits.panel(block, panel);
                let start = (tile * logits.panels + panel) * TILE;
                let out = &mut acc[start..start + TILE];
                max_plus(&keys[..values.len()], values, out.try_into().expect("TILE rows"));
            }
        }
    }
    unpack(&acc, targets.len(), logits)
}

/// acc[t][lane] = max(acc[t][lane], max_i values[i][lane] - keys[i][t]): the kernel whose cost is n C^2 over all classes.
#[multiversion(targets("x86_64+avx512f", "x86_64+avx2+fma", "aarch64+neon"))]
fn max_plus(keys: &[[f64; TILE]], values: &[[f64; LANES]], acc: &mut [[f64; LANES]; TILE]) {
    let mut best = *acc;
    for (key, value) in keys.iter().zip(values) {
        for t in 0..TILE {
            for lane in 0..LANES {
                let margin = value[lane] - key[t];
                best[t][lane] = if margin > best[t][lane] { margin } else { best[t][lane] };
            }
        }
    }
    *acc = best;
}

fn unpack(acc: &[[f64; LANES]], targets: usize, logits: &Logits) -> Vec<f64> {
    let mut rows = Vec::with_capacity(targets * logits.classes);
    for t in 0..targets {
        for j in 0..logits.classes {
            let start = (t / TILE * logits.panels + j / LANES) * TILE + t % TILE;
            rows.push(acc[start][j % LANES]);
        }
    }
    rows
}

fn collapse_quantile(logits: &Logits, targets: &[usize], at: usize) -> Vec<f64> {
    let mut rows = Vec::with_capacity(targets.len() * logits.classes);
    let mut margins = vec![0.0; logits.samples];
    for &k in targets {
        let own: Vec<f64> = logits.column(k).collect();
        for j in 0..logits.classes {
            for ((m, lj), lk) in margins.iter_mut().zip(logits.column(j)).zip(&own) {
                *m = lj - lk;
            }
            rows.push(*margins.select_nth_unstable_by(at, f64::total_cmp).1);
        }
    }
    rows
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
        assert_eq!(order_statistic(vec![3.0, 1.0, 2.0], 0.5), (2.0, 2));
    }

    #[test]
    fn dot_matches_the_plain_sum() {
        for len in [0, 1, 7, 8, 9, 31] {
            let a: Vec<f64> = (0..len).map(f64::from).collect();
            let plain: f64 = a.iter().map(|v| v * v).sum();
            assert_eq!(dot(&a, &a), plain);
        }
    }
}
