"""What tells one run from another: every number that it is made of, by name, its settings, and its code."""

import dataclasses
import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from gradflow.programs import DIALECT, code_of
from gradflow.programs._code import ArrayObject
from gradflow.programs._digest import Digest
from gradflow.runs._identity import Measures, close, machine, measured, measured_changes
from gradflow.runs._run import AbstractRun
from gradflow.stores._changes import changes
from gradflow.stores._identity import VERSION, Identity

NO_PART = frozenset({"code", "choice", "extents", "continued", "max_steps", "resumed"})
"""Fields that say nothing about the numbers of a run, or nothing that others do not say; `resumed` is read by itself.
A run may get more steps to take."""
CALLED = {"start": "params", "frozen": "params", "resumed": "params", "control": "", "edges": "ts", "ks": "steps"}
"""How messages call a field, by the argument that it comes from."""
FEW = 3
"""Numbers of an array that are shown one by one, and changes of one kind that are named."""


def identity_of(run: AbstractRun) -> Identity:
    """What a store keeps of a run."""
    fields = {f.name: getattr(run, f.name) for f in dataclasses.fields(run)}
    parts = {name: value for name, value in fields.items() if name not in NO_PART}
    if fields.get("resumed") is not None:
        parts["resumed"] = fields["resumed"]
    shown, hashes, sketches = {}, {}, []
    for name, array in _arrays(parts).items():
        digest = Digest()
        sketches.append(digest.add([array]))
        shown[name], hashes[name] = _shown(array), digest.hexdigest()
    codes = {name: code_of(value) for name, value in _functions(parts).items()}
    captured = Digest()
    sketch = captured.add(array for code in codes.values() for array in code.arrays if _is_number(array))
    record = {
        "version": VERSION,
        "dialect": DIALECT,
        "machine": machine(),
        "settings": _settings(parts) | shown,
        "numbers": hashes,
        "code": {name: code.digest for name, code in codes.items()},
        "captured": captured.hexdigest(),
    }
    return Identity(record, np.array([*sketches, sketch]))


def differences(old: Identity, new: Identity, eps: float) -> list[str]:
    """What differs between two runs, in words. On another machine numbers count within rounding, of size `eps`."""
    before, after = old.record, new.record
    differing = changes(json.dumps(before["settings"]), json.dumps(after["settings"]))
    if differing:
        return differing[:FEW] + ([f"and {len(differing) - FEW} more"] if len(differing) > FEW else [])
    if before["dialect"] != after["dialect"]:
        return [f"python: {before['dialect']} -> {after['dialect']}"]
    same_machine = before["machine"] == after["machine"]

    def differ(one: str, other: str, index: int) -> bool:
        return one != other and (same_machine or not close(old.sketches[index], new.sketches[index], eps))

    pairs = zip(before["numbers"].items(), after["numbers"].values(), strict=True)
    changed = [name for i, ((name, one), other) in enumerate(pairs) if differ(one, other, i)]
    if changed:
        more = f" and {len(changed) - FEW} more" if len(changed) > FEW else ""
        differing.append(f"numbers of {', '.join(changed[:FEW])}{more}")
    if differ(before["captured"], after["captured"], -1):
        differing.append("numbers that functions close over")
    names = {**before["code"], **after["code"]}
    differing += [f"code of {name}" for name in names if before["code"].get(name) != after["code"].get(name)]
    return differing


def machine_changes(old: Identity, new: Identity) -> str:
    """How the machine differs on which a run goes on, in words; empty where numbers are the same to the bit."""
    before, after = ({**identity.record["machine"], "node": ""} for identity in (old, new))
    return "; ".join(changes(json.dumps(before), json.dumps(after)))


def start_of(begun: PyTree) -> Measures:
    """What there is before the first step, field by field, without rows: in numbers, whatever computes them."""
    fields = {f.name: getattr(begun, f.name) for f in dataclasses.fields(begun) if f.name != "record"}
    return measured({name: eqx.filter(value, eqx.is_array) for name, value in fields.items()})


def start_differences(before: Measures, after: Measures) -> list[str]:
    """What differs between two of these, in words."""
    return [f"at the start, {change}" for change in measured_changes(before, after)][:FEW]


def _settings(parts: dict[str, PyTree]) -> dict[str, object]:
    plain: dict[str, object] = {name: value for name, value in parts.items() if isinstance(value, bool | str)}
    return plain | {"observe": sorted(parts["observe"])}


def _arrays(parts: dict[str, PyTree]) -> dict[str, Array]:
    """All arrays of a run, by the name of the argument and their place in it."""
    arrays = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(eqx.filter(parts, eqx.is_array))[0]:
        place = jax.tree_util.keystr(path[1:], simple=True, separator=".")
        name = _called(jax.tree_util.keystr(path[:1], simple=True), place)
        while name in arrays:  # the halves of parameters, and checkpoints, share names
            name += "'"
        arrays[name] = leaf
    return arrays


def _called(field: str, place: str) -> str:
    return ".".join(part for part in (CALLED.get(field, field), place) if part)


def _functions(parts: dict[str, PyTree]) -> dict[str, PyTree]:
    """All that is no array, with what is observed function by function."""
    parts_by_name = {}
    for name, value in parts.items():
        functions = eqx.filter(value, eqx.is_array, inverse=True)
        if name == "observe":
            parts_by_name |= {f"observe[{key!r}]": fn for key, fn in functions.items()}
        elif not isinstance(value, bool | str | None):
            parts_by_name[_called(name, "")] = functions
    return parts_by_name


def _shown(array: Array) -> object:
    """An array in words: its type and shape, or its numbers where these are few."""
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        return str(array.dtype)
    if array.size <= FEW:
        few = np.asarray(array, float if array.dtype.kind in "fV" else None)
        return jax.tree_util.tree_map(lambda n: float(f"{n:.6g}") if isinstance(n, float) else n, few.tolist())
    ends = ""
    if array.ndim == 1 and array.dtype.kind in "iuf":
        first, last = np.asarray(array[0]), np.asarray(array[-1])
        ends = f", {first:.6g} ... {last:.6g}"
    return f"{array.dtype} {tuple(array.shape)}{ends}"


def _is_number(array: ArrayObject) -> bool:
    return isinstance(array, jax.Array) or array.dtype.kind in "biufc"
