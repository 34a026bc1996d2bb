"""What is known of an array in a program: what its entries depend on, and which kinks are on the way to it."""

from collections.abc import Iterable

import jax
import jax.core
import numpy as np

from gradflow.problems._kinks._entrywise import COMPARISONS, NO_SETTINGS, Input, Line, Program, Settings, has_kink

LONGEST = 2000
"""Operations of an entrywise function beyond which its kinks are believed without a look at the whole."""


class Shift:
    """A maximum over entries that may turn out to be only a shift: subtracted from what it was taken of."""

    def __init__(self, name: str, source: "Value"):
        self.name, self.source = name, source
        self.subtracted = self.used_otherwise = False

    @property
    def is_kink(self) -> bool:
        return self.used_otherwise or not self.subtracted


Kink = str | Shift
"""An operation at which a slope jumps, by name, or a maximum that may turn out to be none."""


class Value:
    """What is known of an array in the program: how its entries depend on those of others.

    Without an operation, it is an array that entrywise functions start from.
    """

    __slots__ = (
        *("inputs", "kind", "kinks", "name", "number", "pending", "positive", "settings", "shift", "stopped"),
        *("summed", "varies"),
    )

    def __init__(
        self,
        kind: str,
        varies: bool = False,
        kinks: frozenset[Kink] = frozenset(),
        positive: bool = False,
        number: float | None = None,
        name: str | None = None,
        settings: Settings = NO_SETTINGS,
        inputs: tuple["Value", ...] = (),
        pending: frozenset[str] = frozenset(),
    ):
        self.kind, self.varies, self.kinks, self.positive, self.number = kind, varies, kinks, positive, number
        self.name, self.settings, self.inputs, self.pending = name, settings, inputs, pending
        self.shift: Shift | None = None
        self.stopped = False
        self.summed: Value | None = None  # what it is a sum of, up to a constant factor

    def resolved(self) -> frozenset[Kink]:
        """The kinks on the way to here; those of the entrywise function count if the whole of it has one."""
        if not self.pending:
            return self.kinks
        program = program_of(self)
        if program is None or has_kink(program):
            names = self.pending - COMPARISONS
            return self.kinks | (names or frozenset({"comparison"}))
        return self.kinks


def program_of(value: Value) -> Program | None:
    """The entrywise function that leads to a value; `None` if it is too long to be looked at."""
    places: dict[int, int] = {}
    steps: list[Input | Line] = []
    todo = [value]
    while todo:
        now = todo[-1]
        missing = [other for other in now.inputs if id(other) not in places]
        if id(now) in places or missing:
            todo.extend(missing)
            if not missing:
                todo.pop()
            continue
        todo.pop()
        places[id(now)] = len(steps)
        if now.name is None:
            steps.append(Input(now.varies, now.kind, now.positive, now.number))
        else:
            steps.append(Line(now.name, now.settings, tuple(places[id(other)] for other in now.inputs)))
        if len(steps) > LONGEST:
            return None
    return tuple(steps)


def kind_of(array: object) -> str:
    """`"f"`, `"i"` or `"b"`; random keys and the like count as integers."""
    dtype = getattr(array, "dtype", None)
    if dtype is None:
        raise TypeError(f"{type(array).__name__} is not an array")
    try:
        dtype_kind = np.dtype(dtype).kind
    except TypeError:
        return "i"
    return "i" if dtype_kind in "iu" else "b" if dtype_kind == "b" else "f"


def constant(array: object) -> Value:
    """An array that does not depend on the parameters, with its value if it is a number that can be looked at."""
    if isinstance(array, jax.core.Tracer) or getattr(array, "ndim", 0) > 0 or not hasattr(array, "dtype"):
        number = float(array) if isinstance(array, int | float) else None
        return Value(kind_of(array) if hasattr(array, "dtype") else "f", number=number)
    dtype_kind = kind_of(array)
    try:
        number = float(np.asarray(array))
    except TypeError:
        return Value(dtype_kind)
    return Value(dtype_kind, number=number, positive=number >= 0)


def used(value: Value) -> Value:
    """Notes that a maximum is put to another use than as a shift."""
    if value.shift is not None:
        value.shift.used_otherwise = True
    return value


def alias(value: Value) -> Value:
    copy = Value(value.kind, value.varies, value.kinks, value.positive)
    copy.shift, copy.stopped = value.shift, value.stopped
    return copy


def opaque(values: Iterable[Value], kind: str, also: frozenset[Kink] = frozenset()) -> Value:
    """A value of which no more is known than what it comes from."""
    values = list(values)
    kinks = frozenset[Kink]().union(also, *(used(value).resolved() for value in values))
    return Value(kind, any(value.varies for value in values), kinks)
