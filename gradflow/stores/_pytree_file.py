"""A pytree in one file, without pickle: its arrays, and a description of the rest as JSON, in a zip archive.

What can be described are containers, numbers, strings, arrays, random keys, dataclasses (so all modules of Equinox) and
functions and classes that can be imported by name. Reading imports these by name and calls none of them. Other nodes of
a pytree, such as those of Flax's `nnx`, keep their arrays, and take their structure from a pytree that is given.
"""

import dataclasses
import functools
import importlib
import json
import os
import pathlib
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from gradflow._checks import fail

VERSION = 1
"""Of the format; a file of a later one is refused."""

FORMER_FIELDS: dict[str, dict[str, str]] = {
    "gradflow.flows._second_order:MomentumState": {"lost": "dissipated"},
    "gradflow.runs._continue:Checkpoint": {"lost": "rounding_error", "floor": "scale"},
    "gradflow.solvers._ndf:History": {"rate": "contraction"},
}
"""Fields of saved classes that have changed their names, so that older files can be read."""


def write_pytree(path: str | os.PathLike[str], tree: PyTree) -> None:
    """Writes a pytree of concrete values; the file is there whole or not at all.

    **Raises** `ValueError` for values that cannot be described, such as functions without a name.
    """
    writer = _Writer()
    described = {"version": VERSION, "tree": writer.describe(tree, "")}
    target = pathlib.Path(path)
    partial = target.with_name(target.name + ".part")
    try:
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("tree.json", json.dumps(described))
            for name, array in writer.arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, array, allow_pickle=False)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def read_pytree(path: str | os.PathLike[str], like: PyTree = None) -> PyTree:
    """The pytree in a file. `like`: a pytree with nodes of the kinds that the file cannot describe, if it has such.

    **Raises** `ValueError` for a file of another kind, and where a name cannot be imported or `like` is missing.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            described = json.loads(archive.read("tree.json"))
            if described.get("version") != VERSION:
                actual = f"of version {described.get('version')} of the format"
                raise fail(
                    "path", f"name a file of version {VERSION}", actual, "Read it with the version that wrote it."
                )

            def load(name: str) -> np.ndarray:
                with archive.open(f"{name}.npy") as file:
                    return np.lib.format.read_array(file, allow_pickle=False)

            return _Reader(load, like).build(described["tree"])
    except (zipfile.BadZipFile, KeyError) as error:
        raise fail("path", "name a file that `Solution.save` wrote", f"{os.fspath(path)!r}, which is none") from error


class _Writer:
    """Describes values, and collects the arrays among them."""

    def __init__(self) -> None:
        self.arrays: dict[str, np.ndarray] = {}
        self.known: dict[int, dict[str, str]] = {}

    def describe(self, value: object, where: str) -> object:
        if value is None or isinstance(value, bool | int | str):
            return value
        if isinstance(value, float):
            return {"float": value.hex()}
        if isinstance(value, jax.Array | np.ndarray | np.generic):
            return self._array(value, where)
        if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
            return {type(value).__name__: [self.describe(v, f"{where}[{i}]") for i, v in enumerate(value)]}
        if isinstance(value, dict) and type(value) is dict and all(isinstance(key, str) for key in value):
            return {"dict": [[key, self.describe(v, f"{where}[{key!r}]")] for key, v in value.items()]}
        if isinstance(value, tuple):
            parts = {name: self.describe(getattr(value, name), f"{where}.{name}") for name in value._fields}  # pyright: ignore
            return {"namedtuple": _name_of(type(value), where), "fields": parts}
        if type(value) is functools.partial:
            parts = [self.describe(part, where) for part in (value.func, list(value.args), dict(value.keywords))]
            return {"partial": parts}
        if isinstance(value, np.dtype):
            return {"dtype": str(value)}
        if dataclasses.is_dataclass(value) and not isinstance(value, type) and not _opaque(value):
            return self._dataclass(value, where)
        if callable(value) and jax.tree_util.all_leaves([value]):
            return {"name": _name_of(value, where)}
        return self._node(value, where)

    def _array(self, value: jax.Array | np.ndarray | np.generic, where: str) -> dict[str, str]:
        if isinstance(value, jax.core.Tracer):
            raise fail(where or "tree", "be concrete", "traced", "Save it outside of jax.jit and jax.vmap.")
        if id(value) in self.known:
            return self.known[id(value)]
        name, data = f"a{len(self.arrays)}", value
        extra: dict[str, str] = {}
        if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            extra["key"], data = str(jax.random.key_impl(value)), jax.random.key_data(value)
        array = np.asarray(data)
        if array.dtype.kind == "V":  # bfloat16 and its kin, which the file format does not know
            extra["dtype"], array = str(array.dtype), array.view(f"u{array.dtype.itemsize}")
        elif array.dtype.kind not in "biufcUS":
            raise fail(where or "tree", "hold numbers or strings", f"an array of type {array.dtype}")
        self.arrays[name] = array
        described = {"array": name, "on": "host" if isinstance(value, np.ndarray | np.generic) else "device"} | extra
        self.known[id(value)] = described
        return described

    def _dataclass(self, value: Any, where: str) -> dict[str, object]:
        fields = {}
        for field in dataclasses.fields(value):
            if hasattr(value, field.name):
                fields[field.name] = self.describe(getattr(value, field.name), f"{where}.{field.name}")
        return {"dataclass": _name_of(type(value), where), "fields": fields}

    def _node(self, value: PyTree, where: str) -> dict[str, object]:
        """A node of a kind that JAX knows and this file does not: its leaves, in order, and a fingerprint."""
        leaves, structure = jax.tree_util.tree_flatten(value, is_leaf=lambda leaf: leaf is None)
        if len(leaves) == 1 and leaves[0] is value:
            raise fail(where or "tree", "be an array, a container, a dataclass or importable", f"{value!r:.80}")
        parts = [self.describe(leaf, f"{where}({i})") for i, leaf in enumerate(leaves)]
        return {"node": type(value).__qualname__, "structure": str(structure), "leaves": parts}


class _Reader:
    """Builds values from their descriptions."""

    def __init__(self, load: Callable[[str], np.ndarray], like: PyTree):
        self.load, self.like = load, like
        self.known: dict[str, jax.Array | np.ndarray] = {}

    def build(self, described: Any) -> PyTree:
        if not isinstance(described, dict):
            return described
        tag = next(iter(described))
        content = described[tag]
        if tag == "float":
            return float.fromhex(content)
        if tag == "array":
            return self._array(described)
        if tag in ("list", "tuple"):
            return (list if tag == "list" else tuple)(self.build(part) for part in content)
        if tag == "dict":
            return {key: self.build(part) for key, part in content}
        if tag == "dtype":
            return jnp.dtype(content)
        if tag == "name":
            return _imported(content)
        if tag == "partial":
            function, args, keywords = (self.build(part) for part in content)
            return functools.partial(function, *args, **keywords)
        if tag == "node":
            return self._node(described)
        cls = _imported(content)
        former = FORMER_FIELDS.get(content, {})
        fields = {key: self.build(part) for key, part in described["fields"].items()}
        for name in former.keys() & fields.keys():
            fields[former[name]] = fields.pop(name)
        if tag == "namedtuple":
            return cls(**fields)
        return _assembled(cls, fields)

    def _array(self, described: Mapping[str, str]) -> jax.Array | np.ndarray:
        name = described["array"]
        if name not in self.known:
            array = self.load(name)
            if "dtype" in described:
                array = array.view(jnp.dtype(described["dtype"]))
            value = array if described["on"] == "host" else jnp.asarray(array)
            if value.dtype != array.dtype:
                advice = "Enable float64: jax.config.update('jax_enable_x64', True)."
                raise fail("path", f"hold types that JAX has now, not {array.dtype}", "another's", advice)
            self.known[name] = (
                jax.random.wrap_key_data(jnp.asarray(value), impl=described["key"]) if "key" in described else value
            )
        return self.known[name]

    def _node(self, described: Mapping[str, Any]) -> PyTree:
        for node in _nodes(self.like):
            structure = jax.tree_util.tree_structure(node, is_leaf=lambda leaf: leaf is None)
            if str(structure) == described["structure"]:
                return jax.tree_util.tree_unflatten(structure, [self.build(part) for part in described["leaves"]])
        actual = "None" if self.like is None else "without such a node, or with one of another structure"
        advice = "Pass parameters of the same model, as `like=params`."
        raise fail("like", f"hold a {described['node']}, whose structure the file does not hold", actual, advice)


def _opaque(value: Any) -> bool:
    """Whether a dataclass keeps more than its fields, so that these do not describe it."""
    names = {field.name for field in dataclasses.fields(value)}
    return not set(getattr(value, "__dict__", {})) <= names


def _assembled(cls: type, fields: Mapping[str, object]) -> object:
    """An instance with these fields, without a call of anything of its class."""
    value = object.__new__(cls)
    defaults = {f.name: f.default for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING}
    for name, content in {**defaults, **fields}.items():
        object.__setattr__(value, name, content)
    return value


def _nodes(tree: PyTree) -> list[PyTree]:
    """A pytree and all nodes in it, leaves left out."""
    nodes, open_ones = [], [tree]
    while open_ones:
        node = open_ones.pop()
        nodes.append(node)
        children = jax.tree_util.tree_leaves(node, is_leaf=lambda child, node=node: child is not node)
        open_ones += [child for child in children if child is not node and not jax.tree_util.all_leaves([child])]
    return nodes


def _name_of(value: object, where: str) -> str:
    """The module and name under which a function or a class can be imported."""
    value = getattr(value, "__wrapped__", value) if not hasattr(value, "__qualname__") else value
    name = f"{getattr(value, '__module__', None)}:{getattr(value, '__qualname__', None)}"
    try:
        if _imported(name) is not None:
            return name
    except ValueError as error:
        advice = "Define it in a module under a name of its own, or save `sol.final` and rebuild the model."
        raise fail(where or "tree", "be importable by name", f"{value!r:.80}", advice) from error
    raise AssertionError


def _imported(name: str) -> Any:
    module, _, path = name.partition(":")
    try:
        value: Any = importlib.import_module(module)
        for part in path.split("."):
            value = getattr(value, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise fail("path", f"hold names that can be imported, such as {name!r}", f"not ({error})") from error
    return value
