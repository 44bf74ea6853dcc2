"""lock.py — one writer a folder: a second program that wants to write there is refused."""

import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import InputError
from common.files import explain_os_errors

log = logging.getLogger(__name__)

LOCK = "lock"


@contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """Hold the lock file `path` and make its folder. Raises InputError if another program holds it.

    The system frees the lock when this process ends, however it ends.
    """
    with explain_os_errors(path, "a file to write"):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab+", buffering=0)
    with file:
        try:
            # Not flock: forked workers would inherit it and hold it after their parent's death.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            holder = file.read(99).decode(errors="replace")
            raise InputError(f"{path.parent}: another run writes there ({holder})") from error
        except OSError as error:
            log.warning("%s: has no locks (%s); start no second run", path.parent, error.strerror)
        with explain_os_errors(path, "a file to write"):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
