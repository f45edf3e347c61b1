"""python -m jaxdistill.main --config=configs/kd.py[:variant] [--config.key=value ...] --workdir=DIR [--dry_run]

    on several machines: this on each, with --distributed (TPU slice, Slurm, Open MPI) or --coordinator, --num_processes, --process_id

Flags -> training.loop.run(config, workdir). Exit codes: 0; 1, a gate stopped the run; 2, a mistake of the user's; 70, another process is
gone; 75 and 130, stopped by SIGTERM and SIGINT. After the last three the same command goes on.
"""

import logging as stdlib_logging
import re
import runpy
import sys
import traceback
from pathlib import Path

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from jaxdistill import UserError, command

ARGV: list[str] = []  # filled by `parse`: the flag would read sys.argv here and now, and raise what is wrong with a --flagfile in it
CONFIG = config_flags.DEFINE_config_file("config", None, "The job: configs/kd.py, or one of yours.", sys_argv=ARGV)
WORKDIR = flags.DEFINE_string("workdir", "workdir", "Where the job lives. The same command there goes on with it.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Build and check everything, print the plan, train nothing.")
COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where the processes of this job meet.")
PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes this job has.")
PROCESS = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Several processes; what is not given, the launcher tells (TPU slice, Slurm, ...).")
MEET = flags.DEFINE_integer("meet_seconds", 300, "For how long a process waits at the start for the others.", lower_bound=1)
JOB_FLAGS = "accepted: --config=FILE, --config.KEY=VALUE, --workdir=DIR, --dry_run"
ACCEPTED_FLAGS = (f"{JOB_FLAGS}, --distributed, --coordinator=HOST:PORT, --num_processes=N, --process_id=I, "
                  "--meet_seconds=S")
ACCEPTED = "accepted: a file whose get_config() returns a ConfigDict, as configs/kd.py"


def main(_) -> int:
    logging.set_verbosity(logging.FATAL)  # JAX tells of proxies while the processes meet
    from jaxdistill.training import distributed  # here, so that --help need not wait for JAX

    with distributed.joined(COORDINATOR.value, PROCESSES.value, PROCESS.value, detect=DISTRIBUTED.value, timeout=MEET.value) as first:
        return work(first)


def work(first: bool) -> int:
    """first: whether this is the process that speaks."""
    import jax

    from jaxdistill import report
    from jaxdistill.training import loop, preflight

    quiet(jax.process_index())
    if DRY_RUN.value:
        preflight.dry_run(CONFIG.value, quiet=not first)
        return 0
    try:
        loop.run(CONFIG.value, WORKDIR.value)
        if first:
            report.main(["report", str(Path(WORKDIR.value).expanduser())])
    except (loop.Interrupted, loop.Sick) as stop:
        if first:
            print(stop, file=sys.stderr)
        return stop.code
    return 0


def quiet(process: int = 0) -> None:
    """The libraries' logs off, this project's own warnings on; of several processes what each meets by itself, under its number."""
    logging.set_verbosity(logging.FATAL)  # orbax tells every file it touches, and each error that it raises too
    own, handler = stdlib_logging.getLogger("jaxdistill"), stdlib_logging.StreamHandler()
    own.setLevel(stdlib_logging.WARNING)  # but what this project warns of (an unreadable image) must be seen
    if process:
        stdlib_logging.getLogger("jaxdistill.recipes").setLevel(stdlib_logging.ERROR)  # they measure the same everywhere
        handler.setFormatter(stdlib_logging.Formatter(f"process {process}: %(message)s"))
    own.addHandler(handler)
    own.propagate = False  # absl has a handler too


def parse(argv: list[str], accepted: str = ACCEPTED_FLAGS) -> list[str]:
    """absl's flags; whatever is wrong with them or with the config file becomes one line."""
    argv = [re.sub(r"^--?config=~(?=/)", f"--config={Path.home()}", arg) for arg in argv]  # no shell opens a ~ there
    ARGV[:] = argv
    check_config(argv)
    try:
        rest = flags.FLAGS(argv)
    except SystemExit:  # --help, which absl ends with 1
        raise SystemExit(0) from None
    except (flags.Error, ValueError, IndexError) as error:  # (absl checks not everything itself)
        raise UserError(f"flags: {error}" + (f"; {accepted}" if isinstance(error, flags.UnrecognizedFlagError) else "")) from None
    if not isinstance(CONFIG.value, ConfigDict):
        raise UserError(f"--config: missing; {ACCEPTED}")
    if len(rest) > 1:
        raise UserError(f"flags: found {rest[1]!r}; {accepted}")
    return rest


def check_config(argv: list[str]) -> None:
    """Loads the config file before absl does, whose reports of what is wrong in it, or of a key that it lacks, are pages."""
    path = next((value for arg, value in zip(argv, argv[1:], strict=False) if arg in ("--config", "-config")), "")
    path = next((arg.partition("=")[2] for arg in argv if arg.startswith(("--config=", "-config="))), path)
    file, *variant = path.split(":", 1)
    if not path:
        return  # missing, or only help is asked for
    if not Path(file).is_file():
        raise UserError(f"--config={path}: no such file; {ACCEPTED}")
    try:
        config = runpy.run_path(file)["get_config"](*variant)
    except Exception as error:  # a config file is a program: it may fail in any way
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        place = f" (line {lines[-1]})" if lines else ""
        told = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}{place}; {ACCEPTED}"
        raise UserError(f"--config={path}: {told}") from None
    if not isinstance(config, ConfigDict):
        raise UserError(f"--config={path}: get_config() returned {type(config).__name__}; {ACCEPTED}")
    for arg in argv:
        section = config
        name = re.match(r"--?(?:no)?config\.([^=]*)", arg)
        for key in re.sub(r"\[.*?\]", "", name[1]).split(".") if name else ():
            if not isinstance(section, ConfigDict) or key not in section:
                keys = ", ".join(section) if isinstance(section, ConfigDict) else "no key below it"
                raise UserError(f"{arg}: {file} has no such key; accepted: {keys}")
            section = section[key]
        if name and name[1].endswith("]") and isinstance(section, tuple):
            raise UserError(f"{arg}: found a place in a tuple; accepted: the whole, as in --config.{name[1].partition('[')[0]}={section}")


def cli() -> None:
    command(lambda: app.run(main, flags_parser=parse))


if __name__ == "__main__":
    cli()
