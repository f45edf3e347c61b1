"""What is derived from a corpus (a trained tokenizer, token ids) is kept on disk, named by the hash of its inputs.

A cache may only ever save time: an entry that cannot be read is made again, a folder that cannot be written is done
without, and an entry appears under its name whole (temporary file, then rename), also when several processes make it.
"""

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
    try:
        with open(path, "rb") as file:
            return read(file)
    except FileNotFoundError:
        pass
    except Exception as error:  # a damaged file may raise anything (zip, JSON, Rust): whatever it is, the cure is the same
        logger.warning("cache entry %s is unreadable (%s); it is made again", path, error)
    value = make()
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
