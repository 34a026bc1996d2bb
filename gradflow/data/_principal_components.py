"""The first principal components of a data set, for studies of few input dimensions."""

import dataclasses

import numpy as np

from gradflow._checks import check_count, fail
from gradflow.data._dataset import Dataset


def principal_components(dataset: Dataset, count: int = 2) -> Dataset:
    """A data set projected on its first principal components.

    The largest entry of the result has absolute value one. Targets stay what they are.

    **Arguments**: `dataset`: inputs `(n, d)`. `count`: of components, at most `n` and `d`.

    **Returns** a `Dataset` with inputs `(n, count)`.

    **Raises** `ValueError` for a `count` below one or above the number of components.

    >>> import gradflow as gf
    >>> gf.data.principal_components(gf.data.digits(n=40, labels="index")).x.shape
    (40, 2)
    """
    check_count("count", count)
    x = np.asarray(dataset.x, float)
    if count > min(x.shape):
        raise fail("count", f"be at most {min(x.shape)}, the number of components", str(count))
    rows, sizes, _ = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)
    projected = rows[:, :count] * sizes[:count]
    return dataclasses.replace(
        dataset,
        x=(projected / np.abs(projected).max()).astype(dataset.x.dtype),
        name=f"{dataset.name}, {count} components",
        description="; ".join(part for part in (dataset.description, f"{count} principal components") if part),
        image_shape=None,
        teacher=None,
    )
