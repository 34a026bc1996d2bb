"""What a run returns: times, parameters, observables, how it ended and what it cost."""

import enum
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from gradflow._checks import fail, is_concrete
from gradflow.stores import read_pytree, write_pytree

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Leaf = TypeVar("Leaf")


class Status(enum.IntEnum):
    """How a run ended: a code, with what it means and what helps. Those above `STOPPED` are failures."""

    remedy: str

    def __new__(cls, code: int, remedy: str) -> "Status":
        member = int.__new__(cls, code)
        member._value_, member.remedy = code, remedy
        return member

    RUNNING = -1, "has not ended"
    OK = 0, "reached the last save time"
    STOPPED = 1, "`until` was met"
    MAX_STEPS = 2, "the step budget ran out: raise max_steps, loosen rtol, or shorten ts"
    STEP_UNDERFLOW = (
        3,
        "the step fell below the resolution of time: a solution that blows up, a jump in the field, or a"
        " tolerance that this precision cannot meet; loosen rtol, use float64, or smooth the model",
    )
    NONFINITE = (
        4,
        "the state or its derivative stopped being finite: look for overflow, log(0) or NaN in the problem",
    )
    DIVERGED = 5, "the loss grew by a factor of a million: lower the learning rate"
    INTERRUPTED = (
        6,
        "was stopped before its end: from the keyboard, by `callback`, or since `store` could not be written",
    )
    INACCURATE = (
        7,
        "the accuracy asked for was not reached, `errors` tells what was: ask for less, allow more nodes,"
        " use float64, or shorten ts",
    )
    INVALID_TIMES = 8, "`ts` are not finite and increasing, or begin before the flow does"

    @property
    def label(self) -> str:
        """The name in `Solution.status`."""
        return self.name.lower()

    @classmethod
    def of(cls, label: str) -> "Status":
        return cls[label.upper()]

    @classmethod
    def labels(cls) -> tuple[str, ...]:
        """The names of the codes from zero on."""
        return tuple(member.label for member in cls if member >= 0)


DISCRETE = "discrete steps"
"""The `method` of a run of a rule, whose rows are iterates."""

LISTED = 8
"""Leaves that are named as held fixed, at most."""


class SolveError(RuntimeError):
    """A run that did not reach its end. The part that was computed is in `solution`."""

    def __init__(self, message: str, solution: "Solution"):
        super().__init__(message)
        self.solution = solution


class SolveInterrupted(KeyboardInterrupt):
    """A run that was interrupted by the keyboard. The part that was computed is in `solution`."""

    def __init__(self, solution: "Solution"):
        super().__init__("interrupted; the part that was computed is in the attribute `solution`")
        self.solution = solution


class Solution(eqx.Module):
    """The result of `solve` and `iterate`.

    Rows of `params` and of `observed` at save times that the run did not reach hold NaN (zero or False in integer and
    Boolean observables); `reached` tells which. A batch of runs, from `vmap`, has one more leading axis everywhere.

    - `ts (T,)`: save times. `params`: parameters at the save times, each leaf with a leading axis `T`, or `None`.
      `final`, `t_final`: the last accepted state, wherever the run ended. `observed`: name -> `(T, ...)`,
      or a pytree of such arrays.
    - `status`: `"ok"`, `"stopped"` (by `until`), `"max_steps"`, `"step_underflow"`, `"nonfinite"`, for rules
      `"diverged"`, `"interrupted"` in the partial result of a `SolveInterrupted`, and `"invalid_times"` of traced save
      times, which cannot be refused before the run; `"inaccurate"` by `gradflow.infinite_width`, where the run is
      complete but its accuracy is not what was asked for.
    - `stats`: exact counts `"steps"` (attempted), `"accepted"`, `"rejected"`, `"gradient_evaluations"` (initial step
      size and rejected steps included; -1 where the solver does not tell), `"hessian_vector_products"`.
    - `loss`: first and last value, where there is a loss. `drift`: name -> relative change of each conserved quantity.
    - `state`: the whole state at `t_final`, of which the parameters are a part: velocities, the memory of an optimiser,
      running integrals. A `Solution` in place of parameters lets `solve` and `iterate` go on from it, with the step and
      the history of the method (`checkpoint`), as if the run had never stopped; `stats` and `loss` are then those of
      the new part, `drift` is measured from the start of the first one.
    - `method`, `choice`: the method, and why it was chosen where none was given: kinks of the problem, or none.
    - `held`: paths of the floating-point arrays that did not flow. Those have no leading axis `T` in `params`.
    - `time_unit`: how `ts` count iterations, as the flow or the rule says it, such as `"t = k * learning_rate"`.
    - `errors`: name -> estimated error, the largest over the run, where one is looked for: of the observables of
      `gradflow.infinite_width`, of the activation of an order-parameter flow as `"quadrature"`; `None` from all others.

    **Time unit**: that of the flow or the rule; for gradient flow `t = k * learning_rate`.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> sol = gf.solve(gf.GradientFlow(lambda w: 0.5 * w**2), jnp.array(1.0), [1.0])
    >>> sol.status, sol.ts.shape, float(sol.loss[0]), bool(sol.drift["energy"] < 1e-4)
    ('ok', (1,), 0.5, True)
    """

    ts: Float[Array, "*batch T"]
    params: PyTree | None
    final: PyTree
    t_final: Float[Array, "*batch"]
    observed: dict[str, PyTree]
    code: Int[Array, "*batch"]
    saved: Int[Array, "*batch"]
    stats: dict[str, Int[Array, "*batch"]]
    loss: tuple[Float[Array, "*batch"], Float[Array, "*batch"]] | None
    drift: dict[str, Float[Array, "*batch"]]
    rtol: Float[Array, "*batch"] | None
    title: str = eqx.field(static=True)
    method: str = eqx.field(static=True)
    errors: dict[str, Float[Array, "*batch"]] | None = None
    state: PyTree = None
    checkpoint: PyTree = None
    choice: str = eqx.field(static=True, default="")
    held: tuple[str, ...] = eqx.field(static=True, default=())
    time_unit: str = eqx.field(static=True, default="")

    @property
    def status(self) -> Any:
        """How the run ended; an array of names for a batch."""
        return np.array(Status.labels())[np.asarray(self.code)] if np.ndim(self.code) else Status(int(self.code)).label

    @property
    def reached(self) -> Bool[np.ndarray, "*batch T"]:
        """Which save times were reached."""
        return np.arange(self.ts.shape[-1]) < np.asarray(self.saved)[..., None]

    def check(self, advice: str = "") -> None:
        """Raises `SolveError` unless the run ended with `"ok"` or `"stopped"`. Silent under tracing.

        `advice` is added to the remedy in its message.
        """
        if isinstance(self.code, jax.core.Tracer):
            return
        bad = np.asarray(self.code) > Status.STOPPED
        if np.any(bad):
            names = sorted({Status(int(code)).label for code in np.asarray(self.code)[bad]})
            which = f"{np.count_nonzero(bad)} of {bad.size} members: " if bad.ndim else ""
            # Under jax.jvp the status is known, while the times may not be.
            concrete = not bad.ndim and is_concrete((self.t_final, self.ts))
            where = f" at t = {float(self.t_final):.6g} of {float(self.ts[-1]):.6g}" if concrete else ""
            remedy = "; ".join(f"{name}: {Status.of(name).remedy}" for name in names)
            message = f"{which}{self.title} ended with status {remedy}{where}. {advice}{' ' if advice else ''}"
            raise SolveError(message + "The part computed is in `error.solution`; throw=False returns it.", self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes all of it to one file, without pickle; `gradflow.load` reads it.

        Functions in the model, such as activations, are kept by name.

        **Raises** `ValueError` for a function or class that cannot be imported by name, such as a lambda.

        >>> import gradflow as gf, jax.numpy as jnp, os, tempfile
        >>> sol = gf.solve(gf.GradientFlow(lambda w: 0.5 * w**2), jnp.array(1.0), [1.0])
        >>> path = os.path.join(tempfile.mkdtemp(), "run.gf")
        >>> sol.save(path)
        >>> float(gf.load(path).final) == float(sol.final)
        True
        """
        write_pytree(path, self)

    def plot(self, **options: int) -> "Figure":
        """The figure of this run, the loss and every observable over time: `gradflow.plot.solution(self, **options)`.

        >>> import gradflow as gf, jax.numpy as jnp
        >>> loss = lambda w: 0.5 * w**2
        >>> sol = gf.solve(gf.GradientFlow(loss), jnp.array(1.0), [0.0, 0.5, 1.0], observe={"loss": loss})
        >>> [ax.get_ylabel() for ax in sol.plot().axes]
        ['loss']
        """
        from gradflow import plot

        return plot.solution(self, **options)

    def describe(self) -> list[tuple[str, str]]:
        """What `print` shows, as pairs of a name and a text."""
        return _summary(self) if np.ndim(self.code) == 0 else _batch_summary(self)

    def _repr_html_(self) -> str | None:
        # Notebooks ask for this; `None` leaves them to the text.
        if not is_concrete(self):
            return None
        from gradflow import reports

        return reports.fragment(self)

    def __repr__(self) -> str:
        if not is_concrete(self):
            return f"Solution({self.title}, traced)"
        return "Solution\n" + "\n".join(f"  {name:<9}{text}" for name, text in self.describe())

    def __str__(self) -> str:
        return repr(self)


def load(path: str | os.PathLike[str], like: PyTree = None) -> Solution:
    """Reads what `Solution.save` wrote. The result can be continued as the one that was saved.

    **Arguments**: `like`: parameters of the same model, for models whose structure the file cannot describe: nodes of
    a pytree that are neither containers nor dataclasses, such as modules of Flax's `nnx`.

    **Raises** `ValueError` for other files, names that cannot be imported any longer, and where `like` is missing.
    """
    contents = read_pytree(path, like)
    if not isinstance(contents, Solution):
        raise fail("path", "name a file that `Solution.save` wrote", f"one with a {type(contents).__name__}")
    return contents


def nan_unless_ended(sol: Solution) -> Solution:
    """The solution with NaN for what a run that failed has to say about its end; for runs that cannot raise an error.

    These are the final parameters and state, the last loss and the drifts, in every floating-point entry. Rows that
    were reached, counts, the status and `t_final`, which tell of the failure, stay as they are.
    """
    # A factor, not a choice: so the derivatives of these numbers are NaN as well.
    factor = jnp.where(sol.code > Status.STOPPED, jnp.nan, 1.0)

    def spoil(leaf: Any) -> Any:
        if not eqx.is_inexact_array(leaf):
            return leaf
        return leaf * jnp.reshape(factor, factor.shape + (1,) * (leaf.ndim - factor.ndim)).astype(leaf.dtype)

    ends = lambda s: (s.final, s.state, s.drift, *(() if sol.loss is None else (s.loss[1],)))  # noqa: E731
    return eqx.tree_at(ends, sol, jax.tree_util.tree_map(spoil, ends(sol)), is_leaf=lambda leaf: leaf is None)


REVERSE_MODE = (
    "A run of gradflow cannot be differentiated in reverse mode (jax.grad, jax.vjp, jax.jacrev): its steps are chosen"
    " as it goes. With few inputs use forward mode, jax.jvp or jax.jacfwd. With many, hand the flow to diffrax:"
    " trainable, frozen = gradflow.split_params(params); found = diffrax.diffeqsolve(flow.terms(), diffrax.Tsit5(), t0,"
    " t1, dt0, flow.init(trainable, frozen), args=frozen, stepsize_controller=diffrax.PIDController(rtol, atol));"
    " gradflow.join_params(flow.params(state), frozen) are the parameters again."
)


def ended(sol: Solution, throw: bool, advice: Callable[[], str] = str) -> Solution:
    """The result of a run as the caller gets it: an error if it failed; where none can be raised, under a trace, NaN.

    **Raises** `SolveError`, unless `throw` is false; `advice()` is added to its message.
    """
    if throw and not is_concrete(sol.code):
        sol = nan_unless_ended(sol)
    elif throw and bool(np.any(np.asarray(sol.code) > Status.STOPPED)):
        sol.check(advice())
    if is_concrete(sol):
        return sol
    arrays, static = eqx.partition(sol, eqx.is_inexact_array)
    return eqx.combine(eqxi.nondifferentiable_backward(arrays, msg=REVERSE_MODE), static)


def _summary(sol: Solution) -> list[tuple[str, str]]:
    leaves = jax.tree_util.tree_leaves(moving(sol.final, sol.held))
    size = sum(leaf.size for leaf in leaves)
    dtypes = "/".join(sorted({str(leaf.dtype) for leaf in leaves}))
    stats = {name: int(value) for name, value in sol.stats.items()}
    lines = [("run", f"{sol.title}, {size} parameters, {dtypes}"), ("method", _method(sol))]
    if sol.held:
        lines.append(("held fixed:", f" {_held(sol)}"))
    reached = f"{int(sol.saved)} of {sol.ts.shape[-1]} save times, t = {float(sol.t_final):.6g}"
    lines.append(("status", f"{sol.status} ({Status.of(sol.status).remedy}); {reached}"))
    steps = f"{stats['steps']} ({stats['accepted']} accepted, {stats['rejected']} rejected)"
    cost = f"{stats['gradient_evaluations']} gradient evaluations"
    if stats["gradient_evaluations"] < 0:
        cost = "gradient evaluations not reported by this solver"
    if stats["hessian_vector_products"]:
        cost += f", {stats['hessian_vector_products']} Hessian-vector products"
    lines.append(("steps", f"{steps}, {cost}"))
    if sol.loss is not None:
        lines.append(("loss", f"{float(sol.loss[0]):.6g} -> {float(sol.loss[1]):.6g}"))
    if sol.drift:
        drift = ", ".join(f"{name} {float(value):.1e}" for name, value in sol.drift.items())
        lines.append(("drift", f"{drift} (relative change of what the exact flow conserves)"))
    if sol.errors:
        errors = ", ".join(f"{name} {float(value):.1e}" for name, value in sol.errors.items())
        lines.append(("errors", f"{errors} (estimates, the largest over the run)"))
    if sol.observed:
        shapes = ", ".join(f"{name} {_shapes(value)}" for name, value in sol.observed.items())
        lines.append(("observed", shapes))
    return lines


def _batch_summary(sol: Solution) -> list[tuple[str, str]]:
    names, counts = np.unique(sol.status, return_counts=True)
    ended = ", ".join(f"{count} {name}" for name, count in zip(names, counts, strict=True))
    cost = np.asarray(sol.stats["gradient_evaluations"])
    text = [("run", f"{sol.title}, batch of shape {np.shape(sol.code)}"), ("method", _method(sol)), ("status", ended)]
    if sol.held:
        text.insert(2, ("held fixed:", f" {_held(sol)}"))
    text.append(("steps", f"gradient evaluations {cost.min()} ... {cost.max()}, {cost.sum()} in all"))
    return text


def _shapes(value: PyTree) -> str:
    shapes = [str(tuple(leaf.shape)) for leaf in jax.tree_util.tree_leaves(value)]
    return shapes[0] if eqx.is_array(value) else f"{type(value).__name__} of {', '.join(shapes)}"


def _method(sol: Solution) -> str:
    name = f"{sol.method} ({sol.choice})" if sol.choice else sol.method
    return name if sol.rtol is None else f"{name}, rtol = {float(np.max(sol.rtol)):.3g}"


def _held(sol: Solution) -> str:
    more = f" and {len(sol.held) - LISTED} more" if len(sol.held) > LISTED else ""
    return ", ".join(sol.held[:LISTED]) + more


def moving(params: PyTree, held: tuple[str, ...]) -> PyTree:
    """The leaves of parameters that flow, and `None` for all others."""

    def flows(path: jax.tree_util.KeyPath, leaf: Leaf) -> Leaf | None:
        return leaf if eqx.is_inexact_array(leaf) and jax.tree_util.keystr(path) not in held else None

    return jax.tree_util.tree_map_with_path(flows, params)
