"""From raw images and labels to a `Dataset`: choice of classes and samples, centring, norm, targets.

Options are resolved before anything is read, so that a mistyped label does not cost a download.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple, TypedDict

import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Bool, Int, Shaped

from gradflow._checks import check_choice, check_count, fail
from gradflow.data._dataset import Dataset, float_dtype


class Options(TypedDict, total=False):
    """What every image data set can be asked for, as keyword arguments.

    - `classes`: labels to keep; in that order they become class 0, 1, .... `None` (default) keeps all.
    - `n`: number of samples, drawn at random and as equally from all classes as there are samples (a remainder goes to
      the first classes); the samples stay in their original order. Subsets of one `seed` are nested: `n=100` lies
      within `n=200`. `None` (default) keeps all.
    - `centre`: subtract the mean sample of those chosen (default `False`).
    - `unit_norm`: divide each sample by its Euclidean norm, after centring (default `False`).
    - `labels`: `"onehot"` (default): `(n, k)` of zeros and ones; `"pm1"`: `(n,)`, first class +1, second -1;
      `"index"`: `(n,)` int32 positions in `classes`.
    - `seed`: of the choice of samples (default 0).
    - `dtype`: float32 or float64; `None` (default) is float64 if JAX has 64-bit types enabled, float32 otherwise.

    >>> import gradflow as gf
    >>> options: gf.data.Options = {"classes": (3, 8), "n": 20, "labels": "pm1"}
    >>> gf.data.digits(**options).x.shape
    (20, 64)
    """

    classes: Iterable[int] | None
    n: int | None
    centre: bool
    unit_norm: bool
    labels: str
    seed: int
    dtype: DTypeLike | None


class Resolved(NamedTuple):
    """Options after checking, with the defaults filled in."""

    classes: tuple[int, ...]
    chosen: bool  # whether the classes were named by the caller
    n: int | None
    centre: bool
    unit_norm: bool
    labels: str
    seed: int
    dtype: np.dtype


class Raw(NamedTuple):
    """Images as read: integer pixels from 0 to `white`."""

    pixels: Shaped[np.ndarray, "n d"]
    labels: Int[np.ndarray, " n"]
    image_shape: tuple[int, ...]
    white: int


def resolve(
    available: tuple[int, ...],
    *,
    classes: Any = None,
    n: Any = None,
    centre: object = False,
    unit_norm: object = False,
    labels: Any = "onehot",
    seed: Any = 0,
    dtype: object = None,
) -> Resolved:
    """Checks `Options`, of any type, against the labels `known` of a data set."""
    chosen = available if classes is None else _check_classes(classes, available)
    if n is not None:
        check_count("n", n, advice="Leave it out for all samples.")
    for name, value in (("centre", centre), ("unit_norm", unit_norm)):
        if not isinstance(value, bool | np.bool_):
            raise fail(name, "be True or False", repr(value))
    check_choice("labels", labels, ("onehot", "pm1", "index"))
    if labels == "pm1" and len(chosen) != 2:
        must = "be 'onehot' or 'index' unless there are exactly two classes"
        raise fail("labels", must, f"'pm1' with {len(chosen)}", "Name two, such as classes=(0, 1).")
    check_count("seed", seed, least=0)
    return Resolved(
        chosen, classes is not None, n, bool(centre), bool(unit_norm), labels, int(seed), float_dtype(dtype)
    )


def prepare(name: str, raw: Raw, options: Resolved, note: str = "") -> Dataset:
    """Chooses, scales, centres and normalises; `note` comes first in the description."""
    index = np.full(len(raw.labels), -1)
    for position, label in enumerate(options.classes):
        index[raw.labels == label] = position
        if options.chosen and position not in index:
            actual = f"{options.classes}, and no sample has label {label}"
            raise fail("classes", "be labels that occur", actual)
    keep = np.flatnonzero(index >= 0)
    if options.n is not None:
        keep = keep[_balanced(index[keep], options)]
    x, steps = _inputs(raw.pixels[keep], raw.labels[keep], raw.white, options)
    y, encoding = _targets(index[keep], options)
    if options.n is not None:
        steps.append(f"{len(keep)} samples balanced over classes (seed {options.seed})")
    description = "; ".join([*([note] if note else []), *steps, encoding])
    return Dataset(x, y, name, options.classes, description, raw.image_shape)


def _check_classes(classes: Any, available: tuple[int, ...]) -> tuple[int, ...]:
    listed = ", ".join(str(label) for label in available)
    must = f"be a sequence of distinct labels among {listed}"
    try:
        chosen = tuple(classes)
    except TypeError:
        raise fail("classes", must, repr(classes), "Write (0,) for a single class.") from None
    if not chosen:
        raise fail("classes", must, "empty", "Leave it out for all classes.")
    for label in chosen:
        # True and 1.0 compare equal to 1, but are not labels.
        if isinstance(label, bool) or not isinstance(label, int | np.integer) or label not in available:
            raise fail("classes", must, f"{chosen}, of which {label!r} is none")
    if len(set(chosen)) < len(chosen):
        raise fail("classes", must, repr(classes), "Name each label once.")
    return tuple(int(label) for label in chosen)


def _balanced(index: Int[np.ndarray, " m"], options: Resolved) -> Int[np.ndarray, " n"]:
    """Positions of `n` samples, as equally from all classes as possible, in increasing order."""
    assert options.n is not None
    if options.n > len(index):
        raise fail(
            "n", f"be at most {len(index)}, the samples there are", str(options.n), "Leave it out for all of them."
        )
    rank = np.empty(len(index), dtype=np.int64)
    for position, label in enumerate(options.classes):
        members = np.flatnonzero(index == position)
        # One stream per label: which zeros are drawn does not depend on the company they keep.
        rank[members] = np.random.default_rng((options.seed, label)).permutation(len(members))
    # Everyone's first, then everyone's second, ...: balanced for every n, and nested.
    return np.sort(np.lexsort((index, rank))[: options.n])


def _inputs(
    pixels: Shaped[np.ndarray, "n d"], labels: Int[np.ndarray, " n"], white: int, options: Resolved
) -> tuple[np.ndarray, list[str]]:
    x = pixels.astype(options.dtype)
    x /= white
    steps = [f"pixels / {white}"]
    # Sums run in float64 so that the mean of many float32 samples is not spoilt by rounding.
    norms = _norms(x) if options.unit_norm else None
    if options.centre:
        x -= np.mean(x, axis=0, dtype=np.float64).astype(options.dtype)
        steps.append("mean subtracted")
    if norms is not None:
        centred = _norms(x)
        # A sample equal to the mean leaves rounding errors, which must not be blown up to norm one.
        zero: Bool[np.ndarray, " n"] = centred <= 16 * np.finfo(options.dtype).eps * norms
        if zero.any():
            first = int(np.flatnonzero(zero)[0])
            when = " after centring" if options.centre else ""
            actual = f"True with sample {first} (label {labels[first]}) zero{when}"
            raise fail("unit_norm", "be False when a sample is zero", actual, "Choose other samples.")
        x /= centred[:, None].astype(options.dtype)
        steps.append("unit norm")
    return x, steps


def _norms(x: Shaped[np.ndarray, "n d"]) -> np.ndarray:
    return np.sqrt(np.sum(np.square(x), axis=1, dtype=np.float64))


def _targets(index: Int[np.ndarray, " n"], options: Resolved) -> tuple[np.ndarray, str]:
    if options.labels == "index":
        return index.astype(np.int32), "targets are class indices"
    if options.labels == "pm1":
        return np.where(index == 0, 1, -1).astype(options.dtype), "targets +1, -1"
    onehot = index[:, None] == np.arange(len(options.classes))
    return onehot.astype(options.dtype), "targets one-hot"
