"""Data sets by name, for studies and the command line."""

import inspect
from collections.abc import Callable

from gradflow._checks import check_choice
from gradflow.data._circle import circle
from gradflow.data._dataset import Dataset
from gradflow.data._embedded import digits, mnist_subset
from gradflow.data._images import cifar10, fashion_mnist, mnist
from gradflow.data._prepare import Options
from gradflow.data._xor import xor

LOADERS: dict[str, Callable[..., Dataset]] = {
    "digits": digits,
    "mnist-subset": mnist_subset,
    "mnist": mnist,
    "fashion-mnist": fashion_mnist,
    "cifar10": cifar10,
    "circle": circle,
    "xor": xor,
}


def names() -> list[str]:
    """The names that `load` knows; those that need no network come first.

    >>> import gradflow as gf
    >>> "digits" in gf.data.names()
    True
    """
    return list(LOADERS)


def load(name: str, **options: object) -> Dataset:
    """The data set called `name`, with hyphens or underscores.

    **Arguments**

    - `name`: one of `gradflow.data.names()`.
    - `**options`: those of the function of that name in `gradflow.data`.

    **Raises** `ValueError` for unknown names and options, and what that function raises.

    >>> import gradflow as gf
    >>> gf.data.load("digits", n=50, labels="index").y.shape
    (50,)
    """
    key = name.replace("_", "-")
    if key not in LOADERS:
        check_choice("name", name, names(), "Other data: build a `gradflow.data.Dataset`.")
    loader = LOADERS[key]
    accepted = _accepted(loader)
    for option in options:
        # Python would raise a TypeError; on a command line, a wrong option is a wrong value like any other.
        check_choice("options", option, accepted, f"These are the options of {key}.")
    return loader(**options)


def load_some(
    name: str, *, path: str | None = None, samples: int | None = None, at_most: int = 500, **options: object
) -> Dataset:
    """`load` without what is left open: `samples` of the data set, or as many as there are up to `at_most`.

    So a study of a large data set stays within minutes unless more of it is asked for.
    """
    chosen = options | ({} if path is None else {"path": path})
    if samples is not None:
        return load(name, n=samples, **chosen)
    dataset = load(name, **chosen)
    return dataset if len(dataset) <= at_most else load(name, n=at_most, **chosen)


def _accepted(loader: Callable[..., Dataset]) -> list[str]:
    accepted = []
    for name, parameter in inspect.signature(loader).parameters.items():
        accepted += list(Options.__annotations__) if parameter.kind is parameter.VAR_KEYWORD else [name]
    return accepted
