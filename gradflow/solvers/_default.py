"""The default method, from the tolerance."""

import diffrax


def default_solver(rtol: float) -> diffrax.AbstractSolver:
    """A fifth-order explicit Runge-Kutta method, or an eighth-order one where the tolerance is tight.

    Stability limits both to steps of about `3 / sharpness` on a gradient flow.

    >>> import gradflow as gf
    >>> type(gf.solvers.default_solver(1e-9)).__name__
    'Dopri8'
    """
    return diffrax.Tsit5() if rtol >= 1e-7 else diffrax.Dopri8()
