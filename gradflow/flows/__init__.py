"""Continuous time: each flow is a vector field with its state, its clock and its declared traits.

A new flow is one file here with a subclass of `AbstractFlow`, one line below and one row in `tests/surface.py`. What it
has to say is how a state is made of parameters, how it moves, and which of it are the parameters; `AbstractFlow` lists
the traits by which a solver is chosen. With weight decay, for instance:

>>> import equinox as eqx, jax, jax.numpy as jnp, gradflow as gf
>>> class DecayFlow(gf.AbstractFlow):
...     problem: gf.EmpiricalRisk
...     decay: jax.Array
...     def init(self, trainable, frozen):
...         return trainable
...     def params(self, state):
...         return state
...     def vector_field(self, t, state, frozen):
...         gradient = jax.grad(lambda p: self.problem(gf.join_params(p, frozen)))(state)
...         return jax.tree_util.tree_map(lambda g, w: -g - self.decay * w, gradient, state)
>>> x, y = jnp.array([[1.0], [2.0]]), jnp.array([1.0, 2.0])
>>> problem = gf.EmpiricalRisk(x, y, gf.losses.square, predict=lambda w, x: x @ w)
>>> sol = gf.solve(DecayFlow(problem, jnp.asarray(0.1)), jnp.zeros(1), [20.0])
>>> round(float(sol.final[0]), 3)  # 2.5 / 2.6
0.962
"""

from gradflow.flows._base import AbstractFlow as AbstractFlow
from gradflow.flows._base import AbstractStochasticFlow as AbstractStochasticFlow
from gradflow.flows._central_flow import CentralFlow as CentralFlow
from gradflow.flows._descent_ascent_flow import DescentAscentFlow as DescentAscentFlow
from gradflow.flows._descent_ascent_flow import split_iterates as split_iterates
from gradflow.flows._edge_flow import EdgeFlow as EdgeFlow
from gradflow.flows._gradient_flow import GradientFlow as GradientFlow
from gradflow.flows._heavy_ball_flow import HeavyBallFlow as HeavyBallFlow
from gradflow.flows._linearised_flow import LinearisedFlow as LinearisedFlow
from gradflow.flows._log_diagonal import LogDiagonalFlow as LogDiagonalFlow
from gradflow.flows._mean_field import MeanFieldFlow as MeanFieldFlow
from gradflow.flows._modified_flow import ModifiedFlow as ModifiedFlow
from gradflow.flows._momentum_descent_ascent import MomentumDescentAscentFlow as MomentumDescentAscentFlow
from gradflow.flows._momentum_flow import MomentumFlow as MomentumFlow
from gradflow.flows._nesterov_convex_flow import NesterovConvexFlow as NesterovConvexFlow
from gradflow.flows._nesterov_flow import NesterovFlow as NesterovFlow
from gradflow.flows._neuron_polar import NeuronPolarFlow as NeuronPolarFlow
from gradflow.flows._order_parameter_fluctuations import FluctuationFlow as FluctuationFlow
from gradflow.flows._order_parameter_fluctuations import Fluctuations as Fluctuations
from gradflow.flows._order_parameters import OrderParameterFlow as OrderParameterFlow
from gradflow.flows._order_parameters_reduced import OverparametrisedFlow as OverparametrisedFlow
from gradflow.flows._order_parameters_reduced import ReducedOverlaps as ReducedOverlaps
from gradflow.flows._polar import PolarFlow as PolarFlow
from gradflow.flows._principal_flow import PrincipalFlow as PrincipalFlow
from gradflow.flows._rod_flow import RodFlow as RodFlow
from gradflow.flows._schedule import InterpolatedSchedule as InterpolatedSchedule
from gradflow.flows._second_order import AbstractSecondOrderFlow as AbstractSecondOrderFlow
from gradflow.flows._second_order import MomentumState as MomentumState
from gradflow.flows._second_order import SecondOrderFlow as SecondOrderFlow
from gradflow.flows._sgd_flow import SGDFlow as SGDFlow
from gradflow.flows._split_flow import AbstractSplitFlow as AbstractSplitFlow
from gradflow.flows._split_flow import SplitState as SplitState
from gradflow.flows._traits import ErrorWeights as ErrorWeights
