"""Functions of the parameters, to be evaluated along a run; each is a callable `params -> array`.

Any function will do. One that is of use to others is one file here, an Equinox module so that what it holds are leaves,
one line below and one row in `tests/surface.py`. One that needs time or state has a method `of_state(flow, t, state,
frozen)` as well, see `Velocity`.

>>> import equinox as eqx, jax.numpy as jnp, gradflow as gf
>>> class Distance(eqx.Module):
...     origin: jnp.ndarray
...     def __call__(self, params):
...         return jnp.linalg.norm(params - self.origin)
>>> flow = gf.GradientFlow(lambda w: 0.5 * jnp.sum(w**2))
>>> sol = gf.solve(flow, jnp.ones(4), [0.0, 1.0], observe={"distance": Distance(jnp.ones(4))})
>>> [round(float(value), 3) for value in sol.observed["distance"]]
[0.0, 1.264]
"""

from gradflow.observables._activation_pattern import ActivationPattern as ActivationPattern
from gradflow.observables._alternation import Amplitude as Amplitude
from gradflow.observables._alternation import MeanLoss as MeanLoss
from gradflow.observables._alternation import Variance as Variance
from gradflow.observables._balancedness import Balancedness as Balancedness
from gradflow.observables._correlation import Aligned as Aligned
from gradflow.observables._correlation import Correlation as Correlation
from gradflow.observables._correlation import KKTResidual as KKTResidual
from gradflow.observables._correlation import LogNorm as LogNorm
from gradflow.observables._gradient_bound import GradientBound as GradientBound
from gradflow.observables._hessian import HessianEigenpairs as HessianEigenpairs
from gradflow.observables._hessian import HessianEigenvalues as HessianEigenvalues
from gradflow.observables._hessian import Sharpness as Sharpness
from gradflow.observables._iterate_mean import IterateMean as IterateMean
from gradflow.observables._loss import Accuracy as Accuracy
from gradflow.observables._loss import Loss as Loss
from gradflow.observables._loss_rate import LossRate as LossRate
from gradflow.observables._lyapunov import Lyapunov as Lyapunov
from gradflow.observables._margins import Margins as Margins
from gradflow.observables._margins import MaxMarginResidual as MaxMarginResidual
from gradflow.observables._margins import NormalisedMargin as NormalisedMargin
from gradflow.observables._movement import NeuronMovement as NeuronMovement
from gradflow.observables._neuron_partition import NeuronPartition as NeuronPartition
from gradflow.observables._neuron_partition import PartitionCounts as PartitionCounts
from gradflow.observables._neurons import NeuronAngles as NeuronAngles
from gradflow.observables._neurons import NeuronNorms as NeuronNorms
from gradflow.observables._norms import GradientNorm as GradientNorm
from gradflow.observables._norms import ParameterNorm as ParameterNorm
from gradflow.observables._ntk import NTK as NTK
from gradflow.observables._ntk import NTKEigenvalues as NTKEigenvalues
from gradflow.observables._particles import ParticleHistogram as ParticleHistogram
from gradflow.observables._particles import particle_distance as particle_distance
from gradflow.observables._particles import wasserstein as wasserstein
from gradflow.observables._sliding import SlidingNeurons as SlidingNeurons
from gradflow.observables._state import State as State
from gradflow.observables._state import Time as Time
from gradflow.observables._state import Velocity as Velocity
from gradflow.observables._switches import Switches as Switches
from gradflow.observables._switches import survivors as survivors
from gradflow.observables._switches import switches as switches
