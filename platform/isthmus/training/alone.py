"""One driver at a time in a run's folder: two would write the same checkpoints and delete each other's."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from isthmus import storage
from isthmus.errors import ConfigError

LOCK = "driver.lock"


@contextlib.contextmanager
def alone_in(folder: str) -> Iterator[None]:
    """Hold ``folder`` for the block. The system lets go of it when the process ends, however it ends.

    Only for folders of this machine's file system: an object store has no locks, and no two drivers may be pointed at
    one run there.

    Raises:
        ConfigError: another process holds it.
        StorageError: nothing can be written there.
    """
    if not storage.is_local(folder):
        yield
        return
    storage.ensure_writable(folder)
    file = Path(storage.local_path(folder)) / LOCK
    with file.open("a+", encoding="utf-8") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held.seek(0)
            who = held.read().strip() or "another process"
            raise ConfigError(
                f"The run in {folder} is being trained by {who}.",
                "Wait for it, stop it, or give this run another name.",
            ) from None
        except OSError:  # a file system without locks
            yield
            return
        held.truncate(0)
        held.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        held.flush()
        yield
