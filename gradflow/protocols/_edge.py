"""What rules, flows, methods and theory know in common of the edge of stability: how a rule steps, and the state of the
flow of its averages."""

from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, Scalar


class SecondMoment(eqx.Module):
    """The memory of squared gradients that a step is divided by the root of.

        nu_{k+1} = decay nu_k + (1 - decay) g_k^2,      D = sqrt(c_k nu_{k+1} + inside) + outside

    with `c_k = 1`, or `1 / (1 - decay^(k+1))` with `bias_correction`. `scalar`: `nu` is one number, the average of
    `|g|^2`; otherwise one for each parameter. `initial`: the value of `nu_0`.
    """

    decay: Float[Array, ""]
    inside: Float[Array, ""]
    outside: Float[Array, ""]
    initial: Float[Array, ""]
    scalar: bool = eqx.field(static=True)
    bias_correction: bool = eqx.field(static=True, default=False)

    def start(self, trainable: PyTree) -> PyTree:
        """The memory before the first gradient."""
        if self.scalar:
            dtype = jnp.result_type(*jax.tree_util.tree_leaves(trainable))
            return self.initial.astype(dtype)
        return jax.tree_util.tree_map(lambda leaf: jnp.full_like(leaf, self.initial), trainable)

    def squares(self, gradient: PyTree) -> PyTree:
        """The squares that enter the memory."""
        if not self.scalar:
            return jax.tree_util.tree_map(jnp.square, gradient)
        leaves = jax.tree_util.tree_leaves(gradient)
        return jnp.asarray(sum(jnp.sum(leaf**2) for leaf in leaves), jnp.result_type(*leaves))

    def after(self, memory: PyTree, gradient: PyTree) -> PyTree:
        """The memory after one more gradient."""

        def mix(old: Array, square: Array) -> Array:
            decay = self.decay.astype(old.dtype)
            return decay * old + (1 - decay) * square

        return jax.tree_util.tree_map(mix, memory, self.squares(gradient))

    def pace(self) -> Scalar:
        """The rate per step at which the memory follows, `(1 - decay) / decay`: a step has the new gradient in it."""
        return (1 - self.decay) / self.decay

    def correction(self, k: Scalar) -> Scalar:
        """The factor `c_k` of the step from iterate `k`, which need not be an integer."""
        one = jnp.ones((), self.decay.dtype)
        return 1 / (1 - self.decay ** (k.astype(self.decay.dtype) + 1)) if self.bias_correction else one

    def scale(self, memory: PyTree, k: Scalar) -> PyTree:
        """`D`, by which the step from iterate `k` is divided."""

        def root(nu: Array) -> Array:
            corrected = self.correction(k).astype(nu.dtype) * nu
            return jnp.sqrt(corrected + self.inside.astype(nu.dtype)) + self.outside.astype(nu.dtype)

        return jax.tree_util.tree_map(root, memory)


class UpdateForm(eqx.Module):
    """A deterministic rule `w_{k+1} = w_k - eta D^-1 v_k`, with `v_k` the gradient, or what `momentum` makes of it.

    `averaging`, what becomes of gradients: `"heavy_ball"` adds them up, `v = beta v + g`; `"nesterov"` looks ahead;
    `"average"` takes their average, `v = beta v + (1 - beta) g`, as Adam does. `memory`: of `D`; `None` where `D = 1`.
    """

    learning_rate: Float[Array, ""]
    momentum: Float[Array, ""] | None = None
    averaging: Literal["heavy_ball", "nesterov", "average"] = eqx.field(static=True, default="heavy_ball")
    memory: SecondMoment | None = None


class CentralState(eqx.Module):
    """Where the iterates are on average, and how far they oscillate about it.

    Their covariance is `Sigma = U^T X U`, with rows `U` (`vectors`) and a small matrix `X` (`covariance`), zero beyond
    the directions in use.
    """

    params: PyTree
    memory: PyTree  # of squared gradients; `None` where the rule has none
    dissipated: Float[Array, ""]  # integral of |w'|_P^2 + <Sigma, P'>, which the loss has paid for
    vectors: Float[Array, "k size"]
    covariance: Float[Array, "k k"]
    log_amplitude: Scalar  # of the rule's own oscillation in the sharpest direction, by its linear growth
    delay: Scalar  # in time; the longest so far between the threshold and the oscillation of the rule
    oscillating: Scalar  # directions that have oscillated at once, at most

    def deviations(self) -> Float[Array, "k size"]:
        """Rows whose outer products add up to the covariance."""
        values, vectors = jnp.linalg.eigh(self.covariance)
        return (vectors * jnp.sqrt(jnp.maximum(values, 0))[None]).T @ self.vectors
