"""Several processes share one fate: where one fails or dies, the others say so in one line and stop.

Without this a dead process leaves the others waiting for it: on accelerators for as long as JAX takes to notice (100 s), and then, or
as soon as process 0 is gone, JAX's coordination service ends them from C++ with an abort and a page of stack. Each process therefore
gives a sign of life every second through that service's key-value store and looks for the others' and for their last words; and the
abort, which nothing in Python can catch, is taken by a handler of its signal that says the line instead.
"""

import contextlib
import ctypes
import io
import json
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

BEAT = 1.0  # seconds from one sign of life to the next
SILENCE = 40.0  # seconds without one after which a process is taken for dead (what holds the interpreter for as long is so too),
SHORT = 10.0  # and where a connection to one of them has failed
GONE = 70  # the exit code of those that are left
HELD = 3.0  # seconds at least for which what C++ says is held back
ROOT = "jaxdistill"
FATAL = "JAX distributed service"  # in what C++ says before it aborts
NOISE = re.compile(rb"\[Gloo\] |is connected to|peer ranks|add_port\.cc|preemption_notifier\.cc|preemption_sync_manager\.cc")
SCRAP = re.compile(rb"[\d\s]*")  # after noise: of lines that several threads write into one another
TROUBLE = re.compile(r"gloo|nccl|peer|connection|socket|unavailable|deadline|cancelled|aborted|barrier|coordination", re.IGNORECASE)


class Streams:
    """Descriptors 1 and 2, where C++ writes what Python cannot keep quiet, each caught in a file; sys.stdout and sys.stderr go on
    to where these went. `pass_on` hands on what is no noise, a little later: the last words before an abort are known by their end."""

    def __init__(self):
        self._caught, self._done, self._mark = {}, {1: 0, 2: 0}, (time.monotonic(), {1: 0, 2: 0})
        self._after_noise, self._one = {1: False, 2: False}, threading.Lock()
        for number, name in ((1, "stdout"), (2, "stderr")):
            getattr(sys, name).flush()
            real, file = os.dup(number), tempfile.TemporaryFile()  # noqa: SIM115  (open until the process ends)
            os.dup2(file.fileno(), number)
            self._caught[number] = real, file
            setattr(sys, name, io.TextIOWrapper(io.FileIO(real, "w"), errors="backslashreplace", write_through=True))

    def recent(self, number: int) -> str:
        """The last of what was caught."""
        file = self._caught[number][1].fileno()
        return os.pread(file, 1 << 16, max(0, os.fstat(file).st_size - (1 << 16))).decode(errors="replace")

    def pass_on(self, *, last: bool = False) -> None:
        with self._one:
            self._pass_on(last)

    def _pass_on(self, last: bool) -> None:
        now, sizes = time.monotonic(), {number: os.fstat(file.fileno()).st_size for number, (_, file) in self._caught.items()}
        if now - self._mark[0] < HELD and not last:
            return
        for number, (real, file) in self._caught.items():
            until = sizes[number] if last else self._mark[1][number]
            text = os.pread(file.fileno(), until - self._done[number], self._done[number])
            if not last:
                text = text[: text.rfind(b"\n") + 1]  # C++ writes a line in pieces
            self._done[number] += len(text)
            for line in text.splitlines(keepends=True):
                noise = NOISE.search(line) or (self._after_noise[number] and SCRAP.fullmatch(line))
                self._after_noise[number] = bool(noise)
                if not noise:
                    os.write(real, line)
        self._mark = now, sizes


class Watch:
    """One for a process. joining: what C++ says when the processes do not meet -> the line for it; until `start`, which is
    told the client of JAX's coordination service, and that this is process `me` of `count`."""

    def __init__(self, joining: Callable[[str], str]):
        self.me, self.count, self.client, self._joining = 0, 1, None, joining
        self.streams = Streams()
        self._patience = SILENCE
        self._saved: tuple[str, Path] | None = None
        self._heard: dict[int, float] = {}  # when
        self._ends: dict[int, dict] = {}
        self._closed, self._ending = threading.Event(), threading.Lock()
        self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._aborted)  # kept: C holds no reference
        libc = ctypes.CDLL(None)
        libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
        libc.signal(signal.SIGABRT, ctypes.cast(self._handler, ctypes.c_void_p))

    def start(self, client, me: int, count: int) -> None:
        self.client, self.me, self.count = client, me, count
        self._heard = dict.fromkeys(range(count), time.monotonic())
        for run in (self._listen, self._judge):
            threading.Thread(target=run, daemon=True, name=f"watch {run.__name__}").start()

    def saves(self, run: str, folder: Path) -> None:
        """Where the checkpoints of what is being done are, for the last line."""
        self._saved = run, folder

    def close(self) -> None:
        """Everybody is done: from here on nobody is missed."""
        self._closed.set()
        with contextlib.suppress(OSError, ValueError):
            self.streams.pass_on(last=True)

    def fail(self, line: str, code: int) -> None:
        """Ends this process and all others, with one line in all: process 0's, or this one's where process 0 does not say it."""
        with self._ending:
            self._tell(line, code)
            until = time.monotonic() + 4 * BEAT
            if self.me == 0:
                self._say(f"error: {line}")
                while time.monotonic() < until and len(self._ends) < self.count:  # they hear of it through this very process
                    time.sleep(BEAT / 10)
            else:
                while time.monotonic() < until and 0 not in self._ends:
                    time.sleep(BEAT / 10)
                if self._ends.get(0, {}).get("line") != line:
                    self._say(f"error: process {self.me}: {line}")
            self._exit(code)

    def collateral(self, error: Exception) -> None:
        """Waits for what is known of the others, where `error` looks like the loss of one of them; returns where all are well."""
        if TROUBLE.search(f"{type(error).__name__} {error}"):
            self._patience = SHORT
            time.sleep(SHORT + 5 * BEAT)  # (the thread that judges ends the process)
            self._patience = SILENCE

    def _listen(self) -> None:
        """Gives this process's sign of life, and takes the others'. Process 0 looks at all, the others at it: each message would
        else cost the square of their number."""
        beats, seen = 0, {}
        while not self._closed.wait(BEAT):
            beats += 1
            with contextlib.suppress(Exception):  # tried again; where the service is gone the silence is noticed, or there is the abort
                self.client.key_value_set(f"{ROOT}/alive/{self.me}", str(beats), allow_overwrite=True)
                self._ends |= {number: json.loads(value) for number, value in self._entries("end").items()}
                alive = self._entries("alive") if self.me == 0 else {0: self.client.key_value_try_get(f"{ROOT}/alive/0")}
                for number, value in alive.items():
                    if seen.get(number) != value:
                        seen[number], self._heard[number] = value, time.monotonic()

    def _entries(self, what: str) -> dict[int, str]:
        return {int(key.rsplit("/", 1)[1]): value for key, value in self.client.key_value_dir_get(f"{ROOT}/{what}/")}

    def _judge(self) -> None:
        while not self._closed.wait(BEAT / 4):
            with contextlib.suppress(OSError, ValueError):  # that nobody reads what is said is no reason not to judge
                self.streams.pass_on()
            if others := {number: end for number, end in dict(self._ends).items() if number != self.me}:
                number = min(others)
                end = others[number]
                with self._ending:
                    self._tell(end["line"], end["code"])
                    if self.me == 0:
                        self._say(f"error: process {number}: {end['line']}")
                        time.sleep(2 * BEAT)  # they hear of it through this very process
                    self._exit(end["code"])
            now = time.monotonic()
            for number in range(self.count) if self.me == 0 else (0,):
                if now - self._heard[number] > self._patience and not self._closed.is_set():
                    self._lost(number, f"no sign of life for {self._patience:.0f} s")

    def _lost(self, number: int, how: str) -> None:
        with self._ending:
            line = f"process {number} of {self.count} is gone ({how}){self._kept()}. Start all of them again with the same command"
            self._say(f"error: {line}")
            if number != 0:  # (whose end is that of the service too)
                self._tell(line, GONE)
            if self.me == 0:
                time.sleep(2 * BEAT)
            self._exit(GONE)

    def _kept(self) -> str:
        if self._saved is None:
            return ""
        run, folder = self._saved
        steps = [int(path.name) for path in folder.glob("*") if path.name.isdigit()]
        return f"; {run} is saved up to update {max(steps)} and goes on from there" if steps else f"; of {run} nothing is saved yet"

    def _aborted(self, number: int) -> None:
        """SIGABRT, raised by C++ in one of its threads or in ours: JAX's own end of the process, or somebody else's, left to go on."""
        said = self.streams.recent(2)
        if FATAL not in said:
            self.streams.pass_on(last=True)
            return
        if self.client is None:
            self._say(f"error: {self._joining(said)}")
            self._exit(2)
        dead = re.search(r"stopped sending heartbeats\):\s+(?:\S*task:)?(\d+)", said)
        self._lost(int(dead[1]) if dead else 0, "its connection is closed")

    def _tell(self, line: str, code: int) -> None:
        with contextlib.suppress(Exception):  # where the service is gone, nobody is left to be told
            self.client.key_value_set(f"{ROOT}/end/{self.me}", json.dumps({"line": line, "code": code}), allow_overwrite=True)

    def _say(self, line: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            print(" ".join(line.split()), file=sys.stderr, flush=True)

    def _exit(self, code: int) -> None:
        """At once: the main thread may be in a collective that will never end."""
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(code)
