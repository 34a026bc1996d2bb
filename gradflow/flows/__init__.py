"""Continuous time: each flow is a vector field with its state, its clock and its declared traits."""

from gradflow.flows._base import AbstractFlow as AbstractFlow
from gradflow.flows._gradient_flow import GradientFlow as GradientFlow
