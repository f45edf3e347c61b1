"""dcal: fine-grained recognition and re-identification by dual cross-attention (Zhu et al., CVPR 2022, arXiv 2205.02151).

    total = 1/2 sum_i (exp(-w_i) L_i + w_i)     over the branches that the mode trains: sa, glca, pwca
          + kd.weight * T^2 KL(teacher^T || student^T), the mean over the branches that are used at inference
    L_i   = CE(class of the image), and in re-identification + loss.triplet * batch-hard triplet of what the branch classifies

Self-attention (sa) is the plain ViT, global-local cross-attention (glca) attends from the tokens that the attention rollout finds
most important, and pair-wise cross-attention (pwca) lets another image's keys and values distract in training: it has no parameters
of its own and no part in inference. Each w_i is learned, at the rate dcal.weight_lr x train.lr; with one branch alone there is none.
The total may be negative and falls as w follows the losses: what tells is each L_i, and the probe sum_of_ce. Micro-batches change the
update only in what is drawn: partners (which must be in the same micro-batch), drop-path, random queries, noise.
Sections of the config: data (data.images), model (models.classifier), dcal and loss (below), kd and teacher for distillation.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill import UserError
from jaxdistill.data import image_batches, images, preflight
from jaxdistill.diagnosis import plots, probes
from jaxdistill.evaluators import classification, retrieval
from jaxdistill.losses import metric_learning, weighting
from jaxdistill.losses.classification import cross_entropy
from jaxdistill.losses.divergences import ALPHA, BETA, KINDS, divergence
from jaxdistill.models import classifier
from jaxdistill.models.dcal import PWCA, Branches
from jaxdistill.recipe import Aux, Evaluator, Group, Recipe, Schedule, Term, Variables, on_host, probed, while_on
from jaxdistill.recipes import classifier_teachers
from jaxdistill.recipes.lm import groups
from jaxdistill.recipes.options import Needs, note_unused

MODES = {  # -> the branches that are trained
    "sa_only": ("sa",), "sa_glca": ("sa", "glca"), "sa_pwca": ("sa", "pwca"), "full": ("sa", "glca", "pwca"),
    "random_query": ("sa", "glca", "pwca"), "noise_distractor": ("sa", "glca", "pwca"),
}
BALANCE = ("dcal.bounds", "dcal.weight_lr")
NEEDS = (
    Needs("data.task", ("reid",), ("loss.triplet", "loss.margin", "loss.identities")),
    Needs("dcal.weighting", ("learned",), BALANCE),
    Needs("dcal.mode", tuple(mode for mode, trained in MODES.items() if len(trained) > 1), BALANCE),
    Needs("kd.kind", ("jsd",), ("kd.beta",)),
    Needs("kd.kind", ("skew_kl", "skew_reverse_kl"), ("kd.alpha",)),
    Needs("kd.weight", (), tuple(f"teacher.{field.name}" for field in dataclasses.fields(classifier_teachers.TeacherConfig))),
)
NOISE_SHARED = 8  # examples that one image of noise distracts; one each would cost as much as a second batch


@dataclasses.dataclass(frozen=True)
class DCALConfig:
    """The section `dcal`. What the paper leaves open is an option: cls_query (whether CLS is a query of GLCA too), readout (what GLCA
    classifies: the mean of its queries, or cls, with which the choice of the others changes nothing: models.dcal), attach (the block
    whose output GLCA reads, 0: the last), pwca_head (shared with SA, or own).

    mode: random_query takes GLCA's local queries at random, noise_distractor PWCA's partner from Gaussian noise. queries: share of
    the patches (the paper: 0.1 fine-grained, 0.3 re-identification). weighting: learned, or equal (all 1/2). bounds: (least, most) of
    each w, () for none. figures: test images whose attention is drawn. rerank: k-reciprocal
    re-ranking too, in re-identification."""

    mode: str = "full"
    queries: float = 0.1
    cls_query: bool = True
    readout: str = "mean"
    attach: int = 0
    pwca_head: str = "shared"
    weighting: str = "learned"
    bounds: tuple = ()
    weight_lr: float = 1.0
    figures: int = 0
    rerank: bool = False

    def __post_init__(self):
        for key, accepted in (("mode", MODES), ("pwca_head", PWCA[1:]), ("weighting", ("learned", "equal"))):
            if getattr(self, key) not in list(accepted):
                raise UserError(f"config key dcal.{key}: found {getattr(self, key)!r}; accepted: {', '.join(accepted)}")
        try:
            self.asked()
        except UserError as error:
            raise UserError(f"config key dcal.{error}") from None
        ordered = len(self.bounds) == 2 and all(isinstance(x, (int, float)) for x in self.bounds) and self.bounds[0] < 0 < self.bounds[1]
        if self.bounds and not ordered:
            raise UserError(f"config key dcal.bounds: found {self.bounds!r}; accepted: () or (least, most) around 0, as in (-2, 2)")
        for key in ("weight_lr", "figures"):
            if getattr(self, key) < 0:
                raise UserError(f"config key dcal.{key}: found {getattr(self, key)}; accepted: 0 or more")

    def asked(self) -> Branches:
        """What the mode and the options ask of the model."""
        trained = MODES[self.mode]
        return Branches("glca" in trained, self.pwca_head if "pwca" in trained else "", self.queries, self.cls_query, self.readout,
                        self.attach, "random" if self.mode == "random_query" else "rollout")


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The section `loss`. smoothing: of the labels, in training. Re-identification only: triplet, the schedule of its weight (from the
    first update on it can bring a fresh model to one point for all images, which cross-entropy does not leave again), margin, and
    identities, how many of them a batch holds, each with batch / identities images."""

    smoothing: float = 0.0
    triplet: Any = ((0.0, 1.0),)
    margin: float = 0.3
    identities: int = 16

    def __post_init__(self):
        if not 0 <= self.smoothing < 1:
            raise UserError(f"config key loss.smoothing: found {self.smoothing}; accepted: 0 or more, and below 1")
        for key, least in (("margin", 0), ("identities", 2)):
            if getattr(self, key) < least:
                raise UserError(f"config key loss.{key}: found {getattr(self, key)}; accepted: {least} or more")


@dataclasses.dataclass(frozen=True)
class KDConfig:
    """The section `kd`: the distribution of another classifier of the same classes, in `teacher.path`, as a target. kind, beta (of
    jsd), alpha (of the skew ones): losses.divergences."""

    weight: Any = ((0.0, 0.0),)
    temperature: Any = ((0.0, 1.0),)
    kind: str = "forward_kl"
    beta: float = BETA
    alpha: float = ALPHA

    def __post_init__(self):
        for key in ("beta", "alpha"):
            if not 0 <= getattr(self, key) <= 1:
                raise UserError(f"config key kd.{key}: found {getattr(self, key)}; accepted: values from 0 to 1")
        if self.kind not in KINDS or self.kind == "topk_kl":
            raise UserError(f"config key kd.kind: found {self.kind!r}; accepted: {', '.join(kind for kind in KINDS if kind != 'topk_kl')}")


def make(config) -> Recipe:
    chosen, losses, kd = config.dcal.build(DCALConfig), config.loss.build(LossConfig), config.section("kd").build(KDConfig)
    data = config.data.build(images.ImageConfig)
    sets, reid = images.load(data), data.task == "reid"
    batch, micro, decay = config.train.batch, config.train.micro, config.optimizer.weight_decay
    model = config.model.build(classifier.ModelConfig)
    measured = bool(model.path) and model.head == "stored" and not config.train.steps  # a finished model: with the branches it has
    if not model.path:  # a head that is "stored" is for the path that `given` may fill
        mean, std = (model.mean, model.std) if model.mean and model.std else images.statistics(sets.splits["train"])
        model = dataclasses.replace(model, head="new", mean=model.mean or mean, std=model.std or std)
    branches = MODES[chosen.mode]
    deployed = tuple(name for name in branches if name != "pwca")
    learned = chosen.weighting == "learned" and len(branches) > 1
    bounds = chosen.bounds or None
    ramp = lambda key, points, **limits: Schedule.ramp(points, config.train.steps, f"config key {key}", **limits)  # noqa: E731
    one = Schedule(((0.0, 1.0),))
    triplet = ramp("loss.triplet", losses.triplet if reid else ((0.0, 0.0),), least=0.0)
    weights = dict.fromkeys(branches, one) | {"kd": ramp("kd.weight", kd.weight, least=0.0)}
    weights |= {f"{name}_triplet": triplet for name in branches if reid} | ({"prior": one} if learned else {})
    temperature = ramp("kd.temperature", kd.temperature, least=1e-3)
    distils = not weights["kd"].off
    note_unused(config, NEEDS, dcal=chosen, loss=losses, kd=kd, data=data, teacher=classifier_teachers.TeacherConfig())

    try:
        student = classifier.describe(model, "model", image=data.size, channels=data.channels, classes=sets.classes,
                                      branches=None if measured else chosen.asked())
    except UserError as error:  # in the user's words, whose keys these are
        words = str(error).replace("key model.attach:", "key dcal.attach:")
        for place in ("model.image:", "model.path: image:"):
            words = words.replace(f"key {place}", "key data.size:")
        raise UserError(words) from None
    if measured:
        branches = deployed = ("sa", "glca") if student.module.branches.glca else ("sa",)
    teacher = classifier_teachers.choose(config, data, sets) if distils else None
    see = lambda model, params, x, **options: model.module.apply({"params": params}, x, **options)  # noqa: E731

    def init(key):
        params = {"student": student.init(key)}
        return Variables(params | ({"balance": {name: jnp.zeros(()) for name in branches}} if learned else {}))

    def factor(params, name):
        """exp(-w) / 2, or 1/2 where weights are equal; a branch alone is not weighted."""
        if learned:
            return weighting.factor(params["balance"][name], bounds)
        return 0.5 if len(branches) > 1 else 1.0

    def together(logits, t):
        """Logits whose softmax at t is the mean of the branches' at t."""
        return t * classification.fused({name: z / t for name, z in logits.items()})

    def loss(params, extra, frozen, batch, dials, key):
        drawn, noise = jax.random.split(key)
        x, valid, partner, found = student.normalise(batch["image"]), batch["valid"], None, True
        if chosen.mode == "noise_distractor":
            partner = len(x) + jnp.arange(len(x), dtype=jnp.int32) // NOISE_SHARED
            x = jnp.concatenate([x, jax.random.normal(noise, (-(-len(x) // NOISE_SHARED), *x.shape[1:]), x.dtype)])
        elif "pwca" in branches:
            here = batch["partner"][:, None] == batch["row"][None, :]  # the rows of a micro-batch keep their global numbers
            partner, found = jnp.argmax(here, axis=1).astype(jnp.int32), here.any(axis=1)
        outputs, features = see(student, params["student"], x, partner=partner, key=drawn)
        count = jnp.sum(valid, dtype=jnp.float32)
        terms = {}
        for name in branches:
            values = cross_entropy(outputs[name], batch["label"], smoothing=losses.smoothing, where=valid)
            if name == "pwca":  # a partner that is in another micro-batch makes the update non-finite, not wrong in silence
                values = jnp.where(found, values, jnp.nan)
            terms[name] = Term(jnp.sum(values), count, factor(params, name))
        seen = {"sum_of_ce": (sum(term.sum for term in terms.values()), count)}
        if learned:
            seen |= {f"w_{name}": (params["balance"][name], jnp.ones(())) for name in branches}
        theirs = None
        if distils:
            t, distance = temperature.constant or dials.knobs["temperature"], divergence(kd.kind, beta=kd.beta, alpha=kd.alpha)

            def taught():
                theirs = teacher.logits(frozen, batch)
                target = together(theirs, t)
                each = [distance(target, outputs[name], temperature=t, where=valid) for name in deployed]
                return t**2 * sum(jnp.sum(values) for values in each) / len(each), theirs

            value, theirs = while_on(weights["kd"], dials.scale["kd"], taught)
            terms["kd"] = Term(value, count)
        ours = {name: outputs[name] for name in deployed}
        seen |= probed(dials.probing, look, ours, theirs, batch, dials.scale.get("kd"))
        total = sum(dials.scale[name] * term.factor * term.sum for name, term in terms.items())
        stats = {name: features[name] for name in branches} | {"label": batch["label"], "valid": valid} if not triplet.off else {}
        return total, Aux(terms, stats, seen)

    def look(ours, theirs, batch, opened):
        """What the deployed branches say together; of a teacher, while its term is on."""
        target, valid = None if theirs is None else classification.fused(theirs), batch["valid"]
        found = probes.of_logits(classification.fused(ours), valid, labels=batch["label"], teacher=target)
        if target is not None:
            found = {name: jax.tree.map(lambda value: jnp.where(opened > 0, value, 0.0), pair) if name in probes.OF_TEACHER else pair
                     for name, pair in found.items()}
        return found | {"input_abs_max": probes.abs_max([student.normalise(batch["image"])], valid)}

    def whole(params, extra, stats, knobs):
        terms = {}
        for name in branches if not triplet.off else ():
            values, there = metric_learning.batch_hard_triplet(stats[name], stats["label"], margin=losses.margin, where=stats["valid"])
            terms[f"{name}_triplet"] = Term(jnp.sum(values), jnp.sum(there, dtype=jnp.float32), factor(params, name))
        if learned:
            terms["prior"] = Term(weighting.prior(params["balance"], bounds), jnp.ones(()))
        return terms, extra

    def measure(params, variables, frozen, batch):
        outputs, features = see(student, params["student"], student.normalise(batch["image"]))
        if reid:
            joined = jnp.concatenate([features[name] for name in deployed], axis=-1)
            return {"features": joined, **{name: batch[name] for name in ("label", "camera", "gallery", "valid")}}
        target = together(teacher.logits(frozen, batch), 1.0) if distils else None
        return classification.sums({name: outputs[name] for name in deployed}, batch["label"], batch["valid"], target)

    def figures(variables, frozen, batches):
        given = next(iter(batches))
        look = jax.jit(lambda p, x: see(student, p, student.normalise(x))[1])
        shown, found = on_host((given, look(variables.params["student"], given["image"])))
        take = np.flatnonzero(shown["valid"])[: chosen.figures]
        names = [sets.classes[i] if 0 <= i < len(sets.classes) and not reid else str(i) for i in shown["label"][take]]
        rollout, glca, queries = (found[name][take] if name in found else None for name in ("rollout", "glca_attention", "queries"))
        maps = {"rollout (SA)": rollout, "GLCA": glca}
        return {"attention": plots.attention(shown["image"][take], names, maps, queries, student.module.vit.grid)}

    rank = functools.partial(retrieval.finish, rerank=retrieval.Rerank() if chosen.rerank else None)
    judge = functools.partial(Evaluator, measure=measure, finish=rank if reid else classification.finish, whole=reid)
    def batches(split, seed, data=data):
        training = split == "train"
        return image_batches.batches(
            sets.splits[split], data, batch=batch, seed=seed, training=training, micro=micro, pairs="pwca" in branches and training,
            identities=losses.identities if reid and training else 0, views=teacher.views if distils else None,
            beside=teacher.beside(split) if distils else None, process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def told(variables, batch):
        labels = {name: split.labels for name, split in sets.splits.items()}
        unseen = () if reid else preflight.unseen(labels, sets.classes)
        shared = preflight.leaks({name: split.names for name, split in sets.splits.items()}, "images")
        x = np.asarray(student.normalise(jnp.asarray(batch["image"])))[batch["valid"]]
        sizes = {name: len(split) for name, split in sets.splits.items()}
        return preflight.told(sizes, len(sets.classes), shared, unseen) | {"input": preflight.scale(x.reshape(-1, data.channels))}

    if chosen.figures > batch:
        raise UserError(f"config key dcal.figures: found {chosen.figures}; accepted: at most train.batch, which is {batch}")
    if chosen.rerank and not reid:
        raise UserError("config key dcal.rerank: found True; accepted: False where data.task is 'classification'")
    if config.train.steps:
        batches("train", 0, dataclasses.replace(data, workers=0))  # so that sizes that do not fit show before anything is written
    decayed = groups("student", "student/", student.decay, decay)
    return Recipe(
        init=init, loss=loss, whole=whole, weights=weights, knobs={"temperature": temperature} if distils else {},
        optim_rules=(*decayed, (r"^balance/", Group("balance", chosen.weight_lr))),
        sharding_rules=((r"(^|/)balance/", jax.P()), *student.sharding, *(teacher.sharding if distils else ())),
        data=batches,
        evaluators={split: judge(split) for split in sets.splits if split != "train"},
        frozen=lambda place: teacher.load(place) if distils else {},
        export=lambda params, folder: student.save(params["student"], folder),
        figures=figures if chosen.figures else None,
        describe=lambda batch: images.describe(batch, sets.classes), preflight=told, outputs=teacher.outputs if distils else None,
        facts={**sets.facts, "model": student.facts, "teacher": teacher.facts if distils else {}, "parameters": student.parameters},
    )
