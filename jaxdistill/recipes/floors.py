"""floors: what any model must beat on the examples of `data`, in the table beside the runs that train.

Fitted on the whole training split as evaluation has it (no augmentation), deterministic, nothing to train: run it with `train.steps=0`.
Images are fitted on as pixels; sequences and distributions on what their modules' `features` make of an example, standardised on the
training split. Rows have the names of the recipe that they stand beside.
Config: `floor` (below), `data` (that of data.images, data.sequences or data.distributions), `train.batch`.
"""

import dataclasses
import functools

import jax
import numpy as np

from jaxdistill import UserError
from jaxdistill.data import array_batches, distributions, image_batches, images, sequences
from jaxdistill.evaluators import calibration, classification, distribution, floors
from jaxdistill.evaluators.intervals import group_interval
from jaxdistill.recipe import Evaluator, Recipe, Variables
from jaxdistill.recipes.options import Needs, note_unused

KINDS = {"images": floors.FITS, "sequences": floors.FITS, "distributions": floors.SOFT_FITS}
REGRESSIONS = ("logistic", "softmax")
NEEDS = (Needs("floor.kind", ("nearest",), ("floor.metric",)), Needs("floor.kind", REGRESSIONS, ("floor.strength",)))


@dataclasses.dataclass(frozen=True)
class FloorConfig:
    """The section `floor`. data: images | sequences | distributions, what the section `data` describes. kind: constant (the commonest
    class; the mean distribution) | nearest (training example, by `metric`) | logistic (regression, of images and sequences) | softmax
    (regression, of distributions). metric: cosine | euclidean. strength: of logistic and softmax, the larger the less they are
    penalised (scikit-learn's C; 0: their own, 0.01 and 0.03)."""

    data: str = "images"
    kind: str = "logistic"
    metric: str = "cosine"
    strength: float = 0.0

    def __post_init__(self):
        for key, accepted in (("data", KINDS), ("kind", KINDS.get(self.data, ())), ("metric", floors.METRICS)):
            if getattr(self, key) not in tuple(accepted):
                raise UserError(f"config key floor.{key}: found {getattr(self, key)!r}; accepted: {' | '.join(accepted)}")
        if not 0 <= self.strength < float("inf"):
            raise UserError(f"config key floor.strength: found {self.strength}; accepted: 0 (the kind's own) or more")

    def fit(self, x: np.ndarray, y: np.ndarray) -> floors.Predict:
        options = {"metric": self.metric} if self.kind == "nearest" else {}
        options |= {"strength": self.strength} if self.strength and self.kind in REGRESSIONS else {}
        return KINDS[self.data][self.kind](x, y, **options)


def make(config) -> Recipe:
    chosen, steps = config.floor.build(FloorConfig), config.train.steps
    note_unused(config, NEEDS, floor=chosen)
    if steps:
        raise UserError(f"config key train.steps: found {steps}; accepted: 0, as the recipe floors has nothing to train")
    build = _images if chosen.data == "images" else _tables
    facts, splits, data, judge = build(config, chosen)

    def loss(params, extra, frozen, batch, dials, key):
        raise NotImplementedError("a floor has nothing to train")

    return Recipe(
        init=lambda key: Variables({}), loss=loss, weights={}, optim_rules=(), data=data,
        evaluators={split: judge(split) for split in ("validation", "test") if split in splits},
        facts={**facts, "floor": dataclasses.asdict(chosen)},
    )  # fmt: skip


IMAGE_KEYS = ("image", "label", "valid")


def _images(config, chosen):
    source, batch = config.data.build(images.ImageConfig), config.train.batch
    if source.task != "classification":
        raise UserError(f"config key data.task: found {source.task!r}; accepted: 'classification' with the recipe floors")
    loaded = images.load(source)

    @functools.cache  # validation and test are measured by one fit
    def predict():
        whole = image_batches.batches(loaded.splits["train"], source, batch=batch, seed=0, training=False)  # by each process: it is small
        return chosen.fit(*pixels([{key: row[key] for key in IMAGE_KEYS} for row in whole]))

    def finish(stacked: dict[str, np.ndarray]) -> dict[str, float]:
        rows = [dict(zip(stacked, row, strict=True)) for row in zip(*stacked.values(), strict=True)]
        features, labels = pixels(rows)
        return {"accuracy": floors.accuracy(predict()(features), labels)}

    def data(split: str, seed: int):
        return image_batches.batches(
            loaded.splits[split], source, batch=batch, seed=seed, training=split == "train",
            process_index=jax.process_index(), process_count=jax.process_count(),
        )  # fmt: skip

    return loaded.facts, loaded.splits, data, lambda split: Evaluator(split, _picked(IMAGE_KEYS), finish)


def pixels(batches: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Batches -> (float32 [N, H x W x C] from 0 to 1, labels [N]) of the valid images."""
    image, label, valid = (np.concatenate([batch[key] for batch in batches]) for key in IMAGE_KEYS)
    return image[valid].reshape(valid.sum(), -1).astype(np.float32) / 255, label[valid]


@dataclasses.dataclass(frozen=True)
class Numbers:
    """A split of which a batch holds the places alone: features are float64 and stay on the host."""

    size: int

    def __len__(self) -> int:
        return self.size

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        return {"index": np.asarray(indices, np.int32)}


def _tables(config, chosen):
    soft = chosen.data == "distributions"
    if soft:
        module, loaded = distributions, distributions.load(config.data.build(distributions.DistributionConfig), config.seed)
    else:
        module, loaded = sequences, sequences.load(config.data.build(sequences.SequenceConfig), config.seed)
    features = functools.cache(lambda split: module.features(loaded.splits[split]))

    @functools.cache
    def fitted():
        """(predict, the mean training target)"""
        x, y = features("train")
        scale = floors.standardiser(x)
        predict = chosen.fit(scale(x), y)
        return lambda x: predict(scale(x)), np.mean(y, axis=0) if soft else None

    def finish(split, stacked: dict[str, np.ndarray]) -> dict[str, float]:
        index = stacked["index"].reshape(-1)[stacked["valid"].reshape(-1).astype(bool)]
        (predict, mean), (x, y) = fitted(), (values[index] for values in features(split))
        if soft:
            arrays = {"logits": calibration.logs(predict(x)), "target": y, "group": loaded.splits[split].rows["group"][index],
                      "valid": np.ones(len(y), bool)}
            return distribution.finish({key: value[None] for key, value in arrays.items()}, mean)
        found = predict(x)
        table = classification.confusion(y, found, len(loaded.classes))
        ends = group_interval((found == y).astype(np.float64), loaded.splits[split].subjects[index])
        return classification.decisions(table) | (dict(zip(("accuracy_low", "accuracy_high"), ends, strict=True)) if ends else {})

    def data(split: str, seed: int):
        return array_batches.batches(
            Numbers(len(loaded.splits[split])), batch=config.train.batch, seed=seed, training=split == "train",
            process_index=jax.process_index(), process_count=jax.process_count(),
        )  # fmt: skip

    measure = _picked(("index", "valid"))
    return loaded.facts, loaded.splits, data, lambda split: Evaluator(split, measure, functools.partial(finish, split))


def _picked(keys: tuple[str, ...]):
    return lambda student, variables, frozen, batch: {key: batch[key] for key in keys}
