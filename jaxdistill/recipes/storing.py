"""What a cache (data.teacher_cache) keeps of a teacher of student_aware that runs: states, likeliest ids, or draws. Read by `cached`."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill import UserError
from jaxdistill.data import tokenizer
from jaxdistill.data.teacher_cache import Options
from jaxdistill.losses.fused_vocab import vocab_logits
from jaxdistill.losses.targets import sample, top_k
from jaxdistill.recipe import Outputs, Schedule
from jaxdistill.recipes.cached import INSIDE, packing
from jaxdistill.recipes.teachers import InMemory, Several, Teacher

CHUNK = 512  # tokens (batch x positions) whose logits exist at a time


def outputs(teacher: Teacher, kd, temperature: Schedule, terms: tuple[str, ...], sampled: bool) -> Callable | None:
    """A recipe's `outputs`: what is stored of a teacher that runs, or a refusal of several; None of any other. kd: the section.
    temperature: of kd. terms: the feature terms that are on. sampled: whether the student writes some of the batches."""
    if isinstance(teacher, Several):
        return functools.partial(_refused, teacher)
    return functools.partial(_outputs, teacher, kd, temperature, terms, sampled) if isinstance(teacher, InMemory) else None


def _refused(teacher: Several, options: Options) -> Outputs:
    raise UserError(f"config key teacher.path: found {tuple(model.folder for model in teacher.models)} with jaxdistill.cache; accepted: "
                    "one (each has a cache of its own: teacher.cache takes a tuple of them)")


def _outputs(teacher: InMemory, kd, temperature: Schedule, terms: tuple[str, ...], sampled: bool, options: Options) -> Outputs:
    corpus, model = teacher.corpus, teacher.model
    options = _complete(options, kd.mode, temperature)
    _check(options, kd, terms, sampled)
    kept = jnp.dtype(options.dtype)

    def states(frozen, batch):
        """The last states of the rows; zeros where there is no token."""
        features, _ = teacher.outputs(frozen, batch)
        there = batch["teacher_segments" if teacher.paired else "segments"][:, :-1] > 0
        return jnp.where(there[..., None], features["final"], 0)

    def hidden(frozen, batch):
        return {"states": states(frozen, batch).astype(kept if options.format == "hidden" else jnp.bfloat16)[:, None]}

    def topk(frozen, batch):
        def of(log_p, _):
            found = [top_k(log_p, options.k, temperature=t) for t in options.temperatures]
            tails = jnp.stack([one.log_tail for one in found], axis=-1)
            return {"ids": _small(found[0].ids, corpus.vocab), "logits": found[0].logits.astype(kept), "tails": tails}

        found = _by_token(of, states(frozen, batch), teacher.head(frozen), batch["tokens"][:, 1:], corpus.vocab)
        return {name: array[:, None] for name, array in found.items()}

    def sampled(frozen, batch):
        """Each token drawn for by itself: the draw is a function of seed, row, place and its number, and of nothing else."""
        t, root = options.temperatures[0], jax.random.key(options.seed)
        draw = lambda log_p, key: sample(key, log_p, options.samples, temperature=t, gamma=options.gamma)  # noqa: E731

        def of(log_p, keys):  # [batch, time, vocab], [batch, time, draws]
            found = jax.vmap(jax.vmap(jax.vmap(draw, (None, 0))))(log_p, keys)
            return {"ids": _small(found.ids, corpus.vocab)} | ({"weights": found.weights} if options.gamma != 1 else {})

        final = states(frozen, batch)
        found = _by_token(of, final, teacher.head(frozen), _keys(root, batch["row"], final.shape[1], options.draws), corpus.vocab)
        return {name: jnp.moveaxis(array, 2, 1) for name, array in found.items()}

    def take(split, index, view):
        n = len(corpus.splits[split])
        index = np.where(index < n, index, n)
        return corpus.splits[split].rows(index) | {"valid": index < n, "row": index.astype(np.int32)}

    tok = corpus.teacher or corpus.tokenizer
    made = {
        "kind": "language", "options": dataclasses.asdict(options), "tokenizer": tokenizer.tokenizer_hash(tok),
        "packing": packing(corpus), "teacher": model.facts, "dtype": jnp.dtype(model.dtype).name, "data": corpus.facts,
    }
    return Outputs(
        made=made, rows={split: len(rows) for split, rows in corpus.splits.items()}, take=take, views=dict.fromkeys(corpus.splits, 1),
        measure=dict.fromkeys(corpus.splits, hidden) | {"train": {"hidden": hidden, "topk": topk, "sampled": sampled}[options.format]},
        constants=lambda frozen: {"head": teacher.head(frozen).astype(model.dtype)},
        units=("token", {split: facts["tokens"] for split, facts in corpus.facts["splits"].items()}), dense=2 * corpus.vocab,
        save=lambda folder: tokenizer.save(tok, str(folder / "tokenizer")),
    )


def _complete(options: Options, mode: str, temperature: Schedule) -> Options:
    """With the defaults that depend on the job, and what cannot be done refused."""
    options = dataclasses.replace(options, format=options.format or "hidden")
    if options.format == "logits":
        raise UserError("--format: found 'logits' with a language model; accepted: hidden, topk, sampled")
    options.check_used()
    if options.format != "hidden" and mode != "logits":
        raise UserError(f"--format: found {options.format!r} with kd.mode {mode!r}; accepted: 'hidden'")
    if options.views > 1:
        raise UserError(f"--views: found {options.views} with text; accepted: 1 (views are of augmented images)")
    temperatures = options.temperatures
    if options.format != "hidden" and not temperatures:
        if temperature.constant is None:
            raise UserError(f"config key kd.temperature: found {temperature.values} with --format={options.format}; accepted: a constant "
                            "one, or --format=hidden")
        temperatures = (temperature.constant,)
    if options.format == "sampled" and len(temperatures) > 1:
        raise UserError(f"--temperatures: found {temperatures} with --format=sampled; accepted: the one at which is drawn")
    dtype = options.dtype or ("bfloat16" if options.format == "hidden" else "float16")
    return dataclasses.replace(options, dtype=dtype, temperatures=temperatures)


def _check(options: Options, kd, terms: tuple[str, ...], sampled: bool) -> None:
    """Refuses a job that could not train from its cache, before the teacher runs."""
    few = options.format != "hidden"
    what = f"with a cache of format {options.format}"
    for name in terms:
        if name in INSIDE or few:
            raise UserError(f"config key {name}.weight: found a weight {what}; accepted: ((0.0, 0.0),) "
                            f"({'only ids are kept' if few else 'of the blocks nothing is kept'})")
    if few and kd.kind != "forward_kl":
        raise UserError(f"config key kd.kind: found {kd.kind!r} {what}; accepted: forward_kl")
    if sampled:
        raise UserError(f"config key on_policy.fraction: found a fraction {what}; accepted: ((0.0, 0.0),) "
                        "(of what is written later nothing can be kept)")


def _by_token(of: Callable, hidden, head, beside, vocab: int) -> dict:
    """of(log-probabilities [batch, part, vocab], beside [batch, part, ...]) for one part of the sequence after another."""
    batch, time = hidden.shape[:2]
    size = max(1, min(CHUNK // batch, time))
    count = -(-time // size)

    def cut(x):
        x = x[:, jnp.minimum(jnp.arange(count * size), time - 1)]
        return jnp.moveaxis(x.reshape(batch, count, size, *x.shape[2:]), 1, 0)

    one = lambda part: of(jax.nn.log_softmax(vocab_logits(part[0], head, vocab=vocab)), part[1])  # noqa: E731
    found = jax.lax.map(one, (cut(hidden), cut(beside)))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(batch, count * size, *x.shape[3:])[:, :time], found)


def _keys(root, rows, time: int, draws: int):
    """[batch, time, draws]: a key of each (row, draw, place)."""
    of = lambda row, place, draw: jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(root, row), draw), place)  # noqa: E731
    over_draws = jax.vmap(of, (None, None, 0))
    over_places = jax.vmap(over_draws, (None, 0, None))
    return jax.vmap(over_places, (0, None, None))(rows, jnp.arange(time), jnp.arange(draws))


def _small(ids, vocab: int):
    """In the smallest unsigned integers that hold all ids, and one more: the last one stands for none."""
    kind = next(kind for kind in (jnp.uint8, jnp.uint16, jnp.uint32) if vocab <= jnp.iinfo(kind).max)
    return ids.astype(kind)
