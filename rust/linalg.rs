//! Products of vectors and matrices, in a fixed order of summation whatever the machine and its threads. Uses nothing.

use multiversion::multiversion;

/// out (m x n) = a (m x d) times the transpose of b (n x d), all row-major, on this thread.
pub fn multiply_transposed(a: &[f64], b: &[f64], out: &mut [f64], m: usize, d: usize, n: usize) {
    multiply_transposed_into(a, b, out, (m, d, n), n);
}

/// The same into rows that lie `stride` apart.
pub fn multiply_transposed_into(a: &[f64], b: &[f64], out: &mut [f64], (m, d, n): (usize, usize, usize), stride: usize) {
    if m == 0 {
        return;
    }
    assert!(n <= stride && a.len() >= m * d && b.len() >= n * d && out.len() >= (m - 1) * stride + n);
    let (d_, stride) = (d as isize, stride as isize);
    // SAFETY: the assertion bounds every element that the strides reach.
    unsafe { matrixmultiply::dgemm(m, d, n, 1.0, a.as_ptr(), d_, 1, b.as_ptr(), 1, d_, 0.0, out.as_mut_ptr(), stride, 1) }
}

/// The same in float32.
pub fn multiply_transposed_f32(a: &[f32], b: &[f32], out: &mut [f32], m: usize, d: usize, n: usize) {
    assert!(a.len() >= m * d && b.len() >= n * d && out.len() >= m * n);
    let (d_, n_) = (d as isize, n as isize);
    // SAFETY: the assertion bounds every element that the strides reach.
    unsafe { matrixmultiply::sgemm(m, d, n, 1.0, a.as_ptr(), d_, 1, b.as_ptr(), 1, d_, 0.0, out.as_mut_ptr(), n_, 1) }
}

#[multiversion(targets("x86_64+avx512f+avx512vl", "x86_64+avx2+fma", "aarch64+neon"))]
pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    // Sixteen accumulators: the order of summation is fixed, and the compiler can vectorise it.
    let mut acc = [0.0; 16];
    let (a16, b16) = (a.chunks_exact(16), b.chunks_exact(16));
    let mut tail = 0.0;
    for (x, y) in a16.remainder().iter().zip(b16.remainder()) {
        tail += x * y;
    }
    for (x, y) in a16.zip(b16) {
        for t in 0..16 {
            acc[t] += x[t] * y[t];
        }
    }
    let mut sum = tail;
    for v in acc {
        sum += v;
    }
    sum
}

/// The same for some dozens of entries, where choosing a variant would cost more than it saves: four sums that do not wait for one another.
#[inline]
pub fn short_dot(a: &[f64], b: &[f64]) -> f64 {
    let mut acc = [0.0; 4];
    let (a4, b4) = (a.chunks_exact(4), b.chunks_exact(4));
    let tail: f64 = a4.remainder().iter().zip(b4.remainder()).map(|(x, y)| x * y).sum();
    for (x, y) in a4.zip(b4) {
        for t in 0..4 {
            acc[t] += x[t] * y[t];
        }
    }
    (acc[0] + acc[1]) + (acc[2] + acc[3]) + tail
}

/// y := y + the sum of c_t x_t
#[multiversion(targets("x86_64+avx512f+avx512vl", "x86_64+avx2+fma", "aarch64+neon"))]
pub fn add_four(y: &mut [f64], c: [f64; 4], x: [&[f64]; 4]) {
    let [x0, x1, x2, x3] = x.map(|x| &x[..y.len()]);
    for (i, y) in y.iter_mut().enumerate() {
        *y += (c[0] * x0[i] + c[1] * x1[i]) + (c[2] * x2[i] + c[3] * x3[i]);
    }
}

/// y := y + c x
#[multiversion(targets("x86_64+avx512f+avx512vl", "x86_64+avx2+fma", "aarch64+neon"))]
pub fn add_scaled(y: &mut [f64], c: f64, x: &[f64]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y += c * x;
    }
}

/// y := y + c (a - b). Subtracting first keeps the digits of rows that nearly agree.
#[inline(always)]
fn add_scaled_difference<T: Copy + Into<f64>>(y: &mut [f64], c: f64, a: &[T], b: &[T]) {
    for ((y, a), b) in y.iter_mut().zip(a).zip(b) {
        *y += c * ((*a).into() - (*b).into());
    }
}

#[multiversion(targets("x86_64+avx512f+avx512vl", "x86_64+avx2+fma", "aarch64+neon"))]
pub fn add_scaled_difference_f32(y: &mut [f64], c: f64, a: &[f32], b: &[f32]) {
    add_scaled_difference(y, c, a, b);
}

#[multiversion(targets("x86_64+avx512f+avx512vl", "x86_64+avx2+fma", "aarch64+neon"))]
pub fn add_scaled_difference_f64(y: &mut [f64], c: f64, a: &[f64], b: &[f64]) {
    add_scaled_difference(y, c, a, b);
}

/// y := y + the sum of c_t (a - b_t)
#[inline(always)]
fn add_four_differences<T: Copy + Into<f64>>(y: &mut [f64], c: [f64; 4], a: &[T], b: [&[T]; 4]) {
    let ([b0, b1, b2, b3], a) = (b.map(|b| &b[..y.len()]), &a[..y.len()]);
    for (i, y) in y.iter_mut().enumerate() {
        let (a, [b0, b1, b2, b3]): (f64, [f64; 4]) = (a[i].into(), [b0[i].into(), b1[i].into(), b2[i].into(), b3[i].into()]);
        *y += (c[0] * (a - b0) + c[1] * (a - b1)) + (c[2] * (a - b2) + c[3] * (a - b3));
    }
}

#[multiversion(targets("x86_64+avx512f+avx512vl", "x86_64+avx2+fma", "aarch64+neon"))]
pub fn add_four_differences_f32(y: &mut [f64], c: [f64; 4], a: &[f32], b: [&[f32]; 4]) {
    add_four_differences(y, c, a, b);
}

#[multiversion(targets("x86_64+avx512f+avx512vl", "x86_64+avx2+fma", "aarch64+neon"))]
pub fn add_four_differences_f64(y: &mut [f64], c: [f64; 4], a: &[f64], b: [&[f64]; 4]) {
    add_four_differences(y, c, a, b);
}

/// `add_scaled` of a row in float32.
#[multiversion(targets("x86_64+avx512f+avx512vl", "x86_64+avx2+fma", "aarch64+neon"))]
pub fn add_scaled_f32(y: &mut [f64], c: f64, x: &[f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y += c * f64::from(*x);
    }
}

/// Largest magnitude and sum of squares; the latter is not finite where an entry is not.
#[inline(always)]
fn extent<T: Copy + Into<f64>>(row: &[T]) -> (f64, f64) {
    let (mut largest, mut squares) = ([0.0_f64; 16], [0.0; 16]);
    for part in row.chunks(16) {
        for ((l, s), v) in largest.iter_mut().zip(&mut squares).zip(part) {
            let v: f64 = (*v).into();
            *l = if v.abs() > *l { v.abs() } else { *l };
            *s += v * v;
        }
    }
    (largest.into_iter().fold(0.0, f64::max), squares.iter().sum())
}

#[multiversion(targets("x86_64+avx512f+avx512vl", "x86_64+avx2+fma", "aarch64+neon"))]
pub fn extent_f32(row: &[f32]) -> (f64, f64) {
    extent(row)
}

#[multiversion(targets("x86_64+avx512f+avx512vl", "x86_64+avx2+fma", "aarch64+neon"))]
pub fn extent_f64(row: &[f64]) -> (f64, f64) {
    extent(row)
}

/// Sum of (a - b) (z scale). Scaling comes first: it keeps products of tiny latents out of the denormal range.
#[inline(always)]
fn difference_dot<A: Copy + Into<f64>, Z: Copy + Into<f64>>(a: &[A], b: &[A], z: &[Z], scale: f64) -> f64 {
    let mut acc = [0.0; 16];
    for ((a, b), z) in a.chunks(16).zip(b.chunks(16)).zip(z.chunks(16)) {
        for (((s, a), b), z) in acc.iter_mut().zip(a).zip(b).zip(z) {
            *s += ((*a).into() - (*b).into()) * ((*z).into() * scale);
        }
    }
    acc.iter().sum()
}

/// Rows in float32 or float64, by the first name, and what they are multiplied with, by the second.
#[multiversion(targets("x86_64+avx512f+avx512vl", "x86_64+avx2+fma", "aarch64+neon"))]
pub fn difference_dot_f32_f32(a: &[f32], b: &[f32], z: &[f32], scale: f64) -> f64 {
    difference_dot(a, b, z, scale)
}

#[multiversion(targets("x86_64+avx512f+avx512vl", "x86_64+avx2+fma", "aarch64+neon"))]
pub fn difference_dot_f32_f64(a: &[f32], b: &[f32], z: &[f64], scale: f64) -> f64 {
    difference_dot(a, b, z, scale)
}

#[multiversion(targets("x86_64+avx512f+avx512vl", "x86_64+avx2+fma", "aarch64+neon"))]
pub fn difference_dot_f64_f32(a: &[f64], b: &[f64], z: &[f32], scale: f64) -> f64 {
    difference_dot(a, b, z, scale)
}

#[multiversion(targets("x86_64+avx512f+avx512vl", "x86_64+avx2+fma", "aarch64+neon"))]
pub fn difference_dot_f64_f64(a: &[f64], b: &[f64], z: &[f64], scale: f64) -> f64 {
    difference_dot(a, b, z, scale)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dot_matches_the_plain_sum() {
        for len in [0, 1, 15, 16, 17, 63] {
            let a: Vec<f64> = (0..len).map(f64::from).collect();
            let plain: f64 = a.iter().map(|v| v * v).sum();
            assert_eq!(dot(&a, &a), plain);
            assert_eq!(short_dot(&a, &a), plain);
        }
    }
}
