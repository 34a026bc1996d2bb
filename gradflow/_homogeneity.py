"""Probes of the degree of an activation."""

from collections.abc import Callable

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array


def degree_one_slopes(activation: Callable[[Array], Array]) -> tuple[float, float] | None:
    """The slopes left and right of zero of an activation of degree one, such as ReLU; `None` for others.

    >>> import jax
    >>> from gradflow._homogeneity import degree_one_slopes
    >>> degree_one_slopes(jax.nn.relu), degree_one_slopes(jax.nn.gelu)
    ((0.0, 1.0), None)
    """
    if not is_degree_one(activation):
        return None
    with jax.core.eval_context():
        left, right = np.asarray(activation(jnp.array([-1.0, 1.0])), float)
    return float(0.0 - left), float(right)


def is_degree_one(activation: Callable[[Array], Array]) -> bool:
    """Whether `s(c z) = c s(z)` for `c > 0`, found by trying: then `|a_j|^2 - |w_j|^2` is conserved."""
    # Not `ensure_compile_time_eval`: under vmap, that leaves functions with derivative rules of their own traced.
    with jax.core.eval_context():
        points = jnp.array([-2.0, -0.5, -0.125, 0.25, 1.0, 3.0], jnp.float32)
        base, scaled = np.asarray(activation(points)), np.asarray(activation(4 * points))
    return bool(np.allclose(scaled, 4 * base, rtol=1e-5, atol=1e-6))
