"""The data set that a command line names, for each kind of study."""

from typing import Any


def load(name: str, path: str | None, samples: int | None, **options: Any) -> Any:
    """The data set; without a wish at most 500 samples of it, so that a study stays within minutes."""
    from gradflow import data

    chosen = options | ({} if path is None else {"path": path})
    if samples is not None:
        return data.load(name, n=samples, **chosen)
    found = data.load(name, **chosen)
    return found if len(found) <= 500 else data.load(name, n=500, **chosen)


def small_data(name: str, path: str | None, samples: int | None, classes: tuple[int, int] | None) -> Any:
    """Data for vanishing initialisation: images of two classes or of all, or made."""
    from gradflow import data

    if name == "teacher":
        return data.gaussian_teacher(100 if samples is None else samples, 10, 3)
    if name == "orthogonal":
        count = 8 if samples is None else samples
        return data.orthogonal_inputs(count, count)
    kind = {"classes": classes, "labels": "pm1"} if classes is not None else {"labels": "onehot"}
    return load(name, path, samples, centre=True, unit_norm=True, **kind)


def planar_data(name: str, path: str | None, samples: int | None, classes: tuple[int, int]) -> Any:
    """Inputs of two entries: points on a line beside a constant, or two principal components of a data set."""
    import numpy as np

    from gradflow.data import Dataset

    if name == "sine":
        line = np.linspace(-1, 1, 20 if samples is None else samples)
        return Dataset(np.stack([line, np.ones_like(line)], axis=1), np.sin(np.pi * line), name="sine")
    found = load(name, path, 100 if samples is None else samples, classes=classes, centre=True, labels="pm1")
    x = np.asarray(found.x, float).reshape(len(found), -1)
    parts = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)
    projected = parts[0][:, :2] * parts[1][:2]
    return Dataset(projected / np.abs(projected).max(), np.asarray(found.y, float), name=f"{name}, two components")
