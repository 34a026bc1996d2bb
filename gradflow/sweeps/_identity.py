"""What tells one sweep from another: numbers, not names.

A store keeps, beside its results,

- a hash of every number that the members are made of, and a sketch of it that does not mind rounding;
- what `_probe` finds, for a few members of every shape: at the start, and at a random point near it, at a later time;
- a hash of the code of all functions, see `gradflow.programs`.

Numbers decide: where they differ, a store is not resumed. On another machine, or with other versions of libraries, the
same computation gives them within rounding only, and sketches take the place of hashes. Code decides about what numbers
at a few points cannot show, such as a term that sets in later, as far as Python writes functions down in the same way;
under another version of Python numbers alone decide.
"""

import functools
import json
from collections.abc import Iterable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from gradflow._tree import join, split
from gradflow.programs import DIALECT, code_of, numbers
from gradflow.programs._code import ArrayObject
from gradflow.programs._digest import Digest, measure
from gradflow.runs._identity import Measures, close, machine, probes_that_differ, spacing
from gradflow.runs._member import AbstractMember, Options, Solver
from gradflow.runs._run import CONSERVED, DERIVATIVE, STEP, point
from gradflow.runs._until import Until
from gradflow.stores._identity import VERSION, Identity
from gradflow.sweeps._members import PARTS, Members
from gradflow.sweeps._probe import elsewhere, probe, probe_anew

FEW = 4
"""Members of one shape that are looked at, the first and the last among them."""

MANY = 64
"""Members that are looked at in all, where there are not more shapes."""

LATER = 0.37, 17, 3, 0.1
"""The second look, at no special moment: fraction of the time, iterate, steps, push of the state."""

NAMES = {DERIVATIVE: "vector field", STEP: "step", CONSERVED: "conserved quantities"}
"""Of what a probe finds, in messages about stores."""


class Codes(NamedTuple):
    """Hashes of code by part, and of the arrays that functions close over, with a sketch of them."""

    parts: dict[str, str]
    arrays: str
    sketch: tuple[float, float]

    def __str__(self) -> str:
        return json.dumps([self.parts, self.arrays])


def codes_of(members: Members, solvers: list[Solver], until: Until | None) -> Codes:
    """The code of all functions in a sweep."""
    trees: dict[str, list[PyTree]] = {"solver": solvers, "function of until": [until]}
    for member in (shape_group.first for shape_group in members.shape_groups):
        trees.setdefault("loss or vector field", []).append(member.what)
        trees.setdefault("model", []).append(member.params)
        for name, fn in member.observe.items():
            trees.setdefault(f"observable {name!r}", []).append(fn)
    parts, captured = {}, Digest()
    sketches = []
    for part, values in trees.items():
        # Arrays that are leaves are known by their numbers; `None` in their place.
        codes = [code_of(eqx.filter(value, eqx.is_array, inverse=True)) for value in values]
        parts[part] = " ".join(dict.fromkeys(code.digest for code in codes))
        sketches.append(captured.add(array for code in codes for array in code.arrays if _is_number(array)))
    total = np.sqrt(np.arange(2.0, 2 + len(sketches))) @ np.array(sketches)  # weights as in `Digest`
    return Codes(parts, captured.hexdigest(), (float(total[0]), float(total[1])))


def identity_of(members: Members, options: Options, codes: Codes) -> Identity:
    """What a store keeps of a sweep."""
    record = {
        "version": VERSION,
        "dialect": DIALECT,
        "machine": machine(),
        "code": codes.parts,
        "captured": [codes.arrays, *codes.sketch],
        "members": members.hashes,
        "probes": _probes(members, options),
    }
    return Identity(record, np.array(members.sketches))


def differences(old: Identity, new: Identity, members: Members, options: Options) -> list[str]:
    """What differs between two sweeps, in words."""
    before, after = old.record, new.record
    changed = probes_that_differ(before["probes"], after["probes"])
    if changed:
        # What comes out different each time that it is traced says nothing.
        again = probes_that_differ(after["probes"], _probes(members, options, afresh=True))
        restless = {name for name, _ in again}
        changed = [(name, where) for name, where in changed if name not in restless]
    changes = [f"{name} at {members.describe(int(where[0]))}: {where[1]}" for name, where in _first_of_each(changed)]
    same_machine = before["machine"] == after["machine"]
    same_shape = old.sketches.shape == new.sketches.shape
    for i, part in enumerate(PARTS):
        if before["members"][part] == after["members"][part]:
            continue
        if same_machine or not same_shape or not _close(old.sketches[:, i], new.sketches[:, i], members):
            changes.append(f"data, models or observables: numbers of the {part}")
    (hash_before, *sketch_before), (hash_after, *sketch_after) = before["captured"], after["captured"]
    close = _close(np.array(sketch_before), np.array(sketch_after), members)
    if hash_before != hash_after and (same_machine or not close):
        changes.append("numbers that functions close over")
    if before["dialect"] == after["dialect"]:
        parts = {**before["code"], **after["code"]}
        changes += [f"code of {part}" for part in parts if before["code"].get(part) != after["code"].get(part)]
    return changes


def _first_of_each(changed: Iterable[tuple[str, tuple[str, str]]]) -> list[tuple[str, tuple[str, str]]]:
    names: dict[str, tuple[str, str]] = {}
    for name, where in changed:
        names.setdefault(name, where)
    return list(names.items())


def _probes(members: Members, options: Options, *, afresh: bool = False) -> dict[str, Measures | None]:
    """What is found at a few members, by number. `afresh`: with everything traced again."""
    return {str(number): _looks(members.member(number), options, afresh) for number in _looked_at(members)}


def _looked_at(members: Members) -> list[int]:
    """A few members of every shape, spread over the grid."""
    per_group = max(1, min(FEW, MANY // len(members.shape_groups)))
    rng, chosen = np.random.default_rng(0), []
    for alike in (shape_group.members for shape_group in members.shape_groups):
        ends = [alike[0], alike[-1]][:per_group]
        more = rng.permutation(alike[1:-1])[: max(0, per_group - 2)].tolist()
        chosen += sorted({*ends, *more})
    return chosen


def _looks(member: AbstractMember, options: Options, afresh: bool) -> Measures | None:
    """Measures of all that a probe finds, at the start and elsewhere, each with its change under rounding."""
    # A function that has not been seen before is traced again.
    look = eqx.filter_jit(functools.partial(probe_anew)) if afresh else probe
    looks: Measures = {}
    eps = _eps(member.params)
    # Of the types that moved parameters have, so that all looks share a program.
    member = member.replaced(join(*split(member.params)))
    try:
        with jax.debug_nans(False), jax.debug_infs(False):
            for where, variant in ((point(0.0, 0, LATER[2]), member), (point(*LATER), elsewhere(member, 0.5, 1))):
                at, near = (
                    look(variant, options, None, where),
                    look(elsewhere(variant, 4 * eps, 2), options, None, where),
                )
                for name, value in at.items():
                    pairs = zip(*map(jax.tree_util.tree_leaves, (value, near[name])), strict=True)
                    called = NAMES.get(name) or name.removeprefix("the ")
                    looks.setdefault(called, []).append(
                        [[*measure(a), _change(a, b), max(eps, spacing(a)) ** 0.5] for a, b in pairs]
                    )
    except Exception:
        # A function of the user's may refuse a point that no run comes to; the rest has to tell.
        return None
    return looks


def _change(a: ArrayObject, b: ArrayObject) -> float:
    left, right = numbers(a), numbers(b)
    if left.dtype.kind == "b":
        left, right = left.astype(int), right.astype(int)
    with np.errstate(invalid="ignore", over="ignore"):
        gap = np.abs(left.astype(complex) - right.astype(complex))
    return float(np.linalg.norm(gap[np.isfinite(gap)]))


def _close(a: np.ndarray, b: np.ndarray, members: Members) -> bool:
    """Whether sketches are the same within rounding."""
    eps = max(_eps(shape_group.first.params) for shape_group in members.shape_groups)
    return close(a, b, eps)


def _eps(params: PyTree) -> float:
    return max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree_util.tree_leaves(split(params)[0]))


def _is_number(array: ArrayObject) -> bool:
    return isinstance(array, jax.Array) or array.dtype.kind in "biufc"
