"""GPT-2 against transformers, and what must hold of any causal model: causality, packing, padding, remat, dtypes."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxdistill import UserError
from jaxdistill.models import from_hf, gpt2, hf

SMALL = gpt2.GPT2Config(vocab=61, length=16, width=32, depth=2, heads=4)
SIZES = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner", "activation_function")
REFERENCES = {  # transformers' own names, and the dtype on disk
    "gelu": ((97, 32, 48, 1, 3, None, "gelu"), "float32"),
    "inner": ((64, 24, 32, 3, 4, 80, "relu"), "float32"),
    "bfloat16": ((131, 16, 64, 2, 2, None, "gelu_new"), "bfloat16"),
}


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(scope="module", params=list(REFERENCES))
def reference(request, tmp_path_factory):
    """A transformers model of random weights (biases and scales too), read back in float32, and its folder."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    sizes, dtype = REFERENCES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    config = transformers.GPT2Config(**dict(zip(SIZES, sizes, strict=True)), bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn(weight.shape))
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return load_reference(folder), folder


def load_reference(folder):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model, info = transformers.GPT2LMHeadModel.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info  # no missing, unexpected or mismatched key
    return model.eval()


@functools.cache
def small(**fields):
    module = gpt2.GPT2(SMALL, **fields)
    return module, jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]


def apply(module, params, tokens, **inputs):
    return jax.jit(module.apply)({"params": params}, tokens, **inputs)


def tokens_for(vocab, shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, vocab, shape), jnp.int32)


def cross_entropy(module):
    """(params, tokens) -> mean next-token loss, and what the model returns."""

    def loss(params, tokens):
        outputs = module.apply({"params": params}, tokens)
        picked = jnp.take_along_axis(jax.nn.log_softmax(outputs[0][:, :-1]), tokens[:, 1:, None], axis=-1)
        return -picked.mean(), outputs

    return loss


def loss_and_grads(module, params, tokens):
    """((loss, (logits, features)), grads)."""
    return jax.jit(jax.value_and_grad(cross_entropy(module), has_aux=True))(params, tokens)


def test_parity_with_transformers(reference):
    torch = pytest.importorskip("torch")
    model, folder = reference
    module, params = from_hf(folder)
    tokens = tokens_for(module.config.vocab, (2, module.config.length))
    (loss, (logits, features)), grads = loss_and_grads(module, params, tokens)

    ids = torch.tensor(np.asarray(tokens), dtype=torch.int64)
    want = model(ids, output_hidden_states=True, output_attentions=True)
    want_loss = torch.nn.functional.cross_entropy(want.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    want_loss.backward()

    def close(ours, theirs):
        np.testing.assert_allclose(ours, theirs.detach().numpy(), atol=1e-5, rtol=0)

    close(logits, want.logits)
    close(loss, want_loss)
    depth = module.config.depth
    for name, theirs in zip(["embed", *(f"block_{i}" for i in range(depth - 1)), "final"], want.hidden_states, strict=True):
        close(features[name], theirs)
    for i in range(depth):
        close(features[f"attention_{i}"], want.attentions[i])
    want_grads = dict(model.transformer.named_parameters())
    ours = flatten_dict(grads, sep="/")
    assert len(ours) == len(want_grads)
    for path, grad in ours.items():
        close(grad, want_grads[gpt2._hf_name(path)].grad)


def test_export_loads_in_transformers_and_here(reference, tmp_path):
    torch = pytest.importorskip("torch")
    _, folder = reference
    module, params = gpt2.from_hf(folder)
    gpt2.to_hf(module, params, tmp_path / "out", bos_token_id=1, eos_token_id=2)
    again, same = gpt2.from_hf(tmp_path / "out")
    assert again == module
    assert hf.params_hash(same) == hf.params_hash(params)
    assert hf.read_config(tmp_path / "out")["eos_token_id"] == 2
    tokens = tokens_for(module.config.vocab, (2, 8))
    want = load_reference(tmp_path / "out")(torch.tensor(np.asarray(tokens), dtype=torch.int64)).logits
    np.testing.assert_allclose(apply(module, params, tokens)[0], want.detach().numpy(), atol=1e-5, rtol=0)


def test_causal_by_gradient():
    module, params = small()
    tokens = tokens_for(61, (1, 16))
    readout = jax.random.normal(jax.random.key(1), (61,))

    def values(wpe):  # row s of wpe is added to the embedding of position s, and is used nowhere else
        logits, _ = module.apply({"params": params | {"wpe": {"embedding": wpe}}}, tokens)
        return logits[0] @ readout

    reach = jnp.abs(jax.jit(jax.jacrev(values))(params["wpe"]["embedding"])).sum(-1)  # [logits at t, embedding at s]
    assert (reach[jnp.triu_indices(16, 1)] == 0).all()
    assert (reach[jnp.tril_indices(16)] > 0).all()


def packed():
    """Documents of 5 and 7 tokens and 4 of padding in a row of 16."""
    segments = jnp.asarray([[1] * 5 + [2] * 7 + [0] * 4], jnp.int32)
    positions = jnp.asarray([[*range(5), *range(7), *range(4)]], jnp.int32)
    return tokens_for(61, (1, 16)), segments, positions


def test_packed_documents_equal_the_documents_alone():
    module, params = small()
    tokens, segments, positions = packed()
    logits, features = apply(module, params, tokens, segments=segments, positions=positions)
    for part in (slice(0, 5), slice(5, 12)):
        alone, separate = apply(module, params, tokens[:, part])
        np.testing.assert_allclose(logits[:, part], alone, atol=1e-6)
        np.testing.assert_allclose(features["attention_1"][:, :, part, part], separate["attention_1"], atol=1e-6)
    assert (features["attention_1"][:, :, 5:12, :5] == 0).all()


def test_padding_is_finite_and_changes_nothing():
    module, params = small()
    tokens, segments, positions = packed()
    weight = (segments > 0)[..., None].astype(jnp.float32)

    def run(tokens):
        def total(params):
            logits, features = module.apply({"params": params}, tokens, segments=segments, positions=positions)
            return (logits * logits * weight).sum(), (logits, features)

        return jax.jit(jax.value_and_grad(total, has_aux=True))(params)

    (first, (logits, features)), grads = run(tokens)
    (second, _), other = run(tokens.at[:, 12:].set(7))
    for leaf in jax.tree.leaves((logits, features, grads)):
        assert jnp.isfinite(leaf).all()
    assert first == second
    jax.tree.map(np.testing.assert_array_equal, grads, other)


def test_remat_changes_no_result_and_computes_no_unused_probabilities(monkeypatch):
    module, params = small()
    remat, _ = small(remat=True)
    tokens = tokens_for(61, (2, 16))

    def compiled(module):
        step = jax.jit(jax.value_and_grad(lambda *args: cross_entropy(module)(*args)[0])).lower(params, tokens).compile()
        return step, step.cost_analysis()["flops"]

    (plain, flops), (again, more) = compiled(module), compiled(remat)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), plain(params, tokens), again(params, tokens))
    assert more > flops  # so remat is really there
    monkeypatch.setattr(gpt2, "_probabilities", lambda q, k, same: jnp.zeros((q.shape[0], q.shape[2], q.shape[1], q.shape[1])))
    assert (compiled(module)[1], compiled(remat)[1]) == (flops, more)


def test_bfloat16_is_close_and_keeps_parameters_and_gradients_in_float32():
    module, params = small()
    half, fresh = small(dtype=jnp.bfloat16)
    assert hf.params_hash(fresh) == hf.params_hash(params)
    tokens = tokens_for(61, (2, 16))
    (_, (want_logits, _)), want = loss_and_grads(module, params, tokens)
    with jax.numpy_dtype_promotion("standard"):  # JAX's own lowering of a bfloat16 attention gradient is not strict
        (_, (logits, features)), grads = loss_and_grads(half, params, tokens)
    assert logits.dtype == features["attention_0"].dtype == jnp.float32
    assert features["embed"].dtype == features["block_1"].dtype == features["final"].dtype == jnp.bfloat16
    np.testing.assert_allclose(logits, want_logits, atol=0.02)
    want, grads = flatten_dict(want, sep="/"), flatten_dict(grads, sep="/")
    for path, grad in grads.items():
        assert grad.dtype == jnp.float32
        assert jnp.linalg.norm(grad - want[path]) < 0.05 * jnp.linalg.norm(want[path]), path


def test_every_parameter_gets_a_gradient():
    module, params = small()
    _, grads = loss_and_grads(module, params, tokens_for(61, (2, 16)))
    for path, grad in flatten_dict(grads, sep="/").items():
        assert jnp.isfinite(grad).all(), path
        assert jnp.abs(grad).max() > 0, path


def test_initialisation():
    module = gpt2.GPT2(gpt2.GPT2Config(vocab=500, length=64, width=64, depth=2, heads=4))
    params = flatten_dict(jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"], sep="/")
    for path, std in {
        "wte/embedding": 0.02,
        "wpe/embedding": 0.01,
        "block_1/attention/qkv/kernel": 0.02,
        "block_1/attention/out/kernel": 0.01,
        "block_1/mlp/up/kernel": 0.02,
        "block_1/mlp/down/kernel": 0.01,
    }.items():
        np.testing.assert_allclose(params[path].std(), std, rtol=0.05, err_msg=path)
    assert all((leaf == 0).all() for path, leaf in params.items() if path.endswith("bias"))
    decayed = {path for path in params if re.search(gpt2.DECAY, path)}
    assert decayed == {path for path, leaf in params.items() if leaf.ndim == 2} - {"wpe/embedding"}


def test_sharding_rules_cut_every_leaf_evenly_and_keep_the_result():
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices")
    module, params = small()
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    placed = {}
    for path, leaf in flatten_dict(params).items():
        specs = [spec for rule, spec in gpt2.SHARDING if re.search(rule, "mu/" + "/".join(path))]
        assert len(specs) == 1, path
        placed[path] = jax.device_put(leaf, jax.NamedSharding(mesh, specs[0]))
        assert placed[path].addressable_shards[0].data.size * 4 == leaf.size, path
    tokens = tokens_for(61, (8, 16))
    spread = jax.device_put(tokens, jax.NamedSharding(mesh, jax.P(("data", "fsdp"))))
    outputs = loss_and_grads(module, unflatten_dict(placed), spread), loss_and_grads(module, params, tokens)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *outputs)


def test_rows_longer_than_the_model_are_refused():
    module, params = small()
    with pytest.raises(UserError, match="length: found rows of 17 tokens; accepted: at most 16"):
        module.apply({"params": params}, tokens_for(61, (1, 17)))
