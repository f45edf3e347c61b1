"""A config section becomes a classifier, from sizes or from disk, and what it saves is read back."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from jaxdistill import UserError
from jaxdistill.models import classifier, hf, vit
from jaxdistill.models.dcal import PLAIN, Branches

SECTION = classifier.ModelConfig(width=24, depth=1, heads=2)
DATA = dict(image=(16, 24), channels=3, classes=("cat", "dog", "eel"))
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 16, 24, 3)).astype(np.uint8)


def describe(section=SECTION, branches=None, **data):
    return classifier.describe(section, "student", branches=branches, **DATA | data)


def stored(folder, **change):
    return dataclasses.replace(classifier.ModelConfig(path=str(folder), head="stored"), **change)


@pytest.mark.parametrize("branches", [None, Branches(glca=False), Branches(glca=False, pwca="own"), Branches(attach=1, pwca="own")])
def test_save_and_describe(branches, tmp_path):
    found = describe(branches=branches)
    params = found.init(jax.random.key(0))
    assert found.module.branches == (branches or PLAIN)
    assert found.parameters == sum(leaf.size for leaf in jax.tree.leaves(params))
    found.save(params, tmp_path)
    own = branches is not None and (branches.glca or branches.pwca == "own")
    assert hf.read_config(tmp_path)["model_type"] == ("jaxdistill_dcal" if own else "vit")
    again = describe(stored(tmp_path))
    assert again.module.vit == dataclasses.replace(found.module.vit, inner=96)
    assert again.module.branches == (branches if own else PLAIN)
    assert hf.params_hash(again.load()) == hf.params_hash(params)
    assert hf.params_hash(again.init(jax.random.key(5))) == hf.params_hash(params)
    facts = json.loads(json.dumps(again.facts))
    assert facts["weights"] == hf.folder_hash(tmp_path)
    assert facts["branches"]["glca"] == again.module.branches.glca
    if not own:
        module, same = vit.from_hf(tmp_path)
        assert hf.params_hash(same) == hf.params_hash(params["vit"])
        assert module.config == again.module.vit


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A plain ViT on disk, with a normalisation of its own."""
    folder = tmp_path_factory.mktemp("plain")
    found = describe(dataclasses.replace(SECTION, mean=(0.4, 0.5, 0.6), std=(0.2,)))
    found.save(found.init(jax.random.key(0)), folder)
    return folder


def test_normalisation_is_the_folders_unless_the_section_has_one(plain):
    mean, std = np.array([0.4, 0.5, 0.6]), 0.2
    np.testing.assert_allclose(describe(stored(plain)).normalise(jnp.asarray(IMAGES)), (IMAGES / 255 - mean) / std, atol=1e-5)
    ours = describe(stored(plain, mean=(0.0,), std=(1.0, 1.0, 1.0))).normalise(jnp.asarray(IMAGES))
    np.testing.assert_allclose(ours, IMAGES / 255, atol=1e-6)
    assert ours.dtype == jnp.float32
    assert describe().mean == describe().std == (0.5, 0.5, 0.5)
    transformers = pytest.importorskip("transformers")
    read = transformers.ViTImageProcessorPil.from_pretrained(plain)
    assert (read.image_mean, read.image_std) == ((0.4, 0.5, 0.6), (0.2, 0.2, 0.2))


def test_a_plain_vit_is_given_branches_and_a_new_head(plain):
    params = describe(stored(plain)).load()["vit"]
    found = describe(stored(plain), branches=Branches())
    ours = found.init(jax.random.key(1))
    assert hf.params_hash(ours["vit"]) == hf.params_hash(params)
    fresh = describe(branches=Branches()).init(jax.random.key(1))
    assert all(hf.params_hash(ours[part]) == hf.params_hash(fresh[part]) for part in ("glca_block", "glca_ln_f", "glca_head"))
    with pytest.raises(UserError, match="key: found none for the new glca_block"):
        found.load()
    other = describe(stored(plain, head="new"), classes=("a", "b"), image=(32, 16)).init(jax.random.key(1))["vit"]
    assert other["head"]["kernel"].shape == (24, 2)
    assert other["embed"]["position"].shape == (1, 9, 24)
    assert hf.params_hash(other["block_0"]) == hf.params_hash(params["block_0"])


def test_a_new_head_of_a_model_with_branches_is_new_in_all_streams(tmp_path):
    found = describe(branches=Branches(pwca="own"))
    params = found.init(jax.random.key(0))
    found.save(params, tmp_path)
    ours = describe(stored(tmp_path, head="new"), classes=("a", "b")).init(jax.random.key(1))
    heads = [ours["vit"]["head"], ours["glca_head"], ours["pwca_head"]]
    assert all(one["kernel"].shape == (24, 2) for one in heads)
    assert hf.params_hash(ours["glca_block"]) == hf.params_hash(params["glca_block"])
    with pytest.raises(UserError, match="config key student.path: found a model with its own glca; accepted: as the branches asked for"):
        describe(stored(tmp_path), branches=PLAIN)


def test_rules_hold_for_every_parameter():
    found = describe(branches=Branches(pwca="own"))
    params = flatten_dict(vit._abstract(found.module), sep="/")
    for path in params:
        assert sum(bool(re.search(rule, path)) for rule, _ in found.sharding) == 1, path
    undecayed = {path for path in params if not re.search(found.decay, path)}
    assert undecayed == {path for path in params if re.search(r"(bias|scale|cls|position)$", path)}


@pytest.mark.parametrize(("change", "data", "said"), [
    ({"dtype": "float8"}, {}, "config key student.dtype: found 'float8'; accepted: float32, bfloat16"),
    ({"preset": "huge"}, {}, "config key student.preset: found 'huge'; accepted: tiny, deit_tiny"),
    ({"head": "old"}, {}, "config key student.head: found 'old'; accepted: new, stored"),
    ({"head": "stored"}, {}, "config key student.head: found 'stored' without student.path; accepted: 'new'"),
    ({"heads": 5}, {}, "config key student.heads: found 5; accepted: a divisor of width (24)"),
    ({"depth": -1}, {}, "config key student.depth: found -1"),
    ({"patch": 7}, {}, "config key student.image: found (16, 24); accepted: (rows, columns), multiples of the patch of 7"),
    ({"drop_path": 1.5}, {}, "config key student.drop_path: found 1.5"),
    ({"mean": (0.5, 0.5)}, {}, "config key student.mean: found (0.5, 0.5); accepted: 1 or 3 numbers"),
    ({"std": (0.0,)}, {}, "config key student.std: found (0.0,); accepted: 1 or 3 numbers, above 0"),
    ({}, {"branches": Branches(attach=3)}, "config key student.attach: found 3; accepted: at most the depth (1)"),
])  # fmt: skip
def test_a_section_that_is_no_model_is_one_line(change, data, said):
    with pytest.raises(UserError, match=re.escape(said)):
        describe(dataclasses.replace(SECTION, **change), **data)


@pytest.mark.parametrize(("change", "data", "said"), [
    ({"width": 32}, {}, "config key student.width: found 32; accepted: 0, or the 24 of"),
    ({}, {"channels": 1}, "config key student.path: found a model of 3 channels in"),
    ({}, {"classes": ("cat", "dog")}, "config key student.path: found 3 classes in"),
    ({}, {"classes": ("cat", "eel", "dog")}, "config key student.path: found 'dog' as class 1 of"),
    ({}, {"image": (20, 24)}, "config key student.path: image: found (20, 24)"),
])  # fmt: skip
def test_a_folder_that_does_not_fit_is_one_line(plain, change, data, said):
    with pytest.raises(UserError, match=re.escape(said)):
        describe(stored(plain, **change), **data)


def test_folders_of_ours_that_are_broken(tmp_path):
    found = describe(branches=Branches())
    found.save(found.init(jax.random.key(0)), tmp_path)
    raw = hf.read_config(tmp_path)
    (tmp_path / hf.CONFIG).write_text(json.dumps(raw | {"branches": {"glca": True, "more": 1}}))
    with pytest.raises(UserError, match="config.json: branches: .*more.*; accepted: what save writes"):
        describe(stored(tmp_path))
    (tmp_path / hf.CONFIG).write_text(json.dumps(raw | {"id2label": None}))
    assert describe(stored(tmp_path), classes=("x", "y", "z")).module.branches == Branches()  # no names: only their number counts
