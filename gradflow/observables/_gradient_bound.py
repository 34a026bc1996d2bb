"""A lower bound on the gradient norm from the living neurons alone."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from gradflow._checks import fail
from gradflow._tree import full_precision, in_single, scaled_norm
from gradflow.models._smoothed import slopes
from gradflow.observables._neuron_partition import output_weights
from gradflow.problems import EmpiricalRisk
from gradflow.protocols import OneHiddenLayer, missing


class GradientBound(eqx.Module):
    """Lower bound on `|grad L|` of a two-layer ReLU net, from living neurons:

        |grad L|^2 >= sum_k a_k^2 max(A_k, B_k^2),                                inner sums: i with w_k . x_i > 0
        A_k = sum_i (|x_i|^2 - mu) p_i^2 + mu (sum_i |p_i|)^2,        mu = min over i != j of  sign(p_i p_j) x_i . x_j
        B_k = sum_i p_i x_i . v,        v = sum_i p_i x_i over all samples, of length one,        p_i = -dL/df_i

    It takes no more of the weights than who is alive and how large `|a_k|` is, for the part of the gradient in the
    input weights alone. It holds always; where `y_i y_j x_i . x_j >= 0` and the loss decreases towards the labels, `mu`
    is not negative and `A_k` grows with the living set. A single pair of samples that breaks this makes `A_k` say
    nothing, while `B_k` depends on how far all samples agree. Compare the bound with `GradientNorm`.

    **Arguments**: `problem`: an `EmpiricalRisk` with scalar outputs and inputs `(n, in_size)`.

    **Raises** `ValueError` for another kind of problem, of outputs, of activation or of parameters.

    >>> import gradflow as gf, jax, jax.numpy as jnp
    >>> problem = gf.EmpiricalRisk(jnp.eye(2), jnp.array([1.0, -1.0]), gf.losses.exponential)
    >>> model = gf.models.TwoLayer(2, 5, key=jax.random.key(0))
    >>> bool(gf.observables.GradientBound(problem)(model) <= gf.observables.GradientNorm(problem)(model))
    True
    """

    problem: EmpiricalRisk

    def __init__(self, problem: EmpiricalRisk):
        if not isinstance(problem, EmpiricalRisk):
            raise fail("problem", "be a gradflow.EmpiricalRisk", f"of type {type(problem).__name__}")
        if problem.y.ndim != 1 or problem.x.ndim != 2:
            actual = f"with inputs of shape {problem.x.shape} and targets of shape {problem.y.shape}"
            raise fail("problem", "have inputs (n, in_size) and scalar targets", actual)
        self.problem = problem

    @in_single
    @full_precision
    def __call__(self, params: PyTree) -> Float[Array, ""]:
        lacking = missing(params, OneHiddenLayer)
        if lacking:
            actual = f"of type {type(params).__name__}, without `{lacking[0]}`"
            raise fail("params", "be a network with one hidden layer, as gradflow.models.TwoLayer is", actual)
        if slopes(params.activation) != (0.0, 1.0):
            raise fail("params", "have ReLU as its activation", "one with another", "Only ReLU has dead neurons.")
        z = jax.vmap(params.preactivations)(self.problem.x)
        residuals = self.problem.residuals(jax.vmap(params)(self.problem.x))
        a = output_weights(params, z.shape[1], z.dtype)
        if a.ndim != 1:
            raise fail("params", "have a scalar output", f"one of shape {a.shape[1:]}")
        multipliers = getattr(params, "multipliers", None)
        x = self.problem.x.astype(z.dtype) * (1 if multipliers is None else multipliers.of(0, z.dtype))
        gram, side = x @ x.T, jnp.sign(residuals)
        agreement = gram * side[:, None] * side[None, :]
        apart = ~jnp.eye(len(x), dtype=bool) & (side[:, None] * side[None, :] != 0)
        mu = jnp.min(jnp.where(apart, agreement, jnp.inf), initial=jnp.inf)
        mu = jnp.where(jnp.isfinite(mu), mu, 0)
        alive = (z > 0).astype(z.dtype)
        diagonal = (residuals**2 * (jnp.diagonal(gram) - mu)) @ alive
        both = mu * (jnp.abs(residuals) @ alive) ** 2
        total = residuals @ x
        length = scaled_norm(total)
        along = (residuals * (x @ (total / jnp.where(length > 0, length, 1)))) @ alive
        return jnp.sqrt(jnp.sum(a**2 * jnp.maximum(diagonal + both, along**2)))
