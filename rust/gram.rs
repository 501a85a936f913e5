//! M = W W^T, computed once for all classes: (w_k-w_j)^T (w_k-w_l) = M_kk - M_kl - M_kj + M_jl. May use: problem, margins' GEMM.

use std::sync::atomic::{AtomicBool, Ordering};

use rayon::prelude::*;

use crate::margins::{dot, multiply_transposed};
use crate::problem::{Problem, ProblemError};

/// Rows whose squared distance is below this share of their squared norms: M has lost six digits of it, so use the difference itself.
const CLOSE: f64 = 1e-6;
/// Rows of M that one task computes.
const BLOCK: usize = 64;

pub struct Gram<'a> {
    weight: &'a [f64],
    classes: usize,
    dim: usize,
    m: Vec<f64>,
    close: Vec<Vec<usize>>,
}

impl<'a> Gram<'a> {
    pub fn new(problem: &'a Problem<'_>, cancel: &AtomicBool) -> Result<Self, ProblemError> {
        let (c, d) = (problem.classes, problem.dim);
        let mut m = vec![0.0; c * c];
        m.par_chunks_mut(BLOCK * c).enumerate().for_each(|(block, out)| {
            if !cancel.load(Ordering::Relaxed) {
                let a = &problem.weight[block * BLOCK * d..];
                multiply_transposed(a, &problem.weight, out, out.len() / c, d, c);
            }
        });
        if cancel.load(Ordering::Relaxed) {
            return Err(ProblemError::Cancelled);
        }
        let close = (0..c).into_par_iter().map(|k| close_rows(&m, c, k)).collect();
        Ok(Gram {
            weight: &problem.weight,
            classes: c,
            dim: d,
            m,
            close,
        })
    }

    pub fn row(&self, class: usize) -> &[f64] {
        let c = self.classes;
        &self.m[class * c..(class + 1) * c]
    }

    /// Classes whose weight row nearly or exactly equals that of `k`.
    pub fn close_to(&self, k: usize) -> &[usize] {
        &self.close[k]
    }

    /// a_j^T a_l with a_j = w_k - w_j.
    pub fn inner(&self, k: usize, j: usize, l: usize) -> f64 {
        if self.close[k].contains(&j) || self.close[k].contains(&l) {
            return dot(&self.difference(k, j), &self.difference(k, l));
        }
        let (mk, mj) = (self.row(k), self.row(j));
        mk[k] - mk[l] - mk[j] + mj[l]
    }

    /// Lengths of a_j for all j (0 for k itself and for exact duplicates).
    pub fn lengths(&self, k: usize) -> Vec<f64> {
        let c = self.classes;
        let mk = self.row(k);
        let mut lengths: Vec<f64> = (0..c).map(|j| (mk[k] - 2.0 * mk[j] + self.m[j * c + j]).max(0.0).sqrt()).collect();
        lengths[k] = 0.0;
        for &j in self.close_to(k) {
            let a = self.difference(k, j);
            lengths[j] = dot(&a, &a).sqrt();
        }
        lengths
    }

    pub fn dim(&self) -> usize {
        self.dim
    }

    pub fn difference(&self, k: usize, j: usize) -> Vec<f64> {
        let row = |i: usize| &self.weight[i * self.dim..(i + 1) * self.dim];
        row(k).iter().zip(row(j)).map(|(a, b)| a - b).collect()
    }
}

fn close_rows(m: &[f64], c: usize, k: usize) -> Vec<usize> {
    let kk = m[k * c + k];
    (0..c)
        .filter(|&j| j != k)
        .filter(|&j| {
            let jj = m[j * c + j];
            kk - 2.0 * m[k * c + j] + jj <= CLOSE * (kk + jj)
        })
        .collect()
}
