"""python -m jaxdistill.export WORKDIR OUT [--run=NAME-SEED]: the deployed student as a folder that transformers loads.

Only the student: projectors, routers and teachers stay behind.
"""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

from jaxdistill import UserError, command


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"usage: python -m jaxdistill.export WORKDIR OUT [--run=NAME-SEED]: {message}")


def main(argv: list[str]) -> int:
    parser = _Parser(prog="python -m jaxdistill.export", description=__doc__.splitlines()[0])
    parser.add_argument("workdir", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--run", default="", help="as in WORKDIR/runs; by default the job's headline run")
    flags = parser.parse_args(argv[1:])
    run = flags.run or headline(flags.workdir)
    folder = exported(flags.workdir, run)
    if flags.out.exists() and (not flags.out.is_dir() or any(flags.out.iterdir())):
        raise UserError(f"{flags.out}: exists already; accepted: a new folder, or an empty one")
    if (flags.workdir / "runs").resolve() in (flags.out.resolve(), *flags.out.resolve().parents):
        raise UserError(f"{flags.out}: found within {flags.workdir / 'runs'}, where only the job writes; accepted: a folder elsewhere")
    temporary = flags.out.with_name(f".{flags.out.name}.{os.getpid()}")  # whole or not at all
    try:
        flags.out.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(folder, temporary)
        temporary.replace(flags.out)
    except OSError as error:
        if error.errno is None:  # of several files, as copytree reports them
            raise
        raise UserError(f"{flags.out}: {error.strerror}; accepted: a folder where there is room to write") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"{run} exported to {flags.out}")
    return 0


def exported(workdir: Path, run: str) -> Path:
    """What the finished run NAME-SEED has exported."""
    folder = workdir / "runs" / run
    if not (folder / "result.json").exists():
        found = ", ".join(sorted(path.parent.name for path in workdir.glob("runs/*/result.json"))) or "none is finished yet"
        raise UserError(f"--run: found {run!r}, which is not a finished run of {workdir}; accepted: {found}")
    if not (folder / "export").is_dir():
        raise UserError(f"{folder / 'export'}: missing: the run's recipe exports nothing; accepted: a run that has such a folder")
    return folder / "export"


def headline(workdir: Path) -> str:
    """The headline run of the job in `workdir`, with its first seed."""
    try:
        config = json.loads((workdir / "config.json").read_text())
        return f"{config['headline'] or config['runs'][-1]}-{config['seeds'][0]}"
    except (OSError, ValueError, LookupError, TypeError) as error:
        why = getattr(error, "strerror", None) or f"not a job's ({type(error).__name__}: {error})"
        raise UserError(f"{workdir / 'config.json'}: {why}; accepted: the workdir of a job") from None


def cli() -> None:
    command(lambda: main(sys.argv))


if __name__ == "__main__":
    cli()
