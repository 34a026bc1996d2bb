"""Initial value problems with references that do not come from the solver under test."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import gradflow as gf

ACTIVATIONS = {"tanh": jax.nn.tanh, "GELU": jax.nn.gelu, "ReLU": jax.nn.relu}
LOSSES = {"square": gf.losses.square, "cross-entropy": gf.losses.cross_entropy}


@dataclasses.dataclass(frozen=True)
class Case:
    """A flow from given parameters to a horizon, and the same as a field on flat vectors for other libraries.

    `exact`, where there is one, is the state at the horizon; else it is integrated by explicit Runge-Kutta methods at
    the two tolerances `tight`. `smooth` tells whether a high order pays, `problem` is the loss of a gradient flow.
    """

    name: str
    flow: gf.flows.AbstractFlow
    params: Any
    horizon: float
    field: Callable[[Any], Any]
    loss: Callable[[Any], Any]
    unflatten: Callable[[Any], Any]
    problem: Callable[[Any], Any] | None = None
    exact: np.ndarray | None = None
    smooth: bool = True
    tight: tuple[float, float] = (1e-10, 1e-9)

    @property
    def start(self) -> np.ndarray:
        return flat(self.params)


def flat(params: Any) -> np.ndarray:
    """The entries that flow, as one vector."""
    return np.asarray(ravel_pytree(eqx.filter(params, eqx.is_inexact_array))[0])


def gradient_case(name: str, problem: Any, params: Any, horizon: float, **more: Any) -> Case:
    moving, frozen = eqx.partition(params, eqx.is_inexact_array)
    as_moving = ravel_pytree(moving)[1]

    def unflatten(v: Any) -> Any:
        return eqx.combine(as_moving(jnp.asarray(v)), frozen)

    def loss(v: jax.Array) -> jax.Array:
        return problem(unflatten(v))

    gradient = jax.grad(loss)
    field = jax.jit(lambda v: -gradient(v))
    return Case(name, gf.GradientFlow(problem), params, horizon, field, jax.jit(loss), unflatten, problem, **more)


def network(
    activation: str = "tanh",
    loss: str = "square",
    *,
    horizon: float,
    samples: int = 500,
    width: int = 64,
    depth: int = 2,
    init_scale: float = 1.0,
    **more: Any,
) -> Case:
    """An MLP 64-width-...-10 on handwritten digits."""
    dataset = gf.data.digits(n=samples, centre=True, labels="onehot")
    key = jax.random.key(0)
    chosen = ACTIVATIONS[activation]
    model = gf.models.MLP(64, width, 10, depth=depth, activation=chosen, init_scale=init_scale, key=key)
    name = f"{activation} net, {loss} loss" + (f", start x {init_scale:g}" if init_scale != 1 else "")
    problem = gf.EmpiricalRisk(*dataset, LOSSES[loss])
    return gradient_case(f"{name}, T = {horizon:g}", problem, model, horizon, **more)


def relu_escape(horizon: float, **more: Any) -> Case:
    """Two classes of digits and a bias-free ReLU network whose weights start at 1e-4: escape and fit."""
    dataset = gf.data.digits(classes=(0, 1), centre=True, unit_norm=True, labels="pm1")
    model = gf.models.TwoLayer(64, 32, init_scale=1e-4, key=jax.random.key(0))
    problem = gf.EmpiricalRisk(*dataset, gf.losses.square)
    return gradient_case(f"ReLU net from 1e-4, T = {horizon:g}", problem, model, horizon, **more)


def deep_linear(horizon: float, width: int) -> Case:
    """Three layers on whitened inputs: singular values of the teacher are learnt one after another."""
    teacher = np.diag(2.0 ** -np.arange(4.0)) @ np.linalg.qr(np.random.default_rng(0).normal(size=(8, 4)))[0].T

    def problem(model: gf.models.DeepLinear) -> jax.Array:
        return 0.5 * jnp.sum((model.end_to_end() - teacher) ** 2)

    model = gf.models.DeepLinear(8, width, 4, depth=3, init_scale=0.1, key=jax.random.key(0))
    return gradient_case(f"deep linear net, T = {horizon:g}", problem, model, horizon)


def factorisation(horizon: float, size: int, rank: int = 3) -> Case:
    """`|U U^T - A|^2 / 4` with `A` of low rank, from a small start."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(size, rank)))[0]
    target = jnp.asarray(basis @ np.diag(10.0 ** -np.arange(float(rank))) @ basis.T)
    start = jnp.asarray(1e-3 * rng.normal(size=(size, size)))

    def problem(factor: jax.Array) -> jax.Array:
        return 0.25 * jnp.sum((factor @ factor.T - target) ** 2)

    return gradient_case(f"matrix factorisation, T = {horizon:g}", problem, start, horizon)


def quadratic(horizon: float, size: int) -> Case:
    """`y' = -H y` with eigenvalues from 1e-3 to 1e2, in a random basis; the exact solution is known."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(size, size)))[0]
    eigenvalues = np.logspace(-3, 2, size)
    hessian = jnp.asarray(basis @ np.diag(eigenvalues) @ basis.T)
    start = rng.normal(size=size)
    exact = basis @ (np.exp(-horizon * eigenvalues) * (basis.T @ start))

    def problem(v: jax.Array) -> jax.Array:
        return 0.5 * v @ hessian @ v

    return gradient_case(f"stiff quadratic, T = {horizon:g}", problem, jnp.asarray(start), horizon, exact=exact)


def order_parameters(horizon: float, students: int, teachers: int, **more: Any) -> Case:
    """One-pass SGD of a committee of erf units, taught by fewer, in the limit of many inputs."""
    problem = gf.TeacherStudent.orthogonal(1000, teachers, noise=1e-3)
    params = problem.order_parameters(problem.uninformed(students, jax.random.key(0)))
    flow = gf.OrderParameterFlow(problem, gamma_over_p=1.0)
    unflatten = ravel_pytree(params)[1]

    def rate(v: Any) -> Any:
        derivative = flow.vector_field(jnp.zeros(()), flow.init(unflatten(v), None), None)
        return ravel_pytree(flow.params(derivative))[0]

    loss = jax.jit(lambda v: flow.risk(unflatten(v)))
    return Case(f"order parameters, T = {horizon:g}", flow, params, horizon, jax.jit(rate), loss, unflatten, **more)


def every_case(quick: bool, full: bool) -> list[Callable[[], Case]]:
    """The fixed set, smallest first within each kind; built one at a time, for their data need not stay in memory."""
    if quick:
        one = {"smooth": False, "tight": (1e-8, 1e-7)}  # one program for both references and the default
        small = {"samples": 40, "width": 8, "horizon": 30.0, "depth": 1}
        return [
            lambda: network(**small, **one),
            lambda: quadratic(10.0, 20),
            lambda: order_parameters(20.0, 3, 2, **one),
        ]
    cases = [
        lambda: network(horizon=2000.0),
        lambda: network(horizon=200.0, activation="GELU"),
        lambda: network(horizon=10.0, activation="ReLU", smooth=False, tight=(1e-7, 1e-6)),
        lambda: network(horizon=200.0, loss="cross-entropy"),
        lambda: network(horizon=200.0, activation="GELU", loss="cross-entropy"),
        lambda: network(horizon=10.0, activation="ReLU", loss="cross-entropy", smooth=False, tight=(1e-7, 1e-6)),
        lambda: network(horizon=2000.0, init_scale=0.01),
        lambda: relu_escape(80.0, smooth=False, tight=(1e-8, 1e-7)),
        lambda: deep_linear(30.0, 16),
        lambda: factorisation(1000.0, 20),
        lambda: quadratic(200.0, 200),
        lambda: order_parameters(2000.0, 6, 3),
    ]
    return [*cases, lambda: network(horizon=20000.0)] if full else cases


def reference(case: Case, store: pathlib.Path) -> tuple[np.ndarray, float]:
    """The state at the horizon and an estimate of its error, relative to the distance travelled; kept in `store`.

    Two explicit methods at two tolerances, whose difference is the estimate: that of the looser one, in truth.
    """
    if case.exact is not None:
        return case.exact, 1e-13
    start = case.start
    slope = np.array2string(np.asarray(case.field(start))[:100], precision=6)
    mark = hashlib.sha256(f"{case.name} {start.size} {case.tight} {slope}".encode() + start.tobytes()).hexdigest()[:16]
    stored = dict(np.load(store)) if store.exists() else {}
    if mark not in stored:
        pair = []
        solvers = (gf.solvers.Dopri8(), gf.solvers.Tsit5()) if case.smooth else (gf.solvers.Tsit5(), gf.solvers.Tsit5())
        for solver, rtol in zip(solvers, case.tight, strict=True):
            ts = [case.horizon]
            sol = gf.solve(case.flow, case.params, ts, solver=solver, rtol=rtol, max_steps=10**7, save_params=False)
            pair.append(flat(sol.final))
        stored[mark] = np.stack(pair)
        store.parent.mkdir(parents=True, exist_ok=True)
        np.savez(store, **stored)
    best, second = stored[mark]
    return best, float(np.linalg.norm(best - second) / np.linalg.norm(best - start))
