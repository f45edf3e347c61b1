"""A ViT's weights on disk: in, out, resized, and every way in which a file can be wrong."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from jaxdistill import UserError
from jaxdistill.models import hf, vit, vit_files

CONFIG = vit.ViTConfig(image=(32, 32), patch=8, width=24, depth=2, heads=2, inner=40, classes=3, activation="gelu_pytorch_tanh")
NAMES = ("cat", "dog", "eel")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small model, its folder and its .npz; tests change copies only."""
    module = vit.ViT(CONFIG)
    params = vit.initialise(module, jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + jnp.asarray(rng.normal(0, 0.2, x.shape), jnp.float32), params)
    folder = tmp_path_factory.mktemp("made") / "model"
    vit.to_hf(module, params, folder, names=NAMES)
    np.savez(folder.parent / "model.npz", **google(params))
    return module, params, folder


def google(params):
    """The parameters as google-research/vision_transformer names and shapes them."""
    heads, width = CONFIG.heads, CONFIG.width
    arrays = {"cls": params["embed"]["cls"], "Transformer/posembed_input/pos_embedding": params["embed"]["position"]}
    arrays |= {"embedding/kernel": params["embed"]["patch"]["kernel"].swapaxes(0, 1), "embedding/bias": params["embed"]["patch"]["bias"]}
    for kind in ("scale", "bias"):
        arrays[f"Transformer/encoder_norm/{kind}"] = params["ln_f"][kind]
    for kind in ("kernel", "bias"):
        arrays[f"head/{kind}"] = params["head"][kind]
    for i in range(CONFIG.depth):
        block, at = params[f"block_{i}"], f"Transformer/encoderblock_{i}"
        for ours, theirs in (("ln_1", "LayerNorm_0"), ("ln_2", "LayerNorm_2")):
            arrays |= {f"{at}/{theirs}/{kind}": block[ours][kind] for kind in ("scale", "bias")}
        for ours, theirs in (("up", "Dense_0"), ("down", "Dense_1")):
            arrays |= {f"{at}/MlpBlock_3/{theirs}/{kind}": block["mlp"][ours][kind] for kind in ("kernel", "bias")}
        attention = f"{at}/MultiHeadDotProductAttention_1"
        for ours, theirs in (("q", "query"), ("k", "key"), ("v", "value")):
            arrays[f"{attention}/{theirs}/kernel"] = block["attention"][ours]["kernel"].reshape(width, heads, -1)
            arrays[f"{attention}/{theirs}/bias"] = block["attention"][ours]["bias"].reshape(heads, -1)
        arrays[f"{attention}/out/kernel"] = block["attention"]["out"]["kernel"].reshape(heads, -1, width)
        arrays[f"{attention}/out/bias"] = block["attention"]["out"]["bias"]
    return {name: np.asarray(array) for name, array in arrays.items()}


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made[2], tmp_path / "model")


@pytest.fixture
def npz(made, tmp_path):
    return shutil.copy(made[2].parent / "model.npz", tmp_path / "model.npz")


def edit(folder, change):
    """Rewrite the weights: `change` works on the dict of tensors in place."""
    tensors = load_file(folder / hf.WEIGHTS)
    change(tensors)
    save_file(tensors, folder / hf.WEIGHTS)


def edit_npz(file, change):
    with np.load(file) as archive:
        arrays = dict(archive)
    change(arrays)
    np.savez(file, **arrays)


def configure(folder, **entries):
    raw = json.loads((folder / hf.CONFIG).read_text()) | entries
    (folder / hf.CONFIG).write_text(json.dumps({key: value for key, value in raw.items() if value is not ...}))


@pytest.mark.parametrize("kind", ["folder", "npz"])
def test_round_trip_is_bit_equal(made, folder, npz, kind):
    module, params, _ = made
    again, same = vit.from_hf(folder if kind == "folder" else npz)
    assert again == (module if kind == "folder" else vit.ViT(CONFIG))
    assert hf.params_hash(same) == hf.params_hash(params)


def test_export_loads_in_transformers(made):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    module, params, folder = made
    model, info = transformers.ViTForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info  # no missing, unexpected or mismatched key
    assert model.config.id2label == dict(enumerate(NAMES))
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    want = model.eval()(torch.tensor(images).permute(0, 3, 1, 2)).logits.detach().numpy()
    np.testing.assert_allclose(module.apply({"params": params}, jnp.asarray(images))[0], want, atol=1e-5, rtol=0)


def test_what_is_accepted_beside_the_model(made, folder):
    pooler = {"vit.pooler.dense.weight": np.ones((24, 24), np.float32), "vit.pooler.dense.bias": np.ones(24, np.float32)}
    edit(folder, lambda t: t.update(pooler))
    configure(folder, image_size=[32, 32], patch_size=[8, 8], hidden_act="gelu_pytorch_tanh", num_channels=...)
    assert hf.params_hash(vit.from_hf(folder)[1]) == hf.params_hash(made[1])
    edit(folder, lambda t: [t.update({name.removeprefix("vit."): t.pop(name)}) for name in list(t)])
    assert hf.params_hash(vit.from_hf(folder)[1]) == hf.params_hash(made[1])


@pytest.mark.parametrize("kind", ["folder", "npz"])
def test_a_new_head_is_asked_for_and_leaves_the_rest(made, folder, npz, kind):
    path = folder if kind == "folder" else npz
    if kind == "npz":  # a file of ImageNet-21k: a layer before the head
        edit_npz(path, lambda a: a.update({"pre_logits/kernel": np.ones((24, 24), np.float32), "pre_logits/bias": np.ones(24, np.float32)}))
        with pytest.raises(UserError, match="pre_logits/bias: found 2 arrays .* accepted: none .pre_logits goes with the stored head"):
            vit.from_hf(path)
    module, params = vit.from_hf(path, classes=3, key=jax.random.key(1))
    assert module.config == CONFIG
    assert jnp.abs(params["head"]["kernel"] - made[1]["head"]["kernel"]).max() > 0.1
    assert hf.params_hash(params | {"head": 0}) == hf.params_hash(made[1] | {"head": 0})
    assert vit.from_hf(path, classes=7, key=jax.random.key(1))[1]["head"]["kernel"].shape == (24, 7)
    with pytest.raises(UserError, match="key: found none for the new head/bias; accepted: a PRNG key"):
        vit.from_hf(path, classes=7)
    if kind == "folder":
        edit(path, lambda t: [t.pop(name) for name in list(t) if name.startswith("classifier")])
    else:
        edit_npz(path, lambda a: [a.pop(name) for name in list(a) if name.startswith("head")])
    assert hf.params_hash(vit.from_hf(path, classes=3, key=jax.random.key(1))[1]) == hf.params_hash(params)
    with pytest.raises(UserError, match=f"{re.escape(str(path))}: classifier: found none; accepted: a model with one, or a new head"):
        vit.from_hf(path)


@pytest.mark.parametrize(("old", "new"), [((4, 4), (7, 7)), ((14, 14), (28, 28)), ((5, 5), (3, 8)), ((4, 4), (2, 8)), ((3, 6), (6, 3))])
def test_positions_are_resized_as_torch_does(old, new):
    torch = pytest.importorskip("torch")
    position = np.random.default_rng(0).normal(size=(1, 1 + old[0] * old[1], 6)).astype(np.float32)
    grid = torch.tensor(position[:, 1:].reshape(1, *old, 6)).permute(0, 3, 1, 2)
    want = torch.nn.functional.interpolate(grid, size=new, mode="bicubic", align_corners=False).permute(0, 2, 3, 1).flatten(1, 2)
    ours = vit_files.resize(position, old, new)
    np.testing.assert_array_equal(ours[:, :1], position[:, :1])
    np.testing.assert_allclose(ours[:, 1:], want.numpy(), atol=3e-6)
    np.testing.assert_allclose(vit_files.resize(np.ones_like(position), old, new), 1, atol=1e-6)


@pytest.mark.parametrize("kind", ["folder", "npz"])
def test_weights_go_straight_into_their_shardings(made, folder, npz, kind):
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 3)

    def place(path):
        return jax.NamedSharding(mesh, next(spec for rule, spec in vit.SHARDING if re.search(rule, path)))

    path = folder if kind == "folder" else npz
    _, params = vit.from_hf(path, image=(40, 24), classes=8, key=jax.random.key(0), place=place)
    whole = flatten_dict(vit.from_hf(path, image=(40, 24), classes=8, key=jax.random.key(0))[1], sep="/")
    for name, leaf in flatten_dict(params, sep="/").items():
        assert leaf.sharding == place(name), name
        np.testing.assert_array_equal(leaf, whole[name])


def test_the_layout_of_vit_b_16():
    """Names and shapes of google-research's ViT-B_16.npz, fine-tuned on 1,000 classes."""
    config = vit.ViTConfig(image=(224, 224), classes=1000, **vit.PRESETS["vit_base"])
    table = dict(vit_files.google_shapes(vit.shapes(vit.ViT(config)), config.heads).values())
    block = {
        "LayerNorm_0/bias": (768,), "LayerNorm_0/scale": (768,), "LayerNorm_2/bias": (768,), "LayerNorm_2/scale": (768,),
        "MlpBlock_3/Dense_0/bias": (3072,), "MlpBlock_3/Dense_0/kernel": (768, 3072),
        "MlpBlock_3/Dense_1/bias": (768,), "MlpBlock_3/Dense_1/kernel": (3072, 768),
        "MultiHeadDotProductAttention_1/key/bias": (12, 64), "MultiHeadDotProductAttention_1/key/kernel": (768, 12, 64),
        "MultiHeadDotProductAttention_1/out/bias": (768,), "MultiHeadDotProductAttention_1/out/kernel": (12, 64, 768),
        "MultiHeadDotProductAttention_1/query/bias": (12, 64), "MultiHeadDotProductAttention_1/query/kernel": (768, 12, 64),
        "MultiHeadDotProductAttention_1/value/bias": (12, 64), "MultiHeadDotProductAttention_1/value/kernel": (768, 12, 64),
    }  # fmt: skip
    want = {f"Transformer/encoderblock_{i}/{name}": shape for i in range(12) for name, shape in block.items()} | {
        "Transformer/encoder_norm/bias": (768,), "Transformer/encoder_norm/scale": (768,),
        "Transformer/posembed_input/pos_embedding": (1, 197, 768), "cls": (1, 1, 768), "embedding/bias": (768,),
        "embedding/kernel": (16, 16, 3, 768), "head/bias": (1000,), "head/kernel": (768, 1000),
    }  # fmt: skip
    assert table == want


W = "vit.encoder.layer.1.intermediate.dense.weight"
FAULTS = {
    "no folder": (shutil.rmtree, ("model", "nothing", "folder")),
    "other model": (lambda f: configure(f, model_type="deit"), ("model_type", "'deit'", "vit")),
    "no size": (lambda f: configure(f, hidden_size=...), ("config.json", "hidden_size")),
    "odd size": (lambda f: configure(f, num_hidden_layers="2"), ("config.json", "num_hidden_layers", "'2'")),
    "odd image": (lambda f: configure(f, image_size=33), ("image", "33", "multiples")),
    "odd patch": (lambda f: configure(f, patch_size=[8, 4]), ("patch", "[8, 4]")),
    "heads": (lambda f: configure(f, num_attention_heads=5), ("heads", "5", "24")),
    "activation": (lambda f: configure(f, hidden_act="swish"), ("activation", "swish", "gelu")),
    "no biases": (lambda f: configure(f, qkv_bias=False), ("qkv_bias", "False", "True")),
    "labels": (lambda f: configure(f, id2label={"0": "a", "1": "b"}), ("id2label", "2 classes", "3")),
    "odd labels": (lambda f: configure(f, id2label=["a", "b"]), ("id2label", "['a', 'b']")),
    "branches": (lambda f: configure(f, branches={}), ("branches", "{}", "jaxdistill_dcal")),
    "no weights": (lambda f: (f / hf.WEIGHTS).unlink(), ("no weights", "model.safetensors")),
    "missing": (lambda f: edit(f, lambda t: t.pop(W)), ("encoder.layer.1.intermediate.dense.weight", "missing")),
    "unexpected": (lambda f: edit(f, lambda t: t.update({"vit.embeddings.mask_token": t[W]})), ("embeddings.mask_token", "unexpected")),
    "shape": (lambda f: edit(f, lambda t: t.update({W: t[W].T.copy()})), ("intermediate.dense.weight", "(24, 40)", "(40, 24)")),
    "integers": (lambda f: edit(f, lambda t: t.update({W: t[W].astype(np.int8)})), ("intermediate.dense.weight", "int8")),
    "normalisation": (lambda f: (f / vit_files.PREPROCESSOR).write_text('{"image_mean": 3}'), ("preprocessor_config.json", "image_mean")),
}
Q = "Transformer/encoderblock_1/MultiHeadDotProductAttention_1/query/kernel"
P = "Transformer/posembed_input/pos_embedding"
NPZ_FAULTS = {
    "absent": (lambda f: f.unlink(), ("model.npz", "not readable")),
    "truncated": (lambda f: f.write_bytes(f.read_bytes()[:200]), ("model.npz", "not readable")),
    "array": (lambda f: (np.save(f"{f}.npy", np.ones(3)), shutil.move(f"{f}.npy", f)), ("model.npz", "not readable")),
    "no array": (lambda f: f.write_bytes(b"{}"), ("model.npz", "not readable")),
    "pickle": (lambda f: edit_npz(f, lambda a: a.update(cls=np.array([{}]))), ("model.npz", "not readable")),
    "other": (lambda f: np.savez(f, a=np.ones(2)), ("embedding/kernel", "nothing")),
    "missing": (lambda f: edit_npz(f, lambda a: a.pop(Q)), (Q, "nothing", "(24, 2, 12)")),
    "shape": (lambda f: edit_npz(f, lambda a: a.update({Q: a[Q].reshape(24, 24)})), (Q, "(24, 24)", "(24, 2, 12)")),
    "integers": (lambda f: edit_npz(f, lambda a: a.update({Q: a[Q].astype(int)})), (Q, "int64")),
    "unexpected": (lambda f: edit_npz(f, lambda a: a.update({"conv_root/kernel": a[Q]})), ("conv_root/kernel", "1 arrays")),
    "no square": (lambda f: edit_npz(f, lambda a: a.update({P: np.ones((1, 9, 24))})), (P, "(1, 9, 24)", "square")),
}  # fmt: skip


@pytest.mark.parametrize("fault", [*FAULTS, *(f"npz {name}" for name in NPZ_FAULTS)])
def test_what_is_wrong_is_one_line_that_names_it(folder, npz, fault):
    change, words = NPZ_FAULTS[fault[4:]] if fault.startswith("npz") else FAULTS[fault]
    path = npz if fault.startswith("npz") else folder
    change(path)
    with pytest.raises(UserError) as error:
        vit.from_hf(path)
    message = str(error.value)
    assert "\n" not in message
    for word in (*words, "accepted"):
        assert word in message, message


def test_export_refuses_what_is_not_the_models(made, tmp_path):
    module, params, _ = made
    with pytest.raises(UserError, match="hidden_size"):
        vit.to_hf(module, params, tmp_path, hidden_size=8)
    with pytest.raises(UserError, match="ln_f/bias.*missing"):
        vit.to_hf(module, params | {"ln_f": {"scale": params["ln_f"]["scale"]}}, tmp_path)
    with pytest.raises(UserError, match="names: found 2 names of classes, 1 of them unlike; accepted: 3"):
        vit.to_hf(module, params, tmp_path, names=("a", "a"))
    assert not list(tmp_path.iterdir())
