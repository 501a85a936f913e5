//! From an engine's attempt to something that may be believed: multipliers refined against the rows of W themselves, then residuals, gap
//! and a bound that holds in spite of rounding. May use: problem, margins, gram, factor, the view of a class.

use crate::factor::Factor;
use crate::margins::dot;
use crate::problem::{Problem, REACH};
use crate::working_set::{Attempt, Class, Ended, unit_rows};

/// Rows that depend on rows with larger multipliers are left out of the basis that refinement corrects.
const DEPENDENT: f64 = 1e-11;
/// The same where vectors are factored, as a share of their length.
const DEPENDENT_VECTOR: f64 = 1e-12;
/// Refinement gains several digits a step; more steps than this gain nothing.
const STEPS: usize = 6;

/// Multipliers on a support, and the shift that they make.
pub struct Refined {
    pub farkas: bool,
    pub active: Vec<usize>,
    pub multipliers: Vec<f64>,
    /// The shift, or what is left of it for a Farkas ray.
    pub shift: Vec<f64>,
    /// sum of multipliers times a_j, which the shift must equal.
    pub made: Vec<f64>,
    pub iterations: usize,
}

/// What is known of one answer, independent of how it was found.
pub struct Certificate {
    /// max_j (r_j - a_j^T s)_+ / max_j |r_j|
    pub primal: f64,
    /// The larger of the largest negative multiplier over the largest, and |s - sum of x_j a_j| over |s|; for a Farkas ray
    /// |sum of x_j a_j| / sum of x_j |a_j|.
    pub dual: f64,
    /// | |s|^2 - r^T x | / |s|^2
    pub gap: f64,
}

/// Solves the equalities of the support again, in float64 and against W, not M: iterative refinement. A `careful` one also refines the shift by
/// itself: where multipliers are huge and cancel, their sum keeps fewer digits than the shift has.
pub fn refine(class: &Class, attempt: Attempt, careful: bool) -> Refined {
    let farkas = attempt.ended == Ended::Infeasible;
    let mut support = Support::new(class, &attempt);
    let (basis, factor) = support.basis(careful);
    support.refine(&basis, &factor, farkas);
    let polished = (careful && !farkas).then(|| support.polished(&basis, &factor));
    let (active, multipliers) = support.denormalised(class);
    let made = class.combine(&active, &multipliers);
    Refined {
        farkas,
        active,
        multipliers,
        shift: polished.unwrap_or_else(|| made.clone()),
        made,
        iterations: attempt.iterations,
    }
}

/// The support in units where |a_j| = 1.
struct Support {
    active: Vec<usize>,
    rows: Vec<Vec<f64>>,
    r: Vec<f64>,
    x: Vec<f64>,
}

impl Support {
    fn new(class: &Class, attempt: &Attempt) -> Self {
        let mut order: Vec<usize> = (0..attempt.active.len()).collect();
        let unit = |j: usize| if class.lengths[j] > 0.0 { class.lengths[j] } else { 1.0 };
        let weight = |i: usize| attempt.multipliers[i] * unit(attempt.active[i]);
        order.sort_by(|&a, &b| weight(b).total_cmp(&weight(a)));
        let active: Vec<usize> = order.iter().map(|&i| attempt.active[i]).collect();
        Support {
            rows: unit_rows(class, &active),
            r: active.iter().map(|&j| class.r[j] / unit(j)).collect(),
            x: order.iter().map(|&i| weight(i)).collect(),
            active,
        }
    }

    fn shift(&self) -> Vec<f64> {
        let mut s = vec![0.0; self.rows.first().map_or(0, Vec::len)];
        for (row, x) in self.rows.iter().zip(&self.x) {
            s.iter_mut().zip(row).for_each(|(s, a)| *s += x * a);
        }
        s
    }

    /// A maximal independent part, largest multipliers first, with its factor.
    fn basis(&self, careful: bool) -> (Vec<usize>, Factor) {
        let (mut basis, mut factor) = (Vec::new(), Factor::default());
        for (i, row) in self.rows.iter().enumerate() {
            let square = dot(row, row);
            let taken = square > 0.0
                && if careful {
                    factor.push_vector(row, DEPENDENT_VECTOR)
                } else {
                    let mut g: Vec<f64> = basis.iter().map(|&b: &usize| dot(row, &self.rows[b])).collect();
                    g.push(square);
                    factor.push(&g, DEPENDENT)
                };
            if taken {
                basis.push(i);
            }
        }
        (basis, factor)
    }

    /// The shift, corrected until it meets the constraints of the basis to working precision.
    fn polished(&self, basis: &[usize], factor: &Factor) -> Vec<f64> {
        let mut s = self.shift();
        for _ in 0..3 {
            let residual: Vec<f64> = basis.iter().map(|&i| self.r[i] - dot(&self.rows[i], &s)).collect();
            let step = factor.shortest(&residual, s.len());
            s.iter_mut().zip(step).for_each(|(s, d)| *s += d);
        }
        s
    }

    fn refine(&mut self, basis: &[usize], factor: &Factor, farkas: bool) {
        let mut last = f64::INFINITY;
        for _ in 0..STEPS {
            let s = self.shift();
            // A solution wants a_j^T s = r_j on its basis, a ray wants s = 0.
            let mut residual: Vec<f64> = basis
                .iter()
                .map(|&i| if farkas { 0.0 } else { self.r[i] } - dot(&self.rows[i], &s))
                .collect();
            let size = residual.iter().fold(0.0_f64, |a, v| a.max(v.abs()));
            if size == 0.0 || size.is_nan() || size >= 0.5 * last {
                break;
            }
            last = size;
            factor.solve(&mut residual);
            let step: Vec<f64> = basis.iter().zip(&residual).map(|(&i, dx)| (self.x[i] + dx).max(0.0)).collect();
            if step.iter().any(|v| !v.is_finite()) {
                break;
            }
            basis.iter().zip(step).for_each(|(&i, x)| self.x[i] = x);
        }
    }

    fn denormalised(self, class: &Class) -> (Vec<usize>, Vec<f64>) {
        self.active
            .iter()
            .zip(&self.x)
            .filter(|(_, x)| **x > 0.0)
            .map(|(&j, &x)| (j, if class.lengths[j] > 0.0 { x / class.lengths[j] } else { x }))
            .unzip()
    }
}

/// Residuals of an answer; `pushed` is W s.
pub fn certify(class: &Class, answer: &Refined, pushed: &[f64]) -> Certificate {
    let square = dot(&answer.shift, &answer.shift);
    let paid: f64 = answer.active.iter().zip(&answer.multipliers).map(|(&j, x)| class.r[j] * x).sum();
    let (mut worst, mut scale) = (0.0_f64, 0.0_f64);
    let close = class.gram.close_to(class.k);
    for (j, &r) in class.r.iter().enumerate().filter(|(j, _)| *j != class.k) {
        let reached = if close.contains(&j) {
            class.gram.reach(class.k, j, &answer.shift)
        } else {
            pushed[class.k] - pushed[j]
        };
        worst = worst.max(r - reached);
        scale = scale.max(r.abs());
    }
    let largest = answer.multipliers.iter().copied().fold(0.0, f64::max);
    let least = answer.multipliers.iter().copied().fold(0.0, f64::min);
    let apart: f64 = answer.shift.iter().zip(&answer.made).map(|(a, b)| (a - b) * (a - b)).sum();
    let ratio = |a: f64, b: f64| if a == 0.0 { 0.0 } else { a / b };
    if answer.farkas {
        let total: f64 = answer
            .active
            .iter()
            .zip(&answer.multipliers)
            .map(|(&j, x)| x * class.lengths[j])
            .sum();
        return Certificate {
            primal: f64::NAN,
            dual: ratio(square.sqrt(), total),
            gap: f64::NAN,
        };
    }
    Certificate {
        primal: ratio(worst, scale),
        dual: ratio(-least, largest).max(ratio(apart.sqrt(), square.sqrt())),
        gap: ratio((square - paid).abs(), square),
    }
}

/// A lower bound on the norm that holds although it is computed in float64.
///
/// Any x >= 0 proves |s_k| >= r^T x / |sum of x_j a_j|. The numerator is lowered, the denominator raised, by what rounding can have done to
/// margins that were evaluated from differences of rows (Higham 2002, sec. 3.1).
pub fn bound(problem: &Problem, class: &Class, answer: &Refined) -> f64 {
    let gamma = (problem.dim as f64 / 8.0 + 24.0) * f64::EPSILON;
    let (mut paid, mut doubt, mut total) = (0.0, 0.0, 0.0);
    for (&j, &x) in answer.active.iter().zip(&answer.multipliers) {
        let offset = (problem.bias[j] - problem.bias[class.k]).abs();
        paid += x * class.r[j];
        doubt += x * gamma * (class.lengths[j] * problem.longest_latent + offset);
        total += x * class.lengths[j];
    }
    let length = dot(&answer.made, &answer.made).sqrt() + gamma * total;
    let proven = (paid - doubt).max(0.0);
    if proven == 0.0 { 0.0 } else { proven / length }
}

/// Whether a proven bound puts the class out of reach.
pub fn out_of_reach(problem: &Problem, bound: f64) -> bool {
    bound > REACH * problem.reach_unit
}
