"""python -m tests.recipes.killed_cache JOB FOLDER: writes the cache of tests/recipes/conftest.py's job in FOLDER/whole, then again in
FOLDER/cut, where it kills itself before the third shard is renamed; FOLDER/job.py is that job as a config file.
python -m tests.recipes.killed_cache --FLAG...: the command itself, on the same devices and shards."""

import os
import signal
import sys
from pathlib import Path

from tests import conftest  # noqa: F401  (before JAX: eight CPU devices, compiled programs shared)

# isort: split
from jaxdistill import cache
from jaxdistill.data import shards
from jaxdistill.data.teacher_cache import Options
from jaxdistill.training import teach
from tests.recipes.conftest import config

shards.BYTES = 9_000  # several shards of a small split


def die(path, target, *, whole=shards.replace) -> None:
    if target.name.startswith("train-00002"):
        os.kill(os.getpid(), signal.SIGKILL)
    whole(path, target)


if __name__ == "__main__":
    if sys.argv[1].startswith("--"):
        cache.cli()
    job, folder = map(Path, sys.argv[1:])
    text = f"from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({config(job).to_dict()!r})\n"
    (folder / "job.py").write_text(text)
    teach.run(config(job), folder / "whole", Options(dtype="float32"))
    shards.replace = die
    teach.run(config(job), folder / "cut", Options(dtype="float32"))
