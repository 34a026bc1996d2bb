"""The constants of optax transforms that can be read safely: optax's own functions, with arguments by name."""

import functools
import inspect
from collections.abc import Callable

import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Float

from gradflow.protocols import SecondMoment, UpdateForm

Transform = optax.GradientTransformation | Callable[..., optax.GradientTransformation]
"""A transform, or a function `learning_rate -> transform`."""


def optax_form(transform: Transform, learning_rate: Float[Array, ""]) -> UpdateForm | None:
    """The form of `optax.sgd`, `optax.rmsprop` or `optax.adam`, or of `functools.partial` of one of them; else `None`.

    Whatever is made inside a function of the user's, or ready made, is a closure that does not tell its constants.
    """
    maker, given = transform, {}
    if isinstance(transform, functools.partial):
        maker, given = transform.func, transform.keywords
        if transform.args:
            return None
    function, reader = next((pair for pair in _READERS if maker is pair[0]), (None, None))
    if function is None or reader is None:
        return None
    defaults = {name: item.default for name, item in inspect.signature(function).parameters.items()}
    constants = {**defaults, **given}
    constants.pop("learning_rate", None)
    return reader(learning_rate, **constants)


def described_transform(transform: Transform) -> str:
    """What messages call a transform: its function, with the constants that were given by name."""
    if isinstance(transform, optax.GradientTransformation):
        return "a ready-made transform, which does not tell its constants"
    maker = transform.func if isinstance(transform, functools.partial) else transform
    name = getattr(maker, "__name__", type(maker).__name__)
    public = f"optax.{name}" if getattr(optax, name, None) is maker else f"{name}, a function that is not optax's own"
    if not isinstance(transform, functools.partial):
        return public
    given = [
        *(f"{value!r}" for value in transform.args),
        *(f"{key}={value!r}" for key, value in transform.keywords.items()),
    ]
    return f"{public} with {', '.join(given)}" if given else public


def _no_momentum(momentum: ArrayLike | None) -> bool:
    return momentum is None or (isinstance(momentum, (int, float)) and momentum == 0)


def _sgd(
    learning_rate: Float[Array, ""], *, momentum: ArrayLike | None, nesterov: bool, **_: object
) -> UpdateForm | None:
    if momentum is None or _no_momentum(momentum):
        return UpdateForm(learning_rate)
    averaging = "nesterov" if nesterov else "heavy_ball"
    return UpdateForm(learning_rate, jnp.asarray(momentum, float), averaging)


def _rmsprop(
    learning_rate: Float[Array, ""],
    *,
    decay: ArrayLike,
    eps: ArrayLike,
    eps_in_sqrt: bool,
    centered: bool,
    momentum: ArrayLike | None,
    initial_scale: ArrayLike = 0.0,
    bias_correction: bool = False,
    **_: object,
) -> UpdateForm | None:
    if centered or not _no_momentum(momentum):
        return None
    inside, outside = (eps, 0.0) if eps_in_sqrt else (0.0, eps)
    return UpdateForm(learning_rate, memory=_memory(decay, inside, outside, initial_scale, bias_correction))


def _adam(
    learning_rate: Float[Array, ""],
    *,
    b1: ArrayLike,
    b2: ArrayLike,
    eps: ArrayLike,
    eps_root: ArrayLike,
    nesterov: bool,
    **_: object,
) -> UpdateForm | None:
    if nesterov:
        return None
    memory = _memory(b2, eps_root, eps, initial=0.0, bias_correction=True)
    return UpdateForm(learning_rate, jnp.asarray(b1, float), "average", memory)


def _memory(
    decay: ArrayLike, inside: ArrayLike, outside: ArrayLike, initial: ArrayLike, bias_correction: bool
) -> SecondMoment:
    return SecondMoment(
        decay=jnp.asarray(decay, float),
        inside=jnp.asarray(inside, float),
        outside=jnp.asarray(outside, float),
        initial=jnp.asarray(initial, float),
        scalar=False,
        bias_correction=bool(bias_correction),
    )


_READERS = ((optax.sgd, _sgd), (optax.rmsprop, _rmsprop), (optax.adam, _adam))
