//! From logits to margins: for a class k and a rival j the one number that the QP needs, r_kj = max_i (l_ij - l_ik) over a group of samples,
//! or a lower order statistic of it. May use: problem, layout, logits, max_plus, order.
//!
//! All margins are first taken in float32, which gives an upper bound on each: its error has a bound of its own. Few of them ever matter to
//! the QP; those are computed again in float64, from the differences of the rows, at every sample that the float32 margins leave in doubt.

use multiversion::multiversion;
use ndarray::ArrayView2;

use crate::control::{Control, Stage};
use crate::logits::Logits;
use crate::max_plus::{LANES, Lane, TILE, max_plus};
use crate::order::{Own, Panel, Scratch, mth_largest};
use crate::problem::Problem;

/// Half of a common second-level cache.
const CACHED_BYTES: usize = 512 << 10;

/// Where the QPs of some target classes get their margins from. `t` is a position among the targets.
pub trait Margins: Sync {
    /// Upper bounds on the margins of all rivals; -inf at the target itself.
    fn upper_bounds(&self, t: usize, group: usize) -> Vec<f64>;

    /// r_kj, and the (first) sample that attains it.
    fn exact(&self, t: usize, group: usize, j: usize) -> (f64, usize);
}

/// Margins whose time is booked for the collapse.
pub struct Booked<'a> {
    pub margins: &'a dyn Margins,
    pub control: &'a Control,
}

impl Margins for Booked<'_> {
    fn upper_bounds(&self, t: usize, group: usize) -> Vec<f64> {
        self.control.timed(Stage::Collapse, || self.margins.upper_bounds(t, group))
    }

    fn exact(&self, t: usize, group: usize, j: usize) -> (f64, usize) {
        self.control.timed(Stage::Collapse, || self.margins.exact(t, group, j))
    }
}

/// The float32 margins of a few target classes against all rivals, by block of samples.
pub struct Peaks<'a, 'p> {
    logits: &'a Logits,
    problem: &'a Problem<'p>,
    targets: &'a [usize],
    /// By group: the m of the m-th largest margin that is wanted.
    places: Vec<usize>,
    /// `[target][panel][block]`: the largest margin within the block. Empty where no group asks for a largest margin.
    data: Vec<Lane>,
    /// `[target][ranked group][panel]`: the order statistic of the groups that do not ask for the largest.
    ranked: Vec<Lane>,
    /// By group: its place among the ranked groups.
    ranked_groups: Vec<Option<usize>>,
}

impl<'a, 'p> Peaks<'a, 'p> {
    /// `memory` is what an earlier one left: fresh pages cost more than what is written to them.
    /// What a cancelled one holds is of no use.
    pub fn new(
        logits: &'a Logits,
        problem: &'a Problem<'p>,
        targets: &'a [usize],
        quantile: f64,
        memory: Vec<Lane>,
        control: &Control,
    ) -> Self {
        let layout = &logits.layout;
        let places: Vec<usize> = (0..layout.groups()).map(|g| place(layout.size_of(g), quantile)).collect();
        let mut count = 0..;
        let ranked_groups = places.iter().map(|&m| if m > 1 { count.next() } else { None }).collect();
        let mut peaks = Peaks {
            logits,
            problem,
            targets,
            places,
            data: memory,
            ranked: Vec::new(),
            ranked_groups,
        };
        if peaks.places.contains(&1) {
            peaks.fill_maxima();
        }
        peaks.fill_ranked(control);
        peaks
    }

    pub fn into_memory(self) -> Vec<Lane> {
        self.data
    }

    /// Bytes that one target takes.
    pub fn bytes(logits: &Logits) -> usize {
        logits.layout.blocks().len() * logits.panels() * size_of::<Lane>()
    }

    fn fill_maxima(&mut self) {
        let (logits, targets) = (self.logits, self.targets);
        let (blocks, panels) = (logits.layout.blocks().len(), logits.panels());
        // All of it is overwritten.
        self.data.resize(targets.len() * panels * blocks, [f32::NEG_INFINITY; LANES]);
        let mut peaks = [[0.0; LANES]; TILE];
        for block in 0..blocks {
            let keys: Vec<_> = targets.chunks(TILE).map(|tile| own_logits(logits, block, tile)).collect();
            // So many panels stay in the second-level cache for all tiles; with many classes they have come from memory.
            let step = (CACHED_BYTES / size_of_val(logits.panel(block, 0))).max(1);
            for first in (0..panels).step_by(step) {
                for (tile, keys) in keys.iter().enumerate() {
                    for panel in first..panels.min(first + step) {
                        max_plus(keys, logits.panel(block, panel), &mut peaks);
                        for (t, peak) in (tile * TILE..targets.len()).zip(&peaks) {
                            self.data[(t * panels + panel) * blocks + block] = *peak;
                        }
                    }
                }
            }
        }
    }

    fn fill_ranked(&mut self, control: &Control) {
        let (logits, panels, mut scratch) = (self.logits, self.logits.panels(), Scratch::default());
        let groups: Vec<usize> = (0..self.places.len()).filter(|&g| self.places[g] > 1).collect();
        self.ranked.resize(self.targets.len() * groups.len() * panels, [0.0; LANES]);
        for (at, &group) in groups.iter().enumerate() {
            let blocks = logits.layout.blocks_of(group);
            let own: Vec<Own> = self
                .targets
                .chunks(TILE)
                .map(|targets| Own::new(blocks.clone().map(|block| own_logits(logits, block, targets)).collect()))
                .collect();
            let mut rivals = Panel::default();
            // With many classes this takes seconds a task.
            for panel in (0..panels).take_while(|_| !control.cancelled()) {
                rivals.load(blocks.clone().map(|block| logits.panel(block, panel)).collect());
                for (tile, own) in own.iter().enumerate() {
                    let found = mth_largest(own, &rivals, self.places[group], &mut scratch);
                    for (t, found) in (tile * TILE..self.targets.len()).zip(found) {
                        self.ranked[(t * groups.len() + at) * panels + panel] = found;
                    }
                }
            }
        }
    }

    fn place_of(&self, t: usize, panel: usize) -> usize {
        (t * self.logits.panels() + panel) * self.logits.layout.blocks().len()
    }

    /// Largest float32 margins of a panel of rivals over a block of samples.
    fn peak(&self, t: usize, panel: usize, block: usize) -> &Lane {
        &self.data[self.place_of(t, panel) + block]
    }

    /// Float32 margins of a panel of rivals.
    fn top(&self, t: usize, group: usize, panel: usize) -> Lane {
        if let Some(at) = self.ranked_groups[group] {
            return *self.order_statistic(t, at, panel);
        }
        let (blocks, first) = (self.logits.layout.blocks_of(group), self.place_of(t, panel));
        largest(&self.data[first + blocks.start..first + blocks.end])
    }

    fn order_statistic(&self, t: usize, at: usize, panel: usize) -> &Lane {
        let groups = self.ranked.len() / (self.targets.len() * self.logits.panels());
        &self.ranked[(t * groups + at) * self.logits.panels() + panel]
    }

    /// Bound on the error of a float32 margin.
    fn doubt(&self, k: usize, j: usize) -> f64 {
        // The last term covers products that vanish in float32: entries are below 2.
        let vanished = 8.0 * (self.problem.dim as f64 + 1.0) * f64::from(f32::MIN_POSITIVE);
        self.logits.error * (self.problem.row_length(k) + self.problem.row_length(j)) + vanished
    }

    fn exact_max(&self, t: usize, group: usize, j: usize) -> (f64, usize) {
        let (k, blocks) = (self.targets[t], self.logits.layout.blocks_of(group));
        let peak = |block| self.peak(t, j / LANES, block)[j % LANES];
        let top = blocks.clone().map(peak).fold(f32::NEG_INFINITY, f32::max);
        // Rounded outwards, so that the comparison below may stay in float32.
        let floor = ((f64::from(top) - 2.0 * self.doubt(k, j)) as f32).next_down();
        let mut best = (f64::NEG_INFINITY, 0);
        for block in blocks.filter(|&block| peak(block) >= floor) {
            for (margin, sample) in self.logits.margins(block, k, j) {
                if margin >= floor {
                    let exact = self.problem.margin(k, j, sample);
                    if exact > best.0 {
                        best = (exact, sample);
                    }
                }
            }
        }
        best
    }

    fn exact_rank(&self, t: usize, group: usize, j: usize, near: f32) -> (f64, usize) {
        let k = self.targets[t];
        let doubt = 2.0 * self.doubt(k, j);
        let low = ((f64::from(near) - doubt) as f32).next_down();
        let high = ((f64::from(near) + doubt) as f32).next_up();
        // What is surely above keeps its place; only those in doubt must be put in order exactly.
        let mut above = 0;
        let mut open: Vec<(f64, usize)> = Vec::new();
        for block in self.logits.layout.blocks_of(group) {
            for (margin, sample) in self.logits.margins(block, k, j) {
                if margin > high {
                    above += 1;
                } else if margin >= low {
                    open.push((self.problem.margin(k, j, sample), sample));
                }
            }
        }
        *open
            .select_nth_unstable_by(self.places[group] - 1 - above, |a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)))
            .1
    }
}

impl Margins for Peaks<'_, '_> {
    fn upper_bounds(&self, t: usize, group: usize) -> Vec<f64> {
        let (k, bias) = (self.targets[t], &self.problem.bias);
        let mut bounds = Vec::with_capacity(bias.len());
        for (panel, offsets) in bias.chunks(LANES).enumerate() {
            let top = self.top(t, group, panel);
            for (lane, offset) in offsets.iter().enumerate() {
                bounds.push(f64::from(top[lane]) + self.doubt(k, panel * LANES + lane) + (offset - bias[k]));
            }
        }
        bounds[k] = f64::NEG_INFINITY;
        bounds
    }

    fn exact(&self, t: usize, group: usize, j: usize) -> (f64, usize) {
        let k = self.targets[t];
        let offset = self.problem.bias[j] - self.problem.bias[k];
        if self.problem.row(k) == self.problem.row(j) {
            let first = self.logits.layout.blocks_of(group).start;
            return (offset, self.logits.layout.sample(self.logits.layout.blocks()[first].start));
        }
        let (margin, sample) = match self.ranked_groups[group] {
            None => self.exact_max(t, group, j),
            Some(at) => self.exact_rank(t, group, j, self.order_statistic(t, at, j / LANES)[j % LANES]),
        };
        (margin + offset, sample)
    }
}

/// Margins that were formed elsewhere, and are taken as they are.
pub struct Given<'a, 'p> {
    pub problem: &'a Problem<'p>,
    pub targets: &'a [usize],
    /// targets x classes, without biases, in units of `unit`.
    pub margins: ArrayView2<'a, f32>,
    pub unit: f64,
    pub samples: ArrayView2<'a, i32>,
}

impl Given<'_, '_> {
    fn margin(&self, t: usize, j: usize) -> f64 {
        let (p, k) = (self.problem, self.targets[t]);
        let margin = if p.row(k) == p.row(j) {
            0.0
        } else {
            f64::from(self.margins[(t, j)]) * self.unit
        };
        p.scale_margin(margin) + (p.bias[j] - p.bias[k])
    }
}

impl Margins for Given<'_, '_> {
    fn upper_bounds(&self, t: usize, _group: usize) -> Vec<f64> {
        let k = self.targets[t];
        let bound = |j| if j == k { f64::NEG_INFINITY } else { self.margin(t, j) };
        (0..self.problem.classes).map(bound).collect()
    }

    fn exact(&self, t: usize, _group: usize, j: usize) -> (f64, usize) {
        (self.margin(t, j), usize::try_from(self.samples[(t, j)]).unwrap_or(0))
    }
}

/// By lane.
#[multiversion(targets("x86_64+avx512f+avx512vl", "x86_64+avx2+fma", "aarch64+neon"))]
fn largest(peaks: &[Lane]) -> Lane {
    let mut top = [f32::NEG_INFINITY; LANES];
    for peak in peaks {
        for (a, b) in top.iter_mut().zip(peak) {
            *a = if *b > *a { *b } else { *a };
        }
    }
    top
}

/// The logits of a block of samples for the targets of a tile themselves.
fn own_logits(logits: &Logits, block: usize, targets: &[usize]) -> Vec<[f32; TILE]> {
    let mut keys = vec![[0.0; TILE]; logits.panel(block, 0).len()];
    for t in 0..TILE {
        // A short last tile repeats its first class; the surplus rows are never read.
        let class = targets.get(t).copied().unwrap_or(targets[0]);
        for (key, values) in keys.iter_mut().zip(logits.panel(block, class / LANES)) {
            key[t] = values[class % LANES];
        }
    }
    keys
}

/// The m for which the m-th largest of `samples` margins is their order statistic at `quantile`: no interpolation. 0 for no samples.
fn place(samples: usize, quantile: f64) -> usize {
    match samples {
        0 => 0,
        n => n + 1 - ((quantile * n as f64).ceil() as usize).clamp(1, n),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn place_is_the_order_statistic_without_interpolation() {
        assert_eq!(place(100, 1.0), 1);
        assert_eq!(place(100, 0.99), 2);
        assert_eq!(place(100, 1e-9), 100);
        assert_eq!(place(1, 0.5), 1);
        assert_eq!(place(0, 0.5), 0);
    }
}
