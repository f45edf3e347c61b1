"""Flags -> training.loop.run(config, workdir)."""

import sys

from absl import app, flags, logging
from ml_collections import config_flags

from jaxdistill import UserError, command

CONFIG = config_flags.DEFINE_config_file("config", None, "The job: configs/kd.py, or one of yours.")
WORKDIR = flags.DEFINE_string("workdir", "workdir", "Where the job lives. The same command there goes on with it.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Build and check everything, print the plan, train nothing.")


def main(_) -> int:
    if CONFIG.value is None:
        raise UserError("--config: missing; accepted: a file with get_config(), as in --config=configs/kd.py")
    logging.set_verbosity(logging.WARNING)  # orbax tells every file it touches
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
    try:
        rest = flags.FLAGS(argv)
    except flags.Error as error:
        raise UserError(f"flags: {error}") from None
    except (AttributeError, KeyError) as error:
        raise UserError(f"flags: found the config key {error}, which the config does not have; accepted: its keys") from None
    except (ImportError, OSError, SyntaxError, TypeError, ValueError) as error:
        raise UserError(f"--config: {type(error).__name__}: {error}; accepted: a file with get_config()") from None
    if len(rest) > 1:
        raise UserError(f"flags: found {rest[1]!r}; accepted: flags only (--config=..., --config.key=value, --workdir=..., --dry_run)")
    return rest


def cli() -> None:
    command(lambda: app.run(main, flags_parser=parse))


if __name__ == "__main__":
    cli()
