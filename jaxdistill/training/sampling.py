"""Updates whose batch the student itself writes: which they are, and the program that writes it, apart from the step's."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.recipe import Sampler
from jaxdistill.training import sharding
from jaxdistill.training.prepare import Prepared
from jaxdistill.training.state import TrainState

ASIDE = np.uint32(2**32 - 1)  # folded into the run's key, as no update's number is: the step's own draws stay what they are


class Sampling:
    """What `recipe.sampler` says, done. Nothing of it is state: the run's key and the update's number decide everything, so that a
    resumed run and every process do the same."""

    def __init__(self, ready: Prepared, state: TrainState):
        self._ready, sampler = ready, ready.built.recipe.sampler
        self._on = sampler is not None
        if not self._on:
            return
        whole = sharding.replicate(ready.mesh)
        gather = sharding.gathering(ready.built.recipe.sharding_rules, ready.mesh)
        decide = jax.jit(lambda key: chosen(sampler, key, ready.built.train.steps), out_shardings=whole)
        self.chosen = np.asarray(jax.device_get(decide(state.rng)))

        def draw(params, extra, frozen, batch, key, at):
            key, _ = jax.random.split(_of_update(key, at))
            return sampler.draw(gather(params), extra, gather(frozen), batch, key)

        self._draw = jax.jit(draw, out_shardings=(ready.batch_place, whole))

    def replace(self, at: int, state: TrainState, batch: dict) -> tuple[dict, dict | None]:
        """(the batch of update `at`, counted from 0, as it is trained on; what was seen of the samples, or None where there are
        none). Returns before it is computed."""
        if not self._on or not self.chosen[at]:
            return batch, None
        return self._draw(state.params, state.extra, self._ready.frozen, batch, state.rng, np.int32(at))

    def record(self, line: dict, drawn: dict | None) -> dict:
        """The update's line: it says whether the batch was sampled, and then has in `samples` what was seen of it. There are its probes
        too: those of text and of samples are not one curve."""
        if not self._on:
            return line
        if drawn is None:
            return line | {"sampled": False}
        seen = {name: (float(total), float(count)) for name, (total, count) in drawn.items()}
        means = {name: total / count for name, (total, count) in seen.items() if count > 0}
        return line | {"sampled": True, "samples": means | line["probes"], "probes": {}}


def chosen(sampler: Sampler, key, steps: int):
    """bool [steps]: for each update, whether its own uniform number is below the fraction."""
    each = jnp.arange(steps)
    draws = jax.vmap(lambda at: jax.random.uniform(jax.random.split(_of_update(key, at))[1]))(each)
    return draws < jax.vmap(sampler.fraction)(each)


def _of_update(key, at):
    return jax.random.fold_in(jax.random.fold_in(key, ASIDE), at)
