"""Activations with their expectations over correlated Gaussian fields: closed forms where there are any."""

from gradflow.problems.activations._base import AbstractActivation as AbstractActivation
from gradflow.problems.activations._base import Covariance as Covariance
from gradflow.problems.activations._erf import Erf as Erf
from gradflow.problems.activations._named import named as named
from gradflow.problems.activations._quadrature import Quadrature as Quadrature
from gradflow.problems.activations._relu import ReLU as ReLU
from gradflow.problems.activations._square import Square as Square
