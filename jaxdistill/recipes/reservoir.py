"""reservoir: sequences classified by a bidirectional reservoir, representation learning, and a readout with kernel activations.

    total = mean over examples of loss + kaf.penalty * |alpha - what it began as|^2

    loss: cross-entropy, or focal; of smoothed labels, weighted by class, of logits adjusted by class frequency (section `loss`).
    Evaluation sees none of them. L2 is the optimizer's weight decay, on matrices, and stands nowhere else.

The reservoir is fixed: drawn from the run's seed, it is a constant of the step (`frozen`), has no gradient and no moments, and is in no
checkpoint, as the seed gives it again. With reservoir.trained its matrices are parameters like all others.
Sections of the config: data (data.sequences), reservoir (models.reservoir), readout (models.readout), kaf (models.kaf, and penalty; only
with readout.activation kaf), loss and plateau (below).
"""

import dataclasses
import logging
import math
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill import UserError
from jaxdistill.data import array_batches, preflight, sequences
from jaxdistill.diagnosis import charts, probes
from jaxdistill.evaluators import classification
from jaxdistill.losses.classification import WEIGHTS, adjusted, class_weights, focal
from jaxdistill.models import readout as models
from jaxdistill.models import reservoir as reservoirs
from jaxdistill.models.kaf import KAFConfig
from jaxdistill.recipe import Aux, Evaluator, Group, Recipe, Schedule, Term, Variables, on_host, probed
from jaxdistill.recipes.options import Needs, note_unused
from jaxdistill.recipes.reactions import Reaction, together

logger = logging.getLogger(__name__)
METRIC = "validation/nll"  # of the plateau
NEEDS = (Needs("loss.weights", ("effective",), ("loss.beta",)),)


@dataclasses.dataclass(frozen=True)
class PenalisedKAFConfig(KAFConfig):
    """The section `kaf`. penalty: weight of the sum of squares by which all coefficients differ from what they began as (from 0, where
    that is random). Of what is fitted the squares themselves are near 1e4 a neuron, and would be all of the loss. lr_mult: of the
    learning rate of its parameters; what is fitted moves little at the rate of weights."""

    penalty: float = 1e-4
    lr_mult: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        for key in ("penalty", "lr_mult"):
            if not 0 <= getattr(self, key) < math.inf:
                raise UserError(f"config key kaf.{key}: found {getattr(self, key)}; accepted: 0 or more")


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The section `loss`, of training alone. smoothing: of the labels. gamma: of the focal loss, 0: cross-entropy. weights: of classes,
    none | inverse | effective (with beta). tau: of logit adjustment, 0: none, 1: for balanced accuracy."""

    smoothing: float = 0.0
    gamma: float = 0.0
    weights: str = "none"
    beta: float = 0.999
    tau: float = 0.0

    def __post_init__(self):
        def refuse(key, accepted):
            raise UserError(f"config key loss.{key}: found {getattr(self, key)!r}; accepted: {accepted}")

        for key in ("smoothing", "beta"):
            if not 0 <= getattr(self, key) < 1:
                refuse(key, "0 or more, and below 1")
        for key in ("gamma", "tau"):
            if not 0 <= getattr(self, key) < math.inf:
                refuse(key, "0 or more")
        if self.weights not in WEIGHTS:
            refuse("weights", ", ".join(WEIGHTS))


@dataclasses.dataclass(frozen=True)
class PlateauConfig:
    """The section `plateau`: after `patience` evaluations in a row without a smaller NLL on the validation split the learning rate is
    multiplied by `factor`, down to the share `least`. patience 0: never. It multiplies train's own schedule."""

    patience: int = 0
    factor: float = 0.5
    least: float = 0.01

    def __post_init__(self):
        if self.patience < 0:
            raise UserError(f"config key plateau.patience: found {self.patience}; accepted: 0 (never) or more")
        for key in ("factor", "least"):
            if not 0 < getattr(self, key) < 1:
                raise UserError(f"config key plateau.{key}: found {getattr(self, key)}; accepted: a share, above 0 and below 1")


def plateau(config: PlateauConfig) -> Reaction:
    """Each reduction begins to wait anew."""

    def react(memory, step, metrics):
        best = math.inf if memory["best"] is None else memory["best"]
        if metrics[METRIC] < best:
            memory = memory | {"best": metrics[METRIC], "waited": 0}
        elif memory["waited"] + 1 < config.patience:
            memory = memory | {"waited": memory["waited"] + 1}
        else:
            memory = memory | {"waited": 0, "share": max(config.least, config.factor * memory["share"])}
        return memory, {"lr": memory["share"]}, None

    return Reaction({"best": None, "waited": 0, "share": 1.0}, {"lr": 1.0}, react)


def make(config) -> Recipe:
    data = config.data.build(sequences.SequenceConfig)
    sets = sequences.load(data, config.seed)
    reservoir = config.reservoir.build(reservoirs.ReservoirConfig)
    readout = config.readout.build(models.ReadoutConfig)
    learned = readout.activation == "kaf"
    kaf = config.section("kaf").build(PenalisedKAFConfig) if learned else PenalisedKAFConfig(penalty=0.0)
    losses, slow = config.section("loss").build(LossConfig), config.section("plateau").build(PlateauConfig)
    note_unused(config, NEEDS, loss=losses)
    batch, decay, seed = config.train.batch, config.optimizer.weight_decay, config.seed
    train, classes, width = sets.splits["train"], len(sets.classes), sets.width
    if slow.patience and "validation" not in sets.splits:
        raise UserError(f"config key plateau.patience: found {slow.patience} without a validation split; accepted: 0")
    if train.frames == 1 and "attention" in readout.parts:
        raise UserError(f"config key readout.parts: found {readout.parts} for sequences of one frame; accepted: parts without 'attention'")
    if readout.standardise and (reservoir.trained or reservoir.fusion != "concat"):
        raise UserError(f"config key readout.standardise: found True with reservoir.trained {reservoir.trained}, reservoir.fusion "
                        f"{reservoir.fusion!r}; accepted: False, or states that do not train (False, 'concat')")  # fmt: skip
    model = models.ReservoirClassifier(reservoir, readout, kaf, classes, seed)
    counts = np.bincount(train.labels, minlength=classes)
    per_class = class_weights(counts, losses.weights, losses.beta) if losses.weights != "none" else None
    by_subject = bool((train.subjects >= 0).any())

    def parameters(key):
        return model.init(key, jnp.zeros((1, train.frames, width)), jnp.ones(1, jnp.int32))["params"]

    def init(key):
        plain = lambda size: {"mean": jnp.zeros(size), "std": jnp.ones(size)}  # noqa: E731
        vector = 2 * reservoir.units * len(readout.statistics)
        return Variables(jax.jit(parameters)(key), plain(width) | ({"statistics": plain(vector)} if readout.standardise else {}))

    def scaled(extra, x):
        return (x - extra["mean"][None, None]) / extra["std"][None, None]

    def see(params, extra, frozen, x, length, key=None):
        constants = {"reservoir": frozen["reservoir"]} | ({"representation": extra["statistics"]} if readout.standardise else {})
        return model.apply({"params": params, "constants": constants}, scaled(extra, x), length, key=key)

    def calibrate(variables, frozen, batches):
        """The scalers: of the frames of the training split, and of their statistics; every process reads all of it."""
        parts = [np.arange(at, min(at + batch, len(train))) for at in range(0, len(train), batch)]
        rows = lambda of: lambda: map(of, map(train.take, parts))  # noqa: E731
        frames = lambda part: part["x"][np.arange(train.frames)[None] < part["length"][:, None]]  # noqa: E731
        found, constant = sequences.moments(rows(frames))
        if constant.any():
            logger.warning("the channels %s of %d are constant in training; they are centred and not scaled",
                           ", ".join(map(str, np.flatnonzero(constant))), width)
        extra = variables.extra | found
        if readout.standardise:
            look = jax.jit(lambda *given: see(*given)[1]["statistics"])
            vectors = lambda part: on_host(look(variables.params, extra, frozen, part["x"], part["length"]))  # noqa: E731
            extra |= {"statistics": sequences.moments(rows(vectors))[0]}
        return variables._replace(extra=extra)

    def loss(params, extra, frozen, batch, dials, key):
        valid = batch["valid"]
        logits, features = see(params, extra, frozen, batch["x"], batch["length"], key)
        count = jnp.sum(valid, dtype=jnp.float32)
        adapted = adjusted(logits, counts / counts.sum(), losses.tau) if losses.tau else logits
        values = focal(adapted, batch["label"], gamma=losses.gamma, class_weights=per_class, smoothing=losses.smoothing, where=valid)
        terms = {"loss": Term(jnp.sum(values), count)}
        seen = probed(dials.probing, look, logits, extra, batch)
        if "beyond" in features:
            seen["beyond"] = jnp.sum(jnp.where(valid, features["beyond"], 0.0)), count
        return dials.scale["loss"] * terms["loss"].sum, Aux(terms, {}, seen)

    def look(logits, extra, batch):
        frames = jnp.arange(train.frames)[None, :, None] < batch["length"][:, None, None]
        inputs = jnp.where(frames, scaled(extra, batch["x"]), 0.0)
        return probes.of_logits(logits, batch["valid"], labels=batch["label"]) | {
            "input_abs_max": probes.abs_max([inputs], batch["valid"])}

    def whole(params, extra, stats, knobs):
        if not kaf.penalty:
            return {}, extra
        away = params["readout"]["kaf"]["alpha"] - jnp.asarray(kaf.module().fitted(), jnp.float32)[:, None]
        return {"alpha": Term(jnp.sum(jnp.square(away)), jnp.ones(()))}, extra

    def measure(params, variables, frozen, batch):
        logits, features = see(params, variables.extra, frozen, batch["x"], batch["length"])
        found = {"logits": logits, "label": batch["label"], "valid": batch["valid"]} | ({"group": batch["subject"]} if by_subject else {})
        return found | ({"beyond": features["beyond"]} if "beyond" in features else {})

    def finish(stacked):
        found = classification.finish_logits({name: value for name, value in stacked.items() if name != "beyond"})
        if "beyond" in stacked and stacked["valid"].any():
            found["beyond"] = float(stacked["beyond"][stacked["valid"].astype(bool)].mean(dtype=np.float64))
        return found

    def figures(variables, frozen, batches):
        """What the deployed student takes for what, its shapes, its memory; and how long it takes over one example."""
        seen, first = [], None
        forward = jax.jit(lambda p, e, f, x, length: see(p, e, f, x, length))
        given = variables.params, variables.extra, frozen
        for one in batches:
            logits, features = forward(*given, one["x"], one["length"])
            seen.append(on_host((logits, features["preactivation"], one["label"], one["valid"])))
            first = first or tuple(x[:1] for x in on_host((one["x"], one["length"])))
        logits, inputs, labels, valid = (np.concatenate(column) for column in zip(*seen, strict=True))
        jax.block_until_ready(forward(*given, *first))  # compiled for one example
        table = classification.confusion(labels[valid], logits[valid].argmax(-1), classes)
        found = {"confusion": charts.confusion(table, sets.classes)}
        found["confusion"].suptitle(f"one example takes {1e3 * _seconds(lambda: forward(*given, *first)):.1f} ms", fontsize=9)
        if learned:
            activation = kaf.module()
            grid = np.linspace(-1.5 * activation.bound, 1.5 * activation.bound, 181, dtype=np.float32)
            over = jnp.repeat(jnp.asarray(grid)[:, None], readout.width, axis=1)
            curves = np.asarray(jax.jit(activation.apply)({"params": on_host(variables.params["readout"]["kaf"])}, over)).T
            began, _ = jax.jit(activation.init_with_output)(jax.random.key(0), over)
            target = None if kaf.init == "random" else np.asarray(began)[:, 0]
            edges = np.linspace(grid[0], grid[-1], len(grid) + 1)
            found["shapes"] = charts.shapes(grid, curves, target, np.histogram(inputs[valid], edges, density=False)[0])
        matrices = on_host(variables.params["reservoir"] if reservoir.trained else frozen["reservoir"])
        leaks = 1 / (1 + np.exp(-matrices["leak"])) if reservoir.trained else reservoir.leak
        delays = np.arange(1, 41)
        curves = [reservoirs.memory_curve(matrices, float(leak), len(delays), direction=i) for i, leak in enumerate(leaks)]
        return found | {"memory": charts.memory(delays, dict(zip(("forward", "backward"), curves, strict=True)))}

    def batches(split, seed):
        return array_batches.batches(sets.splits[split], batch=batch, seed=seed, training=split == "train",
                                     process_index=jax.process_index(), process_count=jax.process_count())  # fmt: skip

    def told(variables, batch):
        shared = preflight.leaks({name: split.names for name, split in sets.splits.items()}, "sequences")
        if data.group == "subject" and data.split != "stratified" and by_subject:
            shared += preflight.leaks({name: split.subjects.tolist() for name, split in sets.splits.items()}, "subjects")
        there = np.arange(train.frames)[None] < batch["length"][:, None]
        x = np.asarray(scaled(variables.extra, batch["x"]))[there & batch["valid"][:, None]]
        unseen = preflight.unseen({name: split.labels for name, split in sets.splits.items()}, sets.classes)
        sizes = {name: len(split) for name, split in sets.splits.items()}
        return preflight.told(sizes, classes, shared, unseen) | {"input": preflight.scale(x)}

    reaction = plateau(slow) if slow.patience else together({})
    shapes = jax.eval_shape(parameters, jax.random.key(0))
    return Recipe(
        init=init, loss=loss, whole=whole, calibrate=calibrate, data=batches,
        weights={"loss": Schedule(((0.0, 1.0),))} | ({"alpha": Schedule(((0.0, kaf.penalty),))} if kaf.penalty else {}),
        optim_rules=((models.DECAY, Group("matrices", 1.0, decay)), (r"/kaf/", Group("kaf", kaf.lr_mult)),
                     (rf"^(?!.*({models.DECAY}|/kaf/))", Group("others"))),
        sharding_rules=models.SHARDING,
        frozen=lambda place: {"reservoir": {name: jnp.asarray(x) for name, x in reservoirs.constants(reservoir, width, seed).items()}},
        evaluators={split: Evaluator(split, measure, finish) for split in sets.splits if split != "train"},
        controls=reaction.controls, memory=reaction.memory, react=reaction.react if slow.patience else None, figures=figures,
        describe=lambda batch: sequences.describe(batch, sets.classes), preflight=told,
        facts={**sets.facts, "parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))},
    )


def _seconds(call, repeats: int = 20) -> float:
    """Median time of a call that is compiled."""
    times = []
    for _ in range(repeats):
        since = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - since)
    return statistics.median(times)
