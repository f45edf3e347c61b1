"""ViT against transformers, and what must hold of it: rollout, drop-path, remat, dtypes, sharding."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxdistill import UserError
from jaxdistill.models import hf, vit, vit_files

SMALL = vit.ViTConfig(image=(16, 24), patch=8, width=32, depth=2, heads=4, classes=8)


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_dtype_promotion("strict"):
        yield


@functools.cache
def forward(module):
    return jax.jit(module.apply)


@functools.cache
def small(drop_path=0.0, **fields):
    """Weights are large, so that attention is not flat: a mistake in it shows."""
    module, rng = vit.ViT(dataclasses.replace(SMALL, drop_path=drop_path), **fields), np.random.default_rng(1)
    draw = lambda path, shape: jnp.asarray(rng.normal(path.endswith("scale"), 0.3, shape), jnp.float32)  # noqa: E731
    return module, unflatten_dict({path: draw(path, shape) for path, shape in vit.shapes(module).items()}, sep="/")


def images_for(config, count=8, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(count, *config.image, config.channels)), jnp.float32)


def apply(module, params, images, **inputs):
    return forward(module)({"params": params}, images, **inputs)


@functools.cache
def compiled(module):
    """Cross-entropy of class 1: (params, images) -> ((loss, (logits, features)), grads)."""

    def loss(params, images):
        outputs = module.apply({"params": params}, images)
        return -jax.nn.log_softmax(outputs[0])[:, 1].mean(), outputs

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def loss_and_grads(module, params, images):
    return compiled(module)(params, images)


@pytest.fixture(scope="module")
def reference(request, tmp_path_factory):
    """A transformers model of large random weights, and its folder."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=3, num_attention_heads=2, intermediate_size=40, image_size=32, patch_size=8, num_labels=5,
        hidden_act=request.param, layer_norm_eps=1e-12 if request.param == "gelu" else 1e-5, attn_implementation="eager",
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.15 * torch.randn(weight.shape))
    folder = tmp_path_factory.mktemp("vit") / request.param
    model.save_pretrained(folder)
    return model, folder


@pytest.mark.parametrize(("reference", "size"), [
    ("gelu", (32, 32)), ("gelu", (48, 40)), ("gelu", (16, 64)),  # the last has as many patches as stored: another grid
    ("gelu_pytorch_tanh", (32, 32)),
], indirect=["reference"])  # fmt: skip
def test_parity_with_transformers(reference, size):
    torch = pytest.importorskip("torch")
    model, folder = reference
    module, params = vit.from_hf(folder, image=size)
    images = images_for(module.config, 2)
    logits, features = apply(module, params, images)
    pixels = torch.tensor(np.asarray(images)).permute(0, 3, 1, 2)
    want = model(pixels, interpolate_pos_encoding=True, output_attentions=True)

    def close(ours, theirs):
        np.testing.assert_allclose(ours, theirs.detach().numpy(), atol=1e-5, rtol=0)

    assert want.attentions[1].max() > 0.3  # not flat
    close(logits, want.logits)
    for i in range(3):
        close(features[f"attention_{i}"], want.attentions[i].mean(1))
    if size == (32, 32) and module.config.activation == "gelu":  # one case: the others differ in what was seen forward
        (loss, _), grads = loss_and_grads(module, params, images)
        want_loss = torch.nn.functional.cross_entropy(want.logits, torch.ones(2, dtype=torch.long))
        close(loss, want_loss)
        want_loss.backward()
        ours, names = flatten_dict(grads, sep="/"), {name.removeprefix("vit."): x.grad for name, x in saved_names(model).items()}
        stored = vit_files._stored(vit.shapes(module))
        assert len(ours) == len(names)
        for path, grad in ours.items():
            theirs = names[stored[path].names]
            close(grad.T if stored[path].transposed else grad, theirs)


def saved_names(model):
    """transformers names its parameters otherwise in memory than on disk: the values tell which is which."""
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, dict(model.named_parameters()))


def test_rollout_is_the_product_of_the_definition():
    module, params = small()
    images = images_for(SMALL)
    _, features = apply(module, params, images)
    attentions = np.stack([features[f"attention_{i}"] for i in range(2)]).astype(np.float64)
    np.testing.assert_allclose(attentions.sum(-1), 1, atol=1e-6)
    for b in range(3):
        want = np.eye(7)
        for layer in attentions[:, b]:
            want = (layer / 2 + np.eye(7) / 2) @ want
        np.testing.assert_allclose(features["rollout"][b], want, atol=1e-6)
        alone = jnp.repeat(images[b : b + 1], 8, axis=0)
        np.testing.assert_allclose(apply(module, params, alone)[1]["rollout"][0], features["rollout"][b], atol=1e-6)
    np.testing.assert_allclose(features["rollout"].sum(-1), 1, atol=1e-6)
    assert features["rollout"].dtype == jnp.float32


def test_rollout_carries_no_gradient_and_attention_does():
    module, params = small()
    images = images_for(SMALL)

    def read(name):
        weight = jax.random.normal(jax.random.key(2), (8, 7, 7))
        return jax.jit(jax.grad(lambda params: (module.apply({"params": params}, images)[1][name] * weight).sum()))(params)

    assert all((leaf == 0).all() for leaf in jax.tree.leaves(read("rollout")))
    assert jnp.abs(read("attention_1")["block_1"]["attention"]["q"]["kernel"]).max() > 1e-3


def test_remat_changes_no_result():
    (module, params), (remat, _), images = small(), small(remat=True), images_for(SMALL)
    programs = [compiled(one).lower(params, images).compile() for one in (module, remat)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-5), *(program(params, images) for program in programs))
    plain, again = (program.cost_analysis()["flops"] for program in programs)
    assert again > 1.1 * plain  # so remat is really there


@pytest.mark.parametrize("remat", [False, True])
def test_the_rollout_costs_one_matrix(remat):
    """Peak memory of a training step of ViT-T at 224 pixels, with the rollout asked for and without. A few blocks are enough:
    the more there are, the less one matrix weighs; but one for each would show."""
    module = vit.ViT(vit.ViTConfig(image=(224, 224), classes=10, **vit.PRESETS["deit_tiny"] | {"depth": 4}), remat=remat)
    params = vit._abstract(module)

    def peak(rollout):
        def loss(params, images):
            logits, features = module.apply({"params": params}, images)
            return logits.sum(), features["rollout"][:, 0] if rollout else 0.0

        images = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
        return jax.jit(jax.grad(loss, has_aux=True)).lower(params, images).compile().memory_analysis().temp_size_in_bytes

    assert peak(True) < 1.1 * peak(False)


def test_bfloat16_is_close_and_keeps_parameters_and_gradients_in_float32():
    module, params = vit.ViT(SMALL), vit.initialise(vit.ViT(SMALL), jax.random.key(0))
    half = vit.ViT(SMALL, dtype=jnp.bfloat16)
    assert hf.params_hash(vit.initialise(half, jax.random.key(0))) == hf.params_hash(params)
    images = images_for(SMALL)
    (_, (want_logits, _)), want = loss_and_grads(module, params, images)
    (_, (logits, features)), grads = loss_and_grads(half, params, images)
    assert logits.dtype == features["attention_0"].dtype == features["rollout"].dtype == jnp.float32
    assert features["embed"].dtype == features["block_1"].dtype == features["final"].dtype == jnp.bfloat16
    np.testing.assert_allclose(logits, want_logits, atol=0.02)
    want = flatten_dict(want, sep="/")
    for path, grad in flatten_dict(grads, sep="/").items():
        assert grad.dtype == jnp.float32
        if not path.endswith("k/bias"):  # whose true gradient is 0: it adds the same to every score of a row
            assert jnp.linalg.norm(grad - want[path]) < 0.08 * jnp.linalg.norm(want[path]), path


def test_every_parameter_gets_a_gradient():
    module, params = small()
    _, grads = loss_and_grads(module, params, images_for(SMALL))
    for path, grad in flatten_dict(grads, sep="/").items():
        assert jnp.isfinite(grad).all(), path
        assert jnp.abs(grad).max() > (0 if path.endswith("k/bias") else 1e-5), path


def test_drop_path_rises_with_depth_and_is_right_in_expectation():
    module, params = small(drop_path=0.6)
    deeper = vit.ViT(dataclasses.replace(module.config, depth=3)).bind({})
    assert [block.rate for block in deeper.block] == pytest.approx([0, 0.3, 0.6])
    images, key = images_for(SMALL), jax.random.key(3)
    plain, once = apply(small()[0], params, images)[0], apply(module, params, images, key=key)[0]
    np.testing.assert_array_equal(apply(module, params, images)[0], plain)  # off without a key
    np.testing.assert_array_equal(apply(module, params, images, key=key)[0], once)
    assert jnp.abs(once - plain).max() > 1e-3
    x = jnp.arange(1.0, 13.0).reshape(1, 3, 4)
    dropped = jax.vmap(lambda key: vit.drop_path(x, 0.25, key))(jax.random.split(key, 4000))
    np.testing.assert_allclose(dropped.mean(0), x, rtol=0.04)
    kept = (dropped != 0).reshape(4000, -1)
    assert (kept.all(1) | ~kept.any(1)).all()  # all of an example, or nothing
    many = vit.drop_path(jnp.ones((64, 2, 2)), 0.5, key)
    assert {0.0, 2.0} == set(np.unique(many))  # examples on their own


def test_initialisation():
    module = vit.ViT(vit.ViTConfig(image=(64, 64), patch=8, width=64, depth=1, heads=4, classes=50))
    params = flatten_dict(vit.initialise(module, jax.random.key(0)), sep="/")
    expected = {
        "embed/position": 1.0, "head/kernel": 0.02, "embed/patch/kernel": 192**-0.5, "block_0/attention/out/kernel": 64**-0.5,
        "block_0/mlp/up/kernel": (2 / 320) ** 0.5, "block_0/mlp/down/kernel": (2 / 320) ** 0.5,
    }  # fmt: skip
    for path, std in expected.items():
        np.testing.assert_allclose(params[path].std(), std, rtol=0.05, err_msg=path)
    assert all((leaf == 0).all() for path, leaf in params.items() if path.endswith(("bias", "cls")))
    decayed = {path for path in params if re.search(vit.DECAY, path)}
    assert decayed == {path for path, leaf in params.items() if leaf.ndim > 1} - {"embed/position", "embed/cls"}


def test_sharding_rules_cut_every_leaf_evenly_and_keep_the_result():
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices")
    module, params = small()
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    placed = {}
    for path, leaf in flatten_dict(params).items():
        specs = [spec for rule, spec in vit.SHARDING if re.search(rule, "mu/" + "/".join(path))]
        assert len(specs) == 1, path
        placed[path] = jax.device_put(leaf, jax.NamedSharding(mesh, specs[0]))
        assert placed[path].addressable_shards[0].data.size * (1 if path == ("head", "bias") else 4) == leaf.size, path
    images = images_for(SMALL)
    spread = jax.device_put(images, jax.NamedSharding(mesh, jax.P(("data", "fsdp"))))
    outputs = loss_and_grads(module, unflatten_dict(placed), spread), loss_and_grads(module, params, images)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-5), *outputs)


@pytest.mark.parametrize(("change", "said"), [
    ({"heads": 5}, "heads: found 5; accepted: a divisor of width (32)"),
    ({"depth": 0}, "depth: found 0; accepted: an integer of at least 1"),
    ({"image": (16, 20)}, "image: found (16, 20); accepted: (rows, columns), multiples of the patch of 8 pixels"),
    ({"image": (16, 0)}, "image: found (16, 0)"),
    ({"inner": -1}, "inner: found -1"),
    ({"eps": 0.0}, "eps: found 0.0"),
    ({"drop_path": 1.0}, "drop_path: found 1.0; accepted: a number from 0 to below 1"),
    ({"activation": "swish"}, "activation: found 'swish'; accepted: gelu_new"),
])  # fmt: skip
def test_config_refuses_what_is_not_supported(change, said):
    with pytest.raises(UserError, match=re.escape(said)):
        dataclasses.replace(SMALL, **change)


def test_images_of_another_size_are_refused():
    module, params = small()
    with pytest.raises(UserError, match=re.escape("image: found images of (24, 16, 3); accepted: (16, 24, 3)")):
        module.apply({"params": params}, jnp.zeros((1, 24, 16, 3)))
