//! M = W W^T, computed once for all classes: (w_k-w_j)^T (w_k-w_l) = M_kk - M_kl - M_kj + M_jl. May use: problem, linalg, control.

use rayon::prelude::*;

use crate::control::Control;
use crate::linalg::{add_scaled, add_scaled_difference, add_scaled_f32, difference_dot_f64, dot, multiply_transposed};
use crate::problem::{Problem, ProblemError};

/// Rows whose squared distance is below this share of their squared norms: M has lost six digits of it, so use the difference itself.
const CLOSE: f64 = 1e-6;
/// Rows of M that one task computes.
const BLOCK: usize = 64;
/// Above this many classes M is kept in float32, for memory. It then only ranks constraints; what enters a working set is computed from W.
const WIDE: usize = 10_000;

pub struct Gram<'a> {
    weight: &'a [f64],
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
        let squares: Vec<f64> = weight.chunks_exact(d).map(|w| dot(w, w)).collect();
        let rows = |block: usize, out: &mut [f64]| {
            if !control.cancelled() {
                multiply_transposed(&weight[block * BLOCK * d..], weight, out, out.len() / c, d, c);
            }
        };
        let mut close = vec![Vec::new(); c];
        let m = if c <= WIDE {
            let mut m = vec![0.0; c * c];
            m.par_chunks_mut(BLOCK * c)
                .zip(close.par_chunks_mut(BLOCK))
                .enumerate()
                .for_each(|(block, (out, close))| {
                    rows(block, out);
                    find_close(block * BLOCK, out, &squares, close);
                });
            Entries::F64(m)
        } else {
            let mut m = vec![0.0f32; c * c];
            m.par_chunks_mut(BLOCK * c)
                .zip(close.par_chunks_mut(BLOCK))
                .enumerate()
                .for_each_init(
                    || vec![0.0; BLOCK * c],
                    |wide, (block, (out, close))| {
                        let wide = &mut wide[..out.len()];
                        rows(block, wide);
                        find_close(block * BLOCK, wide, &squares, close);
                        out.iter_mut().zip(wide).for_each(|(o, v)| *o = *v as f32);
                    },
                );
            Entries::F32(m)
        };
        if control.cancelled() {
            return Err(ProblemError::Cancelled);
        }
        let lengths_of_rows = squares.iter().map(|v| v.sqrt()).collect();
        Ok(Gram {
            weight,
            classes: c,
            dim: d,
            m,
            squares,
            lengths_of_rows,
            close,
        })
    }

    pub fn dim(&self) -> usize {
        self.dim
    }

    fn row(&self, class: usize) -> &[f64] {
        &self.weight[class * self.dim..(class + 1) * self.dim]
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
        let terms = active.iter().zip(multipliers).map(|(&l, &x)| (l, -x)).chain([(k, total)]);
        let mut size = 0.0;
        for (l, x) in terms {
            let part = l * self.classes..(l + 1) * self.classes;
            match &self.m {
                Entries::F64(m) => add_scaled(out, x, &m[part]),
                Entries::F32(m) => add_scaled_f32(out, x, &m[part]),
            }
            size += x.abs() * self.lengths_of_rows[l];
        }
        let unit = match &self.m {
            Entries::F64(_) => f64::EPSILON * (self.dim as f64).sqrt(),
            Entries::F32(_) => f64::from(f32::EPSILON),
        };
        unit * size
    }

    /// |w_k| + |w_j|
    pub fn both_lengths(&self, k: usize, j: usize) -> f64 {
        self.lengths_of_rows[k] + self.lengths_of_rows[j]
    }

    /// a_j^T a_l for each l, with a_j = w_k - w_j.
    pub fn inners(&self, k: usize, j: usize, others: &[usize]) -> Vec<f64> {
        let c = self.classes;
        match &self.m {
            Entries::F64(m) if self.close[k].is_empty() => {
                let (mk, mj) = (&m[k * c..(k + 1) * c], &m[j * c..(j + 1) * c]);
                others.iter().map(|&l| mk[k] - mk[l] - mk[j] + mj[l]).collect()
            }
            _ => {
                let a = self.difference(k, j);
                others
                    .iter()
                    .map(|&l| difference_dot_f64(self.row(k), self.row(l), &a, 1.0))
                    .collect()
            }
        }
    }

    /// Lengths of a_j for all j (0 for k itself and for exact duplicates).
    pub fn lengths(&self, k: usize) -> Vec<f64> {
        let part = k * self.classes..(k + 1) * self.classes;
        let length = |(square, m): (&f64, f64)| (self.squares[k] - 2.0 * m + square).max(0.0).sqrt();
        let mut lengths: Vec<f64> = match &self.m {
            Entries::F64(m) => self.squares.iter().zip(m[part].iter().copied()).map(length).collect(),
            Entries::F32(m) => self.squares.iter().zip(m[part].iter().map(|&v| f64::from(v))).map(length).collect(),
        };
        lengths[k] = 0.0;
        for &j in self.close_to(k) {
            let a = self.difference(k, j);
            lengths[j] = dot(&a, &a).sqrt();
        }
        lengths
    }

    pub fn difference(&self, k: usize, j: usize) -> Vec<f64> {
        self.row(k).iter().zip(self.row(j)).map(|(a, b)| a - b).collect()
    }

    /// s = sum of multipliers times a_j, from the rows themselves.
    pub fn combine(&self, k: usize, active: &[usize], multipliers: &[f64]) -> Vec<f64> {
        let mut s = vec![0.0; self.dim];
        for (&j, &x) in active.iter().zip(multipliers) {
            add_scaled_difference(&mut s, x, self.row(k), self.row(j));
        }
        s
    }

    /// Whether entries of M are good to float64.
    pub fn is_precise(&self) -> bool {
        matches!(self.m, Entries::F64(_))
    }

    /// a_j^T s from the rows themselves.
    pub fn reach(&self, k: usize, j: usize, s: &[f64]) -> f64 {
        difference_dot_f64(self.row(k), self.row(j), s, 1.0)
    }
}

/// For the rows of M from class `first` on, the classes that nearly equal each.
fn find_close(first: usize, rows: &[f64], squares: &[f64], close: &mut [Vec<usize>]) {
    for (i, (row, close)) in rows.chunks_exact(squares.len()).zip(close).enumerate() {
        let (k, kk) = (first + i, squares[first + i]);
        let near = |j: usize| kk - 2.0 * row[j] + squares[j] <= CLOSE * (kk + squares[j]);
        close.extend((0..squares.len()).filter(|&j| j != k && near(j)));
    }
}
