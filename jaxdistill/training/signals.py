"""A stop that was asked for by a signal: after the update in flight, with everything saved."""

import contextlib
import os
import signal

import jax
from jax.experimental import multihost_utils

from jaxdistill.training import sharding


class Signals(contextlib.AbstractContextManager):
    """SIGTERM and SIGINT ask for a stop after the update in flight; a second one of the same kind acts at once.

    Of several processes each may be the one that is asked. JAX listens for SIGTERM itself then, tells the others, and finds the update
    that none of them has begun; SIGINT is passed on as one."""

    CODES = {signal.SIGTERM: 75, signal.SIGINT: 130}

    def __init__(self):
        self._code, self._asked, self._old = 0, 0, {}

    def __enter__(self):
        with contextlib.suppress(ValueError):  # not in the main thread: the caller's handlers stay
            for one in self.CODES if jax.process_count() == 1 else (signal.SIGINT,):
                self._old[one] = signal.signal(one, self._ask)
        return self

    def __exit__(self, *_):
        for one, handler in self._old.items():
            signal.signal(one, handler)

    def _ask(self, number, frame):
        self._code = self.CODES[number]
        signal.signal(number, self._old[number])
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def code(self) -> int:
        """The exit code asked for, or 0; the same on all processes, which ask after every update."""
        if jax.process_count() == 1:
            return self._code
        self._asked += 1
        if not multihost_utils.reached_preemption_sync_point(self._asked):
            return 0
        return sharding.agree(self._code) or self.CODES[signal.SIGTERM]
