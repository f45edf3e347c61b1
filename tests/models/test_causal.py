"""A config section becomes a model of either family, from sizes or from a folder, behind one interface."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from jaxdistill import UserError
from jaxdistill.models import causal, gpt2, hf, llama

SECTION = causal.ModelConfig(width=24, depth=2, heads=4)
TEXT = {"vocab": 37, "length": 16}
EXPERTS = llama.LlamaConfig(vocab=37, length=16, width=24, depth=2, heads=4, inner=16, kind="qwen3_moe", experts=3, top_k=1)
UNTIED = llama.LlamaConfig(vocab=41, length=32, width=24, depth=2, heads=4, kv_heads=1, inner=40)


def model(name, folder) -> causal.CausalLM:
    """fresh gpt2 | fresh llama | the two configs above, from a folder."""
    if name.startswith("fresh"):
        return causal.describe(dataclasses.replace(SECTION, family=name.split()[1], kv_heads=2 * (name[-1] == "a")), "student", **TEXT)
    module = llama.Llama({"untied": UNTIED, "experts": EXPERTS}[name])
    llama.to_hf(module, module.init(jax.random.key(3), jnp.zeros((1, 2), jnp.int32))["params"], folder)
    return causal.describe(dataclasses.replace(SECTION, path=str(folder), depth=9, dtype="bfloat16"), "teacher", **TEXT)


@pytest.mark.parametrize("name", ["fresh gpt2", "fresh llama", "untied", "experts"])
def test_one_interface(name, tmp_path):
    found = model(name, tmp_path)
    assert (found.width, found.depth, found.heads) == (24, 2, 4)
    assert found.vocab == (41 if name == "untied" else 37)
    params = found.init(jax.random.key(0))
    assert found.parameters == sum(leaf.size for leaf in jax.tree.leaves(params))
    tokens, layout = jnp.arange(12, dtype=jnp.int32).reshape(2, 6), {"segments": jnp.ones((2, 6), jnp.int32)}
    logits, features = found.module.apply({"params": params}, tokens, **layout)
    again, head = found.features(params, tokens, layout)
    hidden, same = found.hidden_and_head(params, tokens, layout)
    assert again.keys() == features.keys() == found.example().keys()
    np.testing.assert_array_equal(head, same)
    np.testing.assert_array_equal(hidden, features["final"])
    assert hidden.dtype == found.dtype
    product = jnp.einsum("btd,vd->btv", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)
    np.testing.assert_allclose(product, logits, atol=1e-5)
    assert found.experts == (("experts_0", "experts_1") if name == "experts" else ())
    assert set(found.experts) <= features.keys()
    assert json.loads(json.dumps(found.facts))["vocab"] == found.vocab
    assert found.facts.get("weights") == (hf.folder_hash(found.folder) if found.folder else None)
    matrices = {path for path, leaf in flatten_dict(params, sep="/").items() if leaf.ndim > 1}
    looked_up = {"fresh gpt2": {"wpe/embedding"}, "fresh llama": set()}.get(name, {"wte/embedding"})
    assert {path for path in flatten_dict(params, sep="/") if re.search(found.decay, path)} == matrices - looked_up
    found.save(params, tmp_path / "out", eos=3)
    saved = causal.describe(causal.ModelConfig(path=str(tmp_path / "out")), "student", **TEXT)
    assert hf.params_hash(saved.init(None)) == hf.params_hash(params)
    assert saved.module.config == found.module.config


@pytest.mark.parametrize("name", ["fresh gpt2", "fresh llama", "untied", "experts"])
def test_a_frozen_model_is_held_in_the_dtype_of_its_matrices_to_the_same_bits(name, tmp_path):
    found = model(name, tmp_path)
    if not found.folder:
        found.save(found.init(jax.random.key(0)), tmp_path, eos=3)
        found = causal.describe(causal.ModelConfig(path=str(tmp_path), dtype="bfloat16"), "teacher", **TEXT)
    trained, frozen = found.init(jax.random.key(0)), found.load(None)
    halved = {path for path, leaf in flatten_dict(frozen, sep="/").items() if leaf.dtype == jnp.bfloat16}
    whole = r"(wte|wpe)/embedding" if name == "fresh gpt2" else "router"
    assert halved == {path for path, leaf in flatten_dict(trained, sep="/").items() if leaf.ndim > 1 and not re.search(whole, path)}
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(trained))
    tokens, layout = jnp.arange(12, dtype=jnp.int32).reshape(2, 6), {"segments": jnp.ones((2, 6), jnp.int32)}
    run = jax.jit(lambda params: (found.module.apply({"params": params}, tokens, **layout), found.head(params).astype(found.dtype)))
    jax.tree.map(np.testing.assert_array_equal, run(frozen), run(trained))


def test_a_fresh_llama_is_as_large_as_a_gpt2():
    """Per block; the positions, norms and biases are GPT-2's own."""
    sizes = dataclasses.replace(SECTION, width=96, heads=4)
    ours, theirs = (causal.describe(dataclasses.replace(sizes, family=name), "student", **TEXT) for name in ("llama", "gpt2"))
    assert isinstance(ours.module.config, llama.LlamaConfig)
    assert isinstance(theirs.module.config, gpt2.GPT2Config)
    matrices = lambda found: sum(  # noqa: E731
        leaf.size for leaf in jax.tree.leaves(jax.eval_shape(found.init, jax.random.key(0))["block_0"]) if leaf.ndim > 1
    )
    assert matrices(ours) == matrices(theirs)


@pytest.mark.parametrize(("change", "said"), [
    ({"family": "mamba"}, "config key student.family: found 'mamba'; accepted: gpt2, llama"),
    ({"dtype": "float8"}, "config key student.dtype: found 'float8'"),
    ({"depth": 0}, "config key student.depth: found 0; accepted: 1 or more"),
    ({"heads": 5}, "config key student.heads: found 5 with width 24; accepted: a divisor"),
    ({"heads": 8}, "config key student.heads: found 8 with width 24; accepted: heads of an even width"),
    ({"kv_heads": 3}, "config key student.kv_heads: found 3 with heads 4; accepted: 0, or a divisor"),
    ({"kv_heads": -1}, "config key student.kv_heads: found -1"),
    ({"kv_heads": 2, "family": "gpt2"}, "config key student.kv_heads: found 2 with family gpt2; accepted: 0"),
])  # fmt: skip
def test_a_section_that_is_no_model_is_one_line(change, said):
    with pytest.raises(UserError, match=re.escape(said)):
        causal.describe(dataclasses.replace(SECTION, **{"family": "llama"} | change), "student", **TEXT)


def test_a_folder_that_does_not_fit_is_one_line(tmp_path):
    model("untied", tmp_path)
    section = causal.ModelConfig(path=str(tmp_path))
    assert causal.longest(section) == 32
    with pytest.raises(UserError, match="teacher.path: found a model of 41 ids"):
        causal.describe(section, "teacher", vocab=42, length=16)
    with pytest.raises(UserError, match="data.length: found 33; accepted: at most the 32 positions"):
        causal.describe(section, "teacher", vocab=37, length=33)
