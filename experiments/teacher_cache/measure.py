"""What a cached teacher saves: the default job's student (configs/kd.py, logits alone), with its teacher beside it and with what it said.

    python -m experiments.teacher_cache.measure [--steps=200 | --epochs=4] [--width=160 --depth=3]

All sides take the same batches from the same beginning, in turn, each from its own compiled step, so that whatever else the machine does
strikes all alike: an update each, or with --epochs an epoch each, all its updates one after another. An update is its step, and fetching
its batch: what a cache has to read is in it. The teacher is an untrained one, which changes no time. width, depth: of the teacher, whose
heads stay 4. Beside them, what no cache can serve (the default's own feature term, which reads the teacher's blocks) and what no cache
can beat (no teacher at all).
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import jax

from configs import kd
from jaxdistill.data import text
from jaxdistill.data.teacher_cache import Options
from jaxdistill.training import loop, plan, prepare, sharding, teach

FORMATS = {
    "hidden, float32": Options("hidden", "float32"), "hidden, bfloat16": Options("hidden"), "topk, k = 64": Options("topk"),
    "topk, k = 64, float32": Options("topk", "float32"), "sampled, 12": Options("sampled"),
}


OFF = ((0.0, 0.0),)


def config(width: int, depth: int, path: str = "", cache: str = "", **weights):
    """The default job. weights: of its terms, where they are others than the default's."""
    job = kd.get_config()
    job.mesh = (1, 1, 1)
    for term, weight in {"hidden": OFF, **weights}.items():
        job[term].weight = weight
    for section in (job.teacher, job.run.teacher.model):
        section.width, section.depth = width, depth
    job.teacher.path, job.teacher.cache = path, cache
    return job


class Side:
    """One of those that are compared: its compiled step, its state, and its batches."""

    def __init__(self, job):
        built = prepare.build(next(run for run in plan.expand(job) if run.name == "kd"))
        self.ready = prepare.prepare(built, sharding.make_mesh(job.mesh))
        self.data = built.recipe.data("train", 0)
        self.batch = self.ready.place(next(self.data))
        self.compiled, _ = prepare.compile_step(self.ready, self.batch)
        self.state = self.ready.state
        self.frozen = sum(leaf.nbytes for leaf in jax.tree.leaves(self.ready.frozen))

    def step(self) -> tuple[float, float]:
        """Seconds of an update, and those of them that its batch took."""
        since = time.perf_counter()
        batch = self.ready.place(next(self.data))
        jax.block_until_ready(batch)
        fetched = time.perf_counter() - since
        self.state, metrics = self.compiled(self.state, self.ready.frozen, self.batch)
        jax.block_until_ready((self.state.params, metrics))
        self.batch = batch
        return time.perf_counter() - since, fetched


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=0)
    parser.add_argument("--width", type=int, default=160)
    parser.add_argument("--depth", type=int, default=3)
    args = parser.parse_args()
    size = args.width, args.depth
    with tempfile.TemporaryDirectory() as scratch:
        loop.check(config(*size), Path(scratch))
        teacher = str(Path(scratch) / "teacher")
        sides, bytes_of = {"online": Side(config(*size, teacher))}, {}
        sides["online, hidden term too"] = Side(config(*size, teacher, hidden=kd.get_config().hidden.weight))
        sides["no teacher"] = Side(config(*size, teacher, kd=OFF))
        corpus = text.load(next(run for run in plan.expand(config(*size)) if run.name == "kd").config.data.build(text.TextConfig))
        for name, options in FORMATS.items():
            folder = Path(scratch) / name
            since = time.perf_counter()
            teach.run(config(*size, teacher), folder, options, say=lambda line: None)
            stored = [path.stat().st_size for path in (folder / "shards").glob("train-*")]
            bytes_of[name] = sum(stored) / corpus.splits["train"].predicted
            print(f"{name}: stored in {time.perf_counter() - since:.1f} s, {bytes_of[name]:.1f} bytes a token", flush=True)
            sides[name] = Side(config(*size, teacher, str(folder)))
        for side in sides.values():  # the first is probed, opens the shards, and warms up
            side.step()
        times = {name: [] for name in sides}
        names = list(sides)
        updates = len(corpus.splits["train"]) // kd.get_config().train.batch if args.epochs else 1
        for turn in range(args.epochs or args.steps):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:  # none always comes after the same one
                steps = [sides[name].step() for _ in range(updates)]
                times[name].append(tuple(sum(column) / updates for column in zip(*steps, strict=True)))
    online = [seconds for seconds, _ in times["online"]]
    print(f"\nteacher {args.width} x {args.depth}, vocabulary {corpus.vocab}, "
          f"{f'{args.epochs} epochs of {updates}' if args.epochs else args.steps} updates each, medians:")
    for name, taken in times.items():
        ratio = statistics.median(a / b for a, (b, _) in zip(online, taken, strict=True))
        update, fetch = (1e3 * statistics.median(column) for column in zip(*taken, strict=True))
        each = f"; {bytes_of[name]:.1f} bytes a token" if name in bytes_of else ""
        print(f"{name:24} {update:7.1f} ms an update ({fetch:.2f} of them the batch), online / this {ratio:.2f}; "
              f"{sides[name].frozen / 2**20:.2f} MiB frozen{each}")


if __name__ == "__main__":
    main()
