"""How far directions are from KKT points of the neural correlation function, and log-norms below underflow."""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, PyTree

from gradflow._checks import check_positive
from gradflow._tree import full_precision, in_single, split, tree_norm
from gradflow.models._polar import Polar
from gradflow.problems import EmpiricalRisk, NeuralCorrelation


class LogNorm(eqx.Module):
    """`ln |w|`, below underflow too.

    Of ordinary parameters, or from a `gradflow.Polar`; `(width,)` where that is neuron by neuron.

    **Arguments**: `whole`: whether to take all parameters together in any case, as an event of a run neuron by
    neuron needs.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> float(gf.observables.LogNorm()(gf.Polar(jnp.ones(3), -1000.0)))
    -1000.0
    """

    whole: bool = eqx.field(static=True, default=False)
    sees_coordinates: ClassVar[bool] = True

    @in_single
    def __call__(self, params: PyTree) -> Float[Array, "*neurons"]:
        if not isinstance(params, Polar):
            return jnp.log(tree_norm(split(params)[0]))
        log_norm = params.log_norm
        return jax.nn.logsumexp(2 * log_norm) / 2 if self.whole and log_norm.ndim else log_norm


class KKTResidual(eqx.Module):
    """Distance of the direction of the weights from a KKT point.

    For a direction `u` and the neural correlation function `N`:

        |grad N(u) - degree N(u) u|,        relative: over degree |N(u)|.

    It vanishes exactly at KKT points. Along a flow from `|w| = delta` it falls to about `delta^((2N - mu)/(2N))` with
    `mu` the largest tangential eigenvalue of the Hessian of `N`, and then grows again as the loss begins to fall, so a
    tolerance below may never be met: end runs by `Aligned`.

    **Arguments**: `correlation`: a `gradflow.NeuralCorrelation`, or a problem, of degree `degree`. `relative`. `kink`:
    for two-layer (leaky) ReLU networks, the sine of the angle within which a neuron counts as on the kink of a sample;
    the gradient is then the element of the Clarke subdifferential that is nearest to `degree N(u) u`, and neurons that
    slide along a kink may be at a KKT point. Take more than the angle over which the flow chatters. `None`: gradients
    as they are.

    **Raises** `ValueError` for another kind of problem, for one whose residuals vanish, and for a `kink` that is
    not positive.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> problem = gf.EmpiricalRisk(jnp.eye(2), jnp.array([2.0, 1.0]), gf.losses.square, lambda w, x: (x @ w) ** 2)
    >>> residual = gf.observables.KKTResidual(problem)
    >>> bool(residual(jnp.array([1e-9, 0.0])) < 1e-14), bool(residual(jnp.array([1e-9, 1e-9])) > 0.1)
    (True, True)
    """

    correlation: NeuralCorrelation
    kink: Float[Array, ""] | None
    relative: bool = eqx.field(static=True)
    sees_coordinates: ClassVar[bool] = True

    def __init__(
        self,
        correlation: NeuralCorrelation | EmpiricalRisk,
        *,
        degree: int = 2,
        relative: bool = True,
        kink: ArrayLike | None = None,
    ):
        self.correlation = as_correlation(correlation, degree)
        self.relative = bool(relative)
        if kink is not None:
            check_positive("kink", kink, "It is the sine of an angle, such as 1e-3.")
        self.kink = None if kink is None else jnp.asarray(kink, float)

    @in_single
    @full_precision
    def __call__(self, params: PyTree) -> Float[Array, ""]:
        return self.correlation.residual(direction_of(params), relative=self.relative, kink=self.kink)


class Correlation(eqx.Module):
    """Neural correlation function at the direction of the weights, `N(w/|w|)`.

    **Arguments**: `correlation`, `degree`: as for `KKTResidual`.

    **Raises** `ValueError` for another kind of problem, and for one whose residuals vanish.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> problem = gf.EmpiricalRisk(jnp.eye(2), jnp.array([2.0, 1.0]), gf.losses.square, lambda w, x: (x @ w) ** 2)
    >>> float(gf.observables.Correlation(problem)(jnp.array([3.0, 0.0])))
    1.0
    """

    correlation: NeuralCorrelation
    sees_coordinates: ClassVar[bool] = True

    def __init__(self, correlation: NeuralCorrelation | EmpiricalRisk, *, degree: int = 2):
        self.correlation = as_correlation(correlation, degree)

    @in_single
    @full_precision
    def __call__(self, params: PyTree) -> Float[Array, ""]:
        trainable, frozen = split(direction_of(params))
        size = tree_norm(trainable)
        unit = jax.tree_util.tree_map(lambda leaf: leaf / size.astype(leaf.dtype), trainable)
        return self.correlation(eqx.combine(unit, frozen))


class Aligned(eqx.Module):
    """Event: the KKT residual is below a tolerance, or the norm above a bound.

    It always comes. The value, positive from then on, is

        max( ln(tolerance / residual),  ln|w| - ln(norm) )

    For `gradflow.Until(Aligned(problem), above=0.0)`. The residual reaches its tolerance at a time that does not depend
    on the size of the start, provided that this is small enough.

    **Arguments**: `correlation`, `degree`, `kink`: as for `KKTResidual`. `tolerance`: on the relative residual. `norm`:
    of the weights, at which the loss takes part.

    **Raises** `ValueError` as `KKTResidual` does, and for a `tolerance` or `norm` that is not positive.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> problem = gf.EmpiricalRisk(jnp.eye(2), jnp.array([2.0, 1.0]), gf.losses.square, lambda w, x: (x @ w) ** 2)
    >>> bool(gf.observables.Aligned(problem)(jnp.array([1e-9, 1e-10])) > 0)
    False
    """

    residual: KKTResidual
    tolerance: Float[Array, ""]
    norm: Float[Array, ""]
    sees_coordinates: ClassVar[bool] = True

    def __init__(
        self,
        correlation: NeuralCorrelation | EmpiricalRisk,
        *,
        tolerance: ArrayLike = 1e-3,
        norm: ArrayLike = 0.1,
        degree: int = 2,
        kink: ArrayLike | None = None,
    ):
        check_positive("tolerance", tolerance)
        check_positive("norm", norm)
        self.residual = KKTResidual(correlation, degree=degree, kink=kink)
        self.tolerance, self.norm = jnp.asarray(tolerance, float), jnp.asarray(norm, float)

    def __call__(self, params: PyTree) -> Float[Array, ""]:
        residual = self.residual(params)
        close = jnp.log(self.tolerance.astype(residual.dtype)) - jnp.log(residual)
        large = jnp.max(LogNorm()(params)) - jnp.log(self.norm.astype(residual.dtype))
        return jnp.maximum(close, large)


def as_correlation(given: NeuralCorrelation | EmpiricalRisk, degree: int) -> NeuralCorrelation:
    """A correlation function as it is; that of a problem at the origin."""
    return NeuralCorrelation(given, degree) if isinstance(given, EmpiricalRisk) else given


def direction_of(params: PyTree) -> PyTree:
    """Parameters whose direction is meant, not their size."""
    if not isinstance(params, Polar):
        return params
    return params.ordinary_up_to_scale()
