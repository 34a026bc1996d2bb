"""`first_escape`: the first feature of a vanishing start, at a cost that does not depend on how small the start is."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gradflow import _checks
from gradflow.flows import PolarFlow
from gradflow.models._polar import Polar
from gradflow.observables import Aligned, Correlation, KKTResidual, LogNorm
from gradflow.problems import EmpiricalRisk, NeuralCorrelation
from gradflow.runs._solve import solve
from gradflow.runs._until import Until


class FirstEscape(eqx.Module):
    """What `first_escape` found.

    - `time`: at which `|w|` reaches `norm`, for degree `k > 2` in units of `delta^(2 - k)`; `state`: where, a `Polar`
      to go on from.
    - `aligned`: time (likewise) and log-norm at which the direction came to rest; `correlation`: `N` there.
    - `slope`: in degree 2 `1 / (2 N)`, with `time = slope * ln(norm/delta) + offset`; beyond, `1 / (k (k - 2) N)`, the
      time of a start on the ray, with `time = slope + offset`. `residual`: relative KKT residual.
    - `gradient_evaluations`: spent in all.
    """

    time: Float[Array, ""]
    state: Polar
    aligned: tuple[Float[Array, ""], Float[Array, ""]]
    correlation: Float[Array, ""]
    slope: Float[Array, ""]
    offset: Float[Array, ""]
    residual: Float[Array, ""]
    gradient_evaluations: Int[Array, ""]


def first_escape(
    problem: EmpiricalRisk,
    start: Polar,
    *,
    degree: int = 2,
    norm: float = 1e-3,
    tolerance: float = 1e-5,
    rtol: float = 1e-8,
    horizon: float = 1e6,
) -> FirstEscape:
    """When, and in which direction, a homogeneous network escapes from zero.

    From a start of any size to `|w| = norm`.

    The flow is integrated until the direction is a KKT point to a tolerance, which takes a time that does not depend on
    the size of the start. From there the norm grows exactly like `exp(2 N t)` but for relative errors of the order of
    the tolerance squared, until the loss takes part: that stretch is jumped over. What the direction still lacks of
    its point, and with it the later features, is lost; to follow these integrate `PolarFlow` all the way.

    In degree `k > 2` the norm does not grow exponentially but blows up: along a ray `|w|^(2 - k)` falls at the rate
    `k (k - 2) N`. The integration is in Sundman time, and times are in units of `delta^(2 - k)`; for `delta -> 0` the
    time is the blow-up constant of the flow of `N` from the direction of the start.

    **Arguments**

    - `problem`, `start`, `degree`: as for `PolarFlow`. Smooth ReLU, with `predict=gradflow.models.Smoothed(...)`:
      along its kinks the direction never comes to rest to such a tolerance.
    - `norm`: of the weights to reach; the loss changes the rate by about `norm^2`, which is left out.
    - `tolerance`: relative KKT residual at which the direction counts as aligned. `rtol`: of the integration.
    - `horizon`: flow time (in degree `k > 2` Sundman time) at which the alignment is given up.

    **Returns** a `FirstEscape`. **Raises** `ValueError` as `PolarFlow` does, for numbers that are not positive, and for
    a start that is no `Polar` with a single `log_norm`, is above `norm`, or does not align before the horizon, as where
    the weights collapse towards zero instead; `SolveError` if the integration fails.

    >>> import gradflow as gf, jax, jax.numpy as jnp
    >>> problem = gf.EmpiricalRisk(jnp.eye(2), jnp.array([2.0, 1.0]), gf.losses.square, reduction="sum")
    >>> model = gf.models.TwoLayer(2, 3, activation=lambda z: z, key=jax.random.key(0))
    >>> result = gf.first_escape(problem, gf.Polar(model, log_norm=-1e6))
    >>> round(float(result.slope), 6), round(5**-0.5, 6)  # labels of norm sqrt(5)
    (0.447214, 0.447214)
    """
    _checks.check_positive("norm", norm)
    _checks.check_positive("horizon", horizon)
    _checks.check_count("degree", degree, least=2)
    if not isinstance(start, Polar) or start.log_norm.ndim:
        what = f"one with {start.log_norm.size}" if isinstance(start, Polar) else f"of type {type(start).__name__}"
        advice = "For instance gradflow.Polar(model, log_norm=-100.0)."
        raise _checks.fail("start", "be a gradflow.Polar with one log_norm", what, advice)
    target = jnp.log(jnp.asarray(norm, start.log_norm.dtype))
    if _checks.is_concrete(start.log_norm) and not float(start.log_norm) < float(target):
        raise _checks.fail("start", f"be below the norm {norm:g}", f"at log_norm = {float(start.log_norm):g}")
    correlation, exponent = NeuralCorrelation(problem, degree), degree - 2
    until = Until(Aligned(correlation, tolerance=tolerance, norm=norm), above=0.0)
    flow = PolarFlow(problem, degree, longest_step=None, time="sundman" if exponent else "physical")
    observe = {"value": Correlation(correlation), "residual": KKTResidual(correlation)}
    begin = Polar(start.direction, start.log_norm)
    sol = solve(flow, begin, [horizon], rtol=rtol, until=until, save_params=False)
    if sol.status == "ok":
        advice = "Its weights decay, or the residuals at the origin are too small; raise horizon."
        raise _checks.fail("start", f"align before t = {horizon:g}", "one that does not", advice)
    observed = {name: fn(sol.final) for name, fn in observe.items()}
    rho = LogNorm()(sol.final)
    remaining = jnp.maximum(target - rho, 0)
    if exponent:
        t, slope = sol.final.clock, 1 / (degree * exponent * observed["value"])
        left = jnp.exp(-exponent * (rho - start.log_norm)) * -jnp.expm1(-exponent * remaining)
        time = t + slope * left
        offset = time - slope
    else:
        t = sol.t_final
        slope = (1 / (2 * observed["value"])).astype(t.dtype)
        time = t + slope * remaining.astype(t.dtype)
        offset = time - slope * (target - start.log_norm).astype(t.dtype)
    state = Polar(sol.final.direction, rho + remaining, time if exponent else 0.0)
    cost = sol.stats["gradient_evaluations"]
    return FirstEscape(time, state, (t, rho), observed["value"], slope, offset, observed["residual"], cost)
