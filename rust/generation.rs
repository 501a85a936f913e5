//! Constraint generation: a few constraints solved exactly, all of them priced, the violated ones added, until none is. May use: working_set,
//! prices, the engines.

use crate::active_set::ActiveSet;
use crate::control::Control;
use crate::interior;
use crate::prices::Prices;
use crate::problem::Engine;
use crate::working_set::{Attempt, Class, Ended, WorkingSet};

/// Rounds are few (5-15 on real heads); the cap is for what rounding may do.
const ROUNDS: usize = 500;
/// A constraint counts as violated when it is missed by this share of the shift's length.
const VIOLATED: f64 = 1e-12;

/// Solves with the given engine; `kernel` is the active set's workspace, reused from class to class.
/// `careful` makes it factor vectors rather than their Gram matrix.
pub fn attempt(class: &mut Class, engine: Engine, careful: bool, kernel: &mut ActiveSet, control: &Control) -> Attempt {
    if let Some(j) = class.contradiction() {
        return Attempt {
            ended: Ended::Infeasible,
            active: vec![j],
            multipliers: vec![1.0],
            iterations: 0,
            pushed: None,
        };
    }
    match engine {
        Engine::Auto | Engine::ActiveSet => generate(class, &mut Kernel::active_set(kernel, careful), control),
        Engine::Clarabel => generate(class, &mut Kernel::Clarabel(Vec::new(), Vec::new(), 0), control),
        Engine::ClarabelFull => {
            let rivals: Vec<usize> = class.rivals().collect();
            if rivals.is_empty() {
                return Attempt {
                    ended: Ended::Optimal,
                    active: Vec::new(),
                    multipliers: Vec::new(),
                    iterations: 0,
                    pushed: None,
                };
            }
            rivals.iter().for_each(|&j| class.sharpen(j));
            let mut ws = WorkingSet::default();
            rivals.iter().for_each(|&j| ws.push(class, j));
            let mut kernel = Kernel::Clarabel(Vec::new(), Vec::new(), 0);
            let ended = kernel.solve(class, &ws, 0.0, control);
            kernel.report(class, &ws, ended)
        }
    }
}

/// Constraint generation: violated constraints are made exact, and join if they are still violated then.
fn generate(class: &mut Class, kernel: &mut Kernel, control: &Control) -> Attempt {
    let mut ws = WorkingSet::new(kernel.wants_vectors());
    let mut prices = Prices::default();
    let mut depth: f64 = 0.0;
    for _ in 0..ROUNDS {
        let (active, multipliers) = kernel.multipliers(class, &ws);
        class.price(&active, &multipliers, &mut prices);
        if active.is_empty() {
            // How far the deepest single constraint is, at most: a scale to measure violations by, while there are no multipliers to tell.
            depth = prices.worst();
        }
        let tolerance = VIOLATED * depth.max(class.distance(&active, &multipliers));
        let (gram, k) = (class.gram, class.k);
        let joining = class.joining(&mut prices, tolerance, &ws.members, || {
            kernel
                .shift(&ws, gram.dim())
                .unwrap_or_else(|| gram.combine(k, &active, &multipliers))
        });
        if joining.is_empty() {
            return Attempt {
                pushed: Some(prices.pushed),
                ..kernel.report(class, &ws, Ended::Optimal)
            };
        }
        if control.cancelled() {
            break;
        }
        kernel.compact(&mut ws);
        joining.iter().for_each(|&j| ws.push(class, j));
        let ended = kernel.solve(class, &ws, tolerance, control);
        if ended != Ended::Optimal {
            return kernel.report(class, &ws, ended);
        }
    }
    kernel.report(class, &ws, Ended::Stalled)
}

/// The two engines behind one face; both leave (positions, multipliers) of the constraints they use.
enum Kernel<'a> {
    ActiveSet(&'a mut ActiveSet),
    Clarabel(Vec<usize>, Vec<f64>, usize),
}

impl<'a> Kernel<'a> {
    fn active_set(kernel: &'a mut ActiveSet, careful: bool) -> Self {
        kernel.reset(careful);
        Kernel::ActiveSet(kernel)
    }

    fn wants_vectors(&self) -> bool {
        matches!(self, Kernel::ActiveSet(kernel) if kernel.careful())
    }

    /// The shift itself, where the engine has it more exactly than its multipliers tell.
    fn shift(&self, ws: &WorkingSet, dim: usize) -> Option<Vec<f64>> {
        match self {
            Kernel::ActiveSet(kernel) => kernel.shift(ws, dim),
            Kernel::Clarabel(..) => None,
        }
    }

    fn solve(&mut self, class: &Class, ws: &WorkingSet, tolerance: f64, control: &Control) -> Ended {
        match self {
            Kernel::ActiveSet(kernel) => kernel.solve(ws, tolerance),
            Kernel::Clarabel(positions, values, iterations) => {
                let interior::Interior {
                    ended,
                    x,
                    iterations: steps,
                } = interior::solve(class, ws, control);
                *iterations += steps;
                *positions = (0..x.len()).filter(|&i| x[i] > 0.0).collect();
                *values = positions.iter().map(|&i| x[i]).collect();
                ended
            }
        }
    }

    fn support(&self) -> (&[usize], &[f64], usize) {
        match self {
            Kernel::ActiveSet(kernel) => {
                let (positions, values) = kernel.support();
                (positions, values, kernel.iterations)
            }
            Kernel::Clarabel(positions, values, iterations) => (positions, values, *iterations),
        }
    }

    /// Classes and multipliers in the units of a_j.
    fn multipliers(&self, class: &Class, ws: &WorkingSet) -> (Vec<usize>, Vec<f64>) {
        let (positions, values, _) = self.support();
        let active: Vec<usize> = positions.iter().map(|&p| ws.members[p]).collect();
        let multipliers = active.iter().zip(values).map(|(&j, x)| x / class.lengths[j]).collect();
        (active, multipliers)
    }

    /// Only the active set can start warm from a smaller set; an interior point is better off keeping all it has seen.
    fn compact(&mut self, ws: &mut WorkingSet) {
        if let Kernel::ActiveSet(kernel) = self {
            ws.compact(kernel.support().0);
            kernel.renumber();
        }
    }

    fn report(&self, class: &Class, ws: &WorkingSet, ended: Ended) -> Attempt {
        let (active, multipliers) = self.multipliers(class, ws);
        Attempt {
            ended,
            active,
            multipliers,
            iterations: self.support().2,
            pushed: None,
        }
    }
}
