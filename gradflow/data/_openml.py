"""Images from OpenML through scikit-learn and its cache, with one clear error when the network does not deliver.

Source: J. Vanschoren, J. N. van Rijn, B. Bischl and L. Torgo (2014), *OpenML: networked science in machine learning*,
arXiv 1407.7722.
"""

import gzip
import os
import warnings
import zlib
from http.client import HTTPException
from ssl import SSLError
from typing import Any, NamedTuple
from urllib.error import URLError

import numpy as np

from gradflow.data._prepare import Raw

# A ValueError comes from the server's answer (an error page, a wrong checksum), since no argument of the call is the
# user's but the cache folder. Errors of that folder (permissions, a full disk) pass through: they speak for themselves.
NETWORK_ERRORS = (URLError, ConnectionError, TimeoutError, HTTPException, SSLError, ValueError)
DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error)


class DownloadError(OSError):
    """A data set could not be downloaded; the message names what can be used instead.

    >>> import gradflow as gf
    >>> issubclass(gf.data.DownloadError, OSError)
    True
    """


class Source(NamedTuple):
    """Where OpenML keeps a data set; its samples are ordered training set first, test set last."""

    name: str
    version: int
    train: int
    test: int
    image_shape: tuple[int, ...]


def fetch(name: str, source: Source, split: str, data_home: str | os.PathLike[str] | None) -> Raw:
    """Downloads, or reads from the cache in `data_home`, the samples of `split`."""
    from sklearn.datasets import fetch_openml

    try:
        with warnings.catch_warnings():
            # Retries are scikit-learn's business: what matters is whether the data arrive in the end.
            warnings.filterwarnings("ignore", message="A network error occurred")
            warnings.filterwarnings("ignore", message=r".*redownloading")
            bunch: Any = fetch_openml(source.name, version=source.version, data_home=data_home, as_frame=False)
    except (*NETWORK_ERRORS, *DAMAGED) as error:
        raise _download_error(name, f"{type(error).__name__}: {error}") from error
    rows, size = source.train + source.test, int(np.prod(source.image_shape))
    shape = np.shape(bunch.data)
    if shape != (rows, size) or np.shape(bunch.target) != (rows,):
        raise _download_error(name, f"the server sent data of shape {shape} where {(rows, size)} was expected")
    part = {"train": slice(source.train), "test": slice(source.train, None), "all": slice(None)}[split]
    # Pixels arrive as 64-bit numbers, eight times the memory they need; labels arrive as text.
    sent, labels = np.asarray(bunch.data)[part], np.asarray(bunch.target)[part].astype(np.int64)
    with np.errstate(invalid="ignore"):  # the comparison finds what does not fit
        pixels = sent.astype(np.uint8)
    if not np.array_equal(pixels, sent):
        raise _download_error(name, "the server sent pixels that are not integers from 0 to 255")
    return Raw(pixels, labels, source.image_shape, 255)


def _download_error(name: str, reason: str) -> DownloadError:
    reason = " ".join(reason.split())
    return DownloadError(
        f"Data set `{name}` could not be downloaded from OpenML ({reason}). Use `gradflow.data.digits()` or "
        f"`gradflow.data.mnist_subset()`, which need no network, or obtain the files in another way and give their "
        f"folder as `path`."
    )
