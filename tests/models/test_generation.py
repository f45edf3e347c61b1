"""Generation with a KV cache against the definition: the whole model run anew for every token of every row by itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import UserError
from jaxdistill.models import generation, gpt2, llama, rope
from jaxdistill.models.generation import aligned, generate

LLAMA = dict(vocab=61, length=16, width=32, depth=2, heads=4, kv_heads=2, inner=40)
YARN = rope.Rope(1000.0, "yarn", (("factor", 4.0), ("original_max_position_embeddings", 8)))
MODULES = {
    "gpt2": gpt2.GPT2(gpt2.GPT2Config(vocab=61, length=16, width=32, depth=2, heads=4)),
    "grouped queries": llama.Llama(llama.LlamaConfig(**LLAMA, attention_bias=True)),
    "experts, norms of queries and keys": llama.Llama(
        llama.LlamaConfig(**LLAMA, kind="qwen3_moe", head_dim=12, experts=4, top_k=2, norm_topk=True)),
    "yarn, tied": llama.Llama(llama.LlamaConfig(**LLAMA | dict(kv_heads=4, depth=1), rope=YARN, tied=True)),
}
PROMPTS = [[5, 17, 3, 44, 8], [9], [60, 2, 31]]


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_dtype_promotion("strict"):
        yield


@functools.cache
def made(name: str):
    """(module, parameters far from their initial values, so that tokens are far from equally likely, the full forward)."""
    module = MODULES[name]
    params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    leaves, tree = jax.tree.flatten(params)
    numbers = np.random.default_rng(1)
    params = tree.unflatten([x + numbers.normal(0, 0.2, x.shape).astype(np.float32) for x in leaves])
    return module, params, jax.jit(lambda params, tokens: module.apply({"params": params}, tokens)[0])


def by_definition(name: str, prompt: list[int], row: int, new: int, key, *, temperature: float = 1.0):
    """(tokens, log-probabilities) of one row, without padding, batch or cache."""
    _, params, forward = made(name)
    ids, log_probs, key = list(prompt), [], jax.random.fold_in(key, row)
    for t in range(new):
        padded = np.asarray([ids + [0] * (16 - len(ids))], np.int32)  # later tokens are not seen: one shape for all
        logits = np.asarray(forward(params, padded))[0, len(ids) - 1]
        noise = np.asarray(jax.random.gumbel(jax.random.fold_in(key, t), logits.shape))
        chosen = int(np.argmax(logits + temperature * noise))
        log_probs.append(logits[chosen] - np.log(np.exp(logits.astype(np.float64)).sum()))
        ids.append(chosen)
    return ids[len(prompt) :], log_probs


@pytest.mark.parametrize("name", MODULES)
def test_it_is_the_definition_for_every_row_by_itself(name):
    """Prompts of unlike lengths, aligned on the right; a row's tokens do not depend on the batch it is in."""
    module, params, _ = made(name)
    key, numbers = jax.random.key(7), [4, 0, 11]
    found = generate(module, params, new=6, key=key, rows=jnp.asarray(numbers), **aligned(PROMPTS, 6))
    assert found.mask.all()
    for i, (prompt, number) in enumerate(zip(PROMPTS, numbers, strict=True)):
        tokens, log_probs = by_definition(name, prompt, number, 6, key)
        assert found.tokens[i].tolist() == tokens
        np.testing.assert_allclose(found.log_probs[i], log_probs, atol=1e-5)


def test_greedy_takes_the_likeliest_token():
    module, params, _ = made("gpt2")
    greedy = generate(module, params, new=9, key=jax.random.key(7), temperature=0, **aligned(PROMPTS, 6))
    assert greedy.tokens[0].tolist() == by_definition("gpt2", PROMPTS[0], 0, 9, jax.random.key(7), temperature=0)[0]


@pytest.mark.parametrize(("name", "batch", "width", "new"), [("gpt2", 3, 1, 16), ("gpt2", 1, 16, 1)])
def test_log_probabilities_are_those_of_one_full_forward(name, batch, width, new):
    module, params, forward = made(name)
    prompt = jnp.asarray(np.random.default_rng(3).integers(0, 61, (batch, width)), jnp.int32)
    found = generate(module, params, prompt, new=new, key=jax.random.key(2), temperature=1.3, top_p=0.9)
    whole = jnp.concatenate([prompt, found.tokens], axis=1)
    log_probs = jax.nn.log_softmax(forward(params, jnp.pad(whole, ((0, 0), (0, 17 - whole.shape[1])))[:, :16]))
    expected = jnp.take_along_axis(log_probs[:, width - 1 : width - 1 + new], found.tokens[..., None], axis=2)[..., 0]
    np.testing.assert_allclose(found.log_probs, expected, atol=1e-5)


def test_a_packed_prompt_continues_its_last_document_and_sees_no_other():
    module, params, _ = made("gpt2")
    tokens = jnp.asarray([[7, 8, 9, 5, 17, 3], [1, 2, 3, 4, 0, 0]], jnp.int32)
    segments = jnp.asarray([[1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 0, 0]], jnp.int32)
    positions = jnp.asarray([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 0, 0]], jnp.int32)
    found = generate(module, params, tokens, segments=segments, positions=positions, new=4, key=jax.random.key(7))
    assert found.tokens[0].tolist() == by_definition("gpt2", [5, 17, 3], 0, 4, jax.random.key(7))[0]
    for array in found:  # a row that ends in padding has nothing to continue
        assert not array[1].any()


def test_the_end_of_text_ends_a_row_and_padding_follows():
    module, params, _ = made("gpt2")
    key, prompts = jax.random.key(7), aligned(PROMPTS)
    free = generate(module, params, new=9, key=key, eos=-1, **prompts)
    eos = int(free.tokens[0, 3])
    found = generate(module, params, new=9, key=key, eos=eos, **prompts)
    for tokens, mask, log_probs, all_tokens, all_log_probs in zip(*found, free.tokens, free.log_probs, strict=True):
        there = (all_tokens == eos).tolist()
        size = there.index(True) + 1 if any(there) else 9
        assert mask.tolist() == [True] * size + [False] * (9 - size)
        assert tokens.tolist() == all_tokens[:size].tolist() + [0] * (9 - size)
        np.testing.assert_allclose(log_probs, jnp.where(mask, all_log_probs, 0.0), atol=1e-6)
    assert found.mask[0].sum() <= 4


def test_padding_of_the_vocabulary_is_never_drawn_and_takes_no_probability():
    module, params, forward = made("gpt2")
    heavy = params["wte"]["embedding"].at[50:].multiply(8.0)
    params = params | {"wte": {"embedding": heavy}}
    prompt = jnp.asarray([[5, 17, 3]] * 8, jnp.int32)
    first = generate(module, params, prompt, new=6, key=jax.random.key(0), vocab=50)
    assert not (first.tokens >= 50).any()
    logits = np.asarray(forward(params, jnp.asarray([[5, 17, 3] + [0] * 13]))[0, 2], np.float64)
    assert np.exp(logits[50:]).sum() > 0.9 * np.exp(logits).sum()  # drawn most of the time, if they could be
    expected = logits[:50] - np.log(np.exp(logits[:50]).sum())
    np.testing.assert_allclose(first.log_probs[:, 0], expected[first.tokens[:, 0]], atol=1e-5)


@pytest.mark.parametrize(("temperature", "top_p"), [(0.7, 1.0), (1.5, 0.6)])
def test_it_draws_from_the_distribution_that_was_asked_for(temperature, top_p):
    """Frequencies of 4,000 draws of one token against float64, within what chance leaves."""
    module, params, forward = made("gpt2")
    draws = 4000
    prompt = jnp.broadcast_to(jnp.asarray([[5, 17, 3]], jnp.int32), (draws, 3))
    found = generate(module, params, prompt, new=1, key=jax.random.key(5), temperature=temperature, top_p=top_p).tokens[:, 0]
    logits = np.asarray(forward(params, jnp.asarray([[5, 17, 3] + [0] * 13]))[0, 2], np.float64) / temperature
    p = np.exp(logits - logits.max())
    p /= p.sum()
    order = np.argsort(-p)
    size = int(np.searchsorted(np.cumsum(p[order]), top_p)) + 1
    p[order[size:]] = 0.0
    p /= p.sum()
    seen = np.bincount(found, minlength=61)
    assert not seen[p == 0].any()
    assert (p == 0).any() == (top_p < 1)
    kept = p > 0
    chi2 = np.sum((seen[kept] - draws * p[kept]) ** 2 / (draws * p[kept]))
    assert chi2 < kept.sum() + 5 * np.sqrt(2 * kept.sum())


@pytest.mark.parametrize(("change", "told"), [
    (dict(temperature=-1.0), "temperature: found -1.0; accepted: 0 or more"),
    (dict(top_p=0.0), "top_p: found 0.0; accepted: above 0, and at most 1"),
    (dict(new=15), "new: found 15 after prompts of 3 tokens; accepted: from 1 to 14"),
    (dict(new=0), "new: found 0 after"),
])
def test_what_cannot_be_is_refused(change, told):
    module, params, _ = made("gpt2")
    with pytest.raises(UserError, match=told):
        generate(module, params, jnp.zeros((1, 3), jnp.int32), **{"new": 2, "key": jax.random.key(0)} | change)
    with pytest.raises(UserError, match="prompt 1: found 0 tokens; accepted: from 1 to 4"):
        generation.aligned([[1], []], 4)
