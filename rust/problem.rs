//! What is solved, how, and what is wrong with an input. May use: linalg, ndarray, rayon.

use ndarray::{ArrayView1, ArrayView2};
use rayon::prelude::*;
use thiserror::Error;

use crate::linalg::{
    add_scaled_difference_f32, add_scaled_difference_f64, difference_dot_f32_f32, difference_dot_f32_f64, difference_dot_f64_f32,
    difference_dot_f64_f64, extent_f32, extent_f64,
};

/// Malformed input. How a well-formed problem ended is a [`Status`], never an error.
#[derive(Debug, Error, Clone, PartialEq)]
pub enum ProblemError {
    #[error("weight must have at least 2 rows (classes) and 1 column, got {classes} x {dim}")]
    WeightShape { classes: usize, dim: usize },
    #[error("bias must have one entry per row of weight ({classes}), got {got}")]
    BiasShape { classes: usize, got: usize },
    #[error("latents must have {dim} columns to match weight, got {got}")]
    LatentShape { dim: usize, got: usize },
    #[error("latents must have at least one row (sample), got none")]
    NoSamples,
    #[error("{argument} must be finite, found {value} in row {row}")]
    NotFinite { argument: &'static str, row: usize, value: f64 },
    #[error("{argument} are too large: their lengths overflow float64")]
    TooLarge { argument: &'static str },
    #[error("classes must be in 0..{classes}, got {got}")]
    ClassRange { classes: usize, got: usize },
    #[error("labels must have one entry per sample ({samples}), got {got}")]
    LabelCount { samples: usize, got: usize },
    #[error("labels must be in 0..{classes}, got {got}")]
    LabelRange { classes: usize, got: usize },
    #[error("margins and samples must be {targets} x {classes}, got {rows} x {columns}")]
    MarginShape {
        targets: usize,
        classes: usize,
        rows: usize,
        columns: usize,
    },
    #[error("quantile must be in (0, 1], got {got}")]
    Quantile { got: f64 },
    #[error("tol must be in [1e-12, 1e-2], got {got}")]
    Tolerance { got: f64 },
    #[error("threads must be between 1 and 1024, got {got}")]
    Threads { got: usize },
    #[error("the solve was cancelled")]
    Cancelled,
}

/// Which solver works on a class.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Engine {
    /// The active-set kernel, and Clarabel for what its certificate does not cover.
    Auto,
    /// The project's dual active-set kernel on the shared Gram matrix.
    ActiveSet,
    /// Clarabel on the constraints that matter.
    Clarabel,
    /// Clarabel on all C-1 constraints at once: the slow oracle of tests and benchmarks.
    ClarabelFull,
}

/// How a class ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// A shift whose certificate meets the tolerance.
    Solved,
    /// The zero shift suffices: every sample is already sent to the class.
    Trivial,
    /// No shift suffices, or only one larger than [`REACH`] times the latents, with a proven bound.
    Unreachable,
    /// No engine could certify its answer to the tolerance.
    NotConverged,
}

/// A class is unreachable when its proven norm exceeds this multiple of the largest latent norm.
pub const REACH: f64 = 1e9;

#[derive(Debug, Clone)]
pub struct Settings {
    /// Which order statistic of the samples' margins a constraint uses; 1 is the maximum.
    pub quantile: f64,
    pub engine: Engine,
    /// Largest relative residual and gap of a solved class.
    pub tol: f64,
    /// Worker threads; `None` is one per core.
    pub threads: Option<usize>,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            quantile: 1.0,
            engine: Engine::Auto,
            tol: 1e-9,
            threads: None,
        }
    }
}

impl Settings {
    pub fn check(&self) -> Result<(), ProblemError> {
        if !(self.quantile > 0.0 && self.quantile <= 1.0) {
            return Err(ProblemError::Quantile { got: self.quantile });
        }
        if !(1e-12..=1e-2).contains(&self.tol) {
            return Err(ProblemError::Tolerance { got: self.tol });
        }
        match self.threads {
            Some(got) if got == 0 || got > 1024 => Err(ProblemError::Threads { got }),
            _ => Ok(()),
        }
    }
}

/// Clean latents as the caller holds them: borrowed, any strides, either precision.
#[derive(Clone, Copy)]
pub enum Latents<'a> {
    F32(ArrayView2<'a, f32>),
    F64(ArrayView2<'a, f64>),
    /// Not here: someone else forms the margins. How many there are, of which dimension, and the length of the longest.
    Elsewhere {
        samples: usize,
        dim: usize,
        longest: f64,
    },
}

impl Latents<'_> {
    /// (samples, dimension)
    pub fn shape(&self) -> (usize, usize) {
        match self {
            Latents::F32(z) => z.dim(),
            Latents::F64(z) => z.dim(),
            Latents::Elsewhere { samples, dim, .. } => (*samples, *dim),
        }
    }

    /// The sample's entries where they lie one after the other in memory.
    fn contiguous_row(&self, i: usize) -> Option<Row<'_>> {
        match self {
            Latents::F32(z) => z.row(i).to_slice().map(Row::F32),
            Latents::F64(z) => z.row(i).to_slice().map(Row::F64),
            Latents::Elsewhere { .. } => None,
        }
    }

    fn copy_row(&self, i: usize, out: &mut [f64]) {
        match self {
            Latents::F32(z) => out.iter_mut().zip(z.row(i)).for_each(|(o, &v)| *o = f64::from(v)),
            Latents::F64(z) => out.iter_mut().zip(z.row(i)).for_each(|(o, &v)| *o = v),
            Latents::Elsewhere { .. } => unreachable!("margins are given where latents are not"),
        }
    }
}

enum Row<'a> {
    F32(&'a [f32]),
    F64(&'a [f64]),
}

/// W as it is read row by row.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    dim: usize,
    wide: &'a [f64],
    narrow: Option<&'a [f32]>,
}

enum Pair<'a> {
    F32(&'a [f32], &'a [f32]),
    F64(&'a [f64], &'a [f64]),
}

impl<'a> Rows<'a> {
    fn pair(&self, j: usize, k: usize) -> Pair<'a> {
        let part = |class: usize| class * self.dim..(class + 1) * self.dim;
        match self.narrow {
            Some(w) => Pair::F32(&w[part(j)], &w[part(k)]),
            None => Pair::F64(&self.wide[part(j)], &self.wide[part(k)]),
        }
    }

    /// (w_j - w_k)^T v
    pub fn difference_dot(&self, j: usize, k: usize, v: &[f64]) -> f64 {
        self.pair(j, k).difference_dot(v, 1.0)
    }

    /// v := v + c (w_j - w_k)
    pub fn add_difference(&self, v: &mut [f64], c: f64, j: usize, k: usize) {
        match self.pair(j, k) {
            Pair::F32(wj, wk) => add_scaled_difference_f32(v, c, wj, wk),
            Pair::F64(wj, wk) => add_scaled_difference_f64(v, c, wj, wk),
        }
    }

    /// w_j - w_k
    pub fn difference(&self, j: usize, k: usize) -> Vec<f64> {
        let mut difference = vec![0.0; self.dim];
        self.add_difference(&mut difference, 1.0, j, k);
        difference
    }
}

impl Pair<'_> {
    fn difference_dot(&self, v: &[f64], scale: f64) -> f64 {
        match self {
            Pair::F32(wj, wk) => difference_dot_f32_f64(wj, wk, v, scale),
            Pair::F64(wj, wk) => difference_dot_f64_f64(wj, wk, v, scale),
        }
    }
}

/// A checked problem, in float64 and in units where the largest |W| and |Z| lie in [1, 2).
///
/// Both scales are powers of two, so scaling loses no bit, and squares of tiny or huge
/// weights neither vanish nor overflow.
pub struct Problem<'a> {
    pub classes: usize,
    pub dim: usize,
    pub samples: usize,
    /// C x d, row-major, scaled.
    pub weight: Vec<f64>,
    /// The same in float32, where that loses nothing: half the memory to read wherever single rows are.
    narrow: Option<Vec<f32>>,
    /// Scaled like the logits.
    pub bias: Vec<f64>,
    latents: Latents<'a>,
    weight_scale: f64,
    latent_scale: f64,
    /// Lengths of the rows of `weight`.
    row_lengths: Vec<f64>,
    /// Largest |z_i|, in scaled units.
    pub longest_latent: f64,
    /// The length that [`REACH`] multiplies, in scaled units.
    pub reach_unit: f64,
}

impl<'a> Problem<'a> {
    pub fn new(weight: ArrayView2<'_, f64>, bias: Option<ArrayView1<'_, f64>>, latents: Latents<'a>) -> Result<Self, ProblemError> {
        let (classes, dim) = weight.dim();
        let (samples, latent_dim) = latents.shape();
        if classes < 2 || dim < 1 {
            return Err(ProblemError::WeightShape { classes, dim });
        }
        if latent_dim != dim {
            return Err(ProblemError::LatentShape { dim, got: latent_dim });
        }
        if samples == 0 {
            return Err(ProblemError::NoSamples);
        }
        let mut bias: Vec<f64> = match bias {
            Some(b) if b.len() != classes => {
                return Err(ProblemError::BiasShape { classes, got: b.len() });
            }
            Some(b) => b.to_vec(),
            None => vec![0.0; classes],
        };
        let mut weight = copied(weight);
        let largest_weight = largest_entry(&weight, dim)?;
        largest_finite("bias", bias.chunks_exact(1))?;
        let (largest_latent, longest_latent) = survey(&latents, dim, samples)?;

        let weight_scale = unit_scale(largest_weight);
        // Latents far smaller than what the biases ask for are measured in units of that.
        let spread = bias.iter().copied().fold(f64::NEG_INFINITY, f64::max) - bias.iter().copied().fold(f64::INFINITY, f64::min);
        let asked = if largest_weight > 0.0 { spread / largest_weight } else { 0.0 };
        for (argument, length) in [("latents", longest_latent), ("bias", asked)] {
            if !(length * (dim as f64)).is_finite() {
                return Err(ProblemError::TooLarge { argument });
            }
        }
        let latent_scale = unit_scale(largest_latent.max(asked));
        weight
            .par_chunks_mut(dim)
            .for_each(|row| row.iter_mut().for_each(|v| *v *= weight_scale));
        bias.iter_mut().for_each(|v| *v = *v * weight_scale * latent_scale);
        largest_finite("bias (relative to weight and latents)", bias.chunks_exact(1))?;
        let row_lengths: Vec<f64> = weight.par_chunks(dim).map(|row| extent_f64(row).1.sqrt()).collect();
        let narrow = narrowed(&weight, dim);
        let longest_latent = longest_latent * latent_scale;
        let reach_unit = longest_latent.max(bias_length(&row_lengths, &bias));
        Ok(Problem {
            classes,
            dim,
            samples,
            weight,
            narrow,
            bias,
            latents,
            weight_scale,
            latent_scale,
            row_lengths,
            longest_latent,
            reach_unit,
        })
    }

    pub fn check_classes(&self, classes: &[usize]) -> Result<(), ProblemError> {
        match classes.iter().find(|&&k| k >= self.classes) {
            Some(&got) => Err(ProblemError::ClassRange {
                classes: self.classes,
                got,
            }),
            None => Ok(()),
        }
    }

    pub fn check_labels(&self, labels: &[usize]) -> Result<(), ProblemError> {
        if labels.len() != self.samples {
            return Err(ProblemError::LabelCount {
                samples: self.samples,
                got: labels.len(),
            });
        }
        match labels.iter().find(|&&l| l >= self.classes) {
            Some(&got) => Err(ProblemError::LabelRange {
                classes: self.classes,
                got,
            }),
            None => Ok(()),
        }
    }

    pub fn row(&self, class: usize) -> &[f64] {
        &self.weight[class * self.dim..(class + 1) * self.dim]
    }

    /// |w_j|, in scaled units.
    pub fn row_length(&self, class: usize) -> f64 {
        self.row_lengths[class]
    }

    /// Copies the scaled latents of some samples into `out`, rounded to float32.
    pub fn latents_into(&self, samples: impl Iterator<Item = usize>, out: &mut [f32]) {
        let scale = self.latent_scale;
        let mut copy = vec![0.0; self.dim];
        for (out, sample) in out.chunks_exact_mut(self.dim).zip(samples) {
            match self.latents.contiguous_row(sample) {
                // Powers of two beyond float32's range would overflow in between.
                Some(Row::F32(z)) if (1e-30..1e30).contains(&scale) => out.iter_mut().zip(z).for_each(|(o, v)| *o = v * scale as f32),
                _ => {
                    self.latents.copy_row(sample, &mut copy);
                    out.iter_mut().zip(&copy).for_each(|(o, v)| *o = (v * scale) as f32);
                }
            }
        }
    }

    /// W in float32, if it is float32.
    pub fn narrow(&self) -> Option<&[f32]> {
        self.narrow.as_deref()
    }

    pub fn rows(&self) -> Rows<'_> {
        Rows {
            dim: self.dim,
            wide: &self.weight,
            narrow: self.narrow(),
        }
    }

    /// (w_j - w_k)^T z_i in float64. Subtracting two logits instead would leave rounding of the size of the logits, enough to make two
    /// identical classes look as if one could never beat the other.
    pub fn margin(&self, k: usize, j: usize, sample: usize) -> f64 {
        let (pair, scale) = (self.rows().pair(j, k), self.latent_scale);
        match (pair, self.latents.contiguous_row(sample)) {
            (Pair::F32(wj, wk), Some(Row::F32(z))) => difference_dot_f32_f32(wj, wk, z, scale),
            (Pair::F64(wj, wk), Some(Row::F32(z))) => difference_dot_f64_f32(wj, wk, z, scale),
            (pair, Some(Row::F64(z))) => pair.difference_dot(z, scale),
            (pair, None) => {
                let mut z = vec![0.0; self.dim];
                self.latents.copy_row(sample, &mut z);
                pair.difference_dot(&z, scale)
            }
        }
    }

    /// A margin without biases, given in the caller's units.
    pub fn scale_margin(&self, v: f64) -> f64 {
        v * self.weight_scale * self.latent_scale
    }

    /// A shift, or its length, back in the caller's units.
    pub fn unscale_shift(&self, v: f64) -> f64 {
        v / self.latent_scale
    }

    pub fn unscale_shifts(&self, mut shift: Vec<f64>) -> Vec<f64> {
        // A power of two: as exact as dividing.
        let unit = 1.0 / self.latent_scale;
        shift.iter_mut().for_each(|v| *v *= unit);
        shift
    }

    /// A multiplier back in the caller's units, where s = sum of multipliers times rows of W.
    pub fn unscale_multiplier(&self, v: f64) -> f64 {
        v * self.weight_scale / self.latent_scale
    }
}

/// The power of two that brings `largest` into [1, 2); 1 for zero.
fn unit_scale(largest: f64) -> f64 {
    if largest == 0.0 {
        return 1.0;
    }
    // Exponents are capped so that neither the scale nor its reciprocal leaves the normal range.
    2f64.powi(-(largest.log2().floor() as i32).clamp(-1000, 1000))
}

fn largest_finite<'a>(argument: &'static str, rows: impl Iterator<Item = &'a [f64]>) -> Result<f64, ProblemError> {
    let mut largest = 0.0_f64;
    for (row, values) in rows.enumerate() {
        for &value in values {
            if !value.is_finite() {
                return Err(ProblemError::NotFinite { argument, row, value });
            }
            largest = largest.max(value.abs());
        }
    }
    Ok(largest)
}

/// Rows one after the other in memory.
fn copied(weight: ArrayView2<'_, f64>) -> Vec<f64> {
    let mut copy = vec![0.0; weight.len()];
    let rows = copy.par_chunks_mut(weight.ncols()).enumerate();
    rows.for_each(|(i, out)| match weight.row(i).to_slice() {
        Some(row) => out.copy_from_slice(row),
        None => out.iter_mut().zip(weight.row(i)).for_each(|(o, v)| *o = *v),
    });
    copy
}

/// In float32, unless that rounds an entry.
fn narrowed(weight: &[f64], dim: usize) -> Option<Vec<f32>> {
    let mut narrow = vec![0.0; weight.len()];
    let exact = narrow.par_chunks_mut(dim).zip(weight.par_chunks(dim)).all(|(out, row)| {
        out.iter_mut().zip(row).for_each(|(o, v)| *o = *v as f32);
        out.iter().zip(row).all(|(o, v)| f64::from(*o) == *v)
    });
    exact.then_some(narrow)
}

fn largest_entry(weight: &[f64], dim: usize) -> Result<f64, ProblemError> {
    let extents: Vec<(f64, f64)> = weight.par_chunks(dim).map(extent_f64).collect();
    if extents.iter().any(|(_, square)| !square.is_finite()) {
        // An entry that is not finite, or one whose square is not.
        return largest_finite("weight", weight.chunks_exact(dim));
    }
    Ok(extents.iter().fold(0.0, |a, (largest, _)| a.max(*largest)))
}

/// Largest entry and largest Euclidean norm of the latents.
fn survey(latents: &Latents, dim: usize, samples: usize) -> Result<(f64, f64), ProblemError> {
    if let &Latents::Elsewhere { longest, .. } = latents {
        return match longest.is_finite() {
            true => Ok((longest, longest)),
            false => Err(ProblemError::TooLarge { argument: "latents" }),
        };
    }
    let of_row = |row: &mut Vec<f64>, i: usize| {
        let (largest, square) = match latents.contiguous_row(i) {
            Some(Row::F32(z)) => extent_f32(z),
            Some(Row::F64(z)) => extent_f64(z),
            None => (0.0, f64::NAN),
        };
        if square.is_finite() && (1e-150..1e150).contains(&largest) {
            return Ok((largest, square.sqrt()));
        }
        latents.copy_row(i, row);
        if let Some(&value) = row.iter().find(|v| !v.is_finite()) {
            let argument = "latents";
            return Err(ProblemError::NotFinite { argument, row: i, value });
        }
        let largest = row.iter().fold(0.0_f64, |a, v| a.max(v.abs()));
        // Squares of tiny or huge entries must neither vanish nor overflow.
        let unit = unit_scale(largest);
        let square: f64 = row.iter().map(|v| (v * unit) * (v * unit)).sum();
        Ok((largest, square.sqrt() / unit))
    };
    let rows: Vec<_> = (0..samples).into_par_iter().map_init(|| vec![0.0; dim], of_row).collect();
    // In order, so that the first bad row is the one that is named.
    rows.into_iter()
        .try_fold((0.0, 0.0), |(a, b): (f64, f64), row| row.map(|(x, y)| (a.max(x), b.max(y))))
}

/// The length of shift that the biases alone may ask for; matters only where latents are (near) zero.
fn bias_length(row_lengths: &[f64], bias: &[f64]) -> f64 {
    let longest = row_lengths.iter().copied().fold(0.0, f64::max);
    let high = bias.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let low = bias.iter().copied().fold(f64::INFINITY, f64::min);
    if longest > 0.0 { (high - low) / longest } else { 0.0 }
}
