"""On-policy distillation (GKD: Agarwal et al. 2024, arXiv 2306.13649): the student learns on what it writes itself.

In a share of the updates (GKD's lambda) each row of the batch keeps the beginning of its text, and the student goes on from there;
then both models read the result. What a term counts of such a batch:
    kd                   the tokens that the student wrote, its end of text included
    lm                   nothing, as there is no real text to be right about: its weight leaves nothing, whatever it is
    the feature terms    every token that is there, as of a text
No gradient passes through the sampling.
"""

import dataclasses
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jaxdistill import UserError
from jaxdistill.models.causal import CausalLM
from jaxdistill.models.generation import Generated, generate
from jaxdistill.recipe import Sampler, Schedule
from jaxdistill.recipes import teachers

NGRAM = 4  # of repetition


@dataclasses.dataclass(frozen=True)
class OnPolicyConfig:
    """The section `on_policy`. fraction: of the updates, those whose batch the student writes; a ramp, as a weight is. prompt: tokens
    of each row that are kept. temperature, top_p: as `generation.generate` takes them."""

    fraction: Any = ((0.0, 0.0),)
    prompt: int = 32
    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self):
        if not self.temperature >= 0:
            raise UserError(f"config key on_policy.temperature: found {self.temperature}; accepted: 0 (the likeliest token) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"config key on_policy.top_p: found {self.top_p}; accepted: above 0, and at most 1")


def sampler(
    config: OnPolicyConfig, student: CausalLM, teacher: teachers.Teacher, *, steps: int, length: int, mode: str, kd_weight: Schedule
) -> Sampler | None:
    """The recipe's `sampler` of rows of `length` labels; None where the fraction or the weight of kd is always 0, which
    leaves no use for samples. The student's parameters are params["student"]. mode: `kd.mode`."""
    corpus = teacher.corpus
    fraction = Schedule.ramp(config.fraction, steps, "config key on_policy.fraction", least=0.0, most=1.0)
    if fraction.off or kd_weight.off:
        return None
    found = f"config key on_policy.fraction: found {config.fraction!r} with"
    if mode != "logits":
        raise UserError(f"{found} kd.mode {mode!r}; accepted: ((0.0, 0.0),), or mode 'logits' (a sample is the student's tokens, which "
                        "a teacher of another tokenizer does not read)")
    if not teacher.runs:
        raise UserError(f"{found} a teacher that is read from a cache; accepted: ((0.0, 0.0),), or a teacher in memory "
                        "(it must read what the student writes)")
    if not 1 <= config.prompt <= length:
        raise UserError(f"config key on_policy.prompt: found {config.prompt}; accepted: from 1 to data.length ({length})")

    def draw(params, extra, frozen, batch, key):
        written = generate(
            student.module, params["student"], batch["tokens"][:, : config.prompt], new=length + 1 - config.prompt, key=key,
            segments=batch["segments"][:, : config.prompt], positions=batch["positions"][:, : config.prompt],
            temperature=config.temperature, top_p=config.top_p, eos=corpus.eos, vocab=corpus.vocab,
        )
        return continued(batch, written, config.prompt), seen(written)

    # While kd is closed there is no use for samples: nothing would be learned of them.
    return Sampler(lambda step: jnp.where(kd_weight(step) > 0, fraction(step), 0.0), draw)


def continued(batch: dict, written: Generated, prompt: int) -> dict:
    """The batch, each row of it `prompt` tokens and then what was written: in the same segment, at the next positions, padding
    after it."""
    after = written.mask.astype(jnp.int32)
    further = {
        "tokens": written.tokens,
        "segments": batch["segments"][:, prompt - 1 : prompt] * after,
        "positions": (batch["positions"][:, prompt - 1 : prompt] + 1 + jnp.arange(after.shape[1])[None]) * after,
    }
    rows = {name: jnp.concatenate([batch[name][:, :prompt], more], axis=1) for name, more in further.items()}
    return batch | rows | {"prompt": jnp.full_like(batch["prompt"], prompt)}


def masks(batch: dict, where: Bool[Array, "batch time"]) -> tuple[Bool[Array, "batch time"], Bool[Array, "batch time"]]:
    """(labels that count in lm, labels that count in kd) of those that are there. batch["prompt"]: 0 of a text, else the tokens of
    the row that the student did not write; label t is the row's token t + 1."""
    prompt = batch["prompt"][:, None]
    return where & (prompt == 0), where & (jnp.arange(1, where.shape[1] + 1)[None] >= prompt)


def seen(written: Generated) -> dict:
    """(sum, count) pairs. log_prob: of each token, under the student. length: tokens of each row that could be continued.
    repetition: the share of a row's 4-grams that were in it before (seq-rep-4: Welleck et al. 2020, arXiv 1908.04319), which tends to
    1 when a student collapses into loops."""
    there = written.mask[:, 0]
    rows = jnp.sum(there, dtype=jnp.float32)
    found = {
        "log_prob": (jnp.sum(written.log_probs), jnp.sum(written.mask, dtype=jnp.float32)),
        "length": (jnp.sum(written.mask, dtype=jnp.float32), rows),
    }
    if written.tokens.shape[1] >= NGRAM:
        share, long_enough = jax.vmap(_repetition)(written.tokens, written.mask)
        found["repetition"] = (jnp.sum(share), jnp.sum(long_enough, dtype=jnp.float32))
    return found


def _repetition(tokens: Int[Array, " time"], mask: Bool[Array, " time"]):
    """(1 - different n-grams / n-grams, whether there are any) of one row. Sorted, equal n-grams are neighbours."""
    count = tokens.shape[0] - NGRAM + 1
    whole = mask[NGRAM - 1 :]  # the mask is a prefix
    grams = [jnp.where(whole, tokens[i : i + count], -1) for i in range(NGRAM)]
    grams = jnp.stack(jax.lax.sort(grams, num_keys=NGRAM))
    new = jnp.any(grams[:, 1:] != grams[:, :-1], axis=0) & (grams[0, 1:] >= 0)
    different = jnp.sum(new) + (grams[0, 0] >= 0)
    n = jnp.sum(whole)
    return jnp.where(n > 0, 1 - different / jnp.maximum(n, 1), 0.0), n > 0


class Marked(grain.DatasetIterator):
    """Batches of text, marked as such: the step is compiled once for these and for what the student writes."""

    def __init__(self, batches: grain.DatasetIterator):
        super().__init__(batches)
        self._batches = batches

    def __next__(self) -> dict:
        batch = next(self._batches)
        return batch | {"prompt": np.zeros(len(batch["tokens"]), np.int32)}

    def get_state(self):
        return self._batches.get_state()

    def set_state(self, state) -> None:
        self._batches.set_state(state)

    def close(self) -> None:
        self._batches.close()
