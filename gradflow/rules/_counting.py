"""Counting the gradients that an optax transform evaluates by itself, as line searches do.

What a transform does between its arguments and its result is a program; the number of gradients taken in it depends on
how often its loops run. So the program is traced with a mark in the backward pass of the problem, and carried out with
a counter beside it: added to at every mark, and carried by every loop and branch that holds one.
"""

import inspect
import sys
import types
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var
from jaxtyping import Array, ArrayLike, Bool, Int, PyTree, Scalar

GRADIENT, VALUE = "gradflow_gradient_evaluated", "gradflow_value_evaluated"
"""Names of functions that do nothing but to be found in the program."""
FORWARD = "custom_lin"
"""What stands for a tangent of a function that has a backward pass of its own, and so no forward mode."""
CALLS = frozenset({"jit", "pjit", "closed_call", "core_call", "custom_vjp_call", "custom_jvp_call", "checkpoint"})
"""Operations that are carried out by what they call."""


Counted = tuple[list[object], Int[Array, ""]]
"""Results of a program, and the number of gradients taken in it."""


class UncountableError(Exception):
    """A gradient is taken within an operation that nothing can be carried through."""


def marked(problem: Callable[[PyTree], Array]) -> Callable[[PyTree], Array]:
    """The same function, with a mark in its value and in its backward pass."""

    @jax.custom_vjp
    def value(params: PyTree) -> Array:
        return _mark(VALUE)(problem(params))

    def forward(params: PyTree) -> tuple[Array, PyTree]:
        return jax.vjp(problem, params)

    def backward(pullback: Callable[[Array], tuple[PyTree]], slope: ArrayLike) -> tuple[PyTree]:
        return (pullback(_mark(GRADIENT)(slope))[0],)

    value.defvjp(forward, backward)
    return value


def run_counted(fn: Callable[..., PyTree], *args: PyTree) -> tuple[PyTree, Int[Array, ""]]:
    """`fn(*args)`, and how many gradients of `marked` problems were evaluated on the way.

    **Raises** `UncountableError` if that cannot be told.
    """
    closed, shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
    if _any(closed, lambda eqn: eqn.primitive.name == FORWARD):
        raise UncountableError(FORWARD)
    outs, count = _run(closed, jax.tree_util.tree_leaves(args))
    return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(shapes), outs), count


class Watch:
    """Whether a problem, or another one of its kind, is called by anybody else than `through` meanwhile."""

    def __init__(self, problem: Callable[[PyTree], Scalar]):
        self._code, self._inside, self.found = _code_of(problem), False, False

    def through(self, fn: Callable[[PyTree], Scalar]) -> Callable[[PyTree], Scalar]:
        """A function whose calls of the problem are none of those looked for."""

        def called(params: PyTree) -> Scalar:
            before, self._inside = self._inside, True
            try:
                return fn(params)
            finally:
                self._inside = before

        return called

    def __enter__(self) -> "Watch":
        self._before, code = sys.getprofile(), self._code
        # Runs at every call in Python, so that it has to be quick: no function with types that are checked.
        sys.setprofile(lambda frame, event, _: self._note() if event == "call" and frame.f_code is code else None)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(self._before)

    def _note(self) -> None:
        self.found |= not self._inside


def _code_of(problem: Callable[[PyTree], Scalar]) -> types.CodeType | None:
    """The code that runs when a function, or an object with a method `__call__`, is called."""
    fn = inspect.unwrap(problem)
    if not hasattr(fn, "__code__"):
        fn = inspect.unwrap(type(fn).__call__)
    return getattr(fn, "__code__", None)


def _mark(name: str) -> Callable[[ArrayLike], Array]:
    def same(x: Array) -> Array:
        return x

    same.__name__ = name
    return jax.jit(same)


def _run(closed: ClosedJaxpr, args: Sequence[object]) -> Counted:
    jaxpr = closed.jaxpr
    values: dict[Var, object] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*closed.consts, *args], strict=True))
    count = jnp.zeros((), int)
    for eqn in jaxpr.eqns:
        inputs = [atom.val if isinstance(atom, Literal) else values[atom] for atom in eqn.invars]
        outs, more = _carry_out(eqn, inputs)
        values.update(zip(eqn.outvars, outs, strict=True))
        count = count + more
    return [atom.val if isinstance(atom, Literal) else values[atom] for atom in jaxpr.outvars], count


def _carry_out(eqn: JaxprEqn, inputs: list[object]) -> tuple[Sequence[object], Int[Array, ""] | int]:
    """The results of an operation, and the gradients that it took."""
    name, params = eqn.primitive.name, eqn.params
    if params.get("name") in (GRADIENT, VALUE):
        return inputs, int(params["name"] == GRADIENT)
    if not _holds_mark(params.values()):
        given = eqn.primitive.get_bind_params(params)
        functions, given = given if isinstance(given, tuple) else ([], given)  # apart in versions of JAX before 0.8
        outs = eqn.primitive.bind(*functions, *inputs, **given)
        return (outs if eqn.primitive.multiple_results else [outs]), 0
    if name in CALLS:
        return _run(_closed(params["jaxpr"] if "jaxpr" in params else params["call_jaxpr"]), inputs)
    if name == "while":
        return _while(eqn, inputs)
    if name == "cond":
        return jax.lax.switch(
            jnp.asarray(inputs[0]), [lambda *args, b=b: _run(_closed(b), args) for b in params["branches"]], *inputs[1:]
        )
    if name == "scan":
        return _scan(eqn, inputs)
    raise UncountableError(name)


def _while(eqn: JaxprEqn, inputs: list[object]) -> Counted:
    params = eqn.params
    first = params["cond_nconsts"]
    second = first + params["body_nconsts"]
    if _holds_mark([params["cond_jaxpr"]]):
        raise UncountableError("while")

    def going(state: Counted) -> Bool[Array, ""]:
        return jnp.asarray(_run(params["cond_jaxpr"], [*inputs[:first], *state[0]])[0][0])

    def body(state: Counted) -> Counted:
        outs, more = _run(params["body_jaxpr"], [*inputs[first:second], *state[0]])
        return outs, state[1] + more

    return jax.lax.while_loop(going, body, (inputs[second:], jnp.zeros((), int)))


def _scan(eqn: JaxprEqn, inputs: list[object]) -> Counted:
    params = eqn.params
    constant = params["num_consts"]
    carried = constant + params["num_carry"]

    def body(state: Counted, row: list[object]) -> tuple[Counted, list[object]]:
        outs, more = _run(params["jaxpr"], [*inputs[:constant], *state[0], *row])
        return (outs[: params["num_carry"]], state[1] + more), outs[params["num_carry"] :]

    start = inputs[constant:carried], jnp.zeros((), int)
    options = {name: params[name] for name in ("length", "reverse", "unroll")}
    (outs, count), rows = jax.lax.scan(body, start, inputs[carried:], **options)
    return [*outs, *rows], count


def _closed(jaxpr: ClosedJaxpr | Jaxpr) -> ClosedJaxpr:
    return jaxpr if isinstance(jaxpr, ClosedJaxpr) else ClosedJaxpr(jaxpr, ())


def _holds_mark(values: Iterable[object]) -> bool:
    return any(_any(value, lambda eqn: eqn.params.get("name") in (GRADIENT, VALUE)) for value in values)


def _any(value: object, condition: Callable[[JaxprEqn], bool]) -> bool:
    """Whether a condition holds for an operation of a program, at any depth."""
    if isinstance(value, tuple | list):
        return any(_any(one, condition) for one in value)
    if isinstance(value, ClosedJaxpr):
        value = value.jaxpr
    if not isinstance(value, Jaxpr):
        return False
    return any(condition(eqn) or any(_any(one, condition) for one in eqn.params.values()) for eqn in value.eqns)
