"""Initial laws: `law(key, shape, dtype)` draws a weight matrix `(fan_out, fan_in)` whose entries have variance one.

The parametrisation then sets the size, `init_scale` scales it further. Any function of this signature may be used.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key


def normal(key: Key[Array, ""], shape: tuple[int, ...], dtype: DTypeLike) -> Float[Array, "..."]:
    """Independent standard normal entries.

    >>> import gradflow as gf, jax
    >>> gf.models.laws.normal(jax.random.key(0), (3, 2), jax.numpy.float32).shape
    (3, 2)
    """
    return jax.random.normal(key, shape, dtype)


def uniform(key: Key[Array, ""], shape: tuple[int, ...], dtype: DTypeLike) -> Float[Array, "..."]:
    """Independent entries, uniform on `[-sqrt(3), sqrt(3)]`.

    >>> import gradflow as gf, jax
    >>> bool(abs(gf.models.laws.uniform(jax.random.key(0), (3, 2), jax.numpy.float32)).max() < 3**0.5)
    True
    """
    bound = jnp.sqrt(jnp.asarray(3.0, dtype))
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def sphere(key: Key[Array, ""], shape: tuple[int, ...], dtype: DTypeLike) -> Float[Array, "..."]:
    """Rows uniform on the sphere of radius `sqrt(fan_in)`.

    A vector of signs when the fan-in is one.

    >>> import gradflow as gf, jax
    >>> rows = gf.models.laws.sphere(jax.random.key(0), (3, 4), jax.numpy.float32)
    >>> [round(float(r), 4) for r in (rows**2).sum(axis=1)]
    [4.0, 4.0, 4.0]
    """
    draw = jax.random.normal(key, shape, dtype)
    return draw * jnp.sqrt(jnp.asarray(shape[-1], dtype)) / jnp.linalg.norm(draw, axis=-1, keepdims=True)


def orthogonal(key: Key[Array, ""], shape: tuple[int, ...], dtype: DTypeLike) -> Float[Array, "..."]:
    """Orthogonal rows or columns, whichever are fewer; Haar distributed.

    Entries have variance one.

    >>> import gradflow as gf, jax
    >>> w = gf.models.laws.orthogonal(jax.random.key(0), (2, 5), jax.numpy.float32)
    >>> bool(abs(w @ w.T - 5 * jax.numpy.eye(2)).max() < 1e-5)
    True
    """
    rows, columns = shape
    scale = jnp.sqrt(jnp.asarray(max(rows, columns), dtype))
    draw = jax.random.orthogonal(key, max(rows, columns), dtype=dtype)
    return scale * draw[:rows, :columns]
