"""floors: what any model must beat on the images of `data`, in the table beside the runs that train.

Fitted on the pixels of the whole training split as evaluation has it (no augmentation), deterministic, nothing to train:
run it with `train.steps=0`. Config: `data` (data.images.ImageConfig), `floor` (below), `train.batch`.
"""

import dataclasses
import functools

import jax
import numpy as np

from jaxdistill import UserError
from jaxdistill.data import image_batches, images
from jaxdistill.evaluators import floors
from jaxdistill.recipe import Evaluator, Recipe, Variables


@dataclasses.dataclass(frozen=True)
class FloorConfig:
    """The section `floor`. kind: constant (the commonest class) | nearest (training image, by `metric`) | logistic (regression).
    metric: cosine | euclidean."""

    kind: str = "logistic"
    metric: str = "cosine"

    def __post_init__(self):
        for key, accepted in (("kind", floors.FITS), ("metric", floors.METRICS)):
            if getattr(self, key) not in tuple(accepted):
                raise UserError(f"config key floor.{key}: found {getattr(self, key)!r}; accepted: {' | '.join(accepted)}")


def make(config) -> Recipe:
    chosen, source = config.floor.build(FloorConfig), config.data.build(images.ImageConfig)
    batch, steps = config.train.batch, config.train.steps
    if steps:
        raise UserError(f"config key train.steps: found {steps}; accepted: 0, as the recipe floors has nothing to train")
    if source.task != "classification":
        raise UserError(f"config key data.task: found {source.task!r}; accepted: 'classification' with the recipe floors")
    loaded = images.load(source)
    options = {"metric": chosen.metric} if chosen.kind == "nearest" else {}

    @functools.cache  # validation and test are measured by one fit
    def predict():
        whole = image_batches.batches(loaded.splits["train"], source, batch=batch, seed=0, training=False)  # by each process: it is small
        return floors.FITS[chosen.kind](*pixels([{key: row[key] for key in KEYS} for row in whole]), **options)

    def finish(stacked: dict[str, np.ndarray]) -> dict[str, float]:
        rows = [dict(zip(stacked, row, strict=True)) for row in zip(*stacked.values(), strict=True)]
        features, labels = pixels(rows)
        return {"accuracy": floors.accuracy(predict()(features), labels)}

    def data(split: str, seed: int):
        return image_batches.batches(
            loaded.splits[split], source, batch=batch, seed=seed, training=split == "train",
            process_index=jax.process_index(), process_count=jax.process_count(),
        )  # fmt: skip

    def loss(params, extra, frozen, batch, dials, key):
        raise NotImplementedError("a floor has nothing to train")

    return Recipe(
        init=lambda key: Variables({}), loss=loss, weights={}, optim_rules=(), data=data,
        evaluators={split: Evaluator(split, measure, finish) for split in ("validation", "test") if split in loaded.splits},
        facts={**loaded.facts, "floor": dataclasses.asdict(chosen)},
    )  # fmt: skip


KEYS = ("image", "label", "valid")


def measure(student, variables, frozen, batch) -> dict:
    return {key: batch[key] for key in KEYS}


def pixels(batches: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Batches -> (float32 [N, H x W x C] from 0 to 1, labels [N]) of the valid images."""
    image, label, valid = (np.concatenate([batch[key] for batch in batches]) for key in KEYS)
    return image[valid].reshape(valid.sum(), -1).astype(np.float32) / 255, label[valid]
