"""Functions of the parameters, to be evaluated along a run; each is a callable `params -> array`."""

from gradflow.observables._activation_pattern import ActivationPattern as ActivationPattern
from gradflow.observables._balancedness import Balancedness as Balancedness
from gradflow.observables._correlation import Aligned as Aligned
from gradflow.observables._correlation import Correlation as Correlation
from gradflow.observables._correlation import KKTResidual as KKTResidual
from gradflow.observables._correlation import LogNorm as LogNorm
from gradflow.observables._gradient_bound import GradientBound as GradientBound
from gradflow.observables._hessian import HessianEigenvalues as HessianEigenvalues
from gradflow.observables._hessian import Sharpness as Sharpness
from gradflow.observables._loss import Accuracy as Accuracy
from gradflow.observables._loss import Loss as Loss
from gradflow.observables._loss_rate import LossRate as LossRate
from gradflow.observables._lyapunov import Lyapunov as Lyapunov
from gradflow.observables._movement import NeuronMovement as NeuronMovement
from gradflow.observables._neuron_partition import NeuronPartition as NeuronPartition
from gradflow.observables._neuron_partition import PartitionCounts as PartitionCounts
from gradflow.observables._neurons import NeuronAngles as NeuronAngles
from gradflow.observables._neurons import NeuronNorms as NeuronNorms
from gradflow.observables._norms import GradientNorm as GradientNorm
from gradflow.observables._norms import ParameterNorm as ParameterNorm
from gradflow.observables._ntk import NTK as NTK
from gradflow.observables._ntk import NTKEigenvalues as NTKEigenvalues
from gradflow.observables._sliding import SlidingNeurons as SlidingNeurons
from gradflow.observables._switches import Switches as Switches
from gradflow.observables._switches import survivors as survivors
from gradflow.observables._switches import switches as switches
