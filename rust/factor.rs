//! A triangular factor that grows and shrinks by one row at a time. May use: linalg.

use crate::linalg::{dot, short_dot};

/// L of G = L L^T, stored by rows; row i has i + 1 entries used.
///
/// Rows come either from G ([`Factor::push`]: fast), or as the vectors whose Gram matrix G is ([`Factor::push_vector`]). The latter keeps an
/// orthonormal basis of their span, A = L Q, and with it the digits that G loses by squaring the condition number. Never mix the two.
#[derive(Default)]
pub struct Factor {
    rows: Vec<Vec<f64>>,
    basis: Vec<Vec<f64>>,
    spare: Vec<Vec<f64>>,
    /// L^-1 times the row that was refused last.
    refused: Vec<f64>,
}

impl Factor {
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    pub fn clear(&mut self) {
        self.spare.append(&mut self.rows);
        self.basis.clear();
    }

    /// Appends a row of G (its entries against the present rows, then its diagonal). Returns false, and changes nothing, when
    /// what the new row adds is below `threshold` times its diagonal: numerically it depends on the others.
    pub fn push(&mut self, row: &[f64], threshold: f64) -> bool {
        let n = self.len();
        let diagonal = row[n];
        let mut l = self.spare.pop().unwrap_or_default();
        l.clear();
        l.extend_from_slice(&row[..n]);
        self.forward(&mut l);
        let pivot = diagonal - short_dot(&l, &l);
        if pivot.is_nan() || pivot <= threshold * diagonal {
            self.refused = l;
            return false;
        }
        l.push(pivot.sqrt());
        self.rows.push(l);
        true
    }

    /// Appends a vector of length one. Returns false, and changes nothing, when less than `threshold` of it lies outside the others' span.
    pub fn push_vector(&mut self, a: &[f64], threshold: f64) -> bool {
        let (mut l, mut v) = (vec![0.0; self.len()], a.to_vec());
        // Twice is enough to be orthogonal to working precision (Giraud et al. 2005).
        for _ in 0..2 {
            for (l, q) in l.iter_mut().zip(&self.basis) {
                let c = dot(q, &v);
                *l += c;
                v.iter_mut().zip(q).for_each(|(v, q)| *v -= c * q);
            }
        }
        let pivot = dot(&v, &v).sqrt();
        if pivot.is_nan() || pivot <= threshold {
            self.refused = l;
            return false;
        }
        v.iter_mut().for_each(|v| *v /= pivot);
        l.push(pivot);
        self.rows.push(l);
        self.basis.push(v);
        true
    }

    /// u with u^T A = -(the row refused last), as far as that row depends on A.
    pub fn dependence(&self) -> Vec<f64> {
        let mut u: Vec<f64> = self.refused.iter().map(|v| -v).collect();
        self.backward(&mut u);
        u
    }

    /// The shortest s with A s = b. Only after [`Factor::push_vector`].
    pub fn shortest(&self, b: &[f64], dim: usize) -> Vec<f64> {
        let mut y = b.to_vec();
        self.forward(&mut y);
        let mut s = vec![0.0; dim];
        for (y, q) in y.iter().zip(&self.basis) {
            s.iter_mut().zip(q).for_each(|(s, q)| *s += y * q);
        }
        s
    }

    /// Removes row and column `at`; Givens rotations restore the triangle below it.
    pub fn remove(&mut self, at: usize) {
        let gone = self.rows.remove(at);
        self.spare.push(gone);
        for i in at..self.len() {
            let (a, b) = (self.rows[i][i], self.rows[i][i + 1]);
            let h = a.hypot(b);
            let (cos, sin) = (a / h, b / h);
            for row in &mut self.rows[i..] {
                let (x, y) = (row[i], row[i + 1]);
                row[i] = cos * x + sin * y;
                row[i + 1] = cos * y - sin * x;
            }
            self.rows[i].truncate(i + 1);
            if let Some([q, p]) = self.basis.get_mut(i..i + 2) {
                for (x, y) in q.iter_mut().zip(p) {
                    (*x, *y) = (cos * *x + sin * *y, cos * *y - sin * *x);
                }
            }
        }
        self.basis.pop();
    }

    /// b := G^-1 b
    pub fn solve(&self, b: &mut [f64]) {
        self.forward(b);
        self.backward(b);
    }

    /// b := L^-T b
    fn backward(&self, b: &mut [f64]) {
        for i in (0..self.len()).rev() {
            let value = b[i] / self.rows[i][i];
            b[i] = value;
            for (below, l) in b[..i].iter_mut().zip(&self.rows[i]) {
                *below -= value * l;
            }
        }
    }

    /// b := L^-1 b
    fn forward(&self, b: &mut [f64]) {
        for (i, row) in self.rows.iter().enumerate() {
            b[i] = (b[i] - short_dot(&row[..i], &b[..i])) / row[i];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// G = A A^T + I/10 of a random A, restricted to `keep`.
    fn gram(a: &[Vec<f64>], keep: &[usize]) -> Vec<Vec<f64>> {
        let entry = |i: usize, j: usize| -> f64 {
            let dot: f64 = a[i].iter().zip(&a[j]).map(|(x, y)| x * y).sum();
            dot + if i == j { 0.1 } else { 0.0 }
        };
        keep.iter().map(|&i| keep.iter().map(|&j| entry(i, j)).collect()).collect()
    }

    proptest! {
        #[test]
        fn both_factors_agree_after_any_pushes_and_removals(
            a in prop::collection::vec(prop::collection::vec(-1.0..1.0f64, 9), 6),
            removals in prop::collection::vec(0usize..6, 0..4),
        ) {
            let unit: Vec<Vec<f64>> = a.iter().map(|v| { let n = dot(v, v).sqrt(); v.iter().map(|x| x / n).collect() }).collect();
            let (mut by_gram, mut by_vector, mut keep) = (Factor::default(), Factor::default(), Vec::new());
            for (i, v) in unit.iter().enumerate() {
                let row: Vec<f64> = unit[..=i].iter().map(|u| dot(u, v)).collect();
                prop_assume!(by_gram.push(&row, 1e-4) && by_vector.push_vector(v, 1e-2));
                keep.push(i);
            }
            for r in removals {
                let at = r % keep.len();
                keep.remove(at);
                by_gram.remove(at);
                by_vector.remove(at);
            }
            let r: Vec<f64> = (0..keep.len()).map(|i| i as f64 + 1.0).collect();
            let (mut x, mut y) = (r.clone(), r.clone());
            by_gram.solve(&mut x);
            by_vector.solve(&mut y);
            for (x, y) in x.iter().zip(&y) {
                prop_assert!((x - y).abs() < 1e-6 * (1.0 + x.abs()), "{x} {y}");
            }
            let s = by_vector.shortest(&r, 9);
            for (&i, r) in keep.iter().zip(&r) {
                prop_assert!((dot(&unit[i], &s) - r).abs() < 1e-9);
            }
        }

        #[test]
        fn solves_after_any_pushes_and_removals(
            a in prop::collection::vec(prop::collection::vec(-1.0..1.0f64, 5), 8),
            removals in prop::collection::vec(0usize..8, 0..6),
        ) {
            let mut keep: Vec<usize> = (0..a.len()).collect();
            let mut factor = Factor::default();
            for (i, row) in gram(&a, &keep).iter().enumerate() {
                prop_assert!(factor.push(&row[..=i], 1e-14));
            }
            for r in removals {
                let at = r % keep.len();
                keep.remove(at);
                factor.remove(at);
            }
            let g = gram(&a, &keep);
            let x: Vec<f64> = (0..keep.len()).map(|i| i as f64 - 2.0).collect();
            let mut b: Vec<f64> = g.iter().map(|row| row.iter().zip(&x).map(|(g, x)| g * x).sum()).collect();
            factor.solve(&mut b);
            for (got, want) in b.iter().zip(&x) {
                prop_assert!((got - want).abs() < 1e-9, "{got} {want}");
            }
        }
    }

    #[test]
    fn a_dependent_row_is_refused() {
        let mut factor = Factor::default();
        assert!(factor.push(&[4.0], 1e-12));
        assert!(!factor.push(&[2.0, 1.0], 1e-12));
        assert_eq!(factor.dependence(), [-0.5]);
        assert_eq!(factor.len(), 1);
    }
}
