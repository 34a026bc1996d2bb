"""Complaints about stores that hold something else than what is to be resumed, and what differs, in words."""

import json
import os
import pathlib

from gradflow._checks import fail

AFRESH = "Use another path, or start this one over with resume=False (--fresh on the command line)."


def unknown(path: pathlib.Path) -> ValueError:
    """The complaint about a store that does not tell of which computation it holds the results."""
    actual = f"{str(path)!r}, which another version of gradflow wrote, or which was copied without it"
    advice = f"It can be read by gradflow.sweeps.open_store. {AFRESH}"
    return fail("store", "keep what tells its numbers from others in order to be resumed", actual, advice)


def changes(old: str, new: str) -> list[str]:
    """What differs between two configurations, in words."""
    before, after = json.loads(old), json.loads(new)
    # As text, since the order of the axes counts.
    names = sorted(before.keys() | after.keys())
    changed = [name for name in names if json.dumps(before.get(name)) != json.dumps(after.get(name))]
    return [_change(name, before.get(name), after.get(name)) for name in changed]


def refuse(changes: list[str], path: str | os.PathLike[str], what: str = "sweep") -> None:
    """Complains about a store if anything has changed. `what`: the kind of computation."""
    if changes:
        actual = f"{str(path)!r} with changes ({'; '.join(changes)})"
        raise fail("store", f"hold the same {what} in order to be resumed", actual, AFRESH)


def _change(name: str, before: object, after: object) -> str:
    if isinstance(before, dict) and isinstance(after, dict):
        keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
        differences = [f"{name}[{key!r}]: {_short(before.get(key))} -> {_short(after.get(key))}" for key in keys]
        return "; ".join(differences) or f"order of {name}: {_short(list(before))} -> {_short(list(after))}"
    return f"{name}: {_short(before)} -> {_short(after)}"


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
