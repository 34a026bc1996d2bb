"""Homogeneous smoothing of ReLU: the kink of every neuron rounded over a small angle.

A (leaky) ReLU is `s(z) = c z + h |z|`. Its gradient jumps at `z = 0`, and so does the field of a gradient flow. Here
`|z|` is replaced, for a neuron of weights `w` at an input `x`, by

    r q(w . x / r)   where |w . x| < r,        r = smoothing * |w| |x|,        q(u) = (3 + 6 u^2 - u^4) / 8,

and left alone elsewhere. `q` meets `|u|` at `u = +-1` with its first two derivatives, so that the field is continuously
differentiable; `r` is proportional to `|w|`, so that the network stays homogeneous of the degree it had, which softplus
does not; and a neuron whose angle with the kink exceeds `smoothing` sees nothing of it: dead neurons stay dead.
"""

import inspect
from collections.abc import Callable

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PyTree

from gradflow._checks import check_callable, fail, is_concrete
from gradflow._conserved import Conserved
from gradflow._homogeneity import degree_one_slopes
from gradflow.protocols import Conserves, offered


class Smoothed(eqx.Module):
    """Predictions of a ReLU model with rounded kinks, as `predict` of a problem.

        params(x)   becomes   params(x, smoothing=smoothing)

    The field of the gradient flow is then continuously differentiable, with a rate of change proportional to
    `1 / smoothing` where neurons slide along a kink. Its solution tends to the Filippov solution of the ReLU flow
    (A. F. Filippov 1988, *Differential Equations with Discontinuous Righthand Sides*), at first order in `smoothing`;
    `gradflow.filippov` extrapolates. While neurons slide, the number of steps grows like `1 / smoothing` for explicit
    solvers, and hardly at all for implicit ones such as `gradflow.solvers.NDF`. The parameters are those of the
    plain model: only the problem changes.

    **Arguments**

    - `smoothing`: sine of the angle over which a kink is rounded to either side, from 0 (not at all) to below 1; with
      biases, of the angle between `(w, b)` and `(x, 1)`. A leaf: many values run in one compiled program. May be
      traced.

    **Raises** `ValueError` for a smoothing outside `[0, 1)`, and when called on parameters that take no `smoothing`,
    or whose activation is not (leaky) ReLU.

    >>> import gradflow as gf, jax, jax.numpy as jnp
    >>> predict = gf.models.Smoothed(0.01)
    >>> problem = gf.EmpiricalRisk(jnp.eye(2), jnp.ones(2), gf.losses.square, predict=predict)
    >>> model = gf.models.TwoLayer(2, 8, key=jax.random.key(0))
    >>> gf.solve(gf.GradientFlow(problem), model, [1.0], rtol=1e-6).status
    'ok'
    """

    smoothing: Float[Array, ""]

    def __init__(self, smoothing: ArrayLike):
        if is_concrete(smoothing):
            value = np.asarray(smoothing)
            if value.dtype.kind not in "fiu" or not np.all((value >= 0) & (value < 1)):
                advice = "It is the sine of an angle; typical values are 1e-1 ... 1e-3."
                raise fail("smoothing", "lie in [0, 1)", f"{smoothing}", advice)
        if jnp.ndim(smoothing) != 0:
            actual = f"of shape {jnp.shape(smoothing)}"
            raise fail("smoothing", "be a scalar", actual, "Use jax.vmap over several.")
        self.smoothing = jnp.asarray(smoothing, jnp.result_type(float))

    def __call__(self, params: PyTree, x: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        model = check_callable("params", params, "params(x, smoothing=smoothing)")
        if "smoothing" not in inspect.signature(model).parameters:
            actual = f"of type {type(params).__name__}, which takes none"
            raise fail("params", "take a `smoothing`", actual, "TwoLayer and MLP of gradflow.models do.")
        return jax.vmap(lambda one: model(one, smoothing=self.smoothing))(x)

    def conserved(self, params: PyTree) -> dict[str, Conserved]:
        """What gradient flow of the plain model conserves: the smoothing keeps the homogeneity it rests on."""
        model = offered(params, Conserves)
        return {} if model is None else model.conserved()


def smooth(
    activation: Callable[[Array], Array],
    z: Float[Array, "*neurons"],
    size: Float[Array, "*neurons"],
    smoothing: Float[Array, ""] | float,
) -> Float[Array, "*neurons"]:
    """`activation(z)` of a piecewise linear activation, rounded where `|z| < smoothing * size`.

    The function is homogeneous of degree one in `(z, size)`. All quotients are formed after division by `smoothing *
    size`, so that nothing under- or overflows for weights of 1e-30 in float32; where that product is zero, the plain
    activation is used, with its own derivative at the kink.

    **Raises** `ValueError` unless the activation is homogeneous of degree one.

    >>> import jax, jax.numpy as jnp
    >>> from gradflow.models._smoothed import smooth
    >>> [float(s) for s in smooth(jax.nn.relu, jnp.array([-1.0, 0.0, 1.0]), jnp.ones(3), 0.5)]
    [0.0, 0.09375, 1.0]
    """
    left, right = slopes(activation)
    radius = jnp.asarray(smoothing, z.dtype) * size
    inside = jnp.abs(z) < radius
    # A constant unit: the value does not depend on it, and derivatives of any order stay at order one.
    unit = jax.lax.stop_gradient(jnp.where(inside, radius, 1))
    r = jnp.where(inside, radius / unit, 1)
    u = jnp.where(inside, z / unit, 0) / r
    rounded = (right + left) / 2 * z + (right - left) / 2 * unit * r * (3 + 6 * u**2 - u**4) / 8
    return jnp.where(inside, rounded, activation(z))


def length(vector: Float[Array, "*rows size"]) -> Float[Array, "*rows"]:
    """Euclidean norm along the last axis; no under- or overflow on the way, and a gradient of zero at zero."""
    largest = jnp.max(jnp.abs(vector), axis=-1, initial=0.0)
    unit = jax.lax.stop_gradient(jnp.where(largest > 0, largest, 1))
    squares = jnp.sum((vector / unit[..., None]) ** 2, axis=-1)
    positive = squares > 0
    return jnp.where(positive, unit * jnp.sqrt(jnp.where(positive, squares, 1)), 0)


def slopes(activation: Callable[[Array], Array]) -> tuple[float, float]:
    """The slopes of a (leaky) ReLU, left and right of its kink.

    **Raises** `ValueError` unless the activation is homogeneous of degree one.

    >>> import jax
    >>> from gradflow.models._smoothed import slopes
    >>> slopes(jax.nn.relu)
    (0.0, 1.0)
    """
    one_sided = degree_one_slopes(activation)
    if one_sided is None:
        actual = f"{getattr(activation, '__name__', repr(activation))}, which is not"
        raise fail("activation", "be homogeneous of degree one, such as ReLU", actual, "Others need no smoothing.")
    return one_sided
