"""One process at a time: whoever else would write the same files is told so."""

import contextlib
import fcntl
from pathlib import Path

from jaxdistill import UserError


@contextlib.contextmanager
def only_writer(lock: Path, what: str):
    """Refuses a second process that would write `what`, until the first is done or dead (the file `lock` stays). Where files cannot be
    locked it does not."""
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("w")
    except OSError as error:
        raise UserError(f"{lock.parent}: {error.strerror}; accepted: a folder that can be written") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{what}: another process is writing it; accepted: one at a time") from None
        except OSError:
            pass
        yield
