//! How far a shift is from the half-space of each rival, at most, and which rivals are worst. Uses nothing.

use multiversion::multiversion;

/// Prices are looked through by their largest in so many.
const CHUNK: usize = 16;

#[derive(Default)]
pub struct Prices {
    /// W s by class, as far as its precision goes.
    pub pushed: Vec<f64>,
    /// The part of a price that is rounding of `pushed`, per |w_k| + |w_j|.
    pub error: f64,
    values: Vec<f64>,
    /// The largest of each chunk of values.
    peaks: Vec<f64>,
}

impl Prices {
    /// (r_j - own + (W s)_j + error |w_j|) / |a_j| for all j, from `pushed` and `error`; -inf where |a_j| = 0.
    pub fn fill(&mut self, r: &[f64], lengths: &[f64], rows: &[f64], own: f64) {
        self.values.resize(r.len(), 0.0);
        self.peaks.resize(r.len().div_ceil(CHUNK), 0.0);
        let Prices {
            pushed,
            error,
            values,
            peaks,
        } = self;
        divide(values, peaks, pushed, [r, lengths, rows], own, *error);
    }

    /// The largest; at least 0.
    pub fn worst(&self) -> f64 {
        self.peaks.iter().copied().fold(0.0, f64::max)
    }

    /// These are not to be taken.
    pub fn set_aside(&mut self, rivals: impl Iterator<Item = usize>) {
        for j in rivals {
            self.values[j] = f64::NEG_INFINITY;
            let chunk = j / CHUNK;
            let part = &self.values[chunk * CHUNK..self.values.len().min((chunk + 1) * CHUNK)];
            self.peaks[chunk] = largest(part);
        }
    }

    /// Takes up to `count` of the largest above `tolerance`, with their prices: not always the very largest of all. None if there is none.
    pub fn take_worst(&mut self, count: usize, tolerance: f64) -> Vec<(usize, f64)> {
        let floor = self.floor(count).max(tolerance);
        let mut worst = Vec::with_capacity(2 * count);
        for (chunk, _) in self.peaks.iter().enumerate().filter(|(_, peak)| **peak >= floor) {
            let values = self.values.iter().enumerate().skip(chunk * CHUNK).take(CHUNK);
            worst.extend(values.filter(|(_, v)| **v >= floor && **v > tolerance).map(|(j, v)| (j, *v)));
        }
        if worst.len() > count {
            worst.select_nth_unstable_by(count - 1, |a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
            worst.truncate(count);
        }
        self.set_aside(worst.iter().map(|w| w.0));
        worst
    }

    /// What at least `count` values reach, where there are so many chunks.
    fn floor(&self, count: usize) -> f64 {
        if self.peaks.len() < count {
            return f64::NEG_INFINITY;
        }
        let mut peaks = self.peaks.clone();
        *peaks.select_nth_unstable_by(count - 1, |a, b| b.total_cmp(a)).1
    }
}

/// Of [`Prices::fill`]: `by_class` are r, |a_j| and |w_j|.
#[multiversion(targets("x86_64+avx512f+avx512vl", "x86_64+avx2+fma", "aarch64+neon"))]
fn divide(values: &mut [f64], peaks: &mut [f64], pushed: &[f64], by_class: [&[f64]; 3], own: f64, error: f64) {
    let [r, lengths, rows] = by_class.map(|v| v.chunks(CHUNK));
    let chunks = values.chunks_mut(CHUNK).zip(pushed.chunks(CHUNK)).zip(r).zip(lengths).zip(rows);
    for (peak, ((((values, pushed), r), lengths), rows)) in peaks.iter_mut().zip(chunks) {
        for ((((v, pushed), r), length), row) in values.iter_mut().zip(pushed).zip(r).zip(lengths).zip(rows) {
            let missed = (r - own + pushed + error * row) / length;
            *v = if *length > 0.0 { missed } else { f64::NEG_INFINITY };
        }
        *peak = largest(values);
    }
}

/// Of at most [`CHUNK`] values, by halves: no comparison waits for the one before.
#[inline(always)]
fn largest(values: &[f64]) -> f64 {
    let mut all = [f64::NEG_INFINITY; CHUNK];
    all[..values.len()].copy_from_slice(values);
    let mut half = CHUNK / 2;
    while half > 0 {
        for i in 0..half {
            let (a, b) = (all[i], all[i + half]);
            all[i] = if a > b { a } else { b };
        }
        half /= 2;
    }
    all[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_above_the_tolerance_are_taken_in_the_end_and_none_twice() {
        for classes in [1, 5, 16, 17, 333] {
            let r: Vec<f64> = (0..classes).map(|j| f64::from((j * 37) % 101) - 50.0).collect();
            let ones = vec![1.0; r.len()];
            let mut prices = Prices {
                pushed: vec![0.0; r.len()],
                ..Prices::default()
            };
            prices.fill(&r, &ones, &ones, 0.0);
            prices.set_aside(std::iter::once(0));
            assert_eq!(prices.worst(), r[1..].iter().copied().fold(0.0, f64::max));
            let mut taken = Vec::new();
            loop {
                let most = prices.worst();
                let worst = prices.take_worst(7, 10.0);
                if worst.is_empty() {
                    break;
                }
                assert!(worst.len() <= 7 && worst.iter().any(|w| w.1 == most) && worst.iter().all(|w| w.1 == r[w.0]));
                taken.extend(worst.iter().map(|w| w.0));
            }
            taken.sort_unstable();
            let wanted: Vec<usize> = (1..r.len()).filter(|&j| r[j] > 10.0).collect();
            assert_eq!(taken, wanted);
        }
    }
}
