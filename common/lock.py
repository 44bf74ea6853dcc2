"""locking.py — one writer: of two programs that would write into the same folder one is refused."""

import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import InputError, require
from common.files import explain_os_errors, require_regular_file

log = logging.getLogger(__name__)

LOCK = "lock"


@contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """Hold a lock file: a second program that wants to write beside it is refused.

    Raises InputError. The lock ends with its process, however that ends, and loader workers have
    no part in it.
    """
    check_own(path)
    with explain_os_errors(path, "a file to write"):
        file = path.open("ab+", buffering=0)
    with file:
        try:
            # not flock, which a worker would inherit and hold after its parent's death
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            said = file.read(99).decode(errors="replace")
            raise InputError(f"{path.parent}: another run writes there ({said})") from error
        except OSError as error:
            reason = error.strerror
            log.warning("%s: has no locks (%s); start no second run there", path.parent, reason)
        with explain_os_errors(path, "a file to write"):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield


def check_own(path: Path) -> None:
    """Raise InputError where a file that is written in place is there, and is another's, too."""
    with explain_os_errors(path, "a file to write"):
        if os.path.lexists(path):
            require(not path.is_symlink(), f"{path}: is a link; expected a file")
            require_regular_file(path, "a file to write")
            alone = path.stat().st_nlink == 1
            require(alone, f"{path}: is a link; expected a file of its own")
