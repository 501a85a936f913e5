"""Everything this package raises on purpose. May import: nothing."""

from __future__ import annotations


class TacfastError(Exception):
    """Root of the package's errors; the command line turns any of them into one line and exit code 2."""


class ProblemError(TacfastError, ValueError):
    """Arrays or options that cannot be what was meant: wrong shape, dtype, range, or not finite."""


class ModelError(TacfastError, TypeError):
    """A model whose last layer is not linear in a latent, or which cannot be run on the data given."""


class CheckpointError(TacfastError, ValueError):
    """A model or data file that cannot be read, or must not be."""


class SolveError(TacfastError, RuntimeError):
    """A class ended without a certificate where a certified answer is needed."""
