"""What a run tells while it goes on: a small record after each segment."""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Float, PyTree, Scalar

from gradflow._checks import check_callable
from gradflow._tree import full_precision
from gradflow.runs._record import Record
from gradflow.runs._run import AbstractRun, Position


class Snapshot(NamedTuple):
    """Where a run of `solve` or `iterate` is, as its `callback` gets it after each segment of about 0.3 seconds.

    - `title`: what runs, such as `"GradientFlow"`. `share`: the part that is done, between 0 and 1.
    - `t`: time reached, in the unit of the flow or the rule. `loss`: the loss there; `None` where there is none.
    - `steps`: attempted steps. `gradient_evaluations`: -1 where the solver does not tell.
    - `ts (rows,)`: save times reached since the record before. `observed`: name -> `(rows, ...)`, what was observed
      there, or a pytree of such arrays.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> seen = []
    >>> flow = gf.GradientFlow(lambda w: 0.5 * w**2)
    >>> sol = gf.solve(flow, jnp.array(1.0), [0.5, 1.0], observe={"w": lambda w: w}, callback=seen.append)
    >>> seen[-1].share, sum(len(record.observed["w"]) for record in seen)
    (1.0, 2)
    """

    title: str
    share: float
    t: float
    loss: float | None
    steps: int
    gradient_evaluations: int
    ts: Float[np.ndarray, " rows"]
    observed: dict[str, PyTree]


Callback = Callable[[Snapshot], object]


@eqx.filter_jit
@full_precision
def position_of(run: AbstractRun, carry: PyTree) -> Position:
    return run.position(carry)


@eqx.filter_jit
@full_precision
def loss_of(run: AbstractRun, carry: PyTree) -> Scalar | None:
    return run.loss(run.state(carry))


def snapshot(run: AbstractRun, carry: PyTree, position: Position, loss: float | None, seen: int) -> Snapshot:
    """The record of a run whose first `seen` rows were told of before."""
    reached = int(position.rows)
    record: Record = carry.record
    return Snapshot(
        title=run.title,
        share=run.progress(carry)[0],
        t=float(position.t),
        loss=loss,
        steps=int(position.steps),
        gradient_evaluations=int(position.gradient_evaluations),
        ts=np.asarray(run.save_times())[seen:reached],
        observed=jax.tree_util.tree_map(lambda leaf: np.asarray(leaf)[seen:reached].copy(), record.observed),
    )


def check_callback(callback: object) -> None:
    """Refuses what cannot be called."""
    if callback is not None:
        check_callable("callback", callback, "fn(snapshot), see gradflow.Snapshot")
