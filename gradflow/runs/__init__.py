"""From a start to a solution: one driver of flows, of stochastic flows and of rules, in segments."""

from gradflow.runs._callback import Snapshot as Snapshot
from gradflow.runs._iterate import iterate as iterate
from gradflow.runs._solve import solve as solve
from gradflow.runs._until import Until as Until
