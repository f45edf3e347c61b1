"""jaxdistill: knowledge distillation in JAX, correct, fast, and able to say why a run fails."""

import errno
import io
import sys
from collections.abc import Callable

__version__ = "0.1.0"


class UserError(ValueError):
    """A mistake of the user's, not of the program's: one line that names the key or file, what was
    found and what would be accepted. The commands print that line alone and exit with 2."""


def command(body: Callable[[], int | None]) -> None:
    """Runs a command's body and exits with its code; a UserError, a disk that is full or read-only, or a device without
    enough memory is one line on stderr and exit code 2."""
    full = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}
    quiet = False
    try:
        sys.exit(body() or 0)
    except UserError as error:
        line = str(error)
    except Exception as error:
        quiet = "No space left on device" in str(error)
        if isinstance(error, OSError) and error.errno in full:
            line = f"{error.filename or 'disk'}: {error.strerror}; accepted: a folder that can be written, with room in it"
        elif quiet:  # as orbax and tensorstore report it
            line = "workdir: No space left on device; accepted: one with room in it (what is done there is kept: the same command goes on)"
        elif "RESOURCE_EXHAUSTED" in str(error):  # as XLA reports an allocation that failed
            line = (f"device memory: {str(error).splitlines()[0]}; accepted: a smaller train.batch or data.length, a larger "
                    "train.micro, or remat (--dry_run predicts what a step needs)")
        else:
            raise
    print(f"error: {' '.join(line.split())}", file=sys.stderr)
    if quiet:
        sys.stderr = io.StringIO()  # a checkpoint's other writes still fail in their threads, each with a traceback
    sys.exit(2)
