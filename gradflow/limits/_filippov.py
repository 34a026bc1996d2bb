"""`filippov`: runs at three widths of smoothing, extrapolated to none.

Where the field of a flow jumps, its solution is Filippov's: on a surface that both sides drive towards, it slides, with
the one average of the two fields that stays on the surface. A smoothed flow tends to it like

    y(s) = y + s c + o(s),        hence        y ~ 2 y(s/4) - y(s/2),

and what the coarser pair would have given, `2 y(s/2) - y(s)`, tells the error.
"""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, PyTree

from gradflow import _checks
from gradflow._solution import Solution
from gradflow._tree import scaled_norm
from gradflow.flows import AbstractFlow
from gradflow.runs._record import nan_where
from gradflow.runs._solve import solve


class FilippovSolution(eqx.Module):
    """The result of `filippov`.

    - `ts (T,)`; `params`: extrapolated parameters at the save times, each leaf with a leading axis `T`; `final`: the
      last row; `observed`: extrapolated observables (integer and Boolean ones are those of the finest run).
    - `error (T,)`: estimated error of `params`, a Euclidean norm. `observed_error`: the same for every observable that
      is extrapolated, elementwise.
    - `order (T,)`: measured order in the smoothing; far from one, the estimates are not to be trusted.
    - `smoothings (3,)`, `runs`: the runs behind it. `stats`: their costs, summed.
    """

    ts: Float[Array, " T"]
    params: PyTree
    final: PyTree
    observed: dict[str, Array]
    error: Float[Array, " T"]
    observed_error: dict[str, Array]
    order: Float[Array, " T"]
    smoothings: Float[np.ndarray, "3"]
    runs: tuple[Solution, Solution, Solution]
    stats: dict[str, Int[Array, ""]]

    def __repr__(self) -> str:
        widths = ", ".join(f"{s:.3g}" for s in self.smoothings)
        cost = int(self.stats["gradient_evaluations"])
        distance = float(_distance(_at(self.params, -1), _at(self.params, 0)))
        lines = [
            f"smoothing {widths}, extrapolated to 0: {cost} gradient evaluations in all",
            f"error     {float(self.error[-1]):.1e} at the end, {float(jnp.max(self.error)):.1e} at most; the"
            f" parameters moved by {distance:.3g}",
            f"order     {float(self.order[-1]):.2f} at the end, in the smoothing",
        ]
        return "FilippovSolution\n" + "\n".join("  " + line for line in lines)

    def __str__(self) -> str:
        return repr(self)


def filippov(
    build: Callable[[Float[Array, ""]], AbstractFlow],
    params: PyTree,
    ts: ArrayLike | Sequence[float],
    *,
    smoothing: float = 0.01,
    rtol: float | ArrayLike = 1e-5,
    **options: Any,
) -> FilippovSolution:
    """The solution of a flow whose field jumps, from three smoothed runs.

    It comes with an estimate of its error.

    **Arguments**

    - `build`: function `smoothing -> flow`, for instance with `gradflow.models.Smoothed`; called with scalar arrays
      of the values `smoothing`, `smoothing / 2` and `smoothing / 4`. All run in one compiled program.
    - `params`, `ts`: as for `gradflow.solve`.
    - `smoothing`: the largest of the three. Its error is of first order once bands of this angle around the kinks
      hardly overlap.
    - `rtol`: tolerance of each run, to be well below the smoothing.
    - `options`: anything else that `gradflow.solve` takes: `solver`, `observe`, `max_steps` and so on, but for `until`,
      `throw` and `save_params`.

    **Returns** a `FilippovSolution`. Neurons that slide stay alive, as on the Filippov solution (Filippov 1988).

    **Raises** `ValueError` for bad input; `SolveError` if a run fails.

    >>> import gradflow as gf, jax, jax.numpy as jnp
    >>> def build(smoothing):
    ...     predict = gf.models.Smoothed(smoothing)
    ...     return gf.GradientFlow(gf.EmpiricalRisk(jnp.eye(2), jnp.ones(2), gf.losses.square, predict=predict))
    >>> result = gf.filippov(build, gf.models.TwoLayer(2, 8, key=jax.random.key(0)), [0.0, 1.0])
    >>> result.final.weight.shape, result.error.shape
    ((8, 2), (2,))
    """
    _checks.check_callable("build", build, "build(smoothing) -> flow")
    _checks.check_positive("smoothing", smoothing, "It is the largest of three; typical values are 1e-1 ... 1e-3.")
    for name in sorted({"until", "throw", "save_params"} & set(options)):
        raise _checks.fail("options", f"not hold `{name}`", "one that does", "Runs of one length are compared.")
    smoothings = float(smoothing) * np.array([1.0, 0.5, 0.25])
    dtype = jnp.result_type(float)
    first, second, third = (solve(build(jnp.asarray(s, dtype)), params, ts, rtol=rtol, **options) for s in smoothings)
    fine, coarse = _extrapolate(second.params, third.params), _extrapolate(first.params, second.params)
    rough, good = _extrapolate(first.observed, second.observed), _extrapolate(second.observed, third.observed)
    changes = [_rows(a.params, b.params) for a, b in ((first, second), (second, third))]
    both = (changes[0] > 0) & (changes[1] > 0)
    order = jnp.log2(jnp.where(both, changes[0], 1) / jnp.where(both, changes[1], 1))
    return FilippovSolution(
        ts=third.ts,
        params=fine,
        final=_at(fine, -1),
        observed=good,
        error=_rows(fine, coarse),
        observed_error={k: jnp.abs(good[k] - rough[k]) for k in good if jnp.issubdtype(good[k].dtype, jnp.inexact)},
        order=nan_where(~both, order),
        smoothings=smoothings,
        runs=(first, second, third),
        stats={name: sum((run.stats[name] for run in (first, second)), third.stats[name]) for name in third.stats},
    )


def _extrapolate(coarse: PyTree, fine: PyTree) -> PyTree:
    """`2 fine - coarse` in floating-point leaves; others as in `fine`."""
    return jax.tree_util.tree_map(lambda a, b: 2 * b - a if eqx.is_inexact_array(b) else b, coarse, fine)


def _at(tree: PyTree, row: int) -> PyTree:
    return jax.tree_util.tree_map(lambda leaf: leaf[row] if eqx.is_inexact_array(leaf) else leaf, tree)


def _distance(one: PyTree, other: PyTree) -> Float[Array, ""]:
    pairs = zip(*(jax.tree_util.tree_leaves(eqx.filter(t, eqx.is_inexact_array)) for t in (one, other)), strict=True)
    return scaled_norm(jnp.concatenate([jnp.ravel(a - b) for a, b in pairs]))


def _rows(one: PyTree, other: PyTree) -> Float[Array, " T"]:
    """Distance between the floating-point leaves of two histories of parameters, at every save time."""
    histories = tuple(eqx.filter(tree, eqx.is_inexact_array) for tree in (one, other))
    return jax.vmap(_distance)(*histories)
