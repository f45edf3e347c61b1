"""One of the processes of test_watch: python -m tests.training.watched FOLDER ME COUNT ACT.

It imports no JAX: its key-value store is a folder."""

import os
import signal
import sys
import time
from pathlib import Path

from jaxdistill.training import watch

watch.BEAT, watch.SILENCE, watch.SHORT, watch.HELD = 0.05, 3.0, 1.0, 0.2
FATAL = (b"E1129 coordination_service_agent.cc:289] Polled an error\nF1129 client.h:80] Terminating process because the JAX distributed "
         b"service detected fatal errors. absl::Status: UNAVAILABLE: Failed to send RPC\n*** Check failure stack trace: ***\n    @ 0x7f\n")


class Store:
    """What JAX's client offers, over files."""

    def __init__(self, folder: Path):
        self.folder = folder

    def key_value_set(self, key, value, allow_overwrite=False):
        path = self.folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}")
        temporary.write_text(value)
        temporary.replace(path)

    def key_value_try_get(self, key):
        return (self.folder / key).read_text()

    def key_value_dir_get(self, key):
        return [(f"{key}{path.name}", path.read_text()) for path in (self.folder / key).glob("[!.]*")]


def fail(told):
    told.fail("data: found 0; accepted: 1", 2)


def abort(text: bytes):
    os.write(2, text)
    os.abort()


def close(told):
    os.write(1, b"[Gloo] Rank 0 is connected to 1 peer ranks. Expected number of connected peer ranks is : 1\nsomething else\n")
    told.close()
    sys.exit(0)


def close_later(told):
    """After noise in pieces, some in the middle of others: two threads write it."""
    for piece in (b"[Gloo] Rank 0 is conn", b"ected to [Gloo] Rank 1 is connected to 3 peer ranks. Expected number of conn",
                  b"ected peer ranks is : 3\n3 peer ranks. Expected number of conn", b"ected peer ranks is : 3\n3\n",
                  b"\n0[Gloo] Rank 1 is connected to \n3\nsomething",
                  b" else\nand more"):
        os.write(1, piece)
        time.sleep(3 * watch.HELD)
    told.close()
    sys.exit(0)


ACTS = {
    "work": lambda told: None,
    "fail": fail,
    "die": lambda told: os.kill(os.getpid(), signal.SIGKILL),
    "hang": lambda told: os.kill(os.getpid(), signal.SIGSTOP),
    "lose the service": lambda told: abort(FATAL),
    "abort": lambda told: abort(b"free(): invalid pointer\n"),
    "close": close,
    "close later": close_later,
    "lose a connection": lambda told: told.collateral(RuntimeError("Gloo AllReduce failed: Connection closed by peer")),
}

if __name__ == "__main__":
    folder, me, count, act = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    told = watch.Watch(lambda text: f"not met: {'Failed to send RPC' in text}")
    if act == "do not meet":
        abort(FATAL)
    told.start(Store(folder), me, count)
    told.saves("toy-0", folder / "checkpoints")
    while len(list((folder / "jaxdistill/alive").glob("[!.]*"))) < count:
        time.sleep(0.02)
    ACTS[act](told)
    time.sleep(30)
