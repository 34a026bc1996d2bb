"""What is learnt: a loss as a callable on parameters, with the data as its leaves."""

from gradflow.problems import activations as activations
from gradflow.problems import losses as losses
from gradflow.problems._correlation import NeuralCorrelation as NeuralCorrelation
from gradflow.problems._empirical_risk import EmpiricalRisk as EmpiricalRisk
from gradflow.problems._order_parameters import OrderParameters as OrderParameters
from gradflow.problems._population_risk import PopulationRisk as PopulationRisk
from gradflow.problems._teacher_student import TeacherStudent as TeacherStudent
