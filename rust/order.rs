//! The m-th largest of n margins, for one target against sixteen rivals at a time, by selection: a few passes over the margins however large
//! m is. May use: max_plus' lanes.

use multiversion::multiversion;

use crate::max_plus::{LANES, Lane};

/// The most samples whose maximum stands for them in the first look.
const GROUP: usize = 64;

/// Buffers that are kept from one call to the next.
#[derive(Default)]
pub struct Scratch {
    peaks: Vec<Lane>,
    column: Vec<f32>,
    kept: Vec<Vec<f32>>,
}

/// For each lane, the m-th largest of values[i][lane] - keys[i] over all blocks, 1 <= m <= n.
///
/// The m-th largest of the maxima of small groups of samples is a lower bound on it, and a close one while groups outnumber m: few samples
/// reach it, and only among those a selection is needed.
pub fn mth_largest(blocks: &[(&[f32], &[Lane])], m: usize, scratch: &mut Scratch) -> Lane {
    let samples: usize = blocks.iter().map(|(keys, _)| keys.len()).sum();
    // At least twice as many groups as m: then few samples beyond the m largest reach the bound.
    let mut group = 1;
    while group < GROUP && samples >= 4 * m * group {
        group *= 2;
    }
    scratch.peaks.clear();
    for (keys, values) in blocks {
        group_peaks(keys, values, group, &mut scratch.peaks);
    }
    let mut floor = [f32::NEG_INFINITY; LANES];
    for (lane, floor) in floor.iter_mut().enumerate() {
        scratch.column.clear();
        scratch.column.extend(scratch.peaks.iter().map(|p| p[lane]));
        *floor = largest(&mut scratch.column, m);
    }
    if group == 1 {
        return floor;
    }
    scratch.kept.resize_with(LANES, Vec::new);
    scratch.kept.iter_mut().for_each(Vec::clear);
    for (keys, values) in blocks {
        keep_at_least(keys, values, &floor, &mut scratch.kept);
    }
    for (floor, kept) in floor.iter_mut().zip(&mut scratch.kept) {
        *floor = largest(kept, m);
    }
    floor
}

fn largest(values: &mut [f32], m: usize) -> f32 {
    *values.select_nth_unstable_by(m - 1, |a, b| b.total_cmp(a)).1
}

#[multiversion(targets("x86_64+avx512f+avx512vl", "x86_64+avx2+fma", "aarch64+neon"))]
fn group_peaks(keys: &[f32], values: &[Lane], group: usize, out: &mut Vec<Lane>) {
    for (keys, values) in keys.chunks(group).zip(values.chunks(group)) {
        let mut peak = [f32::NEG_INFINITY; LANES];
        for (key, value) in keys.iter().zip(values) {
            for (p, v) in peak.iter_mut().zip(value) {
                let margin = v - key;
                *p = if margin > *p { margin } else { *p };
            }
        }
        out.push(peak);
    }
}

#[multiversion(targets("x86_64+avx512f+avx512vl", "x86_64+avx2+fma", "aarch64+neon"))]
fn keep_at_least(keys: &[f32], values: &[Lane], floor: &Lane, kept: &mut [Vec<f32>]) {
    for (key, value) in keys.iter().zip(values) {
        let mut reached = 0u32;
        for lane in 0..LANES {
            reached |= u32::from(value[lane] - key >= floor[lane]) << lane;
        }
        while reached != 0 {
            let lane = reached.trailing_zeros() as usize;
            kept[lane].push(value[lane] - key);
            reached &= reached - 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn it_is_what_sorting_gives(
            rows in prop::collection::vec((-3.0f32..3.0, prop::array::uniform16(-3.0f32..3.0)), 1..300),
            share in 0.0..1.0f64,
        ) {
            let m = 1 + ((rows.len() - 1) as f64 * share * share * share) as usize;
            let keys: Vec<f32> = rows.iter().map(|r| r.0).collect();
            let values: Vec<Lane> = rows.iter().map(|r| r.1).collect();
            let blocks: Vec<(&[f32], &[Lane])> = keys.chunks(128).zip(values.chunks(128)).collect();
            let got = mth_largest(&blocks, m, &mut Scratch::default());
            for (lane, got) in got.iter().enumerate() {
                let mut margins: Vec<f32> = rows.iter().map(|(key, value)| value[lane] - key).collect();
                margins.sort_by(|a, b| b.total_cmp(a));
                prop_assert_eq!(*got, margins[m - 1]);
            }
        }
    }
}
