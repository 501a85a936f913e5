//! The m-th largest of n margins, for a tile of targets against sixteen rivals at a time, by selection: a few passes over the margins however
//! large m is. May use: max_plus.

use multiversion::multiversion;

use crate::max_plus::{LANES, Lane, TILE, max_plus};

/// The most samples whose maximum stands for them in the first look.
const GROUP: usize = 64;
/// Halvings that bring the first look's bound within a thousandth of its range.
const ROUGH: usize = 10;
/// Halvings that separate any two float32.
const EXACT: usize = 33;

/// Integers in the order of the floats that they stand for.
type Keys = [i32; LANES];

/// Logits of a group of samples for a panel of rivals: as the max-plus kernel reads them, and rival by rival.
pub struct Panel<'a> {
    blocks: Vec<&'a [Lane]>,
    columns: Vec<Vec<f32>>,
}

impl<'a> Panel<'a> {
    pub fn new(blocks: Vec<&'a [Lane]>) -> Self {
        let column = |lane: usize| blocks.iter().flat_map(|block| block.iter().map(move |v| v[lane])).collect();
        Panel {
            columns: (0..LANES).map(column).collect(),
            blocks,
        }
    }
}

/// Logits of the same samples for a tile of targets.
pub struct Own {
    blocks: Vec<Vec<[f32; TILE]>>,
    columns: Vec<Vec<f32>>,
}

impl Own {
    pub fn new(blocks: Vec<Vec<[f32; TILE]>>) -> Self {
        let column = |t: usize| blocks.iter().flatten().map(|v| v[t]).collect();
        Own {
            columns: (0..TILE).map(column).collect(),
            blocks,
        }
    }
}

/// Buffers that are kept from one call to the next.
#[derive(Default)]
pub struct Scratch {
    peaks: [Vec<Keys>; TILE],
    kept: Vec<f32>,
    keys: Vec<i32>,
}

/// For each target and lane, the m-th largest of the margins (rival's logit less the target's) over all samples, 1 <= m <= n.
///
/// The m-th largest of the maxima of small groups of samples is a lower bound on it, and a close one while groups outnumber m: few samples
/// reach it, and only among those a selection is needed.
pub fn mth_largest(own: &Own, panel: &Panel, m: usize, scratch: &mut Scratch) -> [Lane; TILE] {
    let samples = own.columns[0].len();
    // At least twice as many groups as m: then few samples beyond the m largest reach the bound.
    let mut group = 1;
    while group < GROUP && samples >= 4 * m * group {
        group *= 2;
    }
    scratch.peaks.iter_mut().for_each(Vec::clear);
    let mut peaks = [[0.0; LANES]; TILE];
    for (own, values) in own.blocks.iter().zip(&panel.blocks) {
        for (own, values) in own.chunks(group).zip(values.chunks(group)) {
            max_plus(own, values, &mut peaks);
            scratch
                .peaks
                .iter_mut()
                .zip(&peaks)
                .for_each(|(all, peak)| all.push(peak.map(to_key)));
        }
    }
    let halvings = if group == 1 { EXACT } else { ROUGH };
    std::array::from_fn(|t| {
        let mut found = mth_by_lane(&scratch.peaks[t], m, halvings).map(from_key);
        if group > 1 {
            for (found, column) in found.iter_mut().zip(&panel.columns) {
                keep_reaching(&own.columns[t], column, *found, &mut scratch.kept);
                scratch.keys.clear();
                scratch.keys.extend(scratch.kept.iter().map(|v| to_key(*v)));
                *found = from_key(mth_of_one(&scratch.keys, m));
            }
        }
        found
    })
}

/// Flips the order of negative floats, whose magnitude the bits count upwards.
fn to_key(v: f32) -> i32 {
    let bits = v.to_bits() as i32;
    bits ^ ((bits >> 31) & i32::MAX)
}

fn from_key(key: i32) -> f32 {
    f32::from_bits((key ^ ((key >> 31) & i32::MAX)) as u32)
}

/// By lane, the m-th largest key, from below: after [`EXACT`] halvings it is the key itself. At least m of the rows must be real.
fn mth_by_lane(rows: &[Keys], m: usize, halvings: usize) -> Keys {
    // Invariant: at least m keys reach `low`, fewer reach `high`.
    let (mut low, mut high) = ([i32::MAX; LANES], [i32::MIN; LANES]);
    for row in rows {
        for lane in 0..LANES {
            low[lane] = low[lane].min(row[lane]);
            high[lane] = high[lane].max(row[lane]);
        }
    }
    high.iter_mut().for_each(|h| *h = h.saturating_add(1));
    for _ in 0..halvings {
        let mut middle = [0; LANES];
        let mut open = false;
        for lane in 0..LANES {
            // The mean rounded down, without overflow.
            middle[lane] = (low[lane] & high[lane]) + ((low[lane] ^ high[lane]) >> 1);
            open |= middle[lane] != low[lane];
        }
        if !open {
            break;
        }
        let count = count_reaching(rows, &middle);
        for lane in 0..LANES {
            if count[lane] >= m as i32 {
                low[lane] = middle[lane];
            } else {
                high[lane] = middle[lane];
            }
        }
    }
    low
}

/// By lane, how many keys are at least `middle`.
fn count_reaching(rows: &[Keys], middle: &Keys) -> Keys {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") {
        // SAFETY: the feature was just detected.
        return unsafe { count_avx512(rows, middle) };
    }
    count_portable(rows, middle)
}

#[multiversion(targets("x86_64+avx2+fma", "aarch64+neon"))]
fn count_portable(rows: &[Keys], middle: &Keys) -> Keys {
    let mut count = [0; LANES];
    for row in rows {
        count = std::array::from_fn(|lane| count[lane] + i32::from(row[lane] >= middle[lane]));
    }
    count
}

/// The compiler turns the loops around, and gathers.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn count_avx512(rows: &[Keys], middle: &Keys) -> Keys {
    use std::arch::x86_64::*;
    // SAFETY of all loads and stores: Keys are sixteen i32.
    let middle = unsafe { _mm512_loadu_si512(middle.as_ptr().cast()) };
    let minus_one = _mm512_set1_epi32(-1);
    let mut count = _mm512_setzero_si512();
    for row in rows {
        let reaching = _mm512_cmpge_epi32_mask(unsafe { _mm512_loadu_si512(row.as_ptr().cast()) }, middle);
        count = _mm512_mask_sub_epi32(count, reaching, count, minus_one);
    }
    let mut out = [0; LANES];
    unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), count) };
    out
}

/// The m-th largest key.
#[multiversion(targets("x86_64+avx512f+avx512vl", "x86_64+avx2+fma", "aarch64+neon"))]
fn mth_of_one(keys: &[i32], m: usize) -> i32 {
    let (mut low, mut high) = (i32::MAX, i32::MIN);
    for &key in keys {
        low = low.min(key);
        high = high.max(key);
    }
    high = high.saturating_add(1);
    loop {
        let middle = (low & high) + ((low ^ high) >> 1);
        if middle == low {
            return low;
        }
        let count: i32 = keys.iter().map(|&key| i32::from(key >= middle)).sum();
        if count >= m as i32 {
            low = middle;
        } else {
            high = middle;
        }
    }
}

/// The margins that reach a floor, in the order of samples.
fn keep_reaching(own: &[f32], rival: &[f32], floor: f32, kept: &mut Vec<f32>) {
    assert_eq!(own.len(), rival.len());
    kept.clear();
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") {
        // SAFETY: the feature was just detected, and the lengths are equal.
        return unsafe { keep_avx512(own, rival, floor, kept) };
    }
    keep_portable(own, rival, floor, kept);
}

fn keep_portable(own: &[f32], rival: &[f32], floor: f32, kept: &mut Vec<f32>) {
    kept.extend(own.iter().zip(rival).map(|(a, b)| b - a).filter(|margin| *margin >= floor));
}

/// Without a branch: all sixteen go where the next kept ones belong, and only those that count are counted.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn keep_avx512(own: &[f32], rival: &[f32], floor: f32, kept: &mut Vec<f32>) {
    use std::arch::x86_64::*;
    kept.reserve(own.len() + LANES);
    let (bar, whole, mut count) = (_mm512_set1_ps(floor), own.len() / LANES * LANES, 0);
    for i in (0..whole).step_by(LANES) {
        // SAFETY: i + 16 entries are there to read, and count <= i, so that many more to write.
        unsafe {
            let margin = _mm512_sub_ps(_mm512_loadu_ps(rival.as_ptr().add(i)), _mm512_loadu_ps(own.as_ptr().add(i)));
            let reached = _mm512_cmp_ps_mask::<_CMP_GE_OQ>(margin, bar);
            _mm512_storeu_ps(kept.as_mut_ptr().add(count), _mm512_maskz_compress_ps(reached, margin));
            count += reached.count_ones() as usize;
        }
    }
    // SAFETY: the first `count` were written.
    unsafe { kept.set_len(count) };
    keep_portable(&own[whole..], &rival[whole..], floor, kept);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn rows() -> impl Strategy<Value = Vec<([f32; TILE], Lane)>> {
        let own = prop::array::uniform8(-3.0f32..3.0);
        prop::collection::vec((own, prop::array::uniform16(-3.0f32..3.0)), 1..300)
    }

    proptest! {
        #[test]
        fn it_is_what_sorting_gives(mut rows in rows(), share in 0.0..1.0f64, ties in any::<bool>()) {
            let m = 1 + ((rows.len() - 1) as f64 * share * share * share) as usize;
            for (own, value) in &mut rows {
                if ties {
                    own.iter_mut().chain(value.iter_mut()).for_each(|v| *v = v.round());
                }
                value[LANES - 1] = f32::NEG_INFINITY;
            }
            let own: Vec<[f32; TILE]> = rows.iter().map(|r| r.0).collect();
            let values: Vec<Lane> = rows.iter().map(|r| r.1).collect();
            let own = Own::new(own.chunks(128).map(<[_]>::to_vec).collect());
            let got = mth_largest(&own, &Panel::new(values.chunks(128).collect()), m, &mut Scratch::default());
            for t in 0..TILE {
                for lane in 0..LANES {
                    let mut margins: Vec<f32> = rows.iter().map(|(own, value)| value[lane] - own[t]).collect();
                    margins.sort_by(|a, b| b.total_cmp(a));
                    prop_assert_eq!(got[t][lane], margins[m - 1]);
                }
            }
        }

        #[test]
        fn every_variant_counts_the_same(rows in prop::collection::vec(prop::array::uniform16(-4i32..4), 0..40), middle in prop::array::uniform16(-4i32..4)) {
            prop_assert_eq!(count_reaching(&rows, &middle), count_portable(&rows, &middle));
        }

        #[test]
        fn every_variant_keeps_the_same(rows in prop::collection::vec((-3.0f32..3.0, -3.0f32..3.0), 1..100), floor in -3.0f32..3.0) {
            let (own, rival): (Vec<f32>, Vec<f32>) = rows.into_iter().unzip();
            let (mut dispatched, mut portable) = (Vec::new(), Vec::new());
            keep_reaching(&own, &rival, floor, &mut dispatched);
            keep_portable(&own, &rival, floor, &mut portable);
            prop_assert_eq!(dispatched, portable);
        }

        #[test]
        fn keys_keep_the_order_of_floats(a in any::<f32>(), b in any::<f32>()) {
            prop_assert_eq!(to_key(a).cmp(&to_key(b)), a.total_cmp(&b));
            prop_assert_eq!(from_key(to_key(a)).to_bits(), a.to_bits());
        }
    }
}
