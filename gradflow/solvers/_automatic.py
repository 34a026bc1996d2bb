"""Automatic: an explicit Runge-Kutta method on short or smooth runs, the implicit multistep method on all others."""

from collections.abc import Callable

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree, Scalar

from gradflow._checks import fail
from gradflow._tree import flatten, scaled_norm
from gradflow.solvers._control import SCALE_FRACTION, StepControl
from gradflow.solvers._method import AbstractMethod, Attempt, Field
from gradflow.solvers._ndf import NDF
from gradflow.solvers._ndf_step import History

WARM_UP_STEPS = 3
"""Explicit steps after which their length is taken at its word."""
BUDGET = 35
"""Evaluations, times `rtol^(-1/6)`, that a run is given to be finished explicitly; `NDF` seldom takes fewer."""
REJECTION_MEMORY = 0.95
"""Weight of the past in the share of implicit steps that were rejected."""
TRUSTED_STEPS = 10
"""Accepted implicit steps before which rejections tell of the change of method, not of the field."""
MAX_REJECTION_SHARE = 0.3
"""The share beyond which the field is taken for one that is not smooth."""


class Mode(eqx.Module):
    """Which method is at work, the states of both, and what the choice goes by."""

    implicit: Bool[Array, ""]
    slope: Float[Array, " size"]  # derivative of the whole state at the start of the step, where `known`
    known: Bool[Array, ""]
    ratio: Scalar  # of the last accepted explicit step
    failed: Bool[Array, ""]
    history: History
    steps: Int[Array, ""]  # accepted steps since the last change of method
    rejections: Scalar  # share of implicit steps that were rejected of late
    budget: Scalar  # of the explicit method; grows at every return to it


class Automatic(AbstractMethod):
    """The default: chooses between an explicit method and `NDF` at every step.

    A run starts with the explicit method. After a few steps, and at every later one, its cost to the end of the run is
    predicted twice: from the length of the step, and from the length that stability allows, by the stiffness seen
    between the last two stages. Steps alone that are short for the sake of accuracy, as around a jump from saddle to
    saddle, tell little: `NDF` would take short ones, too. Where the geometric mean of both is more than `NDF` is likely
    to need, `NDF` takes over, with its history read off the last explicit step. The way back is taken when many
    implicit steps are rejected: the field is then not smooth, as with ReLU, and the explicit method does less badly.

    On gradient flows of networks `NDF` needs fewer gradients even in the smooth escape from a small initialisation,
    where nothing is stiff: its steps take two or three gradients where Runge-Kutta methods take six or twelve. The
    explicit method is the cheaper one on short runs, of some tens of units of `1 / sharpness`.

    **Arguments**: `explicit`: a diffrax solver whose last stage is the first of the next step, such as `Tsit5()`.
    `implicit`: an `NDF`.

    **Raises** `ValueError` for other methods.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> flow = gf.GradientFlow(lambda w: 0.5 * (w[0] ** 2 + 1e4 * w[1] ** 2))
    >>> sol = gf.solve(flow, jnp.ones(2), [5.0])
    >>> sol.method
    'Automatic(Tsit5, NDF)'
    """

    explicit: diffrax.AbstractERK
    implicit: NDF

    def __init__(self, explicit: object = None, implicit: object = None):
        explicit = diffrax.Tsit5() if explicit is None else explicit
        implicit = NDF() if implicit is None else implicit
        if not isinstance(explicit, diffrax.AbstractERK) or not getattr(explicit.tableau, "fsal", False):
            must = "be an explicit diffrax solver whose last stage is the first of the next step"
            raise fail("explicit", must, f"of type {type(explicit).__name__}", "For instance gradflow.solvers.Tsit5().")
        if not isinstance(implicit, NDF):
            raise fail("implicit", "be a gradflow.solvers.NDF", f"of type {type(implicit).__name__}")
        self.explicit, self.implicit = explicit, implicit

    @property
    def exact_counts(self) -> bool:
        return True

    @property
    def name(self) -> str:
        return f"Automatic({type(self.explicit).__name__}, {self.implicit.name})"

    @property
    def first_order(self) -> int:
        order = self.explicit.order(None)
        assert order is not None  # Runge-Kutta methods know theirs
        return int(order)

    def begin(self, field: Field, y: PyTree, slope: PyTree, dt: Scalar) -> Mode:
        history = self.implicit.begin(field, y, slope, dt)
        zero, no = jnp.zeros_like(history.spacing), jnp.asarray(False)
        derivative = flatten(slope)[0]
        return Mode(no, derivative, jnp.asarray(True), zero + 1, no, history, jnp.asarray(0), zero, zero + 1)

    def attempt(
        self,
        field: Field,
        y: PyTree,
        dt: Scalar,
        control: StepControl,
        scale: PyTree,
        state: Mode,
    ) -> Attempt:
        one = self._explicit(field, y, dt, control, scale, state)
        other = self._implicit(field, y, dt, control, scale, state)

        def choose(a: Array, b: Array) -> Array:
            return jnp.where(state.implicit, a, b)

        parts = lambda a: (a.y1, a.ratio, a.factor, a.accepted, a.rejected, a.finite, a.evaluations)  # noqa: E731
        mixed = jax.tree_util.tree_map(choose, parts(other), parts(one))
        dense = (state.implicit, one.dense, other.dense)
        y1, ratio, factor, accepted, rejected, finite, evaluations = mixed
        products = jnp.where(state.implicit, other.products, 0)
        return Attempt(y1, ratio, factor, accepted, rejected, dense, finite, evaluations, products)

    def scale_fraction(self, state: Mode) -> Scalar:
        return jnp.where(state.budget > 1, SCALE_FRACTION, 0.0)

    def piece(self, field: Field, dt: Scalar, y: PyTree, state: Mode) -> tuple[PyTree, Bool[Array, ""]]:
        tableau = self._tableau()
        start, unflatten = flatten(y)
        h = dt.astype(start.dtype)
        rows, nodes = jnp.asarray(tableau.rows, start.dtype), jnp.asarray(tableau.nodes, dt.dtype)

        def stage(i: Int[ArrayLike, ""], k: Array) -> Array:
            return k.at[i].set(h * flatten(field(nodes[i] * dt, unflatten(start + rows[i] @ k)))[0])

        k = jax.lax.fori_loop(0, tableau.stages, stage, jnp.zeros((tableau.stages, start.size), start.dtype))
        return unflatten(start + jnp.asarray(tableau.solution, start.dtype) @ k), ~state.implicit

    def renewed(self, field: Field, dt: Scalar, y: PyTree, state: Mode) -> Mode:
        history = self.implicit.renewed(field, dt, y, state.history)
        return eqx.tree_at(lambda m: (m.slope, m.history), state, (flatten(field(dt, y))[0], history))

    def interpolate(self, field: Field, dense: PyTree, s: Scalar) -> PyTree:
        implicit, one, other = dense
        unflatten = flatten(one[0])[1]
        inside = unflatten(self._inside(one, s)), self.implicit.interpolate(field, other, s)
        return jax.tree_util.tree_map(lambda a, b: jnp.where(implicit, b, a), *inside)

    def _explicit(
        self, field: Field, y: PyTree, dt: Scalar, control: StepControl, scale: PyTree, mode: Mode
    ) -> Attempt:
        """A step of the explicit method; no evaluations where the other one is at work."""
        # Where the field is not smooth, cost grows like one over the tolerance: no tightening there.
        given, control = control, control.tightened(jnp.where(mode.budget > 1, 1, field.progress))
        tableau = self._tableau()
        start, unflatten = flatten(y)
        h = dt.astype(start.dtype)
        rows, nodes = jnp.asarray(tableau.rows, start.dtype), jnp.asarray(tableau.nodes, dt.dtype)
        first = jnp.where(mode.known, 1, 0)
        stop = jnp.where(mode.implicit, 0, tableau.stages)

        def stage(state: tuple[Int[Array, ""], Array]) -> tuple[Int[Array, ""], Array]:
            i, k = state
            rate = field(nodes[i] * dt, unflatten(start + rows[i] @ k))
            return i + 1, k.at[i].set(h * flatten(rate)[0])

        k = jnp.zeros((tableau.stages, start.size), start.dtype).at[0].set(h * mode.slope)
        _, k = jax.lax.while_loop(lambda state: state[0] < stop, stage, (first, k))
        end = start + jnp.asarray(tableau.solution, start.dtype) @ k
        y1 = unflatten(end)
        error = unflatten(jnp.asarray(tableau.error, start.dtype) @ k)
        ratio = control.ratio(field.controlled(error), field.controlled(y), field.controlled(y1), scale)
        finite = jnp.all(jnp.isfinite(k))
        ratio = jax.lax.stop_gradient(jnp.where(finite, ratio, jnp.inf)).astype(mode.ratio.dtype)
        factor = control.factor(ratio, mode.ratio, mode.failed, self.first_order)
        dense = (y, end, k, dt)

        remaining = (1 - field.progress) * self._whole(field, dt)
        ahead = (tableau.stages - 1) * remaining / (dt * factor.astype(dt.dtype))
        held = cost_if_held(field, unflatten, tableau, k).astype(dt.dtype) * remaining / dt
        budget = mode.budget.astype(dt.dtype) * (given.rtol ** (-1 / 6)).astype(dt.dtype)
        switch = (mode.steps + 1 >= WARM_UP_STEPS) & (ahead * held > (BUDGET * budget) ** 2)
        history = self._recent(field, dense, mode.history)
        factor = jnp.where((ratio <= 1) & switch, (history.spacing / h).astype(factor.dtype), factor)
        history = jax.tree_util.tree_map(lambda a, b: jnp.where(switch, a, b), history, mode.history)
        yes, no, steps = jnp.asarray(True), jnp.asarray(False), jnp.where(switch, 0, mode.steps + 1)
        zero = jnp.zeros_like(mode.rejections)
        accepted = Mode(switch, k[-1] / h, yes, ratio, no, history, steps, zero, mode.budget)
        rejected = Mode(no, k[0] / h, yes, mode.ratio, yes, mode.history, mode.steps, zero, mode.budget)
        return Attempt(y1, ratio, factor, accepted, rejected, dense, finite, stop - first, jnp.asarray(0))

    def _implicit(
        self, field: Field, y: PyTree, dt: Scalar, control: StepControl, scale: PyTree, mode: Mode
    ) -> Attempt:
        """A step of the implicit method; no evaluations where the other one is at work."""
        tried = self.implicit.step(field, y, dt, control, scale, mode.history, mode.implicit)
        keep = tried.ratio <= 1
        rejections = REJECTION_MEMORY * mode.rejections + jnp.where(
            keep | (mode.steps < TRUSTED_STEPS), 0, 1 - REJECTION_MEMORY
        )
        switch = keep & (rejections > MAX_REJECTION_SHARE)
        stiffest = tried.accepted.stiffest
        h = self._tableau().limit / jnp.where(stiffest > 0, stiffest, 1)
        factor = jnp.where(
            switch & (stiffest > 0), (0.9 * h.astype(dt.dtype) / dt).astype(tried.factor.dtype), tried.factor
        )
        no, one = jnp.asarray(False), jnp.ones_like(mode.ratio)
        budget = jnp.where(switch, 8 * mode.budget, mode.budget)
        steps = jnp.where(switch, 0, mode.steps + 1)
        accepted = Mode(~switch, mode.slope, no, one, no, tried.accepted, steps, rejections, budget)
        rejected = Mode(~no, mode.slope, no, one, no, tried.rejected, mode.steps, rejections, mode.budget)
        return eqx.tree_at(lambda a: (a.factor, a.accepted, a.rejected), tried, (factor, accepted, rejected))

    def _tableau(self) -> "_Tableau":
        tableau = type(self.explicit).tableau
        assert isinstance(tableau, diffrax.ButcherTableau)  # those of several terms have no `fsal`
        return _Tableau(tableau)

    def _whole(self, field: Field, dt: Scalar) -> Scalar:
        """The length of the run."""
        return (field.t + dt - field.flow.t0) / jnp.where(field.progress > 0, field.progress, 1)

    def _inside(self, dense: PyTree, s: Scalar) -> Float[Array, " size"]:
        """The state at time `s` of the explicit step that gave `dense`, as one vector."""
        y, end, k, dt = dense
        start, dtype = flatten(y)[0], end.dtype
        interpolation = self.explicit.interpolation_cls(
            t0=jnp.zeros((), dtype), t1=dt.astype(dtype), y0=start, y1=end, k=k
        )
        return interpolation.evaluate(s.astype(dtype))

    def _recent(self, field: Field, dense: PyTree, old: History) -> History:
        """A table of order four from the dense output of the step just taken, with an eighth of it as the spacing."""
        y, end, _, dt = dense
        unflatten = flatten(y)[1]

        def point(j: Scalar) -> PyTree:
            return unflatten(self._inside(dense, dt * (1 - j / 8)))

        return self.implicit.resume(field, point, unflatten(end), dt / 8, old.age + 1)


class _Tableau:
    """The coefficients of an explicit Runge-Kutta method as arrays, and how far it is stable on the negative axis."""

    def __init__(self, tableau: diffrax.ButcherTableau):
        self.stages = int(tableau.num_stages)
        self.rows = np.zeros((self.stages, self.stages))
        for i, row in enumerate(tableau.a_lower):
            self.rows[i + 1, : i + 1] = row
        self.nodes = np.concatenate([[0.0], np.asarray(tableau.c)])
        self.solution, self.error = np.asarray(tableau.b_sol), np.asarray(tableau.b_error)
        powers, vector = [1.0], np.ones(self.stages)
        for _ in range(self.stages):
            powers.append(float(self.solution @ vector))
            vector = self.rows @ vector
        z = np.linspace(0, 20, 4001)
        grown = np.abs(np.polynomial.polynomial.polyval(-z, powers)) > 1 + 1e-9
        self.limit = float(z[int(np.argmax(grown))])


def cost_if_held(
    field: Field,
    unflatten: Callable[[Float[Array, " size"]], PyTree],
    tableau: _Tableau,
    k: Float[Array, "stages size"],
) -> Scalar:
    """Evaluations per length of the step just taken, were steps held by stability alone.

    The last two stages are near in time, so that the field's change over their distance tells how stiff it is (Hairer,
    Wanner, Solving Ordinary Differential Equations II, section IV.2).
    """

    def size(vector: Float[Array, " size"]) -> Scalar:
        return scaled_norm(flatten(field.controlled(unflatten(vector)))[0])

    apart, changed = size(jnp.asarray(tableau.rows[-1] - tableau.rows[-2], k.dtype) @ k), size(k[-1] - k[-2])
    stiffness = jnp.where(apart > 0, changed / jnp.where(apart > 0, apart, 1), 0)
    return (tableau.stages - 1) / tableau.limit * stiffness
