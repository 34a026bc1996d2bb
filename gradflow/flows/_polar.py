"""Gradient flow of homogeneous networks in polar coordinates, `w = exp(rho) u` with `|u| = 1`."""

from typing import ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PyTree, Scalar

from gradflow._checks import check_choice, check_count, check_positive, fail, is_concrete
from gradflow._conserved import Conserved
from gradflow._tree import join, scaled_norm, tree_norm
from gradflow.flows._base import AbstractFlow
from gradflow.flows._gradient_flow import check_scalar, energy_and_balances
from gradflow.flows._traits import ErrorWeights
from gradflow.models._polar import Polar, neuron_rows, normalised, with_rows
from gradflow.problems import EmpiricalRisk
from gradflow.problems._correlation import check_degree, check_risk, polar_rate
from gradflow.protocols import TakesNeuronWeights, missing


class PolarState(eqx.Module):
    """`shift = rho - origin`: the clock of the escape keeps its digits, and errors in it are absolute ones of `rho`."""

    shift: Scalar
    direction: PyTree
    origin: Scalar
    clock: Scalar
    energy: Scalar  # integral of the squared gradient over physical time
    polar: bool = eqx.field(static=True)  # whether the run started from a `Polar`


class PolarFlow(AbstractFlow):
    """Gradient flow of a homogeneous model in polar coordinates.

    For degree `k`, with `w = exp(rho) u`, `|u| = 1`:

        rho' = exp((k - 2) rho) <g, u>          g = sum_i <r_i, grad H(x_i; u)>,    r_i = -dL/dp_i
        u'   = exp((k - 2) rho) (g - <g, u> u)      at the predictions p_i = exp(k rho) H(x_i; u)

    This is gradient flow `w' = -grad L(w)` itself, of any start however small: for `k = 2` no scale appears but in the
    predictions. Errors of `rho` are controlled absolutely, which makes them relative errors of the weights.

    **Time unit**: that of gradient flow, `t = k * learning_rate` at iterate `k`. With `time="sundman"`, for `k > 2`, it
    is `tau` with `d tau = exp((k - 2) rho) dt`, in which nothing is slow near zero; `Polar.clock` then carries
    `exp((k - 2) rho(0)) t`.

    **Arguments**

    - `problem`: an `EmpiricalRisk`. Its model must be homogeneous in all its parameters: no biases; (leaky) ReLU or
      linear. ReLU chatters along kinks, as always; `gradflow.models.Smoothed` is homogeneous too.
    - `degree`: `k`, at least 2: 2 for two layers, `L` for `L` layers, 3 for `a (w . x)^2`.
    - `time`: `"physical"` or `"sundman"`, which needs a start from a `gradflow.Polar`.
    - `longest_step`: largest change of `rho` in a step, and the rate of the fastest growth met limits later steps too:
      features that are still small grow while the whole rests, and an explicit method that is only kept stable gets
      their times wrong. `None`, for no limit, is right where nothing but the first feature is asked for.

    Errors of the direction are relative to the norm of each neuron, where the model has `neuron_weights`: those that
    have hardly grown, or collapse, keep their directions however small they are beside the rest, down to underflow of
    their share. Where that or starts of different sizes matter take `NeuronPolarFlow`. In other models, deep ones for
    instance, errors are relative to whole leaves, and the weights of units much smaller than the rest are not resolved.

    Starts from ordinary parameters or from a `gradflow.Polar`; `Solution.params` is of the same kind. Conserved, and
    reported as drifts: the energy, as for `GradientFlow`, and what the model conserves.

    **Raises** `ValueError` for other problems, a degree below two, an unknown `time`, and a `longest_step` that is not
    positive; so does `solve` for a model that is not homogeneous of that degree (tried on random parameters), and for a
    start at zero, which is a saddle.

    Source: A. Kumar and J. Haupt (2024), *Directional convergence near small initializations and saddles in
    two-homogeneous neural networks*, arXiv 2402.09226.

    >>> import gradflow as gf, jax, jax.numpy as jnp
    >>> problem = gf.EmpiricalRisk(jnp.eye(2), jnp.ones(2), gf.losses.square, reduction="sum")
    >>> start = gf.Polar(gf.models.TwoLayer(2, 3, activation=lambda z: z, key=jax.random.key(0)), log_norm=-2302.6)
    >>> until = gf.Until(gf.observables.LogNorm(), above=-1.0)
    >>> sol = gf.solve(gf.PolarFlow(problem), start, [1e4], until=until)
    >>> sol.status, round(float(sol.t_final / 2302.6), 2)  # labels of norm sqrt(2): |w| grows like exp(sqrt(2) t)
    ('stopped', 0.71)
    """

    problem: EmpiricalRisk
    degree: int = eqx.field(static=True)
    time: str = eqx.field(static=True)
    longest_step: Float[Array, ""] | None
    step_limited: ClassVar[bool] = True

    def __init__(
        self,
        problem: EmpiricalRisk,
        degree: int = 2,
        *,
        time: Literal["physical", "sundman"] = "physical",
        longest_step: ArrayLike | None = 0.5,
    ):
        self.problem = check_risk(problem)
        check_count("degree", degree, least=2, advice="A linear model has no saddle at zero.")
        check_choice("time", time, ("physical", "sundman"))
        self.longest_step = check_longest(longest_step)
        self.degree, self.time = degree, time

    @property
    def time_unit(self) -> str:
        return "tau, d tau = exp((k - 2) rho) dt" if self.time == "sundman" else "t = k * learning_rate"

    def init(self, trainable: PyTree, frozen: PyTree) -> PolarState:
        if isinstance(trainable, Polar):
            zero = jnp.zeros_like(trainable.log_norm)
            return PolarState(zero, trainable.direction, trainable.log_norm, trainable.clock, zero, True)
        direction, size = normalised(trainable)
        zero = jnp.zeros_like(size)
        return PolarState(zero, direction, jnp.log(size), zero, zero, False)

    def vector_field(self, t: Scalar, state: PolarState, frozen: PyTree) -> PolarState:
        static = frozen.direction if state.polar else frozen
        size = tree_norm(state.direction)
        unit = jax.tree_util.tree_map(lambda leaf: leaf / size, state.direction)
        rho, exponent = state.origin + state.shift, self.degree - 2
        amplitude = jnp.exp(self.degree * rho)
        rate, _ = polar_rate(self.problem, lambda u: self.problem.predictions(join(u, static)), unit, amplitude)
        radial = inner(rate, unit)
        tangent = jax.tree_util.tree_map(lambda g, u: g - radial * u, rate, unit)
        squared = radial**2 + inner(tangent, tangent)
        if self.time == "sundman":
            speed, clock = jnp.ones_like(rho), jnp.exp(-exponent * state.shift)
            energy = jnp.exp(self.degree * rho) * squared
        else:
            speed, clock = jnp.exp(exponent * rho), jnp.exp(exponent * state.origin)
            energy = jnp.exp(2 * (self.degree - 1) * rho) * squared
        turning = jax.tree_util.tree_map(lambda v: speed * v, tangent)
        return PolarState(speed * radial, turning, jnp.zeros_like(rho), clock.astype(rho.dtype), energy, state.polar)

    def params(self, state: PolarState) -> PyTree:
        polar = _polar(state)
        return polar if state.polar else polar.ordinary()

    def controlled(self, state: PolarState) -> PyTree:
        return state.shift, state.direction

    def error_weights(self, controlled: PyTree) -> ErrorWeights:
        weights = jnp.ones_like(controlled[0]), _neuron_sizes(controlled[1])
        return ErrorWeights(weights, plus_scale=False)

    def step_length_ratio(self, before: PyTree, after: PyTree) -> Scalar | None:
        if self.longest_step is None:
            return None
        return jnp.abs(after[0] - before[0]) / self.longest_step.astype(after[0].dtype)

    def loss(self, state: PolarState, frozen: PyTree) -> Float[Array, ""]:
        return self.problem(self._ordinary(state, frozen))

    def conserved(self, state: PolarState, frozen: PyTree) -> dict[str, Conserved]:
        params = self._ordinary(state, frozen)
        return energy_and_balances(self.problem, self.problem(params), state.energy, params)

    def check(self, trainable: PyTree, frozen: PyTree) -> None:
        polar = isinstance(trainable, Polar)
        if self.time == "sundman" and not polar:
            advice = "Start from gradflow.Polar.of(params), which carries the clock."
            raise fail(
                "params", 'be a gradflow.Polar when time="sundman"', f"of type {type(trainable).__name__}", advice
            )
        if polar and trainable.log_norm.ndim:
            advice = "gradflow.NeuronPolarFlow starts from one norm per neuron."
            raise fail("params", "have one log_norm", f"a Polar with {trainable.log_norm.size}", advice)
        direction, static = (trainable.direction, frozen.direction) if polar else (trainable, frozen)
        check_scalar(self.problem, join(direction, static))

    def check_values(self, trainable: PyTree, frozen: PyTree) -> None:
        polar = isinstance(trainable, Polar)
        direction, static = (trainable.direction, frozen.direction) if polar else (trainable, frozen)
        check_degree(self.problem, self.degree, direction, static)
        log_norm = trainable.log_norm if polar else jnp.log(normalised(trainable)[1])
        if self.time == "physical":
            check_moves(self.degree, log_norm)

    @property
    def remedy(self) -> str:
        return SUNDMAN if self.degree > 2 and self.time == "physical" else ""

    def _ordinary(self, state: PolarState, frozen: PyTree) -> PyTree:
        return join(_polar(state).ordinary(), frozen.direction if state.polar else frozen)


def _polar(state: PolarState) -> Polar:
    """The coordinates in a state, without the checks of a start."""
    unit, _ = normalised(state.direction)
    return bare_polar(unit, state.origin + state.shift, state.clock)


SUNDMAN = (
    "Above degree 2 the time in which a flow leaves zero is a power of one over the scale of its start, and steps are"
    ' far shorter at the end: gradflow.PolarFlow(problem, degree, time="sundman"), from a gradflow.Polar, has a time in'
    " which nothing is slow near zero."
)


def check_moves(degree: int, log_norms: Array) -> None:
    """Refuses a start so small that its speed `exp((k - 2) rho)` is zero in its floating-point type."""
    min_log = float(np.log(np.finfo(log_norms.dtype).tiny))
    largest = float(jnp.max(log_norms))
    if (degree - 2) * largest < min_log:
        must = f"have a norm above exp({min_log / (degree - 2):.0f}) in degree {degree}"
        raise fail("params", must, f"of norm exp({largest:.4g}), which does not move in {log_norms.dtype}", SUNDMAN)


def bare_polar(direction: PyTree, log_norm: Array, clock: Array) -> Polar:
    """A `Polar` of parts that need no check."""
    polar = object.__new__(Polar)
    for name, value in (("direction", direction), ("log_norm", log_norm), ("clock", clock)):
        object.__setattr__(polar, name, value)
    return polar


def _neuron_sizes(direction: PyTree) -> PyTree:
    """For every entry, the root mean square of the weights of its neuron; of its leaf, where there are no neurons."""
    if missing(direction, TakesNeuronWeights):
        return jax.tree_util.tree_map(lambda leaf: jnp.full_like(leaf, jnp.sqrt(jnp.mean(leaf**2))), direction)
    rows = neuron_rows(direction)
    sizes = jax.vmap(scaled_norm)(rows) / rows.shape[1] ** 0.5
    return with_rows(direction, jnp.broadcast_to(sizes[:, None], rows.shape))


def inner(one: PyTree, other: PyTree) -> Float[Array, ""]:
    """Euclidean inner product of two pytrees of arrays."""
    products = jax.tree_util.tree_map(lambda a, b: jnp.sum(a * b), one, other)
    return jnp.asarray(sum(jax.tree_util.tree_leaves(products)))


def check_longest(longest_step: ArrayLike | None) -> Float[Array, ""] | None:
    """The limit on the growth in a step as an array."""
    if longest_step is None:
        return None
    check_positive("longest_step", longest_step, "None sets no limit.")
    if is_concrete(longest_step) and jnp.ndim(longest_step):
        raise fail("longest_step", "be a scalar", f"of shape {jnp.shape(longest_step)}")
    return jnp.asarray(longest_step, float)
