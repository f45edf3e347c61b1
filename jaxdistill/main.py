"""python -m jaxdistill.main --config=configs/kd.py[:variant] [--config.key=value ...] --workdir=DIR [--dry_run]

Flags -> training.loop.run(config, workdir).
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

CONFIG = config_flags.DEFINE_config_file("config", None, "The job: configs/kd.py, or one of yours.")
WORKDIR = flags.DEFINE_string("workdir", "workdir", "Where the job lives. The same command there goes on with it.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Build and check everything, print the plan, train nothing.")
FLAGS = "accepted: --config=FILE, --config.KEY=VALUE, --workdir=DIR, --dry_run"
ACCEPTED = "accepted: a file whose get_config() returns a ConfigDict, as configs/kd.py"


def main(_) -> int:
    logging.set_verbosity(logging.FATAL)  # orbax tells every file it touches, and each error that it raises too
    own = stdlib_logging.getLogger("jaxdistill")  # but what this project warns of (an unreadable image) must be seen
    own.setLevel(stdlib_logging.WARNING)
    own.addHandler(stdlib_logging.StreamHandler())
    own.propagate = False  # absl has a handler too
    from jaxdistill import report  # here, so that --help need not wait for JAX
    from jaxdistill.training import loop, preflight

    if DRY_RUN.value:
        preflight.dry_run(CONFIG.value)
        return 0
    try:
        loop.run(CONFIG.value, WORKDIR.value)
        report.main(["report", WORKDIR.value])
    except (loop.Interrupted, loop.Sick) as stop:
        print(stop, file=sys.stderr)
        return stop.code
    return 0


def parse(argv: list[str]) -> list[str]:
    """absl's flags; whatever is wrong with them or with the config file becomes one line."""
    check_config(argv)
    try:
        rest = flags.FLAGS(argv)
    except flags.Error as error:
        raise UserError(f"flags: {error}" + (f"; {FLAGS}" if isinstance(error, flags.UnrecognizedFlagError) else "")) from None
    if not isinstance(CONFIG.value, ConfigDict):
        raise UserError(f"--config: missing; {ACCEPTED}")
    if len(rest) > 1:
        raise UserError(f"flags: found {rest[1]!r}; {FLAGS}")
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


def cli() -> None:
    command(lambda: app.run(main, flags_parser=parse))


if __name__ == "__main__":
    cli()
