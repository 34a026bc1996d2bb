"""Any optax transform as a rule."""

import functools
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Float, Int, PyTree, Scalar

from gradflow._checks import check_callable, fail
from gradflow._tree import join
from gradflow.flows import AbstractFlow
from gradflow.flows._gradient_flow import check_scalar
from gradflow.protocols import UpdateForm
from gradflow.rules._base import AbstractRule, AbstractRuleOfDescentTime, check_learning_rate
from gradflow.rules._counting import UncountableError, Watch, marked, run_counted
from gradflow.rules._optax_form import Transform, described_transform, optax_form

Limit = Callable[[Callable[[PyTree], Scalar]], AbstractFlow]
"""A function `problem -> flow`."""


class OptaxRule(AbstractRuleOfDescentTime):
    """A rule made of an optax transform:

        theta_{k+1} = theta_k + update(grad L(theta_k))

    **Time unit**: iterate `k` sits at `t = k learning_rate`. That is the clock of gradient flow for plain SGD; for
    other transforms it is the number of steps times the learning rate, no more.

    **Arguments**

    - `problem`: a callable `params -> scalar`.
    - `transform`: an optax transform, or a function `learning_rate -> transform` such as `optax.adam`. With the
      function the learning rate stays a number that may vary without a new compilation.
    - `learning_rate`: positive. With a ready-made transform it only sets the clock and has to agree with the transform.
    - `limit`: function `problem -> flow`, the continuous limit, if the transform has one.

    Transforms get the loss as `value_fn`, which line searches ask for. The gradients that they take of it are counted
    as the run goes, like the rule's own; values without a gradient are not. `gradient_evaluations` is -1 where they
    cannot be counted, as for a transform that has the loss from elsewhere and calls it by itself.

    **Raises** `ValueError` for a problem that cannot be called, a learning rate that is not positive, or something that
    is not a transform; so does `flow` without a `limit`, and `with_learning_rate` for a ready-made transform.

    >>> import gradflow as gf, jax.numpy as jnp, optax
    >>> rule = gf.OptaxRule(lambda w: 0.5 * w**2, optax.sgd, learning_rate=0.1, limit=gf.GradientFlow)
    >>> round(float(gf.iterate(rule, jnp.array(1.0), 10).final), 4)
    0.3487
    """

    problem: Callable[[PyTree], Scalar]
    transform: Transform
    learning_rate: Float[Array, ""]
    limit: Limit | None

    def __init__(
        self,
        problem: Callable[[PyTree], Scalar],
        transform: Transform,
        learning_rate: ArrayLike,
        limit: Limit | None = None,
    ):
        check_callable("problem", problem, "problem(params) -> scalar", "See `gradflow.EmpiricalRisk`.")
        check_learning_rate(learning_rate)
        if not isinstance(transform, optax.GradientTransformation) and not callable(transform):
            actual = f"of type {type(transform).__name__}"
            raise fail("transform", "be an optax transform or a function of the learning rate", actual)
        self.problem, self.transform, self.limit = problem, transform, limit
        self.learning_rate = jnp.asarray(learning_rate, float)

    @property
    def orders(self) -> tuple[int, ...]:
        return () if self.limit is None else (1,)

    def init(self, trainable: PyTree, frozen: PyTree) -> PyTree:
        return trainable, self._transform().init(trainable), jnp.zeros((), int)

    def step(self, k: Int[Array, ""], state: PyTree, frozen: PyTree) -> tuple[PyTree, Float[Array, ""]]:
        trainable, memory, count = state

        def problem(p: PyTree) -> Float[Array, ""]:
            return self.problem(join(p, frozen))

        loss, gradient = jax.value_and_grad(problem)(trainable)
        with jax.numpy_dtype_promotion("standard"):  # optax combines types, such as 0.9 ** count
            (updates, memory), more = self._update(problem, gradient, memory, trainable, loss)
        updated = jax.tree_util.tree_map(lambda p, u: p + u.astype(p.dtype), trainable, updates)
        return (updated, memory, count + 1 + more if more is not None else jnp.full_like(count, -1)), loss

    def gradient_evaluations(self, state: PyTree, attempted: Int[Array, ""]) -> Int[Array, ""]:
        return state[2]

    def with_cost_of(self, state: PyTree, tried: PyTree) -> PyTree:
        return (*state[:2], tried[2])

    def _update(
        self, problem: Callable[[PyTree], Array], gradient: PyTree, memory: PyTree, trainable: PyTree, loss: Array
    ) -> tuple[tuple[PyTree, PyTree], Int[Array, ""] | int | None]:
        """What the transform makes of a gradient, and how many more it evaluates; `None` if that cannot be told."""
        transform = optax.with_extra_args_support(self._transform())
        evaluates = False

        def update(
            fn: Callable[[PyTree], Array], gradient: PyTree, memory: PyTree, params: PyTree, loss: Array
        ) -> tuple[PyTree, PyTree]:
            def value_fn(p: PyTree) -> Array:
                nonlocal evaluates
                evaluates = True
                return fn(p)

            # Line searches and the like take these three; `with_extra_args_support` lets all others ignore them.
            return transform.update(gradient, memory, params, value=loss, grad=gradient, value_fn=value_fn)

        args = gradient, memory, trainable, loss
        watch = Watch(self.problem)
        try:
            with watch:
                result, more = run_counted(functools.partial(update, marked(watch.through(problem))), *args)
        except (UncountableError, TypeError):  # forward mode, which a function with a mark does not know
            return update(problem, *args), None
        if not evaluates:
            result, more = update(problem, *args), 0
        return result, None if watch.found else more

    def params(self, state: PyTree) -> PyTree:
        return state[0]

    def loss(self, state: PyTree, frozen: PyTree) -> Float[Array, ""]:
        return self.problem(join(state[0], frozen))

    def form(self) -> UpdateForm | None:
        return optax_form(self.transform, self.learning_rate)

    def described(self) -> str:
        return f"an OptaxRule of {described_transform(self.transform)}"

    def flow(self, order: int = 1) -> AbstractFlow:
        if self.limit is None or order != 1:
            advice = "Pass limit=gradflow.GradientFlow if the transform follows gradient flow."
            raise fail("order", "name a known continuous limit", f"{order!r}, and none is known", advice)
        return self.limit(self.problem)

    def with_learning_rate(self, learning_rate: float | Scalar) -> "AbstractRule":
        check_learning_rate(learning_rate)
        if isinstance(self.transform, optax.GradientTransformation):
            actual = "a ready-made transform, whose learning rate is fixed"
            raise fail("transform", "be a function of the learning rate", actual, "Pass optax.sgd, not optax.sgd(0.1).")
        return eqx.tree_at(lambda rule: rule.learning_rate, self, jnp.asarray(learning_rate, float))

    def check(self, trainable: PyTree, frozen: PyTree) -> None:
        check_scalar(self.problem, join(trainable, frozen))

    def _transform(self) -> optax.GradientTransformation:
        if isinstance(self.transform, optax.GradientTransformation):
            return self.transform
        return self.transform(self.learning_rate)
