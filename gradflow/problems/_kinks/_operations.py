"""What a single operation makes of what is known of the arrays that enter it."""

import numpy as np
from jax.extend.core import JaxprEqn

from gradflow.problems._kinks._entrywise import EVERYWHERE, OPERATIONS, Settings
from gradflow.problems._kinks._primitives import JUMPING, KEEPING, REARRANGING
from gradflow.problems._kinks._value import Kink, Shift, Value, alias, kind_of, used

NEAR_ONE = 1e-3
"""Distance from one below which the upper bound on a probability only keeps its logarithm finite."""


def entrywise(name: str, settings: Settings, inputs: list[Value], kind: str) -> Value:
    simpler = _simplified(name, settings, inputs, kind)
    if simpler is not None:
        return simpler
    shifts = [value for value in inputs if value.shift is not None]
    if shifts:
        result = _shifted(name, inputs)
        if result is not None:
            return result
    varies = any(value.varies for value in inputs)
    kinks = frozenset[Kink]().union(*(value.kinks for value in inputs))
    if name == "sub" and _is_variance(*inputs):
        return Value(kind, varies, kinks, positive=True)
    pending = frozenset[str]().union(*(value.pending for value in inputs))
    if varies and _may_have_kinks(name, inputs, kind):
        pending = pending | {"where" if name == "select_n" else name}
    result = Value(
        kind, varies, kinks, _is_positive(name, settings, inputs), None, name, settings, tuple(inputs), pending
    )
    if name in ("div", "mul") and not inputs[1].varies:
        result.summed = inputs[0].summed
    return result


def _simplified(name: str, settings: Settings, inputs: list[Value], kind: str) -> Value | None:
    """The result where the operation does nothing, or nothing that depends on the parameters."""
    first = inputs[0]
    if all(value.number is not None for value in inputs):
        with np.errstate(all="ignore"):
            number = float(OPERATIONS[name].fn(settings, *(value.number for value in inputs)))
        return Value(kind, number=number, positive=number >= 0)
    if name == "mul" and any(value.number == 0 for value in inputs):
        return Value(kind, number=0.0, positive=True)
    if name in ("max", "min") and len(inputs) == 2:
        for value, other in ((first, inputs[1]), (inputs[1], first)):
            if other.number is not None and value.number is None and _idle(name, value, other.number):
                return value
    if name == "abs" and first.positive:
        return first
    if name == "convert_element_type" and kind == first.kind:
        return first
    return None


def _idle(name: str, value: Value, bound: float) -> bool:
    """Whether a bound on a value only guards against what does not happen in a network."""
    if name == "max":
        return bound <= -EVERYWHERE or (value.positive and bound <= 0)
    return bound >= EVERYWHERE or (value.positive and 1 - NEAR_ONE <= bound < 1)


def _shifted(name: str, inputs: list[Value]) -> Value | None:
    """Follows a maximum over entries as long as it is but a shift."""
    marked = [value for value in inputs if value.shift is not None]
    shift = marked[0].shift
    assert shift is not None
    if name in ("stop_gradient", "copy", "copy_p", "reduce_precision", "convert_element_type"):
        shifted = alias(marked[0])
        shifted.stopped |= name == "stop_gradient"
        return shifted
    if name in ("eq", "ne", "gt", "ge", "lt", "le"):  # guards against infinity
        return None
    if name == "select_n" and len(marked) == 1 and not any(v.varies for v in inputs[1:] if v is not marked[0]):
        return alias(marked[0])
    if name == "sub" and inputs[1] is marked[0] and (marked[0].stopped or inputs[0] is shift.source):
        shift.subtracted = True
    elif name != "add":
        for value in marked:
            used(value)
    return None


def _may_have_kinks(name: str, inputs: list[Value], kind: str) -> bool:
    first = inputs[0]
    if name == "select_n":
        return first.varies
    if name == "convert_element_type":
        return kind != "f" and first.kind == "f"
    if name in ("sqrt", "rsqrt", "pow", "cbrt"):  # of a norm at zero: a single point, not a surface
        return first.name is not None
    return OPERATIONS[name].kinks


def _is_positive(name: str, settings: Settings, inputs: list[Value]) -> bool:
    """Whether a result is never negative."""
    if name in ("exp", "exp2", "square", "abs", "sqrt", "rsqrt", "logistic", "cosh"):
        return True
    if name == "integer_pow":
        return settings.y % 2 == 0 or inputs[0].positive
    if name == "mul" and inputs[0] is inputs[1]:
        return True
    if name == "max":
        return any(value.positive for value in inputs)
    if name == "select_n":
        return all(value.positive for value in inputs[1:])
    same = ("add", "add_any", "mul", "div", "min", "tanh", "expm1", "log1p", "pow", "erf", "sign", "clamp", "cbrt")
    same += ("stop_gradient", "convert_element_type", "copy", "copy_p", "reduce_precision", "floor", "round", "ceil")
    return name in same and all(value.positive for value in inputs)


def _is_variance(squares: Value, square: Value) -> bool:
    """Whether a difference is that of the mean of squares and the square of the mean, which normalisations take."""
    total, root = _squared(squares.summed), _squared(square)
    return total is not None and root is not None and root.summed is total


def _squared(value: Value | None) -> Value | None:
    """What a value is the square of."""
    if value is None or value.name not in ("square", "integer_pow", "mul"):
        return None
    if value.name == "integer_pow":
        return value.inputs[0] if value.settings.y == 2 else None
    return value.inputs[0] if all(other is value.inputs[0] for other in value.inputs) else None


def mixing(name: str, eqn: JaxprEqn, inputs: list[Value]) -> list[Value]:
    """An operation across entries."""
    dtype_kinds = [kind_of(out.aval) for out in eqn.outvars]
    if name in KEEPING and len(inputs) == 1:
        (only,) = inputs
        if only.number is not None:
            return [Value(dtype_kind, number=only.number, positive=only.number >= 0) for dtype_kind in dtype_kinds]
        if only.shift is not None:
            return [alias(only)]
    varies = any(value.varies for value in inputs)
    kinks = frozenset[Kink]().union(*(used(value).resolved() for value in inputs))
    positive = name in REARRANGING and all(value.positive for value in inputs)
    if name in JUMPING and varies:
        if name in ("reduce_max", "reduce_min"):
            result = Value(dtype_kinds[0], True, kinks, inputs[0].positive)
            result.shift = Shift(JUMPING[name], inputs[0])
            result.kinks = kinks | {result.shift}
            return [result]
        kinks = kinks | {JUMPING[name]}
        positive = inputs[0].positive
    outs = [Value(dtype_kind, varies, kinks, positive) for dtype_kind in dtype_kinds]
    if len(inputs) == 1 and name in ("reduce_sum", *KEEPING):
        outs[0].summed = inputs[0] if name == "reduce_sum" else inputs[0].summed
    return outs
