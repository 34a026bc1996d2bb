"""Data sets as plain arrays: embedded ones, loaders for local and downloadable ones, synthetic generators."""

from gradflow.data._circle import circle as circle
from gradflow.data._correlated import correlated as correlated
from gradflow.data._dataset import Dataset as Dataset
from gradflow.data._embedded import digits as digits
from gradflow.data._embedded import mnist_subset as mnist_subset
from gradflow.data._gaussian_teacher import gaussian_teacher as gaussian_teacher
from gradflow.data._images import cifar10 as cifar10
from gradflow.data._images import fashion_mnist as fashion_mnist
from gradflow.data._images import mnist as mnist
from gradflow.data._linear_regression import linear_regression as linear_regression
from gradflow.data._load import load as load
from gradflow.data._load import names as names
from gradflow.data._openml import DownloadError as DownloadError
from gradflow.data._orthogonal_inputs import orthogonal_inputs as orthogonal_inputs
from gradflow.data._prepare import Options as Options
from gradflow.data._principal_components import principal_components as principal_components
from gradflow.data._shard import shard as shard
from gradflow.data._sine import sine as sine
from gradflow.data._two_directions import two_directions as two_directions
from gradflow.data._xor import xor as xor
