"""Runs of rules: counted steps of the rule, on its own clock."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree, Scalar

from gradflow._solution import DISCRETE, Status
from gradflow._tree import Extents
from gradflow.rules import AbstractRule
from gradflow.runs._counted import AbstractCountedRun, CountedCarry, ResumedRule
from gradflow.runs._record import Observable, bind
from gradflow.runs._run import STEP, Point
from gradflow.runs._until import Until


class DiscreteRun(AbstractCountedRun):
    """A run of a rule, which saves the iterates `ks`."""

    rule: AbstractRule
    frozen: PyTree
    start: PyTree
    ks: Int[Array, " rows"]
    observe: dict[str, Observable]
    until: Until | None
    save_params: bool = eqx.field(static=True)
    extents: Extents | None = None
    resumed: ResumedRule | None = None

    @property
    def title(self) -> str:
        return self.rule.title

    @property
    def time_unit(self) -> str:
        return self.rule.time_unit

    @property
    def method_name(self) -> str:
        return DISCRETE

    @property
    def rounds_times(self) -> bool:
        return True

    def check(self) -> None:
        self.rule.check(self.start, self.frozen)

    def starts_well(self, state: PyTree) -> Int[Array, ""]:
        return jnp.asarray(Status.RUNNING)

    def initial(self) -> PyTree:
        return self.rule.init(self.start, self.frozen)

    def step(self, k: Int[Array, ""], state: PyTree) -> tuple[PyTree, Float[Array, ""]]:
        return self.rule.step(k, state, self.frozen)

    def flowing(self, state: PyTree) -> PyTree:
        return self.rule.params(state)

    def loss(self, state: PyTree) -> Float[Array, ""]:
        return self.rule.loss(state, self.frozen)

    def size_of_loss(self, state: PyTree) -> Float[Array, ""]:
        return self.loss(state)

    def charged(self, state: PyTree, tried: PyTree) -> PyTree:
        return self.rule.with_cost_of(state, tried)

    def observables_at(self, k: Int[Array, ""], state: PyTree) -> dict[str, Observable]:
        return bind(self.observe, self.rule, self.rule.time(k), state, self.frozen)

    def clock(self, k: Int[Array, ""]) -> Scalar:
        return self.rule.time(k)

    def save_times(self) -> Float[Array, " rows"]:
        return jnp.asarray(self.rule.time(self.ks), float)

    def cost(self, carry: CountedCarry) -> dict[str, Array]:
        num_gradients = self.rule.gradient_evaluations(carry.state, carry.attempted)
        if self.resumed is not None:
            before = self.rule.gradient_evaluations(self.resumed.state, jnp.zeros_like(carry.attempted))
            num_gradients = jnp.where(num_gradients < 0, num_gradients, num_gradients - before)
        return {"gradient_evaluations": num_gradients, "hessian_vector_products": jnp.asarray(0)}

    def random_key(self) -> None:
        return None

    def observables(self, where: Point, state: PyTree) -> dict[str, Observable]:
        return self.observables_at(where.first, state)

    def motion(self, where: Point, state: PyTree) -> dict[str, PyTree]:
        """The state after some steps, and the last loss: the first step of many rules does not know all constants."""
        loss = eqx.filter_eval_shape(self.step, where.first, state)[1]

        def step(i: Array, carry: tuple[PyTree, Array]) -> tuple[PyTree, Array]:
            return self.step(where.first + i, carry[0])

        return {STEP: jax.lax.fori_loop(0, where.steps, step, (state, jnp.zeros(loss.shape, loss.dtype)))}
