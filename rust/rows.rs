//! W as it is read row by row: in float32 where that loses nothing, for there is half the memory to read. May use: linalg, ndarray, rayon.

use ndarray::ArrayView2;
use rayon::prelude::*;

use crate::linalg::{
    add_four_differences_f32, add_four_differences_f64, add_scaled_difference_f32, add_scaled_difference_f64, difference_dot_f32_f64,
    difference_dot_f64_f64,
};

/// The rows of W.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    pub dim: usize,
    pub wide: &'a [f64],
    /// The same in float32, where that loses nothing.
    pub narrow: Option<&'a [f32]>,
}

/// Two rows.
pub enum Pair<'a> {
    F32(&'a [f32], &'a [f32]),
    F64(&'a [f64], &'a [f64]),
}

impl<'a> Rows<'a> {
    fn part<'w, T>(&self, rows: &'w [T], class: usize) -> &'w [T] {
        &rows[class * self.dim..(class + 1) * self.dim]
    }

    /// Rows j and k.
    pub fn pair(&self, j: usize, k: usize) -> Pair<'a> {
        match self.narrow {
            Some(w) => Pair::F32(self.part(w, j), self.part(w, k)),
            None => Pair::F64(self.part(self.wide, j), self.part(self.wide, k)),
        }
    }

    /// (w_j - w_k)^T v
    pub fn difference_dot(&self, j: usize, k: usize, v: &[f64]) -> f64 {
        self.pair(j, k).difference_dot(v, 1.0)
    }

    /// (w_j - w_k)^T v as if computed in twice the precision and then rounded (Ogita, Rump & Oishi 2005, algorithm 5.3).
    pub fn difference_dot_twice(&self, j: usize, k: usize, v: &[f64]) -> f64 {
        let (mut sum, mut lost) = (0.0, 0.0);
        for ((a, b), v) in self.part(self.wide, j).iter().zip(self.part(self.wide, k)).zip(v) {
            let (difference, left) = two_sum(*a, -b);
            let product = difference * v;
            let (total, rest) = two_sum(sum, product);
            sum = total;
            lost += rest + difference.mul_add(*v, -product) + left * v;
        }
        sum + lost
    }

    /// v := v + c (w_j - w_k)
    pub fn add_difference(&self, v: &mut [f64], c: f64, j: usize, k: usize) {
        match self.pair(j, k) {
            Pair::F32(wj, wk) => add_scaled_difference_f32(v, c, wj, wk),
            Pair::F64(wj, wk) => add_scaled_difference_f64(v, c, wj, wk),
        }
    }

    /// v := v + the sum of c_j (w_k - w_j)
    pub fn add_differences(&self, v: &mut [f64], k: usize, others: &[usize], c: &[f64]) {
        let fours = others.chunks_exact(4).zip(c.chunks_exact(4));
        for (four, c) in fours {
            let c = std::array::from_fn(|t| c[t]);
            match self.narrow {
                Some(w) => add_four_differences_f32(v, c, self.part(w, k), std::array::from_fn(|t| self.part(w, four[t]))),
                None => add_four_differences_f64(
                    v,
                    c,
                    self.part(self.wide, k),
                    std::array::from_fn(|t| self.part(self.wide, four[t])),
                ),
            }
        }
        let done = others.len() / 4 * 4;
        for (&j, &c) in others[done..].iter().zip(&c[done..]) {
            self.add_difference(v, c, k, j);
        }
    }

    pub fn same(&self, j: usize, k: usize) -> bool {
        self.part(self.wide, j) == self.part(self.wide, k)
    }

    /// w_j - w_k
    pub fn difference(&self, j: usize, k: usize) -> Vec<f64> {
        let mut difference = vec![0.0; self.dim];
        self.add_difference(&mut difference, 1.0, j, k);
        difference
    }
}

impl Pair<'_> {
    /// (w_j - w_k)^T (v scale)
    pub fn difference_dot(&self, v: &[f64], scale: f64) -> f64 {
        match self {
            Pair::F32(wj, wk) => difference_dot_f32_f64(wj, wk, v, scale),
            Pair::F64(wj, wk) => difference_dot_f64_f64(wj, wk, v, scale),
        }
    }
}

/// The sum of two numbers, and what rounding took from it (Knuth).
fn two_sum(a: f64, b: f64) -> (f64, f64) {
    let sum = a + b;
    let part = sum - a;
    (sum, (a - (sum - part)) + (b - part))
}

/// Rows one after the other in memory.
pub fn copied(weight: ArrayView2<'_, f64>) -> Vec<f64> {
    let mut copy = vec![0.0; weight.len()];
    let rows = copy.par_chunks_mut(weight.ncols()).enumerate();
    rows.for_each(|(i, out)| match weight.row(i).to_slice() {
        Some(row) => out.copy_from_slice(row),
        None => out.iter_mut().zip(weight.row(i)).for_each(|(o, v)| *o = *v),
    });
    copy
}

/// In float32, unless that rounds an entry.
pub fn narrowed(weight: &[f64], dim: usize) -> Option<Vec<f32>> {
    let mut narrow = vec![0.0; weight.len()];
    let exact = narrow.par_chunks_mut(dim).zip(weight.par_chunks(dim)).all(|(out, row)| {
        out.iter_mut().zip(row).for_each(|(o, v)| *o = *v as f32);
        out.iter().zip(row).all(|(o, v)| f64::from(*o) == *v)
    });
    exact.then_some(narrow)
}
