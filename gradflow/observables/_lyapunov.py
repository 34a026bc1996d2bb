"""Lyapunov functions of momentum flows: what must not increase along a run on a convex problem."""

from typing import Any, Literal

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, PyTree, Scalar

from gradflow._checks import check_choice, fail
from gradflow._tree import in_single, join, split
from gradflow.protocols import HasLyapunov, offered


class Lyapunov(eqx.Module):
    """Lyapunov function of a momentum flow; on convex problems it never rises.

    It is `flow.lyapunov` of the flow that a run follows.

    It depends on time and momentum besides the parameters, so it can be observed along flows only, and on its own it
    cannot be evaluated.

    **Arguments**

    - `minimum`: parameters at which the loss is least. `least`: that loss; by default evaluated there.
    - `kind`: `"sharp"`, which for a problem that is `mu`-strongly convex falls at least like `exp(-sqrt(mu) t)` along
      `HeavyBallFlow` and `NesterovFlow`; or `"published"`, at least like `exp(-sqrt(mu) t / 4)`. The docstrings of the
      flows' `lyapunov` say what they are.

    **Raises** `ValueError` for an unknown `kind`; in a run, for flows that have no Lyapunov function, and for rules.

    Source: the published ones are those of B. Shi, S. S. Du, M. I. Jordan and W. J. Su (2018), arXiv 1810.08907.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> flow = gf.NesterovFlow(lambda w: 0.5 * w**2, mu=1.0, s=0.1)
    >>> observe = {"energy": gf.observables.Lyapunov(jnp.array(0.0), least=0.0)}
    >>> sol = gf.solve(flow, jnp.array(1.0), [0.0, 1.0, 2.0], observe=observe)
    >>> bool(jnp.all(jnp.diff(sol.observed["energy"]) < 0))
    True
    """

    minimum: PyTree
    least: Float[Array, ""] | None
    kind: Literal["sharp", "published"] = eqx.field(static=True)

    def __init__(self, minimum: PyTree, least: ArrayLike | None = None, kind: Literal["sharp", "published"] = "sharp"):
        check_choice("kind", kind, ("sharp", "published"))
        self.minimum, self.kind = minimum, kind
        self.least = None if least is None else jnp.asarray(least, float)

    @in_single
    def __call__(self, params: PyTree) -> Float[Array, ""]:
        actual = "a Lyapunov function, which needs the momentum as well"
        raise fail("observe", "be functions of the parameters here", actual, "Observe it along a flow with `solve`.")

    def of_state(self, flow: Any, t: Scalar, state: PyTree, frozen: PyTree) -> Float[Array, ""]:
        """The value at a time and a state of a flow."""
        stable = offered(flow, HasLyapunov)
        if stable is None:
            actual = f"observing a {type(flow).__name__}, which has none"
            raise fail("observe", "hold a Lyapunov function of the flow", actual)
        minimum, _ = split(self.minimum)
        min_loss = flow.problem(join(minimum, frozen)) if self.least is None else self.least
        return stable.lyapunov(t, state, frozen, minimum, min_loss, self.kind)
