//! The bindings: arrays in, arrays out. No arithmetic, and the only file that names pyo3 or numpy. May use: batch, problem.

use std::collections::HashMap;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use numpy::{PyArray1, PyReadonlyArray1, PyReadonlyArray2};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use rayon::prelude::*;

use crate::batch::{self, Solution, on_threads};
use crate::control::{Control, STAGES};
use crate::problem::{Engine, Latents, Problem, ProblemError, Settings, Status};

/// How often a running solve looks for Ctrl-C.
const SIGNAL_INTERVAL: Duration = Duration::from_millis(50);

impl From<ProblemError> for PyErr {
    fn from(error: ProblemError) -> PyErr {
        PyValueError::new_err(error.to_string())
    }
}

#[derive(FromPyObject)]
enum LatentArray<'py> {
    F32(PyReadonlyArray2<'py, f32>),
    F64(PyReadonlyArray2<'py, f64>),
    /// (samples, length of the longest)
    Elsewhere((usize, f64)),
}

fn engine_named(name: &str) -> PyResult<Engine> {
    match name {
        "auto" => Ok(Engine::Auto),
        "active-set" => Ok(Engine::ActiveSet),
        "clarabel" => Ok(Engine::Clarabel),
        "clarabel-full" => Ok(Engine::ClarabelFull),
        _ => Err(PyValueError::new_err(format!(
            "engine must be one of 'auto', 'active-set', 'clarabel', 'clarabel-full', got '{name}'"
        ))),
    }
}

fn engine_code(engine: Engine) -> u8 {
    match engine {
        Engine::Auto | Engine::ActiveSet => 0,
        Engine::Clarabel => 1,
        Engine::ClarabelFull => 2,
    }
}

fn status_code(status: Status) -> u8 {
    match status {
        Status::Solved => 0,
        Status::Trivial => 1,
        Status::Unreachable => 2,
        Status::NotConverged => 3,
    }
}

/// Runs `work` on another thread with the GIL released; tells `progress` how many QPs are done, and raises what it or Ctrl-C raises.
fn interruptible<T: Send>(
    py: Python<'_>,
    progress: Option<&Bound<'_, PyAny>>,
    control: &Control,
    work: impl FnOnce() -> Result<T, ProblemError> + Send,
) -> PyResult<T> {
    let progress = progress.map(|p| p.clone().unbind());
    let look = |py: Python<'_>| {
        py.check_signals()?;
        progress.as_ref().map_or(Ok(()), |p| p.call1(py, (control.done(),)).map(drop))
    };
    let result = py.detach(|| {
        std::thread::scope(|scope| {
            let (done, wait) = channel::<()>();
            let worker = scope.spawn(move || {
                let result = work();
                drop(done);
                result
            });
            let mut interrupted = None;
            while let Err(RecvTimeoutError::Timeout) = wait.recv_timeout(SIGNAL_INTERVAL) {
                if let Err(error) = Python::attach(look) {
                    interrupted = Some(error);
                    control.cancel();
                    break;
                }
            }
            let result = worker.join().expect("the solver does not panic");
            interrupted.map_or_else(|| result.map_err(PyErr::from), Err)
        })
    })?;
    look(py)?;
    Ok(result)
}

/// What `solve` and `solve_pairs` have in common.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
struct Arguments<'py> {
    weight: PyReadonlyArray2<'py, f64>,
    bias: Option<PyReadonlyArray1<'py, f64>>,
    latents: LatentArray<'py>,
    classes: Vec<usize>,
    quantile: f64,
    engine: String,
    tol: f64,
    threads: Option<usize>,
    progress: Option<Bound<'py, PyAny>>,
}

impl Arguments<'_> {
    fn run(
        &self,
        py: Python<'_>,
        control: &Control,
        work: impl FnOnce(&Problem, &[usize], &Settings) -> Result<Vec<Solution>, ProblemError> + Send,
    ) -> PyResult<(Vec<Solution>, Vec<f64>)> {
        let settings = Settings {
            quantile: self.quantile,
            engine: engine_named(&self.engine)?,
            tol: self.tol,
            threads: self.threads,
        };
        let (weight, bias) = (self.weight.as_array(), self.bias.as_ref().map(|b| b.as_array()));
        let latents = match &self.latents {
            LatentArray::F32(z) => Latents::F32(z.as_array()),
            LatentArray::F64(z) => Latents::F64(z.as_array()),
            &LatentArray::Elsewhere((samples, longest)) => Latents::Elsewhere {
                samples,
                dim: weight.ncols(),
                longest,
            },
        };
        let classes = &self.classes;
        interruptible(py, self.progress.as_ref(), control, || {
            settings.check()?;
            on_threads(settings.threads, || {
                let solutions = work(&Problem::new(weight, bias, latents)?, classes, &settings)?;
                let shifts = shifts_of(&solutions);
                Ok((solutions, shifts))
            })?
        })
    }
}

/// See `_rust.pyi`.
#[pyfunction]
fn solve<'py>(py: Python<'py>, arguments: Arguments<'py>) -> PyResult<Bound<'py, PyDict>> {
    let control = Control::default();
    let solutions = arguments.run(py, &control, |problem, classes, settings| {
        batch::solve(problem, classes, settings, &control)
    })?;
    columns(py, solutions, &control)
}

/// See `_rust.pyi`.
#[pyfunction]
fn solve_pairs<'py>(py: Python<'py>, arguments: Arguments<'py>, labels: Vec<usize>) -> PyResult<Bound<'py, PyDict>> {
    let control = Control::default();
    let solutions = arguments.run(py, &control, |problem, targets, settings| {
        batch::solve_pairs(problem, targets, &labels, settings, &control)
    })?;
    columns(py, solutions, &control)
}

/// See `_rust.pyi`.
#[pyfunction]
fn solve_margins<'py>(
    py: Python<'py>,
    arguments: Arguments<'py>,
    margins: PyReadonlyArray2<'py, f32>,
    samples: PyReadonlyArray2<'py, i32>,
    unit: f64,
) -> PyResult<Bound<'py, PyDict>> {
    let control = Control::default();
    let (margins, samples) = (margins.as_array(), samples.as_array());
    let solutions = arguments.run(py, &control, |problem, targets, settings| {
        batch::solve_margins(problem, targets, (margins, unit), samples, settings, &control)
    })?;
    columns(py, solutions, &control)
}

/// The one large column, one row a solution; empty for pairs.
fn shifts_of(solutions: &[Solution]) -> Vec<f64> {
    let dim = solutions.first().map_or(0, |s| s.shift.len());
    let mut shifts = vec![0.0; solutions.len() * dim];
    let rows = shifts.par_chunks_mut(dim.max(1)).zip(solutions);
    rows.for_each(|(row, s)| row.copy_from_slice(&s.shift));
    shifts
}

/// Struct of arrays.
fn columns<'py>(py: Python<'py>, (solutions, shifts): (Vec<Solution>, Vec<f64>), control: &Control) -> PyResult<Bound<'py, PyDict>> {
    let out = PyDict::new(py);
    let floats = |get: fn(&Solution) -> f64| PyArray1::from_iter(py, solutions.iter().map(get));
    let bytes = |get: fn(&Solution) -> u8| PyArray1::from_iter(py, solutions.iter().map(get));
    let flat = |get: fn(&Solution) -> &[usize]| PyArray1::from_iter(py, solutions.iter().flat_map(get).map(|&v| v as i64));
    let mut indptr = vec![0i64];
    for s in &solutions {
        indptr.push(indptr[indptr.len() - 1] + s.active.len() as i64);
    }
    let indices = |get: fn(&Solution) -> usize| PyArray1::from_iter(py, solutions.iter().map(|s| get(s) as i64));
    out.set_item("classes", indices(|s| s.class))?;
    out.set_item("sources", indices(|s| s.source))?;
    out.set_item("norms", floats(|s| s.norm))?;
    out.set_item("status", bytes(|s| status_code(s.status)))?;
    out.set_item("perturbations", PyArray1::from_vec(py, shifts))?;
    out.set_item("indptr", PyArray1::from_vec(py, indptr))?;
    out.set_item("active", flat(|s| &s.active))?;
    out.set_item(
        "multipliers",
        PyArray1::from_iter(py, solutions.iter().flat_map(|s| s.multipliers.iter().copied())),
    )?;
    out.set_item("samples", flat(|s| &s.samples))?;
    out.set_item("bound", floats(|s| s.bound))?;
    out.set_item("primal_residual", floats(|s| s.primal))?;
    out.set_item("dual_residual", floats(|s| s.dual))?;
    out.set_item("gap", floats(|s| s.gap))?;
    out.set_item("iterations", indices(|s| s.iterations))?;
    out.set_item("engine", bytes(|s| engine_code(s.engine)))?;
    out.set_item(
        "stage_seconds",
        STAGES.into_iter().zip(control.seconds()).collect::<HashMap<_, _>>(),
    )?;
    Ok(out)
}

#[pymodule]
fn _rust(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_function(wrap_pyfunction!(solve, module)?)?;
    module.add_function(wrap_pyfunction!(solve_pairs, module)?)?;
    module.add_function(wrap_pyfunction!(solve_margins, module)?)
}
