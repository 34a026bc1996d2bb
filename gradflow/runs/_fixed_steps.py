"""Runs of stochastic flows: one path, in steps of fixed size between the save times."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree, Scalar

from gradflow import _checks
from gradflow._solution import Solution, Status
from gradflow._tree import Extents, join
from gradflow.flows import AbstractStochasticFlow
from gradflow.runs._arguments import Recorded, check_start, halves, valid_times
from gradflow.runs._counted import AbstractCountedRun, CountedCarry, ResumedRule, RuleCheckpoint
from gradflow.runs._record import Observable, bind, check_observe
from gradflow.runs._run import DERIVATIVE, STEP, Point
from gradflow.runs._until import Until, check_until
from gradflow.solvers import AbstractStochasticMethod, EulerMaruyama, SmallNoise


class FixedStepRun(AbstractCountedRun):
    """One path of a stochastic flow: the intervals between `edges`, each divided into `counts` equal steps.

    Step `k` draws from the key and `k` alone, so that a run in two parts is the run in one.
    """

    flow: AbstractStochasticFlow
    method: AbstractStochasticMethod
    key: Key[Array, ""]
    edges: Float[Array, " intervals_1"]
    counts: Int[Array, " intervals"]
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
        return type(self.flow).__name__

    @property
    def time_unit(self) -> str:
        return self.flow.time_unit

    @property
    def method_name(self) -> str:
        return self.method.name

    @property
    def rounds_times(self) -> bool:
        return False

    def check(self) -> None:
        self.flow.check(self.start, self.frozen)

    def starts_well(self, state: PyTree) -> Int[Array, ""]:
        return jnp.where(valid_times(self.edges[1:], self.edges[0]), Status.RUNNING, Status.INVALID_TIMES)

    def locate(self, k: Int[Array, ""]) -> tuple[Scalar, Scalar]:
        """Time at step `k`, and the size of that step."""
        before = self.ks - self.counts
        index = jnp.clip(jnp.searchsorted(before, k, side="right") - 1, 0, self.counts.size - 1)
        sizes = (self.edges[1:] - self.edges[:-1]) / jnp.maximum(self.counts, 1).astype(self.edges.dtype)
        within = jnp.asarray(k - before[index], sizes.dtype)
        return self.edges[index] + within * sizes[index], sizes[index]

    def initial(self) -> PyTree:
        return self.flow.init(self.start, self.frozen)

    def step(self, k: Int[Array, ""], state: PyTree) -> tuple[PyTree, Float[Array, ""]]:
        # The loss is looked at where it is saved; a step need not know it.
        return self._moved(k, *self.locate(k), state), jnp.zeros(())

    def flowing(self, state: PyTree) -> PyTree:
        return self.flow.params(state)

    def loss(self, state: PyTree) -> Scalar | None:
        return self.flow.loss(state, self.frozen)

    def size_of_loss(self, state: PyTree) -> Float[Array, ""]:
        loss = self.loss(state)
        return jnp.zeros(()) if loss is None else loss

    def charged(self, state: PyTree, tried: PyTree) -> PyTree:
        return state

    def observables_at(self, k: Int[Array, ""], state: PyTree) -> dict[str, Observable]:
        return bind(self.observe, self.flow, self.clock(k), state, self.frozen)

    def clock(self, k: Int[Array, ""]) -> Scalar:
        return self.locate(k)[0]

    def save_times(self) -> Float[Array, " rows"]:
        return self.edges[1:]

    def cost(self, carry: CountedCarry) -> dict[str, Array]:
        gradients, products = self.method.evaluations(self.flow)
        each = {"gradient_evaluations": gradients, "hessian_vector_products": products}
        return {name: carry.attempted * n if n >= 0 else jnp.asarray(-1) for name, n in each.items()}

    def random_key(self) -> Key[Array, ""]:
        return self.key

    def observables(self, where: Point, state: PyTree) -> dict[str, Observable]:
        return bind(self.observe, self.flow, self._time_at(where), state, self.frozen)

    def motion(self, where: Point, state: PyTree) -> dict[str, PyTree]:
        t = self._time_at(where)
        step = self._moved(where.first, t, largest_step(self.flow, self.method).astype(t.dtype), state)
        return {DERIVATIVE: self.flow.vector_field(t, state, self.frozen), STEP: step}

    def _time_at(self, where: Point) -> Scalar:
        return self.edges[0] + where.progress * (self.edges[-1] - self.edges[0])

    def _moved(self, k: Int[Array, ""], t: Scalar, dt: Scalar, state: PyTree) -> PyTree:
        """The state after one step of this size, with the increments of step `k`."""
        dtype = jnp.result_type(*jax.tree_util.tree_leaves(state))
        drawn = jax.random.normal(jax.random.fold_in(self.key, k), (self.flow.noise_size,), dtype)
        return self.method.step(self.flow, self.frozen, t, dt, state, jnp.sqrt(dt).astype(dtype) * drawn)


def largest_step(flow: AbstractStochasticFlow, method: AbstractStochasticMethod) -> Scalar:
    return flow.time_step if method.dt is None else method.dt


def prepare_path(
    flow: AbstractStochasticFlow,
    params: PyTree,
    ts: Float[Array, " T"],
    recorded: Recorded,
    *,
    solver: object,
    key: object,
    trainable: PyTree = None,
) -> FixedStepRun:
    """Checks the arguments of `solve` for a stochastic flow; returns the run."""
    start, resumed = jnp.asarray(flow.t0, ts.dtype), None
    if isinstance(params, Solution):
        if not isinstance(params.checkpoint, RuleCheckpoint) or params.checkpoint.key is None:
            actual = f"one of {params.title}"
            raise _checks.fail("params", f"be parameters, or a Solution of a {type(flow).__name__}", actual)
        start, resumed = params.t_final.astype(ts.dtype), ResumedRule(params.state, params.checkpoint)
        key = params.checkpoint.key if key is None else key
    key = check_key_for_noise(key)
    method = check_method_for_noise(solver, flow)
    flowing, frozen = halves(flow, params, trainable, type(flow).__name__, RuleCheckpoint)
    _checks.check_finite("params", flowing, "A flow cannot start from there.")
    if resumed is None and _checks.is_concrete((flow, flowing, frozen)):
        check_start(flow, join(flowing, frozen))
    edges = jnp.concatenate([start[None], ts])
    # A step that fits a whole number of times, up to rounding, is taken that often.
    counts = jnp.ceil((edges[1:] - edges[:-1]) / largest_step(flow, method) * (1 - 1e-9)).astype(int)
    # Save times that are none, known only during the run, end it before it begins.
    counts = jnp.where(valid_times(ts, start), counts, 0)
    ks = (0 if resumed is None else resumed.checkpoint.k) + jnp.cumsum(counts)
    check_until(recorded.until)
    return FixedStepRun(
        flow=flow,
        method=method,
        key=key,
        edges=edges,
        counts=counts,
        frozen=frozen,
        start=flowing,
        ks=ks,
        observe=check_observe(recorded.observe),
        until=recorded.until,
        save_params=bool(recorded.save_params),
        resumed=resumed,
    )


def check_budget(run: FixedStepRun, max_steps: int | Int[Array, ""]) -> None:
    """Refuses a run that takes more steps than it may, where both are known."""
    if _checks.is_concrete((run.counts, max_steps)) and int(jnp.sum(run.counts)) > int(max_steps):
        actual = f"{int(max_steps)} for a run of {int(jnp.sum(run.counts))} steps"
        raise _checks.fail("max_steps", "be at least the number of steps", actual, "Raise it, or take larger steps.")


def check_no_limits(jumps: object, longest_step: object) -> None:
    """Refuses what adaptive steps alone can heed."""
    for name, value in (("jumps", jumps), ("longest_step", longest_step)):
        if value is not None:
            raise _checks.fail(name, "be None for a stochastic flow", "given", "Its steps are of fixed size.")


def check_key_for_noise(key: object, advice: str = "For instance jax.random.key(0).") -> Key[Array, ""]:
    """The random key of a stochastic flow, which has to be given."""
    if key is None:
        raise _checks.fail("key", "be a random key for a stochastic flow", "None", advice)
    return _checks.check_key(key)


def check_method_for_noise(solver: object, flow: AbstractStochasticFlow) -> AbstractStochasticMethod:
    """The method for a stochastic flow; `None` chooses one that keeps its weak order."""
    if solver is None:
        return SmallNoise() if flow.weak_order > 1 else EulerMaruyama()
    if not isinstance(solver, AbstractStochasticMethod):
        advice = "For instance gradflow.solvers.EulerMaruyama(dt); see FixedSteps for those of diffrax."
        actual = f"of type {type(solver).__name__}"
        raise _checks.fail("solver", "be a method for stochastic flows", actual, advice)
    return solver
