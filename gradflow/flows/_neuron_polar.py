"""Gradient flow in polar coordinates neuron by neuron, `w_j = exp(rho_j) u_j` with `|u_j| = 1`."""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, PyTree, Scalar

from gradflow._checks import check_count, fail
from gradflow._conserved import Conserved
from gradflow._tree import join, split
from gradflow.flows._base import AbstractFlow
from gradflow.flows._gradient_flow import check_scalar, energy_and_balances
from gradflow.flows._polar import SUNDMAN, bare_polar, check_longest, check_moves
from gradflow.flows._traits import ErrorWeights
from gradflow.models._polar import Polar, neuron_rows, unit_rows, with_rows
from gradflow.problems import EmpiricalRisk
from gradflow.problems._correlation import check_degree, check_risk


class NeuronPolarState(eqx.Module):
    """As `PolarState`, with one `shift` and `origin` per neuron; all neurons of `direction` have length one."""

    shift: Float[Array, " width"]
    direction: PyTree
    origin: Float[Array, " width"]
    clock: Scalar
    energy: Scalar
    polar: bool = eqx.field(static=True)


class NeuronPolarFlow(AbstractFlow):
    """Gradient flow of homogeneous neurons, each in its own polar coordinates.

    For a sum `H(x; w) = sum_j h(x; w_j)` of neurons of degree `k`:

        rho_j' = exp((k - 2) rho_j) <g_j, u_j>          g_j = sum_i <r_i, grad h(x_i; u_j)>,    r_i = -dL/dp_i
        u_j'   = exp((k - 2) rho_j) (g_j - <g_j, u_j> u_j)

    Every neuron keeps its digits however small it is beside the others: between two saddles the neurons that wait are
    resolved as well as those that have fitted, and neurons may start at scales of their own. An evaluation takes one
    gradient and one more prediction.

    **Time unit**: that of gradient flow, `t = k * learning_rate` at iterate `k`.

    **Arguments**

    - `problem`: an `EmpiricalRisk` of a model with the methods `neuron_weights()` and `with_neuron_weights(rows)`, such
      as `gradflow.models.TwoLayer` and `DiagonalLinear`, homogeneous in the weights of each neuron.
    - `degree`: `k`, at least 2. `longest_step`: largest change of any `rho_j` in a step; see `PolarFlow`.

    Starts from ordinary parameters, or from a `gradflow.Polar` with one `log_norm` per neuron.

    **Raises** `ValueError` as `PolarFlow` does, and for parameters without neurons or with a neuron of zeros.

    Source: as for `PolarFlow`; with the residuals `r_i` frozen it is the first phase of the alternating gradient flow
    of D. Kunin et al. (2025), arXiv 2506.06489.

    >>> import gradflow as gf, jax, jax.numpy as jnp
    >>> problem = gf.EmpiricalRisk(jnp.eye(2), jnp.array([2.0, -1.0]), gf.losses.square, reduction="sum")
    >>> start = gf.Polar(gf.models.TwoLayer(2, 3, key=jax.random.key(1)), log_norm=jnp.array([-300.0, -400.0, -500.0]))
    >>> sol = gf.solve(gf.NeuronPolarFlow(problem), start, [50.0])
    >>> sol.status, sol.final.log_norm.shape
    ('ok', (3,))
    """

    problem: EmpiricalRisk
    degree: int = eqx.field(static=True)
    longest_step: Float[Array, ""] | None
    step_limited: ClassVar[bool] = True

    def __init__(self, problem: EmpiricalRisk, degree: int = 2, *, longest_step: ArrayLike | None = 0.5):
        self.problem = check_risk(problem)
        check_count("degree", degree, least=2)
        self.longest_step, self.degree = check_longest(longest_step), degree

    @property
    def time_unit(self) -> str:
        return "t = k * learning_rate"

    def init(self, trainable: PyTree, frozen: PyTree) -> NeuronPolarState:
        if isinstance(trainable, Polar):
            direction, logs, clock = trainable.direction, trainable.log_norm, trainable.clock
        else:
            rows, sizes = unit_rows(neuron_rows(join(trainable, frozen)))
            direction, logs = split(with_rows(join(trainable, frozen), rows))[0], jnp.log(sizes)
            clock = jnp.zeros_like(logs[0])
        zero = jnp.zeros_like(logs)
        return NeuronPolarState(zero, direction, logs, clock, zero[0], isinstance(trainable, Polar))

    def vector_field(self, t: Scalar, state: NeuronPolarState, frozen: PyTree) -> NeuronPolarState:
        static = frozen.direction if state.polar else frozen
        whole = join(state.direction, static)
        unit, _ = unit_rows(neuron_rows(whole))
        rho, exponent = state.origin + state.shift, self.degree - 2
        predictions = self.problem.predictions(with_rows(whole, jnp.exp(rho)[:, None] * unit))
        residuals = self.problem.residuals(predictions)
        _, back = jax.vjp(lambda rows: self.problem.predictions(with_rows(whole, rows)), unit)
        rate = back(residuals.astype(predictions.dtype))[0]
        radial = jnp.sum(rate * unit, axis=1)
        tangent = rate - radial[:, None] * unit
        speed = jnp.exp(exponent * rho)
        energy = jnp.sum(jnp.exp(2 * (self.degree - 1) * rho) * jnp.sum(rate**2, axis=1))
        turning = split(with_rows(whole, speed[:, None] * tangent))[0]
        return NeuronPolarState(
            speed * radial, turning, jnp.zeros_like(rho), jnp.ones_like(state.clock), energy, state.polar
        )

    def params(self, state: NeuronPolarState) -> PyTree:
        # The state holds no frozen leaves, and rows can be scaled without them.
        unit, _ = unit_rows(neuron_rows(state.direction))
        rho = state.origin + state.shift
        if not state.polar:
            return with_rows(state.direction, jnp.exp(rho)[:, None] * unit)
        return bare_polar(with_rows(state.direction, unit), rho, state.clock)

    def controlled(self, state: NeuronPolarState) -> PyTree:
        return state.shift, state.direction

    def error_weights(self, controlled: PyTree) -> ErrorWeights:
        return ErrorWeights((jnp.ones_like(controlled[0]), controlled[1]))

    def step_length_ratio(self, before: PyTree, after: PyTree) -> Scalar | None:
        if self.longest_step is None:
            return None
        return jnp.max(jnp.abs(after[0] - before[0])) / self.longest_step.astype(after[0].dtype)

    def loss(self, state: NeuronPolarState, frozen: PyTree) -> Float[Array, ""]:
        return self.problem(self._ordinary(state, frozen))

    def conserved(self, state: NeuronPolarState, frozen: PyTree) -> dict[str, Conserved]:
        params = self._ordinary(state, frozen)
        return energy_and_balances(self.problem, self.problem(params), state.energy, params)

    def check(self, trainable: PyTree, frozen: PyTree) -> None:
        polar = isinstance(trainable, Polar)
        if polar and trainable.log_norm.ndim != 1:
            advice = "Pass log_norm of shape (width,), or gradflow.Polar.of(params, neurons=True)."
            raise fail("params", "have one log_norm per neuron", "a Polar with a single one", advice)
        whole = join(*((trainable.direction, frozen.direction) if polar else (trainable, frozen)))
        neuron_rows(whole)
        check_scalar(self.problem, whole)

    def check_values(self, trainable: PyTree, frozen: PyTree) -> None:
        polar = isinstance(trainable, Polar)
        direction, static = (trainable.direction, frozen.direction) if polar else (trainable, frozen)
        logs = trainable.log_norm if polar else jnp.log(unit_rows(neuron_rows(join(direction, static)))[1])
        check_degree(self.problem, self.degree, direction, static)
        check_moves(self.degree, logs)

    @property
    def remedy(self) -> str:
        return SUNDMAN if self.degree > 2 else ""

    def _ordinary(self, state: NeuronPolarState, frozen: PyTree) -> PyTree:
        static = frozen.direction if state.polar else frozen
        params = self.params(state)
        return join(params.ordinary() if state.polar else params, static)
