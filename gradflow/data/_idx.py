"""The idx files of MNIST: bytes 0, 0, type, number of axes; the sizes as big-endian 32-bit integers; the numbers.

Source: Y. LeCun, C. Cortes and C. J. C. Burges, *The MNIST database of handwritten digits*, description of the format.
"""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from gradflow._checks import fail
from gradflow.data._prepare import Raw

PREFIXES = {"train": ("train",), "test": ("t10k",), "all": ("train", "t10k")}
UNSIGNED_BYTE = 8


def read_idx_folder(folder: Path, split: str) -> Raw:
    """Images and labels of `split`, from files plain or compressed, with a hyphen or a dot before `idx`."""
    images, labels = [], []
    for prefix in PREFIXES[split]:
        image_file, label_file = (
            _find(folder, f"{prefix}-images-idx3-ubyte"),
            _find(folder, f"{prefix}-labels-idx1-ubyte"),
        )
        images.append(read_idx(image_file, axes=3))
        labels.append(read_idx(label_file, axes=1))
        if len(images[-1]) != len(labels[-1]):
            actual = f"{len(images[-1])} in `{image_file.name}`, {len(labels[-1])} in `{label_file.name}`"
            raise fail("path", "hold as many images as labels", actual, "Take both files from one source.")
    shapes = {image.shape[1:] for image in images}
    if len(shapes) > 1:
        raise fail("path", "hold images of one size", f"a folder with sizes {sorted(shapes)}", "Load the splits apart.")
    pixels = np.concatenate(images)
    return Raw(pixels.reshape(len(pixels), -1), np.concatenate(labels).astype(np.int64), pixels.shape[1:], 255)


def read_idx(file: Path, axes: int) -> np.ndarray:
    """The array of unsigned bytes with `axes` axes that an idx file holds."""
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise _corrupt(file, f"cannot be decompressed ({error})") from error
    start = 4 + 4 * axes
    if len(content) < start:
        raise _corrupt(file, f"ends within its header, after {len(content)} of {start} bytes")
    if content[:4] != bytes([0, 0, UNSIGNED_BYTE, axes]):
        raise _corrupt(file, f"starts with bytes {list(content[:4])} instead of {[0, 0, UNSIGNED_BYTE, axes]}")
    sizes = struct.unpack(f">{axes}I", content[4:start])
    if len(content) - start != math.prod(sizes) or not math.prod(sizes):
        listed = " x ".join(str(size) for size in sizes)
        raise _corrupt(file, f"promises {listed} bytes in its header, but holds {len(content) - start}")
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(sizes)


def _find(folder: Path, name: str) -> Path:
    dotted = name.replace("-idx", ".idx")
    for candidate in (name, dotted, f"{name}.gz", f"{dotted}.gz"):
        if (folder / candidate).is_file():
            return folder / candidate
    must = f"hold the file `{name}`, or `{dotted}`, or either with .gz"
    raise fail("path", must, f"'{folder}', which does not", "Give the folder that holds the files themselves.")


def _corrupt(file: Path, what: str) -> ValueError:
    return fail("path", "hold whole idx files", f"a folder whose `{file.name}` {what}", "Obtain the file again.")
