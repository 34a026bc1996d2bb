"""Deep linear network `f(x) = W_L ... W_1 x`."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Float, Key

from gradflow._checks import check_count
from gradflow._conserved import Conserved
from gradflow.models import laws
from gradflow.models._parametrisation import (
    Multipliers,
    Parametrisation,
    check_scale,
    draw,
    resolve,
    resolve_dtype,
    standard,
)


class DeepLinear(eqx.Module):
    """`f(x) = W_L ... W_1 x`, homogeneous of degree `L = depth >= 2`.

    Gradient flow conserves `W_l W_l^T - W_{l+1}^T W_{l+1}` for every `l` (Saxe, McClelland & Ganguli 2014,
    arXiv 1312.6120); `imbalance` gives their Frobenius norms.

    **Arguments**: `in_size`, `width` (of all hidden layers), `out_size` (`None` for a scalar output), `depth`;
    `init_scale`, `parametrisation`, `law`, `dtype` as for `TwoLayer`.

    **Raises** `ValueError` as `TwoLayer` does, and for a depth below two.

    >>> import gradflow as gf, jax
    >>> model = gf.models.DeepLinear(4, 5, 2, depth=3, key=jax.random.key(0))
    >>> model.end_to_end().shape
    (2, 4)
    """

    weights: tuple[Float[Array, "_ _"], ...]
    multipliers: Multipliers
    scalar: bool = eqx.field(static=True)

    def __init__(
        self,
        in_size: int,
        width: int,
        out_size: int | None = None,
        *,
        depth: int = 2,
        init_scale: ArrayLike = 1.0,
        parametrisation: Parametrisation | str = standard,
        law: Callable[..., Array] = laws.normal,
        dtype: DTypeLike | None = None,
        key: Key[Array, ""],
    ):
        check_count("in_size", in_size)
        check_count("width", width)
        check_count("depth", depth, least=2, advice="It counts weight matrices.")
        if out_size is not None:
            check_count("out_size", out_size, advice="Use None for a scalar output.")
        dtype = resolve_dtype(dtype)
        check_scale(init_scale, dtype)
        scaling = resolve(parametrisation)
        names = ["input"] + ["hidden"] * (depth - 2) + ["output"]
        sizes = [in_size] + [width] * (depth - 1) + [out_size or 1]
        of_layer = {"fan_in": width, "in_size": in_size}
        self.weights = tuple(
            draw(law, k, (sizes[i + 1], sizes[i]), init_scale * scaling.std(name, **of_layer), dtype)
            for i, (name, k) in enumerate(zip(names, jax.random.split(key, depth), strict=True))
        )
        self.multipliers = scaling.multipliers(names, **of_layer)
        self.scalar = out_size is None

    def __call__(self, x: Float[Array, " in_size"]) -> Float[Array, "*out_size"]:
        for layer, weight in enumerate(self.weights):
            x = self.multipliers.of(layer, weight.dtype) * (weight @ x)
        return x[0] if self.scalar else x

    def end_to_end(self) -> Float[Array, "out in_size"]:
        """The product `W_L ... W_1`, multipliers included."""
        product = self.multipliers.of(0, self.weights[0].dtype) * self.weights[0]
        for layer, weight in enumerate(self.weights[1:], 1):
            product = self.multipliers.of(layer, weight.dtype) * (weight @ product)
        return product

    def imbalance(self) -> Float[Array, " layers"]:
        """Frobenius norm of `W_l W_l^T - W_{l+1}^T W_{l+1}` for every pair of neighbouring layers."""
        return jnp.stack([jnp.linalg.norm(left - right) for left, right in self._pairs()])

    def conserved(self) -> dict[str, Conserved]:
        """The matrices `W_l W_l^T - W_{l+1}^T W_{l+1}`."""
        pairs = self._pairs()
        value = jnp.stack([left - right for left, right in pairs])
        magnitude = jnp.stack([jnp.trace(left) + jnp.trace(right) for left, right in pairs])
        return {"balancedness": Conserved(value, magnitude[:, None, None])}

    def _pairs(self) -> list[tuple[Float[Array, "width width"], Float[Array, "width width"]]]:
        return [
            (lower @ lower.T, upper.T @ upper) for lower, upper in zip(self.weights, self.weights[1:], strict=False)
        ]
