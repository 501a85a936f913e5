//! Clean latents as the caller holds them. May use: settings, linalg, ndarray, rayon.

use ndarray::ArrayView2;
use rayon::prelude::*;

use crate::linalg::{extent_f32, extent_f64};
use crate::settings::ProblemError;

/// Borrowed, any strides, either precision.
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
    pub fn contiguous_row(&self, i: usize) -> Option<Row<'_>> {
        match self {
            Latents::F32(z) => z.row(i).to_slice().map(Row::F32),
            Latents::F64(z) => z.row(i).to_slice().map(Row::F64),
            Latents::Elsewhere { .. } => None,
        }
    }

    pub fn copy_row(&self, i: usize, out: &mut [f64]) {
        match self {
            Latents::F32(z) => out.iter_mut().zip(z.row(i)).for_each(|(o, &v)| *o = f64::from(v)),
            Latents::F64(z) => out.iter_mut().zip(z.row(i)).for_each(|(o, &v)| *o = v),
            Latents::Elsewhere { .. } => unreachable!("margins are given where latents are not"),
        }
    }
}

/// A latent in the caller's precision.
pub enum Row<'a> {
    F32(&'a [f32]),
    F64(&'a [f64]),
}

/// Largest entry and largest Euclidean norm of the latents.
pub fn survey(latents: &Latents) -> Result<(f64, f64), ProblemError> {
    let (samples, dim) = latents.shape();
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

/// The power of two that brings `largest` into [1, 2); 1 for zero.
pub fn unit_scale(largest: f64) -> f64 {
    if largest == 0.0 {
        return 1.0;
    }
    // Exponents are capped so that neither the scale nor its reciprocal leaves the normal range.
    2f64.powi(-(largest.log2().floor() as i32).clamp(-1000, 1000))
}
