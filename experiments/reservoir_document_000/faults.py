"""python experiments/reservoir_document_000/faults.py: what makes "all zeros", "3-4 classes predicted" and "2-8 % accuracy".

First the kernel activation of a vector's norm, which document 000 began with, beside that of each neuron, at widths from 4 to 4,096. Then
one small classifier of the embedded actions (statistics of their channels, fifty classes, other subjects in the test), trained right and
with one fault at a time, five seeds; last the split that the library refuses.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdistill import UserError
from jaxdistill.data import group_splits, sequences
from jaxdistill.evaluators import floors
from jaxdistill.models.kaf import KAF, PRESETS

WIDTHS, SEEDS, UPDATES, BATCH = (4, 16, 32, 64, 256, 1024, 4096), range(5), 600, 32
GAMMA, POINTS = PRESETS["paper"].gamma, tuple(PRESETS["paper"].points.tolist())


def of_the_norm(s, alpha):
    """sum_i alpha_i exp(-gamma |s - d_i|^2) for the whole vector s [batch, units] at once: one kernel value a point, not one a neuron."""
    distance = jnp.stack([jnp.sum(jnp.square(s - point), axis=-1) for point in POINTS], axis=-1)
    return jnp.exp(-GAMMA * distance) @ alpha


def underflow() -> None:
    print("| width | of the norm: largest output | largest gradient | of each neuron: largest output | least norm of a row's gradient |")
    print("|---|---|---|---|---|")
    for width in WIDTHS:
        s = jax.random.normal(jax.random.key(0), (64, width))
        alpha = 0.3 * jax.random.normal(jax.random.key(1), (len(POINTS), width))
        value, slope = of_the_norm(s, alpha), jax.grad(lambda s: jnp.sum(of_the_norm(s, alpha)))(s)  # noqa: B023
        module = KAF("paper", "elu")
        params = module.init(jax.random.key(1), s)
        right, gradient = module.apply(params, s), jax.grad(lambda s: jnp.sum(module.apply(params, s)))(s)  # noqa: B023
        least = jnp.min(jnp.linalg.norm(gradient, axis=-1))
        print(f"| {width:,} | {jnp.abs(value).max():.2g} | {jnp.abs(slope).max():.2g} | {jnp.abs(right).max():.2f} | {least:.2f} |")


class Classifier(nn.Module):
    """norm: of the features (right), of the batch (its own mean and deviation, at inference too), none. kernel: neuron | norm."""

    kernel: str = "neuron"
    norm: str = "features"

    @nn.compact
    def __call__(self, x):
        s = nn.Dense(128)(x)
        if self.norm == "features":
            s = nn.LayerNorm()(s)
        if self.norm == "batch":
            s = (s - s.mean(axis=0)) / jnp.sqrt(s.var(axis=0) + 1e-6)
        if self.kernel == "neuron":
            s = KAF("paper", "elu")(s)
        else:
            s = of_the_norm(s, self.param("alpha", nn.initializers.normal(0.3), (len(POINTS), 128)))
        return nn.Dense(50)(s)


def train(model: Classifier, x, y, seed: int):
    """The trained parameters."""
    params = model.init(jax.random.key(seed), x[:2])
    chain = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(optax.cosine_decay_schedule(2e-3, UPDATES), weight_decay=0.01))
    state, rng = chain.init(params), np.random.default_rng(seed)

    @jax.jit
    def step(params, state, x, y):
        loss = lambda p: optax.softmax_cross_entropy_with_integer_labels(model.apply(p, x), y).mean()  # noqa: E731
        updates, state = chain.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(UPDATES):
        rows = rng.integers(0, len(x), BATCH)
        params, state = step(params, state, x[rows], y[rows])
    return params


def predicted(model: Classifier, params, x, size: int) -> np.ndarray:
    look = jax.jit(functools.partial(model.apply, params))
    return np.concatenate([np.argmax(look(x[at : at + size]), axis=-1) for at in range(0, len(x), size)])


def row(name: str, found: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """found: of each seed what was predicted and what is right."""
    right = [100 * np.mean(p == y) for p, y in found]
    kinds = np.mean([len(np.unique(p)) for p, _ in found])
    print(f"| {name} | {np.mean(right):.1f} ± {np.std(right, ddof=1):.1f} % | {kinds:.0f} |", flush=True)


def faults() -> None:
    splits = sequences.load(sequences.SequenceConfig(validation=0.0)).splits
    (x, y), (test_x, test_y) = (sequences.features(splits[part]) for part in ("train", "test"))
    scale = floors.standardiser(x)
    x, test_x = (scale(values).astype(np.float32) for values in (x, test_x))
    rng = np.random.default_rng(0)
    mixed, by_class = rng.permutation(len(test_y)), np.argsort(test_y, kind="stable")
    print("\n| | accuracy, 5 seeds | classes predicted of 50 |\n|---|---|---|")

    def each(model, train_x, train_y):
        return [train(model, train_x, train_y, seed) for seed in SEEDS]

    def report(name, model, fitted, order=mixed, size=32):
        row(name, [(predicted(model, params, test_x[order], size), test_y[order]) for params in fitted])

    right = Classifier()
    report("right", right, each(right, x, y))
    for norm in ("none", "features"):
        wrong = Classifier(kernel="norm", norm=norm)
        report(f"kernel of the norm, LayerNorm {'in front' if norm == 'features' else 'nowhere'}", wrong, each(wrong, x, y))
    batch = Classifier(norm="batch")
    fitted = each(batch, x, y)
    for size in (32, 8, 2, 1):
        report(f"batch statistics, tested {size} at a time, mixed", batch, fitted, size=size)
    report("batch statistics, tested 32 at a time, in the order of the classes", batch, fitted, by_class)
    report("right, tested 1 at a time, in the order of the classes", right, each(right, x, y), by_class, 1)
    report("labels of other examples (x and y shuffled apart)", right, each(right, x, rng.permutation(y)))
    some = y < 25
    row("classes 0 to 24 trained, 25 to 49 tested",
        [(predicted(right, p, test_x[test_y >= 25], 32), test_y[test_y >= 25]) for p in each(right, x[some], y[some])])


def refused() -> None:
    names, labels = [f"clip {i}" for i in range(100)], [i // 2 for i in range(100)]
    groups = ["first" if label < 25 else "second" for label in labels]
    try:
        group_splits.assign(group_splits.Rule(split="groups", group="half", test_groups=("second",), validation=0.0), names, labels, groups)
    except UserError as error:
        print(f"\nand the library: error: {error}")


if __name__ == "__main__":
    underflow()
    faults()
    refused()
