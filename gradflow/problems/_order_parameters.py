"""Order parameters `(Q, M)`: the overlaps of a two-layer network with itself and with its teacher."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from gradflow._checks import fail, is_concrete
from gradflow._tree import common_dtype


class OrderParameters(eqx.Module):
    """Overlaps of student and teacher weights, all that the risk depends on.

    For weights `W (p, d)` and `W* (k, d)`:

        Q = W W^T / d  (p, p)       M = W W*^T / d  (p, k)

    With `P = W* W*^T / d` they make up the covariance of the fields `W x / sqrt d`, `W* x / sqrt d` for `x ~ N(0, I)`.
    Saad and Solla (1995) write `Q, R, T` for `Q, M, P`.

    **Arguments**: `Q`: symmetric; its symmetric part is kept. `M`. `output`: second layer of the student `(p,)`; `None`
    for ones that are not trained.

    **Raises** `ValueError` for shapes that do not fit, and for a `Q` that is not symmetric.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> gf.OrderParameters(jnp.eye(3), jnp.zeros((3, 2))).M.shape
    (3, 2)
    """

    Q: Float[Array, "p p"]
    M: Float[Array, "p k"]
    output: Float[Array, " p"] | None = None

    def __init__(self, Q: ArrayLike, M: ArrayLike, output: ArrayLike | None = None):
        Q, M = jnp.asarray(Q), jnp.asarray(M)
        output = None if output is None else jnp.asarray(output)
        if Q.ndim != 2 or Q.shape[0] != Q.shape[1] or Q.shape[0] == 0:
            raise fail("Q", "be a square matrix", f"of shape {Q.shape}", "It holds the overlaps of the student units.")
        if M.ndim != 2 or M.shape[0] != Q.shape[0] or M.shape[1] == 0:
            raise fail("M", f"have {Q.shape[0]} rows, one for each student unit", f"of shape {M.shape}")
        if output is not None and output.shape != (Q.shape[0],):
            raise fail("output", f"have shape ({Q.shape[0]},)", f"of shape {output.shape}")
        if is_concrete(Q):
            array = np.asarray(Q)
            off = np.max(np.abs(array - array.T))
            if off > 1e-4 * np.max(np.abs(array)):
                raise fail("Q", "be symmetric", f"off by {off:.2g}", "Q[i, j] is the overlap of units i and j.")
        dtype = common_dtype(Q, M, *([] if output is None else [output]), jnp.float32)
        self.Q = ((Q + Q.T) / 2).astype(dtype)
        self.M = M.astype(dtype)
        self.output = None if output is None else output.astype(dtype)


def check_covariance(params: OrderParameters, P: ArrayLike) -> None:
    """Refuses `(Q, M, P)` that are not the covariance of any fields; tracers pass."""
    if not is_concrete((params, P)):
        return
    # In NumPy, for a concrete matrix stays concrete under tracing.
    Q, M, P = (np.asarray(matrix, float) for matrix in (params.Q, params.M, P))
    lowest, largest = _spectrum(np.block([[Q, M], [M.T, P]]))
    if not lowest >= -1e-6 * largest:
        actual = f"such that it has the eigenvalue {lowest:.3g}"
        advice = "Take them from weights, with `gradflow.TeacherStudent.order_parameters`."
        raise fail("params", "make [[Q, M], [M^T, P]] positive semi-definite", actual, advice)


def check_teacher(P: ArrayLike) -> Float[Array, "k k"]:
    """`P` as an array; refused unless it is symmetric and positive definite."""
    P = jnp.asarray(P)
    if P.ndim != 2 or P.shape[0] != P.shape[1] or P.shape[0] == 0:
        raise fail("P", "be a square matrix", f"of shape {P.shape}", "It holds the overlaps of the teacher units.")
    if is_concrete(P):
        array = np.asarray(P, float)
        finite = bool(np.all(np.isfinite(array)))
        if not finite or np.max(np.abs(array - array.T)) > 1e-6 * np.max(np.abs(array)):
            raise fail("P", "be symmetric and finite", "not", "P[r, s] is the overlap of teacher units r and s.")
        lowest, largest = _spectrum(array)
        if lowest <= 1e-12 * abs(largest):
            advice = "Units of the teacher that are linearly dependent have to be merged."
            raise fail("P", "be positive definite", f"not: its lowest eigenvalue is {lowest:.3g}", advice)
    return P.astype(common_dtype(P, jnp.float32))


def joint_covariance(Q: Float[Array, "p p"], M: Float[Array, "p k"], P: Float[Array, "k k"]) -> Float[Array, "n n"]:
    """Covariance of all fields, students first."""
    return jnp.concatenate([jnp.concatenate([Q, M], axis=1), jnp.concatenate([M.T, P.astype(Q.dtype)], axis=1)])


def _spectrum(array: np.ndarray) -> tuple[float, float]:
    """Lowest and largest eigenvalue; NaN for matrices that are not finite."""
    if not np.all(np.isfinite(array)):
        return float("nan"), float("nan")
    eigenvalues = np.linalg.eigvalsh((array + array.T) / 2)
    return float(eigenvalues[0]), float(eigenvalues[-1])
