"""Where the gradient of a problem jumps: read off its jaxpr.

The gradient of a loss jumps where a value that depends on the parameters passes through a kink: ReLU, a maximum, an
absolute value, a selection, rounding, pooling by maximum, sorting. The program of the problem is walked through once,
without numbers. Entrywise operations are followed as functions of the values that enter them, and looked at as a whole
(`gradflow._scalar`) before they are mixed with other entries; so softplus, a guard against division by zero, and
choices that depend on data alone do not count. Neither does a maximum that is subtracted from what it was taken of, as
in log-softmax.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.core
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal
from jaxtyping import PyTree

from gradflow._scalar import COMPARISONS, EVERYWHERE, OPERATIONS, Input, Line, Program, has_kink
from gradflow._tree import join

NEAR_ONE = 1e-3
"""Distance from one below which the upper bound on a probability only keeps its logarithm finite."""
LONGEST = 2000
"""Operations of an entrywise function beyond which its kinks are believed without a look at the whole."""
KEPT = 128
"""Problems whose kinks are remembered."""

INLINED = frozenset(
    [
        "jit",
        "pjit",
        "closed_call",
        "core_call",
        "core_closed_call",
        "remat",
        "remat2",
        "checkpoint",
        "custom_jvp_call",
        "custom_vjp_call",
        "custom_vjp_call_jaxpr",
        "shard_map",
        "xla_pmap",
    ]
)
"""Calls whose program is walked through as if it stood in the place of the call."""
REARRANGING = frozenset(
    [
        "broadcast_in_dim",
        "reshape",
        "squeeze",
        "expand_dims",
        "transpose",
        "rev",
        "slice",
        "dynamic_slice",
        "gather",
        "concatenate",
        "pad",
        "split",
        "optimization_barrier",
        "reduce_sum",
        "cumsum",
        "reduce_prod",
        "reduce_window_sum",
        "dynamic_update_slice",
        "tile",
    ]
)
"""Not negative where all that enters is not."""
KEEPING = frozenset(["broadcast_in_dim", "reshape", "squeeze", "expand_dims", "transpose", "optimization_barrier"])
"""What they give holds the entries that they were given, and no others."""
JUMPING = {
    "reduce_max": "max",
    "reduce_min": "min",
    "reduce_window_max": "max",
    "reduce_window_min": "min",
    "reduce_window": "reduce_window",
    "reduce": "reduce",
    "cummax": "max",
    "cummin": "min",
    "scatter_max": "max",
    "scatter_min": "min",
    "scatter-max": "max",
    "scatter-min": "min",
    "select_and_gather_add": "max",
    "pmax": "max",
    "pmin": "min",
    "argmax": "argmax",
    "argmin": "argmin",
    "sort": "sort",
    "top_k": "top_k",
    "approx_top_k": "top_k",
}
"""Operations across entries that have kinks, and what these are called."""


class Shift:
    """A maximum over entries that may turn out to be only a shift: subtracted from what it was taken of."""

    def __init__(self, name: str, source: "Value"):
        self.name, self.source = name, source
        self.subtracted = self.used_otherwise = False

    @property
    def is_kink(self) -> bool:
        return self.used_otherwise or not self.subtracted


class Value:
    """What is known of an array in the program: how its entries depend on those of others.

    Without an operation, it is an array that entrywise functions start from.
    """

    __slots__ = (
        *("inputs", "kind", "kinks", "name", "number", "params", "pending", "positive", "shift", "stopped"),
        *("summed", "varies"),
    )

    def __init__(
        self,
        kind: str,
        varies: bool = False,
        kinks: frozenset[Any] = frozenset(),
        positive: bool = False,
        number: float | None = None,
        name: str | None = None,
        params: tuple[tuple[str, Any], ...] = (),
        inputs: tuple["Value", ...] = (),
        pending: frozenset[str] = frozenset(),
    ):
        self.kind, self.varies, self.kinks, self.positive, self.number = kind, varies, kinks, positive, number
        self.name, self.params, self.inputs, self.pending = name, params, inputs, pending
        self.shift: Shift | None = None
        self.stopped = False
        self.summed: Value | None = None  # what it is a sum of, up to a constant factor

    def resolved(self) -> frozenset[Any]:
        """The kinks on the way to here; those of the entrywise function count if the whole of it has one."""
        if not self.pending:
            return self.kinks
        program = _program(self)
        if program is None or has_kink(program):
            names = self.pending - COMPARISONS
            return self.kinks | (names or frozenset({"comparison"}))
        return self.kinks


_cached: dict[Any, tuple[str, ...]] = {}


def kinks_of(problem: Callable[[Any], Any], trainable: PyTree, frozen: PyTree) -> tuple[str, ...] | None:
    """The operations at which the gradient of `problem(join(trainable, frozen))` jumps, by name; `None` if it cannot
    be traced.

    Costs one trace of the problem, and nothing for another problem of the same structure and shapes.

    >>> import jax, jax.numpy as jnp
    >>> from gradflow._kinks import kinks_of
    >>> kinks_of(lambda w: jnp.sum(jax.nn.relu(w)), jnp.ones(2), None)
    ('max',)
    >>> kinks_of(lambda w: jax.nn.logsumexp(w) + jnp.sum(jax.nn.softplus(w)), jnp.ones(2), None)
    ()
    """
    leaves, structure = jax.tree_util.tree_flatten((trainable, problem, frozen))
    abstract = [_abstract(leaf) if eqx.is_array(leaf) else leaf for leaf in leaves]
    key: Any = None
    if not any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        key = structure, tuple(_identity(leaf) for leaf in abstract)
        try:
            if key in _cached:
                return _cached[key]
        except TypeError:  # a leaf that cannot be hashed
            key = None
    try:
        found = _traced(abstract, structure, len(jax.tree_util.tree_leaves(trainable)))
    except Exception:  # whatever is wrong with the problem is said where it is run
        return None
    if key is not None:
        if len(_cached) >= KEPT:
            _cached.clear()
        _cached[key] = found
    return found


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, weak_type=getattr(leaf, "weak_type", False))


def _identity(leaf: Any) -> Any:
    return (leaf.shape, leaf.dtype, leaf.weak_type) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf


def _traced(leaves: list[Any], structure: Any, flowing: int) -> tuple[str, ...]:
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.ShapeDtypeStruct)]

    def value(*arrays: Any) -> Any:
        whole = list(leaves)
        for place, array in zip(places, arrays, strict=True):
            whole[place] = array
        trainable, problem, frozen = jax.tree_util.tree_unflatten(structure, whole)
        return problem(join(trainable, frozen))

    with jax.disable_jit(False):
        closed = jax.make_jaxpr(value)(*(leaves[place] for place in places))
    given = [Value(_kind(leaves[place]), varies=place < flowing) for place in places]
    found = frozenset[Any]().union(*(_used(out).resolved() for out in _walk(closed, given)))
    names = {kink.name if isinstance(kink, Shift) else kink for kink in found if _counts(kink)}
    return tuple(sorted(names))


def _counts(kink: Any) -> bool:
    return kink.is_kink if isinstance(kink, Shift) else True


def _kind(array: Any) -> str:
    """`"f"`, `"i"` or `"b"`; random keys and the like count as integers."""
    try:
        kind = np.dtype(array.dtype).kind
    except TypeError:
        return "i"
    return "i" if kind in "iu" else "b" if kind == "b" else "f"


def _walk(jaxpr: Any, args: Sequence[Value]) -> list[Value]:
    """The results of a program, from what is known of its arguments."""
    consts = [_constant(c) for c in jaxpr.consts] if isinstance(jaxpr, ClosedJaxpr) else []
    inner = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    known: dict[Any, Value] = dict(zip([*inner.constvars, *inner.invars], [*consts, *args], strict=True))

    def read(atom: Any) -> Value:
        return _constant(atom.val) if isinstance(atom, Literal) else known[atom]

    done: dict[Any, list[Value]] = {}
    for eqn in inner.eqns:
        inputs = [read(atom) for atom in eqn.invars]
        known.update(zip(eqn.outvars, _once(done, eqn, inputs), strict=True))
    return [read(atom) for atom in inner.outvars]


def _once(done: dict[Any, list[Value]], eqn: Any, inputs: list[Value]) -> list[Value]:
    """The results of an operation; the same ones where a program computes something twice."""
    numbers = tuple(value.number if value.number is not None else id(value) for value in inputs)
    key = eqn.primitive, numbers, str(eqn.params) if eqn.primitive.name in _REPEATED else id(eqn)
    if key not in done:
        done[key] = _equation(eqn, inputs)
    return done[key]


_REPEATED = frozenset({"dot_general", "reduce_sum", "transpose", *KEEPING, *OPERATIONS})
"""Operations that programs write down again rather than keep what they have."""


def _constant(array: Any) -> Value:
    """An array that does not depend on the parameters, with its value if it is a number that can be looked at."""
    if isinstance(array, jax.core.Tracer) or np.ndim(array) > 0 or not hasattr(array, "dtype"):
        number = float(array) if isinstance(array, int | float) else None
        return Value(_kind(array) if hasattr(array, "dtype") else "f", number=number)
    kind = _kind(array)
    try:
        number = float(np.asarray(array))
    except TypeError:
        return Value(kind)
    return Value(kind, number=number, positive=number >= 0)


def _equation(eqn: Any, inputs: list[Value]) -> list[Value]:
    name, params = eqn.primitive.name, eqn.params
    if name in INLINED:
        inner = next((params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in params), None)
        if inner is not None:
            return _walk(inner, inputs)
    if name == "scan":
        return _scan(params, inputs)
    if name == "while":
        return _while(params, inputs)
    if name == "cond":
        return _cond(params, inputs)
    if name == "is_finite":  # always, in a run that goes on
        return [Value("b", number=1.0, positive=True)]
    if name in OPERATIONS and (name != "convert_element_type" or len(inputs) == 1):
        return [_entrywise(name, params, inputs, _kind(eqn.outvars[0].aval))]
    return _mixing(name, eqn, inputs)


def _mixing(name: str, eqn: Any, inputs: list[Value]) -> list[Value]:
    """An operation across entries."""
    kinds = [_kind(out.aval) for out in eqn.outvars]
    if name in KEEPING and len(inputs) == 1:
        (only,) = inputs
        if only.number is not None:
            return [Value(kind, number=only.number, positive=only.number >= 0) for kind in kinds]
        if only.shift is not None:
            return [_alias(only)]
    varies = any(value.varies for value in inputs)
    kinks = frozenset[Any]().union(*(_used(value).resolved() for value in inputs))
    positive = name in REARRANGING and all(value.positive for value in inputs)
    if name in JUMPING and varies:
        if name in ("reduce_max", "reduce_min"):
            found = Value(kinds[0], True, kinks, inputs[0].positive)
            found.shift = Shift(JUMPING[name], inputs[0])
            found.kinks = kinks | {found.shift}
            return [found]
        kinks = kinks | {JUMPING[name]}
        positive = inputs[0].positive
    outs = [Value(kind, varies, kinks, positive) for kind in kinds]
    if len(inputs) == 1 and name in ("reduce_sum", *KEEPING):
        outs[0].summed = inputs[0] if name == "reduce_sum" else inputs[0].summed
    return outs


def _used(value: Value) -> Value:
    """Notes that a maximum is put to another use than as a shift."""
    if value.shift is not None:
        value.shift.used_otherwise = True
    return value


def _alias(value: Value) -> Value:
    found = Value(value.kind, value.varies, value.kinks, value.positive)
    found.shift, found.stopped = value.shift, value.stopped
    return found


def _entrywise(name: str, params: dict[str, Any], inputs: list[Value], kind: str) -> Value:
    simpler = _simplified(name, params, inputs, kind)
    if simpler is not None:
        return simpler
    shifts = [value for value in inputs if value.shift is not None]
    if shifts:
        found = _shifted(name, inputs)
        if found is not None:
            return found
    varies = any(value.varies for value in inputs)
    kinks = frozenset[Any]().union(*(value.kinks for value in inputs))
    if name == "sub" and _is_variance(*inputs):
        return Value(kind, varies, kinks, positive=True)
    pending = frozenset[str]().union(*(value.pending for value in inputs))
    if varies and _may_have_kinks(name, inputs, kind):
        pending = pending | {"where" if name == "select_n" else name}
    told = tuple((key, params[key]) for key in ("y", "new_dtype") if key in params)
    found = Value(kind, varies, kinks, _is_positive(name, params, inputs), None, name, told, tuple(inputs), pending)
    if name in ("div", "mul") and not inputs[1].varies:
        found.summed = inputs[0].summed
    return found


def _simplified(name: str, params: dict[str, Any], inputs: list[Value], kind: str) -> Value | None:
    """The result where the operation does nothing, or nothing that depends on the parameters."""
    first = inputs[0]
    if all(value.number is not None for value in inputs):
        with np.errstate(all="ignore"):
            number = float(OPERATIONS[name].fn(params, *(value.number for value in inputs)))
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
        found = _alias(marked[0])
        found.stopped |= name == "stop_gradient"
        return found
    if name in ("eq", "ne", "gt", "ge", "lt", "le"):  # guards against infinity
        return None
    if name == "select_n" and len(marked) == 1 and not any(v.varies for v in inputs[1:] if v is not marked[0]):
        return _alias(marked[0])
    if name == "sub" and inputs[1] is marked[0] and (marked[0].stopped or inputs[0] is shift.source):
        shift.subtracted = True
    elif name != "add":
        for value in marked:
            _used(value)
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


def _is_positive(name: str, params: dict[str, Any], inputs: list[Value]) -> bool:
    """Whether a result is never negative."""
    if name in ("exp", "exp2", "square", "abs", "sqrt", "rsqrt", "logistic", "cosh"):
        return True
    if name == "integer_pow":
        return params["y"] % 2 == 0 or inputs[0].positive
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
        return value.inputs[0] if dict(value.params)["y"] == 2 else None
    return value.inputs[0] if all(other is value.inputs[0] for other in value.inputs) else None


def _program(value: Value) -> Program | None:
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
            steps.append(Line(now.name, now.params, tuple(places[id(other)] for other in now.inputs)))
        if len(steps) > LONGEST:
            return None
    return tuple(steps)


def _opaque(values: Iterable[Value], kind: str, also: frozenset[Any] = frozenset()) -> Value:
    """A value of which no more is known than what it comes from."""
    values = list(values)
    kinks = frozenset[Any]().union(also, *(_used(value).resolved() for value in values))
    return Value(kind, any(value.varies for value in values), kinks)


def _repeated(body: Callable[[list[Value]], list[Value]], start: list[Value]) -> list[Value]:
    """What a loop carries, joined over all of its rounds: repeated until nothing more depends on the parameters."""
    carry = [_opaque([value], value.kind) for value in start]
    while True:
        outs = body(carry)
        joined = [
            _opaque([before, after], before.kind) for before, after in zip(carry, outs[: len(carry)], strict=True)
        ]
        if all(_names(a) == _names(b) and a.varies == b.varies for a, b in zip(carry, joined, strict=True)):
            return [*joined, *outs[len(carry) :]]
        carry = joined


def _names(value: Value) -> set[str]:
    return {kink for kink in value.kinks if isinstance(kink, str)}


def _scan(params: dict[str, Any], inputs: list[Value]) -> list[Value]:
    constant, carried = params["num_consts"], params["num_carry"]
    fixed, start, rows = inputs[:constant], inputs[constant : constant + carried], inputs[constant + carried :]
    each = [Value(v.kind, v.varies, _used(v).resolved(), v.positive, v.number) for v in rows]
    outs = _repeated(lambda carry: _walk(params["jaxpr"], [*fixed, *carry, *each]), start)
    return [*outs[:carried], *(_opaque([value], value.kind) for value in outs[carried:])]


def _while(params: dict[str, Any], inputs: list[Value]) -> list[Value]:
    skipped = params["cond_nconsts"]
    first = skipped + params["body_nconsts"]
    return _repeated(lambda carry: _walk(params["body_jaxpr"], [*inputs[skipped:first], *carry]), inputs[first:])


def _cond(params: dict[str, Any], inputs: list[Value]) -> list[Value]:
    index, *args = inputs
    which = index.resolved()
    also = (which - {"comparison"}) | {"cond"} if which else which
    branches = [_walk(branch, args) for branch in params["branches"]]
    return [_opaque(outs, outs[0].kind, also) for outs in zip(*branches, strict=True)]
