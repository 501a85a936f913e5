//! The m-th largest of n margins, for a tile of targets against sixteen rivals at a time, by selection: a few passes over the margins however
//! large m is. May use: max_plus.

use multiversion::multiversion;

use crate::max_plus::{LANES, Lane, TILE, max_plus};

/// The most samples whose maximum stands for them in the first look: one register of float32.
const GROUP: usize = LANES;
/// Halvings that bring the first look's bound within a thousandth of its range.
const ROUGH: usize = 10;
/// Halvings that separate any two float32.
const EXACT: usize = 33;

/// Integers in the order of the floats that they stand for.
type Keys = [i32; LANES];

/// Logits of a group of samples for a panel of rivals: as the max-plus kernel reads them, and rival by rival.
#[derive(Default)]
pub struct Panel<'a> {
    blocks: Vec<&'a [Lane]>,
    columns: [Vec<f32>; LANES],
}

impl<'a> Panel<'a> {
    /// Takes the place of what was there, in its memory: fresh pages would cost more than filling them.
    pub fn load(&mut self, blocks: Vec<&'a [Lane]>) {
        for (lane, column) in self.columns.iter_mut().enumerate() {
            column.clear();
            for block in &blocks {
                column.extend(block.iter().map(|v| v[lane]));
            }
        }
        self.blocks = blocks;
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
    /// First sample of each group whose maxima are there.
    starts: Vec<usize>,
    kept: [Vec<f32>; LANES],
    keys: Vec<Keys>,
}

/// For each target and lane, the m-th largest of the margins (rival's logit less the target's) over all samples, 1 <= m <= n.
///
/// The m-th largest of the maxima of small groups of samples is a lower bound on it, and a close one while groups outnumber m: few groups
/// have a sample that reaches it, and only among those samples a selection is needed.
pub fn mth_largest(own: &Own, panel: &Panel, m: usize, scratch: &mut Scratch) -> [Lane; TILE] {
    let samples = own.columns[0].len();
    // At least twice as many groups as m: then few samples beyond the m largest reach the bound.
    let mut group = 1;
    while group < GROUP && samples >= 4 * m * group {
        group *= 2;
    }
    first_look(own, panel, group, scratch);
    let halvings = if group == 1 { EXACT } else { ROUGH };
    std::array::from_fn(|t| {
        let [least, largest] = range_by_lane(&scratch.peaks[t]);
        let mut found = mth_by_lane(&scratch.peaks[t], m, halvings, [least, largest]);
        if group > 1 {
            let groups = (&scratch.peaks[t][..], &scratch.starts[..]);
            keep_reaching(&own.columns[t], &panel.columns, groups, &found, &mut scratch.kept);
            side_by_side(&scratch.kept, &mut scratch.keys);
            found = mth_by_lane(&scratch.keys, m, EXACT, [found, largest]);
        }
        found.map(from_key)
    })
}

/// Columns of floats to rows of keys; what is missing at the end of a column is [`i32::MIN`].
fn side_by_side(columns: &[Vec<f32>; LANES], rows: &mut Vec<Keys>) {
    rows.clear();
    rows.resize(columns.iter().map(Vec::len).max().unwrap_or(0), [i32::MIN; LANES]);
    for (lane, column) in columns.iter().enumerate() {
        rows.iter_mut().zip(column).for_each(|(row, v)| row[lane] = to_key(*v));
    }
}

/// Maxima of groups of samples, for each target and lane.
fn first_look(own: &Own, panel: &Panel, group: usize, scratch: &mut Scratch) {
    let Scratch { peaks: all, starts, .. } = scratch;
    all.iter_mut().for_each(Vec::clear);
    starts.clear();
    let (mut peaks, mut start) = ([[0.0; LANES]; TILE], 0);
    for (own, values) in own.blocks.iter().zip(&panel.blocks) {
        for (own, values) in own.chunks(group).zip(values.chunks(group)) {
            max_plus(own, values, &mut peaks);
            all.iter_mut().zip(&peaks).for_each(|(all, peak)| all.push(peak.map(to_key)));
            starts.push(start);
            start += own.len();
        }
    }
}

/// Flips the order of negative floats, whose magnitude the bits count upwards.
fn to_key(v: f32) -> i32 {
    let bits = v.to_bits() as i32;
    bits ^ ((bits >> 31) & i32::MAX)
}

fn from_key(key: i32) -> f32 {
    f32::from_bits((key ^ ((key >> 31) & i32::MAX)) as u32)
}

/// By lane, the m-th largest key, or after fewer halvings than [`EXACT`] a smaller one. At least m keys must reach `low`, and none may be
/// above `largest`.
fn mth_by_lane(rows: &[Keys], m: usize, halvings: usize, [mut low, largest]: [Keys; 2]) -> Keys {
    // Invariant: at least m keys reach `low`, fewer reach `high`.
    let mut high = largest.map(|h| h.saturating_add(1));
    for _ in 0..halvings {
        // The mean rounded down, without overflow.
        let middle = std::array::from_fn(|lane| (low[lane] & high[lane]) + ((low[lane] ^ high[lane]) >> 1));
        if middle == low {
            break;
        }
        let count = count_reaching(rows, &middle);
        for lane in 0..LANES {
            if count[lane] >= m as i32 {
                low[lane] = middle[lane];
            } else {
                high[lane] = middle[lane];
            }
            if count[lane] == m as i32 {
                // It is the least of those m.
                high[lane] = low[lane].saturating_add(1);
            }
        }
    }
    least_reaching(rows, &low)
}

/// By lane, the least and the largest key.
#[multiversion(targets("x86_64+avx512f+avx512vl", "x86_64+avx2+fma", "aarch64+neon"))]
fn range_by_lane(rows: &[Keys]) -> [Keys; 2] {
    let [mut least, mut largest] = [[i32::MAX; LANES], [i32::MIN; LANES]];
    for row in rows {
        for ((least, largest), key) in least.iter_mut().zip(&mut largest).zip(row) {
            *least = if *key < *least { *key } else { *least };
            *largest = if *key > *largest { *key } else { *largest };
        }
    }
    [least, largest]
}

/// By lane, the least key that is at least `low`.
#[multiversion(targets("x86_64+avx512f+avx512vl", "x86_64+avx2+fma", "aarch64+neon"))]
fn least_reaching(rows: &[Keys], low: &Keys) -> Keys {
    let mut least = [i32::MAX; LANES];
    for row in rows {
        for ((least, low), key) in least.iter_mut().zip(low).zip(row) {
            let key = if *key >= *low { *key } else { i32::MAX };
            *least = if key < *least { key } else { *least };
        }
    }
    least
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

/// By lane, the margins that reach a floor, from those groups (the maxima of each, and its first sample) whose maximum does.
fn keep_reaching(own: &[f32], columns: &[Vec<f32>; LANES], groups: (&[Keys], &[usize]), floor: &Keys, kept: &mut [Vec<f32>; LANES]) {
    // So that nothing below need ask again.
    let room = own.len() + GROUP;
    for (column, kept) in columns.iter().zip(kept.iter_mut()) {
        assert_eq!(own.len(), column.len());
        kept.clear();
        kept.reserve(room);
    }
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") {
        // SAFETY: the feature was just detected; the columns are as long as `own`, and there is room for all of them and a register.
        return unsafe { keep_avx512(own, columns, groups, floor, kept) };
    }
    keep_portable(own, columns, groups, floor, kept);
}

fn keep_portable(own: &[f32], columns: &[Vec<f32>; LANES], groups: (&[Keys], &[usize]), floor: &Keys, kept: &mut [Vec<f32>; LANES]) {
    for_reaching(own.len(), groups, floor, |lane, start, end| {
        let margins = own[start..end].iter().zip(&columns[lane][start..end]).map(|(a, b)| b - a);
        kept[lane].extend(margins.filter(|margin| to_key(*margin) >= floor[lane]));
    });
}

/// Without a branch: a group's margins all go where the next kept ones belong, and only those that count are counted.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn keep_avx512(own: &[f32], columns: &[Vec<f32>; LANES], groups: (&[Keys], &[usize]), floor: &Keys, kept: &mut [Vec<f32>; LANES]) {
    use std::arch::x86_64::*;
    let floors = floor.map(from_key);
    for_reaching(own.len(), groups, floor, |lane, start, end| {
        let (kept, there) = (&mut kept[lane], (1u16 << (end - start - 1) << 1).wrapping_sub(1));
        // SAFETY: only the samples from start to end are read; they are at most sixteen, and there is room for that many more.
        unsafe {
            let rival = _mm512_maskz_loadu_ps(there, columns[lane].as_ptr().add(start));
            let margin = _mm512_sub_ps(rival, _mm512_maskz_loadu_ps(there, own.as_ptr().add(start)));
            let reached = _mm512_mask_cmp_ps_mask::<_CMP_GE_OQ>(there, margin, _mm512_set1_ps(floors[lane]));
            _mm512_storeu_ps(kept.as_mut_ptr().add(kept.len()), _mm512_maskz_compress_ps(reached, margin));
            kept.set_len(kept.len() + reached.count_ones() as usize);
        }
    });
}

/// Calls `keep` with each lane and group, by its first sample and its end, where the group's maximum reaches the lane's floor.
#[inline(always)]
fn for_reaching(samples: usize, (peaks, starts): (&[Keys], &[usize]), floor: &Keys, mut keep: impl FnMut(usize, usize, usize)) {
    let ends = starts.iter().skip(1).copied().chain([samples]);
    for ((peak, &start), end) in peaks.iter().zip(starts).zip(ends) {
        let mut reaching = 0u32;
        for lane in 0..LANES {
            reaching |= u32::from(peak[lane] >= floor[lane]) << lane;
        }
        while reaching != 0 {
            keep(reaching.trailing_zeros() as usize, start, end);
            reaching &= reaching - 1;
        }
    }
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
            let mut panel = Panel::default();
            panel.load(values.chunks(128).collect());
            let got = mth_largest(&own, &panel, m, &mut Scratch::default());
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
        fn every_variant_keeps_the_same(rows in rows(), group in 1..=GROUP, floor in prop::array::uniform16(-3.0f32..3.0)) {
            let (own, values): (Vec<_>, Vec<_>) = rows.into_iter().unzip();
            let (mut panel, own, mut scratch) = (Panel::default(), Own::new(vec![own]), Scratch::default());
            panel.load(vec![&values]);
            first_look(&own, &panel, group, &mut scratch);
            let (groups, floor) = ((&scratch.peaks[3][..], &scratch.starts[..]), floor.map(to_key));
            let (mut dispatched, mut portable) = <([Vec<f32>; LANES], [Vec<f32>; LANES])>::default();
            keep_reaching(&own.columns[3], &panel.columns, groups, &floor, &mut dispatched);
            keep_portable(&own.columns[3], &panel.columns, groups, &floor, &mut portable);
            for lane in 0..LANES {
                let margins = own.columns[3].iter().zip(&panel.columns[lane]).map(|(a, b)| b - a);
                let wanted: Vec<f32> = margins.filter(|margin| *margin >= from_key(floor[lane])).collect();
                prop_assert_eq!(&portable[lane], &wanted);
                prop_assert_eq!(&dispatched[lane], &wanted);
            }
        }

        #[test]
        fn keys_keep_the_order_of_floats(a in any::<f32>(), b in any::<f32>()) {
            prop_assert_eq!(to_key(a).cmp(&to_key(b)), a.total_cmp(&b));
            prop_assert_eq!(from_key(to_key(a)).to_bits(), a.to_bits());
        }
    }
}
