"""Step-size control: the error norm, the first step, and the next one.

The local error `e` of a step from `y0` to `y1` is measured as

    ratio = rms_i( e_i / (atol + rtol max(|y0_i|, |y1_i|)) ),     accepted when ratio <= 1.

With `atol=None` the absolute part is `rtol` times a scale: the size of the *initial* values of the leaf that entry `i`
belongs to or, for explicit methods, a hundredth of their present size once that is larger. A fixed absolute tolerance
gets the escape from a small initialisation wrong as soon as the initial values fall below it, and reports success;
this one resolves a start of size 1e-10 as well as one of size 1. The hundredth keeps neurons that are still small
under control while others have grown; on ReLU networks, where entries cross zero late and steps are short, following
only the initial size would cost more, at no gain in accuracy. Stability keeps explicit steps short enough for the small
neurons in any case. Implicit ones it does not: with a hundredth, later features would escape at the wrong time, so
there the scale stays.
"""

from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree, Scalar

from gradflow._tree import scaled_norm

SCALE_FRACTION = 0.01
"""Share of the present size of a leaf below which an explicit method holds its entries to an absolute error."""

FIRST_ERROR = 1.0
"""Error of the first step over its tolerance, by an estimate that leaves out the factorials of Taylor's formula, and so
errs on the side of short steps. With a hundredth, as is usual, growth from a step that is far too short ends in one
that is too long: in 4 of 14 random bases a saddle was then left up to 2 % late, and with one in none."""

FIRST_TOLERANCE_SHARE = 0.05
"""Share of the tolerance that the first steps are held to, where it is graded."""


class StepControl(eqx.Module):
    """Accepts or rejects steps and proposes the next (proportional-integral).

    **Arguments**: `rtol`, `atol` (scalar, or `None`: scaled to the state); `num_entries`: the number of entries
    of each leaf of the state, where zeros have been added to it that are to count for nothing (default: all). Growth
    per step lies in `[0.1, 10]`; there is none right after a rejection.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> control = gf.solvers.StepControl(jnp.array(1e-3), None)
    >>> y = jnp.array([1e-8, -1e-8])
    >>> round(float(control.ratio(1e-11 * jnp.ones(2), y, y, control.absolute_scale(y))), 3)
    0.5
    """

    rtol: Float[Array, ""]
    atol: Float[Array, ""] | None
    num_entries: tuple[Int[Array, "..."], ...] | None = None

    def tightened(self, progress: Scalar) -> "StepControl":
        """For a step that ends when this part of the run lies behind: early errors are carried through all of it."""
        factor = jnp.clip(progress, FIRST_TOLERANCE_SHARE, 1).astype(self.rtol.dtype)
        atol = None if self.atol is None else factor * self.atol
        return StepControl(factor * self.rtol, atol, self.num_entries)

    def absolute_scale(self, y: PyTree) -> PyTree:
        """Size below which entries of each leaf are held to an absolute error: the root mean square of the leaf.

        Leaves of zeros take the size of the whole state. A state of zeros has no size yet: the scale is zero, and
        `raise_scale` lifts it as the state grows.
        """
        leaves, structure = jax.tree_util.tree_flatten(y)
        norms, counts = [scaled_norm(jnp.ravel(leaf)) for leaf in leaves], self._sizes_of(leaves)
        sizes = [norm / jnp.sqrt(count).astype(norm.dtype) for norm, count in zip(norms, counts, strict=True)]
        total = jnp.sqrt(sum(counts)).astype(norms[0].dtype)
        whole = scaled_norm(jnp.stack([norm.astype(norms[0].dtype) for norm in norms])) / total
        scales = [jnp.where(size > 0, size, whole.astype(size.dtype)) for size in sizes]
        return jax.tree_util.tree_unflatten(structure, scales)

    def raise_scale(self, scale: PyTree, was_zero: Bool[Array, ""], y: PyTree, fraction: float | Scalar) -> PyTree:
        """The scale after a step to `y`: it follows the state upwards, at a distance unless the run started at zero."""

        def follow(old: Array, size: Array) -> Array:
            return jnp.maximum(old, jnp.where(was_zero, 1.0, fraction).astype(size.dtype) * size)

        return jax.tree_util.tree_map(follow, scale, self.absolute_scale(y))

    def error_weights(self, y: PyTree, scale: PyTree) -> PyTree:
        """What the error of each entry is compared with: `rtol` times this is the tolerance."""

        def size(a: Array, low: Array) -> Array:
            if self.atol is None:
                both = jnp.abs(a) + low
            else:
                both = jnp.abs(a) + self.atol.astype(a.dtype) / self.rtol.astype(a.dtype)
            return jnp.where(both > 0, both, 1)

        return jax.tree_util.tree_map(size, y, scale)

    def ratio(self, error: PyTree, y0: PyTree, y1: PyTree, scale: PyTree) -> Scalar:
        """Error of a step over the tolerance; NaN or infinity where the step is not finite."""

        def squares(e: Array, a: Array, b: Array, low: Array) -> Scalar:
            largest = jnp.maximum(jnp.abs(a), jnp.abs(b))
            rtol = self.rtol.astype(e.dtype)
            if self.atol is None:
                size = largest + low
                # Divided in two steps: rtol * size would underflow in float32 for a state of 1e-35.
                scaled = e / jnp.where(size > 0, size, 1) / rtol
            else:
                scaled = e / (self.atol.astype(e.dtype) + rtol * largest)
            return jnp.sum(jnp.where(e == 0, e, scaled) ** 2)

        total = sum(jax.tree_util.tree_leaves(jax.tree_util.tree_map(squares, error, y0, y1, scale)))
        return jnp.sqrt(jnp.asarray(total) / self.entries(error))

    def entries(self, y: PyTree) -> int | Scalar:
        """The number of entries of a state that count."""
        return sum(self._sizes_of(jax.tree_util.tree_leaves(y)))

    def _sizes_of(self, leaves: list[Array]) -> Sequence[int | Scalar]:
        if self.num_entries is None:
            return [max(leaf.size, 1) for leaf in leaves]
        return [jnp.maximum(count, 1) for count in self.num_entries]

    def first_step(
        self,
        field: Callable[[Scalar, PyTree], PyTree],
        y0: PyTree,
        f0: PyTree,
        scale: PyTree,
        order: int,
        length: Scalar | float = 1.0,
    ) -> tuple[Scalar, Scalar]:
        """A first step and the number of evaluations of the field that it took, in a run of some `length`.

        After Hairer, Norsett & Wanner, II.4, but free of a unit of time: with `T` the time in which the state or its
        derivative changes by itself, whichever is shorter, the error of a step `h` is taken for `T |y'| (h / T)^order`.
        """

        def size(tree: PyTree) -> Scalar:
            return self.ratio(tree, y0, y0, scale)

        d0, d1 = size(y0), size(f0)
        span = jnp.asarray(length, d0.dtype)
        small = 1e-6 * jnp.where(span > 0, span, 1)
        h0 = jnp.where((d0 > 0) & (d1 > 0) & jnp.isfinite(d0 / d1), 0.01 * d0 / jnp.where(d1 > 0, d1, 1), small)
        y1 = jax.tree_util.tree_map(lambda y, f: y + h0.astype(y.dtype) * f, y0, f0)
        difference = jax.tree_util.tree_map(jnp.subtract, field(h0, y1), f0)
        d2 = size(difference) / h0
        moving, bent = d1 > 0, (d1 > 0) & (d2 > 0)
        unit = jnp.where(bent, d1 / jnp.where(bent, d2, 1), jnp.inf)
        unit = jnp.minimum(unit, jnp.where(moving & (d0 > 0), d0 / jnp.where(moving, d1, 1), jnp.inf))
        usable = moving & jnp.isfinite(unit)
        unit = jnp.where(usable, unit, 1)
        fraction = (FIRST_ERROR / (unit * jnp.where(usable, d1, 1))) ** (1 / order)
        h1 = jnp.where(usable, unit * fraction, 100 * h0)
        step = jnp.minimum(100 * h0, h1)
        return jnp.where(jnp.isfinite(step) & (step > 0), step, small), jnp.asarray(1)

    def factor(self, ratio: Scalar, previous: Scalar, rejected_before: Bool[Array, ""], order: int | Scalar) -> Scalar:
        """By how much to change the step, after a step with this error ratio and one before with `previous`."""
        tiny = jnp.asarray(1e-10, ratio.dtype)
        good = jnp.maximum(ratio, tiny)
        accepted = 0.9 * good ** (-0.7 / order) * jnp.maximum(previous, tiny) ** (0.4 / order)
        accepted = jnp.clip(accepted, 0.2, jnp.where(rejected_before, 1.0, 10.0))
        rejected = jnp.clip(0.9 * good ** (-1 / order), 0.1, 0.9)
        rejected = jnp.where(jnp.isfinite(ratio), rejected, 0.1)
        return jnp.where(ratio <= 1, accepted, rejected)
