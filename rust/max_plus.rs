//! The kernel whose cost is n C^2 over all classes: out[t][lane] = max_i (values[i][lane] - keys[i][t]). Uses nothing.
//!
//! The compiler does not keep this many accumulators in registers by itself, so the two common x86 levels are spelt out; every variant does
//! the same operations in the same order, and so gives the same bits.

/// Classes per panel: one AVX-512 register of float32.
pub const LANES: usize = 16;
/// Rows of the result that stay in registers.
pub const TILE: usize = 8;

pub type Lane = [f32; LANES];

pub fn max_plus(keys: &[[f32; TILE]], values: &[Lane], out: &mut [Lane; TILE]) {
    assert_eq!(keys.len(), values.len());
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the feature was just detected.
            return unsafe { x86::avx512(keys, values, out) };
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the feature was just detected.
            return unsafe { x86::avx2(keys, values, out) };
        }
    }
    portable(keys, values, out);
}

fn portable(keys: &[[f32; TILE]], values: &[Lane], out: &mut [Lane; TILE]) {
    for (t, row) in out.iter_mut().enumerate() {
        let mut best = [f32::NEG_INFINITY; LANES];
        for (key, value) in keys.iter().zip(values) {
            for (b, v) in best.iter_mut().zip(value) {
                let margin = v - key[t];
                *b = if margin > *b { margin } else { *b };
            }
        }
        *row = best;
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{Lane, TILE};

    #[target_feature(enable = "avx512f")]
    pub unsafe fn avx512(keys: &[[f32; TILE]], values: &[Lane], out: &mut [Lane; TILE]) {
        let mut best = [_mm512_set1_ps(f32::NEG_INFINITY); TILE];
        for (key, value) in keys.iter().zip(values) {
            // SAFETY: a Lane is sixteen floats.
            let value = unsafe { _mm512_loadu_ps(value.as_ptr()) };
            for (b, k) in best.iter_mut().zip(key) {
                *b = _mm512_max_ps(_mm512_sub_ps(value, _mm512_set1_ps(*k)), *b);
            }
        }
        for (row, b) in out.iter_mut().zip(best) {
            // SAFETY: a Lane is sixteen floats.
            unsafe { _mm512_storeu_ps(row.as_mut_ptr(), b) };
        }
    }

    /// Half a tile at a time: eight accumulators and two values fit into sixteen registers.
    #[target_feature(enable = "avx2")]
    pub unsafe fn avx2(keys: &[[f32; TILE]], values: &[Lane], out: &mut [Lane; TILE]) {
        for half in 0..2 {
            let mut best = [[_mm256_set1_ps(f32::NEG_INFINITY); 2]; TILE / 2];
            for (key, value) in keys.iter().zip(values) {
                // SAFETY: a Lane is twice eight floats.
                let (low, high) = unsafe { (_mm256_loadu_ps(value.as_ptr()), _mm256_loadu_ps(value.as_ptr().add(8))) };
                for (b, k) in best.iter_mut().zip(&key[half * TILE / 2..]) {
                    let k = _mm256_set1_ps(*k);
                    b[0] = _mm256_max_ps(_mm256_sub_ps(low, k), b[0]);
                    b[1] = _mm256_max_ps(_mm256_sub_ps(high, k), b[1]);
                }
            }
            for (row, b) in out[half * TILE / 2..].iter_mut().zip(best) {
                // SAFETY: a Lane is twice eight floats.
                unsafe {
                    _mm256_storeu_ps(row.as_mut_ptr(), b[0]);
                    _mm256_storeu_ps(row.as_mut_ptr().add(8), b[1]);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    type Variant = (&'static str, fn(&[[f32; TILE]], &[Lane], &mut [Lane; TILE]));

    fn variants() -> Vec<Variant> {
        let mut all: Vec<Variant> = vec![("dispatched", max_plus)];
        #[cfg(target_arch = "x86_64")]
        {
            // SAFETY of both: the feature was just detected.
            if is_x86_feature_detected!("avx512f") {
                all.push(("avx512", |k, v, o| unsafe { x86::avx512(k, v, o) }));
            }
            if is_x86_feature_detected!("avx2") {
                all.push(("avx2", |k, v, o| unsafe { x86::avx2(k, v, o) }));
            }
        }
        all
    }

    proptest! {
        #[test]
        fn every_variant_gives_the_bits_of_the_portable_one(
            rows in prop::collection::vec((prop::array::uniform8(-9.0f32..9.0), prop::array::uniform16(-9.0f32..9.0)), 1..40),
        ) {
            let keys: Vec<[f32; TILE]> = rows.iter().map(|r| r.0).collect();
            let mut values: Vec<Lane> = rows.iter().map(|r| r.1).collect();
            values.iter_mut().for_each(|v| v[LANES - 1] = f32::NEG_INFINITY);
            let mut want = [[0.0; LANES]; TILE];
            portable(&keys, &values, &mut want);
            for (name, variant) in variants() {
                let mut got = [[0.0; LANES]; TILE];
                variant(&keys, &values, &mut got);
                prop_assert_eq!(got.map(|r| r.map(f32::to_bits)), want.map(|r| r.map(f32::to_bits)), "{}", name);
            }
        }
    }
}
