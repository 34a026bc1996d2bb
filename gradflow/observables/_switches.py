"""Switching events in a recorded history of partitions or activation patterns, and what they say."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import ArrayLike, Bool, Float, Int

from gradflow._checks import fail
from gradflow.observables._neuron_partition import FALSE_DEAD, TRUE_LIVING


class Switches(NamedTuple):
    """Events, in the order of time: pair `(sample, neuron)` left the state `before` for `after`.

    - `time`: the save time at which the new state is first seen; `earlier`: the one before it. A pair that switches
      twice between two save times goes unseen: save every step of a rule, and flows densely enough.
    - `sample`, `neuron`, `before`, `after`: one entry per event.
    - `spells`: every stay of a pair in a state as rows `(sample, neuron, state)`, with `born` and `died`, its first
      save time and that at which it ended; infinite for a stay that lasts beyond the run.
    """

    time: Float[np.ndarray, " events"]
    earlier: Float[np.ndarray, " events"]
    sample: Int[np.ndarray, " events"]
    neuron: Int[np.ndarray, " events"]
    before: Int[np.ndarray, " events"]
    after: Int[np.ndarray, " events"]
    spells: Int[np.ndarray, "spells 3"]
    born: Float[np.ndarray, " spells"]
    died: Float[np.ndarray, " spells"]

    def lifetimes(self, state: int = TRUE_LIVING) -> Float[np.ndarray, " stays"]:
        """How long each stay in a state took; infinite where it lasts beyond the run."""
        chosen = self.spells[:, 2] == state
        return self.died[chosen] - self.born[chosen]

    @property
    def violations(self) -> int:
        """Events in which a true-living or a false-dead set lost a member, its `a_k` keeping its sign."""
        absorbing = (self.before == TRUE_LIVING) | (self.before == FALSE_DEAD)
        return int(np.sum(absorbing & (self.before // 2 == self.after // 2)))

    @property
    def flips(self) -> int:
        """Events in which the output weight changed its sign."""
        return int(np.sum(self.before // 2 != self.after // 2))


def switches(ts: ArrayLike | Sequence[float], history: ArrayLike) -> Switches:
    """The switching events in a recorded history of partitions.

    The history `(T, n, neurons)` is that of a `NeuronPartition`, or of an `ActivationPattern`.

    Of activation patterns, whose states are 0 (dead) and 1 (living), `violations` and `flips` mean nothing.

    **Arguments**: `ts (T,)`: `sol.ts`; `history`: `sol.observed["name"]`, of a run that reached its end.

    **Raises** `ValueError` unless there is one row per time.

    >>> import gradflow as gf, numpy as np
    >>> events = gf.observables.switches([0.0, 1.0, 2.0], np.array([[[3]], [[2]], [[2]]]))
    >>> events.time.tolist(), events.violations, events.lifetimes().tolist()
    ([1.0], 1, [1.0])
    """
    ts, history = np.asarray(ts, float), np.asarray(history).astype(int)
    if ts.ndim != 1 or history.ndim != 3 or len(ts) != len(history):
        actual = f"of shape {history.shape} for times of shape {ts.shape}"
        raise fail("history", "be of shape (T, n, neurons)", actual)
    row, sample, neuron = np.nonzero(history[1:] != history[:-1])
    before, after = history[row, sample, neuron], history[row + 1, sample, neuron]
    pairs = np.argwhere(np.ones(history.shape[1:], bool))
    first = np.concatenate([pairs, history[0].reshape(-1, 1)], axis=1)
    later = np.stack([sample, neuron, after], axis=1)
    spells = np.concatenate([first, later])
    born = np.concatenate([np.full(len(first), ts[0]), ts[row + 1]])
    # A stay ends where the next one of the same pair begins.
    order = np.lexsort((born, spells[:, 1], spells[:, 0]))
    spells, born = spells[order], born[order]
    follows = np.all(spells[1:, :2] == spells[:-1, :2], axis=1)
    died = np.full(len(spells), np.inf)
    died[:-1][follows] = born[1:][follows]
    return Switches(ts[row + 1], ts[row], sample, neuron, before, after, spells, born, died)


def survivors(history: ArrayLike) -> Bool[np.ndarray, "n neurons"]:
    """Pairs that are true-living at all save times of a history: `(n, neurons)`.

    **Arguments**: `history (T, n, neurons)`: `sol.observed["name"]` of a `NeuronPartition`.

    **Raises** `ValueError` for a history of another shape.

    >>> import gradflow as gf, numpy as np
    >>> gf.observables.survivors(np.array([[[3, 3, 2]], [[3, 2, 3]]])).tolist()
    [[True, False, False]]
    """
    history = np.asarray(history)
    if history.ndim != 3:
        raise fail("history", "be of shape (T, n, neurons)", f"of shape {history.shape}")
    return np.all(history == TRUE_LIVING, axis=0)
