"""The default method, from the traits of a flow and the tolerance."""

import diffrax

from gradflow.protocols import lacking_for_second_order
from gradflow.solvers._automatic import Automatic
from gradflow.solvers._catching_up import CatchingUp
from gradflow.solvers._hybrid import Hybrid
from gradflow.solvers._method import AbstractMethod
from gradflow.solvers._nystrom import Nystrom
from gradflow.solvers._rkc2 import RKC2

TIGHT = 1e-7
"""Tolerance below which the explicit method is one of order eight."""
OSCILLATING = 3e-6
"""The same for flows that oscillate, where fast modes have to be followed for many periods."""
LOOSE = 5e-4
"""Tolerance from which on oscillations that the Hessian damps, as in Nesterov's flow, are left to a method of order
three: stability is what limits its steps, and costs it least."""
REAL = 1e-6, 1e-3
"""Tolerances between which flows of real spectrum that limit their steps get `RKC2`. On two features learned from
1e-1000 it takes 2,391 gradients at 1e-5, `Tsit5` over 120,000. Its errors fall like `rtol^(2/3)` only; at 1e-2 the
times at which features are learned are off by more than the step control of `Tsit5` lets them be."""
KINKED = 1e-6
"""Tolerance from which on flows with kinks get a method for them."""


def default_solver(rtol: float, flow: object = None, kinked: bool = False) -> diffrax.AbstractSolver | AbstractMethod:
    """The method that `solve` takes unless told otherwise.

    `Automatic`; an explicit Runge-Kutta method where the flow oscillates or limits its steps; `Hybrid` at kinks.

    The field of a ReLU network jumps where an activation pattern changes, and so do those with other kinks. There no
    method is of more than order one, the histories of multistep methods are worth little, and what counts is that steps
    are cheap. For an error of 1e-3 on two hidden layers `Hybrid` takes little more than half of the gradients of
    `ROCK2`, and a sixth of those of `NDF`; from a start of 1e-4 through the escape, a third and a half.

    Of the flows that limit their steps, those of real spectrum get `RKC2`: features that are learned make them stiff,
    and an ordinary explicit method would stay at the edge of its stability to the end. It is not `Hybrid`, as `ROCK2`
    is blind where a feature appears: until then the slope is constant, and its error estimate evaluates no slope at the
    new state. From 1e-1000 it steps over that wall to where `beta` is 1e22, and nothing leads back.

    Flows that are held at the edge of stability get `CatchingUp`, which is made for them.

    Smooth flows that oscillate get `Nystrom` where no velocity but constant damping enters, as with the heavy ball.

    The explicit method, alone or within `Automatic`, is `Tsit5`, of order five, or `Dopri8`, of order eight, where the
    tolerance is tight, or somewhat earlier, where the flow oscillates.

    >>> import gradflow as gf
    >>> type(gf.solvers.default_solver(1e-9).explicit).__name__
    'Dopri8'
    """
    if getattr(flow, "constrained", False):
        return CatchingUp()
    oscillates = getattr(flow, "oscillatory", False)
    explicit = diffrax.Tsit5() if rtol >= (OSCILLATING if oscillates else TIGHT) else diffrax.Dopri8()
    if oscillates and not kinked and not lacking_for_second_order(flow):
        return Nystrom()
    if oscillates and rtol >= LOOSE:
        explicit = diffrax.Bosh3()
    limited = getattr(flow, "step_limited", False)
    if limited and getattr(flow, "real_spectrum", False) and not oscillates and REAL[0] <= rtol <= REAL[1]:
        return RKC2()
    if oscillates or limited:
        return explicit
    return Hybrid() if kinked and rtol >= KINKED else Automatic(explicit)


def describe_choice(rtol: float, flow: object, kinks: tuple[str, ...] | None) -> str:
    """Why `default_solver` chooses as it does, in a few words; empty where nothing is known of kinks.

    >>> import gradflow as gf
    >>> flow = gf.GradientFlow(lambda w: w**2)
    >>> from gradflow.solvers._default import describe_choice
    >>> describe_choice(1e-5, flow, ("max",)), describe_choice(1e-5, flow, ())
    ('kinks: max', 'smooth')
    """
    words = ["oscillates"] if getattr(flow, "oscillatory", False) else []
    words += ["limits its steps"] if getattr(flow, "step_limited", False) else []
    words += ["held at the edge of stability"] if getattr(flow, "constrained", False) else []
    if kinks:
        words.append(f"kinks: {', '.join(kinks)}")
        if rtol < KINKED and len(words) == 1:
            words.append(f"rtol below {KINKED:g}")
    elif kinks is not None and not words:
        words.append("smooth")
    return "; ".join(words)
