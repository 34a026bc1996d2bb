"""Ready-made studies, one question each: thin compositions of flows, rules, observables and sweeps.

A new study is one file here, with a function that returns an `xarray.Dataset` with the attribute `study` and one that
makes a text table of it; one file in `plot/`; a command in `cli/_studies.py`; and tests that compare it with a closed
form or another integrator.
"""

from gradflow.studies._circle import circle_illustration as circle_illustration
from gradflow.studies._circle import circle_table as circle_table
from gradflow.studies._discrete_gap import compare as compare
from gradflow.studies._discrete_gap import compare_table as compare_table
from gradflow.studies._discrete_gap import discrete_gap as discrete_gap
from gradflow.studies._discrete_gap import steps_to_match as steps_to_match
from gradflow.studies._early_stage import early_stage as early_stage
from gradflow.studies._early_stage import early_stage_table as early_stage_table
from gradflow.studies._exponent_map import exponent_map as exponent_map
from gradflow.studies._mean_field import mean_field as mean_field
from gradflow.studies._mean_field import mean_field_table as mean_field_table
from gradflow.studies._momentum import momentum as momentum
from gradflow.studies._momentum import momentum_table as momentum_table
from gradflow.studies._momentum import movement_slope as movement_slope
from gradflow.studies._optimal_schedule import OptimalSchedule as OptimalSchedule
from gradflow.studies._optimal_schedule import optimal_schedule as optimal_schedule
from gradflow.studies._phase_diagram import phase_diagram as phase_diagram
from gradflow.studies._phase_diagram import phase_diagram_table as phase_diagram_table
from gradflow.studies._phase_map import phase_map as phase_map
from gradflow.studies._small_init import small_init as small_init
from gradflow.studies._small_init import small_init_table as small_init_table
from gradflow.studies._two_directions import escape_slopes as escape_slopes
from gradflow.studies._two_directions import two_directions as two_directions
from gradflow.studies._two_directions import two_directions_table as two_directions_table
from gradflow.studies._vanishing_init import vanishing_init as vanishing_init
from gradflow.studies._vanishing_init import vanishing_init_table as vanishing_init_table
