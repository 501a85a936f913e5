//! One class: a few constraints solved exactly, all of them priced, the violated ones added, until none is. May use: gram, the engines.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::active_set::ActiveSet;
use crate::gram::Gram;
use crate::interior;
use crate::margins::{Peaks, dot};
use crate::problem::Engine;

/// Violated constraints that join per round.
const JOIN: usize = 12;
/// Rounds are few (5-15 on real heads); the cap is for what rounding may do.
const ROUNDS: usize = 500;
/// A constraint counts as violated when it is missed by this share of the shift's length.
const VIOLATED: f64 = 1e-12;

/// How an engine left a working set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    Optimal,
    /// The multipliers are a Farkas ray.
    Infeasible,
    Stalled,
}

/// The QP of one class: a_j^T s >= r_j for all rivals j.
pub struct Class<'a, 'p> {
    pub gram: &'a Gram<'a>,
    pub k: usize,
    /// Margins by class, -inf at k: upper bounds, until they are sharpened to their exact values.
    pub r: Vec<f64>,
    /// For a sharpened margin, the sample that attains it.
    pub samples: Vec<Option<usize>>,
    /// |a_j| by class; 0 at k and at exact duplicates.
    pub lengths: Vec<f64>,
    peaks: &'a Peaks<'a, 'p>,
    /// Which of the peaks' targets this is.
    t: usize,
}

/// What an engine makes of a class. Nothing in it is trusted before `certificate` has looked.
pub struct Attempt {
    pub ended: Ended,
    pub active: Vec<usize>,
    pub multipliers: Vec<f64>,
    pub iterations: usize,
}

/// Some constraints, each divided by |a_j|, so that a violation is a distance and the diagonal of G is one.
#[derive(Default)]
pub struct WorkingSet {
    pub members: Vec<usize>,
    pub r: Vec<f64>,
    g: Vec<Vec<f64>>,
    /// a_j / |a_j|, where the engine asks for them.
    pub vectors: Vec<Vec<f64>>,
    with_vectors: bool,
}

impl WorkingSet {
    fn new(with_vectors: bool) -> Self {
        WorkingSet {
            with_vectors,
            ..WorkingSet::default()
        }
    }

    pub fn len(&self) -> usize {
        self.members.len()
    }

    /// Inner products of one member with all.
    pub fn gram_row(&self, position: usize) -> &[f64] {
        &self.g[position]
    }

    fn push(&mut self, class: &Class, j: usize) {
        let lengths = &class.lengths;
        let mut row = class.gram.inners(class.k, j, &self.members);
        row.iter_mut().zip(&self.members).for_each(|(v, &l)| *v /= lengths[j] * lengths[l]);
        for (other, &v) in self.g.iter_mut().zip(&row) {
            other.push(v);
        }
        row.push(1.0);
        self.g.push(row);
        self.members.push(j);
        self.r.push(class.r[j] / lengths[j]);
        if self.with_vectors {
            self.vectors.extend(unit_rows(class, &[j]));
        }
    }

    /// Keeps the members at `positions`, in that order.
    fn compact(&mut self, positions: &[usize]) {
        self.members = positions.iter().map(|&p| self.members[p]).collect();
        if self.with_vectors {
            self.vectors = positions.iter().map(|&p| self.vectors[p].clone()).collect();
        }
        self.r = positions.iter().map(|&p| self.r[p]).collect();
        self.g = positions
            .iter()
            .map(|&p| positions.iter().map(|&q| self.g[p][q]).collect())
            .collect();
    }
}

impl<'a, 'p> Class<'a, 'p> {
    pub fn new(gram: &'a Gram<'a>, peaks: &'a Peaks<'a, 'p>, t: usize, k: usize) -> Self {
        let r = peaks.upper_bounds(t);
        let samples = vec![None; r.len()];
        let mut class = Class {
            gram,
            k,
            r,
            samples,
            lengths: gram.lengths(k),
            peaks,
            t,
        };
        // Rows that nearly equal w_k cannot wait: their bounds are far too loose to price.
        for &j in gram.close_to(k) {
            class.sharpen(j);
        }
        class
    }

    /// Replaces the upper bound on r_j by r_j.
    fn sharpen(&mut self, j: usize) {
        if self.samples[j].is_none() {
            let (margin, sample) = self.peaks.exact(self.t, j);
            self.r[j] = margin;
            self.samples[j] = Some(sample);
            self.lengths[j] = self.gram.inners(self.k, j, &[j])[0].max(0.0).sqrt();
        }
    }

    /// A constraint `0 >= r_j > 0`, if there is one: an exact duplicate of k with a larger bias.
    fn contradiction(&self) -> Option<usize> {
        (0..self.r.len()).find(|&j| j != self.k && self.lengths[j] == 0.0 && self.r[j] > 0.0)
    }

    fn rivals(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.r.len()).filter(|&j| j != self.k && self.lengths[j] > 0.0)
    }

    /// At most how far s is from the half-space of each rival: -inf at k and its duplicates.
    fn price(&self, active: &[usize], multipliers: &[f64], out: &mut Vec<f64>) {
        let error = self.gram.push(self.k, active, multipliers, out);
        let own = out[self.k];
        for (j, o) in out.iter_mut().enumerate() {
            *o = if self.lengths[j] > 0.0 {
                (self.r[j] - own + *o + error * self.gram.both_lengths(self.k, j)) / self.lengths[j]
            } else {
                f64::NEG_INFINITY
            };
        }
    }

    /// s = sum of multipliers times a_j, from W itself.
    pub fn combine(&self, active: &[usize], multipliers: &[f64]) -> Vec<f64> {
        let mut s = vec![0.0; self.gram.dim()];
        for (&j, &x) in active.iter().zip(multipliers) {
            for (s, a) in s.iter_mut().zip(self.gram.difference(self.k, j)) {
                *s += x * a;
            }
        }
        s
    }

    /// Solves with the given engine; `kernel` is the active set's workspace, reused from class to class.
    /// `careful` makes it factor vectors rather than their Gram matrix.
    pub fn attempt(&mut self, engine: Engine, careful: bool, kernel: &mut ActiveSet, cancel: &Arc<AtomicBool>) -> Attempt {
        if let Some(j) = self.contradiction() {
            return Attempt {
                ended: Ended::Infeasible,
                active: vec![j],
                multipliers: vec![1.0],
                iterations: 0,
            };
        }
        match engine {
            Engine::Auto | Engine::ActiveSet => self.generate(&mut Kernel::active_set(kernel, careful), cancel),
            Engine::Clarabel => self.generate(&mut Kernel::Clarabel(Vec::new(), Vec::new(), 0), cancel),
            Engine::ClarabelFull => {
                let rivals: Vec<usize> = self.rivals().collect();
                rivals.iter().for_each(|&j| self.sharpen(j));
                let mut ws = WorkingSet::default();
                rivals.iter().for_each(|&j| ws.push(self, j));
                let mut kernel = Kernel::Clarabel(Vec::new(), Vec::new(), 0);
                let ended = kernel.solve(self, &ws, 0.0, cancel);
                kernel.report(self, &ws, ended)
            }
        }
    }

    /// Constraint generation: violated constraints are made exact, and join if they are still violated then.
    fn generate(&mut self, kernel: &mut Kernel, cancel: &Arc<AtomicBool>) -> Attempt {
        let mut ws = WorkingSet::new(kernel.wants_vectors());
        let mut prices = Vec::new();
        for _ in 0..ROUNDS {
            let (active, multipliers) = kernel.multipliers(self, &ws);
            self.price(&active, &multipliers, &mut prices);
            let tolerance = VIOLATED * self.distance(&active, &multipliers);
            let shift = kernel
                .shift(&ws, self.gram.dim())
                .unwrap_or_else(|| self.combine(&active, &multipliers));
            let joining = self.joining(&prices, tolerance, &ws.members, &shift);
            if joining.is_empty() {
                return kernel.report(self, &ws, Ended::Optimal);
            }
            if cancel.load(Ordering::Relaxed) {
                break;
            }
            kernel.compact(&mut ws);
            joining.iter().for_each(|&j| ws.push(self, j));
            let ended = kernel.solve(self, &ws, tolerance, cancel);
            if ended != Ended::Optimal {
                return kernel.report(self, &ws, ended);
            }
        }
        kernel.report(self, &ws, Ended::Stalled)
    }

    /// A lower bound on the norm, to measure violations by: that of the multipliers, or the deepest single constraint.
    fn distance(&self, active: &[usize], multipliers: &[f64]) -> f64 {
        let square: f64 = active.iter().zip(multipliers).map(|(&j, x)| self.r[j] * x).sum();
        let deepest = self.rivals().map(|j| self.r[j] / self.lengths[j]).fold(0.0, f64::max);
        deepest.max(square.max(0.0).sqrt())
    }

    /// Up to [`JOIN`] constraints outside the working set that s violates. Prices are upper bounds: the worst are looked at exactly, then
    /// the next, until some are really violated.
    fn joining(&mut self, prices: &[f64], tolerance: f64, members: &[usize], s: &[f64]) -> Vec<usize> {
        let mut doubtful: Vec<usize> = self.rivals().filter(|&j| prices[j] > tolerance && !members.contains(&j)).collect();
        let worst_first = |a: &usize, b: &usize| prices[*b].total_cmp(&prices[*a]).then(a.cmp(b));
        while !doubtful.is_empty() {
            let count = JOIN.min(doubtful.len());
            doubtful.select_nth_unstable_by(count - 1, worst_first);
            let rest = doubtful.split_off(count);
            let mut violated = std::mem::replace(&mut doubtful, rest);
            violated.retain(|&j| {
                self.sharpen(j);
                (self.r[j] - self.gram.reach(self.k, j, s)) / self.lengths[j] > tolerance
            });
            if !violated.is_empty() {
                violated.sort_unstable();
                return violated;
            }
        }
        Vec::new()
    }
}

/// The two engines behind one face; both leave (positions, multipliers) of the constraints they use.
enum Kernel<'a> {
    ActiveSet(&'a mut ActiveSet),
    Clarabel(Vec<usize>, Vec<f64>, usize),
}

impl<'a> Kernel<'a> {
    fn active_set(kernel: &'a mut ActiveSet, careful: bool) -> Self {
        kernel.reset(careful);
        Kernel::ActiveSet(kernel)
    }

    fn wants_vectors(&self) -> bool {
        matches!(self, Kernel::ActiveSet(kernel) if kernel.careful())
    }

    /// The shift itself, where the engine has it more exactly than its multipliers tell.
    fn shift(&self, ws: &WorkingSet, dim: usize) -> Option<Vec<f64>> {
        match self {
            Kernel::ActiveSet(kernel) => kernel.shift(ws, dim),
            Kernel::Clarabel(..) => None,
        }
    }

    fn solve(&mut self, class: &Class, ws: &WorkingSet, tolerance: f64, cancel: &Arc<AtomicBool>) -> Ended {
        match self {
            Kernel::ActiveSet(kernel) => kernel.solve(ws, tolerance),
            Kernel::Clarabel(positions, values, iterations) => {
                let interior::Interior {
                    ended,
                    x,
                    iterations: steps,
                } = interior::solve(class, ws, cancel);
                *iterations += steps;
                *positions = (0..x.len()).filter(|&i| x[i] > 0.0).collect();
                *values = positions.iter().map(|&i| x[i]).collect();
                ended
            }
        }
    }

    fn support(&self) -> (&[usize], &[f64], usize) {
        match self {
            Kernel::ActiveSet(kernel) => {
                let (positions, values) = kernel.support();
                (positions, values, kernel.iterations)
            }
            Kernel::Clarabel(positions, values, iterations) => (positions, values, *iterations),
        }
    }

    /// Classes and multipliers in the units of a_j.
    fn multipliers(&self, class: &Class, ws: &WorkingSet) -> (Vec<usize>, Vec<f64>) {
        let (positions, values, _) = self.support();
        let active: Vec<usize> = positions.iter().map(|&p| ws.members[p]).collect();
        let multipliers = active.iter().zip(values).map(|(&j, x)| x / class.lengths[j]).collect();
        (active, multipliers)
    }

    /// Only the active set can start warm from a smaller set; an interior point is better off keeping all it has seen.
    fn compact(&mut self, ws: &mut WorkingSet) {
        if let Kernel::ActiveSet(kernel) = self {
            ws.compact(kernel.support().0);
            kernel.renumber();
        }
    }

    fn report(&self, class: &Class, ws: &WorkingSet, ended: Ended) -> Attempt {
        let (active, multipliers) = self.multipliers(class, ws);
        Attempt {
            ended,
            active,
            multipliers,
            iterations: self.support().2,
        }
    }
}

/// Rows a_j / |a_j| of the given rivals, computed from W itself.
pub fn unit_rows(class: &Class, active: &[usize]) -> Vec<Vec<f64>> {
    active
        .iter()
        .map(|&j| {
            let mut a = class.gram.difference(class.k, j);
            let length = dot(&a, &a).sqrt();
            if length > 0.0 {
                a.iter_mut().for_each(|v| *v /= length);
            }
            a
        })
        .collect()
}
