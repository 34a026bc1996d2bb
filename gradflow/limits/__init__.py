"""What runs tend to as something goes to zero or to infinity: from several runs, with an estimate of the error."""

from gradflow.limits._alternating_flow import alternating_flow as alternating_flow
from gradflow.limits._filippov import FilippovSolution as FilippovSolution
from gradflow.limits._filippov import filippov as filippov
from gradflow.limits._first_escape import FirstEscape as FirstEscape
from gradflow.limits._first_escape import first_escape as first_escape
from gradflow.limits._infinite_width import infinite_width as infinite_width
from gradflow.limits._neuron_pursuit import neuron_pursuit as neuron_pursuit
from gradflow.limits._neurons import NeuronPursuitResult as NeuronPursuitResult
from gradflow.limits._saddles import Saddle as Saddle
from gradflow.limits._saddles import find_saddles as find_saddles
from gradflow.limits._width_fluctuations import WidthFluctuations as WidthFluctuations
from gradflow.limits._width_fluctuations import width_fluctuations as width_fluctuations

_FORMER_NAMES = {"Extrapolated": FilippovSolution, "Pursuit": NeuronPursuitResult}


def __getattr__(name: str) -> type:
    if name not in _FORMER_NAMES:
        raise AttributeError(f"module 'gradflow.limits' has no attribute {name!r}")
    return _FORMER_NAMES[name]
