"""The Llama family against transformers, and what must hold of any causal model."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from jaxdistill import UserError
from jaxdistill.models import from_hf, hf, llama, moe, rope
from jaxdistill.training import sharding
from tests.models.test_gpt2 import apply, cross_entropy, loss_and_grads, tokens_for

SIZES = dict(vocab_size=97, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=80,
             max_position_embeddings=64, bos_token_id=0, eos_token_id=0)
EXPERTS = dict(head_dim=16, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=24)
LLAMA3 = dict(rope_type="llama3", rope_theta=500.0, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)
YARN = dict(rope_type="yarn", rope_theta=1000.0, factor=4.0, original_max_position_embeddings=16)
REFERENCES = {  # transformers' class, its config, how it is saved
    "grouped queries, in shards": ("Llama", {}, {"max_shard_size": "60KB"}),
    "tied, bfloat16 on disk": ("Llama", dict(tie_word_embeddings=True, num_key_value_heads=4, rms_norm_eps=1e-5), {"dtype": "bfloat16"}),
    "biases": ("Llama", dict(attention_bias=True, mlp_bias=True), {}),
    "llama3 rope": ("Llama", dict(rope_parameters=LLAMA3), {}),
    "qwen2, yarn": ("Qwen2", dict(rope_parameters=YARN), {}),
    "qwen3": ("Qwen3", dict(head_dim=20, tie_word_embeddings=True), {}),
    "qwen3_moe": ("Qwen3Moe", EXPERTS | dict(norm_topk_prob=True), {}),
    "qwen3_moe, gates as they are": ("Qwen3Moe", EXPERTS | dict(norm_topk_prob=False, attention_bias=True), {}),
}
SMALL = llama.LlamaConfig(vocab=61, length=16, width=32, depth=2, heads=4, kv_heads=2, inner=40, attention_bias=True, mlp_bias=True)
MIXED = llama.LlamaConfig(vocab=61, length=16, width=32, depth=2, heads=4, kv_heads=2, inner=24, kind="qwen3_moe", head_dim=12,
                          experts=4, top_k=2, norm_topk=True)


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(scope="module", params=list(REFERENCES))
def reference(request, tmp_path_factory):
    """A transformers model of random weights (norms and biases too), read back in float32, and its folder."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    kind, changes, saving = REFERENCES[request.param]
    folder = tmp_path_factory.mktemp("reference")
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**SIZES | changes))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn(weight.shape))
    saving = dict(saving)
    model.to(getattr(torch, saving.pop("dtype", "float32"))).save_pretrained(folder, **saving)
    assert (folder / hf.INDEX).exists() == bool(saving)
    return load_reference(folder), folder


def load_reference(folder):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info  # no missing, unexpected or mismatched key
    return model.eval()


def gradients_on_disk(model):
    """The reference's gradients by the names on disk: in memory transformers 5 fuses the experts."""
    found = {}
    for name, weight in model.named_parameters():
        grad, parts = weight.grad.numpy(), {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(name.split(".")[-1])
        if parts is None:
            found[name.removeprefix("model.")] = grad
            continue
        for part, cut in zip(parts, np.split(grad, len(parts), axis=1), strict=True):
            layer = name.removeprefix("model.").rsplit(".", 1)[0]
            found |= {f"{layer}.{i}.{part}.weight": one for i, one in enumerate(cut)}
    return found


@functools.cache
def small(config=SMALL, **fields):
    module = llama.Llama(config, **fields)
    return module, jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]


def test_parity_with_transformers(reference):
    torch = pytest.importorskip("torch")
    model, folder = reference
    module, params = from_hf(folder)
    depth, tokens = module.config.depth, tokens_for(97, (2, 40))
    (loss, (logits, features)), grads = loss_and_grads(module, params, tokens)

    ids = torch.tensor(np.asarray(tokens), dtype=torch.int64)
    also = {"output_router_logits": True} if module.config.moe else {}
    want = model(ids, output_hidden_states=True, output_attentions=True, **also)
    want_loss = torch.nn.functional.cross_entropy(want.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    want_loss.backward()

    def close(ours, theirs, **more):
        np.testing.assert_allclose(ours, theirs.detach().numpy() if hasattr(theirs, "detach") else theirs, atol=1e-5, rtol=0, **more)

    close(logits, want.logits)
    close(loss, want_loss)
    for name, theirs in zip(["embed", *(f"block_{i}" for i in range(depth - 1)), "final"], want.hidden_states, strict=True):
        close(features[name], theirs)
    for i in range(depth):
        close(features[f"attention_{i}"], want.attentions[i])
        if module.config.moe:
            close(features[f"router_{i}"].reshape(-1, 6), want.router_logits[i].softmax(-1))
    want_grads = gradients_on_disk(model)
    ours = hf.dump(llama._stored(module), flatten_dict(grads, sep="/"))
    assert ours.keys() == want_grads.keys()
    for name, grad in ours.items():
        close(grad, want_grads[name], err_msg=name)


def test_export_loads_in_transformers_and_here(reference, tmp_path):
    torch = pytest.importorskip("torch")
    _, folder = reference
    module, params = llama.from_hf(folder)
    llama.to_hf(module, params, tmp_path / "out", bos_token_id=1, eos_token_id=2)
    again, same = from_hf(tmp_path / "out")
    assert again == module
    assert hf.params_hash(same) == hf.params_hash(params)
    tokens = tokens_for(97, (2, 40))
    exported = load_reference(tmp_path / "out")
    assert exported.config.eos_token_id == 2
    want = exported(torch.tensor(np.asarray(tokens), dtype=torch.int64)).logits
    np.testing.assert_allclose(apply(module, params, tokens)[0], want.detach().numpy(), atol=1e-5, rtol=0)
    # What transformers 4 reads: the same rope in its own entries.
    raw = hf.read_config(tmp_path / "out")
    old = {key: value for key, value in raw.items() if key != "rope_parameters"}
    assert rope.from_hf(old, 64) == rope.from_hf(raw, 64) == module.config.rope


@pytest.mark.parametrize("config", [SMALL, MIXED], ids=["dense", "experts"])
def test_causal_by_gradient(config):
    module, params = small(config)
    tokens = jnp.arange(16, dtype=jnp.int32)[None]  # each once: row s of wte is read at position s alone
    readout = jax.random.normal(jax.random.key(1), (61,))

    def values(wte):
        logits, _ = module.apply({"params": params | {"wte": {"embedding": wte}}}, tokens)
        return logits[0] @ readout

    reach = jnp.abs(jax.jit(jax.jacrev(values))(params["wte"]["embedding"]))[:, :16].sum(-1)  # [logits at t, embedding at s]
    assert (reach[jnp.triu_indices(16, 1)] == 0).all()
    assert (reach[jnp.tril_indices(16)] > 0).all()


@pytest.mark.parametrize("config", [SMALL, MIXED], ids=["dense", "experts"])
def test_packed_documents_equal_the_documents_alone(config):
    module, params = small(config)
    tokens = tokens_for(61, (1, 16))
    segments = jnp.asarray([[1] * 5 + [2] * 7 + [0] * 4], jnp.int32)
    positions = jnp.asarray([[*range(5), *range(7), *range(4)]], jnp.int32)
    logits, features = apply(module, params, tokens, segments=segments, positions=positions)
    for part in (slice(0, 5), slice(5, 12)):
        alone, separate = apply(module, params, tokens[:, part])
        np.testing.assert_allclose(logits[:, part], alone, atol=1e-6)
        np.testing.assert_allclose(features["attention_1"][:, :, part, part], separate["attention_1"], atol=1e-6)
    assert (features["attention_1"][:, :, 5:12, :5] == 0).all()
    other, _ = apply(module, params, tokens.at[:, 12:].set(7), segments=segments, positions=positions)
    np.testing.assert_array_equal(other[:, :12], logits[:, :12])
    assert jnp.isfinite(logits).all()


def test_experts_are_mixed_by_their_gates():
    """Token by token, in numpy: the output is the two largest gates' experts, and the features say all of them."""
    layer = moe.MoE(inner=24, experts=5, top_k=2, norm_topk=True, down_std=0.02, dtype=jnp.float32)
    x = jax.random.normal(jax.random.key(0), (2, 7, 16))
    params = jax.tree.map(lambda w: 10 * w, layer.init(jax.random.key(1), x)["params"])
    mixed, features = layer.apply({"params": params}, x)
    kernels = {name: np.asarray(value["kernel"]) for name, value in params.items()}
    for at in np.ndindex(2, 7):
        row, gates = np.asarray(x)[at], np.asarray(features["router"])[at]
        scores = row @ kernels["router"]
        np.testing.assert_allclose(gates, np.exp(scores) / np.exp(scores).sum(), atol=1e-6)
        outputs = []
        for gate, up, down in zip(kernels["gate"], kernels["up"], kernels["down"], strict=True):
            opened = row @ gate
            outputs.append((opened / (1 + np.exp(-opened)) * (row @ up)) @ down)
        np.testing.assert_allclose(features["experts"][at], outputs, atol=1e-5)
        best = np.argsort(gates)[-2:]
        np.testing.assert_allclose(mixed[at], gates[best] / gates[best].sum() @ np.array(outputs)[best], atol=1e-5)


@pytest.mark.parametrize("config", [SMALL, MIXED], ids=["dense", "experts"])
def test_remat_changes_no_result_and_computes_nothing_unused(config, monkeypatch):
    module, params = small(config)
    remat, _ = small(config, remat=True)
    tokens = tokens_for(61, (2, 16))

    def compiled(module):
        step = jax.jit(jax.value_and_grad(lambda *args: cross_entropy(module)(*args)[0])).lower(params, tokens).compile()
        return step, step.cost_analysis()["flops"]

    (plain, flops), (again, more) = compiled(module), compiled(remat)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), plain(params, tokens), again(params, tokens))
    assert more > flops  # so remat is really there
    monkeypatch.setattr(llama, "_probabilities", lambda q, k, same: jnp.zeros((q.shape[0], q.shape[2], q.shape[1], q.shape[1])))
    monkeypatch.setattr(moe, "_each", lambda x, kernels: jnp.zeros((*x.shape[:2], 4, x.shape[-1])))
    assert (compiled(module)[1], compiled(remat)[1]) == (flops, more)


@pytest.mark.parametrize("config", [SMALL, MIXED], ids=["dense", "experts"])
def test_bfloat16_is_close_and_keeps_parameters_and_gradients_in_float32(config):
    module, params = small(config)
    half, fresh = small(config, dtype=jnp.bfloat16)
    assert hf.params_hash(fresh) == hf.params_hash(params)
    tokens = tokens_for(61, (2, 16))
    want, want_features = apply(module, params, tokens)
    with jax.numpy_dtype_promotion("standard"):  # JAX's own lowering of a bfloat16 attention gradient is not strict
        (_, (logits, features)), grads = loss_and_grads(half, params, tokens)
    assert features.keys() == want_features.keys()
    own = {name: value.dtype.name for name, value in features.items()}
    assert {name for name, dtype in own.items() if dtype == "float32"} == {n for n in own if n.startswith(("attention", "router"))}
    assert set(own.values()) == {"float32", "bfloat16"}
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, want, atol=0.02)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(grads)} == {"float32"}


@pytest.mark.parametrize("config", [SMALL, MIXED], ids=["dense", "experts"])
def test_every_parameter_gets_a_gradient_and_its_rules(config):
    module, params = small(config)
    _, grads = loss_and_grads(module, params, tokens_for(61, (4, 16)))
    for path, grad in flatten_dict(grads, sep="/").items():
        assert jnp.isfinite(grad).all(), path
        experts = grad.ndim == 3 and path.split("/")[1] == "moe"
        assert (jnp.abs(grad).max((1, 2)) > 0).all() if experts else jnp.abs(grad).max() > 0, path
    paths = {path: leaf.ndim for path, leaf in flatten_dict(params, sep="/").items()}
    decayed = {path for path in paths if re.search(llama.decay(config), path)}
    assert decayed == {path for path, ndim in paths.items() if ndim > 1} - {"wte/embedding"}
    assert re.search(llama.TIED_DECAY, "wte/embedding")


@pytest.mark.parametrize("config", [SMALL, MIXED], ids=["dense", "experts"])
def test_sharding_rules_cut_every_leaf_and_keep_the_result(config):
    module, params = small(config)
    mesh = sharding.make_mesh((2, 2, 2))
    whole = "(q|k)_norm/scale"
    for path, leaf in flatten_dict(params, sep="/").items():
        specs = [spec for rule, spec in llama.SHARDING if re.search(rule, f"mu/{path}")]
        assert len(specs) == (not re.search(whole, path)), path
        for spec in specs:
            assert jax.NamedSharding(mesh, spec).shard_shape(leaf.shape) != leaf.shape, path
    places = sharding.shardings(params, llama.SHARDING, mesh)
    placed = jax.tree.map(jax.device_put, params, places)
    tokens = tokens_for(61, (8, 16))
    spread = jax.device_put(tokens, jax.NamedSharding(mesh, jax.P(("data", "fsdp"))))
    gather = sharding.gathering(llama.SHARDING, mesh)
    run = jax.jit(jax.value_and_grad(lambda params, tokens: cross_entropy(module)(gather(params), tokens)[0]))
    want = jax.jit(jax.value_and_grad(lambda params, tokens: cross_entropy(module)(params, tokens)[0]))(params, tokens)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), run(placed, spread), want)


def test_rows_longer_than_the_model_are_refused():
    module, params = small()
    with pytest.raises(UserError, match="length: found rows of 17 tokens; accepted: at most 16"):
        module.apply({"params": params}, tokens_for(61, (1, 17)))
