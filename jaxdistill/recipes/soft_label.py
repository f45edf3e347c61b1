"""soft_label: a distribution over classes from the features of a row, or of a star graph, that does not collapse.

    total = mean over examples of KL(target || prediction) (of a focal loss with soft.focal), weighted by class where asked,
          + soft.entropy_weight * entropy floor + soft.confidence_weight * confidence penalty
          + soft.max_suppression * MaxSup + soft.margin_weight * margin-based smoothing

What helps against collapse is standardised inputs, which are the default: mean and deviation of the training split are kept with the
checkpoint. All else is an option of the section `soft`, off by default. Evaluation sees none of them but what is deployed:
soft.temperature_inference and the bounds on the logits. A row of the test also has kl_calibrated and ece15_calibrated, at the one
`temperature` that is best on the validation split, which is measured with it for that.
Sections of the config: data (data.distributions), model (kind: mlp | graph, and a section of that name), soft (recipes.soft_options).
"""

import functools
import logging
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill import UserError
from jaxdistill.data import array_batches, distributions, preflight
from jaxdistill.diagnosis import charts, probes
from jaxdistill.evaluators import calibration, distribution
from jaxdistill.losses import classification, regularisation
from jaxdistill.models import graph_transformer, mlp
from jaxdistill.recipe import Aux, Evaluator, Group, Recipe, Schedule, Term, Variables, on_host, probed
from jaxdistill.recipes.options import note_unused
from jaxdistill.recipes.soft_options import NEEDS, SoftConfig

logger = logging.getLogger(__name__)

MODELS = {  # kind -> (module, its config, rules, arrays of a batch that are scaled)
    "mlp": (mlp.MLP, mlp.MLPConfig, mlp, ("x",)),
    "graph": (graph_transformer.GraphTransformer, graph_transformer.GraphConfig, graph_transformer, ("x", "neighbours", "edges")),
}


def make(config) -> Recipe:
    soft, data, seed = config.soft.build(SoftConfig), config.data.build(distributions.DistributionConfig), config.seed
    note_unused(config, NEEDS, soft=soft)
    batch, decay, kind = config.train.batch, config.optimizer.weight_decay, config.model.kind
    sets = distributions.load(data, seed)
    train, classes, graph = sets.splits["train"], len(sets.classes), bool(sets.neighbours)
    if kind not in MODELS or (kind == "graph" and not graph):
        accepted = " | ".join(MODELS) if graph else "mlp, as the data are no graphs"
        raise UserError(f"config key model.kind: found {kind!r}; accepted: {accepted}")
    if soft.mixup and kind == "graph":
        soft.refuse("mixup", "0 with model.kind 'graph': two graphs have no mean")
    module, section, rules, inputs = MODELS[kind]
    try:
        model = module(classes, config.model.section(kind).build(section))
    except UserError as error:
        words = str(error)
        raise UserError(words if words.startswith("config key") else f"config key model.{kind}.{words}") from None
    target = train.rows["target"].astype(np.float64)
    constant = target.mean(0)
    soft.guard(target)
    if soft.class_weights != "none" and not constant.all():
        soft.refuse("class_weights", f"none, as no training target gives {sets.classes[int(np.argmin(constant))]!r} any probability")
    per_class = classification.class_weights(target.sum(0), soft.class_weights, soft.beta) if soft.class_weights != "none" else None
    if not soft.standardise:
        logger.warning("soft.standardise is off: raw inputs, up to %g", float(np.abs(train.rows["x"]).max()))
    base = "focal" if soft.focal else "kl"
    terms = {base: 1.0, "entropy_floor": soft.entropy_weight, "confidence": soft.confidence_weight,
             "max_suppression": soft.max_suppression, "margin": soft.margin_weight}  # fmt: skip

    def scaled(extra, batch) -> list:
        return [(batch[name] - over(batch[name], extra[name]["mean"])) / over(batch[name], extra[name]["std"]) for name in inputs]

    def see(params, extra, batch, key=None):
        return model.apply({"params": params}, *scaled(extra, batch), *([batch["mask"]] if kind == "graph" else []), key=key)[0]

    def parameters(key):
        return model.init(key, *(jnp.zeros((1, *train.take(np.arange(1))[name].shape[1:])) for name in inputs),
                          *([jnp.ones((1, sets.neighbours), bool)] if kind == "graph" else []))["params"]  # fmt: skip

    def init(key):
        sizes = {"x": sets.width, "neighbours": sets.width, "edges": sets.edge_width}
        extra = {name: {"mean": jnp.zeros(sizes[name]), "std": jnp.ones(sizes[name])} for name in inputs}
        return Variables(jax.jit(parameters)(key), extra)

    def calibrate(variables, frozen, batches):
        """The scaler, of the training split; every process has all of it."""
        found = distributions.moments(train)
        return variables._replace(extra={name: found[name] for name in inputs})

    def mixed(batch, key):
        """Each row and its target with those of another (Zhang et al., arXiv 1710.09412); with padding a row is not mixed."""
        order, draw = jax.random.split(key)
        partner = jax.random.permutation(order, len(batch["valid"]))
        share = jnp.where(batch["valid"][partner], jax.random.beta(draw, soft.mixup, soft.mixup, partner.shape), 1.0)[:, None]
        return batch | {name: share * batch[name] + (1 - share) * batch[name][partner] for name in ("x", "target")}

    def loss(params, extra, frozen, batch, dials, key):
        mix, drop = jax.random.split(key)
        batch, valid = mixed(batch, mix) if soft.mixup else batch, batch["valid"]
        logits = soft.bounded(see(params, extra, batch, drop)) / soft.temperature
        wanted = classification.smoothed(batch["target"], soft.smoothing)
        fit = functools.partial(classification.focal, gamma=soft.focal) if soft.focal else classification.soft_kl
        values = {base: fit(logits, wanted, where=valid)}
        if per_class is not None:
            values[base] *= classification.sample_weights(batch["target"], per_class)
        penalties = {
            "entropy_floor": lambda: regularisation.entropy_floor(logits, soft.entropy_floor, kind=soft.entropy_kind, where=valid),
            "confidence": lambda: regularisation.confidence_penalty(logits, where=valid),
            "max_suppression": lambda: regularisation.max_suppression(logits, where=valid),
            "margin": lambda: regularisation.margin_smoothing(logits, soft.margin, where=valid),
        }
        values |= {name: penalty() for name, penalty in penalties.items() if terms[name]}
        count = jnp.sum(valid, dtype=jnp.float32)
        found = {name: Term(jnp.sum(each), count) for name, each in values.items()}
        seen = probed(dials.probing, look, logits, extra, batch)
        return sum(dials.scale[name] * term.sum for name, term in found.items()), Aux(found, {}, seen)

    def look(logits, extra, batch):
        valid, there = batch["valid"], batch.get("mask")
        count = jnp.sum(valid, dtype=jnp.float32)
        largest, least = jnp.max(logits, axis=-1), jnp.min(logits, axis=-1)
        watched = {"logit_max": largest, "logit_min": least, "logit_range": largest - least,
                   "logit_norm": jnp.linalg.norm(logits, axis=-1), "target_entropy": probes.entropy(batch["target"])}  # fmt: skip
        seen = {name: (jnp.sum(jnp.where(valid, each, 0.0)), count) for name, each in watched.items()}
        values = [x if x.ndim == 2 else jnp.where(there[..., None], x, 0.0) for x in scaled(extra, batch)]
        return seen | probes.of_logits(logits, valid, labels=batch["target"]) | {"input_abs_max": probes.abs_max(values, valid)}

    def measure(params, variables, frozen, batch):
        logits = soft.bounded(see(params, variables.extra, batch)) / soft.temperature_inference
        return {"logits": logits} | {name: batch[name] for name in ("target", "valid", "group", "first") if name in batch}

    def finish(stacked):
        """Of the test: measured beside the constant predictor, and once more at the temperature that the validation rows want."""
        first = np.asarray(stacked.get("first", False)) & stacked["valid"].astype(bool)
        test = stacked | {"valid": stacked["valid"].astype(bool) & ~first}
        found = distribution.finish(test, constant)
        if found.get("kl_gain_low", 1.0) <= 0:
            logger.warning("the test: not better than the best constant prediction: KL smaller by %.4f, 95 %% interval %.4f to %.4f",
                           *(found[name] for name in ("kl_gain", "kl_gain_low", "kl_gain_high")))  # fmt: skip
        if first.any() and found:
            t = temperature(stacked, first)
            cooled = distribution.finish(test | {"logits": test["logits"] / t})
            found |= {"temperature": t, **{f"{name}_calibrated": cooled[name] for name in ("kl", "ece15")}}
        return found

    def temperature(stacked, rows) -> float:
        held = distribution.gathered(stacked | {"valid": rows})
        return calibration.fit_temperature(held["logits"], held["target"])

    def figures(variables, frozen, batches):
        look = jax.jit(measure)
        seen = [on_host(look(variables.params, variables, frozen, one)) for one in batches]
        stacked = {name: np.stack([each[name] for each in seen]) for name in seen[0]}
        first = np.asarray(stacked.get("first", False)) & stacked["valid"]
        test = distribution.gathered(stacked | {"valid": stacked["valid"] & ~first})
        shown = {"as deployed": 1.0} | ({f"at T = {(t := temperature(stacked, first)):.2f}": t} if first.any() else {})
        p = {name: np.exp(calibration.log_probabilities(test["logits"] / t)) for name, t in shown.items()}
        place = lambda each: (float(-np.mean(np.sum(each * np.log(np.where(each > 0, each, 1)), axis=1))), distribution.spread(each))  # noqa: E731
        return {
            "reliability": charts.reliability({name: calibration.reliability(each, test["target"]) for name, each in p.items()}),
            "collapse": charts.collapse({name: place(each) for name, each in p.items()}, classes, place(test["target"])),
        }

    def batches(split, seed):
        held = sets.splits.get("validation") if split == "test" else None
        return array_batches.batches(
            distributions.joined(held, sets.splits["test"]) if held else sets.splits[split], batch=batch, seed=seed,
            training=split == "train", process_index=jax.process_index(), process_count=jax.process_count(),
        )  # fmt: skip

    def told(variables, batch):
        shared = preflight.leaks({name: split.rows["group"].tolist() for name, split in sets.splits.items()}, "groups")
        copies = sets.facts.get("copies", {})
        shared += [f"{count} {name} rows have the inputs of a training row" for name, count in copies.items() if count]
        rows = [x if x.ndim == 2 else x[batch["mask"]] for x in map(np.asarray, scaled(variables.extra, batch))]
        sizes = {name: len(split) for name, split in sets.splits.items()}
        return preflight.told(sizes, classes, shared) | {"input": preflight.scale(*rows), "reachable": soft.reach(target)}

    shapes = jax.eval_shape(parameters, jax.random.key(0))
    last, other = Group("head", 1.0, decay + soft.final_decay), Group("student", 1.0, decay)
    return Recipe(
        init=init, loss=loss, weights={name: Schedule(((0.0, value),)) for name, value in terms.items()}, data=batches,
        optim_rules=((r"^head/kernel$", last), (rf"^(?!head/).*(?:{rules.DECAY})", other),
                     (rf"^(?!.*(?:{rules.DECAY}))", Group("student_no_decay"))),
        sharding_rules=rules.SHARDING, calibrate=calibrate if soft.standardise else None,
        evaluators={split: Evaluator(split, measure, {"validation": distribution.finish, "test": finish}[split], whole=split == "test")
                    for split in sets.splits if split != "train"},
        figures=figures if soft.figures else None, describe=lambda batch: distributions.describe(batch, sets.classes), preflight=told,
        facts={**sets.facts, "parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))},
    )  # fmt: skip


def over(x, column):
    """A value of each column, as wide as x [..., columns]."""
    return jnp.broadcast_to(column, x.shape)
