"""lm: a causal language model trained on next-token cross-entropy. The teacher's own pre-training.

Config: `data` (data.text.TextConfig), `model` (models.ModelConfig: a local Hugging Face folder in `path`, or sizes),
`lm.smoothing`, `train.batch`, `optimizer.weight_decay`.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxdistill import UserError
from jaxdistill.data import packing, preflight, text, tokenizer
from jaxdistill.evaluators import language
from jaxdistill.losses.fused_vocab import fused_vocab_loss
from jaxdistill.models import causal
from jaxdistill.recipe import Aux, Evaluator, Group, Recipe, Schedule, Variables


@dataclasses.dataclass(frozen=True)
class LMConfig:
    """The section `lm`. smoothing: share of each label's probability that is spread over all ids."""

    smoothing: float = 0.0

    def __post_init__(self):
        if not 0 <= self.smoothing < 1:
            raise UserError(f"config key lm.smoothing: found {self.smoothing}; accepted: 0 or more, and below 1")


def make(config) -> Recipe:
    rows = config.data.build(text.TextConfig)
    corpus = text.load(rows)
    student = causal.describe(config.model.build(causal.ModelConfig), "model", vocab=corpus.vocab, length=rows.length)
    batch, smoothing, decay = config.train.batch, config.lm.build(LMConfig).smoothing, config.optimizer.weight_decay

    def loss(params, extra, frozen, batch, dials, key):
        tokens, labels, where, layout = next_token(batch, corpus.eos)
        hidden, head = student.hidden_and_head(params, tokens, layout)
        total, terms, probes = fused_vocab_loss(
            hidden, head, labels, scale=dials.scale, where=where, smoothing=smoothing, vocab=corpus.vocab, probe=dials.probing)
        return total, Aux(terms, {}, {"valid": share(where)} | probes)

    def measure(params, variables, frozen, batch):
        tokens, labels, where, layout = next_token(batch)
        states = student.hidden_and_head(params, tokens, layout)
        return language.chunked_sums(states, labels, where, frozen["token_bytes"], vocab=corpus.vocab)

    def export(params, folder):
        student.save(params, folder, eos=corpus.eos)
        tokenizer.save(corpus.tokenizer, folder)

    return Recipe(
        init=lambda key: Variables(student.init(key)),
        loss=loss,
        weights={"lm": Schedule(((0.0, 1.0),))},
        optim_rules=groups("student", "", student.decay, decay),
        sharding_rules=student.sharding,
        data=lambda split, seed: batches(corpus, split, batch, seed),
        evaluators={split: Evaluator(split, measure, language.finish) for split in ("validation", "test")},
        frozen=lambda place: {"token_bytes": jnp.asarray(corpus.token_bytes)},
        export=export,
        describe=lambda batch: text.describe(batch, corpus),
        preflight=lambda variables, batch: told(corpus, batch),
        facts={**corpus.facts, "model": student.facts, "parameters": student.parameters},
    )


def next_token(batch, end: int | None = None) -> tuple:
    """Rows of length + 1 -> (tokens, labels, where, layout), all [batch, length]. The label of position t is token
    t + 1; it counts where both are of the same document and neither is padding.

    end: the id that is also to be learned, as the label of a document's last token where another document follows: without it a
    student never stops. What is measured is the text, and leaves it out."""
    tokens, segments = batch["tokens"], batch["segments"]
    labels, there = tokens[:, 1:], (segments[:, 1:] > 0) & batch["valid"][:, None]
    where = (segments[:, :-1] == segments[:, 1:]) & there
    if end is not None:
        labels, where = jnp.where(where, labels, end), there
    layout = {"segments": segments[:, :-1], "positions": batch["positions"][:, :-1]}
    return tokens[:, :-1], labels, where, layout


def told(corpus, batch) -> dict:
    """The preflight of text: splits, and of this batch (on the host) the share of the positions that have a label."""
    counted = next_token(batch, corpus.eos)[2]
    sizes = {name: len(rows) for name, rows in corpus.splits.items()}
    return preflight.told(sizes, corpus.vocab, preflight.documents(corpus.splits)) | {"valid": float(counted.mean())}


def share(where) -> tuple:
    """(sum, count) of the positions that count."""
    return jnp.sum(where, dtype=jnp.float32), jnp.asarray(where.size, jnp.float32)


def batches(corpus, split: str, batch: int, seed: int, beside=None):
    """Training: shuffled by the seed and endless. Other splits: in order, once, the last batch padded. beside: as in
    `packing.batches`."""
    training = split == "train"
    return packing.batches(
        corpus.splits[split], batch=batch, seed=seed, repeat=training, shuffle=training, beside=beside,
        process_index=jax.process_index(), process_count=jax.process_count(),
    )


def groups(name: str, root: str, matrices: str, decay: float, lr_mult: float = 1.0) -> tuple:
    """Optim rules of the parameters that begin with `root`: decay on `matrices` (a regex) only, none on biases,
    normalisations and position embeddings."""
    return ((f"^{root}.*(?:{matrices})", Group(name, lr_mult, decay)),
            (f"^{root}(?!.*(?:{matrices}))", Group(f"{name}_no_decay", lr_mult, 0.0)))
