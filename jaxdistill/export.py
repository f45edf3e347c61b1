"""python -m jaxdistill.export WORKDIR OUT [--run=NAME-SEED]: the deployed student as a folder that transformers loads.

Only the student: projectors, routers and teachers stay behind.
"""

import argparse
import json
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
    folder = flags.workdir / "runs" / run
    if not (folder / "result.json").exists():
        found = ", ".join(sorted(path.parent.name for path in flags.workdir.glob("runs/*/result.json"))) or "none is"
        raise UserError(f"--run: found {run!r}, which is not a finished run of {flags.workdir}; accepted: {found}")
    if flags.out.exists() and (not flags.out.is_dir() or any(flags.out.iterdir())):
        raise UserError(f"{flags.out}: exists already; accepted: a new folder, or an empty one")
    shutil.copytree(folder / "export", flags.out, dirs_exist_ok=True)
    print(f"{run} exported to {flags.out}")
    return 0


def headline(workdir: Path) -> str:
    """The headline run of the job in `workdir`, with its first seed."""
    try:
        config = json.loads((workdir / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{workdir / 'config.json'}: {error}; accepted: the workdir of a job") from None
    return f"{config['headline'] or config['runs'][-1]}-{config['seeds'][0]}"


def cli() -> None:
    command(lambda: main(sys.argv))


if __name__ == "__main__":
    cli()
