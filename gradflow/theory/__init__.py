"""Predictions made without training."""

from gradflow.theory._diagonal import Saddles as Saddles
from gradflow.theory._diagonal import diagonal_saddles as diagonal_saddles
from gradflow.theory._escape import Escape as Escape
from gradflow.theory._escape import escape as escape
from gradflow.theory._kkt import KKTPoints as KKTPoints
from gradflow.theory._kkt import kkt_points as kkt_points
from gradflow.theory._linear import linear_saddles as linear_saddles
from gradflow.theory._linear import saxe_mode as saxe_mode
from gradflow.theory._momentum import FasterMethod as FasterMethod
from gradflow.theory._momentum import effective_mu as effective_mu
from gradflow.theory._momentum import faster_method as faster_method
from gradflow.theory._momentum import momentum_rates as momentum_rates
from gradflow.theory._momentum import stable_step as stable_step
from gradflow.theory._partition import PartitionCondition as PartitionCondition
from gradflow.theory._partition import partition_condition as partition_condition
from gradflow.theory._phase_diagram import GREEN_TAIL as GREEN_TAIL
from gradflow.theory._phase_diagram import PhaseRegion as PhaseRegion
from gradflow.theory._phase_diagram import finite_dim_plateau as finite_dim_plateau
from gradflow.theory._phase_diagram import phase_region as phase_region
from gradflow.theory._phase_diagram import plateau as plateau
from gradflow.theory._relu_escape import ReLUEscape as ReLUEscape
from gradflow.theory._relu_escape import relu_escape as relu_escape
from gradflow.theory._relu_gram import relu_gram as relu_gram
from gradflow.theory._two_directions import TwoDirections as TwoDirections
from gradflow.theory._two_directions import two_directions as two_directions
