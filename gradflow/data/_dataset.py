"""A data set: inputs `x` of shape `(n, d)`, targets `y` of shape `(n,)` or `(n, k)`, and where they came from."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Shaped

from gradflow._checks import fail


# Arrays have no single truth value, so the comparison that dataclasses generate would raise.
@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Inputs and targets as NumPy arrays, with their history. Unpacks as `x, y = dataset`.

    **Arguments**

    - `x`: inputs `(n, d)`; images are flattened, `x[i].reshape(image_shape)` is the image.
    - `y`: targets `(n,)`, or `(n, k)` for one-hot and vector targets.
    - `name`: the name of the data set.
    - `classes`: original labels in the order used (entry `j` is column `j` of one-hot targets, index `j`, and for signs
      +1 then -1); `()` for regression.
    - `description`: one line, what was done: centring, norm, labels.
    - `image_shape`: shape of one image, or `None`.
    - `teacher`: arrays of the ground truth of a synthetic data set, or `None`.

    **Raises** `ValueError` for inputs that are not floats, arrays of the wrong number of axes or of different lengths,
    empty data, and an image shape that does not hold `d` numbers.

    >>> import gradflow as gf, numpy as np
    >>> gf.data.Dataset(np.ones((3, 2), np.float32), np.zeros(3), name="mine")
    Dataset(mine: x (3, 2) float32, y (3,) float64)
    >>> x, y = gf.data.Dataset(np.ones((3, 2)), np.zeros(3))
    """

    # The shapes are `n d` and `n *k`; they are checked below, in words that say what to do.
    x: Shaped[np.ndarray, "n ..."]
    y: Shaped[np.ndarray, "m ..."]
    name: str = "data"
    classes: tuple[int, ...] = ()
    description: str = ""
    image_shape: tuple[int, ...] | None = None
    teacher: dict[str, np.ndarray] | None = None

    def __post_init__(self):
        for name, array in (("x", self.x), ("y", self.y)):
            if not isinstance(array, np.ndarray):
                advice = "Convert it with `numpy.asarray`."
                raise fail(name, "be a NumPy array", f"of type {type(array).__name__}", advice)
        if self.x.dtype.kind != "f":
            raise fail("x", "be an array of floats", f"of type {self.x.dtype}", "Convert it with `x.astype(float)`.")
        if self.x.ndim != 2 or self.x.size == 0:
            raise fail("x", "be of shape (n, d), not empty", f"of shape {self.x.shape}", "Flatten images to one axis.")
        if self.y.ndim not in (1, 2):
            raise fail("y", "be of shape (n,) or (n, k)", f"of shape {self.y.shape}")
        if len(self.y) != len(self.x):
            raise fail("y", f"have {len(self.x)} entries, as many as `x`", f"of {len(self.y)} entries")
        if self.image_shape is not None and math.prod(self.image_shape) != self.x.shape[1]:
            raise fail("image_shape", f"hold {self.x.shape[1]} numbers", str(self.image_shape))

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter((self.x, self.y))

    def __len__(self) -> int:
        return len(self.x)

    def __repr__(self) -> str:
        parts = [f"x {self.x.shape} {self.x.dtype}", f"y {self.y.shape} {self.y.dtype}"]
        if self.classes:
            parts.append("classes " + ", ".join(str(label) for label in self.classes))
        body = ", ".join(parts)
        return (
            f"Dataset({self.name}: {body}; {self.description})" if self.description else f"Dataset({self.name}: {body})"
        )


InputsAndTargets = Dataset | tuple[np.ndarray | jax.Array, np.ndarray | jax.Array]
"""What is taken apart as `x, y = dataset`."""


def float_dtype(dtype: object) -> np.dtype:
    """`dtype` as float32 or float64; `None` is the precision JAX is set to at the time of the call."""
    if dtype is None:
        wide = jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue]
        return np.dtype(np.float64 if wide else np.float32)
    try:
        resolved = np.dtype(dtype)  # pyright: ignore[reportArgumentType, reportCallIssue]
    except TypeError:
        resolved = None
    if resolved is None or resolved.name not in ("float32", "float64"):
        raise fail("dtype", "be float32 or float64", repr(dtype), "Use None for the precision JAX is set to.")
    return resolved
