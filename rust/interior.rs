//! Clarabel on a working set. May use: working_set's view of the problem, clarabel.

use std::sync::atomic::Ordering;

use clarabel::algebra::CscMatrix;
use clarabel::solver::{DefaultSettings, DefaultSolver, IPSolver, NonnegativeConeT, SolverStatus};

use crate::control::Control;
use crate::working_set::{Class, Ended, WorkingSet, unit_rows};

/// Where nothing else tells zero from positive: entries of a Farkas ray below this share of the largest are zero.
const RAY: f64 = 1e-7;

/// Step lengths to try: rarely an iterate runs into the boundary and stalls at a few digits, and a more careful walk does not.
const STEP_FRACTIONS: [f64; 3] = [0.99, 0.9, 0.7];

/// What Clarabel left: multipliers by position, or a Farkas ray.
pub struct Interior {
    pub ended: Ended,
    pub x: Vec<f64>,
    pub iterations: usize,
}

/// Solves on the whole working set.
pub fn solve(class: &Class, ws: &WorkingSet, control: &Control) -> Interior {
    let mut iterations = 0;
    let mut last = Interior {
        ended: Ended::Stalled,
        x: vec![0.0; ws.len()],
        iterations,
    };
    for step in STEP_FRACTIONS {
        let Some((to_the_end, run)) = run(class, ws, step, control) else {
            break;
        };
        iterations += run.iterations;
        last = Interior { iterations, ..run };
        if to_the_end || control.cancelled() {
            break;
        }
    }
    last
}

/// One run, and whether it met its tolerances.
///
/// Of the primal (d variables) and the dual (one variable per constraint) the one with fewer variables is posed: its quadratic term is
/// positive definite in general position, where the other's is singular.
fn run(class: &Class, ws: &WorkingSet, step: f64, control: &Control) -> Option<(bool, Interior)> {
    let m = ws.len();
    // Units in which the deepest constraint is one suit Clarabel's absolute tolerances.
    let unit = ws.r.iter().fold(0.0_f64, |a, r| a.max(r.abs())).max(f64::MIN_POSITIVE);
    let r: Vec<f64> = ws.r.iter().map(|r| r / unit).collect();
    let primal = m > class.gram.dim();
    let mut solver = if primal {
        pose_primal(class, ws, &r, step)
    } else {
        pose_dual(ws, &r, step)
    }?;
    let cancelled = control.flag();
    solver.set_termination_callback(move |_: &_| cancelled.load(Ordering::Relaxed));
    solver.solve();

    let (solution, iterations) = (&solver.solution, solver.info.iterations as usize);
    let (x, slack) = if primal {
        (&solution.z, &solution.s)
    } else {
        (&solution.x, &solution.z)
    };
    // Multiplier and slack are both distances here, and one of them vanishes: the larger one is real.
    let multipliers = || {
        x.iter()
            .zip(slack)
            .map(|(&x, &s)| if x > s { x.max(0.0) * unit } else { 0.0 })
            .collect()
    };
    let (proof, weak_proof) = infeasible(primal);
    let (to_the_end, ended, x) = match solution.status {
        SolverStatus::Solved => (true, Ended::Optimal, multipliers()),
        SolverStatus::AlmostSolved | SolverStatus::InsufficientProgress => (false, Ended::Optimal, multipliers()),
        status if status == proof || status == weak_proof => {
            let floor = RAY * x.iter().copied().fold(0.0, f64::max);
            let ray = x.iter().map(|&x| if x > floor { x } else { 0.0 }).collect();
            (status == proof, Ended::Infeasible, ray)
        }
        _ => (false, Ended::Stalled, multipliers()),
    };
    Some((to_the_end, Interior { ended, x, iterations }))
}

/// How Clarabel says that no shift satisfies the constraints, when posed either way.
fn infeasible(primal: bool) -> (SolverStatus, SolverStatus) {
    if primal {
        (SolverStatus::PrimalInfeasible, SolverStatus::AlmostPrimalInfeasible)
    } else {
        (SolverStatus::DualInfeasible, SolverStatus::AlmostDualInfeasible)
    }
}

/// min |s|^2 / 2 subject to -A s + slack = -r, slack >= 0; its dual variables are the multipliers.
fn pose_primal(class: &Class, ws: &WorkingSet, r: &[f64], step: f64) -> Option<DefaultSolver<f64>> {
    let (m, d) = (ws.len(), class.gram.dim());
    let rows = unit_rows(class, &ws.members);
    let values = (0..d).flat_map(|t| rows.iter().map(move |row| -row[t])).collect();
    let minus_a = CscMatrix::new(m, d, (0..=d).map(|t| t * m).collect(), (0..d).flat_map(|_| 0..m).collect(), values);
    let minus_r: Vec<f64> = r.iter().map(|v| -v).collect();
    let cones = [NonnegativeConeT(m)];
    DefaultSolver::new(&diagonal(d, 1.0), &vec![0.0; d], &minus_a, &minus_r, &cones, settings(step)).ok()
}

/// min x^T G x / 2 - r^T x over x >= 0.
fn pose_dual(ws: &WorkingSet, r: &[f64], step: f64) -> Option<DefaultSolver<f64>> {
    let m = ws.len();
    let minus_r: Vec<f64> = r.iter().map(|v| -v).collect();
    let cones = [NonnegativeConeT(m)];
    DefaultSolver::new(
        &upper_triangle(ws),
        &minus_r,
        &diagonal(m, -1.0),
        &vec![0.0; m],
        &cones,
        settings(step),
    )
    .ok()
}

fn settings(max_step_fraction: f64) -> DefaultSettings<f64> {
    DefaultSettings {
        verbose: false,
        max_threads: 1,
        max_iter: 200,
        // As tight as float64 lets an interior point get; what it misses `certificate::refine` adds, and the certificate judges.
        tol_gap_abs: 1e-13,
        tol_gap_rel: 1e-13,
        tol_feas: 1e-13,
        tol_infeas_abs: 1e-12,
        tol_infeas_rel: 1e-12,
        // Presolve drops rows with infinite bounds only; there are none.
        presolve_enable: false,
        max_step_fraction,
        ..DefaultSettings::default()
    }
}

fn upper_triangle(ws: &WorkingSet) -> CscMatrix<f64> {
    let m = ws.len();
    let (mut colptr, mut rowval, mut nzval) = (vec![0], Vec::new(), Vec::new());
    for column in 0..m {
        rowval.extend(0..=column);
        nzval.extend_from_slice(&ws.gram_row(column)[..=column]);
        colptr.push(rowval.len());
    }
    CscMatrix::new(m, m, colptr, rowval, nzval)
}

fn diagonal(n: usize, value: f64) -> CscMatrix<f64> {
    CscMatrix::new(n, n, (0..=n).collect(), (0..n).collect(), vec![value; n])
}
