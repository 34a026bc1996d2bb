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
    """`Automatic`; an explicit Runge-Kutta method where the flow oscillates, or must keep what is far below tolerance.

    The explicit method, alone or within `Automatic`, is `Tsit5`, of order five, or `Dopri8`, of order eight, where the
    tolerance is tight, or somewhat earlier, where the flow oscillates.

    >>> import gradflow as gf
    >>> type(gf.solvers.default_solver(1e-9).explicit).__name__
    'Dopri8'
    """
    flow_oscillates = flow is not None and flow.oscillatory
    explicit = diffrax.Tsit5() if rtol >= (OSCILLATING if flow_oscillates else TIGHT) else diffrax.Dopri8()
    only_explicit = flow_oscillates or (flow is not None and flow.keeps_small)
    return explicit if only_explicit else Automatic(explicit)
