"""MNIST, Fashion-MNIST and CIFAR-10, from local files or from OpenML."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Unpack

import numpy as np

from gradflow._checks import check_choice, fail
from gradflow.data._cifar import read_cifar_folder
from gradflow.data._dataset import Dataset
from gradflow.data._idx import read_idx_folder
from gradflow.data._openml import Source, fetch
from gradflow.data._prepare import Options, Raw, prepare, resolve

TEN = tuple(range(10))
MNIST = Source("mnist_784", 1, 60000, 10000, (28, 28))
FASHION_MNIST = Source("Fashion-MNIST", 1, 60000, 10000, (28, 28))
CIFAR10 = Source("CIFAR_10", 1, 50000, 10000, (3, 32, 32))


def mnist(
    *,
    split: str = "train",
    path: str | os.PathLike[str] | None = None,
    data_home: str | os.PathLike[str] | None = None,
    **options: Unpack[Options],
) -> Dataset:
    """Handwritten digits, 60000 + 10000 images of 28 x 28 pixels, scaled to [0, 1].

    **Arguments**

    - `split`: `"train"`, `"test"` or `"all"` (training set first).
    - `path`: folder with `train-images-idx3-ubyte`, `train-labels-idx1-ubyte`, `t10k-images-idx3-ubyte`,
      `t10k-labels-idx1-ubyte`, plain or with `.gz`, also spelt `train-images.idx3-ubyte`; only the files of `split` are
      needed. `None` downloads from OpenML (`mnist_784`, version 1) once.
    - `data_home`: where scikit-learn keeps downloads; `None` for its default.
    - `**options`: see `gradflow.data.Options`.

    **Returns** a `Dataset` with `x` of shape `(n, 784)`.

    **Raises** `ValueError` for options it cannot meet and for files that are missing or damaged;
    `gradflow.data.DownloadError` if the download fails.

    Source: Y. LeCun, L. Bottou, Y. Bengio and P. Haffner (1998), *Gradient-based learning applied to document
    recognition*.

    >>> import gradflow as gf, pathlib, struct, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     images = struct.pack(">4I", 2051, 2, 1, 2) + bytes([0, 255, 51, 102])
    ...     labels = struct.pack(">2I", 2049, 2) + bytes([3, 8])
    ...     _ = pathlib.Path(folder, "train-images-idx3-ubyte").write_bytes(images)
    ...     _ = pathlib.Path(folder, "train-labels-idx1-ubyte").write_bytes(labels)
    ...     x, y = gf.data.mnist(path=folder, classes=(3, 8), labels="pm1", dtype="float64")
    >>> x.tolist(), y.tolist()
    ([[0.0, 1.0], [0.2, 0.4]], [1.0, -1.0])
    """
    return _load("mnist", MNIST, read_idx_folder, split, path, data_home, options)


def fashion_mnist(
    *,
    split: str = "train",
    path: str | os.PathLike[str] | None = None,
    data_home: str | os.PathLike[str] | None = None,
    **options: Unpack[Options],
) -> Dataset:
    """Pictures of clothes, 60000 + 10000 images of 28 x 28, in [0, 1].

    Labels: 0 T-shirt, 1 trousers, 2 pullover, 3 dress, 4 coat, 5 sandal, 6 shirt, 7 sneaker, 8 bag, 9 ankle boot.

    **Arguments** as for `gradflow.data.mnist`, whose file names the data set shares; on OpenML it is `Fashion-MNIST`,
    version 1. **Returns** a `Dataset` with `x` of shape `(n, 784)`.

    **Raises** `ValueError` for options it cannot meet and for files that are missing or damaged;
    `gradflow.data.DownloadError` if the download fails.

    Source: H. Xiao, K. Rasul and R. Vollgraf (2017), *Fashion-MNIST: a novel image dataset for benchmarking machine
    learning algorithms*, arXiv 1708.07747.

    >>> import gradflow as gf
    >>> gf.data.fashion_mnist(split="validation")
    Traceback (most recent call last):
    ValueError: Argument `split` must be one of 'train', 'test', 'all', but is 'validation'.
    """
    return _load("fashion-mnist", FASHION_MNIST, read_idx_folder, split, path, data_home, options)


def cifar10(
    *,
    split: str = "train",
    path: str | os.PathLike[str] | None = None,
    data_home: str | os.PathLike[str] | None = None,
    **options: Unpack[Options],
) -> Dataset:
    """Small colour photographs, 50000 + 10000 images of 32 x 32, in [0, 1].

    Labels: 0 airplane, 1 automobile, 2 bird, 3 cat, 4 deer, 5 dog, 6 frog, 7 horse, 8 ship, 9 truck. The `image_shape`
    is `(3, 32, 32)`: red, green, blue planes.

    **Arguments**

    - `split`: `"train"`, `"test"` or `"all"` (training set first).
    - `path`: folder with `data_batch_1` to `data_batch_5` and `test_batch`, as they are in the Python version, or with
      `.bin` in the binary version; only the files of `split` are needed. Pickles may hold arrays and built-in
      containers only. `None` downloads from OpenML (`CIFAR_10`, version 1) once.
    - `data_home`: where scikit-learn keeps downloads; `None` for its default.
    - `**options`: see `gradflow.data.Options`.

    **Returns** a `Dataset` with `x` of shape `(n, 3072)`.

    **Raises** `ValueError` for options it cannot meet and for files that are missing or damaged;
    `gradflow.data.DownloadError` if the download fails.

    Source: A. Krizhevsky (2009), *Learning multiple layers of features from tiny images*.

    >>> import gradflow as gf, pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     record = bytes([3]) + bytes(1024) + bytes([255] * 2048)
    ...     _ = pathlib.Path(folder, "test_batch.bin").write_bytes(record)
    ...     data = gf.data.cifar10(split="test", path=folder, labels="index")
    >>> data.x.reshape(data.image_shape)[:, 0, 0].tolist(), data.y.tolist()
    ([0.0, 1.0, 1.0], [3])
    """
    return _load("cifar10", CIFAR10, read_cifar_folder, split, path, data_home, options)


def _load(
    name: str,
    source: Source,
    read_folder: Callable[[Path, str], Raw],
    split: str,
    path: str | os.PathLike[str] | None,
    data_home: str | os.PathLike[str] | None,
    options: Options,
) -> Dataset:
    check_choice("split", split, ("train", "test", "all"))
    resolved = resolve(TEN, **options)
    note = {"train": "training set", "test": "test set", "all": "training and test set"}[split]
    if path is None:
        return prepare(name, fetch(name, source, split, data_home), resolved, note)
    folder = Path(path).expanduser()
    if data_home is not None:
        raise fail("data_home", "be None when `path` is given", repr(data_home), "Local files are not cached.")
    if not folder.is_dir():
        what = "a file" if folder.exists() else "not there"
        advice = f"Without a path {name} is downloaded."
        raise fail("path", "be a folder", f"'{folder}', which is {what}", advice)
    raw = read_folder(folder, split)
    strange = np.setdiff1d(raw.labels, TEN)
    if strange.size:
        actual = f"'{folder}' with label {strange[0]}"
        raise fail("path", f"hold {name}, with labels from 0 to 9", actual, "Is it another data set?")
    return prepare(name, raw, resolved, note)
