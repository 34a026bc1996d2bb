"""Critical points of the correlation of one ReLU neuron that lie on kinks, where `N` has no gradient."""

from typing import NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from gradflow._tree import full_precision, join
from gradflow.problems import NeuralCorrelation
from gradflow.problems._clarke import nearest_element
from gradflow.programs import fresh_jit
from gradflow.theory._ascent import WholeCorrelation, eigenvalues, least_residual, tangent

EXACT = 1e-9
"""Sine of the angle to a kink that counts as none."""

REACHES = (1e-6, 1e-4, 1e-2)
"""Sines of the angles within which kinks are tried, all at once."""

NEAREST = 4
"""Numbers of kinks that are tried, nearest first: 0 to one less than this."""


class Settled(NamedTuple):
    """Points `(..., size)`, values, residuals, tangential eigenvalues within the kinks (`inf` across them), the number
    of kinks, and how many of these `N` rises from to both sides."""

    units: Float[Array, "*points size"]
    values: Float[Array, "*points"]
    residuals: Float[Array, "*points"]
    spectra: Float[Array, "*points eigenvalues"]
    kinks: Int[Array, "*points"]
    rising: Int[Array, "*points"]


@fresh_jit
@full_precision
def on_kinks(
    correlation: NeuralCorrelation, trainable: PyTree, frozen: PyTree, ends: Float[Array, "starts size"]
) -> Bool[Array, " starts"]:
    """Whether a unit vector lies on a kink, but for rounding."""
    _, unflatten = jax.flatten_util.ravel_pytree(trainable)
    x = correlation.problem.x.astype(ends.dtype)
    return jax.vmap(lambda end: jnp.any(_angles(join(unflatten(end), frozen), x) <= EXACT))(ends)


def _angles(model: PyTree, x: Float[Array, "N d"]) -> Float[Array, " N"]:
    """Sines of the angles between the neuron and the kinks of the samples."""
    before, bounds = jax.vmap(model.preactivations)(x)[:, 0], jax.vmap(model.preactivation_bounds)(x)[:, 0]
    return jnp.abs(before / bounds)


@fresh_jit
@full_precision
def settle_on_kinks(
    correlation: NeuralCorrelation, trainable: PyTree, frozen: PyTree, ends: Float[Array, "starts size"]
) -> Settled:
    """Critical points near the given unit vectors, on the kinks that these are close to: `(starts, tried, ...)`.

    A neuron on kinks of samples `E` lies in the subspace `w . x_i = 0, i in E`, and `N` is smooth in there. For several
    choices of `E`, the residual within the subspace is made least; the Clarke residual then tells whether that is a KKT
    point. The first of each row is the given vector itself.
    """
    _, unflatten = jax.flatten_util.ravel_pytree(trainable)
    target = WholeCorrelation(correlation, trainable, frozen)
    x = correlation.problem.x.astype(ends.dtype)

    def model(vector: Array) -> PyTree:
        return join(unflatten(vector), frozen)

    def before(vector: Array) -> Array:
        return jax.vmap(model(vector).preactivations)(x)[:, 0]

    def allowed(vector: Array, on: Array) -> Array:
        normals = jax.jacfwd(before)(vector) * on[:, None].astype(vector.dtype)
        return jnp.eye(vector.size, dtype=vector.dtype) - jnp.linalg.pinv(normals, rtol=1e-10) @ normals

    def near(vector: Array) -> Array:
        angles = _angles(model(vector), x)
        ranks = jnp.argsort(jnp.argsort(angles))
        sets = [ranks < count for count in range(NEAREST)]
        return jnp.stack(sets + [angles <= radius for radius in REACHES])

    def slide(u: Array, on: Array) -> Array:
        space = allowed(u, on)
        stepped = space @ least_residual(lambda v: target(space @ v, 0), correlation.degree, space @ u, 30)
        return stepped / jnp.linalg.norm(stepped)

    def described(u: Array) -> Settled:
        element = nearest_element(correlation, model(u), EXACT)
        spectrum = eigenvalues(lambda v: target(v, 0), u, allowed(u, element.on[:, 0]))
        rising = jnp.sum(element.on & (element.jumps > 0))
        return Settled(u, target(u, 0), element.distance, spectrum, jnp.sum(element.on), rising)

    def settled(u: Array) -> Settled:
        slid = jax.vmap(lambda on: slide(u, on))(near(u))
        return jax.lax.map(described, jnp.concatenate([u[None], slid]), batch_size=NEAREST + len(REACHES) + 1)

    return jax.lax.map(settled, ends, batch_size=min(8, ends.shape[0]))


@fresh_jit
@full_precision
def stationary(target: WholeCorrelation, degree: int, starts: Float[Array, "starts size"], steps: int) -> Settled:
    """Points at which the residual of a smooth `N` is least."""

    def one(start: Array) -> Settled:
        u = least_residual(lambda v: target(v, 0), degree, start, steps)
        value, slope = tangent(lambda v: target(v, 0), u)
        none = jnp.zeros((), int)
        return Settled(u, value, jnp.linalg.norm(slope), eigenvalues(lambda v: target(v, 0), u), none, none)

    return jax.lax.map(one, starts, batch_size=min(16, starts.shape[0]))
