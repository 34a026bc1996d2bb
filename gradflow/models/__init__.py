"""Small architectures of the theory, their initial laws and parametrisations, as Equinox modules."""

import collections.abc as _abc

from gradflow.models import laws as laws
from gradflow.models import nodes as nodes
from gradflow.models._as_nodes import AsNodes as AsNodes
from gradflow.models._as_nodes import as_nodes as as_nodes
from gradflow.models._conv_net import ConvNet as ConvNet
from gradflow.models._deep_linear import DeepLinear as DeepLinear
from gradflow.models._diagonal_linear import DiagonalLinear as DiagonalLinear
from gradflow.models._log_diagonal import LogDiagonal as LogDiagonal
from gradflow.models._mean_field_net import MeanFieldNet as MeanFieldNet
from gradflow.models._mean_field_start import MeanFieldNodes as MeanFieldNodes
from gradflow.models._mean_field_start import MeanFieldStart as MeanFieldStart
from gradflow.models._mildly_parametrised import mildly_parametrised as mildly_parametrised
from gradflow.models._mlp import MLP as MLP
from gradflow.models._one_layer import OneLayer as OneLayer
from gradflow.models._one_layer import squared_relu as squared_relu
from gradflow.models._parametrisation import Parametrisation as Parametrisation
from gradflow.models._parametrisation import mean_field as mean_field
from gradflow.models._parametrisation import mup as mup
from gradflow.models._parametrisation import ntk as ntk
from gradflow.models._parametrisation import standard as standard
from gradflow.models._polar import Polar as Polar
from gradflow.models._radial import RadialActivation as RadialActivation
from gradflow.models._signed_two_layer import SignedTwoLayer as SignedTwoLayer
from gradflow.models._smoothed import Smoothed as Smoothed
from gradflow.models._two_layer import TwoLayer as TwoLayer


def __getattr__(name: str) -> _abc.Callable[..., TwoLayer]:
    if name == "mild_two_layer":  # the former name
        return mildly_parametrised
    raise AttributeError(f"module 'gradflow.models' has no attribute {name!r}")
