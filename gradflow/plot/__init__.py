"""Figures: each function reads a data set and returns a matplotlib figure."""

from gradflow.plot._compare import compare as compare
from gradflow.plot._draw import draw as draw
from gradflow.plot._early_stage import early_stage as early_stage
from gradflow.plot._early_stage import two_directions as two_directions
from gradflow.plot._mean_field import mean_field as mean_field
from gradflow.plot._momentum import momentum as momentum
from gradflow.plot._phase_diagram import phase_diagram as phase_diagram
from gradflow.plot._small_init import small_init as small_init
from gradflow.plot._style import save as save
from gradflow.plot._vanishing_init import circle as circle
from gradflow.plot._vanishing_init import vanishing_init as vanishing_init
