"""How the size of weights and multipliers depends on the width: standard, NTK, mean-field and muP.

A layer computes `multiplier * W x` with entries of `W` drawn with standard deviation `init_scale * std`. Both are
powers of the width `m` and, for the first layer, of the input size `d`:

    layer     multiplier                 std
    input     d^-input_a  m^-a[0]        d^-input_b  m^-b[0]
    hidden    m^-a[1]                    m^-b[1]
    output    m^-a[2]                    m^-b[2]

One learning rate, one flow time, serves all layers. (In the notation of Yang & Hu 2021, arXiv 2011.14522, this is the
abc-parametrisation with `c = 0`, which is no loss: `(a, b, c) -> (a + h, b - h, c - 2 h)` leaves the training alone.)
"""

from collections.abc import Callable, Sequence

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Float, Int, Key

from gradflow._checks import check_callable, check_positive, fail, is_concrete


class Parametrisation(eqx.Module):
    """Exponents of the width in multipliers and initial standard deviations.

    A layer computes `multiplier * W x`, entries of `W` drawn with standard deviation `init_scale * std`; with width `m`
    and input size `d`

        layer     multiplier                 std
        input     d^-input_a  m^-a[0]        d^-input_b  m^-b[0]
        hidden    m^-a[1]                    m^-b[1]
        output    m^-a[2]                    m^-b[2]

    One learning rate, one flow time, serves all layers. `standard`, `ntk`, `mean_field` and `mup` of `gradflow.models`
    are such.

    Source: in the notation of G. Yang and E. J. Hu (2021), arXiv 2011.14522, the abc-parametrisation with `c = 0`.

    >>> import gradflow as gf
    >>> gf.models.ntk.multiplier("output", fan_in=100, in_size=3)
    0.1
    """

    name: str = eqx.field(static=True)
    a: tuple[float, float, float] = eqx.field(static=True)
    b: tuple[float, float, float] = eqx.field(static=True)
    input_a: float = eqx.field(static=True, default=0.0)
    input_b: float = eqx.field(static=True, default=0.5)

    def multiplier(self, layer: str, *, fan_in: int, in_size: int) -> float:
        """Factor of a layer in the forward pass; `fan_in` is the width (for the input layer, the width it feeds)."""
        return float(self.multipliers((layer,), fan_in=fan_in, in_size=in_size).of(0, float))

    def std(self, layer: str, *, fan_in: int, in_size: int) -> float:
        """Standard deviation of the entries of a layer at `init_scale=1`."""
        power = float(fan_in) ** -self.b[_LAYERS.index(layer)]
        return power * float(in_size) ** -self.input_b if layer == "input" else power

    def multipliers(self, layers: Sequence[str], *, fan_in: int, in_size: int) -> "Multipliers":
        """The factors of several layers."""
        powers = tuple(-self.a[_LAYERS.index(layer)] for layer in layers)
        constants = tuple(float(in_size) ** -self.input_a if layer == "input" else 1.0 for layer in layers)
        return Multipliers(fan_in if any(powers) else 1, powers, constants)


class Multipliers(eqx.Module):
    """Factors `constant * width ** power` of the layers of a network, part of the program rather than of its numbers.

    Networks of several widths, padded to one shape, share a program if the width is a number: `with_array()`.

    >>> import gradflow as gf
    >>> factors = gf.models.ntk.multipliers(["input", "output"], fan_in=100, in_size=4)
    >>> factors.of(0, float), factors.of(1, float)
    (0.5, 0.1)
    """

    width: int = eqx.field(static=True)
    powers: tuple[float, ...] = eqx.field(static=True)
    constants: tuple[float, ...] = eqx.field(static=True)
    array: Int[Array, ""] | None = None  # takes the place of `width`

    def of(self, layer: int, dtype: DTypeLike) -> float | Float[Array, ""]:
        """The factor of a layer, by number."""
        if self.array is None or self.powers[layer] == 0:
            return self.constants[layer] * float(self.width) ** self.powers[layer]
        return self.constants[layer] * self.array.astype(dtype) ** self.powers[layer]

    def with_array(self) -> "Multipliers":
        """The same factors, with the width in an integer array, which does not flow."""
        if not any(self.powers):
            return self
        return Multipliers(1, self.powers, self.constants, jnp.asarray(self.width))


_LAYERS = ("input", "hidden", "output")

standard = Parametrisation("standard", a=(0.0, 0.0, 0.0), b=(0.0, 0.5, 0.5))
"""Variance `1 / fan_in`, multipliers one: what most code does."""

ntk = Parametrisation("ntk", a=(0.0, 0.5, 0.5), b=(0.0, 0.0, 0.0), input_a=0.5, input_b=0.0)
"""Variance one, multipliers `fan_in^-1/2` (Jacot, Gabriel & Hongler 2018, arXiv 1806.07572)."""

mean_field = Parametrisation("mean_field", a=(0.0, 1.0, 1.0), b=(0.0, 0.0, 0.0))
"""Averages over neurons: multipliers `1 / m`. Weights move at speed `1 / m`, so mean-field time is `t / m`."""

mup = Parametrisation("mup", a=(-0.5, 0.0, 0.5), b=(0.5, 0.5, 0.5))
"""Maximal update (Yang & Hu 2021, arXiv 2011.14522, table 1): features move at the same speed at every width."""


def resolve(parametrisation: "Parametrisation | str") -> Parametrisation:
    """The parametrisation of that name, or the object itself."""
    if isinstance(parametrisation, Parametrisation):
        return parametrisation
    named = {p.name: p for p in (standard, ntk, mean_field, mup)}
    if parametrisation not in named:
        listed = ", ".join(repr(name) for name in named)
        advice = "Or pass a gradflow.models.Parametrisation."
        raise fail("parametrisation", f"be one of {listed}", repr(parametrisation), advice)
    return named[parametrisation]


SCALE_ADVICE = "Zero is a saddle of the flow: nothing would move. Use a small number such as 1e-6."


def resolve_dtype(dtype: DTypeLike | None) -> jnp.dtype:
    """The type of the weights, JAX's default float type for `None`."""
    resolved = jnp.dtype(jnp.result_type(float) if dtype is None else dtype)
    if not jnp.issubdtype(resolved, jnp.floating):
        raise fail("dtype", "be a real floating-point type", resolved.name, "For instance jax.numpy.float32.")
    return resolved


def check_scale(init_scale: ArrayLike, dtype: jnp.dtype) -> None:
    """Refuses a scale that is not positive, no scalar, or too small for the type of the weights."""
    check_positive("init_scale", init_scale, SCALE_ADVICE)
    if jnp.ndim(init_scale) != 0:
        raise fail("init_scale", "be a scalar", f"of shape {jnp.shape(init_scale)}", "Use jax.vmap over scales.")
    smallest = float(jnp.finfo(dtype).tiny)
    if not is_concrete(init_scale):
        return
    scale = float(np.asarray(init_scale))
    if scale < smallest:
        advice = "Smaller numbers are zero in this type; float64 reaches down to 1e-307."
        raise fail("init_scale", f"be at least {smallest:.2g} in {dtype.name}", f"{scale:g}", advice)


def draw(
    law: Callable[..., Array],
    key: Key[Array, ""],
    shape: tuple[int, int],
    scale: ArrayLike,
    dtype: jnp.dtype,
) -> Float[Array, "fan_out fan_in"]:
    """A weight matrix of a law, `scale` times its unit-variance draw."""
    check_callable("law", law, "law(key, shape, dtype)", "See `gradflow.models.laws`.")
    return jnp.asarray(scale, dtype) * law(key, shape, dtype)
