"""What the students of a job write: python -m experiments.on_policy.quality WORKDIR [--rows 128].

Each goes on from the first quarter of rows of the test split to their end, at temperature 1. Of these tokens: the teacher's nats a token
(low: what the teacher could have written), the student's own (low: little variety), and the share of 4-grams that a row repeats.
The last row is the real text in their place.
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill import models
from jaxdistill.data import text
from jaxdistill.models.generation import Generated, generate
from jaxdistill.recipes.on_policy import seen
from jaxdistill.training import plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--rows", type=int, default=128)
    flags = parser.parse_args()
    job = json.loads((flags.workdir / "config.json").read_text())
    runs = {run.id: run for run in plan.expand({"mesh": (-1, 1, 1), "cache": ""} | job)}
    exports = {run: flags.workdir / "runs" / run / "export" for run in runs if (flags.workdir / "runs" / run / "result.json").exists()}
    corpus = text.load(runs[next(run for run in exports if not run.startswith("teacher"))].config.data.build(text.TextConfig))
    packed = corpus.splits["test"]
    rows = packed.rows(np.flatnonzero((packed.segments == 1).all(1))[: flags.rows])  # of one document
    rows = {name: jnp.asarray(rows[name][:, :-1]) for name in rows}
    kept = packed.length // 4
    teacher, fixed = models.from_hf(exports["teacher-0"])

    @jax.jit
    def judged(tokens):
        log_probs = jax.nn.log_softmax(teacher.apply({"params": fixed}, tokens)[0][..., : corpus.vocab])
        return jnp.take_along_axis(log_probs[:, :-1], tokens[:, 1:, None], axis=2)[:, kept - 1 :, 0]

    print(f"{len(rows['tokens'])} rows\n\n| run | teacher's nats a token | its own | repetition |\n|---|---|---|---|")
    everything = jnp.ones((len(rows["tokens"]), rows["tokens"].shape[1] - kept), bool)
    for run, folder in [*exports.items(), ("the real text", None)]:
        if folder:
            module, params = models.from_hf(folder)
            found = generate(module, params, rows["tokens"][:, :kept], new=everything.shape[1], key=jax.random.key(0), vocab=corpus.vocab)
        else:
            found = Generated(rows["tokens"][:, kept:], everything, jnp.zeros(everything.shape))
        told = {name: float(total / count) for name, (total, count) in seen(found).items()}
        nats = -judged(jnp.concatenate([rows["tokens"][:, :kept], found.tokens], axis=1))
        own = f"{-told['log_prob']:.3f}" if folder else ""
        print(f"| {run} | {float(nats.mean()):.3f} | {own} | {told['repetition']:.4f} |", flush=True)


if __name__ == "__main__":
    main()
