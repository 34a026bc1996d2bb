"""Neural correlation function `N(u) = sum_i <z_i, H(x_i; u)>`: what drives a network while its weights are small."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PyTree

from gradflow._checks import check_count, check_finite, fail, is_concrete
from gradflow._tree import at_least_single, common_dtype, full_precision, join, scaled_norm, split, tree_norm
from gradflow.problems._clarke import has_kinks, nearest_element
from gradflow.problems._empirical_risk import EmpiricalRisk
from gradflow.programs import fresh_jit


class NeuralCorrelation(eqx.Module):
    """The neural correlation function, at the origin or at a saddle.

        N(u) = sum_i <z_i, H(x_i; u)>,        z_i = -dL/dp_i

    `z` are the residuals, the negative derivatives of the loss in the predictions, at predictions of zero or, with
    `at`, at those of these parameters: the residual correlation, which drives what is still small near a saddle. They
    hold the factor `1/n` of a mean. Points on the unit sphere with `grad N(u) = degree N(u) u` are its KKT points; near
    the origin gradient flow aligns with one of them, and its norm then grows as
    `d ln|w| / dt = degree N(u) |w|^(degree - 2)` (Kumar & Haupt 2024, arXiv 2402.09226).

    **Arguments**

    - `problem`: an `EmpiricalRisk` of a model that is homogeneous in its parameters, of any loss with a finite
      derivative at zero.
    - `degree`: of homogeneity.
    - `at`: parameters of the saddle; `None` for the origin. The small weights form a sub-network of the same kind as
      those that `N` is called with: `N` of one neuron tells of the next one to appear.
    - `labels`: the residuals `z` themselves, of the shape of the predictions, instead of those above.

    **Raises** `ValueError` for another kind of problem, one with class indices for targets, a degree below one, and if
    all residuals vanish, or are not finite.

    >>> import equinox as eqx, gradflow as gf, jax, jax.numpy as jnp
    >>> problem = gf.EmpiricalRisk(jnp.eye(2), jnp.array([1.0, -3.0]), gf.losses.square, reduction="sum")
    >>> correlation = gf.NeuralCorrelation(problem)
    >>> neuron = gf.models.TwoLayer(2, 1, key=jax.random.key(0))
    >>> at = lambda w, a: eqx.tree_at(lambda m: (m.weight, m.output), neuron, (jnp.array([w]), jnp.array([a])))
    >>> round(float(correlation(at([0.0, 1.0], -1.0))), 3)
    3.0
    """

    problem: EmpiricalRisk
    labels: Float[Array, "n ..."]
    degree: int = eqx.field(static=True)

    def __init__(self, problem: EmpiricalRisk, degree: int = 2, *, at: PyTree = None, labels: ArrayLike | None = None):
        self.problem, self.degree = check_risk(problem), degree
        check_count("degree", degree)
        if labels is not None:
            self.labels = jnp.asarray(labels)
        elif at is None:
            self.labels = residuals_at_origin(self.problem)
        else:
            self.labels = self.problem.residuals(self.problem.predictions(at))
        check_labels(self.labels)

    @full_precision
    def __call__(self, params: PyTree) -> Float[Array, ""]:
        """`N` at any parameters, normalised or not."""
        predictions = self.problem.predictions(params)
        if jnp.shape(predictions) != self.labels.shape:
            actual = f"of shape {jnp.shape(predictions)} against labels of shape {self.labels.shape}"
            raise fail("predict", "return predictions of the shape of the targets", actual)
        return jnp.sum(self.labels.astype(predictions.dtype) * predictions)

    def residual(self, params: PyTree, *, relative: bool = True, kink: ArrayLike | None = None) -> Float[Array, ""]:
        """`|grad N(u) - degree N(u) u|` at the direction `u` of the parameters, relative to `degree |N(u)|`.

        With `kink`, neurons within an angle of that sine of a kink of ReLU count as on it, where the gradient is any
        element of the Clarke subdifferential, and the nearest is taken.
        """
        trainable, frozen = split(params)
        size = tree_norm(trainable)
        unit = jax.tree_util.tree_map(lambda leaf: leaf / size.astype(leaf.dtype), trainable)
        value, gradient = jax.value_and_grad(lambda u: self(join(u, frozen)))(unit)
        scaled = self.degree * value
        if kink is not None and has_kinks(self.problem, params):
            distance = nearest_element(self, join(unit, frozen), kink).distance
            return distance / jnp.abs(scaled) if relative else distance
        left = jax.tree_util.tree_map(lambda g, u: jnp.ravel(g - scaled.astype(u.dtype) * u), gradient, unit)
        distance = scaled_norm(jnp.concatenate(jax.tree_util.tree_leaves(left)))
        return distance / jnp.abs(scaled) if relative else distance


def residuals_at_origin(
    problem: EmpiricalRisk, predictions: Float[Array, "n ..."] | None = None
) -> Float[Array, "n ..."]:
    """Residuals `-dL/dp_i` at predictions of zero, of the shape of the targets unless said otherwise."""
    if predictions is None:
        shape = problem.y.shape
        if jnp.issubdtype(problem.y.dtype, jnp.integer) and problem.y.ndim == 1:
            advice = "Give targets as one-hot rows, for instance with labels='onehot'."
            raise fail("problem", "have targets of the shape of the predictions", "one with class indices", advice)
        return problem.residuals(at_least_single(jnp.zeros(shape, common_dtype(problem.y, float))))
    return problem.residuals(predictions)


def check_labels(labels: Float[Array, "n ..."]) -> None:
    """Refuses residuals that vanish, or are not finite."""
    check_finite("problem", labels, "Its loss has no finite derivative at predictions of zero.")
    if is_concrete(labels) and not np.any(np.asarray(labels)):
        advice = "Nothing drives the weights there: are all targets zero, or is everything fitted?"
        raise fail(
            "problem", "have residuals that do not vanish", "one whose neural correlation function vanishes", advice
        )


def check_risk(problem: object) -> EmpiricalRisk:
    """The problem, if it knows its predictions; a complaint otherwise."""
    if not isinstance(problem, EmpiricalRisk):
        actual = f"of type {type(problem).__name__}"
        advice = "Polar coordinates need the predictions, before the loss."
        raise fail("problem", "be a gradflow.EmpiricalRisk", actual, advice)
    return problem


def check_degree(problem: EmpiricalRisk, degree: int, trainable: PyTree, frozen: PyTree) -> None:
    """Refuses a model that is not homogeneous of this degree, found by doubling and halving random parameters."""
    base, double, half = (np.asarray(part, float) for part in _scalings(problem, trainable, frozen))
    size = np.max(np.abs(base))
    if not np.all(np.isfinite([base, double, half])) or size == 0:
        return
    off = max(np.max(np.abs(double / 2.0**degree - base)), np.max(np.abs(half * 2.0**degree - base)))
    if off <= 1e-3 * size:
        return
    measured = [float(np.log2(np.linalg.norm(a) / np.linalg.norm(b))) for a, b in ((double, base), (base, half))]
    other = round(measured[0])
    if abs(measured[0] - other) < 1e-3 and abs(measured[1] - other) < 1e-3:
        raise fail("degree", "be the degree of the model", f"{degree} for one of degree {other}", f"Pass {other}.")
    actual = f"one whose predictions grow like the power {measured[1]:.2f} to {measured[0]:.2f}"
    advice = "Biases and activations other than (leaky) ReLU, the identity and their powers break homogeneity."
    raise fail("problem", f"have a {degree}-homogeneous model", actual, advice)


@fresh_jit
def _scalings(problem: EmpiricalRisk, trainable: PyTree, frozen: PyTree) -> tuple[Array, Array, Array]:
    """Predictions at random parameters, at twice and at half of them."""
    leaves, structure = jax.tree_util.tree_flatten(trainable)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    drawn = [jax.random.normal(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves, strict=True)]

    def at(factor: float) -> Array:
        scaled = jax.tree_util.tree_unflatten(structure, [factor * leaf for leaf in drawn])
        return problem.predictions(join(scaled, frozen))

    return at(1.0), at(2.0), at(0.5)


def polar_rate(
    problem: EmpiricalRisk,
    predict: Callable[[PyTree], Float[Array, "n ..."]],
    unit: PyTree,
    amplitude: Float[Array, ""],
) -> tuple[PyTree, Float[Array, "n ..."]]:
    """`sum_i <r_i, grad H(x_i; u)>` with `r` the residuals at the predictions `amplitude * H(x; u)`, and these `r`."""
    predictions, back = jax.vjp(predict, unit)
    residuals = problem.residuals(amplitude * predictions)
    return back(residuals.astype(predictions.dtype))[0], residuals
