"""python -m jaxdistill.cache --config=configs/kd.py[:variant] [--config.key=value ...] --workdir=DIR [--format=...]

The job's teacher runs once over what its students train and are measured on, and DIR keeps what it said. Training then has no teacher
in memory: the same config with --config.teacher.cache=DIR. Whatever the job runs before (a teacher that is trained) is run in DIR
first, or found where finished runs are kept. After an interruption or a kill the same command goes on.
"""

import sys

from absl import app, flags

from jaxdistill import UserError, command, main
from jaxdistill.data.teacher_cache import DTYPES, FORMATS, Options

DEFAULT = Options()
flags.DEFINE_enum("format", DEFAULT.format, ("", *FORMATS), "What is kept of the split that trains: hidden (last states: the default), "
                  "topk, sampled; of a classifier logits.")
flags.DEFINE_enum("dtype", DEFAULT.dtype, ("", *DTYPES), "By default bfloat16 of hidden, float16 of topk, float32 of logits.")
flags.DEFINE_integer("k", DEFAULT.k, "topk: ids of each token.")
flags.DEFINE_integer("samples", DEFAULT.samples, "sampled: ids of each token in a draw.")
flags.DEFINE_integer("draws", DEFAULT.draws, "sampled: draws of each row; epochs take them in turn.")
flags.DEFINE_float("gamma", DEFAULT.gamma, "sampled: the power of the teacher's probabilities of which is drawn; 1: no weights are kept.")
flags.DEFINE_list("temperatures", [], "topk: at which all other ids are weighed; sampled: of the draw. By default kd.temperature.")
flags.DEFINE_integer("views", DEFAULT.views, "Augmented images: views of each; epochs take them in turn.")
flags.DEFINE_integer("seed", DEFAULT.seed, "Of draws and views.")
NAMES = ("format", "dtype", "k", "samples", "draws", "gamma", "temperatures", "views", "seed")
ACCEPTED = f"{main.JOB_FLAGS}, {', '.join(f'--{name}' for name in NAMES)}"


def run(_) -> int:
    main.quiet()
    for flag in (main.COORDINATOR, main.PROCESSES, main.PROCESS, main.DISTRIBUTED, main.MEET):
        if flag.present:
            raise UserError(f"--{flag.name}: found with jaxdistill.cache, which is one process; {ACCEPTED}")
    from jaxdistill.training import distributed, loop, teach  # here, so that --help need not wait for JAX

    distributed.alone("one process, which uses all its devices")

    try:
        teach.run(main.CONFIG.value, main.WORKDIR.value, _options(), dry_run=main.DRY_RUN.value)
    except (loop.Interrupted, loop.Sick) as stop:
        print(stop, file=sys.stderr)
        return stop.code
    return 0


def _options() -> Options:
    given = {name: flags.FLAGS[name].value for name in NAMES}
    try:
        given["temperatures"] = tuple(float(value) for value in given["temperatures"])
    except ValueError:
        raise UserError(f"--temperatures: found {given['temperatures']}; accepted: numbers, as in 1,2") from None
    return Options(**given)


def cli() -> None:
    command(lambda: app.run(run, flags_parser=lambda argv: main.parse(argv, ACCEPTED)))


if __name__ == "__main__":
    cli()
