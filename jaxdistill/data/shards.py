"""Tables of rows of one size on disk, in shards: written so that a kill loses one shard at most, read by row number.

A shard is a .npy file, uint8 [rows, bytes of a row]: memory-mapped, a row is one copy (10 us for 40 KB; array_record takes 60). Its
name holds the CRC-32 of the file, so that a whole shard tells by itself whether it is what was written. It is written under another
name, synced and renamed: what has its name is whole, also after a power cut.
"""

import dataclasses
import io
import math
import os
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import ml_dtypes  # noqa: F401  (gives numpy bfloat16)
import numpy as np

from jaxdistill import UserError

BYTES = 64 * 2**20  # of a shard, about
ACCEPTED = "accepted: the file as it was written (or the folder deleted, and the cache written again)"
OPEN = 64  # shards that a reader holds open (each is a file of the process); the others are opened again


class Shard(NamedTuple):
    """A finished file: its name, bytes, and CRC-32 (hex)."""

    file: str
    bytes: int
    crc32: str


@dataclasses.dataclass(frozen=True)
class Layout:
    """A row: arrays by name, one after another. fields: ((name, dtype, shape), ...)."""

    fields: tuple[tuple[str, str, tuple[int, ...]], ...]

    @classmethod
    def of(cls, arrays: Mapping) -> "Layout":
        """From anything with shape [rows, ...] and dtype, by name."""
        return cls(tuple((name, str(np.dtype(x.dtype)), tuple(x.shape[1:])) for name, x in sorted(arrays.items())))

    @classmethod
    def from_json(cls, fields) -> "Layout":
        return cls(tuple((name, dtype, tuple(shape)) for name, dtype, shape in fields))

    def sizes(self) -> dict[str, int]:
        """Bytes of each field in a row."""
        return {name: np.dtype(dtype).itemsize * math.prod(shape) for name, dtype, shape in self.fields}

    @property
    def row(self) -> int:
        """Bytes of a row."""
        return sum(self.sizes().values())

    def pack(self, arrays: Mapping) -> np.ndarray:
        """[rows, ...] of each field -> uint8 [rows, bytes]."""
        parts = []
        for name, dtype, shape in self.fields:
            array = np.ascontiguousarray(arrays[name])
            if array.dtype != np.dtype(dtype) or array.shape[1:] != shape:
                raise ValueError(f"{name}: found {array.dtype} {array.shape[1:]} in a table of {dtype} {shape}")
            parts.append(array.reshape(len(array), -1).view(np.uint8))
        return np.concatenate(parts, axis=1)


class Writer:
    """The table `name` in `folder`, of `rows` rows. Every shard but the last holds `per` rows, a multiple of `step`."""

    def __init__(self, folder: Path, name: str, layout: Layout, rows: int, *, step: int = 1, size: int = BYTES):
        self.folder, self.name, self.layout, self.rows = Path(folder), name, layout, rows
        self.per = step * max(1, size // max(1, layout.row * step))
        self.folder.mkdir(parents=True, exist_ok=True)

    def __len__(self) -> int:
        """Number of shards."""
        return -(-self.rows // self.per)

    def span(self, number: int) -> range:
        """The rows of a shard."""
        return range(number * self.per, min((number + 1) * self.per, self.rows))

    def done(self, number: int) -> Shard | None:
        """The shard, if it is there whole (it is read once to know); what else has its number is deleted."""
        found = None
        for path in sorted(self.folder.glob(f"{self.name}-{number:05d}-*")):
            crc = re.fullmatch(r".*-([0-9a-f]{8})\.npy", path.name)
            if found is None and crc and f"{_crc32(path):08x}" == crc[1]:
                found = Shard(path.name, path.stat().st_size, crc[1])
            else:
                path.unlink()
        return found

    def put(self, number: int, arrays: Mapping) -> Shard:
        """Writes a shard from all its rows; when it returns, the shard is on the disk. UserError: there is no room for it."""
        packed = self.layout.pack(arrays)
        if len(packed) != len(self.span(number)):
            raise ValueError(f"shard {number} of {self.name}: found {len(packed)} rows; accepted: {len(self.span(number))}")
        head = io.BytesIO()
        np.lib.format.write_array_header_1_0(head, np.lib.format.header_data_from_array_1_0(packed))
        crc = f"{zlib.crc32(packed, zlib.crc32(head.getbuffer())):08x}"
        path = self.folder / f"{self.name}-{number:05d}-{crc}.npy"
        temporary = self.folder / f"{self.name}-{number:05d}-unfinished"
        try:
            with temporary.open("wb") as file:
                file.write(head.getbuffer())
                file.write(packed)
                sync(file)
            replace(temporary, path)
        except OSError as error:
            raise UserError(f"{temporary}: {error.strerror}; accepted: a folder that can be written, with room in it (what is done there "
                            "is kept: the same command goes on)") from None
        return Shard(path.name, path.stat().st_size, crc)


class Reader:
    """The table of `shards` in `folder`, `per` rows in each but the last. That all are there, with their sizes, is known at once. A
    shard's checksum is verified when its first row is asked for: it is read once through (1.7 GB/s from memory on one core of 2020,
    else as fast as the disk)."""

    def __init__(self, folder: Path, layout: Layout, rows: int, per: int, shards: list[Shard]):
        self.folder, self.layout, self.rows, self.per, self.shards = Path(folder), layout, rows, per, shards
        self._open: dict[int, np.ndarray] = {}
        self._verified: set[int] = set()
        if len(shards) != -(-rows // per):
            raise UserError(f"{folder}: found {len(shards)} shards of {per} rows for {rows} rows; accepted: the manifest as it was written")
        for shard in shards:
            _there(self.folder / shard.file, shard)

    def __len__(self) -> int:
        return self.rows

    def __getstate__(self) -> dict:
        """For another process, which opens its own files."""
        return self.__dict__ | {"_open": {}, "_verified": set()}

    def take(self, index, view: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Rows by number, [B, ...] of each field, copies; zeros for numbers past the end. view int [B]: of fields whose first axis
        holds views, the view of each row that is wanted; None: the fields whole."""
        index = np.asarray(index)
        found = {}
        sizes = self.layout.sizes()
        begin = 0
        for name, dtype, shape in self.layout.fields:
            width = sizes[name] if view is None else sizes[name] // shape[0]
            at = np.full(len(index), begin) if view is None else begin + width * (np.asarray(view) % shape[0])
            rows = np.zeros((len(index), width), np.uint8)
            for i, (row, start) in enumerate(zip(index.tolist(), at.tolist(), strict=True)):
                if 0 <= row < self.rows:
                    rows[i] = self._shard(row // self.per)[row % self.per, start : start + width]
            found[name] = rows.view(dtype).reshape(len(index), *(shape if view is None else shape[1:]))
            begin += sizes[name]
        return found

    def _shard(self, number: int) -> np.ndarray:
        found = self._open.get(number)
        if found is None:  # (two threads may both come here: they find the same)
            path = self.folder / self.shards[number].file
            if number not in self._verified:
                _verify(path, self.shards[number])
                self._verified.add(number)
            if len(self._open) >= OPEN:
                self._open.pop(list(self._open)[0], None)
            found = self._open[number] = np.load(path, mmap_mode="r", allow_pickle=False)
        return found


def _there(path: Path, shard: Shard) -> None:
    if not path.is_file():
        raise UserError(f"{path}: missing; {ACCEPTED}")
    if path.stat().st_size != shard.bytes:
        raise UserError(f"{path}: found {path.stat().st_size:,} bytes, where {shard.bytes:,} were written; {ACCEPTED}")


def _verify(path: Path, shard: Shard) -> None:
    _there(path, shard)
    if f"{_crc32(path):08x}" != shard.crc32:
        raise UserError(f"{path}: found contents that do not match their checksum {shard.crc32}; {ACCEPTED}")


def _crc32(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return crc


def sync(file) -> None:
    file.flush()
    os.fsync(file.fileno())


def replace(temporary: Path, path: Path) -> None:
    """A rename that lasts."""
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
