"""One process at a time: a lock that names its holder and that the end of the holder, however it comes, releases."""

import contextlib
import datetime
import json
import os
import pathlib
import platform
from typing import TextIO

from gradflow._checks import fail

if os.name == "posix":
    import fcntl
else:
    fcntl = None


class StoreLock:
    """A lock on a store, in a file beside it. The operating system gives it back when its process ends.

    Where there are no such locks (Windows, some network file systems) nothing is locked.

    **Raises** `ValueError`, with the host and the number of the process that holds it.
    """

    def __init__(self, store: pathlib.Path, file: pathlib.Path):
        self._path = file
        self._file = _opened(store, file)

    def release(self) -> None:
        """Gives the lock back, and leaves nothing behind."""
        if not self._file.closed:
            # Before it is given back: whoever waits for this file finds that it has gone, and makes another.
            self._path.unlink(missing_ok=True)
            self._file.close()
            with contextlib.suppress(OSError):  # others may keep something there
                self._path.parent.rmdir()


def _opened(store: pathlib.Path, path: pathlib.Path) -> TextIO:
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = path.open("a+")
        except FileNotFoundError:  # the process before has removed the folder in the meantime
            continue
        try:
            _lock(file)
        except BlockingIOError:
            file.seek(0)
            holder = _read(file.read())
            file.close()
            advice = "Wait for its end or stop it; gradflow.sweeps.open_store reads the store meanwhile."
            raise fail(
                "store", "be written by one process at a time", f"{str(store)!r}, which {holder}", advice
            ) from None
        try:
            current = os.fstat(file.fileno()).st_ino == path.stat().st_ino
        except FileNotFoundError:
            current = False
        if current:
            break
        file.close()  # the process before has removed it
    file.truncate(0)
    since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    file.write(json.dumps({"host": platform.node(), "process": os.getpid(), "since": since}))
    file.flush()
    return file


def _lock(file: TextIO) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # a file system without locks
        return


def _read(text: str) -> str:
    try:
        holder = json.loads(text)
        return f"process {holder['process']} on {holder['host']} has been writing since {holder['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process is writing"
