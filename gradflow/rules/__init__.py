"""Discrete time: each rule knows its clock `time(k)` and its continuous limits `flow(order)`.

A new rule is one file here with a subclass of `AbstractRule`, one line below and one row in `tests/surface.py`. Signs
instead of gradients, for instance, with no flow that it follows:

>>> import jax, jax.numpy as jnp, gradflow as gf
>>> class SignDescent(gf.AbstractRule):
...     problem: gf.EmpiricalRisk
...     learning_rate: jax.Array
...     def time(self, k):
...         return k * self.learning_rate
...     def init(self, trainable, frozen):
...         return trainable
...     def params(self, state):
...         return state
...     def loss(self, state, frozen):
...         return self.problem(gf.join_params(state, frozen))
...     def step(self, k, state, frozen):
...         loss, gradient = jax.value_and_grad(self.loss)(state, frozen)
...         return jax.tree_util.tree_map(lambda w, g: w - self.learning_rate * jnp.sign(g), state, gradient), loss
...     def flow(self, order=1):
...         raise ValueError("SignDescent has no continuous limit.")
...     def with_learning_rate(self, learning_rate):
...         return SignDescent(self.problem, learning_rate)
>>> x, y = jnp.array([[1.0], [2.0]]), jnp.array([1.0, 2.0])
>>> problem = gf.EmpiricalRisk(x, y, gf.losses.square, predict=lambda w, x: x @ w)
>>> sol = gf.iterate(SignDescent(problem, jnp.asarray(0.125)), jnp.zeros(1), 8)
>>> float(sol.final[0])
1.0
"""

from gradflow.rules._base import AbstractRule as AbstractRule
from gradflow.rules._gradient_descent import GradientDescent as GradientDescent
from gradflow.rules._heavy_ball import HeavyBall as HeavyBall
from gradflow.rules._mean_field_sgd import MeanFieldSGD as MeanFieldSGD
from gradflow.rules._nesterov import Nesterov as Nesterov
from gradflow.rules._one_pass_sgd import OnePassSGD as OnePassSGD
from gradflow.rules._optax import OptaxRule as OptaxRule
from gradflow.rules._rmsprop import RMSProp as RMSProp
from gradflow.rules._rmsprop import ScalarRMSProp as ScalarRMSProp
from gradflow.rules._sgd import SGD as SGD
