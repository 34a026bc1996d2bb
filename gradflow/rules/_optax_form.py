"""The constants of optax transforms that can be read safely: optax's own functions, with arguments by name."""

import functools
import inspect
from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from gradflow.protocols import SecondMoment, UpdateForm


def optax_form(transform: Any, learning_rate: Float[Array, ""]) -> UpdateForm | None:
    """The form of `optax.sgd`, `optax.rmsprop` or `optax.adam`, or of `functools.partial` of one of them; else `None`.

    Whatever is made inside a function of the user's, or ready made, is a closure that does not tell its constants.
    """
    maker, given = transform, {}
    if isinstance(transform, functools.partial):
        maker, given = transform.func, transform.keywords
        if transform.args:
            return None
    reader = next((read for function, read in _READERS if maker is function), None)
    if reader is None:
        return None
    defaults = {name: item.default for name, item in inspect.signature(maker).parameters.items()}
    return reader(learning_rate, {**defaults, **given})


def _sgd(learning_rate: Float[Array, ""], constants: dict[str, Any]) -> UpdateForm | None:
    momentum = constants["momentum"]
    if momentum is None:
        return UpdateForm(learning_rate)
    averaging = "nesterov" if constants["nesterov"] else "heavy_ball"
    return UpdateForm(learning_rate, jnp.asarray(momentum, float), averaging)


def _rmsprop(learning_rate: Float[Array, ""], constants: dict[str, Any]) -> UpdateForm | None:
    if constants["centered"] or constants["momentum"] is not None:
        return None
    eps, zero = constants["eps"], 0.0
    inside, outside = (eps, zero) if constants["eps_in_sqrt"] else (zero, eps)
    return UpdateForm(learning_rate, memory=_memory(constants["decay"], inside, outside, constants))


def _adam(learning_rate: Float[Array, ""], constants: dict[str, Any]) -> UpdateForm | None:
    if constants["nesterov"]:
        return None
    memory = _memory(constants["b2"], constants["eps_root"], constants["eps"], {"bias_correction": True})
    return UpdateForm(learning_rate, jnp.asarray(constants["b1"], float), "average", memory)


def _memory(decay: Any, inside: Any, outside: Any, constants: dict[str, Any]) -> SecondMoment:
    initial = constants.get("initial_scale", 0.0)
    return SecondMoment(
        decay=jnp.asarray(decay, float),
        inside=jnp.asarray(inside, float),
        outside=jnp.asarray(outside, float),
        initial=jnp.asarray(initial, float),
        scalar=False,
        bias_correction=bool(constants.get("bias_correction", False)),
    )


_READERS = ((optax.sgd, _sgd), (optax.rmsprop, _rmsprop), (optax.adam, _adam))
