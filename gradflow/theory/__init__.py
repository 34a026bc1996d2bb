"""Predictions made without training."""

from gradflow.theory._relu_escape import ReLUEscape as ReLUEscape
from gradflow.theory._relu_escape import relu_escape as relu_escape
