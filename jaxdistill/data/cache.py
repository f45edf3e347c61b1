"""What is derived from a corpus (a trained tokenizer, token ids) is kept on disk, named by the hash of its inputs.

A cache may only ever save time: an entry that cannot be read is made again, a folder that cannot be written is done
without, and an entry appears under its name whole (temporary file, then rename). Of several processes that want it one makes it.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import pathlib
import tempfile

logger = logging.getLogger(__name__)


def folder() -> pathlib.Path:
    """`$XDG_CACHE_HOME/jaxdistill`, by default `~/.cache/jaxdistill`."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return pathlib.Path(base) / "jaxdistill"


def key(*parts) -> str:
    """SHA-256 over the parts' text; each is preceded by its length, so that ("ab", "c") is not ("a", "bc")."""
    digest = hashlib.sha256()
    for part in parts:
        part = part if isinstance(part, bytes) else str(part).encode()
        digest.update(b"%d:" % len(part) + part)
    return digest.hexdigest()


def cached(name: str, *, make, read, write):
    """The entry `name`, read by `read(file)`, or else the value of `make()`, kept by `write(value, file)`."""
    path = folder() / name
    damaged = path.exists()  # if it cannot be read
    if found := _found(path, read):
        return found[0]
    with _alone(path):
        if not damaged and (found := _found(path, read)):  # made by another process, meanwhile
            return found[0]
        return _kept(path, make(), write)


def _found(path: pathlib.Path, read) -> tuple:
    """(the entry's value,), or () where there is none that can be read."""
    try:
        with open(path, "rb") as file:
            return (read(file),)
    except FileNotFoundError:
        pass
    except Exception as error:  # a damaged file may raise anything (zip, JSON, Rust): whatever it is, the cure is the same
        logger.warning("cache entry %s is unreadable (%s); it is made again", path, error)
    return ()


@contextlib.contextmanager
def _alone(path: pathlib.Path):
    """Waits until no other process makes the entry `path`. Where files cannot be locked it does not: what is made twice is the same."""
    name = path.with_name(f".{path.name}.lock")
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(open(name, "wb"))  # (the system frees it when a process dies)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        with contextlib.suppress(OSError):
            name.unlink(missing_ok=True)


def _kept(path: pathlib.Path, value, write):
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
            temporary = file.name
            write(value, file)
        os.replace(temporary, path)
    except OSError as error:
        logger.warning("nothing is cached in %s: %s", path.parent, error)
        if temporary:
            pathlib.Path(temporary).unlink(missing_ok=True)
    return value
