"""A teacher that ran before: what its cache (data.teacher_cache) serves to student_aware. What is stored: `storing`.

    format   fields of a row [draws, time, ...]    serves
    hidden   states                                every kd.mode at every temperature, and `contrastive`
    topk     ids, logits, tails                    kd.mode logits, forward_kl, at the temperatures of the tails
    sampled  ids (, weights)                       kd.mode logits, forward_kl, at the temperature of the draw

Splits that are only measured on are `hidden`, whatever trains; the head is a constant of the cache.
"""

import dataclasses
import functools
from pathlib import Path

import jax.numpy as jnp

from jaxdistill import UserError
from jaxdistill.data import alignment, text, tokenizer
from jaxdistill.data.teacher_cache import Cache
from jaxdistill.losses.targets import Mixture, Samples, TopK
from jaxdistill.models import gpt2, hf
from jaxdistill.models.causal import DTYPES
from jaxdistill.recipe import STAND_IN, Schedule
from jaxdistill.recipes import lm
from jaxdistill.recipes.teachers import Teacher, TeacherConfig, mixing

INSIDE = ("hidden", "attention", "router")  # terms that compare the teacher's blocks, of which nothing is stored


@dataclasses.dataclass(frozen=True)
class Cached(Teacher):
    """What a teacher said, by row. training: whether anything trains by it. temperature: of kd."""

    cache: Cache
    training: bool
    temperature: Schedule

    sharding = gpt2.SHARDING
    width = property(lambda self: self.cache.made["teacher"]["width"])
    facts = property(lambda self: {"cache": self.cache.digest})
    dtype = property(lambda self: DTYPES[self.cache.made["dtype"]])

    def batches(self, split, batch, seed):
        serves = self.training or split != "train"
        return lm.batches(self.corpus, split, batch, seed, functools.partial(self.cache.rows, split) if serves else None)

    def load(self, place) -> dict:
        return {"teacher": {"wte": {"embedding": jnp.asarray(self.cache.constants()["head"])}}}

    def example(self):
        return {"final": jnp.zeros((1, 2, self.width), self.dtype)}

    def outputs(self, frozen, batch, temperature=1.0):
        if "cached_states" in batch:
            states = batch["cached_states"].astype(self.dtype)
            return {"final": states}, (states, self.head(frozen))
        ids, stored = batch["cached_ids"].astype(jnp.int32), self.cache.made["options"]
        if "cached_tails" in batch:
            at = stored["temperatures"].index(self.temperature.constant)
            return {}, TopK(ids, batch["cached_logits"].astype(jnp.float32), batch["cached_tails"][..., at])
        weights = batch.get("cached_weights")
        return {}, Samples(ids, jnp.full(ids.shape, 1 / stored["samples"], jnp.float32) if weights is None else weights)

    def head(self, frozen):
        return frozen["teacher"]["wte"]["embedding"]


@dataclasses.dataclass(frozen=True)
class Several(Teacher):
    """What several teachers said, whose mixture is the target."""

    each: tuple[Cached, ...]
    weights: tuple[float, ...]
    of: str

    sharding = gpt2.SHARDING
    facts = property(lambda self: {f"{i}": one.facts for i, one in enumerate(self.each)})

    def batches(self, split, batch, seed):
        def beside(rows, epochs):
            found = [one.cache.rows(split, rows, epochs) for one in self.each]
            return {f"{name}_{i}": array for i, one in enumerate(found) for name, array in one.items()}

        return lm.batches(self.corpus, split, batch, seed, beside if self.each[0].training or split != "train" else None)

    def load(self, place) -> dict:
        return {"teacher": {f"{i}": one.load(place)["teacher"] for i, one in enumerate(self.each)}}

    def outputs(self, frozen, batch, temperature=1.0):
        found = [one.outputs({"teacher": frozen["teacher"][f"{i}"]}, {"cached_states": batch[f"cached_states_{i}"]})[1]
                 for i, one in enumerate(self.each)]
        return {}, Mixture(tuple(found), self.weights, self.of)


def choose(chosen: TeacherConfig, rows: text.TextConfig, kd, *, temperature: Schedule, terms: tuple[str, ...], wanted: bool) -> Teacher:
    """The teacher in `chosen.cache`, which must be that of `chosen.path` where there is one, or the several there. The rest as in
    `teachers.choose`."""
    folders, paths = (found if isinstance(found, tuple) else (found,) for found in (chosen.cache, chosen.path or ()))
    for key, found in (("cache", folders), ("path", paths)):
        if not all(isinstance(folder, str) and folder for folder in found):
            raise UserError(f"config key teacher.{key}: found {getattr(chosen, key)!r}; accepted: a folder, or a tuple of folders")
    if paths and len(paths) != len(folders):
        raise UserError(f"config key teacher.cache: found {len(folders)} folder(s) with {len(paths)} in teacher.path; accepted: as many, "
                        "in the same order")
    weights = mixing(kd, terms, len(folders), "teacher.cache")
    several = len(folders) > 1
    each = tuple(_read(Cache(folder), path, chosen.dtype, rows, kd, temperature, terms, wanted, several)
                 for folder, path in zip(folders, paths or ("",) * len(folders), strict=True))
    return Several(each[0].corpus, each, weights, kd.mixture) if several else each[0]


def _read(cache: Cache, path: str, dtype: str, rows: text.TextConfig, kd, temperature: Schedule, terms, wanted: bool,
          several: bool) -> Cached:
    corpus = text.load(rows)
    cache.check({"kind": "language"})
    if path and not (Path(path) / STAND_IN).exists():
        cache.check({"teacher": {"weights": hf.folder_hash(hf.fetched(path, "teacher.path"))}})
    form, stored, where = cache.made["options"]["format"], cache.made["options"]["temperatures"], f"teacher.cache {cache.folder}"
    if dtype != cache.made["dtype"]:
        ran = cache.made["dtype"]
        raise UserError(f"config key teacher.dtype: found {dtype!r} with {where}, whose teacher computed in {ran}; accepted: {ran!r}")
    for name in (*INSIDE, *(("contrastive",) if form != "hidden" else ())):
        if name in terms:
            holds = "last states and none of the blocks before" if form == "hidden" else f"no states for the split that trains ({form})"
            raise UserError(f"config key {name}.weight: found a weight with {where}, which holds {holds}; accepted: ((0.0, 0.0),), or "
                            "teacher.cache ''")
    if wanted and form != "hidden":
        for key, found, accepted in (("kd.mode", kd.mode, "logits"), ("kd.kind", kd.kind, "forward_kl")):
            if found != accepted:
                raise UserError(f"config key {key}: found {found!r} with {where} of format {form}; accepted: {accepted!r}, or a cache "
                                "of format hidden")
        if several:
            raise UserError(f"config key teacher.cache: found {cache.folder} of format {form} among several; accepted: hidden (what was "
                            "kept of one distribution has no mean with another)")
        if temperature.constant not in stored:
            found = temperature.values if temperature.constant is None else temperature.constant
            raise UserError(f"config key kd.temperature: found {found} with {where} of format {form}; accepted: a constant among "
                            f"those that it was made for, {', '.join(map(str, stored))}, or a cache of format hidden")
    theirs, ours = cache.made["tokenizer"], tokenizer.tokenizer_hash(corpus.tokenizer)
    if kd.mode == "logits":
        cache.check({"tokenizer": ours})
    if theirs != ours or kd.mode == "alm":
        corpus = text.paired(rows, str(cache.folder / "tokenizer"), cache.made["teacher"]["length"])
        cache.check({"tokenizer": corpus.facts["teacher_tokenizer"]})
    cache.check({"packing": packing(corpus), "data": corpus.facts})
    return Cached(corpus, cache, wanted, temperature)


def packing(corpus: text.Corpus) -> dict:
    """How rows are cut, by split: their length, and that of the teacher's where it reads other tokens."""
    cut = {}
    for split, rows in corpus.splits.items():
        paired = isinstance(rows, alignment.Paired)
        cut[split] = {"length": (rows.packed if paired else rows).length, "teacher_length": rows.width if paired else 0}
    return cut
