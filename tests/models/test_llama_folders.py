"""Folders of the Llama family: read into any sharding, and every entry that is not supported is one line."""

import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from jaxdistill import UserError
from jaxdistill.models import from_hf, gpt2, hf, llama
from jaxdistill.training import sharding
from tests.models.test_hf import configure, edit
from tests.models.test_llama import LLAMA3, MIXED, SMALL, small


@pytest.mark.parametrize("config", [SMALL, MIXED, gpt2.GPT2Config(61, 16, 32, 2, 4)], ids=["llama", "experts", "gpt2"])
def test_weights_are_read_into_their_shardings_one_at_a_time(config, tmp_path, monkeypatch):
    family, kind = (gpt2, gpt2.GPT2) if isinstance(config, gpt2.GPT2Config) else (llama, llama.Llama)
    module = kind(config)
    params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    family.to_hf(module, params, tmp_path)
    places = flatten_dict(sharding.shardings(params, family.SHARDING, sharding.make_mesh((2, 2, 2))), sep="/")
    placed = flatten_dict(from_hf(tmp_path, place=places.__getitem__)[1], sep="/")
    for path, leaf in flatten_dict(params, sep="/").items():
        assert placed[path].sharding == places[path], path
        np.testing.assert_array_equal(placed[path], leaf, err_msg=path)

    held, different = [], []  # what the host holds when a parameter is handed over, and how many parts that is

    def take(shape, place, read):
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        parts = [read(index) for index in place.addressable_devices_indices_map(shape).values()]
        different.append(len({id(part) for part in parts}))
        held.append(tracemalloc.get_traced_memory()[1] - before)
        return jnp.zeros(())

    monkeypatch.setattr(jax, "make_array_from_callback", take)
    tracemalloc.start()
    try:
        from_hf(tmp_path, place=places.__getitem__)
    finally:
        tracemalloc.stop()
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert max(held) < 2 * largest + 10_000  # in float32 and as on disk
    leaves = flatten_dict(params, sep="/").items()  # devices along "data" share what they hold
    assert different == [leaf.size // np.prod(places[path].shard_shape(leaf.shape)) for path, leaf in leaves]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    for name, config in (("dense", SMALL), ("experts", MIXED)):
        llama.to_hf(*small(config), root / name)
    return root


ROPE = {"rope_scaling": None}
FAULTS = {  # which folder, what its config.json is changed to (...: taken out), what the line says
    "size": ("dense", {"hidden_size": ...}, ("hidden_size", "found nothing", "an integer")),
    "odd size": ("dense", {"num_hidden_layers": "2"}, ("num_hidden_layers", "'2'")),
    "heads": ("dense", {"num_attention_heads": 3, "head_dim": None}, ("num_attention_heads: found 3", "32")),
    "groups": ("dense", {"num_key_value_heads": 3}, ("num_key_value_heads: found 3", "4")),
    "odd head": ("dense", {"head_dim": 7}, ("head_dim: found 7", "even")),
    "eps": ("dense", {"rms_norm_eps": 0}, ("rms_norm_eps: found 0",)),
    "bias": ("dense", {"attention_bias": "yes"}, ("attention_bias: found 'yes'", "true or false")),
    "activation": ("dense", {"hidden_act": "gelu"}, ("hidden_act: found 'gelu'", "'silu'")),
    "quantised": ("dense", {"quantization_config": {"bits": 4}}, ("quantization_config", "bits")),
    "part of a head": ("dense", ROPE | {"rope_parameters": {"partial_rotary_factor": 0.5}}, ("partial_rotary_factor: found 0.5", "1.0")),
    "theta": ("dense", ROPE | {"rope_parameters": {"rope_theta": "1e4"}}, ("rope_theta: found '1e4'",)),
    "odd rope": ("dense", {"rope_scaling": {"rope_type": ["linear"]}}, ("rope_type: found ['linear']",)),
    "longrope": ("dense", ROPE | {"rope_parameters": {"rope_type": "longrope"}}, ("rope_type: found 'longrope'", "llama3, yarn")),
    "old rope": ("dense", {"rope_scaling": {"type": "mrope"}}, ("rope_type: found 'mrope'",)),
    "rope factor": ("dense", {"rope_scaling": {"type": "linear"}}, ("rope_parameters: factor: found 'nothing'",)),
    "rope entry": ("dense", {"rope_scaling": {"type": "linear", "factor": 2.0, "fast": 1}}, ("found fast with rope_type linear", "factor")),
    "rope order": ("dense", {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, ("high_freq_factor: found 1.0",)),
    "rope list": ("dense", {"rope_scaling": [2.0]}, ("rope_parameters: found [2.0]", "an object")),
    "window": ("experts", {"use_sliding_window": True}, ("use_sliding_window: found True", "False")),
    "windows": ("experts", {"layer_types": ["full_attention", "sliding_attention"]}, ("layer_types: found 'sliding_attention'",)),
    "experts": ("experts", {"num_experts": ...}, ("num_experts: found nothing",)),
    "too many": ("experts", {"num_experts_per_tok": 5}, ("num_experts_per_tok: found 5", "4 experts")),
    "sparse": ("experts", {"decoder_sparse_step": 2}, ("decoder_sparse_step: found 2", "1")),
    "dense blocks": ("experts", {"mlp_only_layers": [0]}, ("mlp_only_layers: found [0]", "[]")),
    "untied": ("dense", {"tie_word_embeddings": True}, ("lm_head.weight", "unlike embed_tokens.weight")),
    "no bias": ("dense", {"mlp_bias": False}, ("mlp.down_proj.bias", "unexpected")),
    "one expert more": ("experts", {"num_experts": 5}, ("layers.0.mlp.experts.4.down_proj.weight", "missing")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_not_supported_is_one_line_that_names_it(fault, folders, tmp_path):
    which, changes, words = FAULTS[fault]
    for file in (folders / which).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    configure(tmp_path, **changes)
    with pytest.raises(UserError) as error:
        from_hf(tmp_path)
    assert "\n" not in str(error.value)
    for word in (str(tmp_path), *words, "accepted"):
        assert word in str(error.value), str(error.value)


def test_what_older_files_hold_beside_the_weights(folders, tmp_path):
    module = llama.Llama(llama.LlamaConfig(vocab=61, length=16, width=32, depth=1, heads=4, inner=40, tied=True))
    params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    llama.to_hf(module, params, tmp_path)

    def older(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    edit(tmp_path, older)
    assert hf.params_hash(from_hf(tmp_path)[1]) == hf.params_hash(params)


def test_export_refuses_entries_of_its_own(tmp_path):
    with pytest.raises(UserError, match="rope_theta"):
        llama.to_hf(*small(), tmp_path, rope_theta=1.0)
