//! One class's QP, its margins made exact as they are needed, and working sets of its constraints. May use: gram, linalg, margins.

use std::cell::OnceCell;

use multiversion::multiversion;

use crate::gram::Gram;
use crate::linalg::dot;
use crate::margins::Margins;

/// Violated constraints that join per round.
const JOIN: usize = 20;
/// Room for more that rows of G are given.
const ROOM: usize = 2 * JOIN;

/// Instead of a sample: the margin is still a bound.
const OPEN: u32 = u32::MAX;

/// How an engine left a working set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    Optimal,
    /// The multipliers are a Farkas ray.
    Infeasible,
    Stalled,
}

/// The QP of one class: a_j^T s >= r_j for all rivals j.
pub struct Class<'a> {
    pub gram: &'a Gram<'a>,
    pub k: usize,
    /// Margins by class, -inf at k: upper bounds, until they are sharpened to their exact values.
    pub r: Vec<f64>,
    /// For a sharpened margin, the sample that attains it; else [`OPEN`].
    samples: Vec<u32>,
    /// |a_j| by class; 0 at k and at exact duplicates.
    pub lengths: Vec<f64>,
    margins: &'a dyn Margins,
    /// Which of the margins' targets this is, and whose samples count.
    t: usize,
    pub group: usize,
}

/// What an engine makes of a class. Nothing in it is trusted before `certificate` has looked.
pub struct Attempt {
    pub ended: Ended,
    pub active: Vec<usize>,
    pub multipliers: Vec<f64>,
    pub iterations: usize,
}

/// At most how far a shift is from the half-space of each rival.
#[derive(Default)]
pub struct Prices {
    values: Vec<f64>,
    /// The part that is rounding, per |w_k| + |w_j|.
    error: f64,
}

impl Prices {
    /// What the [`JOIN`] worst of some rivals reach.
    fn floor(&self, rivals: &[usize]) -> f64 {
        if rivals.len() <= JOIN {
            return f64::NEG_INFINITY;
        }
        let mut values: Vec<f64> = rivals.iter().map(|&j| self.values[j]).collect();
        *values.select_nth_unstable_by(JOIN - 1, |a, b| b.total_cmp(a)).1
    }
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
    pub fn new(with_vectors: bool) -> Self {
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

    pub fn push(&mut self, class: &Class, j: usize) {
        let lengths = &class.lengths;
        let mut row = class.gram.inners(class.k, j, &self.members, ROOM);
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
    pub fn compact(&mut self, positions: &[usize]) {
        self.members = positions.iter().map(|&p| self.members[p]).collect();
        if self.with_vectors {
            self.vectors = positions.iter().map(|&p| self.vectors[p].clone()).collect();
        }
        self.r = positions.iter().map(|&p| self.r[p]).collect();
        self.g = positions
            .iter()
            .map(|&p| {
                let mut row = Vec::with_capacity(positions.len() + ROOM);
                row.extend(positions.iter().map(|&q| self.g[p][q]));
                row
            })
            .collect();
    }
}

impl<'a> Class<'a> {
    pub fn new(gram: &'a Gram<'a>, margins: &'a dyn Margins, t: usize, k: usize, group: usize) -> Self {
        let r = margins.upper_bounds(t, group);
        let samples = vec![OPEN; r.len()];
        let mut class = Class {
            gram,
            k,
            r,
            samples,
            lengths: gram.lengths(k),
            margins,
            t,
            group,
        };
        // Rows that nearly equal w_k cannot wait: their bounds are far too loose to price.
        for &j in gram.close_to(k) {
            class.sharpen(j);
        }
        class
    }

    /// Replaces the upper bound on r_j by r_j.
    pub fn sharpen(&mut self, j: usize) {
        if self.samples[j] == OPEN {
            let (margin, sample) = self.margins.exact(self.t, self.group, j);
            self.r[j] = margin;
            self.samples[j] = u32::try_from(sample).expect("samples are counted in 32 bits");
            self.lengths[j] = self.gram.inners(self.k, j, &[j], 0)[0].max(0.0).sqrt();
        }
    }

    /// The sample that attains a sharpened margin.
    pub fn sample(&self, j: usize) -> Option<usize> {
        (self.samples[j] != OPEN).then_some(self.samples[j] as usize)
    }

    /// A constraint `0 >= r_j > 0`, if there is one: an exact duplicate of k with a larger bias.
    pub fn contradiction(&self) -> Option<usize> {
        let close = self.gram.close_to(self.k).iter().copied();
        close.into_iter().find(|&j| self.r[j] > 0.0 && self.gram.same_rows(self.k, j))
    }

    pub fn rivals(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.r.len()).filter(|&j| j != self.k && self.lengths[j] > 0.0)
    }

    /// At most how far s is from the half-space of each rival: -inf at k and its duplicates.
    pub fn price(&self, active: &[usize], multipliers: &[f64], prices: &mut Prices) {
        prices.error = self.gram.push(self.k, active, multipliers, &mut prices.values);
        let own = prices.values[self.k];
        let rows = self.gram.lengths_of_rows();
        divide(
            &mut prices.values,
            &self.r,
            &self.lengths,
            rows,
            own - prices.error * rows[self.k],
            prices.error,
        );
    }

    /// About how far the deepest single constraint is: a scale to measure violations by, while there are no multipliers to tell.
    pub fn depth(&self) -> f64 {
        deepest(&self.r, &self.lengths)
    }

    /// A lower bound on the norm, by multipliers.
    pub fn distance(&self, active: &[usize], multipliers: &[f64]) -> f64 {
        let square: f64 = active.iter().zip(multipliers).map(|(&j, x)| self.r[j] * x).sum();
        square.max(0.0).sqrt()
    }

    /// Up to [`JOIN`] constraints outside the working set that s violates. Prices are upper bounds: the worst are looked at exactly, then
    /// the next, until some are really violated. The shift itself is asked for only where rounding of the prices leaves that open.
    pub fn joining(&mut self, prices: &Prices, tolerance: f64, members: &[usize], shift: impl Fn() -> Vec<f64>) -> Vec<usize> {
        let mut doubtful = Vec::with_capacity(self.r.len());
        doubtful.extend((0..self.r.len()).filter(|&j| prices.values[j] > tolerance && !members.contains(&j)));
        let s = OnceCell::new();
        while !doubtful.is_empty() {
            let floor = prices.floor(&doubtful);
            let mut violated: Vec<usize> = doubtful.extract_if(.., |j| prices.values[*j] >= floor).take(JOIN).collect();
            violated.retain(|&j| {
                let missed = prices.values[j] * self.lengths[j] - self.r[j];
                self.sharpen(j);
                let (length, most) = (self.lengths[j], missed + self.r[j]);
                if length == 0.0 {
                    return false;
                }
                let rounding = 2.0 * prices.error * self.gram.both_lengths(self.k, j);
                most > tolerance * length
                    && (most - rounding > tolerance * length
                        || self.r[j] - self.gram.reach(self.k, j, s.get_or_init(&shift)) > tolerance * length)
            });
            if !violated.is_empty() {
                return violated;
            }
        }
        Vec::new()
    }
}

/// The largest r_j / |a_j| where |a_j| > 0; at least 0.
#[multiversion(targets("x86_64+avx512f+avx512vl", "x86_64+avx2+fma", "aarch64+neon"))]
fn deepest(r: &[f64], lengths: &[f64]) -> f64 {
    let mut deepest = [0.0_f64; 8];
    for (r, lengths) in r.chunks(8).zip(lengths.chunks(8)) {
        for ((d, r), length) in deepest.iter_mut().zip(r).zip(lengths) {
            let depth = if *length > 0.0 { r / length } else { 0.0 };
            *d = if depth > *d { depth } else { *d };
        }
    }
    deepest.into_iter().fold(0.0, f64::max)
}

/// v_j := (r_j - own + v_j + error |w_j|) / |a_j|, or -inf where |a_j| = 0.
#[multiversion(targets("x86_64+avx512f+avx512vl", "x86_64+avx2+fma", "aarch64+neon"))]
fn divide(values: &mut [f64], r: &[f64], lengths: &[f64], rows: &[f64], own: f64, error: f64) {
    for (((v, r), length), row) in values.iter_mut().zip(r).zip(lengths).zip(rows) {
        let missed = (r - own + *v + error * row) / length;
        *v = if *length > 0.0 { missed } else { f64::NEG_INFINITY };
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
