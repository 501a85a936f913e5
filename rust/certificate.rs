//! From an engine's attempt to something that may be believed: multipliers refined against the rows of W themselves, then residuals, gap
//! and a bound that holds in spite of rounding. May use: problem, linalg, gram, factor, the view of a class.

use multiversion::multiversion;

use crate::factor::Factor;
use crate::linalg::dot;
use crate::problem::{Problem, REACH};
use crate::working_set::{Attempt, Class, Ended, unit_rows};

/// Rows that depend on rows with larger multipliers are left out of the basis that refinement corrects.
const DEPENDENT: f64 = 1e-11;
/// The same where vectors are factored, as a share of their length.
const DEPENDENT_VECTOR: f64 = 1e-12;
/// Refinement gains several digits a step; more steps than this gain nothing.
const STEPS: usize = 6;
/// Residuals this small, relative to the largest margin of the support, need no further step.
const ENOUGH: f64 = 1e-13;

/// Multipliers on a support, and the shift that they make.
pub struct Refined {
    pub farkas: bool,
    pub active: Vec<usize>,
    pub multipliers: Vec<f64>,
    /// The shift, or what is left of it for a Farkas ray.
    pub shift: Vec<f64>,
    /// sum of multipliers times a_j, which the shift must equal, where it was not made by that sum.
    pub made: Option<Vec<f64>>,
    pub iterations: usize,
}

/// What is known of one answer, independent of how it was found.
pub struct Certificate {
    /// |s|
    pub length: f64,
    /// At most: max_j (r_j - a_j^T s)_+ / max_j |r_j|
    pub primal: f64,
    /// The larger of the largest negative multiplier over the largest, and |s - sum of x_j a_j| over |s|; for a Farkas ray
    /// |sum of x_j a_j| / sum of x_j |a_j|.
    pub dual: f64,
    /// | |s|^2 - r^T x | / |s|^2
    pub gap: f64,
}

/// The answer as the engine found it.
pub fn as_found(class: &Class, attempt: &Attempt) -> Refined {
    Refined {
        farkas: attempt.ended == Ended::Infeasible,
        active: attempt.active.clone(),
        multipliers: attempt.multipliers.clone(),
        shift: class.gram.combine(class.k, &attempt.active, &attempt.multipliers),
        made: None,
        iterations: attempt.iterations,
    }
}

/// Solves the equalities of the support again, in float64 and against W, not M: iterative refinement. A `careful` one also refines the shift by
/// itself: where multipliers are huge and cancel, their sum keeps fewer digits than the shift has.
/// `polish` lets the shift differ from what the multipliers make.
pub fn refine(class: &Class, attempt: Attempt, careful: bool, polish: bool) -> Refined {
    let farkas = attempt.ended == Ended::Infeasible;
    let mut support = Support::new(class, &attempt);
    let basis = support.basis(careful);
    let mut made = support.refine(&basis, farkas);
    let polished = (careful && polish && !farkas).then(|| support.polished(&basis));
    let some_vanished = support.x.contains(&0.0);
    let (active, multipliers) = support.denormalised();
    if some_vanished {
        made = class.gram.combine(class.k, &active, &multipliers);
    }
    Refined {
        farkas,
        active,
        multipliers,
        made: polished.is_some().then(|| made.clone()),
        shift: polished.unwrap_or(made),
        iterations: attempt.iterations,
    }
}

/// The support in units where |a_j| = 1, largest multipliers first.
struct Support<'a> {
    class: &'a Class<'a>,
    active: Vec<usize>,
    /// |a_j|, or 1 for a duplicate.
    lengths: Vec<f64>,
    r: Vec<f64>,
    x: Vec<f64>,
}

/// A maximal independent part of the support, with its factor.
struct Basis {
    members: Vec<usize>,
    factor: Factor,
}

impl<'a> Support<'a> {
    fn new(class: &'a Class<'a>, attempt: &Attempt) -> Self {
        let unit = |j: usize| if class.lengths[j] > 0.0 { class.lengths[j] } else { 1.0 };
        let mut entries: Vec<(usize, f64)> = attempt
            .active
            .iter()
            .zip(&attempt.multipliers)
            .map(|(&j, x)| (j, x * unit(j)))
            .collect();
        entries.sort_by(|a, b| b.1.total_cmp(&a.1));
        Support {
            class,
            active: entries.iter().map(|e| e.0).collect(),
            lengths: entries.iter().map(|e| unit(e.0)).collect(),
            r: entries.iter().map(|e| class.r[e.0] / unit(e.0)).collect(),
            x: entries.iter().map(|e| e.1).collect(),
        }
    }

    fn shift(&self) -> Vec<f64> {
        let multipliers: Vec<f64> = self.x.iter().zip(&self.lengths).map(|(x, l)| x / l).collect();
        self.class.gram.combine(self.class.k, &self.active, &multipliers)
    }

    /// a_j^T s / |a_j| for the i-th of the support.
    fn reach(&self, i: usize, s: &[f64]) -> f64 {
        self.class.gram.reach(self.class.k, self.active[i], s) / self.lengths[i]
    }

    /// The factor need not be exact: it only steers the refinement.
    fn basis(&self, careful: bool) -> Basis {
        let (mut members, mut factor) = (Vec::<usize>::new(), Factor::default());
        let rows = if careful { unit_rows(self.class, &self.active) } else { Vec::new() };
        for (i, &j) in self.active.iter().enumerate() {
            let taken = self.class.lengths[j] > 0.0
                && if careful {
                    factor.push_vector(&rows[i], DEPENDENT_VECTOR)
                } else {
                    let others: Vec<usize> = members.iter().map(|&b| self.active[b]).collect();
                    let mut g = self.class.gram.inners(self.class.k, j, &others, 1);
                    g.iter_mut()
                        .zip(&members)
                        .for_each(|(v, &b)| *v /= self.lengths[i] * self.lengths[b]);
                    g.push(1.0);
                    factor.push(&g, DEPENDENT)
                };
            if taken {
                members.push(i);
            }
        }
        Basis { members, factor }
    }

    /// The shift, corrected until it meets the constraints of the basis to working precision.
    fn polished(&self, basis: &Basis) -> Vec<f64> {
        let mut s = self.shift();
        for _ in 0..3 {
            let residual: Vec<f64> = basis.members.iter().map(|&i| self.r[i] - self.reach(i, &s)).collect();
            let step = basis.factor.shortest(&residual, s.len());
            s.iter_mut().zip(step).for_each(|(s, d)| *s += d);
        }
        s
    }

    /// Corrects the multipliers of the basis; returns the shift that they make.
    fn refine(&mut self, basis: &Basis, farkas: bool) -> Vec<f64> {
        // A solution wants a_j^T s = r_j on its basis, a ray wants s = 0.
        let wanted = |i: usize| if farkas { 0.0 } else { self.r[i] };
        let wanted: Vec<f64> = basis.members.iter().map(|&i| wanted(i)).collect();
        let enough = ENOUGH * wanted.iter().fold(0.0_f64, |a, v| a.max(v.abs()));
        let (mut s, mut last) = (self.shift(), f64::INFINITY);
        let (mut best_s, mut best_x) = (s.clone(), self.x.clone());
        for _ in 0..STEPS {
            let mut residual: Vec<f64> = basis.members.iter().zip(&wanted).map(|(&i, w)| w - self.reach(i, &s)).collect();
            let size = residual.iter().fold(0.0_f64, |a, v| a.max(v.abs()));
            if size.is_nan() || size >= last {
                break;
            }
            best_s.copy_from_slice(&s);
            best_x.copy_from_slice(&self.x);
            if size <= enough || size >= 0.5 * last {
                break;
            }
            last = size;
            basis.factor.solve(&mut residual);
            for (&i, dx) in basis.members.iter().zip(&residual) {
                self.x[i] = (self.x[i] + dx).max(0.0);
            }
            s = self.shift();
        }
        self.x = best_x;
        best_s
    }

    fn denormalised(self) -> (Vec<usize>, Vec<f64>) {
        self.active
            .iter()
            .zip(self.x.iter().zip(&self.lengths))
            // What is not a number must be seen.
            .filter(|(_, (x, _))| **x > 0.0 || x.is_nan())
            .map(|(&j, (x, l))| (j, x / l))
            .unzip()
    }
}

/// W s in some precision.
pub struct Pushed {
    pub values: Vec<f64>,
    /// Bound on the error of an entry, per |w_j|.
    pub error: f64,
    /// Whether single rows may be asked where that error decides.
    pub by_rows: bool,
}

impl Pushed {
    /// From M: quick, and good enough for most certificates. `priced` are the values, if they are known already.
    pub fn by_gram(class: &Class, answer: &Refined, priced: Option<Vec<f64>>) -> Self {
        let values = priced.unwrap_or_else(|| {
            let mut values = Vec::new();
            class.gram.push(class.k, &answer.active, &answer.multipliers, &mut values);
            values
        });
        // Higham 2002, sec. 3.1, for the entries of M, the sum over the support, and the shift itself.
        let gamma = 2.0 * (class.gram.dim() + answer.active.len() + 8) as f64 * f64::EPSILON;
        let size: f64 = answer
            .active
            .iter()
            .zip(&answer.multipliers)
            .map(|(&j, x)| x * class.gram.both_lengths(class.k, j))
            .sum();
        Pushed {
            values,
            error: gamma * size,
            by_rows: false,
        }
    }
}

/// Residuals of an answer, rounding of W s included: where that leaves open whether a constraint is met to `tol`, its row has the word.
pub fn certify(class: &Class, answer: &Refined, pushed: Pushed, tol: f64) -> Certificate {
    let square = dot(&answer.shift, &answer.shift);
    let length = square.sqrt();
    let paid: f64 = answer.active.iter().zip(&answer.multipliers).map(|(&j, x)| class.r[j] * x).sum();
    let (k, rows) = (class.k, class.gram.lengths_of_rows());
    let mut missed = pushed.values;
    let own = missed[k] - pushed.error * rows[k];
    let scale = miss(&mut missed, &class.r, rows, own, pushed.error);
    missed[k] = 0.0;
    let gamma = (class.gram.dim() as f64 / 8.0 + 24.0) * f64::EPSILON * length;
    let by_row = |j: usize| class.r[j] - class.gram.reach(k, j, &answer.shift) + gamma * class.lengths[j];
    class.gram.close_to(k).iter().for_each(|&j| missed[j] = by_row(j));
    if !answer.farkas && pushed.by_rows {
        for j in (0..missed.len()).filter(|&j| j != k) {
            if missed[j] > tol * scale {
                let reached = class.gram.reach_twice(k, j, &answer.shift);
                missed[j] = class.r[j] - reached + 2.0 * f64::EPSILON * reached.abs();
            }
        }
    }
    let worst = largest(&missed);
    let largest = answer.multipliers.iter().copied().fold(0.0, f64::max);
    let least = answer.multipliers.iter().copied().fold(0.0, f64::min);
    let apart = |made: &Vec<f64>| answer.shift.iter().zip(made).map(|(a, b)| (a - b) * (a - b)).sum();
    let apart: f64 = answer.made.as_ref().map_or(0.0, apart);
    let ratio = |a: f64, b: f64| if a == 0.0 { 0.0 } else { a / b };
    if answer.farkas {
        let total: f64 = answer
            .active
            .iter()
            .zip(&answer.multipliers)
            .map(|(&j, x)| x * class.lengths[j])
            .sum();
        return Certificate {
            length,
            primal: f64::NAN,
            dual: ratio(length, total),
            gap: f64::NAN,
        };
    }
    Certificate {
        length,
        primal: ratio(worst, scale),
        dual: ratio(-least, largest).max(ratio(apart.sqrt(), length)),
        gap: ratio((square - paid).abs(), square),
    }
}

/// v_j := r_j - own + v_j + error |w_j|. Returns the largest |r_j| that is finite: at k itself it is not.
#[multiversion(targets("x86_64+avx512f+avx512vl", "x86_64+avx2+fma", "aarch64+neon"))]
fn miss(values: &mut [f64], r: &[f64], rows: &[f64], own: f64, error: f64) -> f64 {
    let mut scale = [0.0_f64; 8];
    for ((values, r), rows) in values.chunks_mut(8).zip(r.chunks(8)).zip(rows.chunks(8)) {
        for (((s, v), r), row) in scale.iter_mut().zip(values).zip(r).zip(rows) {
            *v += r - own + error * row;
            let size = if r.is_finite() { r.abs() } else { 0.0 };
            *s = if size > *s { size } else { *s };
        }
    }
    scale.into_iter().fold(0.0, f64::max)
}

/// The largest entry; at least 0; NaN if one is.
#[multiversion(targets("x86_64+avx512f+avx512vl", "x86_64+avx2+fma", "aarch64+neon"))]
fn largest(values: &[f64]) -> f64 {
    let (mut largest, mut sums) = ([0.0_f64; 8], [0.0; 8]);
    for part in values.chunks(8) {
        for ((l, s), v) in largest.iter_mut().zip(&mut sums).zip(part) {
            *l = if v > l { *v } else { *l };
            *s += v * 0.0;
        }
    }
    largest.into_iter().fold(0.0, f64::max) + sums.iter().sum::<f64>()
}

/// A lower bound on the norm that holds although it is computed in float64.
///
/// Any x >= 0 proves |s_k| >= r^T x / |sum of x_j a_j|. The numerator is lowered, the denominator raised, by what rounding can have done to
/// margins that were evaluated from differences of rows (Higham 2002, sec. 3.1). `length` is that of the answer's shift.
pub fn bound(problem: &Problem, class: &Class, answer: &Refined, length: f64) -> f64 {
    let gamma = (problem.dim as f64 / 8.0 + answer.active.len() as f64 + 24.0) * f64::EPSILON;
    let (mut paid, mut doubt, mut total) = (0.0, 0.0, 0.0);
    for (&j, &x) in answer.active.iter().zip(&answer.multipliers) {
        let offset = (problem.bias[j] - problem.bias[class.k]).abs();
        paid += x * class.r[j];
        doubt += x * gamma * (class.lengths[j] * problem.longest_latent + offset);
        total += x * class.lengths[j];
    }
    let made = answer.made.as_ref().map_or(length, |made| dot(made, made).sqrt());
    let length = made + gamma * total;
    let proven = (paid - doubt).max(0.0);
    if proven == 0.0 { 0.0 } else { proven / length }
}

/// Whether a proven bound puts the class out of reach.
pub fn out_of_reach(problem: &Problem, bound: f64) -> bool {
    bound > REACH * problem.reach_unit
}
