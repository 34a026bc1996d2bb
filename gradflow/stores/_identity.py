"""What a store keeps of the computation whose results it holds."""

import hashlib
import json
from typing import Any, NamedTuple

import numpy as np

VERSION = 1
"""Of what is kept."""


class Identity(NamedTuple):
    """`record` goes into a store as text; `sketches (members, parts, 2)` as an array."""

    record: dict[str, Any]
    sketches: np.ndarray

    @property
    def tag(self) -> str:
        """A hash for what is good only where not even a bit differs: members in flight."""
        text = json.dumps({name: value for name, value in self.record.items() if name != "probes"})
        return hashlib.sha256(text.encode()).hexdigest()
