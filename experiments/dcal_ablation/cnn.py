"""A plain convolutional network on the images of `data`, to stand beside the ViTs: what the same pixels give another architecture.

Three convolutions 3 x 3 (32, 64, 128), each with ReLU and a max-pool by 2, then one hidden layer. A recipe that lives outside the package.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxdistill.data import image_batches, images
from jaxdistill.evaluators import classification
from jaxdistill.losses.classification import cross_entropy
from jaxdistill.recipe import Aux, Evaluator, Recipe, Schedule, Term, Variables
from jaxdistill.recipes.lm import groups


def pool(x):
    """The maximum of each 2 x 2. x: [B, H, W, C]. By reshaping: the gradient of nn.max_pool is 2.5 times as slow on a CPU."""
    batch, height, width, channels = x.shape
    rows, columns = height // 2, width // 2
    return x[:, :2 * rows, :2 * columns].reshape(batch, rows, 2, columns, 2, channels).max((2, 4))


class CNN(nn.Module):
    classes: int

    @nn.compact
    def __call__(self, x):
        for width in (32, 64, 128):
            x = pool(nn.relu(nn.Conv(width, (3, 3))(x)))
        return nn.Dense(self.classes)(nn.relu(nn.Dense(256)(x.reshape(len(x), -1))))


def make(config) -> Recipe:
    data, batch = config.data.build(images.ImageConfig), config.train.batch
    sets = images.load(data)
    module = CNN(len(sets.classes))
    example = jnp.zeros((1, *data.size, data.channels))
    shapes = jax.eval_shape(module.init, jax.random.key(0), example)["params"]

    def logits(params, batch):
        return module.apply({"params": params}, batch["image"] / jnp.float32(255) * 2 - 1)

    def loss(params, extra, frozen, batch, dials, key):
        values = cross_entropy(logits(params, batch), batch["label"], where=batch["valid"])
        term = Term(jnp.sum(values), jnp.sum(batch["valid"], dtype=jnp.float32))
        return dials.scale["ce"] * term.sum, Aux({"ce": term})

    def measure(params, variables, frozen, batch):
        return classification.sums({"cnn": logits(params, batch)}, batch["label"], batch["valid"])

    return Recipe(
        init=lambda key: Variables(module.init(key, example)["params"]),
        loss=loss,
        weights={"ce": Schedule(((0.0, 1.0),))},
        optim_rules=groups("cnn", "", "kernel$", config.optimizer.weight_decay),
        data=lambda split, seed: image_batches.batches(
            sets.splits[split], data, batch=batch, seed=seed, training=split == "train",
            process_index=jax.process_index(), process_count=jax.process_count()),
        evaluators={split: Evaluator(split, measure, classification.finish) for split in sets.splits if split != "train"},
        facts={**sets.facts, "parameters": sum(leaf.size for leaf in jax.tree.leaves(shapes))},
    )
