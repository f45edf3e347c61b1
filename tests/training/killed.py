"""Runs the toy job in WORKDIR and kills itself at MOMENT: python -m tests.training.killed WORKDIR MOMENT."""

import os
import signal
import sys
import threading

from tests import conftest  # noqa: F401  (before JAX: eight CPU devices, compiled programs shared)

# isort: split
from jaxdistill.training import checkpoint, loop, metrics
from tests import jobs


def kill(after: float = 0.0) -> None:
    if after:
        threading.Timer(after, kill).start()
    else:
        os.kill(os.getpid(), signal.SIGKILL)


def before(owner, name: str, due, act) -> None:
    """Has `owner.name` call `act` first where due(*args)."""
    old = getattr(owner, name)

    def new(*args, **kwargs):
        if due(*args):
            act()
        return old(*args, **kwargs)

    setattr(owner, name, new)


MOMENTS = {
    "before the first checkpoint": lambda: before(metrics.Lines, "write", lambda self, line: line["step"] == 2, kill),
    "in the first save": lambda: before(checkpoint.Checkpoints, "save", lambda self, step, *_: step == 3, lambda: kill(0.005)),
    "in a later save": lambda: before(checkpoint.Checkpoints, "save", lambda self, step, *_: step == 8, lambda: kill(0.03)),
    "between two checkpoints": lambda: before(metrics.Lines, "write", lambda self, line: line["step"] == 11, kill),
    "before the result": lambda: before(loop, "write_json", lambda path, _: path.name == "result.json", kill),
}

if __name__ == "__main__":
    MOMENTS[sys.argv[2]]()
    loop.run(jobs.toy(), sys.argv[1])
