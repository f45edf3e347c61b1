"""Writes the cache of a teacher that is made of numbers: python tests/data/produced.py FOLDER [MOMENT COUNT].

With a moment it kills itself, with SIGKILL, at the COUNT-th time that it comes there. Imports no JAX."""

import os
import signal
import sys
from pathlib import Path

import ml_dtypes
import numpy as np

from jaxdistill.data import shards, teacher_cache
from jaxdistill.data.teacher_cache import Table

ROWS, TIME, WIDTH = {"train": 53, "test": 7}, 6, 5
MADE = {"kind": "language", "tokenizer": "t", "packing": {"length": 6}, "teacher": {"weights": "w"}, "data": {"sha256": "d"}}


def states(split: str, row: int) -> np.ndarray:
    """[1, time, width] of a row."""
    rng = np.random.default_rng((len(split), row))
    return rng.standard_normal((1, TIME, WIDTH)).astype(ml_dtypes.bfloat16)


def ids(split: str, row: int) -> np.ndarray:
    """[3 draws, time]."""
    return np.random.default_rng((1, len(split), row)).integers(0, 60_000, (3, TIME)).astype(np.uint16)


def make(split: str):
    return lambda span: {"states": np.stack([states(split, row) for row in span]), "ids": np.stack([ids(split, row) for row in span])}


def tables() -> dict[str, Table]:
    found = {split: Table(shards.Layout.of(make(split)(range(1))), rows, make(split)) for split, rows in ROWS.items()}
    head = {"head": np.arange(12, dtype=np.float32).reshape(1, 4, 3)}
    return found | {"constants": Table(shards.Layout.of(head), 1, lambda span: head)}


def write(folder: Path, made: dict = MADE, say=lambda line: None) -> dict:
    before, shards.BYTES = shards.BYTES, 700  # six rows of train in a shard
    try:
        return teacher_cache.write(folder, made, tables(), machine={"jax": "0"}, step=2, say=say)
    finally:
        shards.BYTES = before


def die_at(moment: str, count: int) -> None:
    """Kills this process before the `count`-th call of MODULE.NAME, or in the middle of a write."""
    left = [count]

    def dies(call):
        def new(*args, **kwargs):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)
        return new

    if moment == "half a file":
        whole = shards.sync

        def half(file):
            left[0] -= 1
            if not left[0]:
                file.flush()
                os.ftruncate(file.fileno(), os.fstat(file.fileno()).st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            whole(file)

        shards.sync = half
    else:
        owner = {"sync": shards, "replace": shards, "put": shards.Writer, "unlink": Path}[moment]
        setattr(owner, moment, dies(getattr(owner, moment)))


if __name__ == "__main__":
    if len(sys.argv) > 2:
        die_at(sys.argv[2], int(sys.argv[3]))
    write(Path(sys.argv[1]))
