//! All classes, in parallel. The work is split into fixed blocks, so results do not depend on the number of threads. May use: all above.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rayon::prelude::*;

use crate::active_set::ActiveSet;
use crate::certificate::{Certificate, Refined, bound, certify, out_of_reach, refine};
use crate::generation::attempt;
use crate::gram::Gram;
use crate::margins::{Logits, Peaks, multiply_transposed};
use crate::problem::{Engine, Problem, ProblemError, Settings, Status};
use crate::working_set::Class;

/// Classes per task: enough to share the passes over the logits, few enough to spread over cores, and to keep their margins in memory.
const BLOCK: usize = 32;
/// Bytes of margins that one task may hold.
const TASK_BYTES: usize = 64 << 20;

/// The answer for one class, in the caller's units.
#[derive(Debug, Clone, PartialEq)]
pub struct Solution {
    pub class: usize,
    pub status: Status,
    /// |s|; +inf where unreachable, NaN where the engine left nothing but a ray that proves too little.
    pub norm: f64,
    /// s; NaN where unreachable.
    pub shift: Vec<f64>,
    /// Rivals with positive multipliers, increasing; a Farkas ray where unreachable.
    pub active: Vec<usize>,
    pub multipliers: Vec<f64>,
    /// For each active rival, the sample that attains its margin.
    pub samples: Vec<usize>,
    pub bound: f64,
    pub primal: f64,
    pub dual: f64,
    pub gap: f64,
    pub iterations: usize,
    /// The engine that found it.
    pub engine: Engine,
}

/// Solves the given classes, in the given order. `cancel` may be set from another thread.
pub fn solve(problem: &Problem, classes: &[usize], settings: &Settings, cancel: &Arc<AtomicBool>) -> Result<Vec<Solution>, ProblemError> {
    settings.check()?;
    if let Some(&got) = classes.iter().find(|&&k| k >= problem.classes) {
        return Err(ProblemError::ClassRange {
            classes: problem.classes,
            got,
        });
    }
    let work = || solve_in_pool(problem, classes, settings, cancel);
    match settings.threads {
        None => work(),
        Some(threads) => rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .map_err(|_| ProblemError::Threads { got: threads })?
            .install(work),
    }
}

fn solve_in_pool(
    problem: &Problem,
    classes: &[usize],
    settings: &Settings,
    cancel: &Arc<AtomicBool>,
) -> Result<Vec<Solution>, ProblemError> {
    let logits = Logits::new(problem, cancel)?;
    let gram = Gram::new(problem, cancel)?;
    let blocks: Vec<Vec<Solution>> = classes
        .par_chunks(block_size(&logits))
        .map_init(ActiveSet::default, |kernel, targets| {
            if cancel.load(Ordering::Relaxed) {
                return Vec::new();
            }
            Block {
                problem,
                logits: &logits,
                gram: &gram,
                settings,
                cancel,
            }
            .solve(targets, kernel)
        })
        .collect();
    if cancel.load(Ordering::Relaxed) {
        return Err(ProblemError::Cancelled);
    }
    Ok(blocks.into_iter().flatten().collect())
}

/// Depends on the problem alone, so that results do not depend on the machine.
fn block_size(logits: &Logits) -> usize {
    (TASK_BYTES / logits.peak_bytes()).clamp(1, BLOCK)
}

/// What every block of classes shares.
struct Block<'a, 'p> {
    problem: &'a Problem<'p>,
    logits: &'a Logits,
    gram: &'a Gram<'a>,
    settings: &'a Settings,
    cancel: &'a Arc<AtomicBool>,
}

impl Block<'_, '_> {
    fn solve(&self, targets: &[usize], kernel: &mut ActiveSet) -> Vec<Solution> {
        let peaks = Peaks::new(self.logits, self.problem, targets, self.settings.quantile);
        let mut classes: Vec<Class> = targets
            .iter()
            .enumerate()
            .map(|(t, &k)| Class::new(self.gram, &peaks, t, k))
            .collect();
        let (first, then) = stages(self.settings.engine);
        let mut solutions = self.run(&mut classes, first, false, kernel);
        for (solution, class) in solutions.iter_mut().zip(&mut classes) {
            for &engine in then {
                if solution.status == Status::NotConverged {
                    let next = self.run(std::slice::from_mut(class), engine, true, kernel);
                    *solution = better(solution, next.into_iter().next());
                }
            }
        }
        solutions
    }

    /// One engine on some classes; W s of all of them is one GEMM.
    fn run(&self, classes: &mut [Class], engine: Engine, careful: bool, kernel: &mut ActiveSet) -> Vec<Solution> {
        let (c, d) = (self.problem.classes, self.problem.dim);
        let answers: Vec<Refined> = classes
            .iter_mut()
            .map(|class| {
                let attempt = attempt(class, engine, careful, kernel, self.cancel);
                refine(class, attempt, careful)
            })
            .collect();
        let mut shifts = Vec::with_capacity(classes.len() * d);
        answers.iter().for_each(|answer| shifts.extend_from_slice(&answer.shift));
        let mut pushed = vec![0.0; classes.len() * c];
        multiply_transposed(&shifts, &self.problem.weight, &mut pushed, classes.len(), d, c);
        classes
            .iter()
            .zip(answers)
            .zip(pushed.chunks_exact(c))
            .map(|((class, answer), pushed)| self.judge(class, answer, pushed, engine))
            .collect()
    }

    /// Turns an answer into a status, by its certificate alone.
    fn judge(&self, class: &Class, answer: Refined, pushed: &[f64], engine: Engine) -> Solution {
        let p = self.problem;
        let Certificate { primal, dual, gap } = certify(class, &answer, pushed);
        let bound = bound(p, class, &answer);
        let tol = self.settings.tol;
        let status = if answer.active.is_empty() && primal == 0.0 {
            Status::Trivial
        } else if out_of_reach(p, bound) {
            Status::Unreachable
        } else if primal <= tol && dual <= tol && gap <= tol {
            Status::Solved
        } else {
            Status::NotConverged
        };
        let length = answer.shift.iter().map(|v| v * v).sum::<f64>().sqrt();
        let (norm, shift) = if status == Status::Unreachable {
            (f64::INFINITY, vec![f64::NAN; p.dim])
        } else if answer.farkas {
            // A ray that proves too little is no shift either.
            (f64::NAN, vec![f64::NAN; p.dim])
        } else {
            (p.unscale_shift(length), answer.shift.iter().map(|&v| p.unscale_shift(v)).collect())
        };
        let mut order: Vec<usize> = (0..answer.active.len()).collect();
        order.sort_unstable_by_key(|&i| answer.active[i]);
        Solution {
            class: class.k,
            status,
            norm,
            shift,
            active: order.iter().map(|&i| answer.active[i]).collect(),
            multipliers: order.iter().map(|&i| p.unscale_multiplier(answer.multipliers[i])).collect(),
            samples: order.iter().map(|&i| class.samples[answer.active[i]].unwrap_or(0)).collect(),
            bound: p.unscale_shift(bound),
            primal,
            dual,
            gap,
            iterations: answer.iterations,
            engine,
        }
    }
}

/// The engine that takes every class, and those that then take, with care, what its certificate does not cover.
fn stages(engine: Engine) -> (Engine, &'static [Engine]) {
    match engine {
        Engine::Auto => (Engine::ActiveSet, &[Engine::ActiveSet, Engine::Clarabel]),
        Engine::ActiveSet => (Engine::ActiveSet, &[Engine::ActiveSet]),
        Engine::Clarabel => (Engine::Clarabel, &[Engine::Clarabel]),
        Engine::ClarabelFull => (Engine::ClarabelFull, &[Engine::ClarabelFull]),
    }
}

/// The second attempt where it is certified or at least closer, the first otherwise.
fn better(first: &Solution, second: Option<Solution>) -> Solution {
    let miss = |s: &Solution| s.primal.max(s.dual).max(s.gap);
    match second {
        Some(s) if s.status != Status::NotConverged || miss(&s) < miss(first) => s,
        _ => first.clone(),
    }
}
