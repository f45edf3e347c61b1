"""What the probes cost: the default job's student (configs/kd.py), with them and without, step by step in one process.

    python -m experiments.doctor.overhead --steps 200

Both steps take the same batches from the same beginning, in turn, so that whatever else the machine does strikes both. Without probes
is a program that has none; with them is the default: norms at every update, distributions at every tenth. The teacher is an untrained
one of the job's size, which changes no time. Deep looks are not in it: they are no part of the step (a line tells what one costs).
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import jax

from configs import kd
from jaxdistill.training import loop, plan, prepare, sharding
from jaxdistill.training.deep import Deep
from jaxdistill.training.defaults import defaults


def ready(every: int, scratch: Path) -> prepare.Prepared:
    """The run `kd` of the default job, probed at every `every`-th update."""
    config = kd.get_config()
    config.mesh, config.probes.every = (1, 1, 1), every
    built = next(one for one in loop.check(config, scratch) if one.run.name == "kd")
    return prepare.prepare(built, sharding.make_mesh(plan.as_dict(config)["mesh"]))


class Side:
    """One of the two: its compiled step and its state."""

    def __init__(self, every: int, scratch: Path):
        self.ready = ready(every, scratch)
        self.data = self.ready.built.recipe.data("train", 0)
        self.batch = self.ready.place(next(self.data))
        since = time.process_time()
        self.compiled, self.gates = prepare.compile_step(self.ready, self.batch)
        self.compiling, self.state, self.probed = time.process_time() - since, self.ready.state, False

    def step(self) -> float:
        since = time.perf_counter()
        self.state, metrics = self.compiled(self.state, self.ready.frozen, self.batch)
        jax.block_until_ready((self.state.params, metrics))
        seconds = time.perf_counter() - since
        self.batch, self.probed = self.ready.place(next(self.data)), bool(metrics["probing"])
        return seconds


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    every = defaults().probes.every
    with tempfile.TemporaryDirectory() as scratch:
        off, on = (Side(number, Path(scratch) / str(number)) for number in (0, every))
        for side in (off, on):  # the first is probed, and warms up
            side.step()
        times, looked = [], []
        for turn in range(args.steps):
            first, second = (off, on) if turn % 2 else (on, off)  # neither always comes after the other
            taken = {first: first.step(), second: second.step()}
            times.append((taken[off], taken[on]))
            looked.append(on.probed)
        since = time.perf_counter()
        inside = Deep(on.ready, on.gates)
        inside.look(on.state, on.batch)
        compiling = time.perf_counter() - since
        since = time.perf_counter()
        inside.look(on.state, on.batch)
        deep = time.perf_counter() - since

    def report(name: str, chosen: list[tuple[float, float]]) -> float:
        without, with_ = (statistics.median(column) for column in zip(*chosen, strict=True))
        ratio = statistics.median(b / a for a, b in chosen)
        print(f"{name}: {len(chosen)} updates, without probes {without * 1e3:.1f} ms, with {with_ * 1e3:.1f} ms; median ratio {ratio:.4f}")
        return ratio

    plain = report("not looked at", [pair for pair, seen in zip(times, looked, strict=True) if not seen])
    probed = report("looked at", [pair for pair, seen in zip(times, looked, strict=True) if seen])
    print(f"probes: {((every - 1) * plain + probed) / every - 1:+.2%} of a step, one of {every} being looked at")
    print(f"compiling, CPU seconds: {off.compiling:.1f} without, {on.compiling:.1f} with")
    print(f"a deep look: {deep:.2f} s, and {compiling:.1f} s the first time; {deep / on.ready.built.probes.deep * 1e3:.2f} ms an update")


if __name__ == "__main__":
    main()
