"""`report`: one page of a study, a sweep or a run."""

import os
import pathlib

import xarray as xr

from gradflow._checks import fail, is_concrete
from gradflow._solution import Solution, load
from gradflow.reports._dataset import dataset_page
from gradflow.reports._run import run_page
from gradflow.stores._zarr_group import check_writable, open_store

Source = xr.Dataset | Solution | str | os.PathLike[str]


def report(source: Source, path: str | os.PathLike[str]) -> pathlib.Path:
    """Writes one self-contained page of HTML: question, command, figure, results, failures, cost, versions.

    The page opens without a network, on a phone and in the dark, and can be sent as it is. Numbers have their errors
    beside them: standard errors over seeds, errors that runs estimate, drifts of what the exact flow conserves. Every
    run that failed or has not been run yet is listed with what its status means and what helps.

    **Arguments**: `source`: what a study or `gradflow.sweep` returned, or a `Solution`; or the path of a store, or of a
    file that `Solution.save` wrote. `path`: the file to write, `.html`.

    **Returns** the path. **Raises** `ValueError` for another ending, a path that cannot be written, a `source` of
    another kind, and a `Solution` that is traced.

    >>> import gradflow as gf, jax.numpy as jnp, pathlib, tempfile
    >>> rule = gf.GradientDescent(lambda w: 0.5 * w**2, learning_rate=0.1)
    >>> ds = gf.compare(rule, jnp.array(1.0), [0.2, 0.1], 1.0, rtol=1e-5)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     text = gf.report(ds, pathlib.Path(folder) / "gap.html").read_text()
    >>> "How far is a discrete rule from its flow" in text, "<svg" in text, "http" in text
    (True, True, False)
    """
    target = pathlib.Path(path)
    if target.suffix.lower() not in (".html", ".htm"):
        raise fail("path", "end with .html", repr(str(target)))
    check_writable("path", target)
    result = source
    if isinstance(source, str | os.PathLike):
        result = load(source) if pathlib.Path(source).is_file() else open_store(source)
    if isinstance(result, Solution):
        if not is_concrete(result):
            raise fail("source", "be concrete", "traced", "Write reports outside of jax.jit and jax.vmap.")
        text = run_page(result)
    elif isinstance(result, xr.Dataset):
        text = dataset_page(result)
    else:
        must = "be a data set of a study or a sweep, a Solution, or the path of a store"
        raise fail("source", must, f"of type {type(result).__name__}")
    target.write_text(text, encoding="utf-8")
    return target
