"""One of two processes of four devices (or $TWIN_DEVICES), as a user starts it: python -m tests.training.twin MOMENT FLAG...

MOMENT says what happens to it on the way (`MOMENTS`); FLAGs are those of jaxdistill.main."""

import os
import signal
import sys
import time

from tests import conftest  # noqa: F401  (before JAX: compiled programs shared)

# isort: split
import jax

from jaxdistill import main
from jaxdistill.training import checkpoint, loop
from tests.training.killed import before, kill


def slowly() -> None:
    """So that there is time for a signal to get around."""
    before(loop, "record", lambda *_: True, lambda: time.sleep(0.2))


def told_to_stop() -> None:
    before(loop, "record", lambda step, _: step == 3, lambda: signal.raise_signal(signal.SIGTERM))
    slowly()


MOMENTS = {
    "nothing": lambda: None,
    "slowly": slowly,
    "told to stop": told_to_stop,
    "killed early": lambda: before(loop, "record", lambda step, _: step == 2, kill),
    "killed between two checkpoints": lambda: before(loop, "record", lambda step, _: step == 11, kill),
    "killed in a save": lambda: before(checkpoint.Checkpoints, "save", lambda self, step, *_: step == 9, lambda: kill(0.02)),
}

if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", int(os.environ.get("TWIN_DEVICES", "4")))
    MOMENTS[sys.argv.pop(1)]()
    main.cli()
