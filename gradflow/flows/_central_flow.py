"""The central flow: where a rule is on average while it oscillates at the edge of stability."""

from collections.abc import Mapping
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, Scalar

from gradflow._checks import TheoryWarning, check_count, fail, is_concrete
from gradflow._conserved import Conserved
from gradflow._linalg import averaged, hessian_vector_product, lanczos
from gradflow._tree import PaddedRest, at_least_single, flatten, full_precision, join, within
from gradflow.flows._base import AbstractFlow
from gradflow.flows._gradient_flow import check_scalar, field_kinks
from gradflow.protocols import CentralState, HasUpdateForm, UpdateForm, offered

MARGIN = 1e-3
"""Share of the threshold by which the sharpness at the start may lie above it."""
LONG_DELAY = 20
"""Steps of the rule beyond which the delay of its oscillation is said."""
KNOWN = (
    "Known are GradientDescent, ScalarRMSProp, RMSProp, and OptaxRule of optax.sgd without momentum or of optax.rmsprop"
    " with neither momentum nor centring: the function itself, or functools.partial of it with constants by name."
)


class CentralFlow(AbstractFlow):
    """The mean path of a rule that oscillates at the edge of stability:

        w' = -D^-1 (grad L + grad <H, Sigma> / 2),      A = 2 D / eta - H >= 0,   Sigma >= 0,   <Sigma, A> = 0
        RMSProp:         nu' = k (g^2 + diag(H Sigma H) - nu) / eta,    D = sqrt(nu + eps),     k = (1 - decay) / decay
        scalar RMSProp:  nu' = k (|g|^2 + tr(H Sigma H) - nu) / eta

    `Sigma` is the covariance of the iterates about their mean, as large as it takes to keep the sharpness, that of
    `D^-1/2 H D^-1/2`, at `2 / eta`; for gradient descent `D = 1`. Below the threshold it is zero, and this is gradient
    flow, with the rule's memory. Averages over the rule's oscillation are those of `gradflow.observables.MeanLoss`,
    `Variance` and `IterateMean(fn)`.

    **Time unit**: `t = k * learning_rate`, that of the rule. The path is to be compared with averages over iterates,
    such as midpoints, never with single ones.

    **Arguments**

    - `rule`: `GradientDescent`, `ScalarRMSProp`, `RMSProp`, or an `OptaxRule` of `optax.sgd` or `optax.rmsprop`: of the
      function itself, or of `functools.partial` of it.
    - `directions`: eigenpairs that are tracked, at most; as many directions may oscillate together, less one, and a run
      warns where all of them do.
    - `second_moment`: the memory `nu` to start from, a pytree like the parameters, or a number; that of a run of the
      rule in particular, `sol.state[1]`. `None`: what the rule has after its first gradient.

    It is integrated by `gradflow.solvers.CatchingUp` alone, in steps longer than the rule's far below the edge and
    about as long at it. There is no event to be detected, and no matrix but small ones. In float64, third derivatives
    are differences of gradients; float32 takes them exactly, at twice the cost.

    **Raises** `ValueError` for other rules, those with momentum and `optax.rmsprop(centered=True)` among them; for a
    problem with kinks, such as ReLU: its third derivative is zero almost everywhere, so nothing holds the sharpness;
    for a start above the threshold; for
    `directions` below one, and a `second_moment` of another structure. A run warns of a long delay: the rule's
    oscillation has to grow from a small seed, and until it has the sharpness overshoots, which this flow cannot know.
    The longest, by the linear growth of the oscillation, is `Solution.errors["delay"]`, in time. The number of
    directions that have oscillated together, at most, is `Solution.errors["oscillating"]`.

    Source: J. Cohen, A. Damian, A. Talwalkar, Z. Kolter and J. D. Lee (2024), arXiv 2410.24206.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> valley = lambda w: 0.5 * (w[0] + w[1]) * w[0] ** 2 - 0.1 * (w[0] + w[1])
    >>> flow = gf.CentralFlow(gf.GradientDescent(valley, 0.3))
    >>> sol = gf.solve(flow, jnp.array([0.1, 6.3]), [60.0, 90.0], observe={"S": gf.observables.Sharpness(valley)})
    >>> [round(0.3 * float(S), 2) for S in sol.observed["S"]]
    [2.0, 2.0]
    """

    problem: Any
    form: UpdateForm
    second_moment: PyTree
    directions: int = eqx.field(static=True)
    constrained: ClassVar[bool] = True
    complaint_category: ClassVar[type[Warning]] = TheoryWarning

    def __init__(self, rule: Any, *, directions: int = 8, second_moment: PyTree = None):
        describing = offered(rule, HasUpdateForm)
        form = None if describing is None else describing.form()
        if describing is None or form is None or form.momentum is not None:
            actual = f"a {type(rule).__name__}" if describing is None else describing.described()
            if form is not None:
                actual += ", which has momentum"
            raise fail("rule", "be one whose central flow is known", actual, KNOWN)
        check_count("directions", directions)
        if form.memory is not None and is_concrete(form.memory.decay) and float(form.memory.decay) == 0:
            raise fail("rule", "have a memory", "one with decay 0, which is descent by signs")
        if second_moment is not None and form.memory is None:
            raise fail("second_moment", f"be None for a {type(rule).__name__}", "given", "It keeps no memory.")
        self.problem, self.form = rule.problem, form
        self.second_moment, self.directions = second_moment, directions

    @property
    def time_unit(self) -> str:
        return "t = k * learning_rate"

    def init(self, trainable: PyTree, frozen: PyTree) -> CentralState:
        flat, _ = flatten(trainable)
        zero, k = jnp.zeros((), flat.dtype), self.directions
        memory = None if self.form.memory is None else self._memory(trainable, frozen)
        blank = jnp.zeros((k, flat.size), flat.dtype), jnp.zeros((k, k), flat.dtype)
        return CentralState(trainable, memory, zero, *blank, zero, zero, zero)

    def vector_field(self, t: Scalar, state: CentralState, frozen: PyTree) -> CentralState:
        """The derivative at the present covariance."""

        def gradient(p: PyTree) -> PyTree:
            return jax.grad(lambda q: self.problem(join(q, frozen)))(p)

        _, unflatten = flatten(state.params)
        g = gradient(state.params)

        def along(row: Array) -> tuple[PyTree, PyTree]:
            u = unflatten(row)
            first = lambda p: jax.jvp(gradient, (p,), (u,))[1]  # noqa: E731
            return jax.jvp(first, (state.params,), (u,))

        products, thirds = jax.lax.map(along, state.deviations())
        force = jax.tree_util.tree_map(lambda a, b: a + 0.5 * jnp.sum(b, axis=0), g, thirds)
        still = jax.tree_util.tree_map(jnp.zeros_like, state)
        memory_form = self.form.memory
        if memory_form is None:
            rate, memory = jax.tree_util.tree_map(jnp.negative, force), None
        else:
            eta = self.form.learning_rate
            scale = memory_form.scale(state.memory, t / eta)
            scale = jax.tree_util.tree_map(lambda _: scale, force) if memory_form.scalar else scale
            rate = jax.tree_util.tree_map(lambda f, d: jnp.where(d > 0, -f / jnp.where(d > 0, d, 1), 0), force, scale)
            spread = jax.vmap(memory_form.squares)(products)
            squares = jax.tree_util.tree_map(lambda a, b: a + jnp.sum(b, axis=0), memory_form.squares(g), spread)
            pace = memory_form.pace() / eta
            memory = jax.tree_util.tree_map(lambda m, old: pace.astype(m.dtype) * (m - old), squares, state.memory)
        return eqx.tree_at(lambda s: (s.params, s.memory), still, (rate, memory), is_leaf=lambda x: x is None)

    @property
    def products_per_evaluation(self) -> int:
        return 0  # evaluated at the start alone, where nothing oscillates; the method counts its own

    def params(self, state: CentralState) -> PyTree:
        return state.params

    def controlled(self, state: CentralState) -> PyTree:
        return state.params, state.memory

    def kinks(self, trainable: PyTree, frozen: PyTree) -> tuple[str, ...] | None:
        return field_kinks(self.problem, trainable, frozen)

    def loss(self, state: CentralState, frozen: PyTree) -> Float[Array, ""]:
        return self.problem(join(state.params, frozen))

    def deviations(self, state: CentralState) -> PyTree:
        _, unflatten = flatten(state.params)
        return jax.vmap(unflatten)(state.deviations())

    def predicted_variance(self, state: CentralState, frozen: PyTree) -> Float[Array, ""]:
        """The variance of the iterates, `tr Sigma`; zero below the edge."""
        return jnp.sum(state.deviations() ** 2)

    def predicted_loss(self, state: CentralState, frozen: PyTree) -> Float[Array, ""]:
        """The mean of the loss over the iterates, `L + <H, Sigma> / 2`."""
        return averaged(lambda p: self.problem(join(p, frozen)), state.params, self.deviations(state))

    def conserved(self, state: CentralState, frozen: PyTree) -> dict[str, Conserved]:
        loss = self.loss(state, frozen)
        return {"energy": Conserved(loss + state.dissipated, jnp.abs(loss) + jnp.abs(state.dissipated))}

    def errors(self, state: CentralState, frozen: PyTree) -> dict[str, Scalar]:
        return {"delay": state.delay, "oscillating": state.oscillating}

    def complaint(self, errors: Mapping[str, Any]) -> str:
        return " ".join(part for part in (self._complaint_of_room(errors), self._complaint_of_delay(errors)) if part)

    def _complaint_of_room(self, errors: Mapping[str, Any]) -> str:
        if int(errors["oscillating"]) < self.directions:
            return ""
        return (
            f"All {self.directions} directions that CentralFlow tracks have come to oscillate together. Others beyond"
            " them are not seen: their sharpness rises above the threshold, and the path is no longer the mean path of"
            f" the rule. Raise `directions`, which is {self.directions}."
        )

    def _complaint_of_delay(self, errors: Mapping[str, Any]) -> str:
        delay, eta = float(errors["delay"]), float(self.form.learning_rate)
        if delay <= LONG_DELAY * eta:
            return ""
        return (
            "The oscillation of the rule starts from a small seed: after the sharpness has passed the threshold it"
            f" takes about {delay / eta:.0f} steps, a time of {delay:.3g}, to grow, and the sharpness overshoots."
            " The central flow, which has no delay, is ahead of the rule by that much."
        )

    def check(self, trainable: PyTree, frozen: PyTree) -> None:
        check_scalar(self.problem, join(trainable, frozen))
        kinks = self.kinks(trainable, frozen)
        if kinks:
            advice = (
                "Nothing would hold the sharpness, for its derivative is zero almost everywhere: smooth the model with"
                " gradflow.models.Smoothed, or follow its two halves, gradflow.DescentAscentFlow."
            )
            raise fail("problem", "be smooth for a central flow", f"one with kinks ({', '.join(kinks)})", advice)

    def check_values(self, trainable: PyTree, frozen: PyTree) -> None:
        self.check(trainable, frozen)
        relative, k = self._relative_sharpness(trainable, frozen), "start below the threshold of the rule"
        if float(relative) > 2 * (1 + MARGIN):
            actual = f"above it: learning rate times sharpness is {float(relative):.4g}, and not at most 2"
            advice = "Lower the learning rate, or let the rule take some steps first and start from where these lead."
            if self.form.memory is not None:
                advice += " Pass the memory they leave as `second_moment`."
            raise fail("params", k, actual, advice)

    @eqx.filter_jit
    @full_precision
    def _relative_sharpness(self, trainable: PyTree, frozen: PyTree) -> Scalar:
        """The learning rate times the largest eigenvalue of `D^-1/2 H D^-1/2` at the start."""
        trainable = at_least_single(trainable)
        product, flat = hessian_vector_product(lambda p: self.problem(join(p, frozen)), trainable)
        root = jnp.ones_like(flat)
        if self.form.memory is not None:
            scale, _ = flatten(self.form.memory.scale(self._memory(trainable, frozen), jnp.zeros((), flat.dtype)))
            root = jnp.where(scale > 0, 1 / jnp.sqrt(jnp.where(scale > 0, scale, 1)), 0) * root
        start = jax.random.normal(jax.random.key(0), (1, flat.size), flat.dtype)
        values, *_ = lanczos(lambda v: root * product(root * v), start, 60, 1e-4)
        return self.form.learning_rate.astype(flat.dtype) * values[0]

    def _memory(self, trainable: PyTree, frozen: PyTree) -> PyTree:
        """The memory at the start."""
        form: Any = self.form.memory
        blank = form.start(trainable)
        if isinstance(frozen, PaddedRest) and not form.scalar:
            blank = within(blank, frozen.extents)  # no gradient, no memory: what padding adds is not divided by it
        if self.second_moment is None:
            gradient = jax.grad(lambda p: self.problem(join(p, frozen)))(trainable)
            return form.after(blank, gradient)
        if jax.tree_util.all_leaves([self.second_moment]) and jnp.ndim(self.second_moment) == 0:
            return jax.tree_util.tree_map(lambda leaf: jnp.full_like(leaf, self.second_moment), blank)
        given = jax.tree_util.tree_structure(self.second_moment)
        if given != jax.tree_util.tree_structure(blank):
            raise fail("second_moment", "be a number, or a pytree like the parameters", f"of structure {given}")
        return jax.tree_util.tree_map(lambda new, old: jnp.asarray(new, old.dtype), self.second_moment, blank)

    @property
    def start_cost(self) -> tuple[int, int]:
        return (0 if self.form.memory is None or self.second_moment is not None else 1), 0
