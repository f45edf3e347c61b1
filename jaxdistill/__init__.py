"""jaxdistill: knowledge distillation in JAX, correct, fast, and able to say why a run fails."""

import errno
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

__version__ = "0.1.0"
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}
NO_SPACE = "No space left on device"


class UserError(ValueError):
    """A mistake of the user's, not of the program's: one line that names the key or file, what was
    found and what would be accepted. The commands print that line alone and exit with 2."""


def read_json(path: Path, accepted: str = "the file as it was written") -> dict:
    """The JSON object in a file. Raises UserError: it cannot be read, or holds anything else."""
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; accepted: {accepted}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({' '.join(str(error).split())}); accepted: {accepted}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: found a JSON {type(found).__name__}; accepted: {accepted}")
    return found


def worded(error: BaseException) -> str | None:
    """The one line for what is not the program's fault: a UserError, a disk that is full or read-only, a device without enough
    memory; None for anything else."""
    text = str(error)
    if isinstance(error, UserError):
        line = text
    elif isinstance(error, OSError) and error.errno in FULL:
        line = f"{error.filename or 'disk'}: {error.strerror}; accepted: a folder that can be written, with room in it"
    elif isinstance(error, Exception) and NO_SPACE in text:  # as orbax and tensorstore report it
        line = "workdir: No space left on device; accepted: one with room in it (what is done there is kept: the same command goes on)"
    elif isinstance(error, Exception) and "RESOURCE_EXHAUSTED" in text:  # as XLA reports an allocation that failed
        line = (f"device memory: {text.splitlines()[0]}; accepted: a smaller train.batch or data.length, a larger "
                "train.micro, or remat (--dry_run predicts what a step needs)")
    else:
        return None
    return " ".join(line.split())


def command(body: Callable[[], int | None]) -> None:
    """Runs a command's body and exits with its code; what `worded` has a line for is that line on stderr, and exit code 2."""
    try:
        code = body() or 0
        sys.stdout.flush()
        sys.exit(code)
    except BrokenPipeError:  # whoever reads has read enough (| head): not an error, and nothing more to print
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(0)
    except Exception as error:
        line = worded(error)
        if line is None:
            raise
        quiet = NO_SPACE in str(error)
    print(f"error: {line}", file=sys.stderr)
    if quiet:
        sys.stderr = io.StringIO()  # a checkpoint's other writes still fail in their threads, each with a traceback
    sys.exit(2)
