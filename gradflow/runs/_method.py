"""The method that integrates a flow in adaptive steps: chosen, checked, and with the tolerances of the run."""

import diffrax
import equinox as eqx
import optimistix
from jaxtyping import PyTree

from gradflow import _checks
from gradflow._tree import tree_norm
from gradflow.flows import AbstractFlow
from gradflow.solvers import AbstractMethod, AbstractStochasticMethod, CatchingUp, OneStep, StepControl, default_solver
from gradflow.solvers._default import describe_choice


def method_for(
    flow: AbstractFlow,
    solver: diffrax.AbstractSolver | AbstractMethod | None,
    control: StepControl,
    flowing: PyTree,
    frozen: PyTree,
) -> tuple[AbstractMethod, str]:
    """The method that integrates a flow, and why it was chosen where none is given."""
    choice = ""
    if solver is None:
        tolerance = float(control.rtol) if _checks.is_concrete(control.rtol) else 1e-5
        solver = default_solver(tolerance, flow, flow.kinked(flowing, frozen))
        choice = describe_choice(tolerance, flow, flow.kinks(flowing, frozen))
    method = _prepare_solver(solver, control, flowing)
    if flow.step_limited and not isinstance(method, OneStep):
        advice = "Use one such as gradflow.solvers.Tsit5() or, where it is stiff, Hybrid()."
        raise _checks.fail("solver", f"be an explicit method for a {type(flow).__name__}", method.name, advice)
    if flow.constrained != isinstance(method, CatchingUp):
        must = f"{'' if flow.constrained else 'not '}be gradflow.solvers.CatchingUp() for a {type(flow).__name__}"
        raise _checks.fail("solver", must, method.name, "None chooses one that goes with it.")
    return method, choice


def check_method_without_noise(
    solver: diffrax.AbstractSolver | AbstractMethod | AbstractStochasticMethod | None,
) -> diffrax.AbstractSolver | AbstractMethod | None:
    """The method for a flow without noise; refuses those for stochastic flows."""
    if isinstance(solver, AbstractStochasticMethod):
        advice = "See gradflow.solvers."
        raise _checks.fail("solver", "be one for a flow without noise", f"of type {type(solver).__name__}", advice)
    return solver


def _prepare_solver(solver: object, control: StepControl, trainable: PyTree) -> AbstractMethod:
    """The method; a diffrax solver with a loop that both modes of the run can use and its root finder's tolerances."""
    if isinstance(solver, AbstractMethod):
        return solver
    if not isinstance(solver, diffrax.AbstractSolver):
        if isinstance(solver, type):
            raise _checks.fail("solver", "be a solver", f"the class {solver.__name__}", f"Write {solver.__name__}().")
        raise _checks.fail("solver", "be a diffrax solver", f"of type {type(solver).__name__}", "See gradflow.solvers.")
    if not isinstance(solver, diffrax.AbstractAdaptiveSolver):
        advice = "Use gradflow.solvers.Tsit5() or Heun(); for fixed steps of Euler, iterate gradflow.GradientDescent."
        raise _checks.fail("solver", "have an error estimate", f"{type(solver).__name__}, which has none", advice)
    if isinstance(solver, diffrax.AbstractRungeKutta) and solver.scan_kind is None:
        # The plain loop over stages: diffrax's default one is made for reverse mode and knows no forward mode.
        plain = eqx.tree_at(lambda s: s.scan_kind, solver, "lax", is_leaf=lambda x: x is None)
        return OneStep(_with_tolerances(plain, control, trainable))
    return OneStep(_with_tolerances(solver, control, trainable))


def _with_tolerances(solver: diffrax.AbstractSolver, control: StepControl, trainable: PyTree) -> diffrax.AbstractSolver:
    """The solver with the tolerances of the run in its root finder, where it has one that leaves them open."""
    if not isinstance(solver, diffrax.AbstractImplicitSolver):
        return solver
    size = tree_norm(trainable)
    rough = control.rtol.astype(size.dtype) * size if control.atol is None else control.atol
    settings = {"rtol": control.rtol, "atol": rough, "norm": optimistix.rms_norm}
    # A root finder of diffrax leaves a marker where it wants the tolerances of the run; its class has no public name.
    marker = type(diffrax.with_stepsize_controller_tols(optimistix.Newton)().rtol)
    finder = solver.root_finder
    open_ones = [name for name in settings if isinstance(getattr(finder, name, None), marker)]
    where = lambda s: [getattr(s.root_finder, name) for name in open_ones]  # noqa: E731
    return eqx.tree_at(where, solver, [settings[name] for name in open_ones]) if open_ones else solver
