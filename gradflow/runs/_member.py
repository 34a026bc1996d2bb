"""Members of a family of runs: what each of them is a run of, where it starts, what is observed; each makes its run.

What is a flow, a flow with noise or a rule is found out once, in `member_of`, from the class of what is given.
"""

import abc
import dataclasses
import functools
from collections.abc import Sequence
from typing import Generic, TypeVar

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key, PyTree

from gradflow._checks import fail
from gradflow._tree import split
from gradflow.flows import AbstractFlow, AbstractStochasticFlow
from gradflow.rules import AbstractRule
from gradflow.runs._arguments import Recorded, check_size
from gradflow.runs._fixed_steps import check_key_for_noise, check_method_for_noise, check_no_limits, prepare_path
from gradflow.runs._iterate import prepare_rule
from gradflow.runs._method import check_method_without_noise
from gradflow.runs._record import Observable
from gradflow.runs._run import AbstractRun
from gradflow.runs._solve import Integration, prepare
from gradflow.runs._until import Until
from gradflow.solvers import AbstractMethod, AbstractStochasticMethod, StepControl, default_solver

Solver = diffrax.AbstractSolver | AbstractMethod | AbstractStochasticMethod

M = TypeVar("M", bound="AbstractMember")
What = TypeVar("What", bound=AbstractFlow | AbstractRule)
"""What a member is a run of."""

MOST_STEPS = 2**31 - 2
"""Iterate of a rule beyond which none is looked for."""


class Options(eqx.Module):
    """What all members have in common; numbers are leaves."""

    ts: Array
    solver: Solver | None  # as given
    default: Solver | None  # of all flows without noise, where no solver is given
    control: StepControl
    until: Until | None
    max_steps: Array
    save_params: bool = eqx.field(static=True)
    jumps: Array | None = None
    longest_step: Array | None = None
    # Of all functions and what they refer to: a program is not used again after a global has changed.
    code: str = eqx.field(static=True, default="")


class AbstractMember(eqx.Module, Generic[What]):
    """A flow or rule with what it starts from and what is observed.

    A pytree, so that members of equal structure are batched.
    """

    what: eqx.AbstractVar[What]
    params: eqx.AbstractVar[PyTree]
    observe: eqx.AbstractVar[dict[str, Observable]]

    @classmethod
    @abc.abstractmethod
    def of(cls, what: What, params: PyTree, observe: dict[str, Observable], key: object) -> "AbstractMember":
        """A member, with its key checked."""

    @property
    @abc.abstractmethod
    def t0(self) -> float:
        """Time at which it starts."""

    @abc.abstractmethod
    def parts(self) -> tuple[PyTree, PyTree, PyTree]:
        """What runs, with all that it draws from; the parameters; the observables. In the order of the leaves."""

    @abc.abstractmethod
    def check_values(self, flowing: Sequence[Array | np.ndarray]) -> None:
        """Raises `ValueError` for values of the parameters that it cannot start from."""

    @abc.abstractmethod
    def check_options(self, options: Options) -> None:
        """Raises `ValueError` for options that do not go with it."""

    @abc.abstractmethod
    def adaptive_flow(self) -> AbstractFlow | None:
        """The flow that takes steps of a size of its own choice, if there is one."""

    @abc.abstractmethod
    def method(self, options: Options) -> Solver | None:
        """The method that takes its steps; `None` where it needs none."""

    @abc.abstractmethod
    def settings(self, options: Options) -> dict[str, object]:
        """Numbers among the options that decide about its results alone."""

    @abc.abstractmethod
    def iterates(self, ts: Array) -> np.ndarray | None:
        """The numbers of the iterates nearest to save times, where there are iterates."""

    @abc.abstractmethod
    def run(self, options: Options, iterates: Int[Array, " rows"] | None = None) -> AbstractRun:
        """Its run. `iterates` are those that it saves; not needed for a run that is only looked at."""

    def recorded(self, options: Options) -> Recorded:
        """What its run keeps, and what ends that early."""
        return Recorded(self.observe, options.save_params, options.until)

    def replaced(self: M, params: PyTree) -> M:
        """The member from other parameters."""
        return dataclasses.replace(self, params=params)


class FlowMember(AbstractMember[AbstractFlow]):
    """A flow, in adaptive steps."""

    what: AbstractFlow
    params: PyTree
    observe: dict[str, Observable]

    @classmethod
    def of(cls, what: AbstractFlow, params: PyTree, observe: dict[str, Observable], key: object) -> "FlowMember":
        if key is not None:
            raise fail("key", "be None for a deterministic flow", "a key", "Only stochastic flows draw numbers.")
        return cls(what=what, params=params, observe=observe)

    @property
    def t0(self) -> float:
        return float(self.what.t0)

    def parts(self) -> tuple[PyTree, PyTree, PyTree]:
        return self.what, self.params, self.observe

    def check_values(self, flowing: Sequence[Array | np.ndarray]) -> None:
        _check_values_of_flow(self.what, self.params, flowing)

    def check_options(self, options: Options) -> None:
        check_method_without_noise(options.solver)

    def adaptive_flow(self) -> AbstractFlow | None:
        return self.what

    def method(self, options: Options) -> Solver | None:
        return options.default if options.solver is None else options.solver

    def settings(self, options: Options) -> dict[str, object]:
        return {}

    def iterates(self, ts: Array) -> np.ndarray | None:
        return None

    def run(self, options: Options, iterates: Int[Array, " rows"] | None = None) -> AbstractRun:
        return prepare(
            self.what,
            self.params,
            options.ts,
            self.recorded(options),
            Integration(
                solver=check_method_without_noise(self.method(options)),
                rtol=options.control.rtol,
                atol=options.control.atol,
                max_steps=options.max_steps,
                jumps=options.jumps,
                longest_step=options.longest_step,
            ),
        )


class PathMember(AbstractMember[AbstractStochasticFlow]):
    """A stochastic flow with the key of one of its paths, in steps of fixed size."""

    what: AbstractStochasticFlow
    key: Key[Array, "*batch"]
    params: PyTree
    observe: dict[str, Observable]

    @classmethod
    def of(
        cls, what: AbstractStochasticFlow, params: PyTree, observe: dict[str, Observable], key: object
    ) -> "PathMember":
        advice = "Return it from `build`: (flow, params, jax.random.key(seed))."
        return cls(what=what, key=check_key_for_noise(key, advice), params=params, observe=observe)

    @property
    def t0(self) -> float:
        return float(self.what.t0)

    def parts(self) -> tuple[PyTree, PyTree, PyTree]:
        return (self.what, self.key), self.params, self.observe

    def check_values(self, flowing: Sequence[Array | np.ndarray]) -> None:
        _check_values_of_flow(self.what, self.params, flowing)

    def check_options(self, options: Options) -> None:
        self.method(options)
        check_no_limits(options.jumps, options.longest_step)

    def adaptive_flow(self) -> AbstractFlow | None:
        return None

    def method(self, options: Options) -> Solver | None:
        return check_method_for_noise(options.solver, self.what)

    def settings(self, options: Options) -> dict[str, object]:
        numbers = jax.tree_util.tree_leaves(eqx.filter(self.method(options), eqx.is_array))
        return {"solver_numbers": [np.asarray(number).tolist() for number in numbers]}

    def iterates(self, ts: Array) -> np.ndarray | None:
        return None

    def run(self, options: Options, iterates: Int[Array, " rows"] | None = None) -> AbstractRun:
        return prepare_path(
            self.what,
            self.params,
            options.ts,
            self.recorded(options),
            solver=options.solver,
            key=self.key,
        )


class RuleMember(AbstractMember[AbstractRule]):
    """A rule, which saves the iterates nearest to the save times by its own clock."""

    what: AbstractRule
    params: PyTree
    observe: dict[str, Observable]

    @classmethod
    def of(cls, what: AbstractRule, params: PyTree, observe: dict[str, Observable], key: object) -> "RuleMember":
        if key is not None:
            raise fail("key", "be None for a rule", "a key", "A rule that draws numbers takes it when it is made.")
        return cls(what=what, params=params, observe=observe)

    @property
    def t0(self) -> float:
        return 0.0

    def parts(self) -> tuple[PyTree, PyTree, PyTree]:
        return self.what, self.params, self.observe

    def check_values(self, flowing: Sequence[Array | np.ndarray]) -> None:
        pass

    def check_options(self, options: Options) -> None:
        pass

    def adaptive_flow(self) -> AbstractFlow | None:
        return None

    def method(self, options: Options) -> Solver | None:
        return None

    def settings(self, options: Options) -> dict[str, object]:
        return {}

    def iterates(self, ts: Array) -> np.ndarray | None:
        return nearest_iterates(self.what, ts, MOST_STEPS)

    def run(self, options: Options, iterates: Int[Array, " rows"] | None = None) -> AbstractRun:
        return prepare_rule(
            self.what,
            self.params,
            jnp.zeros(options.ts.size, int) if iterates is None else iterates,
            self.recorded(options),
        )


@functools.singledispatch
def _class_for(what: object) -> type[AbstractMember] | None:
    """The class of the members that are runs of this; `None` for what cannot be run."""
    return None


_class_for.register(AbstractFlow, lambda what: FlowMember)
_class_for.register(AbstractStochasticFlow, lambda what: PathMember)
_class_for.register(AbstractRule, lambda what: RuleMember)


def can_be_run(what: object) -> bool:
    return _class_for(what) is not None


def member_of(what: object, params: PyTree, observe: dict[str, Observable], key: object = None) -> AbstractMember:
    """The member of a family of runs that this makes.

    **Raises** `ValueError` for what cannot be run, for a stochastic flow without a key, and for a key without use.
    """
    member_class = _class_for(what)
    if member_class is None:
        raise fail("what", "be a gradflow flow or rule", f"of type {type(what).__name__}")
    return member_class.of(what, params, observe, key)


def default_for(members: Sequence[AbstractMember], rtol: float) -> Solver | None:
    """The method for all flows among members that take adaptive steps; `None` where there are none."""
    adaptive = [(flow, member.params) for member in members if (flow := member.adaptive_flow()) is not None]
    if not adaptive:
        return None
    suited, _ = max(adaptive, key=lambda pair: pair[0].oscillatory or pair[0].step_limited)
    return default_solver(rtol, suited, any(flow.kinked(*split(params)) for flow, params in adaptive))


def _check_values_of_flow(flow: AbstractFlow, params: PyTree, flowing: Sequence[Array | np.ndarray]) -> None:
    if type(flow).check_values is not AbstractFlow.check_values:
        flow.check_values(*split(params))
    check_size(flowing, flowing[0].dtype)


def nearest_iterates(rule: AbstractRule, ts: Array, last: int) -> np.ndarray:
    """The iterates of a rule nearest to given times, by its own clock; at most `most`.

    Found by bisection, for clocks need not tick evenly.
    """
    times = np.asarray(ts, float)

    def clock(k: np.ndarray) -> np.ndarray:
        return np.asarray(rule.time(jnp.asarray(k)), float)

    start = float(clock(np.zeros(1, int))[0])
    pace = float(clock(np.ones(1, int))[0]) - start
    guess = np.clip(np.rint((times - start) / pace), 0, last).astype(int)
    if np.all(np.abs(clock(guess) - times) <= 0.5 * pace * (1 + 1e-9)):
        return guess
    low, high = np.zeros_like(guess), np.full_like(guess, last)
    while np.any(high > low):
        middle = (low + high) // 2
        later = 0.5 * (clock(middle) + clock(middle + 1)) >= times
        low, high = np.where(later, low, middle + 1), np.where(later, middle, high)
    return low
