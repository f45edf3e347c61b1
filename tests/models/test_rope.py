"""Rotary positions: the frequencies of transformers, read from either place that says them, and far positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.models import from_hf, llama, rope
from tests.models.test_gpt2 import apply, tokens_for
from tests.models.test_llama import LLAMA3, SIZES, YARN, load_reference, small


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.mark.parametrize("entries", [
    dict(rope_type="default", rope_theta=1e6),
    dict(rope_type="linear", factor=3.0, rope_theta=1e4),
    dict(rope_type="dynamic", factor=3.0, rope_theta=1e4),
    LLAMA3, LLAMA3 | dict(original_max_position_embeddings=8192, factor=32.0, rope_theta=5e5),
    YARN, YARN | dict(truncate=False, beta_fast=16, beta_slow=2, attention_factor=1.5, original_max_position_embeddings=4096),
    YARN | dict(mscale=0.7, mscale_all_dim=1.1),
], ids=lambda entries: entries["rope_type"])  # fmt: skip
def test_frequencies_are_those_of_transformers(entries):
    """Of the two places in which a config.json may say them."""
    pytest.importorskip("torch")
    utils = pytest.importorskip("transformers.modeling_rope_utils")
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = modeling.LlamaConfig(**SIZES | dict(hidden_size=256, max_position_embeddings=8192, rope_parameters=dict(entries)))
    plain = modeling.LlamaRotaryEmbedding.compute_default_rope_parameters
    want, attention = utils.ROPE_INIT_FUNCTIONS.get(entries["rope_type"], plain)(config)
    old = {key: value for key, value in entries.items() if key != "rope_theta"}
    for raw in ({"rope_parameters": entries}, {"rope_theta": entries["rope_theta"], "rope_scaling": old, "rope_parameters": None}):
        rates, factor = rope.frequencies(rope.from_hf(raw, 8192), 64)
        np.testing.assert_allclose(rates, want.numpy(), rtol=1e-6)
        assert factor == pytest.approx(attention)


def test_long_positions():
    """A rotation depends on the distance alone, also 100,000 positions on: only rounding of the angle is left."""
    config = llama.LlamaConfig(vocab=61, length=131072, width=32, depth=2, heads=2, inner=40, rope=rope.Rope(5e5))
    module, params = small(config)
    params = jax.tree.map(lambda x: 5 * x if x.ndim > 1 else x, params)  # positions matter to it
    tokens, positions = tokens_for(61, (1, 16)), jnp.arange(16)[None]
    near, _ = apply(module, params, tokens)
    np.testing.assert_array_equal(apply(module, params, tokens, positions=positions)[0], near)
    np.testing.assert_allclose(apply(module, params, tokens, positions=positions + 100_000)[0], near, atol=1e-3)
    assert jnp.abs(apply(module, params, tokens, positions=2 * positions)[0] - near).max() > 0.1
    half = small(config, dtype=jnp.bfloat16)[0]
    with jax.numpy_dtype_promotion("standard"):
        far = apply(half, params, tokens, positions=positions + 100_000)[0]
        np.testing.assert_allclose(far, apply(half, params, tokens)[0], atol=0.05)


def test_long_positions_as_in_transformers(tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    entries = LLAMA3 | dict(original_max_position_embeddings=1024, rope_theta=5e5)
    config = transformers.LlamaConfig(**SIZES | dict(max_position_embeddings=8192, rope_parameters=entries))
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    module, params = from_hf(tmp_path)
    tokens, positions = tokens_for(97, (1, 32)), jnp.arange(8160, 8192)[None]
    ids, places = (torch.tensor(np.asarray(x), dtype=torch.int64) for x in (tokens, positions))
    want = load_reference(tmp_path)(ids, position_ids=places).logits.detach().numpy()
    np.testing.assert_allclose(apply(module, params, tokens, positions=positions)[0], want, atol=1e-4)
