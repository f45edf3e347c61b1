"""More than one process: how they find each other, and how they part.

    with joined(coordinator="10.0.0.1:8476", processes=2, process=0) as first:
        ...

Every process runs the same program. Process 0 alone speaks and writes (but for checkpoints, of which each writes its part); what it reads
of the workdir it tells the others (`share`), whose view of a shared file system may be older.
"""

import contextlib
import json
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax._src import distributed as jax_distributed  # the key-value store has no public name

from jaxdistill import UserError, worded
from jaxdistill.training.watch import ROOT, Watch

DAY = 24 * 3600 * 1000  # milliseconds: who waits for longer is ended by the watch, or is not waited for
# Launchers that start a program several times: the variable that tells how often, and one that only a started process has.
LAUNCHERS = (
    ("Slurm", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"), ("Open MPI", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("a TPU slice", "TPU_WORKER_HOSTNAMES", "TPU_WORKER_ID"), ("a TPU slice", "TPU_PROCESS_ADDRESSES", "TPU_WORKER_ID"),
)
FLAGS = "--coordinator=HOST:PORT --num_processes=N --process_id=I, or --distributed where the launcher tells (TPU slice, Slurm, Open MPI)"

_watch: Watch | None = None
_shared = 0  # values that were shared so far, the same number on all processes


@contextlib.contextmanager
def joined(coordinator: str | None, processes: int | None, process: int | None, *, detect: bool = False, timeout: int = 300):
    """Finds the other processes (for as long as `timeout` seconds), and in the end leaves with them; yields whether this is the first.

    detect: what is not given is taken from the launcher. With nothing given, a single process. What is raised inside ends all
    processes, in one line where it is the user's. Raises UserError before anything is started."""
    given = [value for value in (coordinator, processes, process) if value is not None]
    if given or detect:
        coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    check(coordinator, processes, process, detect)
    if not (given or detect):
        yield True
        return
    watch = _join(coordinator, processes, process, timeout)
    try:
        yield jax.process_index() == 0
        watch.client.wait_at_barrier(f"{ROOT}/leave", DAY)
    except BaseException as error:  # SystemExit and KeyboardInterrupt too: nobody may be left waiting
        _fail(watch, error)
    watch.close()
    jax.distributed.shutdown()


def check(coordinator: str | None, processes: int | None, process: int | None, detect: bool) -> None:
    """One line where the flags say half of what they must, or nothing where a launcher has started several processes."""
    flags = {"--coordinator": coordinator, "--num_processes": processes, "--process_id": process}
    missing = [name for name, value in flags.items() if value is None]
    if len(missing) == len(flags) and not detect:
        alone(FLAGS)
        return
    if missing and not detect:
        raise UserError(f"{missing[0]}: missing; accepted: {FLAGS}")
    host, _, port = (coordinator or "").rpartition(":")
    if coordinator is not None and not (host and port.isdigit() and 0 < int(port) < 65536):
        raise UserError(f"--coordinator: found {coordinator!r}; accepted: HOST:PORT of process 0, as every other process reaches it")
    if processes is not None and processes < 1:
        raise UserError(f"--num_processes: found {processes}; accepted: 1 or more")
    if process is not None and processes is not None and not 0 <= process < processes:
        raise UserError(f"--process_id: found {process}; accepted: 0 to {processes - 1}, each once")


def alone(accepted: str) -> None:
    """One line where a launcher has started several processes, each of which takes itself for the only one."""
    for launcher, count, own in LAUNCHERS:
        number = _count(os.environ.get(count, ""))
        if number > 1 and own in os.environ:
            raise UserError(f"flags: found none, though {launcher} runs {number} processes ({count}), which would all do the same in "
                            f"one place; accepted: {accepted}")


def _count(value: str) -> int:
    """Processes, from their number or the list of their names."""
    return int(value) if value.isdigit() else len([name for name in value.split(",") if name])


def _join(coordinator: str | None, processes: int | None, process: int | None, timeout: int) -> Watch:
    global _watch

    def said(text: str) -> str:
        """What kept the processes from meeting, in the user's words."""
        state = jax_distributed.global_state
        where, me = state.coordinator_address, state.process_id
        if "ALREADY_EXISTS" in text:
            return f"--process_id: found {me} twice; accepted: each process with a number of its own"
        if "Unexpected task" in text:
            return f"--process_id: found {me}, which process 0 does not expect; accepted: the same --num_processes everywhere"
        return (f"--coordinator: found that not all processes met at {where} within {timeout} s; accepted: all of them started, each with "
                "its own --process_id, and process 0 where the others can reach it")

    if coordinator and process == 0:
        try:  # gRPC, which finds out too, has been seen to end in a segmentation fault then
            socket.create_server(("", int(coordinator.rpartition(":")[2]))).close()
        except OSError as error:
            why = os.strerror(error.errno)
            raise UserError(f"--coordinator: found {coordinator}, on this machine {why}; accepted: a free port") from None
    watch = Watch(said)
    try:
        jax.distributed.initialize(coordinator, processes, process, initialization_timeout=timeout)
    except (RuntimeError, ValueError, OSError) as error:
        watch.close()
        if coordinator is None:
            raise UserError(f"--distributed: found no launcher that JAX knows ({str(error).splitlines()[0]}); accepted: {FLAGS}") from None
        raise UserError(f"--coordinator: {str(error).splitlines()[0]}; accepted: {FLAGS}") from None
    state = jax_distributed.global_state
    watch.start(state.client, state.process_id, state.num_processes)
    _watch = watch
    return watch


def _fail(watch: Watch, error: BaseException) -> None:
    """Never returns."""
    if isinstance(error, KeyboardInterrupt):
        watch.fail("interrupted", 130)
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        watch.fail(f"ended with code {code}", code)
    line = worded(error)
    if line is None:
        if isinstance(error, Exception):
            watch.collateral(error)
        traceback.print_exception(error)
        watch.fail(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}", 1)
    watch.fail(line, 2)


def saves(run: str, folder: Path) -> None:
    """Where the checkpoints of what is being done lie: what is said of them where a process dies."""
    if _watch:
        _watch.saves(run, folder)


def share(make: Callable[[], Any]) -> Any:
    """What `make` returns on process 0 (JSON), on every process; it runs there alone."""
    global _shared
    if jax.process_count() == 1:
        return make()
    client = jax_distributed.global_state.client
    if client is None:
        raise UserError(f"processes: found {jax.process_count()} that have not joined; accepted: {FLAGS}")
    _shared += 1
    name = f"{ROOT}/share/{_shared}"
    if jax.process_index() == 0:
        value = json.dumps(make())
        client.key_value_set(name, value)
    else:
        value = client.blocking_key_value_get(name, DAY)
    return json.loads(value)
