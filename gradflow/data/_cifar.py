"""The files of CIFAR-10: Python batches (pickled dictionaries) or binary batches (a label byte, then 3072 pixels).

Source: A. Krizhevsky (2009), *Learning multiple layers of features from tiny images*.
"""

import pickle
from pathlib import Path

import numpy as np

from gradflow._checks import fail
from gradflow.data._prepare import Raw

SHAPE = (3, 32, 32)
PIXELS = 3072
TRAIN = tuple(f"data_batch_{number}" for number in range(1, 6))
BATCHES = {"train": TRAIN, "test": ("test_batch",), "all": (*TRAIN, "test_batch")}


def read_cifar_folder(folder: Path, split: str) -> Raw:
    """Images and labels of `split`; each batch may be `name` (Python version) or `name.bin` (binary version)."""
    parts = [_read_batch(folder, name) for name in BATCHES[split]]
    pixels, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return Raw(pixels, labels.astype(np.int64), SHAPE, 255)


def _read_batch(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    if (folder / name).is_file():
        return _read_pickle(folder / name)
    if (folder / f"{name}.bin").is_file():
        return _read_binary(folder / f"{name}.bin")
    advice = "Give the folder that holds the batches themselves, often `cifar-10-batches-py`."
    raise fail("path", f"hold the file `{name}` or `{name}.bin`", f"'{folder}', which does not", advice)


def _read_binary(file: Path) -> tuple[np.ndarray, np.ndarray]:
    content = np.fromfile(file, dtype=np.uint8)
    if len(content) == 0 or len(content) % (1 + PIXELS):
        raise _corrupt(file, f"has {len(content)} bytes, not a multiple of {1 + PIXELS}")
    records = content.reshape(-1, 1 + PIXELS)
    return records[:, 1:], records[:, 0]


def _read_pickle(file: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        with file.open("rb") as stream:
            # Batches were written by Python 2, whose strings are bytes.
            batch = _Unpickler(stream, encoding="bytes").load()
    except OSError:
        raise
    except Exception as error:  # a damaged pickle may raise anything
        raise _corrupt(file, f"cannot be read ({error})") from error
    if not isinstance(batch, dict):
        raise _corrupt(file, f"holds a {type(batch).__name__} instead of a dictionary")
    entries = {key.decode("latin1") if isinstance(key, bytes) else key: value for key, value in batch.items()}
    pixels, labels = entries.get("data"), entries.get("labels")
    if (
        not isinstance(pixels, np.ndarray)
        or pixels.dtype != np.uint8
        or pixels.shape[1:] != (PIXELS,)
        or not len(pixels)
    ):
        raise _corrupt(file, f"lacks an entry `data` of bytes, of shape (n, {PIXELS})")
    if not _is_label_list(labels, len(pixels)):
        raise _corrupt(file, f"lacks an entry `labels` of {len(pixels)} integers")
    return pixels, np.asarray(labels)


def _is_label_list(labels: object, count: int) -> bool:
    if isinstance(labels, np.ndarray):
        return labels.shape == (count,) and labels.dtype.kind in "iu"
    return isinstance(labels, list) and len(labels) == count and all(type(label) is int for label in labels)


class _Unpickler(pickle.Unpickler):
    """Reads NumPy arrays and built-in containers; refuses every other name, since calling it could run anything."""

    def find_class(self, module_name: str, global_name: str, /) -> object:
        allowed = {
            ("numpy", "ndarray"): np.ndarray,
            # Python 2 wrote `dtype('u1', 0, 1)`, and NumPy 2.4.0 to 2.4.4 warn of flags that are not booleans. A new
            # function each time: a pickle can set attributes on any object it is given.
            ("numpy", "dtype"): lambda code, align=False, copy=False: np.dtype(
                code, align=bool(align), copy=bool(copy)
            ),
            # Protocols up to 2 write bytes as `encode(text, "latin1")`, which is `bytes(text, "latin1")`.
            ("_codecs", "encode"): bytes,
        }
        for package in ("numpy.core", "numpy._core"):
            # Old and new homes of what rebuilds an array, asked of an array rather than imported from private modules.
            allowed[f"{package}.multiarray", "_reconstruct"] = np.empty(0).__reduce__()[0]
            allowed[f"{package}.numeric", "_frombuffer"] = np.empty(1).__reduce_ex__(5)[0]
        for package in ("builtins", "__builtin__"):
            for builtin in (set, frozenset, bytes, bytearray):
                allowed[package, builtin.__name__] = builtin
        if (module_name, global_name) not in allowed:
            raise pickle.UnpicklingError(
                f"it asks for `{module_name}.{global_name}`, which a batch of images never needs"
            )
        return allowed[module_name, global_name]


def _corrupt(file: Path, what: str) -> ValueError:
    advice = "Obtain the file again from its authors."
    return fail("path", "hold whole CIFAR-10 batches", f"a folder whose `{file.name}` {what}", advice)
