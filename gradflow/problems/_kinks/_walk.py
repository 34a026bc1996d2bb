"""Where the gradient of a problem jumps: read off its jaxpr.

The gradient of a loss jumps where a value that depends on the parameters passes through a kink: ReLU, a maximum, an
absolute value, a selection, rounding, pooling by maximum, sorting. The program of the problem is walked through once,
without numbers. Entrywise operations are followed as functions of the values that enter them, and looked at as a whole
(`_entrywise.py`) before they are mixed with other entries; so softplus, a guard against division by zero, and
choices that depend on data alone do not count. Neither does a maximum that is subtracted from what it was taken of, as
in log-softmax.
"""

from collections.abc import Callable, Hashable, Sequence

import equinox as eqx
import jax
import jax.core
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Primitive, Var
from jaxtyping import Array, PyTree, Scalar

from gradflow._tree import join
from gradflow.problems._kinks._entrywise import OPERATIONS, Settings
from gradflow.problems._kinks._operations import entrywise, mixing
from gradflow.problems._kinks._primitives import INLINED, REPEATED
from gradflow.problems._kinks._value import Kink, Shift, Value, constant, kind_of, opaque, used

Done = tuple[Primitive, tuple[float | int, ...], str | int]
"""A computation within a program: the operation, what enters it, and its parameters or itself."""

KEPT = 128
"""Problems whose kinks are remembered."""

_cached: dict[Hashable, tuple[str, ...]] = {}


def kinks_of(problem: Callable[[PyTree], Scalar], trainable: PyTree, frozen: PyTree) -> tuple[str, ...] | None:
    """The operations at which the gradient of `problem(join(trainable, frozen))` jumps, by name; `None` if it cannot
    be traced.

    Costs one trace of the problem, and nothing for another problem of the same structure and shapes.

    >>> import jax, jax.numpy as jnp
    >>> from gradflow.problems._kinks import kinks_of
    >>> kinks_of(lambda w: jnp.sum(jax.nn.relu(w)), jnp.ones(2), None)
    ('max',)
    >>> kinks_of(lambda w: jax.nn.logsumexp(w) + jnp.sum(jax.nn.softplus(w)), jnp.ones(2), None)
    ()
    """
    leaves, structure = jax.tree_util.tree_flatten((trainable, problem, frozen))
    abstract = [_abstract(leaf) if eqx.is_array(leaf) else leaf for leaf in leaves]
    key: Hashable = None
    if not any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        key = structure, tuple(_identity(leaf) for leaf in abstract)
        try:
            if key in _cached:
                return _cached[key]
        except TypeError:  # a leaf that cannot be hashed
            key = None
    try:
        kinks = _traced(abstract, structure, len(jax.tree_util.tree_leaves(trainable)))
    except Exception:  # what is wrong with the problem is said where it is run
        return None
    if key is not None:
        if len(_cached) >= KEPT:
            _cached.clear()
        _cached[key] = kinks
    return kinks


def _abstract(leaf: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, weak_type=getattr(leaf, "weak_type", False))


def _identity(leaf: object) -> object:
    return (leaf.shape, leaf.dtype, leaf.weak_type) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf


def _traced(leaves: Sequence[PyTree], structure: Hashable, flowing: int) -> tuple[str, ...]:
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.ShapeDtypeStruct)]

    def value(*arrays: Array) -> PyTree:
        whole = list(leaves)
        for place, array in zip(places, arrays, strict=True):
            whole[place] = array
        trainable, problem, frozen = jax.tree_util.tree_unflatten(structure, whole)
        return problem(join(trainable, frozen))

    with jax.disable_jit(False):
        closed = jax.make_jaxpr(value)(*(leaves[place] for place in places))
    given = [Value(kind_of(leaves[place]), varies=place < flowing) for place in places]
    kinks = frozenset[Kink]().union(*(used(out).resolved() for out in walk(closed, given)))
    names = {kink.name if isinstance(kink, Shift) else kink for kink in kinks if _counts(kink)}
    return tuple(sorted(names))


def _counts(kink: Kink) -> bool:
    return kink.is_kink if isinstance(kink, Shift) else True


def walk(jaxpr: ClosedJaxpr | Jaxpr, args: Sequence[Value]) -> list[Value]:
    """The results of a program, from what is known of its arguments."""
    consts = [constant(c) for c in jaxpr.consts] if isinstance(jaxpr, ClosedJaxpr) else []
    inner = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    values: dict[Var, Value] = dict(zip([*inner.constvars, *inner.invars], [*consts, *args], strict=True))

    def read(atom: Var | Literal) -> Value:
        return constant(atom.val) if isinstance(atom, Literal) else values[atom]

    done: dict[Done, list[Value]] = {}
    for eqn in inner.eqns:
        inputs = [read(atom) for atom in eqn.invars]
        values.update(zip(eqn.outvars, _once(done, eqn, inputs), strict=True))
    return [read(atom) for atom in inner.outvars]


def _once(done: dict[Done, list[Value]], eqn: JaxprEqn, inputs: list[Value]) -> list[Value]:
    """The results of an operation; the same ones where a program computes something twice."""
    numbers = tuple(value.number if value.number is not None else id(value) for value in inputs)
    key = eqn.primitive, numbers, str(eqn.params) if eqn.primitive.name in REPEATED else id(eqn)
    if key not in done:
        done[key] = _equation(eqn, inputs)
    return done[key]


def _equation(eqn: JaxprEqn, inputs: list[Value]) -> list[Value]:
    name, params = eqn.primitive.name, eqn.params
    if name in INLINED:
        inner = next((params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in params), None)
        if inner is not None:
            return walk(inner, inputs)
    if name == "scan":
        return _scan(eqn, inputs)
    if name == "while":
        return _while(eqn, inputs)
    if name == "cond":
        return _cond(eqn, inputs)
    if name == "is_finite":  # always, in a run that goes on
        return [Value("b", number=1.0, positive=True)]
    if name in OPERATIONS and (name != "convert_element_type" or len(inputs) == 1):
        settings = Settings(**{key: params[key] for key in Settings._fields if key in params})
        return [entrywise(name, settings, inputs, kind_of(eqn.outvars[0].aval))]
    return mixing(name, eqn, inputs)


def _repeated(body: Callable[[list[Value]], list[Value]], start: list[Value]) -> list[Value]:
    """What a loop carries, joined over all of its rounds: repeated until nothing more depends on the parameters."""
    carry = [opaque([value], value.kind) for value in start]
    while True:
        outs = body(carry)
        joined = [opaque([before, after], before.kind) for before, after in zip(carry, outs[: len(carry)], strict=True)]
        if all(_names(a) == _names(b) and a.varies == b.varies for a, b in zip(carry, joined, strict=True)):
            return [*joined, *outs[len(carry) :]]
        carry = joined


def _names(value: Value) -> set[str]:
    return {kink for kink in value.kinks if isinstance(kink, str)}


def _scan(eqn: JaxprEqn, inputs: list[Value]) -> list[Value]:
    constant, carried = eqn.params["num_consts"], eqn.params["num_carry"]
    fixed, start, rows = inputs[:constant], inputs[constant : constant + carried], inputs[constant + carried :]
    each = [Value(v.kind, v.varies, used(v).resolved(), v.positive, v.number) for v in rows]
    outs = _repeated(lambda carry: walk(eqn.params["jaxpr"], [*fixed, *carry, *each]), start)
    return [*outs[:carried], *(opaque([value], value.kind) for value in outs[carried:])]


def _while(eqn: JaxprEqn, inputs: list[Value]) -> list[Value]:
    skipped = eqn.params["cond_nconsts"]
    first = skipped + eqn.params["body_nconsts"]
    return _repeated(lambda carry: walk(eqn.params["body_jaxpr"], [*inputs[skipped:first], *carry]), inputs[first:])


def _cond(eqn: JaxprEqn, inputs: list[Value]) -> list[Value]:
    index, *args = inputs
    which = index.resolved()
    also = (which - {"comparison"}) | {"cond"} if which else which
    branches = [walk(branch, args) for branch in eqn.params["branches"]]
    return [opaque(outs, outs[0].kind, also) for outs in zip(*branches, strict=True)]
