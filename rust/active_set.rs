//! The project's engine: a dual active-set method on a small Gram matrix. May use: factor, linalg, working_set's view of the problem.
//!
//! Maximises r^T x - x^T G x / 2 over x >= 0 where G may be singular. The set P of positive multipliers grows by the most violated
//! constraint; when the equality solution on P leaves the orthant, the step stops at its border and the blocking multiplier is dropped
//! (Lawson & Hanson 1974, ch. 23). When the new row depends on P, the objective is linear along a null vector of G: either a multiplier
//! blocks that ray, or the ray itself is Farkas' proof that no shift satisfies the constraints (Goldfarb & Idnani 1983, sec. 3).

use crate::factor::Factor;
use crate::linalg::dot;
use crate::working_set::{Ended, WorkingSet};

/// A new row whose squared distance from the span of the others is below this share of its square counts as dependent: what is left of
/// float64 after the Gram matrix has squared the condition number.
const DEPENDENT: f64 = 1e-11;
/// The same for vectors themselves, as a share of their length.
const DEPENDENT_VECTOR: f64 = 1e-12;
/// What a ray takes less of than this, beside one of the newest row, is rounding.
const NOTHING: f64 = 1e-12;

/// State that outlives one solve, so that the next round of the same class starts where this one ended.
#[derive(Default)]
pub struct ActiveSet {
    /// Positions in the working set with positive multipliers, in the order of the factor's rows.
    passive: Vec<usize>,
    x: Vec<f64>,
    factor: Factor,
    /// Factor the constraints' vectors rather than their Gram matrix: slower, for classes that the fast way cannot certify.
    careful: bool,
    blocked: Vec<bool>,
    row: Vec<f64>,
    covered: Vec<f64>,
    solution: Vec<f64>,
    pub iterations: usize,
}

impl ActiveSet {
    pub fn reset(&mut self, careful: bool) {
        self.careful = careful;
        self.passive.clear();
        self.x.clear();
        self.factor.clear();
        self.iterations = 0;
    }

    pub fn careful(&self) -> bool {
        self.careful
    }

    /// The positive multipliers, as (positions, values).
    pub fn support(&self) -> (&[usize], &[f64]) {
        (&self.passive, &self.x)
    }

    /// After the working set was compacted to exactly the support, in its order.
    pub fn renumber(&mut self) {
        self.passive.iter_mut().enumerate().for_each(|(new, p)| *p = new);
    }

    pub fn solve(&mut self, ws: &WorkingSet, tolerance: f64) -> Ended {
        self.blocked.clear();
        self.blocked.resize(ws.len(), false);
        // Each pass strictly raises the dual objective, so passes are finite; the cap is for what rounding may do.
        let limit = 20 * (ws.len() + 10);
        if !self.careful && !self.admit_all(ws) {
            return Ended::Stalled;
        }
        for _ in 0..limit {
            let Some((c, violation)) = self.most_violated(ws) else {
                return Ended::Optimal;
            };
            if violation <= tolerance {
                return Ended::Optimal;
            }
            self.iterations += 1;
            match self.admit(ws, c) {
                Admitted::Ray => return Ended::Infeasible,
                Admitted::Yes => {
                    if !self.return_to_orthant(ws) {
                        return Ended::Stalled;
                    }
                    // A row that rounding throws straight out again must not be picked for ever.
                    if !self.passive.contains(&c) {
                        self.blocked[c] = true;
                    }
                }
            }
        }
        Ended::Stalled
    }

    /// The shortest shift that meets the constraints of P with equality; only where vectors are factored.
    pub fn shift(&self, ws: &WorkingSet, dim: usize) -> Option<Vec<f64>> {
        let r: Vec<f64> = self.passive.iter().map(|&p| ws.r[p]).collect();
        self.careful.then(|| self.factor.shortest(&r, dim))
    }

    fn most_violated(&mut self, ws: &WorkingSet) -> Option<(usize, f64)> {
        let mut covered = std::mem::take(&mut self.covered);
        covered.clear();
        match self.shift(ws, ws.vectors.first().map_or(0, Vec::len)) {
            Some(s) => covered.extend(ws.vectors.iter().map(|v| dot(v, &s))),
            None => {
                covered.resize(ws.len(), 0.0);
                for (&p, x) in self.passive.iter().zip(&self.x) {
                    covered.iter_mut().zip(ws.gram_row(p)).for_each(|(c, g)| *c += g * x);
                }
            }
        }
        // Those of P are met already.
        self.passive.iter().for_each(|&p| covered[p] = f64::INFINITY);
        self.covered = covered;
        (0..ws.len())
            .filter(|c| !self.blocked[*c])
            .map(|c| (c, ws.r[c] - self.covered[c]))
            .max_by(|a, b| a.1.total_cmp(&b.1))
    }

    fn push(&mut self, ws: &WorkingSet, c: usize) -> bool {
        if self.careful {
            return self.factor.push_vector(&ws.vectors[c], DEPENDENT_VECTOR);
        }
        let g = ws.gram_row(c);
        self.row.clear();
        self.row.extend(self.passive.iter().map(|&p| g[p]));
        self.row.push(g[c]);
        self.factor.push(&self.row, DEPENDENT)
    }

    /// Takes all constraints into P at once, for most of those that join do stay; what depends on others must wait.
    fn admit_all(&mut self, ws: &WorkingSet) -> bool {
        for c in (0..ws.len()).filter(|c| !self.passive.contains(c)).collect::<Vec<_>>() {
            if self.push(ws, c) {
                self.passive.push(c);
                self.x.push(0.0);
            }
        }
        self.iterations += 1;
        self.return_to_orthant(ws)
    }

    /// Takes `c` into P, first walking along null vectors of G while c depends on P.
    fn admit(&mut self, ws: &WorkingSet, c: usize) -> Admitted {
        let mut along = 0.0;
        loop {
            if self.push(ws, c) {
                self.passive.push(c);
                self.x.push(along);
                return Admitted::Yes;
            }
            // Null vector (u, 1): the constraint of c is -u times those of P.
            let u = self.factor.dependence();
            let block = (0..u.len())
                .filter(|&i| u[i] < -1e-10)
                .map(|i| (i, self.x[i] / -u[i]))
                .min_by(|a, b| a.1.total_cmp(&b.1));
            let Some((out, step)) = block else {
                let ray: Vec<(usize, f64)> = self
                    .passive
                    .drain(..)
                    .zip(u.iter().copied())
                    .filter(|(_, v)| *v > NOTHING)
                    .collect();
                (self.passive, self.x) = ray.into_iter().chain([(c, 1.0)]).unzip();
                return Admitted::Ray;
            };
            for (x, u) in self.x.iter_mut().zip(&u) {
                *x = (*x + step * u).max(0.0);
            }
            along += step;
            self.drop_at(out);
        }
    }

    /// Moves x to the equality solution on P, dropping whatever blocks the way. False if rounding made that impossible.
    fn return_to_orthant(&mut self, ws: &WorkingSet) -> bool {
        while !self.passive.is_empty() {
            let z = &mut self.solution;
            z.clear();
            z.extend(self.passive.iter().map(|&p| ws.r[p]));
            self.factor.solve(z);
            if z.iter().any(|v| !v.is_finite()) {
                return false;
            }
            let block = (0..z.len())
                .filter(|&i| z[i] <= 0.0)
                .map(|i| (i, self.x[i] / (self.x[i] - z[i]).max(f64::MIN_POSITIVE)))
                .min_by(|a, b| a.1.total_cmp(&b.1));
            let Some((out, step)) = block else {
                std::mem::swap(&mut self.x, z);
                return true;
            };
            let step = step.clamp(0.0, 1.0);
            for (x, z) in self.x.iter_mut().zip(z) {
                *x += step * (*z - *x);
            }
            self.drop_at(out);
        }
        true
    }

    fn drop_at(&mut self, at: usize) {
        self.passive.remove(at);
        self.x.remove(at);
        self.factor.remove(at);
    }
}

enum Admitted {
    Yes,
    /// `support()` now holds a Farkas ray.
    Ray,
}
