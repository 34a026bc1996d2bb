"""What studies pass on to their sweeps."""

from typing import TypedDict


class SweepOptions(TypedDict):
    """Options of `gradflow.sweep` by their names there, as far as all sweeps of a study share them."""

    rtol: float
    resume: bool
    progress: bool
