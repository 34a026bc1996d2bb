"""Derivatives of a run across the kinks of its field, where those of its steps miss a jump.

Where a trajectory goes through the surface `g(t, y, p) = 0` from a field `f-` to a field `f+`, the time at which it
does depends on the start and on the constants `p`, and a tangent `v` of the state jumps:

    v+ = v- + (f+ - f-) (dg/dy v- + dg/dp) / (dg/dy f- + dg/dt)

(the saltation matrix; M. A. Aizerman and F. R. Gantmacher 1958, Q. J. Mech. Appl. Math. 11, 163-178). A step across the
surface, when differentiated, sees the fields on both sides of it, but no time of crossing. What is missing is added to
its tangents here; values stay as they are, and without a derivative nothing is evaluated.

The parts of such a step before and after a crossing are taken again, as steps of their own, and differentiated; to the
tangents of a multistep method, which takes none, the jumps are added, which is of first order in the length of the
step. A surface that is crossed and crossed back within one step goes unseen.
"""

import functools
import warnings

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, Int, PyTree

from gradflow._checks import DerivativeWarning
from gradflow.runs._passage import Passage, Passed, dense, saltation


@eqx.filter_custom_jvp
def passed(y: PyTree, none: Passed, passage: Passage) -> tuple[PyTree, Passed]:
    """The state at the end of a passage, with derivatives that have jumped at the switches crossed on the way."""
    del passage
    return y, none


@passed.def_jvp
def _passed_jvp(primals: tuple, tangents: tuple) -> tuple[tuple, tuple]:
    (y, _, passage), (slope, _, moves) = primals, tangents
    tangent, met = saltation(passage, moves, dense(slope, y))
    return (y, met), (tangent, jax.tree_util.tree_map(lambda _: None, met))


@eqx.filter_custom_jvp
def renewed(state: PyTree, y: PyTree, crossed: Int[Array, ""], passage: Passage) -> PyTree:
    """The arrays of a method's state after a step to `y`, with derivatives that have jumped as those of `y` have."""
    del y, crossed, passage
    return state


@renewed.def_jvp
def _renewed_jvp(primals: tuple, tangents: tuple) -> tuple[PyTree, PyTree]:
    (state, y, crossed, passage), (slope, dy, _, moves) = primals, tangents
    slope = dense(slope, state)

    def again(state: PyTree, y: PyTree, passage: Passage) -> PyTree:
        return passage.method.renewed(passage.programmed(passage.field.t, None), passage.dt, y, state)

    def jumped() -> PyTree:
        _, jumped_state = eqx.filter_jvp(again, (state, y, passage), (slope, dy, moves))
        return dense(jumped_state, state)

    return state, jax.lax.cond(crossed > 0, jumped, lambda: slope)


@eqx.filter_custom_jvp
def reported(y: PyTree, missed: Int[Array, ""], *, lost: frozenset[str]) -> PyTree:
    """The final state; where it is differentiated, a warning says at run time what its derivative misses."""
    del missed, lost
    return y


@reported.def_jvp
def _reported_jvp(primals: tuple, tangents: tuple, *, lost: frozenset[str]) -> tuple[PyTree, PyTree]:
    (y, missed), (slope, _) = primals, tangents
    jax.debug.callback(functools.partial(_warn, tuple(sorted(lost))), missed)
    return y, slope


def _warn(lost: tuple[str, ...], missed: Int[Array, ""] | Int[np.ndarray, ""]) -> None:
    why = []
    if missed > 0:
        why.append(f"the trajectory slides along kinks, grazes them or begins on them ({int(missed)} times)")
    if lost:
        why.append(f"kinks of these operations are not followed: {', '.join(lost)}")
    if why:
        message = f"The derivative of this run may be wrong: {'; '.join(why)}."
        advice = "Take central differences, or smooth ReLU with gradflow.models.Smoothed."
        warnings.warn(f"{message} {advice}", DerivativeWarning, stacklevel=2)
