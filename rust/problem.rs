//! A checked problem in units that suit float64. May use: settings, latents, rows, linalg, ndarray, rayon.

use ndarray::{ArrayView1, ArrayView2};
use rayon::prelude::*;

use crate::latents::{Row, survey, unit_scale};
use crate::linalg::{difference_dot_f32_f32, difference_dot_f64_f32, extent_f64};
use crate::rows::{Pair, Rows, copied, narrowed};

pub use crate::latents::Latents;
pub use crate::settings::{Engine, ProblemError, REACH, Settings, Status};

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
        let (largest_latent, longest_latent) = survey(&latents)?;

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
        if !(weight_scale / latent_scale).is_normal() {
            let argument = "latents (relative to weight)";
            return Err(ProblemError::TooLarge { argument });
        }
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

fn largest_entry(weight: &[f64], dim: usize) -> Result<f64, ProblemError> {
    let extents: Vec<(f64, f64)> = weight.par_chunks(dim).map(extent_f64).collect();
    if extents.iter().any(|(_, square)| !square.is_finite()) {
        // An entry that is not finite, or one whose square is not.
        return largest_finite("weight", weight.chunks_exact(dim));
    }
    Ok(extents.iter().fold(0.0, |a, (largest, _)| a.max(*largest)))
}

/// The length of shift that the biases alone may ask for; matters only where latents are (near) zero.
fn bias_length(row_lengths: &[f64], bias: &[f64]) -> f64 {
    let longest = row_lengths.iter().copied().fold(0.0, f64::max);
    let high = bias.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let low = bias.iter().copied().fold(f64::INFINITY, f64::min);
    if longest > 0.0 { (high - low) / longest } else { 0.0 }
}
