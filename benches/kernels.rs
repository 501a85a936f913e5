//! The kernels by themselves, and a whole solve: `cargo bench --features bench`.

use std::hint::black_box;
use std::time::Duration;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use ndarray::Array2;

use tacfast::batch;
use tacfast::bench_internals::{Factor, LANES, Lane, Own, Panel, Scratch, TILE, max_plus, mth_largest};
use tacfast::control::Control;
use tacfast::problem::{Latents, Problem, Settings};

/// xorshift64*: numbers in [0, 1) that are the same in every run.
struct Random(u64);

impl Random {
    fn uniform(&mut self) -> f64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Sum of twelve: close enough to normal.
    fn normal(&mut self) -> f64 {
        (0..12).map(|_| self.uniform()).sum::<f64>() - 6.0
    }

    fn lane(&mut self) -> Lane {
        std::array::from_fn(|_| self.normal() as f32)
    }
}

/// One tile of targets against one panel of rivals over a block of samples.
fn bench_max_plus(c: &mut Criterion) {
    const SAMPLES: usize = 128;
    let mut random = Random(1);
    let keys: Vec<[f32; TILE]> = (0..SAMPLES).map(|_| std::array::from_fn(|_| random.normal() as f32)).collect();
    let values: Vec<Lane> = (0..SAMPLES).map(|_| random.lane()).collect();
    let mut out = [[0.0; LANES]; TILE];
    let mut group = c.benchmark_group("max_plus");
    group.throughput(Throughput::Elements((SAMPLES * TILE * LANES) as u64));
    group.bench_function("128 samples", |b| {
        b.iter(|| max_plus(black_box(&keys), black_box(&values), &mut out));
    });
    group.finish();
}

/// The 0.99 quantile of 5000 margins, for a tile of targets against a panel of rivals.
fn bench_mth_largest(c: &mut Criterion) {
    const SAMPLES: usize = 5000;
    let mut random = Random(2);
    let values: Vec<Lane> = (0..SAMPLES).map(|_| random.lane()).collect();
    let keys: Vec<[f32; TILE]> = (0..SAMPLES).map(|_| std::array::from_fn(|_| random.normal() as f32)).collect();
    let mut panel = Panel::default();
    panel.load(values.chunks(128).collect());
    let own = Own::new(keys.chunks(128).map(<[_]>::to_vec).collect());
    let mut scratch = Scratch::default();
    let mut group = c.benchmark_group("mth_largest");
    group.throughput(Throughput::Elements((SAMPLES * TILE * LANES) as u64));
    group.bench_function("50 of 5000", |b| {
        b.iter(|| mth_largest(black_box(&own), black_box(&panel), SAMPLES / 100, &mut scratch));
    });
    group.finish();
}

/// Rows of the Gram matrix of `count` random unit vectors, each as `Factor::push` wants it.
fn gram_rows(count: usize, dim: usize) -> Vec<Vec<f64>> {
    let mut random = Random(3);
    let vectors: Vec<Vec<f64>> = (0..count)
        .map(|_| {
            let v: Vec<f64> = (0..dim).map(|_| random.normal()).collect();
            let length = v.iter().map(|x| x * x).sum::<f64>().sqrt();
            v.iter().map(|x| x / length).collect()
        })
        .collect();
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
    (0..count)
        .map(|i| (0..=i).map(|j| dot(&vectors[i], &vectors[j])).collect())
        .collect()
}

/// A factor as large as active sets get, grown from nothing, and one row taken out of its middle.
fn bench_factor(c: &mut Criterion) {
    const SIZE: usize = 60;
    let rows = gram_rows(SIZE, 4 * SIZE);
    let fill = |factor: &mut Factor| {
        factor.clear();
        for row in &rows {
            assert!(factor.push(black_box(row), 1e-11));
        }
    };
    let mut factor = Factor::default();
    c.bench_function("factor/push 60", |b| b.iter(|| fill(&mut factor)));
    let full = || {
        let mut factor = Factor::default();
        fill(&mut factor);
        factor
    };
    c.bench_function("factor/remove from the middle of 60", |b| {
        b.iter_batched_ref(full, |factor| factor.remove(SIZE / 2), BatchSize::SmallInput);
    });
}

/// All classes of a head with ReLU-like latents, on one thread.
fn bench_solve(c: &mut Criterion) {
    let (classes, dim, samples) = (200, 512, 4000);
    let mut random = Random(4);
    let weight = Array2::from_shape_simple_fn((classes, dim), || random.normal());
    let latents = Array2::from_shape_simple_fn((samples, dim), || random.normal().max(0.0) as f32);
    let problem = Problem::new(weight.view(), None, Latents::F32(latents.view())).expect("a well-formed problem");
    let targets: Vec<usize> = (0..classes).collect();
    let settings = Settings {
        threads: Some(1),
        ..Settings::default()
    };
    let mut group = c.benchmark_group("solve");
    group.sample_size(20).throughput(Throughput::Elements(classes as u64));
    let run = || batch::solve(&problem, &targets, &settings, &Control::default()).expect("it was not cancelled");
    group.bench_function("200 classes, d = 512, n = 4000", |b| {
        batch::on_threads(settings.threads, || b.iter(run)).expect("one thread can be had");
    });
    group.finish();
}

criterion_group! {
    name = kernels;
    config = Criterion::default().warm_up_time(Duration::from_secs(1)).measurement_time(Duration::from_secs(3));
    targets = bench_max_plus, bench_mth_largest, bench_factor, bench_solve
}
criterion_main!(kernels);
