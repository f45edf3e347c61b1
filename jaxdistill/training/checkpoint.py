"""A thin wrapper over orbax v1: state, data position and host memory in one checkpoint; last two and best are kept.

Orbax commits atomically, so a kill leaves the previous checkpoint. What it does not do is notice a flipped bit: each
checkpoint carries a fingerprint of its arrays and of its memory, and what does not match is refused, aloud.
"""

import gc
import hashlib
import json
import logging
import math
import warnings
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from jaxdistill import UserError
from jaxdistill.diagnosis.probes import fingerprint
from jaxdistill.training.optim import path_name

KEPT = 2  # the last checkpoints; one to go back to when the last is damaged
HOST = {"sealed": "", "digest": "", "fingerprint": 0}


class Damaged(UserError):
    """A checkpoint that cannot be read, or whose contents do not match their checksum."""


class Checkpoints:
    """Checkpoints of one run in `folder`. minimize: whether a smaller monitored value is a better one."""

    def __init__(self, folder: str | Path, *, minimize: bool = True):
        self.folder = Path(folder).absolute()
        self.minimize = minimize
        self._best: tuple[float, int] | None = None  # sealed with the rest: orbax's own metrics have no checksum
        self._orbax = ocp.training.Checkpointer(
            self.folder,
            preservation_policy=self,
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            cleanup_tmp_directories=True,
        )

    @property
    def steps(self) -> list[int]:
        return sorted(checkpoint.step for checkpoint in self._orbax.checkpoints)

    @property
    def best(self) -> int | None:
        """The step of the best checkpoint of the run that was restored or saved here; the earlier of equals."""
        return self._best and self._best[1]

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        """Orbax's question, when it is about to save: the last ones and the best stay."""
        newest = sorted(checkpoint.step for checkpoint in checkpoints)[-KEPT:]
        return [checkpoint.step in newest or checkpoint.step == self.best for checkpoint in checkpoints]

    def save(self, step: int, state: Any, data: Any, memory: dict, monitor: float | None = None) -> None:
        """Returns once the state is copied; writing goes on in the background, and `state` may be donated.

        memory: JSON. monitor: the value that decides which checkpoint is the best."""
        self.wait()
        if monitor is not None and math.isfinite(monitor):
            value = monitor if self.minimize else -monitor
            if self._best is None or value < self._best[0]:
                self._best = (value, step)
        sealed = json.dumps({"memory": memory, "position": data.get_state(), "best": self._best, "tree": _signature(state)})
        host = {"sealed": sealed, "digest": _digest(sealed), "fingerprint": int(fingerprint(state))}
        if self._orbax.save_checkpointables_async(step, {"state": state, "host": host}) is None:
            raise RuntimeError(f"{self.folder}: checkpoint {step} was not saved, though the newest is {self.steps[-1]}")

    def wait(self) -> None:
        """Until what is being written is committed; raises what the writing raised."""
        self._orbax.wait()

    def restore(self, abstract: Any, data: Any, say=print) -> tuple[Any, dict] | None:
        """The newest undamaged (state, memory), with `data` set to its position; None where there is no checkpoint.

        abstract: the state's shapes, dtypes and shardings (those of another mesh than it was saved on will do)."""
        damaged = []
        for step in reversed(self.steps):
            try:
                state, sealed = self._read(step, abstract)
            except Damaged as error:
                say(f"{error}; passed over")
                damaged.append(step)
            else:
                for other in damaged:  # the run comes there again, and must be able to save
                    self._orbax.delete(other)
                self._best = sealed["best"] and tuple(sealed["best"])
                data.set_state(sealed["position"])
                return state, sealed["memory"]
            _collect_quietly()
        if damaged:
            raise UserError(f"{self.folder}: found {len(damaged)} checkpoint(s), all damaged; accepted: an intact one, "
                            "or no such folder (the run then starts again)")
        return None

    def load(self, step: int, abstract: Any) -> tuple[Any, dict]:
        """(state, memory) of the checkpoint of `step`."""
        state, sealed = self._read(step, abstract)
        return state, sealed["memory"]

    def _read(self, step: int, abstract: Any) -> tuple[Any, dict]:
        where = self.folder / str(step)
        try:
            host = self._orbax.load_checkpointables(step, {"host": dict(HOST)})["host"]
            intact = _digest(host["sealed"]) == host["digest"]
        except Exception as error:  # orbax and tensorstore raise many kinds for what cannot be read
            raise Damaged(f"{where}: found a checkpoint that cannot be read ({_first_line(error)})") from None
        if not intact:
            raise Damaged(f"{where}: found host memory that does not match its checksum")
        sealed = json.loads(host["sealed"])
        _check_tree(where, sealed["tree"], _signature(abstract))
        try:
            state = self._orbax.load_checkpointables(step, {"state": abstract})["state"]
            intact = int(fingerprint(state)) == host["fingerprint"]
        except Exception as error:
            told = f"{where}: found arrays that cannot be read ({_first_line(error)})"
            if jax.process_count() > 1:  # the others may have read theirs, and wait in orbax for this process
                raise UserError(f"{told}; accepted: intact ones (without the folder the checkpoint before it is taken)") from None
            raise Damaged(told) from None
        if not intact:
            raise Damaged(f"{where}: found arrays that do not match their checksum")
        return state, sealed

    def close(self) -> None:
        self._orbax.close()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _signature(tree: Any) -> dict:
    return {path_name(path): [list(leaf.shape), str(leaf.dtype)] for path, leaf in jax.tree.leaves_with_path(tree)}


def _check_tree(where: Path, found: dict, wanted: dict) -> None:
    """One line where orbax would say a page."""
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise UserError(f"{where}: found {name} {found.get(name, 'missing')}; accepted: {wanted.get(name, 'no such array')}")


def _collect_quietly() -> None:
    """Orbax abandons its other reads beside one that failed; asyncio would print a page for each, whenever it goes."""
    logger = logging.getLogger("asyncio")
    before, logger.disabled = logger.disabled, True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()
    logger.disabled = before


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:160]
