"""Unfinished members, kept on disk so that an interrupted sweep goes on where it was."""

import pathlib

import equinox as eqx
import jax
import numpy as np

from gradflow.stores._state_file import StateFile, placed
from gradflow.sweeps._slots import EMPTY, SlotState


def unfinished_file(share: object, group: int) -> str:
    """The name of the file of a group, which stores that were begun long ago have, too."""
    return f"in-flight-{share}-{group}.npz"


class Checkpoint:
    """The slots of one group of members, worker by worker, in a file that is replaced as a whole.

    `tag`: of the sweep, its settings included. A file with another one is left from another computation.
    """

    def __init__(self, path: pathlib.Path, tag: str = ""):
        self._file = StateFile(path, tag)

    def due(self) -> bool:
        return self._file.due()

    def save(self, states: list[SlotState]) -> None:
        """Keeps the unfinished members, and how far they are."""
        self._file.save(jax.tree_util.tree_leaves(states))

    def load(self, blank: list[SlotState], missing: set[int]) -> list[SlotState]:
        """The slots to go on with, of members that are still missing; `blank` if there are none that fit."""
        leaves, structure = jax.tree_util.tree_flatten(blank)
        arrays = self._file.load(leaves)
        if arrays is None:
            return blank
        states = jax.tree_util.tree_unflatten(structure, arrays)
        return [_without(state, missing, empty) for state, empty in zip(states, blank, strict=True)]

    def clear(self) -> None:
        self._file.clear()


def _without(state: SlotState, missing: set[int], blank: SlotState) -> SlotState:
    """Slots without pending members and results, and without members that are not missing."""
    member_ids = np.where(np.isin(np.asarray(state.member_ids), sorted(missing)), np.asarray(state.member_ids), EMPTY)
    where = lambda f: (f.member_ids, f.next, f.num_finished)  # noqa: E731
    return eqx.tree_at(where, state, (placed(member_ids, blank.member_ids), blank.next, blank.num_finished))
