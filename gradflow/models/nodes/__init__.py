"""Laws of initial values, and rules that turn a law into nodes with weights: drawn at random, or for quadrature."""

from gradflow.models.nodes._laws import AbstractLaw as AbstractLaw
from gradflow.models.nodes._laws import Discrete as Discrete
from gradflow.models.nodes._laws import Gaussian as Gaussian
from gradflow.models.nodes._laws import Radius as Radius
from gradflow.models.nodes._laws import Uniform as Uniform
from gradflow.models.nodes._rules import AbstractNodeRule as AbstractNodeRule
from gradflow.models.nodes._rules import GaussLegendre as GaussLegendre
from gradflow.models.nodes._rules import MonteCarlo as MonteCarlo
from gradflow.models.nodes._rules import Sobol as Sobol
from gradflow.models.nodes._rules import default_rule as default_rule
