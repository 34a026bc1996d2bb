"""The learning-rate schedule of lowest final risk, by differentiating through the order-parameter flow."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from gradflow import _checks
from gradflow.flows import InterpolatedSchedule, OrderParameterFlow
from gradflow.problems import OrderParameters
from gradflow.runs._solve import solve


class OptimalSchedule(NamedTuple):
    """`schedule`: the best one met; `risk`: its risk at the end, and `constant_risk` that of the factor one throughout;
    `history (iterations,)`: the risk of every schedule tried."""

    schedule: InterpolatedSchedule
    risk: float
    constant_risk: float
    history: np.ndarray


def optimal_schedule(
    flow: OrderParameterFlow,
    params: OrderParameters,
    horizon: float,
    *,
    knots: int = 6,
    iterations: int = 60,
    step: float = 0.15,
    rtol: float = 1e-5,
) -> OptimalSchedule:
    """The schedule of learning rates that minimises the risk of one-pass SGD.

    The risk is that at `t = horizon`, after `horizon d / g` samples.

    The schedule is interpolated between `knots` factors, equally spaced in time. The derivative of the final risk with
    respect to them is exact, by forward mode through the solve; Adam takes steps of size `step` in the logarithms.

    **Arguments**: `flow`: its `schedule` has to be `None`; its `gamma_over_p` is the unit. `params`: the start.

    **Returns** an `OptimalSchedule`, of a local minimum.

    **Raises** `ValueError` for another flow or one with a schedule, and for numbers that are not positive.

    >>> import gradflow as gf, jax
    >>> problem = gf.TeacherStudent.orthogonal(dim=100, units=1, noise=0.1)
    >>> start = problem.order_parameters(problem.informed(1, jax.random.key(0)))
    >>> flow = gf.OrderParameterFlow(problem, gamma_over_p=1.0)
    >>> result = gf.studies.optimal_schedule(flow, start, 10.0, knots=2, iterations=3)
    >>> result.risk <= result.constant_risk
    True
    """
    _checks.check_positive("horizon", horizon)
    _checks.check_count("knots", knots)
    _checks.check_count("iterations", iterations)
    _checks.check_positive("step", step)
    if not isinstance(flow, OrderParameterFlow):
        raise _checks.fail("flow", "be a gradflow.OrderParameterFlow", f"of type {type(flow).__name__}")
    if flow.schedule is not None:
        raise _checks.fail("flow", "have no schedule of its own", "one with a schedule", "Leave `schedule` out.")
    ts = np.linspace(0, horizon, knots) if knots > 1 else np.zeros(1)
    scheduled = OrderParameterFlow(
        flow.P,
        flow.activation,
        gamma_over_p=flow.gamma_over_p,
        noise=flow.noise,
        normalised=flow.normalised,
        terms=flow.groups,
        dim=flow.dim,
        schedule=InterpolatedSchedule(ts, np.ones(knots)),
        teacher_output=flow.teacher_output,
        second_layer_rate=flow.second_layer_rate,
        batch_size=flow.batch_size,
        allow_float32=flow.allow_float32,
    )

    @eqx.filter_jit
    def value_and_gradient(
        logs: Float[Array, " knots"], scheduled: OrderParameterFlow, params: OrderParameters
    ) -> tuple[Float[Array, ""], Float[Array, " knots"]]:
        def log_risk(logs: Float[Array, " knots"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
            mine = eqx.tree_at(lambda f: f.schedule.log_factors, scheduled, logs)
            value = jnp.log(mine.risk(solve(mine, params, [horizon], rtol=rtol, save_params=False, throw=False).final))
            return value, value

        slope, value = jax.jacfwd(log_risk, has_aux=True)(logs)
        return value, slope

    logs: PyTree = jnp.zeros(knots)  # one array, which optax takes as any pytree
    rule = optax.adam(step)
    memory = rule.init(logs)
    history, best, lowest = [], logs, np.inf
    for _ in range(iterations):
        value, slope = value_and_gradient(logs, scheduled, params)
        history.append(float(np.exp(value)))
        if np.isfinite(history[-1]) and history[-1] < lowest:
            best, lowest = logs, history[-1]
        move, memory = rule.update(slope, memory)
        logs = optax.apply_updates(logs, move)
    schedule = InterpolatedSchedule(ts, np.exp(np.asarray(best)))
    return OptimalSchedule(schedule, lowest, history[0], np.array(history))
