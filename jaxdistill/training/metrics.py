"""Metrics as (sum, count) pairs, divided at the end, and their writers: JSON lines, terminal, TensorBoard."""

import contextlib
import json
import math
import os
import time
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn


def record(step: int, metrics: dict) -> dict:
    """The metrics of one update, as plain numbers and (sum, count) divided: one line of metrics.jsonl.

    Probes are there where the update was one of those that are looked at, and of these what anything was measured of (count > 0)."""
    plain = jax.tree.map(float, {name: metrics[name] for name in ("loss", "gap", "lr", "grad_norm", "clip", "terms", "knobs", "groups")})
    seen = {name: (float(total), float(count)) for name, (total, count) in metrics["probes"].items()} if metrics["probing"] else {}
    probes = {name: total / count for name, (total, count) in seen.items() if count > 0}
    counters = {"finite": bool(metrics["finite"]), "skipped": int(metrics["skipped"]), "streak": int(metrics["streak"])}
    return {"step": step, **counters, **plain, "probes": probes}


def plain_json(value):
    """Non-finite numbers as strings ('nan', 'inf'), which JSON proper lacks; arrays and tuples as lists."""
    if isinstance(value, dict):
        return {str(name): plain_json(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_json(item) for item in value]
    if isinstance(value, (np.generic, np.ndarray, jax.Array)):
        return plain_json(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def write_json(path: Path, value) -> None:
    """Whole or not at all: a temporary file, then a rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(plain_json(value), indent=1, allow_nan=False) + "\n")
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)  # half a file helps nobody, and would make the folder look like someone else's
        raise


class Lines:
    """metrics.jsonl: one object a line, flushed as it comes. On a restore, lines after `step` are cut."""

    def __init__(self, path: Path, *, step: int):
        kept = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    if json.loads(line)["step"] <= step:
                        kept.append(line)
                except (ValueError, KeyError):
                    break  # the line that a kill cut short: nothing after it belongs to the restored run
            temporary = path.with_name(f".{path.name}.{os.getpid()}")
            temporary.write_text("".join(line + "\n" for line in kept))
            temporary.replace(path)
        self._file = path.open("a")

    def write(self, line: dict) -> None:
        self._file.write(json.dumps(plain_json(line), allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class Terminal:
    """A progress bar on a terminal (terms, rate, time left); a line every few seconds anywhere else."""

    def __init__(self, title: str, steps: int, *, quiet: bool = False, every: float = 10.0):
        self.console = Console(highlight=False, soft_wrap=True, quiet=quiet)
        self._title, self._steps, self._every = title, steps, every
        self._said, self._from, self._since = 0.0, 0, time.monotonic()
        self._bar = None
        self.warned = ""  # the last finding, by name: stays in the progress line

    def status(self, what: str):
        """A context in which `what` is being done."""
        return self.console.status(f"{self._title} {what}") if self.console.is_terminal else contextlib.nullcontext()

    def begin(self, done: int) -> None:
        """Starts the clock (and the bar) at update `done`."""
        self._from, self._since = done, time.monotonic()
        if self.console.is_terminal and self._steps:
            self._bar = Progress(TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
                                 TextColumn("{task.fields[note]}"), console=self.console, transient=True)
            self._bar.start()
            self._task = self._bar.add_task(self._title, total=self._steps, completed=done, note="")

    def update(self, line: dict) -> None:
        done, now = line["step"], time.monotonic()
        if self._bar is None and now - self._said < self._every and done != self._steps:
            return
        self._said = now
        rate = (done - self._from) / max(now - self._since, 1e-9)
        left = (self._steps - done) / max(rate, 1e-9)
        terms = " ".join(f"{name} {term['raw']:.3f}" for name, term in line["terms"].items() if term["count"])
        note = f"loss {line['loss']:.3f}  {terms}  lr {line['lr']:.1e}  {rate:.1f} updates/s, {left:.0f} s left"
        note += f"  ! {self.warned}" if self.warned else ""
        if self._bar:
            self._bar.update(self._task, completed=done, note=note)
        else:
            self.console.print(f"{self._title:<24} {done:>6}/{self._steps}  {note}", markup=False)

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def close(self) -> None:
        if self._bar:
            self._bar.stop()


class TensorBoard:
    """Event files by tensorboardX (the extra `tensorboard`); on a restore, events after `step` are dropped."""

    def __init__(self, folder: Path, step: int):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, line: dict) -> None:
        for name, value in _flat({k: v for k, v in line.items() if k not in ("step", "finite")}):
            if math.isfinite(value):
                self._writer.add_scalar(name, value, line["step"])

    def close(self) -> None:
        self._writer.close()


def _flat(tree: dict, prefix: str = ""):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)):
            yield prefix + name, float(value)
