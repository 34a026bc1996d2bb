"""Methods to run on a case: this library's, and those of other libraries where they are installed.

Cost is in gradient equivalents: an evaluation of the field counts 1, and so does a difference of two of which one was
at hand; an exact Hessian-vector product counts 2. Other libraries get the absolute tolerance `ATOL * rtol` times the
root mean square of the start. Compile time is that of the first call, for libraries that compile.
"""

import dataclasses
import importlib
import importlib.util
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import equinox.internal
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np

import gradflow as gf
from support.cases import Case, flat

ATOL = 0.1
KRYLOV = 150
LADDER = tuple(10.0**-k for k in range(2, 9))
SHORT = (1e-3, 1e-5, 1e-7)
"""Tolerances of explicit methods that stability holds to the same steps at all of them."""


class BudgetError(Exception):
    """The budget of gradients ran out, inside a library that knows none."""


@dataclasses.dataclass
class Outcome:
    """What a run came to: the last state, evaluations of the field, exact Hessian-vector products, seconds."""

    final: np.ndarray | None
    gradients: int
    products: int = 0
    run: float = math.nan
    compiling: float | None = None
    status: str = "ok"

    @property
    def equivalents(self) -> int:
        return self.gradients + 2 * self.products


@dataclasses.dataclass(frozen=True)
class Method:
    """`run(case, rtol, budget)`; `suits(case)` where a method is not for all; `ladder` of tolerances, None if fixed."""

    name: str
    run: Callable[[Case, float, int], Outcome]
    ladder: tuple[float, ...] = LADDER
    suits: Callable[[Case], bool] = lambda case: True


def clock(run: Callable[[], Any], again_below: float = 0.5) -> tuple[Any, float]:
    """What `run` returns and its seconds; the median of three where they are few."""
    spans, value = [], None
    while not spans or (spans[0] < again_below and len(spans) < 3):
        began = time.perf_counter()
        value = jax.block_until_ready(run())
        spans.append(time.perf_counter() - began)
    return value, statistics.median(spans)


def scale(case: Case) -> float:
    return float(np.sqrt(np.mean(case.start**2)))


# This library.


def ours(make: Callable[[], Any], fresh: bool = True) -> Callable[[Case, float, int], Outcome]:
    """By a solver of this library, made anew for every run; with `fresh`, from empty caches first in every case."""
    statuses: set[str] = set()

    def run(case: Case, rtol: float, budget: int) -> Outcome:
        def solve(steps: int) -> gf.Solution:
            options: dict[str, Any] = {"max_steps": steps, "save_params": False, "throw": False}
            return gf.solve(case.flow, case.params, [case.horizon], solver=make(), rtol=rtol, **options)

        if fresh and case.name not in statuses:
            statuses.add(case.name)
            jax.clear_caches()
        began = time.perf_counter()
        jax.block_until_ready(solve(1).final)
        compiling = time.perf_counter() - began
        sol, seconds = clock(lambda: solve(budget // 6))
        counts = [max(int(sol.stats[name]), 0) for name in ("gradient_evaluations", "hessian_vector_products")]
        return Outcome(flat(sol.final), *counts, run=seconds, compiling=compiling, status=sol.status)

    return run


def our_methods(quick: bool, full: bool) -> list[Method]:
    """The default first: all ratios are to it."""
    methods = [Method("default", ours(lambda: None, fresh=not quick))]
    for name in ("NDF", "ROCK2", "RKC2"):
        solver = getattr(gf.solvers, name, None)
        if solver is not None:
            methods.append(Method(name, ours(solver, fresh=not quick)))
    for name in ("Heun", "Bosh3", "Dopri5", "Tsit5", "Dopri8") if full else ():
        methods.append(Method(f"{name}, our steps", ours(getattr(gf.solvers, name)), SHORT))
    return methods


# Gradient descent.


def sharpness(case: Case, final: np.ndarray) -> float:
    """The larger of the sharpnesses at both ends."""
    measure = gf.observables.Sharpness(case.problem, rtol=1e-3)
    return max(float(measure(params)) for params in (case.params, case.unflatten(final)))


def descent(rate: float, steepness: Callable[[Case], float]) -> Method:
    """Gradient descent at `rate / sharpness`, which ends exactly at the horizon."""

    def run(case: Case, rtol: float, budget: int) -> Outcome:
        steps = math.ceil(case.horizon * steepness(case) / rate)
        if steps > budget:
            return Outcome(None, steps, status="budget")
        rule = gf.GradientDescent(case.problem, case.horizon / steps)
        began = time.perf_counter()
        jax.block_until_ready(gf.iterate(rule, case.params, 1, save_every=1, save_params=False).final)
        compiling = time.perf_counter() - began
        sol, seconds = clock(
            lambda: gf.iterate(rule, case.params, steps, save_every=steps, save_params=False, throw=False)
        )
        return Outcome(flat(sol.final), steps, run=seconds, compiling=compiling, status=sol.status)

    return Method(f"gradient descent, {rate:g} / sharpness", run, (math.nan,), lambda case: case.problem is not None)


# diffrax.


@eqx.filter_jit
def integrate(field: Any, solver: Any, start: Any, horizon: Any, rtol: Any, atol: Any, steps: int) -> diffrax.Solution:
    control = diffrax.PIDController(rtol, atol)
    term = diffrax.ODETerm(lambda t, y, args: field(y))
    keep = {"saveat": diffrax.SaveAt(t1=True), "throw": False, "max_steps": steps}
    # Without checkpoints for derivatives, which cost time and memory.
    keep["adjoint"] = diffrax.ForwardMode()
    return diffrax.diffeqsolve(term, solver, 0.0, horizon, None, start, stepsize_controller=control, **keep)


def by_diffrax(case: Case, field: Any, solver: Any, rtol: float, steps: int, horizon: float) -> diffrax.Solution:
    # Arrays, for every new number among the arguments would compile anew.
    end, loose, min_step = (jnp.asarray(value) for value in (horizon, rtol, ATOL * rtol * scale(case)))
    return integrate(field, solver, jnp.asarray(case.start), end, loose, min_step, steps)


def explicit(solver: diffrax.AbstractERK) -> Method:
    tableau = type(solver).tableau
    stages = tableau.num_stages - tableau.fsal  # type: ignore[union-attr]

    def run(case: Case, rtol: float, budget: int) -> Outcome:
        max_count = budget // stages
        began = time.perf_counter()
        jax.block_until_ready(by_diffrax(case, case.field, solver, rtol, max_count, 1e-12 * case.horizon).ys)
        compiling = time.perf_counter() - began
        sol, seconds = clock(lambda: by_diffrax(case, case.field, solver, rtol, max_count, case.horizon))
        status = "ok" if sol.result == diffrax.RESULTS.successful else "max_steps"
        counted = 3 + stages * int(sol.stats["num_steps"])  # two for the first step size, one for the first stage
        return Outcome(np.asarray(sol.ys)[0], counted, run=seconds, compiling=compiling, status=status)

    return Method(f"diffrax {type(solver).__name__}", run, SHORT)


class Opaque:
    """Holds what is no array; all are alike, as diffrax takes the programs of one field to be."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Opaque)

    def __hash__(self) -> int:
        return 0


class MatrixFree(lx.AbstractLinearSolver):
    """A Krylov method for the systems `(1 - h J) x = b` within diffrax's Newton iteration.

    diffrax stops gradients through everything in the state of a linear solver, and fails where that is not an array;
    so functions are put out of sight. Nor does it declare the systems positive definite.
    """

    inner: lx.AbstractLinearSolver
    definite: bool = eqx.field(static=True)

    def init(self, operator: Any, options: Any) -> Any:
        tagged = lx.TaggedLinearOperator(operator, lx.positive_semidefinite_tag) if self.definite else operator
        arrays, static = eqx.partition(self.inner.init(tagged, options), eqx.is_array)
        return arrays, eqx.internal.Static(Opaque(static))

    def compute(self, state: Any, vector: Any, options: Any) -> Any:
        return self.inner.compute(eqx.combine(state[0], state[1].value.value), vector, options)

    def transpose(self, state: Any, options: Any) -> Any:
        raise NotImplementedError

    def conj(self, state: Any, options: Any) -> Any:
        raise NotImplementedError

    def assume_full_rank(self) -> bool:
        return True


class Tally:
    """A field that counts evaluations of itself and of its derivative along a vector."""

    def __init__(self, field: Callable[[Any], Any]):
        self.reset(0)

        def count_gradient(_: Any) -> np.ndarray:
            self.gradients += 1
            return self.within()

        def count_product(_: Any) -> np.ndarray:
            self.products += 1
            return self.within()

        def ticked(count: Any, value: jax.Array) -> jax.Array:
            return value + jax.pure_callback(count, jax.ShapeDtypeStruct((), value.dtype), value[0])

        @jax.custom_jvp
        def counted(y: jax.Array) -> jax.Array:
            return ticked(count_gradient, field(y))

        @counted.defjvp
        def _(primals: Any, tangents: Any) -> Any:
            value, change = jax.jvp(field, primals, tangents)
            return ticked(count_gradient, value), ticked(count_product, change)

        self.field = counted

    def reset(self, budget: int) -> None:
        self.gradients = self.products = 0
        self.budget = budget

    @property
    def exhausted(self) -> bool:
        return self.gradients + 2 * self.products > self.budget

    def within(self) -> np.ndarray:
        if self.exhausted:
            raise BudgetError
        return np.zeros(())


def implicit(solver_class: Any, krylov: str) -> Method:
    """An implicit Runge-Kutta method whose linear systems are solved on exact Hessian-vector products."""

    tallies: dict[str, Tally] = {}

    def run(case: Case, rtol: float, budget: int) -> Outcome:
        # A tenth of the absolute tolerance of the step: ten times looser leaves errors ten times as large.
        absolute = jnp.asarray(0.1 * ATOL * rtol * scale(case))
        inner: dict[str, Any] = {"rtol": 1e-2, "atol": absolute, "max_steps": 500}
        linear = MatrixFree(lx.CG(**inner) if krylov == "CG" else lx.GMRES(**inner, restart=20), krylov == "CG")
        solver = solver_class(
            root_finder=diffrax.with_stepsize_controller_tols(diffrax.VeryChord)(linear_solver=linear)
        )
        counter = tallies.setdefault(case.name, Tally(case.field))
        counter.reset(budget)
        began = time.perf_counter()
        try:
            sol = jax.block_until_ready(by_diffrax(case, counter.field, solver, rtol, budget // 40, case.horizon))
        except Exception:
            if not counter.exhausted:
                raise
            return Outcome(None, counter.gradients, counter.products, status="budget")
        counted = time.perf_counter() - began
        gradients, products = counter.gradients, counter.products
        status = "ok" if sol.result == diffrax.RESULTS.successful else "max_steps or failed"
        compiling, seconds = None, math.nan
        if status == "ok" and counted < 30:
            began = time.perf_counter()
            jax.block_until_ready(by_diffrax(case, case.field, solver, rtol, budget // 40, 1e-12 * case.horizon).ys)
            compiling = time.perf_counter() - began
            _, seconds = clock(lambda: by_diffrax(case, case.field, solver, rtol, budget // 40, case.horizon))
        return Outcome(np.asarray(sol.ys)[0], gradients, products, seconds, compiling, status)

    suits = (lambda case: case.problem is not None) if krylov == "CG" else (lambda case: True)
    return Method(f"diffrax {solver_class.__name__}, {krylov} on Hv", run, tuple(10.0**-k for k in range(2, 6)), suits)


# Libraries that call back.


class Host:
    """The field for a library outside JAX, counted, and ended by `BudgetError`."""

    def __init__(self, case: Case, budget: int):
        self.case, self.budget, self.gradients = case, budget, 0
        np.asarray(case.field(case.start))

    def __call__(self, t: float, y: np.ndarray) -> np.ndarray:
        if self.gradients >= self.budget:
            raise BudgetError
        self.gradients += 1
        return np.asarray(self.case.field(y))


def hosted(
    integrator: Callable[[Host, float], tuple[np.ndarray, str]], *modules: str
) -> Callable[[Case, float, int], Outcome]:
    """By another library, whose import does not count."""

    def run(case: Case, rtol: float, budget: int) -> Outcome:
        for name in modules:
            importlib.import_module(name)
        host = Host(case, budget)
        began = time.perf_counter()
        try:
            final, status = integrator(host, rtol)
        except BudgetError:
            final, status = None, "budget"
        return Outcome(final, host.gradients, run=time.perf_counter() - began, status=status)

    return run


def scipy_rk45(host: Host, rtol: float) -> tuple[np.ndarray, str]:
    from scipy.integrate import solve_ivp

    case = host.case
    span, atol = (0.0, case.horizon), ATOL * rtol * scale(case)
    result = solve_ivp(host, span, case.start, method="RK45", rtol=rtol, atol=atol, t_eval=[case.horizon])
    return result.y[:, -1], "ok" if result.success else "failed"


def torchdiffeq_dopri5(host: Host, rtol: float) -> tuple[np.ndarray, str]:
    import torch
    import torchdiffeq

    case = host.case
    times = torch.tensor([0.0, case.horizon], dtype=torch.float64)
    start = torch.from_numpy(np.array(case.start))

    def field(t: Any, y: Any) -> Any:
        return torch.from_numpy(np.array(host(0.0, y.numpy())))

    with torch.no_grad():
        path = torchdiffeq.odeint(field, start, times, rtol=rtol, atol=ATOL * rtol * scale(case), method="dopri5")
    return path[-1].numpy(), "ok"


def sundials_vector(size: int, context: Any, values: np.ndarray) -> Any:
    from sundials4py import core

    vector = core.N_VNew_Serial(size, context)
    core.N_VGetArrayPointer(vector)[:] = values
    return vector


def sundials_field(host: Host) -> Callable[..., int]:
    from sundials4py import core

    def field(t: float, y: Any, slope: Any, _: Any) -> int:
        try:
            core.N_VGetArrayPointer(slope)[:] = host(t, core.N_VGetArrayPointer(y).copy())
        except BudgetError:
            return -1
        return 0

    return field


def cvode(krylov: str) -> Callable[[Host, float], tuple[np.ndarray, str]]:
    """Variable-order BDF; Hessian-vector products are differences of gradients, counted as one each."""

    def run(host: Host, rtol: float) -> tuple[np.ndarray, str]:
        from sundials4py import core, cvodes

        case = host.case
        _, context = core.SUNContext_Create(0)
        y = sundials_vector(case.start.size, context, case.start)
        view = cvodes.CVodeCreate(cvodes.CV_BDF, context)
        memory = view.get()
        cvodes.CVodeInit(memory, sundials_field(host), 0.0, y)
        cvodes.CVodeSStolerances(memory, rtol, ATOL * rtol * scale(case))
        linear = getattr(core, f"SUNLinSol_{krylov}")(y, 0, KRYLOV, context)
        cvodes.CVodeSetLinearSolver(memory, linear)
        cvodes.CVodeSetMaxNumSteps(memory, 1_000_000)
        cvodes.CVodeSetStopTime(memory, case.horizon)
        flag, _ = cvodes.CVode(memory, case.horizon, y, cvodes.CV_NORMAL)
        return core.N_VGetArrayPointer(y).copy(), _status(flag, host)

    return run


def lsrk(host: Host, rtol: float) -> tuple[np.ndarray, str]:
    """Runge-Kutta-Chebyshev of order two; the spectral radius by power iteration, every 25 steps."""
    from sundials4py import arkode, core

    case = host.case
    _, context = core.SUNContext_Create(0)
    y = sundials_vector(case.start.size, context, case.start)
    view = arkode.LSRKStepCreateSTS(sundials_field(host), 0.0, y, context)
    memory = view.get()
    arkode.ARKodeSStolerances(memory, rtol, ATOL * rtol * scale(case))
    guess = sundials_vector(case.start.size, context, np.random.default_rng(0).normal(size=case.start.size))
    estimator = core.SUNDomEigEstimator_Power(guess, 100, 0.01, context)
    arkode.LSRKStepSetDomEigEstimator(memory, estimator)
    arkode.LSRKStepSetDomEigFrequency(memory, 25)
    arkode.LSRKStepSetMaxNumStages(memory, 200)
    arkode.ARKodeSetMaxNumSteps(memory, 1_000_000)
    arkode.ARKodeSetStopTime(memory, case.horizon)
    flag, _ = arkode.ARKodeEvolve(memory, case.horizon, y, arkode.ARK_NORMAL)
    return core.N_VGetArrayPointer(y).copy(), _status(flag, host)


def sundae_gmres(host: Host, rtol: float) -> tuple[np.ndarray, str]:
    from sksundae.cvode import CVODE

    case = host.case

    def field(t: float, y: np.ndarray, slope: np.ndarray) -> None:
        slope[:] = host(t, y.copy())

    options: dict[str, Any] = {"linsolver": "gmres", "krylov_dim": KRYLOV, "max_num_steps": 1_000_000}
    solver = CVODE(field, rtol=rtol, atol=ATOL * rtol * scale(case), **options)
    result = solver.solve(np.array([0.0, case.horizon / 2, case.horizon]), case.start)
    return np.asarray(result.y)[-1], "ok" if result.success else "failed"


def _status(flag: int, host: Host) -> str:
    return "ok" if flag >= 0 else "budget" if host.gradients >= host.budget else f"failed, flag {flag}"


def every_method(quick: bool, full: bool, steepness: Callable[[Case], float]) -> tuple[list[Method], dict[str, str]]:
    """All that run here, and why the others do not."""

    def gradient_flow(case: Case) -> bool:
        return case.problem is not None

    methods = our_methods(quick, full)
    skipped = {f"gradflow {name}": "not in this version" for name in ("NDF", "ROCK2", "RKC2") if not _ours(name)}
    methods += [explicit(diffrax.Tsit5()), explicit(diffrax.Dopri8())]
    methods += [
        implicit(solver_class, krylov)
        for solver_class in (diffrax.Kvaerno3, diffrax.Kvaerno5)
        for krylov in ("CG", "GMRES")
    ]
    tight = LADDER[1:]  # looser than 1e-3 their error control is erratic
    optional = [
        ("scipy RK45", scipy_rk45, ("scipy",), SHORT, None),
        ("torchdiffeq dopri5", torchdiffeq_dopri5, ("torch", "torchdiffeq"), SHORT, None),
        ("CVODE, CG", cvode("PCG"), ("sundials4py",), tight, gradient_flow),
        ("CVODE, GMRES", cvode("SPGMR"), ("sundials4py",), tight, None),
        ("LSRK RKC2", lsrk, ("sundials4py",), tight, gradient_flow),
        ("CVODE, GMRES (scikit-sundae)", sundae_gmres, ("sksundae",), tight, None),
    ]
    have_sundials = importlib.util.find_spec("sundials4py") is not None
    for name, integrator, modules, ladder, suits in optional:
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        if missing:
            skipped[name] = f"{' and '.join(missing)} not installed"
        elif modules != ("sksundae",) or not have_sundials:
            run = hosted(integrator, *modules)
            methods.append(Method(name, run, ladder, suits or (lambda case: True)))
    methods += [descent(rate, steepness) for rate in (1.0, 1.9)]
    return methods, skipped


def _ours(name: str) -> bool:
    return hasattr(gf.solvers, name)
