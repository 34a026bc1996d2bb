"""The default method, from the traits of a flow and the tolerance."""

from typing import Any

import diffrax

from gradflow.solvers._automatic import Automatic
from gradflow.solvers._method import AbstractMethod

TIGHT = 1e-7
"""Tolerance below which the explicit method is one of order eight."""
OSCILLATING = 3e-6
"""The same for flows that oscillate, where fast modes have to be followed for many periods: on smooth problems order
eight is the cheaper one from errors of 1e-2 down, by a sixth at 1e-5, but on ReLU networks it takes ten times more."""


def default_solver(rtol: float, flow: Any = None) -> diffrax.AbstractSolver | AbstractMethod:
    """`Automatic`; an explicit Runge-Kutta method where the flow oscillates or limits its steps.

    The explicit method, alone or within `Automatic`, is `Tsit5`, of order five, or `Dopri8`, of order eight, where the
    tolerance is tight, or somewhat earlier, where the flow oscillates.

    >>> import gradflow as gf
    >>> type(gf.solvers.default_solver(1e-9).explicit).__name__
    'Dopri8'
    """
    oscillates = getattr(flow, "oscillatory", False)
    explicit = diffrax.Tsit5() if rtol >= (OSCILLATING if oscillates else TIGHT) else diffrax.Dopri8()
    alone = oscillates or getattr(flow, "limited", False)
    return explicit if alone else Automatic(explicit)
