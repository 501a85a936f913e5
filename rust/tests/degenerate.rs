//! One law: malformed input is an error that names the argument; a strange but legal problem ends in a status with its proof.

use ndarray::{Array1, Array2, array};
use tacfast::batch::{Solution, solve};
use tacfast::control::Control;
use tacfast::problem::{Latents, Problem, ProblemError, Settings, Status};

fn all(w: &Array2<f64>, b: Option<&Array1<f64>>, z: &Array2<f64>) -> Result<Vec<Solution>, ProblemError> {
    let problem = Problem::new(w.view(), b.map(|b| b.view()), Latents::F64(z.view()))?;
    let classes: Vec<usize> = (0..w.nrows()).collect();
    solve(&problem, &classes, &Settings::default(), &Control::default())
}

#[test]
fn malformed_input_is_named() {
    let (w, z) = (Array2::<f64>::eye(3), Array2::<f64>::eye(3));
    let named = |r: Result<Vec<Solution>, ProblemError>| r.expect_err("malformed").to_string();
    assert!(named(all(&Array2::eye(1), None, &Array2::eye(1))).starts_with("weight"));
    assert!(named(all(&w, Some(&array![0.0]), &z)).starts_with("bias"));
    assert!(named(all(&w, None, &Array2::eye(2))).starts_with("latents"));
    assert!(named(all(&w, None, &Array2::zeros((0, 3)))).starts_with("latents"));
    assert!(named(all(&(&w * f64::NAN), None, &z)).contains("weight must be finite, found NaN in row 0"));
    assert!(named(all(&w, None, &(&z / 0.0))).starts_with("latents must be finite"));
}

#[test]
fn the_middle_of_three_points_on_a_line_is_unreachable() {
    let solutions = all(&array![[-1.0], [0.0], [1.0]], None, &array![[0.5], [-0.5]]).expect("well-formed");
    let statuses: Vec<Status> = solutions.iter().map(|s| s.status).collect();
    assert_eq!(statuses, [Status::Solved, Status::Unreachable, Status::Solved]);
    assert_eq!(solutions[1].norm, f64::INFINITY);
    assert_eq!(solutions[1].active, [0, 2]);
    assert!((solutions[0].norm - 0.5).abs() < 1e-15);
}

#[test]
fn duplicates_are_reachable_when_their_biases_are_equal() {
    let w = array![[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]];
    let z = array![[0.1, 0.7], [0.3, 0.2]];
    let equal = all(&w, Some(&array![0.1, 0.1, 0.0]), &z).expect("well-formed");
    assert!(equal.iter().all(|s| s.status == Status::Solved));
    assert_eq!(equal[0].norm, equal[1].norm);
    let lower = all(&w, Some(&array![0.1, 0.0, 0.0]), &z).expect("well-formed");
    assert_eq!(lower[1].status, Status::Unreachable);
    assert_eq!(lower[1].bound, f64::INFINITY);
}

#[test]
fn a_class_that_already_wins_everywhere_is_trivial() {
    let solutions = all(&Array2::eye(3), Some(&array![9.0, 0.0, 0.0]), &Array2::eye(3)).expect("well-formed");
    assert_eq!((solutions[0].status, solutions[0].norm), (Status::Trivial, 0.0));
}
