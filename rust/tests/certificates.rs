//! One law: a planted optimum is found by every engine, at any number of threads, with its certificate.

use ndarray::{Array1, Array2, Axis};
use proptest::prelude::*;
use tacfast::batch::{Solution, on_threads, solve};
use tacfast::control::Control;
use tacfast::problem::{Engine, Latents, Problem, ProblemError, Settings, Status};

fn run(w: &Array2<f64>, b: &Array1<f64>, z: &Array2<f64>, classes: &[usize], settings: &Settings) -> Result<Vec<Solution>, ProblemError> {
    let problem = Problem::new(w.view(), Some(b.view()), Latents::F64(z.view()))?;
    on_threads(settings.threads, || solve(&problem, classes, settings, &Control::default()))?
}

/// Chooses multipliers for some rivals of class 0, and biases that make exactly those constraints tight: the optimum is known.
fn plant(w: &Array2<f64>, z: &Array2<f64>, multipliers: &[f64]) -> (Array1<f64>, Array1<f64>) {
    let mut shift = Array1::<f64>::zeros(w.ncols());
    for (j, x) in multipliers.iter().enumerate() {
        shift.scaled_add(*x, &(&w.row(0) - &w.row(j + 1)));
    }
    let mut bias = Array1::zeros(w.nrows());
    for j in 1..w.nrows() {
        let a = &w.row(0) - &w.row(j);
        let worst = z.axis_iter(Axis(0)).map(|row| -a.dot(&row)).fold(f64::NEG_INFINITY, f64::max);
        let slack = if multipliers.get(j - 1).is_some_and(|x| *x > 0.0) {
            0.0
        } else {
            0.5
        };
        bias[j] = a.dot(&shift) - worst - slack;
    }
    (bias, shift)
}

fn matrix(rows: usize, columns: usize) -> impl Strategy<Value = Array2<f64>> {
    prop::collection::vec(-1.0..1.0f64, rows * columns).prop_map(move |v| Array2::from_shape_vec((rows, columns), v).expect("sizes agree"))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn a_planted_optimum_is_found(
        w in matrix(9, 16),
        z in matrix(20, 16),
        multipliers in prop::collection::vec(prop_oneof![Just(0.0), 0.1..2.0f64], 8),
    ) {
        prop_assume!(multipliers.iter().any(|x| *x > 0.0));
        let (bias, shift) = plant(&w, &z, &multipliers);
        let norm = shift.dot(&shift).sqrt();
        for engine in [Engine::ActiveSet, Engine::Clarabel, Engine::ClarabelFull] {
            let solution = &run(&w, &bias, &z, &[0], &Settings { engine, ..Settings::default() }).expect("well-formed")[0];
            prop_assert_eq!(solution.status, Status::Solved);
            for (got, want) in solution.shift.iter().zip(&shift) {
                prop_assert!((got - want).abs() <= 1e-8 * norm, "{:?}: {} {}", engine, got, want);
            }
            prop_assert!(solution.primal <= 1e-9 && solution.dual <= 1e-9 && solution.gap <= 1e-9);
            prop_assert!(solution.bound <= solution.norm * (1.0 + 1e-12) && solution.bound >= solution.norm * (1.0 - 1e-9));
        }
    }

    #[test]
    fn threads_change_nothing(w in matrix(70, 12), z in matrix(30, 12)) {
        let bias = Array1::zeros(70);
        let classes: Vec<usize> = (0..70).collect();
        let at = |threads| run(&w, &bias, &z, &classes, &Settings { threads: Some(threads), ..Settings::default() }).expect("well-formed");
        let (one, four) = (at(1), at(4));
        for (a, b) in one.iter().zip(&four) {
            // NaN shifts of unreachable classes are not equal to themselves: compare bits.
            prop_assert_eq!(a.status, b.status);
            prop_assert_eq!(a.norm.to_bits(), b.norm.to_bits());
            prop_assert_eq!(&a.multipliers, &b.multipliers);
            prop_assert_eq!(&a.samples, &b.samples);
        }
    }
}

#[test]
fn a_cancelled_solve_says_so() {
    let w = Array2::from_shape_fn((4, 3), |(i, j)| (i * 3 + j) as f64 % 5.0);
    let z = Array2::ones((2, 3));
    let problem = Problem::new(w.view(), None, Latents::F64(z.view())).expect("well-formed");
    let cancelled = Control::default();
    cancelled.cancel();
    assert_eq!(
        solve(&problem, &[0], &Settings::default(), &cancelled),
        Err(ProblemError::Cancelled)
    );
}
