"""Where text comes from: five sources, each an iterator of (name, text), one document at a time, in a fixed order.

Text is kept byte for byte (no newline translation, no stripping), since results are reported in bits per UTF-8 byte.
Documents without a single byte are left out and counted: there is nothing in them to predict.
"""

import collections
import contextlib
import glob
import json
import os
import sysconfig
from collections.abc import Iterator

from jaxdistill import UserError

SUFFIXES = {
    "files": (".txt", ".text", ".md", ".rst", ".tex", ".html", ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".rs", ".go")
    + (".java", ".js", ".ts", ".sh", ".sql", ".r", ".jl", ".toml", ".yaml", ".yml"),
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "parquet": (".parquet",),
}
NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def documents(config, counts: collections.Counter | None = None) -> Iterator[tuple[str, str]]:
    """Yields (name, text) for every non-empty document of `config.source`, in a deterministic order.

    Args:
      config: has `source`, `path`, `field`, `invalid_utf8` (see `text.TextConfig`).
      counts: counts "skipped" (undecodable files of the standard library, null rows), "replaced" (documents whose
        invalid UTF-8 became U+FFFD) and "empty" are added to it.

    Raises:
      UserError: missing path, no file of the kind, malformed line, missing field, invalid UTF-8, no text at all.
    """
    counts = collections.Counter() if counts is None else counts
    found = 0
    for name, text in SOURCES[config.source](config, counts):
        if text:
            found += 1
            yield name, text
        else:
            counts["empty"] += 1
    if not found:
        where = f"data.path {config.path!r}" if config.path else f"data.source {config.source!r}"
        raise UserError(f"{where}: no text ({counts['empty']} empty documents); give at least one document that is not empty")


def _stdlib(config, counts):
    root = sysconfig.get_path("stdlib")
    for path in _walk(root, (".py",), skip=NOT_LIBRARY):
        with open(path, "rb") as file:
            raw = file.read()
        try:
            yield os.path.relpath(path, root).replace(os.sep, "/"), raw.decode("utf-8")
        except UnicodeDecodeError:  # not the user's files: an encoding test or an old source, nothing to repair
            counts["skipped"] += 1


def _files(config, counts):
    for path in _paths(config):
        yield path, _decode(_bytes(path), path, config, counts)


def _jsonl(config, counts):
    for path in _paths(config):
        for number, line in enumerate(_lines(path), 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            content = _decode(line, where, config, counts)
            try:
                record = json.loads(content)
            except json.JSONDecodeError as error:
                found = f"not JSON ({error.msg} at character {error.pos})"
                raise UserError(f"{where}: {found}; one JSON object a line is accepted") from None
            except (ValueError, RecursionError) as error:  # a number of too many digits, brackets in too many brackets
                raise UserError(f"{where}: JSON beyond what is read ({_first_line(error)}); one JSON object a line is accepted") from None
            if not isinstance(record, dict):
                raise UserError(f"{where}: a JSON {type(record).__name__}; one JSON object a line is accepted")
            text = _field(record, where, config)
            if not isinstance(text, str):
                raise UserError(f"data.field {config.field!r}: {where} holds a {type(text).__name__}; a string is accepted")
            # An escaped lone surrogate ("\ud800") is a legal JSON string, but not text that UTF-8 can hold.
            yield where, _decode(text.encode("utf-8", "surrogatepass"), where, config, counts)


def _parquet(config, counts):
    import pyarrow
    import pyarrow.parquet

    types = pyarrow.types
    strings = (types.is_string, types.is_large_string, types.is_string_view, types.is_binary, types.is_large_binary)
    for path in _paths(config):
        with _readable(path, (pyarrow.ArrowException, OSError)), pyarrow.parquet.ParquetFile(path) as table:
            schema = table.schema_arrow
            kind = _field(dict(zip(schema.names, schema.types, strict=True)), path, config)
            if schema.names.count(config.field) > 1:
                raise UserError(f"data.field {config.field!r}: {path} has it twice; a column of a name of its own is accepted")
            kind = kind.value_type if types.is_dictionary(kind) else kind
            if not (any(is_kind(kind) for is_kind in strings)):
                raise UserError(f"data.field {config.field!r}: {path} holds {kind}; a column of strings is accepted")
            row = 0
            for batch in table.iter_batches(batch_size=1024, columns=[config.field]):
                # As bytes: pyarrow checks no UTF-8 on reading and fails without a row number on conversion.
                for raw in batch.column(0).cast(kind).cast(pyarrow.binary()).to_pylist():
                    where = f"{path}, row {row}"
                    row += 1
                    if raw is None:
                        counts["skipped"] += 1
                    else:
                        yield where, _decode(raw, where, config, counts)


@contextlib.contextmanager
def _readable(path: str, damage: tuple) -> Iterator[None]:
    """One line for what a damaged parquet file raises, when it is opened or later, where its pages are."""
    try:
        yield
    except damage as error:
        raise UserError(f"{path}: not a readable parquet file ({_first_line(error)})") from None


def _tfds(config, counts):
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError(f"data.source 'tfds': {_first_line(error)}; pip install tensorflow-datasets") from None
    try:
        if os.path.isdir(config.path):
            splits = tfds.builder_from_directory(config.path).as_data_source()
        else:
            splits = tfds.data_source(config.path, download=False, builder_kwargs={"file_format": "array_record"})
        if not splits:
            raise LookupError("it has no split on disk")
    except Exception as error:  # TFDS raises assertion, key, lookup and its own errors for the same mistake
        raise UserError(
            f"data.path {config.path!r}: no TFDS dataset prepared as array_record ({type(error).__name__}: {_first_line(error)}); "
            "prepare it once (tfds build NAME --file_format=array_record), then its NAME or folder is accepted"
        ) from None
    for split in sorted(splits):  # all of them: train, validation and test are ours to draw, by content
        for row, record in enumerate(splits[split]):
            where = f"{config.path}, {split} {row}"
            text = _field(record, where, config)
            if not isinstance(text, (bytes, str)):
                raise UserError(f"data.field {config.field!r}: {where} holds a {type(text).__name__}; text is accepted")
            raw = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
            yield where, _decode(raw, where, config, counts)


SOURCES = {"stdlib": _stdlib, "files": _files, "jsonl": _jsonl, "parquet": _parquet, "tfds": _tfds}


def _paths(config) -> list[str]:
    """The files that `config.path` names: a file, all files of the source's kinds in a folder, or a glob; sorted."""
    path = os.path.expanduser(config.path)
    if os.path.isfile(path):
        return [path]
    suffixes = SUFFIXES[config.source]
    if os.path.isdir(path):
        found = list(_walk(path, suffixes))
        if not found:
            raise UserError(f"data.path {config.path!r}: a folder without a {' '.join(suffixes)} file; a glob takes any name")
        return found
    found = sorted(name for name in glob.glob(path, recursive=True) if os.path.isfile(name))
    if not found:
        raise UserError(f"data.path {config.path!r}: not found; a file, a folder or a glob that matches files is accepted")
    return found


def _walk(root: str, suffixes: tuple[str, ...], skip: set[str] = frozenset()) -> Iterator[str]:
    """Files below `root` by suffix, sorted; folders named in `skip` and hidden ones (.git) left out."""

    def unreadable(error: OSError):
        raise UserError(f"{error.filename}: {error.strerror}; a readable folder is accepted") from None

    for folder, below, names in os.walk(root, onerror=unreadable):
        below[:] = sorted(name for name in below if name not in skip and not name.startswith("."))
        for name in sorted(names):
            if name.lower().endswith(suffixes) and not name.startswith("."):
                yield os.path.join(folder, name)


def _bytes(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; a readable file is accepted") from None


def _lines(path: str) -> Iterator[bytes]:
    try:
        with open(path, "rb") as file:
            yield from file
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; a readable file is accepted") from None


def _decode(raw: bytes, where: str, config, counts) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        if config.invalid_utf8 == "replace":
            counts["replaced"] += 1
            return raw.decode("utf-8", "replace")
        raise UserError(f"{where}: invalid UTF-8 at byte {error.start}; re-encode it, or set data.invalid_utf8='replace'") from None


def _field(record, where: str, config):
    if config.field not in record:
        raise UserError(f"data.field {config.field!r}: {where} has only {', '.join(map(repr, sorted(record))) or 'no field'}")
    return record[config.field]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
