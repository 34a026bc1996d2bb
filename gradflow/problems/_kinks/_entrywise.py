"""Entrywise functions as small numpy programs, and whether such a function has a kink.

A kink is a point where the slope of a value jumps, or the value itself. What decides is the whole function, not the
operations that it is made of: `max(x, 0) + log(1 + exp(-|x|))` is smooth though both of its terms have a kink at zero.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy.special
from jax.typing import DTypeLike
from jaxtyping import ArrayLike

LINES = 8
"""Straight lines, in the space of all quantities that enter, along which a function is looked at."""
POINTS = 4096
"""Points on each of them."""
SPAN = 4.0
"""Half the length of the lines; half of them are longer, to reach beyond the constants that occur."""
KINK, SMOOTH = 1.0, 0.25
"""Ratio of second differences over their spacing, of the finest grid to that of four times the spacing: at a jump of
the slope, where the function is twice differentiable. At a jump of the value it is 4."""
BETWEEN = 0.45
"""Ratio from which on a point counts as a kink: `SMOOTH` stays below it, and a jump of the slope, wherever between two
points it lies, above."""
VISIBLE = 1e-6
"""Least jump of the slope that counts, over the range of the function: well above rounding, which is 1e-13."""
EVERYWHERE = 1e3
"""Constants that are larger do not limit what a network computes."""


Entries = np.ndarray | np.generic
"""Entries of an array, or a single one."""


class Settings(NamedTuple):
    """What an operation takes besides arrays: the exponent of `integer_pow`, the type of a conversion."""

    y: int = 1
    new_dtype: DTypeLike = float


NO_SETTINGS = Settings()


class Operation(NamedTuple):
    """An entrywise operation: its numpy form, which takes its settings first, and whether it may have kinks."""

    fn: Callable[..., Entries]
    kinks: bool = False


def _plain(fn: Callable[..., Entries], kinks: bool = False) -> Operation:
    return Operation(lambda settings, *inputs: fn(*inputs), kinks)


def _select(settings: Settings, which: ArrayLike, *cases: ArrayLike) -> Entries:
    return np.choose(np.asarray(which).astype(int), [np.asarray(case) for case in cases])


def _convert(settings: Settings, x: ArrayLike) -> Entries:
    dtype_kind = np.dtype(settings.new_dtype).kind
    if dtype_kind == "b":
        return np.asarray(x) != 0
    return np.trunc(x) if dtype_kind in "iu" else np.asarray(x, float)


OPERATIONS = {
    "neg": _plain(np.negative),
    "add": _plain(np.add),
    "add_any": _plain(np.add),
    "sub": _plain(lambda a, b: np.asarray(a, float) - np.asarray(b, float)),
    "mul": _plain(np.multiply),
    "div": _plain(np.divide),
    "square": _plain(np.square),
    "integer_pow": Operation(lambda settings, x: np.asarray(x, float) ** settings.y),
    "pow": _plain(lambda x, y: np.power(np.asarray(x, float), y), kinks=True),
    "sqrt": _plain(np.sqrt, kinks=True),
    "rsqrt": _plain(lambda x: 1 / np.sqrt(x), kinks=True),
    "cbrt": _plain(np.cbrt, kinks=True),
    "exp": _plain(np.exp),
    "exp2": _plain(np.exp2),
    "expm1": _plain(np.expm1),
    "log": _plain(np.log),
    "log1p": _plain(np.log1p),
    "sin": _plain(np.sin),
    "cos": _plain(np.cos),
    "tan": _plain(np.tan),
    "asin": _plain(np.arcsin),
    "acos": _plain(np.arccos),
    "atan": _plain(np.arctan),
    "atan2": _plain(np.arctan2, kinks=True),
    "sinh": _plain(np.sinh),
    "cosh": _plain(np.cosh),
    "asinh": _plain(np.arcsinh),
    "acosh": _plain(np.arccosh),
    "atanh": _plain(np.arctanh),
    "tanh": _plain(np.tanh),
    "logistic": _plain(scipy.special.expit),
    "erf": _plain(scipy.special.erf),
    "erfc": _plain(scipy.special.erfc),
    "erf_inv": _plain(scipy.special.erfinv),
    "lgamma": _plain(scipy.special.gammaln),
    "digamma": _plain(scipy.special.digamma),
    "max": _plain(np.maximum, kinks=True),
    "min": _plain(np.minimum, kinks=True),
    "clamp": _plain(lambda low, x, high: np.minimum(np.maximum(x, low), high), kinks=True),
    "abs": _plain(np.abs, kinks=True),
    "sign": _plain(np.sign, kinks=True),
    "floor": _plain(np.floor, kinks=True),
    "ceil": _plain(np.ceil, kinks=True),
    "round": _plain(np.round, kinks=True),
    "rem": _plain(np.fmod, kinks=True),
    "nextafter": _plain(lambda x, y: x),
    "eq": _plain(np.equal, kinks=True),
    "ne": _plain(np.not_equal, kinks=True),
    "gt": _plain(np.greater, kinks=True),
    "ge": _plain(np.greater_equal, kinks=True),
    "lt": _plain(np.less, kinks=True),
    "le": _plain(np.less_equal, kinks=True),
    "and": _plain(np.logical_and),
    "or": _plain(np.logical_or),
    "xor": _plain(np.logical_xor),
    "not": _plain(np.logical_not),
    "select_n": Operation(_select, kinks=True),
    "convert_element_type": Operation(_convert, kinks=True),
    "copy": _plain(lambda x: x),
    "copy_p": _plain(lambda x: x),
    "stop_gradient": _plain(lambda x: x),
    "reduce_precision": _plain(lambda x: x),
}
"""What is known of the entrywise primitives of JAX. All others count as mixing entries."""

COMPARISONS = frozenset({"eq", "ne", "gt", "ge", "lt", "le", "convert_element_type"})
"""Not worth a mention beside the operation that acts on what they give."""


class Input(NamedTuple):
    """A quantity that a program takes: one that varies along a line, or a constant, with its value where that is known.

    `kind` is one of `"f"`, `"i"` and `"b"`; `positive` tells that it is never negative.
    """

    varies: bool
    kind: str
    positive: bool
    value: float | None


class Line(NamedTuple):
    """An operation of a program; `inputs` are places of earlier lines and of inputs in the program."""

    name: str
    settings: Settings
    inputs: tuple[int, ...]


Program = tuple[Input | Line, ...]
"""Operations in an order in which they can be carried out; the last one gives the result."""

_cached: dict[Program, bool] = {}


def has_kink(program: Program) -> bool:
    """Whether the function that a program computes has a kink within reach.

    Second differences over their spacing tend to zero like the spacing where a function is smooth, and to the jump of
    the slope at a kink. They are compared point by point on two grids, along lines in general position.

    >>> from gradflow.problems._kinks._entrywise import NO_SETTINGS, Input, Line, has_kink
    >>> x, zero = Input(True, "f", False, None), Input(False, "f", False, 0.0)
    >>> has_kink((x, zero, Line("max", NO_SETTINGS, (0, 1)))), has_kink((x, Line("tanh", NO_SETTINGS, (0,))))
    (True, False)
    """
    if program not in _cached:
        if len(_cached) > 1000:
            _cached.clear()
        _cached[program] = _probe(program)
    return _cached[program]


def _probe(program: Program) -> bool:
    rng = np.random.default_rng(0)
    offsets = [abs(step.value) for step in program if isinstance(step, Input) and step.value is not None]
    reach = max([value for value in offsets if value < EVERYWHERE], default=0.0)
    spans = np.where(np.arange(LINES) % 2, SPAN * (1 + reach), SPAN)[:, None]
    s = spans * np.linspace(-1, 1, POINTS)
    with np.errstate(all="ignore"):
        values: list[Entries] = []
        for step in program:
            if isinstance(step, Input):
                values.append(_sample(step, s, rng))
            else:
                values.append(OPERATIONS[step.name].fn(step.settings, *(values[i] for i in step.inputs)))
        return _jumps(np.broadcast_to(np.asarray(values[-1], float), s.shape), s[:, 1:2] - s[:, :1])


def _sample(step: Input, s: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Values of an input along the lines."""
    if step.value is not None:
        return np.full((LINES, 1), step.value)
    middle, slope = rng.normal(size=(LINES, 1)), rng.uniform(0.5, 1.5, size=(LINES, 1))
    slope = slope * rng.choice([-1.0, 1.0], size=(LINES, 1))
    if step.kind != "f":
        whole = rng.integers(0, 2 if step.kind == "b" else 5, size=(LINES, 1))
        return whole.astype(bool) if step.kind == "b" else whole
    if not step.varies:
        return np.abs(middle) if step.positive else middle
    return (
        np.exp(middle + slope * s / np.max(np.abs(s), axis=1, keepdims=True)) if step.positive else middle + slope * s
    )


def _jumps(values: np.ndarray, spacing: np.ndarray) -> bool:
    fine, coarse = (_second_differences(values, k) / (k * spacing) for k in (1, 4))
    around = np.max(np.stack([np.roll(coarse, shift, axis=1) for shift in range(-4, 5)]), axis=0)
    finite = np.isfinite(values)
    highest, lowest = (np.max(np.where(finite, sign * values, -np.inf), axis=1, keepdims=True) for sign in (1, -1))
    extent = np.where(np.isfinite(highest), highest + lowest, 0.0)
    return bool(np.any((fine > BETWEEN * around) & (fine > VISIBLE * extent) & (around > 0)))


def _second_differences(values: np.ndarray, k: int) -> np.ndarray:
    """At every point, from points `k` apart; zero at the ends and where a value is not finite."""
    differences = np.zeros_like(values)
    differences[:, k:-k] = np.abs(values[:, 2 * k :] - 2 * values[:, k:-k] + values[:, : -2 * k])
    return np.where(np.isfinite(differences), differences, 0.0)
