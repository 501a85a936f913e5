//! One class's QP, its margins made exact as they are needed, and working sets of its constraints. May use: gram, linalg, margins, prices.

use std::cell::OnceCell;

use crate::gram::Gram;
use crate::linalg::dot;
use crate::margins::Margins;
use crate::prices::Prices;

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
    /// W s for the shift that the multipliers make, if the engine has just priced it.
    pub pushed: Option<Vec<f64>>,
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
            if self.gram.needs_rows(self.k) {
                self.lengths[j] = self.gram.inners(self.k, j, &[j], 0)[0].max(0.0).sqrt();
            }
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
        prices.error = self.gram.push(self.k, active, multipliers, &mut prices.pushed);
        let rows = self.gram.lengths_of_rows();
        let own = prices.pushed[self.k] - prices.error * rows[self.k];
        prices.fill(&self.r, &self.lengths, rows, own);
    }

    /// A lower bound on the norm, by multipliers.
    pub fn distance(&self, active: &[usize], multipliers: &[f64]) -> f64 {
        let square: f64 = active.iter().zip(multipliers).map(|(&j, x)| self.r[j] * x).sum();
        square.max(0.0).sqrt()
    }

    /// Up to [`JOIN`] constraints outside the working set that s violates. Prices are upper bounds: the worst are looked at exactly, then
    /// the next, until some are really violated. The shift itself is asked for only where rounding of the prices leaves that open.
    pub fn joining(&mut self, prices: &mut Prices, tolerance: f64, members: &[usize], shift: impl Fn() -> Vec<f64>) -> Vec<usize> {
        prices.set_aside(members.iter().copied());
        let s = OnceCell::new();
        loop {
            let worst = prices.take_worst(JOIN, tolerance);
            if worst.is_empty() {
                return Vec::new();
            }
            let mut violated = Vec::with_capacity(JOIN);
            for (j, price) in worst {
                let missed = price * self.lengths[j] - self.r[j];
                self.sharpen(j);
                let (length, most) = (self.lengths[j], missed + self.r[j]);
                let rounding = 2.0 * prices.error * self.gram.both_lengths(self.k, j);
                let really = || self.r[j] - self.gram.reach(self.k, j, s.get_or_init(&shift)) > tolerance * length;
                if length > 0.0 && most > tolerance * length && (most - rounding > tolerance * length || really()) {
                    violated.push(j);
                }
            }
            if !violated.is_empty() {
                return violated;
            }
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
