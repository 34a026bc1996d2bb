"""Margins, and how near the direction of the weights is to a KKT point of the maximum-margin problem."""

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from gradflow._checks import check_count, fail
from gradflow._tree import flatten, full_precision, in_single, join, scaled_norm, split, tree_norm
from gradflow.problems import EmpiricalRisk
from gradflow.problems._labels import LabelKind, label_kind, towards_label


class Margins(eqx.Module):
    """The margin of every sample, `y_i f(x_i)`: `(n,)`.

    With several outputs it is that of the sample's class over the next.

    **Arguments**: `problem`: an `EmpiricalRisk` with labels +1 and -1, class indices, or one-hot rows.

    **Raises** `ValueError` for another kind of problem or of labels.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> problem = gf.EmpiricalRisk(jnp.eye(2), jnp.array([1.0, -1.0]), gf.losses.logistic, predict=lambda w, x: x @ w)
    >>> gf.observables.Margins(problem)(jnp.array([2.0, -3.0])).tolist()
    [2.0, 3.0]
    """

    problem: EmpiricalRisk
    kind: LabelKind = eqx.field(static=True)

    def __init__(self, problem: EmpiricalRisk):
        if not isinstance(problem, EmpiricalRisk):
            raise fail("problem", "be a gradflow.EmpiricalRisk", f"of type {type(problem).__name__}")
        self.problem, self.kind = problem, label_kind(problem.y)

    @in_single
    @full_precision
    def __call__(self, params: PyTree) -> Float[Array, " n"]:
        labelled, other = towards_label(self.problem.predictions(params), self.problem.y, self.kind)
        return labelled if self.kind == "signs" else labelled - other


class NormalisedMargin(eqx.Module):
    """The smallest margin over `|theta|^degree`.

    For a homogeneous network it depends on the direction alone.

    Negative where the samples are not all separated. Along gradient flow of an exponential-type loss its smooth
    relative `-log(n L) / |theta|^degree` never decreases once the loss is below `1/n`, and the two differ by at most
    `log n / |theta|^degree` (K. Lyu and J. Li 2020, arXiv 1906.05890).

    **Arguments**: `problem`: as for `Margins`; `degree`: of homogeneity, 2 for a two-layer ReLU network without biases
    of which both layers are trained.

    **Raises** `ValueError`: as for `Margins`, and for a degree below one.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> problem = gf.EmpiricalRisk(jnp.eye(2), jnp.array([1.0, -1.0]), gf.losses.logistic, predict=lambda w, x: x @ w)
    >>> round(float(gf.observables.NormalisedMargin(problem, degree=1)(jnp.array([3.0, -3.0]))), 4)
    0.7071
    """

    margins: Margins
    degree: int = eqx.field(static=True)

    def __init__(self, problem: EmpiricalRisk, degree: int = 2):
        check_count("degree", degree)
        self.margins, self.degree = Margins(problem), int(degree)

    @in_single
    def __call__(self, params: PyTree) -> Float[Array, ""]:
        return jnp.min(self.margins(params)) / tree_norm(params) ** self.degree


class MaxMarginResidual(eqx.Module):
    """Distance of the direction of the weights from maximum margin.

    That is, of the direction `u` from a KKT point of `min |theta|^2 / 2` with all margins `q_i >= 1`:

        (stationarity, slackness),      stationarity = | u - g / |g| |,    g = sum_i m_i grad q_i,   m_i = -dL/dq_i
                                        slackness = sum_i m_i (q_i - q_min) / (q_min sum_i m_i)

    Both vanish exactly at KKT points, with multipliers in proportion to `m`; along gradient flow of an exponential-type
    loss on data that the network can separate they tend to zero, the second like `1 / log(1/L)` (K. Lyu and J. Li
    2020, arXiv 1906.05890). `g` is computed as `-grad L`, at the cost of one gradient; with several outputs the two
    agree once each sample has a single rival class.

    NaN where a margin is not positive: there is no maximum-margin problem before the samples are separated, and on
    data that cannot be there never is.

    **Arguments**: `problem`: as for `Margins`. Its loss should fall exponentially: logistic, exponential or
    cross-entropy. `unseparated`: the value where a margin is not positive, if not NaN; under `jax_debug_nans`, which
    ends a run over a NaN, take infinity.

    **Raises** `ValueError`: as for `Margins`.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> problem = gf.EmpiricalRisk(jnp.eye(2), jnp.array([1.0, -1.0]), gf.losses.logistic, predict=lambda w, x: x @ w)
    >>> [round(float(r), 4) for r in gf.observables.MaxMarginResidual(problem)(jnp.array([3.0, -3.0]))]
    [0.0, 0.0]
    """

    margins: Margins
    unseparated: float | None = eqx.field(static=True)

    def __init__(self, problem: EmpiricalRisk, unseparated: float | None = None):
        self.margins, self.unseparated = Margins(problem), unseparated

    @in_single
    @full_precision
    def __call__(self, params: PyTree) -> Float[Array, "2"]:
        trainable, frozen = split(params)
        problem = self.margins.problem
        flat, back = flatten(trainable)
        gradient = -jax.grad(lambda v: problem(join(back(v), frozen)))(flat)
        q = self.margins(params)
        residuals = problem.residuals(problem.predictions(params))
        labelled, _ = towards_label(residuals, problem.y, self.margins.kind)
        smallest = jnp.min(q)
        slack = jnp.sum(labelled * (q - smallest)) / (smallest * jnp.sum(labelled))
        apart = scaled_norm(flat / scaled_norm(flat) - gradient / scaled_norm(gradient))
        otherwise = jnp.nan if self.unseparated is None else self.unseparated
        return jnp.where(smallest > 0, jnp.stack([apart, slack]), otherwise)
