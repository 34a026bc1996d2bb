"""What rooms ask of objects that they do not import: by the methods of a class here, named where one is missing."""

from gradflow.protocols._models import Balances as Balances
from gradflow.protocols._models import Conserves as Conserves
from gradflow.protocols._models import HasNeurons as HasNeurons
from gradflow.protocols._models import HasNeuronWeights as HasNeuronWeights
from gradflow.protocols._models import HasPreactivations as HasPreactivations
from gradflow.protocols._models import KnowsOrdinary as KnowsOrdinary
from gradflow.protocols._models import OneHiddenLayer as OneHiddenLayer
from gradflow.protocols._models import PiecewiseLinearLayer as PiecewiseLinearLayer
from gradflow.protocols._models import TakesNeuronWeights as TakesNeuronWeights
from gradflow.protocols._offered import missing as missing
from gradflow.protocols._offered import offered as offered
from gradflow.protocols._problems import ChecksStart as ChecksStart
from gradflow.protocols._problems import ConservesAlong as ConservesAlong
from gradflow.protocols._problems import ExplainsFailure as ExplainsFailure
from gradflow.protocols._runs import HasAmplitude as HasAmplitude
from gradflow.protocols._runs import HasLyapunov as HasLyapunov
from gradflow.protocols._runs import HasVectorField as HasVectorField
from gradflow.protocols._runs import PredictsAverages as PredictsAverages
from gradflow.protocols._runs import SeesState as SeesState
from gradflow.protocols._second_order import SecondOrderForm as SecondOrderForm
from gradflow.protocols._second_order import SecondOrderState as SecondOrderState
from gradflow.protocols._second_order import lacking_for_second_order as lacking_for_second_order
