"""Neural-network training as a dynamical system: exact flows, their discrete counterparts, the theory beside them."""

from typing import TYPE_CHECKING

from gradflow import data as data
from gradflow import limits as limits
from gradflow import models as models
from gradflow import observables as observables
from gradflow import solvers as solvers
from gradflow import theory as theory
from gradflow._checks import DerivativeWarning as DerivativeWarning
from gradflow._checks import PrecisionWarning as PrecisionWarning
from gradflow._checks import TheoryWarning as TheoryWarning
from gradflow._solution import Solution as Solution
from gradflow._solution import SolveError as SolveError
from gradflow._solution import SolveInterrupted as SolveInterrupted
from gradflow._solution import load as load
from gradflow._tree import join_params as join_params
from gradflow._tree import split_params as split_params
from gradflow.flows import AbstractFlow as AbstractFlow
from gradflow.flows import CentralFlow as CentralFlow
from gradflow.flows import DescentAscentFlow as DescentAscentFlow
from gradflow.flows import EdgeFlow as EdgeFlow
from gradflow.flows import GradientFlow as GradientFlow
from gradflow.flows import HeavyBallFlow as HeavyBallFlow
from gradflow.flows import LinearisedFlow as LinearisedFlow
from gradflow.flows import LogDiagonalFlow as LogDiagonalFlow
from gradflow.flows import MeanFieldFlow as MeanFieldFlow
from gradflow.flows import ModifiedFlow as ModifiedFlow
from gradflow.flows import MomentumDescentAscentFlow as MomentumDescentAscentFlow
from gradflow.flows import MomentumFlow as MomentumFlow
from gradflow.flows import NesterovConvexFlow as NesterovConvexFlow
from gradflow.flows import NesterovFlow as NesterovFlow
from gradflow.flows import NeuronPolarFlow as NeuronPolarFlow
from gradflow.flows import OrderParameterFlow as OrderParameterFlow
from gradflow.flows import PolarFlow as PolarFlow
from gradflow.flows import PrincipalFlow as PrincipalFlow
from gradflow.flows import RodFlow as RodFlow
from gradflow.flows import SecondOrderFlow as SecondOrderFlow
from gradflow.flows import SGDFlow as SGDFlow
from gradflow.limits import FilippovSolution as FilippovSolution
from gradflow.limits import FirstEscape as FirstEscape
from gradflow.limits import NeuronPursuitResult as NeuronPursuitResult
from gradflow.limits import Saddle as Saddle
from gradflow.limits import WidthFluctuations as WidthFluctuations
from gradflow.limits import alternating_flow as alternating_flow
from gradflow.limits import filippov as filippov
from gradflow.limits import find_saddles as find_saddles
from gradflow.limits import first_escape as first_escape
from gradflow.limits import infinite_width as infinite_width
from gradflow.limits import neuron_pursuit as neuron_pursuit
from gradflow.limits import width_fluctuations as width_fluctuations
from gradflow.models import Polar as Polar
from gradflow.problems import EmpiricalRisk as EmpiricalRisk
from gradflow.problems import NeuralCorrelation as NeuralCorrelation
from gradflow.problems import OrderParameters as OrderParameters
from gradflow.problems import PopulationRisk as PopulationRisk
from gradflow.problems import TeacherStudent as TeacherStudent
from gradflow.problems import losses as losses
from gradflow.rules import SGD as SGD
from gradflow.rules import AbstractRule as AbstractRule
from gradflow.rules import GradientDescent as GradientDescent
from gradflow.rules import HeavyBall as HeavyBall
from gradflow.rules import MeanFieldSGD as MeanFieldSGD
from gradflow.rules import Nesterov as Nesterov
from gradflow.rules import OnePassSGD as OnePassSGD
from gradflow.rules import OptaxRule as OptaxRule
from gradflow.rules import RMSProp as RMSProp
from gradflow.rules import ScalarRMSProp as ScalarRMSProp
from gradflow.runs import Snapshot as Snapshot
from gradflow.runs import Until as Until
from gradflow.runs import iterate as iterate
from gradflow.runs import solve as solve

if TYPE_CHECKING:
    from gradflow import plot as plot
    from gradflow import reports as reports
    from gradflow import studies as studies
    from gradflow import sweeps as sweeps
    from gradflow import tables as tables
    from gradflow.plot import animate as animate
    from gradflow.reports import report as report
    from gradflow.studies import compare as compare
    from gradflow.sweeps import sweep as sweep

__version__ = "0.1.0"

# These need xarray, zarr and matplotlib, whose import takes as long as that of all the rest: they come on first use.
_ON_FIRST_USE = {
    "animate": "gradflow.plot",
    "compare": "gradflow.studies",
    "plot": "gradflow.plot",
    "report": "gradflow.reports",
    "reports": "gradflow.reports",
    "studies": "gradflow.studies",
    "sweep": "gradflow.sweeps",
    "sweeps": "gradflow.sweeps",
    "tables": "gradflow.tables",
}


def __getattr__(name: str) -> object:
    if name in ("Extrapolated", "Pursuit"):  # former names, which `limits` resolves
        return getattr(limits, name)
    if name not in _ON_FIRST_USE:
        raise AttributeError(f"module 'gradflow' has no attribute {name!r}")
    import importlib

    room = importlib.import_module(_ON_FIRST_USE[name])
    return room if _ON_FIRST_USE[name] == f"gradflow.{name}" else getattr(room, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_ON_FIRST_USE} - {"TYPE_CHECKING"})
