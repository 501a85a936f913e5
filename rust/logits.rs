//! The logits of all samples, in float32 and in the order that the max-plus kernel reads. May use: problem, layout, linalg, max_plus' lanes.

use std::borrow::Cow;
use std::ops::Range;

use rayon::prelude::*;

use crate::control::Control;
use crate::layout::Layout;
use crate::linalg::multiply_transposed_f32;
use crate::max_plus::{LANES, Lane};
use crate::problem::{Problem, ProblemError};

/// Samples per GEMM, about: enough to pay for packing W.
const ROWS: usize = 512;

/// Logits in float32 without biases, as blocks of samples x panels of classes.
pub struct Logits {
    pub layout: Layout,
    panels: usize,
    /// `[block][panel][sample in block]`; lanes past the last class hold -inf and never win a maximum.
    data: Vec<Lane>,
    /// Bound on the error of a logit, per unit of |w_j|.
    pub error: f64,
}

impl Logits {
    /// One GEMM, split in a way that does not depend on the number of threads: neither does its result.
    pub fn new(problem: &Problem, layout: Layout, control: &Control) -> Result<Self, ProblemError> {
        let (classes, dim) = (problem.classes, problem.dim);
        let panels = classes.div_ceil(LANES);
        let weight = match problem.narrow() {
            Some(narrow) => Cow::Borrowed(narrow),
            None => Cow::Owned(problem.weight.par_iter().map(|&v| v as f32).collect()),
        };
        let mut data = vec![[f32::NEG_INFINITY; LANES]; layout.samples() * panels];
        let (mut tasks, mut rest) = (Vec::new(), data.as_mut_slice());
        for blocks in spans(&layout) {
            let rows: usize = layout.blocks()[blocks.clone()].iter().map(Range::len).sum();
            let (part, others) = rest.split_at_mut(rows * panels);
            tasks.push((blocks, rows, part));
            rest = others;
        }
        let most = tasks.iter().map(|(_, rows, _)| *rows).max().unwrap_or(0);
        tasks.into_par_iter().for_each_init(
            || (vec![0.0f32; most * dim], vec![0.0f32; most * classes]),
            |(latents, logits), (blocks, rows, mut out)| {
                if control.cancelled() {
                    return;
                }
                let first = layout.blocks()[blocks.start].start;
                problem.latents_into((first..first + rows).map(|p| layout.sample(p)), latents);
                multiply_transposed_f32(latents, &weight, logits, rows, dim, classes);
                let mut logits = logits.as_slice();
                for block in &layout.blocks()[blocks] {
                    let (part, others) = std::mem::take(&mut out).split_at_mut(block.len() * panels);
                    scatter(&logits[..block.len() * classes], part, classes);
                    logits = &logits[block.len() * classes..];
                    out = others;
                }
            },
        );
        if control.cancelled() {
            return Err(ProblemError::Cancelled);
        }
        // d products and sums in float32 in any order, after rounding W and Z to it (Higham 2002, sec. 3.1).
        let gamma = 1.01 * (dim as f64 + 4.0) * f64::from(f32::EPSILON) / 2.0;
        Ok(Logits {
            layout,
            panels,
            data,
            error: gamma * problem.longest_latent,
        })
    }

    pub fn panels(&self) -> usize {
        self.panels
    }

    /// Logits of a block of samples for a panel of classes.
    pub fn panel(&self, block: usize, panel: usize) -> &[Lane] {
        let Range { start, end } = self.layout.blocks()[block];
        let first = start * self.panels + panel * (end - start);
        &self.data[first..first + (end - start)]
    }

    /// (l_ij - l_ik) of the samples of a block, without biases, each with its sample.
    pub fn margins(&self, block: usize, k: usize, j: usize) -> impl Iterator<Item = (f32, usize)> + '_ {
        let (pk, pj) = (self.panel(block, k / LANES), self.panel(block, j / LANES));
        let (lk, lj) = (k % LANES, j % LANES);
        let positions = self.layout.blocks()[block].clone();
        pk.iter()
            .zip(pj)
            .zip(positions)
            .map(move |((a, b), p)| (b[lj] - a[lk], self.layout.sample(p)))
    }
}

/// Runs of consecutive blocks that go through one GEMM.
fn spans(layout: &Layout) -> Vec<Range<usize>> {
    let (mut spans, mut first, mut rows) = (Vec::new(), 0, 0);
    for (i, block) in layout.blocks().iter().enumerate() {
        rows += block.len();
        if rows >= ROWS || i + 1 == layout.blocks().len() {
            spans.push(first..i + 1);
            (first, rows) = (i + 1, 0);
        }
    }
    spans
}

/// Rows of one block into its panels.
fn scatter(logits: &[f32], out: &mut [Lane], classes: usize) {
    let rows = logits.len() / classes;
    for (i, row) in logits.chunks_exact(classes).enumerate() {
        for (panel, values) in row.chunks(LANES).enumerate() {
            out[panel * rows + i][..values.len()].copy_from_slice(values);
        }
    }
}
