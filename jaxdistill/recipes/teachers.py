"""The teacher's side of student_aware: where a teacher comes from, what it gives for a batch, and the rows that both models read.

A recipe asks `choose` for its `Teacher` and need not know which kind it was given.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill import UserError
from jaxdistill.data import alignment, text, tokenizer
from jaxdistill.losses import cross_tokenizer
from jaxdistill.losses.targets import Mixture
from jaxdistill.models import causal, hf
from jaxdistill.recipe import Schedule, on_host
from jaxdistill.recipes import lm


@dataclasses.dataclass(frozen=True)
class TeacherConfig(causal.ModelConfig):
    """The section `teacher`. path: a folder, or a tuple of several: their mixture teaches (`kd.teacher_weights`, `kd.mixture`). cache:
    a folder that python -m jaxdistill.cache has filled, or a tuple, one of each teacher: they are then read and not run; path, where
    there is one too, must be of the teacher that was stored."""

    path: str | tuple = ""
    cache: str | tuple = ""

    @property
    def several(self) -> bool:
        return any(isinstance(found, tuple) and len(found) > 1 for found in (self.path, self.cache))

    @property
    def each(self) -> tuple[causal.ModelConfig, ...]:
        """One teacher a folder, all of the same dtype and remat."""
        paths = self.path if isinstance(self.path, tuple) else (self.path,)
        if not paths or not all(isinstance(path, str) and path for path in paths):
            raise UserError(f"config key teacher.path: found {self.path!r}; accepted: a local folder with config.json and "
                            "model.safetensors, a model's name on the hub, or a tuple of these")
        return tuple(dataclasses.replace(self, path=hf.fetched(path, "teacher.path")) for path in paths)


@dataclasses.dataclass(frozen=True)
class Teacher:
    """None: the rows alone, and what every kind of teacher has.

    corpus: the rows, with the teacher's tokens beside the student's where its tokenizer is another. width, depth, experts: of its
    features. sharding, facts: as a Recipe's. runs: it can read text that is written only now."""

    corpus: text.Corpus

    runs = False
    width = depth = 0
    experts = sharding = ()
    facts = {}

    @property
    def paired(self) -> bool:
        """Whether it reads other tokens than the student does."""
        return self.corpus.teacher is not None

    @property
    def vocab(self) -> int:
        """The ids of its tokenizer. Its head may hold more rows."""
        return self.corpus.teacher.vocab if self.paired else self.corpus.vocab

    def batches(self, split: str, batch: int, seed: int):
        """As `lm.batches`, with all that `outputs` needs of a batch."""
        return lm.batches(self.corpus, split, batch, seed)

    def load(self, place) -> dict:
        """Its part of `frozen(place)`."""
        return {}

    def example(self) -> dict:
        """Zeros in the shapes of the features of one row of 2 tokens, to initialise with."""
        raise NotImplementedError

    def outputs(self, frozen: dict, batch: dict, temperature: Any = 1.0) -> tuple[dict, Any]:
        """(features of its rows, with at least "final" wherever a term or kd.mode reads them; its distribution over the next
        token at this temperature, as `fused_vocab_loss(teacher=)` takes it). Neither moves to meet the student."""
        raise NotImplementedError

    def head(self, frozen: dict):
        """Its output embedding [ids, width]."""
        raise NotImplementedError

    def at_places(self, batch: dict, states) -> tuple:
        """(its states [batch, time, ...] where it has read exactly what the student has, where that is)."""
        if not self.paired:
            return states, jnp.ones(states.shape[:2], bool)
        found, where = cross_tokenizer.gather_aligned(states.reshape(*states.shape[:2], -1), batch["aligned"][:, :-1])
        return found.reshape(*where.shape, *states.shape[2:]), where

    def shared_heads(self, frozen: dict, student_head) -> tuple:
        """(its output embedding, the student's), on the host, cut to the tokens that the two tokenizers share, row for row."""
        theirs, ours = on_host((self.head(frozen), student_head))
        ids = alignment.shared(self.corpus.tokenizer, self.corpus.teacher) if self.paired else np.arange(self.corpus.vocab)
        known = np.flatnonzero(ids >= 0)
        return theirs[ids[known]], ours[known]


@dataclasses.dataclass(frozen=True)
class InMemory(Teacher):
    """A model that runs beside the student."""

    model: causal.CausalLM

    runs = True
    width = property(lambda self: self.model.width)
    depth = property(lambda self: self.model.depth)
    experts = property(lambda self: self.model.experts)
    sharding = property(lambda self: self.model.sharding)
    facts = property(lambda self: self.model.facts)

    def load(self, place) -> dict:
        return {"teacher": self.model.load(place and (lambda name: place(f"teacher/{name}")))}

    def example(self) -> dict:
        return self.model.example()

    def outputs(self, frozen, batch, temperature=1.0):
        prefix = "teacher_" if self.paired else ""
        layout = {name: batch[f"{prefix}{name}"][:, :-1] for name in ("segments", "positions")}
        found = self.model.features(frozen["teacher"], batch[f"{prefix}tokens"][:, :-1], layout)
        features, head = jax.lax.stop_gradient(found)
        return features, (features["final"], head)

    def head(self, frozen):
        return self.model.head(frozen["teacher"])


@dataclasses.dataclass(frozen=True)
class Several(Teacher):
    """Models that run beside the student, whose mixture is its target. States of several models have no mean: no term reads them."""

    models: tuple[causal.CausalLM, ...]
    weights: tuple[float, ...]
    of: str

    runs = True
    sharding = property(lambda self: sum((model.sharding for model in self.models), ()))
    facts = property(lambda self: {f"{i}": model.facts for i, model in enumerate(self.models)})

    def load(self, place) -> dict:
        there = [place and (lambda name, i=i: place(f"teacher/{i}/{name}")) for i in range(len(self.models))]
        return {"teacher": {f"{i}": model.load(at) for i, (model, at) in enumerate(zip(self.models, there, strict=True))}}

    def outputs(self, frozen, batch, temperature=1.0):
        layout = {name: batch[name][:, :-1] for name in ("segments", "positions")}
        found = [model.hidden_and_head(frozen["teacher"][f"{i}"], batch["tokens"][:, :-1], layout) for i, model in enumerate(self.models)]
        return {}, Mixture(jax.lax.stop_gradient(tuple(found)), self.weights, self.of)


def choose(config, rows: text.TextConfig, kd, *, temperature: Schedule, terms: tuple[str, ...], wanted: bool) -> Teacher:
    """The teacher of a config.

    kd: the section; temperature: its ramp. Logits can only be compared id by id where both models count the same ids. terms: the
    feature terms that are on. wanted: whether anything trains by it."""
    chosen, corpus = config.teacher.build(TeacherConfig), text.load(rows)
    if not wanted and kd.mode != "logits":
        return Teacher(corpus)
    if chosen.cache:
        from jaxdistill.recipes import cached  # here, as what is read there is a Teacher too

        return cached.choose(chosen, rows, kd, temperature=temperature, terms=terms, wanted=wanted)
    several = chosen.each
    weights = mixing(kd, terms, len(several), "teacher.path")
    toks = [tokenizer.load(one.path, "the tokenizer of teacher.path") for one in several]
    ours = tokenizer.tokenizer_hash(corpus.tokenizer)
    unlike = [(one.path, found) for one, tok in zip(several, toks, strict=True) if (found := tokenizer.tokenizer_hash(tok)) != ours]
    if kd.mode == "logits" and unlike:
        folder, theirs = unlike[0]
        raise UserError(f"config key teacher.path: found tokenizer {theirs[:12]} in {folder}, and {ours[:12]} on the data; "
                        "accepted: the same tokenizer (set data.tokenizer to the teacher's folder), or kd.mode 'projector' or 'alm'")
    if len(several) > 1:
        models = tuple(causal.describe(one, "teacher", vocab=corpus.vocab, length=rows.length) for one in several)
        return Several(corpus, models, weights, kd.mixture)
    (chosen,), (tok,), length = several, toks, rows.length
    if unlike or kd.mode == "alm":
        corpus = text.paired(rows, chosen.path, causal.longest(chosen))
        length = max(split.width for split in corpus.splits.values())
    teacher = InMemory(corpus, causal.describe(chosen, "teacher", vocab=tok.vocab, length=length))
    if "attention" in terms and teacher.paired:
        raise UserError("config key attention.weight: found a weight with a teacher of another tokenizer; accepted: 0 "
                        "(rows of unlike tokens have nothing in common)")
    if "router" in terms and teacher.depth == 1 and not teacher.experts:
        raise UserError("config key router.weight: found a weight with a teacher of one block; accepted: 0 (there is nothing to choose)")
    return teacher


def mixing(kd, terms: tuple[str, ...], count: int, key: str) -> tuple[float, ...]:
    """`kd.teacher_weights` of the `count` teachers in config key `key`; what several cannot do is refused."""
    if count > 1:
        for name, found, accepted in [("kd.mode", kd.mode, "logits")] + [(f"{term}.weight", "a weight", 0) for term in terms]:
            if found != accepted:
                raise UserError(f"config key {name}: found {found} with {count} folders in {key}; accepted: {accepted} "
                                "(only the probabilities or the logits of several teachers have a mean)")
    given = kd.teacher_weights
    if not given:
        return (1 / count,) * count
    numbers = all(type(weight) in (int, float) and 0 <= weight < math.inf for weight in given)
    if len(given) != count or not numbers or abs(sum(given) - 1) > 1e-6:
        raise UserError(f"config key kd.teacher_weights: found {given} with {count} folder{'s' * (count > 1)} in {key}; "
                        f"accepted: {count} of 0 or more that add up to 1, or () for equal ones")
    return tuple(map(float, given))
