"""jaxdistill: knowledge distillation in JAX, correct, fast, and able to say why a run fails."""

import errno
import sys
from collections.abc import Callable

__version__ = "0.1.0"


class UserError(ValueError):
    """A mistake of the user's, not of the program's: one line that names the key or file, what was
    found and what would be accepted. The commands print that line alone and exit with 2."""


def command(body: Callable[[], int | None]) -> None:
    """Runs a command's body and exits with its code; a UserError, or a disk that is full or read-only, is one line
    on stderr and exit code 2."""
    full = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}
    try:
        sys.exit(body() or 0)
    except UserError as error:
        line = str(error)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in full:
            line = f"{error.filename or 'disk'}: {error.strerror}; accepted: a folder that can be written, with room in it"
        elif "No space left on device" in str(error):  # as orbax and tensorstore report it
            line = "checkpoint: No space left on device; accepted: a --workdir with room in it"
        else:
            raise
    print(f"error: {' '.join(line.split())}", file=sys.stderr)
    sys.exit(2)
