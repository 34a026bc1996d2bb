"""How far a computation is, on standard error: a bar in a terminal or a notebook, a line now and then elsewhere."""

import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdm import tqdm

EVERY = 30.0
"""Seconds between two lines, where there is no terminal: a log shall not fill with bars."""


class Bar:
    """Progress towards a total, which may not be known. A context, so that it is closed whatever happens.

    `show=False` shows nothing. Colours are not used.
    """

    def __init__(
        self, title: str, total: float | int | None, *, unit: str = "", done: float | int = 0, show: bool = True
    ):
        self._title, self._total, self._unit, self._done = title, total, unit, done
        self._remark, self._began, self._said = "", time.monotonic(), time.monotonic()
        self._bar = _tqdm(title, total, unit, done) if show and _is_watched() else None
        self._lines = show and self._bar is None

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def advance(self, by: float | int = 1, remark: str = "") -> None:
        """Adds to what is done."""
        self.reach(self._done + by, remark)

    def reach(self, done: float | int, remark: str = "", total: float | int | None = None) -> None:
        """Sets what is done, and the total once it is known."""
        self._total = self._total if total is None else total
        if self._bar is not None:
            self._bar.total = self._total
            if remark:
                self._bar.set_postfix_str(remark, refresh=False)
            self._bar.update(done - self._done)
        self._done, self._remark = done, remark
        if self._lines and time.monotonic() - self._said >= EVERY:
            self._say()

    def write(self, text: str) -> None:
        """A line of its own."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        elif self._lines:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _say(self) -> None:
        self._said = time.monotonic()
        of = f"{self._done:.0f} {self._unit}".strip()
        if self._total:
            whole = f"{100 * self._done / self._total:.0f} %"
            of = whole if self._unit == "%" else f"{self._done:.0f} of {self._total:.0f} {self._unit}, {whole}"
        parts = [of, self._remark, f"{self._said - self._began:.0f} s"]
        print(f"{self._title}: {', '.join(part for part in parts if part)}", file=sys.stderr, flush=True)


def _is_watched() -> bool:
    """Whether a bar that is drawn over itself can be read where standard error goes."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


def _tqdm(title: str, total: float | int | None, unit: str, done: float | int) -> "tqdm":
    from tqdm import tqdm

    if unit == "%":
        form = "{desc} {percentage:3.0f} % |{bar}| {elapsed}<{remaining}{postfix}"
        return tqdm(total=total, desc=title, unit=unit, initial=done, bar_format=form)
    return tqdm(total=total, desc=title, unit=unit, initial=done)
