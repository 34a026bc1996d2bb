"""Neurons that slide along a kink: held there by fields that oppose each other on its two sides."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, PyTree

from gradflow._checks import check_positive, fail
from gradflow._tree import full_precision
from gradflow.models._smoothed import slopes, smooth
from gradflow.problems import EmpiricalRisk
from gradflow.protocols import PiecewiseLinearLayer, missing


class SlidingNeurons(eqx.Module):
    """Which neurons slide along the kinks of which samples: Boolean.

    Entry `(i, j)` of `(n, neurons)` tells whether neuron `j` slides along the kink of sample `i`.

    It does if it is near the kink, `|w_j . x_i| < band |w_j| |x_i|`, and gradient flow drives `w_j . x_i` up with the
    sample off and down with it on (Filippov 1988). With `g_ij = -dL/dh_ij`, the negative derivative of the loss in the
    activation `h_ij`, and `s_kj` the slopes of the activation smoothed over the band, for ReLU

        x_i . sum_{k != i} g_kj s_kj x_k  >  0  >  x_i . (sum_{k != i} g_kj s_kj x_k + g_ij x_i).

    About such a kink a solver of the unsmoothed flow chatters, which costs steps and spoils the invariant `"energy"`.

    **Arguments**

    - `problem`: an `EmpiricalRisk` with inputs `(n, in_size)`, smoothed or not, of `gradflow.models.TwoLayer` (or of
      what has its `activation`, `preactivations`, `preactivation_bounds` and `readout`).
    - `band`: the `smoothing` of the run; on unsmoothed runs, a small angle.

    **Raises** `ValueError` for another kind of problem, a band that is not positive, and for other parameters.

    >>> import gradflow as gf, jax, jax.numpy as jnp
    >>> problem = gf.EmpiricalRisk(jnp.eye(2), jnp.ones(2), loss=gf.losses.square)
    >>> sliding = gf.observables.SlidingNeurons(problem, 0.01)
    >>> int(sliding(gf.models.TwoLayer(2, 5, key=jax.random.key(0))).sum())
    0
    """

    problem: EmpiricalRisk
    band: Float[Array, ""]

    def __init__(self, problem: EmpiricalRisk, band: ArrayLike):
        if not isinstance(problem, EmpiricalRisk):
            raise fail("problem", "be a gradflow.EmpiricalRisk", f"of type {type(problem).__name__}")
        check_positive("band", band, "The smoothing of the run is a good choice.")
        self.problem, self.band = problem, jnp.asarray(band, jnp.result_type(float))

    @full_precision
    def __call__(self, params: PyTree) -> Bool[Array, "n neurons"]:
        lacking = missing(params, PiecewiseLinearLayer)
        if lacking:
            actual = f"of type {type(params).__name__}, without `{lacking[0]}`"
            raise fail("params", "be a network with one hidden layer, as gradflow.models.TwoLayer is", actual)
        z = jax.vmap(params.preactivations)(self.problem.x)
        size = jax.vmap(params.preactivation_bounds)(self.problem.x)

        def activate(z: Float[Array, "n neurons"]) -> Float[Array, "n neurons"]:
            return smooth(params.activation, z, size, self.band)

        def risk(hidden: Float[Array, "n neurons"]) -> Float[Array, ""]:
            return jnp.sum(jax.vmap(self.problem.loss)(jax.vmap(params.readout)(hidden), self.problem.y))

        hidden, slope = jax.jvp(activate, (z,), (jnp.ones_like(z),))
        residuals = -jax.grad(risk)(hidden)
        gram = self.problem.x.astype(z.dtype) @ self.problem.x.T.astype(z.dtype)
        diagonal = jnp.diagonal(gram)[:, None] * residuals
        others = gram @ (residuals * slope) - diagonal * slope
        left, right = slopes(params.activation)
        near = jnp.abs(z) < self.band.astype(z.dtype) * size
        return near & (others + left * diagonal > 0) & (others + right * diagonal < 0)
