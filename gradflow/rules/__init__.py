"""Discrete time: each rule knows its clock `time(k)` and its continuous limits `flow(order)`."""

from gradflow.rules._base import AbstractRule as AbstractRule
from gradflow.rules._gradient_descent import GradientDescent as GradientDescent
from gradflow.rules._heavy_ball import HeavyBall as HeavyBall
from gradflow.rules._mean_field_sgd import MeanFieldSGD as MeanFieldSGD
from gradflow.rules._nesterov import Nesterov as Nesterov
from gradflow.rules._one_pass_sgd import OnePassSGD as OnePassSGD
from gradflow.rules._optax import OptaxRule as OptaxRule
from gradflow.rules._sgd import SGD as SGD
