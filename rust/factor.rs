//! A Cholesky factor that grows and shrinks by one row at a time. Uses nothing.

/// L of G = L L^T, stored by rows; row i has i + 1 entries used.
#[derive(Default)]
pub struct Factor {
    rows: Vec<Vec<f64>>,
    spare: Vec<Vec<f64>>,
}

impl Factor {
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    pub fn clear(&mut self) {
        self.spare.append(&mut self.rows);
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
        let pivot = diagonal - l.iter().map(|v| v * v).sum::<f64>();
        if pivot.is_nan() || pivot <= threshold * diagonal {
            self.spare.push(l);
            return false;
        }
        l.push(pivot.sqrt());
        self.rows.push(l);
        true
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
        }
    }

    /// b := G^-1 b
    pub fn solve(&self, b: &mut [f64]) {
        self.forward(b);
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
            let done: f64 = row[..i].iter().zip(&b[..i]).map(|(l, v)| l * v).sum();
            b[i] = (b[i] - done) / row[i];
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
        assert_eq!(factor.len(), 1);
    }
}
