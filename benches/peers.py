"""The other solvers, one function each: the QP of a class and a tolerance in, its shift (d,) and the iterations out (None: not told).

Each is posed in the form that suited it best of those tried on these problems (primal, dual, least distance on the rows or on a Cholesky
factor of their Gram matrix); settings that did not pay are not there. All run on one thread but the last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from cases import ClassQP, Floats

Answer = tuple[Floats, int | None]
#: Where a run of pytest lists the solvers that failed the accuracy gate.
FAILED = pytest.StashKey[list[dict[str, str]]]()
#: Instead of "no bound", for solvers that compute with their bounds.
_FAR = 1e30


def cvxpy_clarabel(qp: ClassQP, tol: float) -> Answer:
    """As published: the primal problem, handed to a modelling language."""
    import cvxpy

    s = cvxpy.Variable(qp.dim)
    problem = cvxpy.Problem(cvxpy.Minimize(0.5 * cvxpy.sum_squares(s)), [qp.rows() @ s >= qp.r])
    problem.solve(solver=cvxpy.CLARABEL, max_threads=1, tol_gap_abs=tol, tol_gap_rel=tol, tol_feas=tol)
    return s.value, problem.solver_stats.num_iters


def clarabel_primal(qp: ClassQP, tol: float) -> Answer:
    """min ½‖s‖² subject to slack = A s - r ≥ 0."""
    from scipy import sparse

    rows = sparse.csc_matrix(-qp.rows())
    solution = _clarabel(sparse.identity(qp.dim, format="csc"), np.zeros(qp.dim), rows, -qp.r, tol, "auto")
    return np.array(solution.x), solution.iterations


def clarabel_dual(qp: ClassQP, tol: float) -> Answer:
    """min ½ λᵀAAᵀλ - rᵀλ over λ ≥ 0; dense, so its supernodal factorisation pays."""
    from scipy import sparse

    m = len(qp.r)
    gram = sparse.triu(sparse.csc_matrix(qp.gram()), format="csc")
    solution = _clarabel(gram, -qp.r, -sparse.identity(m, format="csc"), np.zeros(m), tol, "faer")
    return qp.shift(np.maximum(solution.x, 0)), solution.iterations


def _clarabel(p: Any, q: Floats, a: Any, b: Floats, tol: float, linear_solver: str) -> Any:
    import clarabel

    settings = clarabel.DefaultSettings()
    settings.verbose, settings.max_threads, settings.direct_solve_method = False, 1, linear_solver
    settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = tol
    return clarabel.DefaultSolver(p, q, a, b, [clarabel.NonnegativeConeT(len(b))], settings).solve()


def daqp(qp: ClassQP, tol: float) -> Answer:
    """A dual active-set method, whose own form is the least-distance problem: no Hessian means the identity."""
    import daqp as solver

    m = len(qp.r)
    s, _, flag, info = solver.solve(None, np.zeros(qp.dim), qp.rows(), np.full(m, _FAR), qp.r, primal_tol=tol)
    if flag != 1:
        raise ArithmeticError(f"exit flag {flag}")
    return s, info["iterations"]


def nnls_rows(qp: ClassQP, tol: float) -> Answer:
    """Lawson & Hanson 1974, ch. 23: least distance as min ‖[Aᵀ; rᵀ] u - e‖ over u ≥ 0. It knows no tolerance and counts nothing."""
    return _nnls(qp, qp.rows().T)


def nnls_factor(qp: ClassQP, tol: float) -> Answer:
    """The same with Lᵀ for Aᵀ, where A Aᵀ = L Lᵀ: smaller while C < d."""
    return _nnls(qp, np.linalg.cholesky(qp.gram()).T)


def _nnls(qp: ClassQP, columns: Floats) -> Answer:
    from scipy.optimize import nnls

    stacked = np.vstack([columns, qp.r])
    target = np.zeros(len(stacked))
    target[-1] = 1
    u, _ = nnls(stacked, target, maxiter=10 * len(qp.r))
    # The residual's last entry, 1 - rᵀu, is positive unless the constraints contradict one another.
    return qp.shift(u / (1 - qp.r @ u)), None


def proxqp_dual(qp: ClassQP, tol: float) -> Answer:
    """min ½ λᵀAAᵀλ - rᵀλ, λ ≥ 0 as a box."""
    solver = _proxqp_dual(qp, tol)
    solver.solve()
    return _proxqp_answer(qp, solver)


def proxqp_factor(qp: ClassQP, tol: float) -> Answer:
    """Least distance on the Cholesky factor: min ½‖y‖² subject to L y ≥ r, and s = Aᵀ L⁻ᵀ y."""
    import proxsuite
    from scipy.linalg import solve_triangular

    dense = proxsuite.proxqp.dense
    m, factor = len(qp.r), np.linalg.cholesky(qp.gram())
    solver = dense.QP(m, 0, m, False, dense.HessianType.Diagonal, dense.DenseBackend.PrimalDualLDLT)
    solver.init(np.eye(m), np.zeros(m), None, None, factor, qp.r, np.full(m, _FAR))
    solver.settings.eps_abs, solver.settings.eps_rel = tol, 0
    solver.solve()
    multipliers = solve_triangular(factor, solver.results.x, lower=True, trans=1, check_finite=False)
    return qp.shift(multipliers), solver.results.info.iter


def proxqp_batch(qps: Sequence[ClassQP], tol: float) -> list[Answer]:
    """Several classes at once on two threads: solved in parallel; set up one by one, there is no other way."""
    import proxsuite

    dense = proxsuite.proxqp.dense
    batch = dense.VectorQP()
    for qp in qps:
        batch.append(_proxqp_dual(qp, tol))
    dense.solve_in_parallel(batch, 2)
    return [_proxqp_answer(qp, solver) for qp, solver in zip(qps, batch, strict=True)]


def _proxqp_dual(qp: ClassQP, tol: float) -> Any:
    import proxsuite

    dense, m = proxsuite.proxqp.dense, len(qp.r)
    solver = dense.QP(m, 0, 0, True, dense.HessianType.Dense, dense.DenseBackend.PrimalLDLT)
    solver.init(qp.gram(), -qp.r, None, None, None, None, None, np.zeros(m), np.full(m, _FAR))
    solver.settings.eps_abs, solver.settings.eps_rel = tol, 0
    return solver


def _proxqp_answer(qp: ClassQP, solver: Any) -> Answer:
    return qp.shift(np.maximum(solver.results.x, 0)), solver.results.info.iter


@dataclass(frozen=True)
class Peer:
    """A solver as it appears in the table."""

    name: str
    module: str
    solve: Callable[[ClassQP, float], Answer]
    #: What it is asked for, loosest first: the first that passes the accuracy gate is used.
    tolerances: tuple[float, ...]


_INTERIOR = (1e-6, 1e-7, 1e-8)
_PROXIMAL = (1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9, 1e-10, 1e-11)
ACTIVE_SET_PEERS = [
    Peer("DAQP, least distance", "daqp", daqp, (1e-6,)),
    Peer("scipy NNLS, rows", "scipy", nnls_rows, (0.0,)),
    Peer("scipy NNLS, factor", "scipy", nnls_factor, (0.0,)),
]
PEERS = [
    Peer("cvxpy + Clarabel", "cvxpy", cvxpy_clarabel, _INTERIOR),
    Peer("Clarabel, primal", "clarabel", clarabel_primal, _INTERIOR),
    Peer("Clarabel, dual", "clarabel", clarabel_dual, _INTERIOR),
    *ACTIVE_SET_PEERS,
    Peer("ProxQP, dual", "proxsuite", proxqp_dual, _PROXIMAL),
    Peer("ProxQP, factor", "proxsuite", proxqp_factor, _PROXIMAL),
]
