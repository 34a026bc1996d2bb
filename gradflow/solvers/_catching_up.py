"""Catching up: the method for flows that are held at the edge of stability, by Moreau's scheme at the midpoint."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree, Scalar

from gradflow._linalg import Basis, empty_basis, extrapolated, renewed
from gradflow._tree import flatten, join
from gradflow.protocols import CentralState
from gradflow.solvers._catching_up_step import End, Middle, Step, caught_up, middle_of, relative_hessian, weighted
from gradflow.solvers._control import SCALE_FRACTION, StepControl
from gradflow.solvers._edge import (
    Gradient,
    Preconditioner,
    chosen_block,
    inverse,
    unpacked,
)
from gradflow.solvers._method import AbstractMethod, Attempt, Field

UNUSABLE_RESIDUAL = 0.1
"""Residual of a critical direction with which a step is not taken, but its basis improved."""
LOOK_AROUND = 50
"""Steps after which directions are looked for outside of those that are tracked."""
BLOCK, ITERATIONS, ROUGH = 3, 36, 1e-2
"""What Lanczos looks with: directions at once, products at most, accuracy."""
STABLE = 1.8
"""Step times relative sharpness, in units of the rule's steps; the midpoint rule is stable up to 2."""
ENERGY = 5.0
"""Times `rtol`: the share of all energy turned over so far that a step may lose. A passage along the edge takes tens of
steps: on a valley this keeps the energy to 1e-3 of its fall, for 7 % more gradients."""
OSCILLATES = 1e-6
"""Share of the covariance from which on a direction counts as one that oscillates."""
EDGE = 100.0
"""Times `rtol`: by how much the sharpness that a step leads to may differ from the one found there."""


class Memory(eqx.Module):
    """What the method goes on with."""

    basis: Basis  # of P^-1/2 H P^-1/2 at the middle of the last step; its values are relative sharpnesses
    older: Float[Array, "k size"]  # that of the step before, turned to match
    spacing: Scalar  # between the two, in steps of the rule; zero where there is one alone
    length: Scalar  # of the last step
    age: Int[Array, ""]  # steps since directions were looked for
    force: Float[Array, " size"]  # grad <H, Sigma> / 2 of the last step
    squares: Array  # what the oscillation added to the squares
    bend: Float[Array, " size"]  # difference to Euler's step, over the square of the step; its change tells the error
    bent: Bool[Array, ""]  # whether there is one
    edge: Float[Array, " k"]  # relative sharpnesses that the last step led to, as it saw them
    critical: Int[Array, ""]  # how many of them it knew
    ratio: Scalar
    failed: Bool[Array, ""]
    turnover: Scalar  # what has been dissipated so far, and regained, without regard to sign


class Start(NamedTuple):
    """Where a step begins: parameters, gradient and preconditioner."""

    w: Array
    g: Array
    p: Array


class CatchingUp(AbstractMethod):
    """The method for `CentralFlow`: steps that end within the stable region.

    A step of length `h`, counted in steps of the rule, goes through the middle. There it takes the curvature
    `C = U'HU` of the critical directions and its derivative `F`, and moves by `-h P^-1 (g + F[X] / 2)` with the
    covariance `X >= 0` for which `2 P - C`, linear about the middle, is not negative at the end and orthogonal to `X`:

        M = 2 - C + <F, w - w_middle> + U' (2 P - 2 P_middle) U >= 0,      X >= 0,      <X, M> = 0

    which is a convex problem in a few unknowns. Directions that become critical, or cease to be, need not be located.
    Of second order where their number does not change. What the linearisation leaves is found and made up for by the
    next step, so errors of the sharpness do not add up.

    Eigenvectors are kept from step to step, and improved by products with their residuals alone. Directions outside of
    them are looked for by Lanczos, at the start and at every 50th step.

    Errors: of the path, the change of the second difference; of the sharpness, what a step finds against what the last
    one led to, held below `100 rtol` of the threshold over two; of the energy, the loss against what is dissipated,
    held below `5 rtol` of all that has been turned over.

    >>> import gradflow as gf
    >>> gf.solvers.CatchingUp().name
    'CatchingUp'
    """

    @property
    def exact_counts(self) -> bool:
        return True

    @property
    def name(self) -> str:
        return "CatchingUp"

    @property
    def first_order(self) -> int:
        return 3

    def begin(self, field: Field, y: CentralState, slope: PyTree, dt: Scalar) -> Memory:
        flat, _ = flatten(y.params)
        zero, one, no = jnp.zeros((), flat.dtype), jnp.ones((), flat.dtype), jnp.asarray(False)
        k = y.vectors.shape[0]
        preconditioner = Preconditioner(field.flow.form)
        still = jnp.zeros_like(flat)
        squares = jnp.zeros_like(preconditioner.flat(y.memory, flat))
        basis, none = empty_basis(k, flat.size, flat.dtype), jnp.asarray(0)
        numbers = jnp.zeros(k, flat.dtype)
        return Memory(basis, basis.vectors, zero, zero, none, still, squares, still, no, numbers, none, one, no, zero)

    def attempt(
        self, field: Field, y: CentralState, dt: Scalar, control: StepControl, scale: PyTree, state: Memory
    ) -> Attempt:
        w0, unflatten = flatten(y.params)
        # Padding needs no mask: what it has added to the parameters is seen as zero, and gradients vanish along it.
        gradient: Gradient = jax.grad(lambda v: field.flow.problem(join(unflatten(v), field.frozen)))
        eta = field.flow.form.learning_rate.astype(w0.dtype)
        h, k0 = dt.astype(w0.dtype) / eta, field.t.astype(w0.dtype) / eta
        preconditioner = Preconditioner(field.flow.form)
        m0 = preconditioner.flat(y.memory, w0)
        p0 = preconditioner.at(m0, k0)
        basis, age, num_products = _looked_around(gradient, w0, p0, state)

        g0 = gradient(w0)
        wm = w0 - 0.5 * h * inverse(p0) * (g0 + state.force)
        mm = preconditioner.advanced(m0, 0.5 * h, preconditioner.squares(g0) + state.squares)
        ahead = 0.5 * (h + state.length)
        guess = extrapolated(basis, state.older, jnp.where(state.age < LOOK_AROUND, state.spacing, 0), ahead)
        middle = middle_of(gradient, preconditioner, wm, mm, k0 + 0.5 * h, guess)
        squares = preconditioner.squares(middle.g)
        end = End(h, k0 + h, preconditioner.advanced(m0, h, squares), y.covariance)
        step = caught_up(preconditioner, middle, w0 - h * inverse(middle.p) * middle.g, end)
        euler = caught_up(preconditioner, middle, w0 - h * inverse(p0) * g0, end)
        spread = preconditioner.spread(middle.p, middle.u, step.x)
        m1 = preconditioner.advanced(m0, h, squares + spread)
        y1 = _state(y, middle, step, (m1, preconditioner.at(m1, k0 + h) - p0), h, eta)

        improved = middle.improved
        bend = (step.w - euler.w) / h**2
        weights = field.error_weights(y), field.error_weights(y1)
        ratio = control.ratio(_errors(y, unflatten, h, bend, state), *weights, scale)
        dissipated = y1.dissipated - y.dissipated
        of_edge, led_to, turnover = _edge_and_energy(Start(w0, g0, p0), wm, middle, step, h, dissipated, state, control)
        ratio = jnp.maximum(ratio, of_edge)
        finite = jnp.all(jnp.isfinite(step.w)) & jnp.all(jnp.isfinite(m1)) & jnp.all(jnp.isfinite(middle.g))
        ratio, factor = _judged(control, ratio, finite, h, middle, improved, state)
        accepted = Memory(
            basis=improved,
            older=basis.vectors,
            spacing=jnp.where((basis.count > 0) & (state.length > 0), ahead, 0),
            length=h,
            age=age + 1,
            force=step.force,
            squares=spread,
            bend=bend,
            bent=jnp.asarray(True),
            edge=led_to,
            critical=jnp.sum(middle.inside),
            ratio=ratio,
            failed=jnp.asarray(False),
            turnover=turnover,
        )
        return Attempt(
            y1=y1,
            ratio=ratio,
            factor=factor,
            accepted=accepted,
            rejected=_rejected(state, basis, improved, age, _unusable(middle)),
            dense=(y, y1, unflatten(w0 - step.w - h * inverse(p0) * (g0 + step.force)), dt),
            finite=finite,
            evaluations=2 + middle.curvature.evaluations,
            products=num_products + middle.curvature.products + middle.products,
        )

    def scale_fraction(self, state: Any) -> float:
        return SCALE_FRACTION

    def interpolate(self, field: Field, dense: PyTree, s: Scalar) -> CentralState:
        y, y1, bow, dt = dense
        share = s / jnp.where(dt > 0, dt, 1)

        def between(a: Array, b: Array) -> Array:
            return a + share.astype(a.dtype) * (b - a)

        mixed = jax.tree_util.tree_map(between, y, y1)
        bent = jax.tree_util.tree_map(lambda a, b: a + (share * (1 - share)).astype(a.dtype) * b, mixed.params, bow)
        where = lambda state: (state.params, state.vectors, state.covariance)  # noqa: E731
        return eqx.tree_at(where, mixed, (bent, y1.vectors, y1.covariance))


def _looked_around(
    gradient: Gradient, w: Float[Array, " size"], p: Array, state: Memory
) -> tuple[Basis, Int[Array, ""], Int[Array, ""]]:
    """The basis with directions outside of it, where it is time to look for some, its age, and the products taken.

    A loop of at most one round, so that under `vmap` members that need none cost nothing.
    """
    product = relative_hessian(gradient, w, p)

    def look(carry: tuple) -> tuple:
        _, basis, num_products = carry
        key = jax.random.fold_in(jax.random.key(0), basis.count)
        basis, more = renewed(product, basis, key, BLOCK, ITERATIONS, ROUGH)
        return jnp.asarray(False), basis, num_products + more

    due = (state.basis.count == 0) | (state.age >= LOOK_AROUND)
    _, basis, num_products = jax.lax.while_loop(lambda carry: carry[0], look, (due, state.basis, jnp.asarray(0)))
    return basis, jnp.where(due, 0, state.age), num_products


def _relative_sharpness(edge: Float[Array, "k k"], inside: Bool[Array, " k"]) -> Float[Array, " k"]:
    """Those of the critical directions, decreasing, then numbers without meaning."""
    return 2 - jnp.linalg.eigvalsh(chosen_block(edge, inside, 1e3))


def _edge_and_energy(
    start: Start,
    wm: Array,
    middle: Middle,
    step: Step,
    h: Scalar,
    dissipated: Scalar,
    state: Memory,
    control: StepControl,
) -> tuple[Scalar, Float[Array, " k"], Scalar]:
    """The errors of the sharpness and of the energy over their tolerances, the larger; the sharpnesses that the step
    leads to; and the energy turned over so far.

    The error of the sharpness is of second order in the step, those of the path and of the energy of third.
    """
    turned = unpacked(middle.curvature.thirds @ (start.w - wm), state.edge.size)
    edge = middle.edge - turned + weighted(middle.u, 2 * (start.p - middle.p))
    at_start, led_to = (_relative_sharpness(e, middle.inside) for e in (edge, step.edge))
    mismatch = _mismatch(at_start, middle.inside, h, state)
    unbalanced = jnp.abs(dissipated + _fall(start, wm, middle.g, step.w))
    turnover = state.turnover + jnp.abs(dissipated) + unbalanced
    rtol = control.rtol.astype(h.dtype)
    ratio = (mismatch / (EDGE * rtol)) ** 1.5
    return jnp.maximum(ratio, unbalanced / (ENERGY * rtol * jnp.where(turnover > 0, turnover, 1))), led_to, turnover


def _mismatch(at_start: Float[Array, " k"], inside: Bool[Array, " k"], h: Scalar, state: Memory) -> Scalar:
    """The error of the sharpness, from how far those at the start of a step are from those that the last one led to.

    Both steps have a part in the difference, by their squares: with half of it for each of two equal steps, the error
    of a shorter one is as much smaller. What the last step has lost alone would not let any step pass.
    """
    number = jnp.sum(inside)
    common = (jnp.arange(at_start.size) < number) & (number == state.critical)
    share = h**2 / (0.5 * (h**2 + state.length**2))
    return share * jnp.max(jnp.where(common, jnp.abs(at_start - state.edge), 0))


def _fall(start: Start, wm: Array, gm: Array, w1: Array) -> Scalar:
    """The change of the loss over a step, to third order: the middle of its chord is not where its middle was taken."""
    return gm @ (w1 - start.w) + (w1 + start.w - 2 * wm) @ (gm - start.g)


def _errors(y: CentralState, unflatten: Any, h: Scalar, bend: Float[Array, " size"], state: Memory) -> PyTree:
    """The error of the path: from the change of the second difference, or that itself where it is the smaller one."""
    whole, change = bend * h**2, (bend - state.bend) * h**2 / 3
    smaller = state.bent & (jnp.linalg.norm(change) < jnp.linalg.norm(whole))
    still = jax.tree_util.tree_map(jnp.zeros_like, y.memory)
    return unflatten(jnp.where(smaller, change, whole)), still


def _judged(
    control: StepControl,
    ratio: Scalar,
    finite: Bool[Array, ""],
    h: Scalar,
    middle: Middle,
    improved: Basis,
    state: Memory,
) -> tuple[Scalar, Scalar]:
    """The error over the tolerance, and the factor for the next step."""
    ratio = jax.lax.stop_gradient(jnp.where(finite, ratio, jnp.inf))
    unusable = finite & _unusable(middle)
    length = h * jnp.maximum(jnp.max(improved.values), 1e-3)  # in units of what stability allows
    factor = jnp.minimum(control.factor(ratio, state.ratio, state.failed, 3), STABLE / length)
    ratio = jnp.where(unusable | (length > 1.2 * STABLE), jnp.maximum(ratio, 2.0), ratio)
    return ratio, jnp.where(unusable, jnp.minimum(1.0, STABLE / length), factor)


def _rejected(state: Memory, basis: Basis, improved: Basis, age: Int[Array, ""], spoilt: Bool[Array, ""]) -> Memory:
    """What is left of a step that is turned down: a better basis, where it was the basis that spoilt it."""
    again = jax.tree_util.tree_map(lambda new, old: jnp.where(spoilt, new, old), improved, basis)
    spacing = jnp.where(spoilt, 0, state.spacing)
    changed = again, age, jnp.asarray(True), spacing
    return eqx.tree_at(lambda s: (s.basis, s.age, s.failed, s.spacing), state, changed)


def _unusable(middle: Middle) -> Bool[Array, ""]:
    """Whether the basis was too far from eigenvectors for a step: it is then improved, and the step tried again."""
    return middle.outside > UNUSABLE_RESIDUAL


def _state(
    y: CentralState, middle: Middle, step: Step, memory: tuple[Array, Array], h: Scalar, eta: Scalar
) -> CentralState:
    """The state at the end of a step; `memory` and by how much it has changed `P`."""
    w0, unflatten = flatten(y.params)
    m1, change = memory
    advanced = step.w - w0
    variances = jnp.sum(middle.u * (step.x @ middle.u), axis=0)
    dissipated = jnp.sum(middle.p * advanced**2) / h + jnp.sum(change * variances)
    old = y.memory
    if old is not None:
        old = flatten(old)[1](m1.reshape(-1)) if m1.ndim else m1
    # The rule's own oscillation, in units of the first row of `u`: never below what rounding makes of the parameters.
    tiny = jnp.finfo(w0.dtype).tiny
    size = jnp.maximum(jnp.linalg.norm(middle.u[0]), tiny)
    rounding = jnp.log(jnp.finfo(w0.dtype).eps * jnp.maximum(jnp.linalg.norm(w0), tiny) / size)
    seed = jnp.log(jnp.maximum(0.5 * jnp.abs(middle.u[0] @ middle.g), tiny))
    sharpness = 2 - middle.edge[0, 0]
    first = jnp.all(y.vectors == 0)
    grown = jnp.where(first, seed, y.log_amplitude + h * jnp.log(jnp.maximum(jnp.abs(sharpness - 1), tiny)))
    grown = jnp.maximum(grown, rounding)
    needed = 0.5 * jnp.log(jnp.maximum(step.rate / jnp.where(step.brake > 0, step.brake, 1), tiny))
    oscillates, before = jnp.trace(step.x) > 0, jnp.trace(y.covariance) > 0
    begins = oscillates & ~before & (step.rate > 0) & (step.brake > 0)
    wait = jnp.sqrt(2 * jnp.maximum(needed - grown, 0) / jnp.where(begins, step.rate, 1))
    covariances = jnp.linalg.eigvalsh(step.x)
    oscillating = jnp.sum(covariances > OSCILLATES * jnp.trace(step.x)).astype(w0.dtype)
    return CentralState(
        params=unflatten(step.w),
        memory=old,
        dissipated=y.dissipated + dissipated,
        vectors=middle.u,
        covariance=step.x,
        log_amplitude=jnp.where(oscillates, jnp.maximum(needed, grown), grown),
        delay=jnp.maximum(y.delay, jnp.where(begins, wait * eta.astype(wait.dtype), 0)),
        oscillating=jnp.maximum(y.oscillating, oscillating),
    )
