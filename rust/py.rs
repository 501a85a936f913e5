//! The bindings: arrays in, arrays out. No arithmetic, and the only file that names pyo3 or numpy. May use: batch, problem.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use numpy::{PyArray1, PyReadonlyArray1, PyReadonlyArray2};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::batch::{self, Solution};
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

/// Runs `work` on another thread with the GIL released, and raises what Ctrl-C raises while it runs.
fn interruptible<T: Send>(py: Python<'_>, work: impl FnOnce(&Arc<AtomicBool>) -> T + Send) -> PyResult<T> {
    let cancel = Arc::new(AtomicBool::new(false));
    py.detach(|| {
        std::thread::scope(|scope| {
            let (done, wait) = channel::<()>();
            let worker = scope.spawn(|| {
                let result = work(&cancel);
                drop(done);
                result
            });
            let mut interrupted = None;
            while let Err(RecvTimeoutError::Timeout) = wait.recv_timeout(SIGNAL_INTERVAL) {
                if let Err(error) = Python::attach(|py| py.check_signals()) {
                    interrupted = Some(error);
                    cancel.store(true, Ordering::Relaxed);
                    break;
                }
            }
            let result = worker.join().expect("the solver does not panic");
            interrupted.map_or(Ok(result), Err)
        })
    })
}

/// See `_rust.pyi`.
#[pyfunction]
#[pyo3(signature = (weight, bias, latents, classes, quantile, engine, tol, threads))]
#[allow(clippy::too_many_arguments)]
fn solve<'py>(
    py: Python<'py>,
    weight: PyReadonlyArray2<'py, f64>,
    bias: Option<PyReadonlyArray1<'py, f64>>,
    latents: LatentArray<'py>,
    classes: Vec<usize>,
    quantile: f64,
    engine: &str,
    tol: f64,
    threads: Option<usize>,
) -> PyResult<Bound<'py, PyDict>> {
    let settings = Settings {
        quantile,
        engine: engine_named(engine)?,
        tol,
        threads,
    };
    let (weight, bias) = (weight.as_array(), bias.as_ref().map(|b| b.as_array()));
    let latents = match &latents {
        LatentArray::F32(z) => Latents::F32(z.as_array()),
        LatentArray::F64(z) => Latents::F64(z.as_array()),
    };
    let solutions = interruptible(py, |cancel| {
        let problem = Problem::new(weight, bias, latents)?;
        batch::solve(&problem, &classes, &settings, cancel)
    })??;
    columns(py, &solutions)
}

/// Struct of arrays.
fn columns<'py>(py: Python<'py>, solutions: &[Solution]) -> PyResult<Bound<'py, PyDict>> {
    let out = PyDict::new(py);
    let floats = |get: fn(&Solution) -> f64| PyArray1::from_iter(py, solutions.iter().map(get));
    let bytes = |get: fn(&Solution) -> u8| PyArray1::from_iter(py, solutions.iter().map(get));
    let flat = |get: fn(&Solution) -> &[usize]| PyArray1::from_iter(py, solutions.iter().flat_map(get).map(|&v| v as i64));
    let mut indptr = vec![0i64];
    for s in solutions {
        indptr.push(indptr[indptr.len() - 1] + s.active.len() as i64);
    }
    out.set_item("norms", floats(|s| s.norm))?;
    out.set_item("status", bytes(|s| status_code(s.status)))?;
    out.set_item(
        "perturbations",
        PyArray1::from_iter(py, solutions.iter().flat_map(|s| s.shift.iter().copied())),
    )?;
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
    out.set_item("iterations", PyArray1::from_iter(py, solutions.iter().map(|s| s.iterations as i64)))?;
    out.set_item("engine", bytes(|s| engine_code(s.engine)))?;
    Ok(out)
}

#[pymodule]
fn _rust(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_function(wrap_pyfunction!(solve, module)?)
}
