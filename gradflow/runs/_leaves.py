"""Leaves of parameters that look as if they flowed, or as if they stayed equal, and do not: said before a run."""

import warnings

import equinox as eqx
import jax
import jax.core
from jaxtyping import PyTree

LISTED = 5
"""Leaves that a message names at most."""


def warn_of_leaves(params: PyTree) -> None:
    """Says which Python floats stay as they are, and which array stands in two places, and so turns into two."""
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    floats = [_name(path) for path, leaf in leaves if type(leaf) is float and not _is_setting(params, path)]
    if floats:
        warnings.warn(
            f"The Python float at {_listed(floats)} in `params` does not flow: only arrays do. Make it one, such as"
            " jax.numpy.asarray(0.5), or say what flows by trainable=equinox.is_inexact_array.",
            UserWarning,
            stacklevel=4,
        )
    places: dict[int, list[str]] = {}
    for path, leaf in leaves:
        if eqx.is_inexact_array(leaf) and not isinstance(leaf, jax.core.Tracer) and leaf.size > 0:
            places.setdefault(id(leaf), []).append(_name(path))
    shared = [" and ".join(names) for names in places.values() if len(names) > 1]
    if shared:
        warnings.warn(
            f"The same array stands at {_listed(shared)} in `params`: each place flows by itself, as if it held a copy."
            " For weights that are tied, keep one and use it twice in the model; for two that only start alike, pass"
            " a copy.",
            UserWarning,
            stacklevel=4,
        )


def _is_setting(params: PyTree, path: jax.tree_util.KeyPath) -> bool:
    """Whether a number is a setting of one of Equinox's layers, such as the rate of `Dropout`."""
    owner: PyTree = params
    for key in path[:-1]:
        if isinstance(key, jax.tree_util.GetAttrKey):
            owner = getattr(owner, key.name, None)
        elif isinstance(key, jax.tree_util.DictKey | jax.tree_util.SequenceKey):
            owner = owner[key.key if isinstance(key, jax.tree_util.DictKey) else key.idx]
        else:
            return False
    return type(owner).__module__.startswith("equinox.nn")


def _name(path: jax.tree_util.KeyPath) -> str:
    return jax.tree_util.keystr(path) or "the top"


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
