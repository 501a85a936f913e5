//! M = W W^T, computed once for all classes: (w_k-w_j)^T (w_k-w_l) = M_kk - M_kl - M_kj + M_jl. May use: problem, rows, linalg, control.

use multiversion::multiversion;
use rayon::prelude::*;

use crate::control::Control;
use crate::linalg::{add_four, add_scaled, add_scaled_f32, dot, multiply_transposed_into};
use crate::problem::{Problem, ProblemError};
use crate::rows::Rows;

/// Rows whose squared distance is below this share of their squared norms: M has lost six digits of it, so use the difference itself.
const CLOSE: f64 = 1e-6;
/// Squares below which products of rows, the largest of which has entries above one, lose digits in float32 or vanish.
const TINY: f64 = 1e-30;
/// Rows of M that one task computes.
const BLOCK: usize = 128;
/// Above this many classes M is kept in float32, for memory. It then only ranks constraints; what enters a working set is computed from W.
const WIDE: usize = 10_000;

pub struct Gram<'a> {
    rows: Rows<'a>,
    classes: usize,
    dim: usize,
    m: Entries,
    /// |w_j|^2
    squares: Vec<f64>,
    /// |w_j|
    lengths_of_rows: Vec<f64>,
    close: Vec<Vec<usize>>,
}

enum Entries {
    F64(Vec<f64>),
    F32(Vec<f32>),
}

impl<'a> Gram<'a> {
    pub fn new(problem: &'a Problem<'_>, control: &Control) -> Result<Self, ProblemError> {
        let (c, d) = (problem.classes, problem.dim);
        let weight = &problem.weight;
        let squares: Vec<f64> = weight.par_chunks(d).map(|w| dot(w, w)).collect();
        let m = if c <= WIDE {
            let mut m = vec![0.0; c * c];
            let rows = m.par_chunks_mut(BLOCK * c).enumerate();
            rows.for_each(|(block, out)| upper_rows(weight, d, block * BLOCK, out, c, control));
            mirror(&mut m, c);
            Entries::F64(m)
        } else {
            let mut m = vec![0.0f32; c * c];
            let rows = m.par_chunks_mut(BLOCK * c).enumerate();
            rows.for_each_init(
                || vec![0.0; BLOCK * c],
                |wide, (block, out)| {
                    upper_rows(weight, d, block * BLOCK, wide, c, control);
                    out.iter_mut().zip(wide).for_each(|(o, v)| *o = *v as f32);
                },
            );
            mirror(&mut m, c);
            Entries::F32(m)
        };
        if control.cancelled() {
            return Err(ProblemError::Cancelled);
        }
        let lengths_of_rows = squares.iter().map(|v| v.sqrt()).collect();
        let mut gram = Gram {
            rows: problem.rows(),
            classes: c,
            dim: d,
            m,
            squares,
            lengths_of_rows,
            close: Vec::new(),
        };
        gram.close = (0..c).into_par_iter().map(|k| gram.find_close(k)).collect();
        Ok(gram)
    }

    fn find_close(&self, k: usize) -> Vec<usize> {
        let (part, squares) = (k * self.classes..(k + 1) * self.classes, &self.squares);
        let within = |distance: f64, j: usize, share: f64| distance <= share * (squares[k] + squares[j]);
        let near = |j: usize, m: f64, share: f64| j != k && within(squares[k] - 2.0 * m + squares[j], j, share);
        match &self.m {
            Entries::F64(m) => (0..self.classes)
                .zip(&m[part])
                .filter(|&(j, m)| near(j, *m, CLOSE))
                .map(|(j, _)| j)
                .collect(),
            // Rounding of the entries may hide some, and suggest others: look again at all that could be.
            Entries::F32(m) => (0..self.classes)
                .zip(&m[part])
                .filter(|&(j, m)| near(j, f64::from(*m), 2.0 * CLOSE) || (j != k && squares[k] + squares[j] < TINY))
                .map(|(j, _)| j)
                .filter(|&j| {
                    let a = self.difference(k, j);
                    within(dot(&a, &a), j, CLOSE)
                })
                .collect(),
        }
    }

    pub fn dim(&self) -> usize {
        self.dim
    }

    /// Classes whose weight row nearly or exactly equals that of `k`.
    pub fn close_to(&self, k: usize) -> &[usize] {
        &self.close[k]
    }

    /// out := W s for s = sum of multipliers times a_j, from M; and a bound on the error that M's precision makes in each entry, per |w_j|.
    pub fn push(&self, k: usize, active: &[usize], multipliers: &[f64], out: &mut Vec<f64>) -> f64 {
        let total: f64 = multipliers.iter().sum();
        out.clear();
        out.resize(self.classes, 0.0);
        let terms: Vec<(usize, f64)> = active.iter().zip(multipliers).map(|(&l, &x)| (l, -x)).chain([(k, total)]).collect();
        let part = |l: usize| l * self.classes..(l + 1) * self.classes;
        match &self.m {
            Entries::F64(m) => {
                let fours = terms.chunks_exact(4);
                fours.remainder().iter().for_each(|&(l, x)| add_scaled(out, x, &m[part(l)]));
                for four in fours {
                    add_four(
                        out,
                        std::array::from_fn(|t| four[t].1),
                        std::array::from_fn(|t| &m[part(four[t].0)]),
                    );
                }
            }
            Entries::F32(m) => terms.iter().for_each(|&(l, x)| add_scaled_f32(out, x, &m[part(l)])),
        }
        let size: f64 = terms.iter().map(|&(l, x)| x.abs() * self.lengths_of_rows[l]).sum();
        let unit = match &self.m {
            Entries::F64(_) => f64::EPSILON * (self.dim as f64).sqrt(),
            Entries::F32(_) => f64::from(f32::EPSILON),
        };
        unit * size
    }

    /// |w_j| by class.
    pub fn lengths_of_rows(&self) -> &[f64] {
        &self.lengths_of_rows
    }

    /// |w_k| + |w_j|
    pub fn both_lengths(&self, k: usize, j: usize) -> f64 {
        self.lengths_of_rows[k] + self.lengths_of_rows[j]
    }

    /// Whether M has lost so many digits of what belongs to k that the rows themselves are asked.
    pub fn needs_rows(&self, k: usize) -> bool {
        !self.is_precise() || !self.close[k].is_empty()
    }

    /// a_j^T a_l for each l, with a_j = w_k - w_j; with room for `room` more.
    pub fn inners(&self, k: usize, j: usize, others: &[usize], room: usize) -> Vec<f64> {
        let (c, mut inners) = (self.classes, Vec::with_capacity(others.len() + room));
        match &self.m {
            Entries::F64(m) if !self.needs_rows(k) => {
                let (mk, mj) = (&m[k * c..(k + 1) * c], &m[j * c..(j + 1) * c]);
                inners.extend(others.iter().map(|&l| mk[k] - mk[l] - mk[j] + mj[l]));
            }
            _ => {
                let a = self.difference(k, j);
                inners.extend(others.iter().map(|&l| self.rows.difference_dot(k, l, &a)));
            }
        }
        inners
    }

    /// Lengths of a_j for all j (0 for k itself and for exact duplicates).
    pub fn lengths(&self, k: usize) -> Vec<f64> {
        let part = k * self.classes..(k + 1) * self.classes;
        let mut lengths = match &self.m {
            Entries::F64(m) => distances(self.squares[k], &self.squares, &m[part]),
            Entries::F32(m) => {
                let wide: Vec<f64> = m[part].iter().map(|&v| f64::from(v)).collect();
                distances(self.squares[k], &self.squares, &wide)
            }
        };
        lengths[k] = 0.0;
        for &j in self.close_to(k) {
            let a = self.difference(k, j);
            lengths[j] = dot(&a, &a).sqrt();
        }
        lengths
    }

    pub fn difference(&self, k: usize, j: usize) -> Vec<f64> {
        self.rows.difference(k, j)
    }

    /// s = sum of multipliers times a_j, from the rows themselves.
    pub fn combine(&self, k: usize, active: &[usize], multipliers: &[f64]) -> Vec<f64> {
        let mut s = vec![0.0; self.dim];
        self.rows.add_differences(&mut s, k, active, multipliers);
        s
    }

    /// Whether two classes have the very same weights.
    pub fn same_rows(&self, k: usize, j: usize) -> bool {
        self.rows.same(k, j)
    }

    /// Whether entries of M are good to float64.
    pub fn is_precise(&self) -> bool {
        matches!(self.m, Entries::F64(_))
    }

    /// a_j^T s in twice the precision.
    pub fn reach_twice(&self, k: usize, j: usize, s: &[f64]) -> f64 {
        self.rows.difference_dot_twice(k, j, s)
    }

    /// a_j^T s from the rows themselves.
    pub fn reach(&self, k: usize, j: usize, s: &[f64]) -> f64 {
        self.rows.difference_dot(k, j, s)
    }
}

/// sqrt(own - 2 m_j + square_j)
#[multiversion(targets("x86_64+avx512f+avx512vl", "x86_64+avx2+fma", "aarch64+neon"))]
fn distances(own: f64, squares: &[f64], m: &[f64]) -> Vec<f64> {
    let distance = |(square, m): (&f64, &f64)| (own - 2.0 * m + square).max(0.0).sqrt();
    squares.iter().zip(m).map(distance).collect()
}

/// Rows of M from `first` on, their entries from the diagonal block on.
fn upper_rows(weight: &[f64], d: usize, first: usize, out: &mut [f64], c: usize, control: &Control) {
    if control.cancelled() {
        return;
    }
    let rows = BLOCK.min(c - first);
    let (own, others) = (&weight[first * d..(first + rows) * d], &weight[first * d..]);
    multiply_transposed_into(own, others, &mut out[first..], (rows, d, c - first), c);
}

/// Copies the entries above the diagonal blocks to below them.
fn mirror<T: Copy + Send + Sync>(m: &mut [T], c: usize) {
    let mut below = m;
    let mut rows_above: Vec<&[T]> = Vec::new();
    // Block by block, so that what is above can be read while all workers write what is below.
    while below.len() > BLOCK * c {
        let (done, rest) = std::mem::take(&mut below).split_at_mut(BLOCK * c);
        rows_above.clear();
        rows_above.extend(done.chunks_exact(c));
        let first = c - rest.len() / c;
        rest.par_chunks_mut(c).enumerate().for_each(|(i, row)| {
            for (entry, above) in row[first - BLOCK..first].iter_mut().zip(&rows_above) {
                *entry = above[first + i];
            }
        });
        below = rest;
    }
}
