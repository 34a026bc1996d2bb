"""What functions and objects compute, as a hash: code and all that it refers to, not names, places or comments.

Two functions of one hash have the same instructions, and the same constants in closures, defaults, globals and in the
helpers that they call. Functions of installed packages go by their names; what they close over counts as well, such as
the constants of an optax transform. Instructions differ between versions of Python: see `DIALECT`.
"""

import builtins
import dataclasses
import dis
import enum
import functools
import hashlib
import re
import sys
import sysconfig
import types
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.core
import numpy as np
from jaxtyping import PyTree

DIALECT = f"{sys.implementation.cache_tag}-{sys.flags.optimize}"
"""Hashes compare where these are the same."""

LIBRARIES = tuple(
    str(Path(folder).resolve()) + "/"
    for folder in {*map(sysconfig.get_path, ("stdlib", "platstdlib", "purelib", "platlib")), Path(__file__).parents[1]}
)
"""Where code lies that goes by its name: installed packages, and this one."""

CHANGES_IN_PLACE = frozenset(
    ("add", "append", "appendleft", "clear", "discard", "extend", "insert", "pop", "popitem", "popleft")
) | frozenset(("remove", "reverse", "setdefault", "sort", "update"))
"""Methods of containers. What a function calls them on is its memory, such as a list of calls, and no part of it."""

STARTS = frozenset(("__init__", "__new__", "__post_init__", "__setstate__", "__set_name__"))
"""Methods that set attributes for good."""

UNSEEN = frozenset(("__eq__", "__hash__", "__repr__", "__str__", "__format__", "__reduce__", "__getstate__"))
"""Methods without influence on numbers."""

SKIPPED = frozenset(("RESUME", "CACHE", "NOP", "PRECALL", "EXTENDED_ARG", "COPY_FREE_VARS", "MAKE_CELL"))
"""Instructions without meaning of their own."""

LONG = 64
"""Numbers in a list from which on it is hashed as an array."""


ArrayObject = jax.Array | np.ndarray | np.generic
"""An array of JAX or of NumPy, or a scalar of the latter."""

Container = tuple | list | dict | set | frozenset | types.MappingProxyType | functools.partial
"""What is read again each time that it is met: whether equal ones are one object is up to the process."""


class Code(NamedTuple):
    """A hash, and the arrays met on the way, of which the hash knows shapes and types only."""

    digest: str
    arrays: list[ArrayObject]


def code_of(value: object) -> Code:
    """The code of a function, or of anything that holds functions.

    >>> from gradflow.programs._code import code_of
    >>> half, same, third = (lambda w: 0.5 * w), (lambda v: 0.5 * v), (lambda w: 0.3 * w)
    >>> code_of(half).digest == code_of(same).digest, code_of(half).digest == code_of(third).digest
    (True, False)
    """
    reader = _Reader(frozenset(), frozenset())
    reader.read(value)
    if reader.written or reader.indexed:
        # Which attributes are memory is known after all code has been met.
        reader = _Reader(frozenset(reader.written), frozenset(reader.indexed))
        reader.read(value)
    return Code(reader.digest(), reader.arrays)


class _Reader:
    """Goes through objects once each, in an order that does not depend on the process."""

    def __init__(self, written: frozenset[str], indexed: frozenset[str]):
        self.written, self.indexed = set(written), set(indexed)
        self.arrays: list[ArrayObject] = []
        self._hash = hashlib.sha256()
        self._met: dict[tuple[str, int], tuple[int, object]] = {}
        self._open: set[int] = set()

    def digest(self) -> str:
        return self._hash.hexdigest()[:16]

    def put(self, *words: object) -> None:
        self._hash.update(repr(words).encode())

    def read(self, value: object) -> None:
        if value is None or isinstance(value, bool | int | float | complex | str | bytes | range | slice | np.dtype):
            self.put(type(value).__name__, value.value if isinstance(value, enum.Enum) else value)
            return
        if isinstance(value, Container):
            if id(value) not in self._open:
                self._open.add(id(value))
                self._container(value)
                self._open.discard(id(value))
        elif isinstance(value, jax.core.Tracer):
            self.put("traced", value.shape, str(value.dtype))
        elif isinstance(value, jax.Array | np.ndarray | np.generic) and value.dtype != object:
            self._array(value)
        elif not self._again("object", value):
            self._one(value)

    def _again(self, what: str, value: object) -> bool:
        """Whether an object has been met before; it is held, so that its address stays its own."""
        already_met = (what, id(value)) in self._met
        place, _ = self._met.setdefault((what, id(value)), (len(self._met), value))
        if already_met:
            self.put("met", place)
        return already_met

    def _one(self, value: object) -> None:
        if isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, types.MethodType):
            self.put("method")
            self.read(value.__func__)
            self.read(value.__self__)
        elif isinstance(value, types.ModuleType):
            self._module(value, ())
        elif isinstance(value, type):
            self._class(value)
        else:
            self._object(value)

    def _container(self, value: Container) -> None:
        if isinstance(value, functools.partial):
            self.put("partial")
            self.read((value.func, value.args, value.keywords))
        elif isinstance(value, tuple | list):
            self._sequence(value)
        elif isinstance(value, set | frozenset):
            # Their order differs between processes.
            self.put("set", sorted(code_of(item).digest for item in value))
        else:
            self.put("dictionary", len(value))
            for key in sorted(value, key=_plain):
                self.read(key)
                self.read(value[key])
        if not _is_library_class(type(value)):
            self._class(type(value))

    def _object(self, value: object) -> None:
        cls = type(value)
        if not _is_library_class(cls):
            self._class(cls)
            attributes = getattr(value, "__dict__", {})
            slots = {name for base in cls.__mro__ for name in _names(vars(base).get("__slots__", ()))}
            attributes = attributes | {name: getattr(value, name) for name in slots if hasattr(value, name)}
            for name in sorted(attributes):
                self._attribute(name, attributes[name])
        elif callable(getattr(value, "__wrapped__", None)):
            self.put("transformed", cls.__name__)
            for name in ("__wrapped__", "jvp", "fwd", "bwd"):
                self.read(getattr(value, name, None))
        elif dataclasses.is_dataclass(value):
            self.put("library", cls.__qualname__)
            for field in dataclasses.fields(value):
                self._attribute(field.name, getattr(value, field.name, None))
        else:
            self._foreign(value)

    def _sequence(self, value: tuple | list) -> None:
        self.put("sequence", len(value))
        if len(value) >= LONG and all(type(item) in (int, float, bool) for item in value):
            self.arrays.append(np.asarray(value))
            return
        for item in value:
            self.read(item)

    def _attribute(self, name: str, value: object) -> None:
        self.put(name)
        if name in self.written or (name in self.indexed and isinstance(value, list | dict)):
            self.put("memory")
        else:
            self.read(value)

    def _array(self, value: ArrayObject) -> None:
        self.put("array", value.shape, str(value.dtype))
        if not (isinstance(value, jax.Array) and (value.is_deleted() or not value.is_fully_addressable)):
            self.arrays.append(value)

    def _foreign(self, value: object) -> None:
        """An object of an installed package: its type, and the numbers and functions that it holds itself."""
        self.put("library", type(value).__qualname__)
        children = _children(value)
        if children is not None:
            self.read(children)
        elif hasattr(value, "__array__"):
            self._array(np.asarray(value))
        else:
            plain = bool | int | float | complex | str | bytes | np.ndarray | jax.Array | types.FunctionType
            for name, item in sorted(getattr(value, "__dict__", {}).items()):
                if isinstance(item, plain):
                    self._attribute(name, item)
        if isinstance(value, types.BuiltinFunctionType | np.ufunc) or hasattr(value, "__name__"):
            self.put(getattr(value, "__name__", ""))

    def _function(self, fn: types.FunctionType) -> None:
        code = fn.__code__
        if _is_check(code.co_filename) and hasattr(fn, "__wrapped__"):
            self.read(fn.__wrapped__)  # pyright: ignore[reportFunctionMemberAccess]
            return
        memory = frozenset()
        if _is_library_file(code.co_filename):
            self.put("library", code.co_qualname)
        else:
            memory = self._memory(code)
            self._instructions(code, fn.__globals__, memory)
            for name, value in sorted(vars(fn).items()):
                if name != "__wrapped__":
                    self._attribute(name, value)
        self.read(fn.__defaults__)
        self.read(fn.__kwdefaults__)
        for name, cell in zip(code.co_freevars, fn.__closure__ or (), strict=True):
            try:
                content = cell.cell_contents
            except ValueError:  # not filled yet
                continue
            self._variable(content, name in memory, code.co_names)

    def _variable(self, value: object, memory: bool, names: tuple[str, ...]) -> None:
        """What stands in a global or a closure."""
        if memory:
            self.put("memory")
        elif isinstance(value, types.ModuleType):
            self._module(value, names)
        else:
            self.read(value)

    def _module(self, module: types.ModuleType, names: tuple[str, ...]) -> None:
        """A module of one's own: what a function with these names in it may take from there."""
        place = getattr(module, "__file__", None)
        if place is None or _is_library_file(place):
            self.put("module", module.__name__)
            return
        self.put("own module")
        for name in sorted({*names} & vars(module).keys()):
            if not name.startswith("__"):
                self._variable(vars(module)[name], False, names)

    def _class(self, kind: type) -> None:
        if _is_library_class(kind):
            self.put("library", kind.__qualname__)
            return
        if self._again("class", kind):
            return
        self.put("class")
        for base in kind.__bases__:
            self._class(base)
        for name, given in sorted(vars(kind).items()):
            if name in UNSEEN:
                continue
            value = getattr(given, "__func__", getattr(given, "fget", getattr(given, "func", given)))
            # Data classes write methods from their fields, which are met in the objects.
            written = isinstance(value, types.FunctionType) and value.__code__.co_filename == "<string>"
            if isinstance(value, types.FunctionType) and not written:
                self.put(name)
                self._function(value)
            elif not name.startswith(("__", "_abc")) and isinstance(
                value, bool | int | float | complex | str | bytes | tuple | list | dict | np.ndarray | jax.Array
            ):
                self._attribute(name, value)

    def _memory(self, code: types.CodeType) -> frozenset[str]:
        """Variables in which a function keeps something, as in `calls.append(1)`; notes attributes of the kind."""
        names: set[str] = set()
        loaded: set[str] = set()
        before, indexes = None, False
        for step in _steps(code):
            if step.opname in ("STORE_GLOBAL", "STORE_DEREF", "DELETE_GLOBAL", "DELETE_DEREF"):
                names.add(step.argval)
            elif step.opname == "STORE_ATTR" and code.co_name not in STARTS:
                self.written.add(step.argval)
            elif step.opname in ("STORE_SUBSCR", "DELETE_SUBSCR"):
                indexes = True
            elif step.opname in ("LOAD_METHOD", "LOAD_ATTR") and before is not None:
                if step.argval in CHANGES_IN_PLACE and before.opname in ("LOAD_GLOBAL", "LOAD_DEREF"):
                    names.add(before.argval)
                elif step.argval in CHANGES_IN_PLACE and before.opname == "LOAD_ATTR":
                    self.written.add(before.argval)
            if step.opname in ("LOAD_GLOBAL", "LOAD_DEREF", "LOAD_ATTR"):
                loaded.add(step.argval)
            before = step
        if indexes:
            # Which of the containers is written to is not known: lists and dictionaries among these are left out.
            self.indexed |= loaded
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                names |= self._memory(constant)
        return frozenset(names & {*code.co_names, *code.co_freevars, *code.co_cellvars})

    def _instructions(self, code: types.CodeType, variables: dict[str, object], memory: frozenset[str]) -> None:
        self.put("code", code.co_argcount, code.co_kwonlyargcount, code.co_flags & 0x0C, code.co_exceptiontable)
        for step in _steps(code):
            self.put(step.opname)
            if step.opcode in dis.hasconst:
                if isinstance(step.argval, types.CodeType):
                    self._instructions(step.argval, variables, memory)
                else:
                    self.read(step.argval)
            elif step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                self._global(step.argval, variables, memory, code.co_names)
            elif step.opname == "IMPORT_NAME":
                package = variables.get("__package__") or ""
                module = sys.modules.get(step.argval) or sys.modules.get(f"{package}.{step.argval}")
                self._variable(step.argval if module is None else module, False, code.co_names)
            elif step.opcode in dis.hasname:
                self.put(step.argval)
            else:
                self.put(step.arg)

    def _global(self, name: str, variables: dict[str, object], memory: frozenset[str], names: tuple[str, ...]) -> None:
        if name not in variables:
            self.put(name if hasattr(builtins, name) else "unknown")
        elif not name.startswith("__"):
            value = variables[name]
            indexed = name in self.indexed and isinstance(value, list | dict)
            self._variable(value, name in memory or indexed, names)


def _steps(code: types.CodeType) -> list[dis.Instruction]:
    return [step for step in dis.get_instructions(code) if step.opname not in SKIPPED]


def _children(value: object) -> list[PyTree] | None:
    """One level of a pytree of a type that is registered with JAX."""
    leaves = jax.tree_util.tree_leaves(value, is_leaf=lambda node: node is not value)
    return None if len(leaves) == 1 and leaves[0] is value else leaves


def _names(slots: str | Iterable[str]) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(name for name in slots if not name.startswith("__"))


def _plain(key: object) -> str:
    """A text to sort by: addresses differ between processes."""
    return type(key).__name__ + re.sub(r"0x[0-9a-f]+", "", repr(key))


@functools.cache
def _is_library_file(name: str) -> bool:
    if name.startswith("<frozen"):
        return True
    return not name.startswith("<") and str(Path(name).resolve()).startswith(LIBRARIES)


def _is_check(name: str) -> bool:
    """Whether a wrapper checks arguments and does nothing else; whether there are such is up to a process."""
    return name.startswith("<@beartype") or not {"beartype", "jaxtyping"}.isdisjoint(Path(name).parts)


def _is_library_class(kind: type) -> bool:
    module = sys.modules.get(kind.__module__)
    if module is None or kind.__module__ == "__main__":
        return False
    place = getattr(module, "__file__", None)
    return place is None or _is_library_file(place)
