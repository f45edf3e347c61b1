"""A look inside a run, every `probes.deep` updates: each term's own gradient, dead leaves, an example by itself, the moving average.

It costs several updates and has no part in any: its programs are its own, compiled when they are first asked for.
"""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdistill.training import objective, optim, sharding
from jaxdistill.training.state import TrainState, deployed, make_eval_step, make_gradients

IN_A_HURRY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # compiled for a few calls


class Deep:
    """look(state, batch) -> the deep record of the update that ended in `state`, as plain numbers; every process must call it.

    gates: they know which term should move which leaf. Of the gradients of all terms at once, memory is needed for as many copies of
    the trainable parameters as there are terms."""

    def __init__(self, ready, gates):
        self.ready, self.gates = ready, gates
        self._gather = sharding.gathering(ready.built.recipe.sharding_rules, ready.mesh)
        self._programs: dict[str, Any] = {}
        self._examples: dict | None = None

    def look(self, state: TrainState, batch: dict) -> dict:
        ready = self.ready
        recipe = ready.built.recipe
        terms = jax.device_get(self._jitted("terms", self._terms)(state, ready.frozen, batch))
        names = tuple(objective.weights_at(recipe.weights, state.controls, state.step))
        on = {name for name, weight in zip(names, terms["weights"], strict=True) if weight != 0}
        found = gradients(names, terms["gram"])
        found["zero_gradient"] = [leaf for leaf, reach, zero in zip(self.gates.leaves, self.gates.reach, terms["zero"], strict=True)
                                  if zero and reach & on]
        found["batch_of_one"] = self._batch_of_one(state)
        found |= {"ema_distance": None, "ema_initial": None}
        if state.ema is not None:
            found |= {name: float(value) for name, value in self._jitted("average", self._average)(state, self._initial()).items()}
        return found

    def _jitted(self, name: str, function):
        if name not in self._programs:
            hurry = IN_A_HURRY if self.ready.mesh.devices.flat[0].platform == "cpu" else None
            self._programs[name] = jax.jit(function, out_shardings=sharding.replicate(self.ready.mesh), compiler_options=hurry)
        return self._programs[name]

    def _terms(self, state: TrainState, frozen, batch) -> dict:
        """gram [terms, terms]: inner products of the gradients of the weighted terms, at the draws and weights [terms] of this update
        and the parameters after it. zero [leaves]: which leaves no term gives a gradient."""
        recipe, groups = self.ready.built.recipe, self.ready.groups
        at = state.step - 1
        weights = objective.weights_at(recipe.weights, state.controls, at)
        knobs = {name: schedule(at) for name, schedule in recipe.knobs.items()}
        whole = make_gradients(recipe, groups, self.ready.built.train.micro, self._gather)

        def one(hot):  # one compiled gradient serves all terms
            alone = {name: hot[index] * weight for index, (name, weight) in enumerate(weights.items())}
            return whole(state.params, state.extra, frozen, batch, alone, knobs, jax.random.fold_in(state.rng, at))[0]

        each = [leaf.reshape(len(weights), -1) for leaf in jax.tree.leaves(jax.lax.map(one, jnp.eye(len(weights))))]
        products = [jnp.einsum("ip,jp->ij", leaf, leaf, precision="highest", preferred_element_type=jnp.float32) for leaf in each]
        return {"gram": sum(products), "weights": jnp.stack(list(weights.values())), "zero": jnp.stack([jnp.all(x == 0) for x in each])}

    def _average(self, state: TrainState, initial) -> dict:
        now, average = (optim.cut(tree, self.ready.groups) for tree in (state.params, deployed(state)))
        apart = lambda a, b, size: optax.tree.norm(optax.tree.sub(a, b)) / jnp.maximum(optax.tree.norm(size), 1e-30)  # noqa: E731
        return {"ema_distance": apart(average, now, now), "ema_initial": apart(average, initial, average)}

    def _initial(self):
        """The trainable parameters as they were drawn; drawn again, which costs less than to keep them."""
        drawn = self.ready.built.recipe.init(jax.random.fold_in(jax.random.key(self.ready.built.run.seed), 0)).params
        places = jax.tree.map(lambda x: x.sharding, self.ready.abstract.params)
        return optim.cut(jax.tree.map(sharding.place, drawn, places), self.ready.groups)

    def _batch_of_one(self, state: TrainState) -> float | None:
        """See `difference`; of the first and the last example of the first batch that is evaluated. None where `valid`, by which one
        example alone can be asked for, is not in it."""
        evaluators = self.ready.built.recipe.evaluators.values()
        evaluator = next((one for one in evaluators if one.split != "test"), None)
        if evaluator is None:
            return None
        if self._examples is None:
            with contextlib.closing(self.ready.built.recipe.data(evaluator.split, 0)) as data:
                self._examples = self.ready.place(next(data))
        batch = self._examples
        if "valid" not in batch:
            return None
        step = make_eval_step(evaluator, self._gather)
        count = len(batch["valid"])

        def measure(params, extra, frozen, batch):
            rows = jnp.stack([jnp.argmax(batch["valid"]), count - 1 - jnp.argmax(batch["valid"][::-1])])

            def one(row):
                alone = {name: jax.lax.dynamic_slice_in_dim(x, row, 1) for name, x in batch.items()}
                among = batch | {"valid": jnp.arange(count) == row}
                return step(params, extra, frozen, among), step(params, extra, frozen, alone)

            return rows, *jax.lax.map(one, rows)

        found = self._jitted("alone", measure)(deployed(state), state.extra, self.ready.frozen, batch)
        return difference(*jax.device_get(found))


def gradients(names: tuple[str, ...], gram: np.ndarray) -> dict:
    """Inner products of the gradients of terms -> their norms, each one's share of the sum of norms, and the cosine of each pair in
    which none is 0."""
    norms = np.sqrt(np.diag(gram).astype(np.float64))
    total = norms.sum()
    of = zip(names, norms.tolist(), strict=True)
    terms = {name: {"grad_norm": norm, "share": norm / float(total) if total else 0.0} for name, norm in of}
    cosines = {
        f"{names[i]}|{names[j]}": float(gram[i, j] / (norms[i] * norms[j]))
        for i in range(len(names)) for j in range(i + 1, len(names)) if norms[i] * norms[j] > 0
    }
    return {"terms": terms, "cosines": cosines}


def difference(rows: np.ndarray, among: dict, alone: dict) -> float | None:
    """The largest difference between what is measured of an example in its batch and of the same example as a batch of one, over the
    largest number of its kind; None where nothing can be compared.

    among, alone: arrays with an entry for each of `rows`: a value an example ([rows, batch, ...] and [rows, 1, ...]), or a sum over
    the examples that count, of which there is one. Whole numbers are not compared: a near tie may be counted either way."""
    largest = None
    for name, a in among.items():
        a, b = np.asarray(a), np.asarray(alone[name])
        if not np.issubdtype(a.dtype, np.floating) and a.dtype.name != "bfloat16":
            continue
        if a.shape != b.shape:
            a, b = a[np.arange(len(rows)), rows], b[:, 0]
        a, b = a.astype(np.float64), b.astype(np.float64)
        if np.array_equal(a, np.round(a)) and np.array_equal(b, np.round(b)):
            continue
        apart = float(np.max(np.abs(a - b)) / max(np.max(np.abs(a)), np.max(np.abs(b)), 1e-30))
        largest = apart if largest is None else max(largest, apart)
    return largest
