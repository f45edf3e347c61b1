"""Hugging Face folders: every way in which one can be wrong is one line, and what is accepted is read exactly."""

import fnmatch
import functools
import json
import os
import pickle
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.numpy import load_file, save_file

from jaxdistill import UserError
from jaxdistill.models import causal, from_hf, gpt2, hf

CONFIG = gpt2.GPT2Config(vocab=23, length=8, width=16, depth=2, heads=2)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small model and its folder; tests change copies of the folder only."""
    module = gpt2.GPT2(CONFIG)
    params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    folder = tmp_path_factory.mktemp("made") / "model"
    gpt2.to_hf(module, params, folder)
    return module, params, folder


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made[2], tmp_path / "model")


def edit(folder, change):
    """Rewrite the weights: `change` works on the dict of tensors in place."""
    tensors = load_file(folder / hf.WEIGHTS)
    change(tensors)
    save_file(tensors, folder / hf.WEIGHTS)


def configure(folder, **entries):
    raw = json.loads((folder / hf.CONFIG).read_text()) | entries
    (folder / hf.CONFIG).write_text(json.dumps({key: value for key, value in raw.items() if value is not ...}))


def shard(folder, split=3):
    """Cut model.safetensors in two with an index, and return the index's weight_map."""
    tensors = load_file(folder / hf.WEIGHTS)
    files = {name: f"model-0000{1 + (i >= split)}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, folder / file)
    (folder / hf.WEIGHTS).unlink()
    (folder / hf.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return files


def index(folder, **entries):
    (folder / hf.INDEX).write_text(json.dumps({"weight_map": shard(folder) | entries}))


def bare(folder):
    tensors = load_file(folder / hf.WEIGHTS)
    save_file({name.removeprefix("transformer."): x for name, x in tensors.items()}, folder / hf.WEIGHTS)


def old_buffers(tensors):
    tensors["transformer.h.0.attn.bias"] = np.tril(np.ones((1, 1, 8, 8), np.float32))
    tensors["transformer.h.1.attn.masked_bias"] = np.array(-1e4, np.float32)
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].copy()


@pytest.mark.parametrize(
    "change", [lambda f: None, shard, bare, lambda f: edit(f, old_buffers)], ids=["one file", "shards", "no prefix", "old file"]
)
def test_what_is_accepted_reads_bit_equal(made, folder, change):
    change(folder)
    module, params = from_hf(folder)
    assert module == made[0]
    assert hf.params_hash(params) == hf.params_hash(made[1])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_on_disk_becomes_float32(made, folder, dtype):
    edit(folder, lambda tensors: tensors.update({name: x.astype(jnp.dtype(dtype)) for name, x in tensors.items()}))
    params = from_hf(folder)[1]
    jax.tree.map(lambda got, want: np.testing.assert_array_equal(got, want.astype(dtype).astype(jnp.float32)), params, made[1])
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}


def truncate(folder):
    (folder / hf.WEIGHTS).write_bytes((folder / hf.WEIGHTS).read_bytes()[:-5])


W = "transformer.h.1.mlp.c_fc.weight"
FAULTS = {
    "no folder": (shutil.rmtree, ("model", "nothing", "folder")),
    "no config": (lambda f: (f / hf.CONFIG).unlink(), ("config.json", "not found")),
    "corrupt json": (lambda f: (f / hf.CONFIG).write_text('{"model_type": '), ("config.json", "JSON")),
    "binary json": (lambda f: (f / hf.CONFIG).write_bytes(b"\xff\xfe\x00"), ("config.json", "JSON")),
    "json list": (lambda f: (f / hf.CONFIG).write_text("[]"), ("config.json", "list", "object")),
    "other model": (lambda f: configure(f, model_type="mamba"), ("model_type", "mamba", "gpt2")),
    "odd model": (lambda f: configure(f, model_type=["gpt2"]), ("model_type", "['gpt2']")),
    "no size": (lambda f: configure(f, n_layer=...), ("config.json", "n_layer")),
    "odd size": (lambda f: configure(f, n_layer="2"), ("config.json", "n_layer", "'2'")),
    "heads": (lambda f: configure(f, n_head=3), ("config.json", "heads", "3", "16")),
    "activation": (lambda f: configure(f, activation_function="swish"), ("activation", "swish", "gelu_new")),
    "untied": (lambda f: configure(f, tie_word_embeddings=False), ("tie_word_embeddings", "False", "True")),
    "scaling": (lambda f: configure(f, scale_attn_by_inverse_layer_idx=True), ("scale_attn_by_inverse_layer_idx", "True")),
    "no weights": (lambda f: (f / hf.WEIGHTS).unlink(), ("no weights", "model.safetensors")),
    "pickle only": (lambda f: (f / hf.WEIGHTS).rename(f / "pytorch_model.bin"), ("pytorch_model.bin", "pickle", "safetensors")),
    "pickle inside": (lambda f: (f / hf.WEIGHTS).write_bytes(pickle.dumps({"a": 1})), ("model.safetensors", "not a readable")),
    "truncated": (truncate, ("model.safetensors", "not a readable")),
    "empty": (lambda f: (f / hf.WEIGHTS).write_bytes(b""), ("model.safetensors", "not a readable")),
    "missing": (lambda f: edit(f, lambda t: t.pop(W)), ("h.1.mlp.c_fc.weight", "missing")),
    "unexpected": (lambda f: edit(f, lambda t: t.update({"h.2.ln_1.bias": t[W]})), ("h.2.ln_1.bias", "unexpected")),
    "twice": (lambda f: edit(f, lambda t: t.update({"h.1.mlp.c_fc.weight": t[W]})), ("h.1.mlp.c_fc.weight", "with and without")),
    "transposed": (lambda f: edit(f, lambda t: t.update({W: t[W].T.copy()})), ("h.1.mlp.c_fc.weight", "(64, 16)", "(16, 64)")),
    "integers": (lambda f: edit(f, lambda t: t.update({W: t[W].astype(np.int8)})), ("h.1.mlp.c_fc.weight", "int8", "bfloat16")),
    "other head": (lambda f: edit(f, lambda t: t.update({"lm_head.weight": np.ones((23, 16), np.float32)})), ("lm_head.weight",)),
    "lost shard": (lambda f: (shard(f), (f / "model-00002-of-00002.safetensors").unlink()), ("model-00002", "not found")),
    "index lies": (lambda f: index(f, absent="model-00001-of-00002.safetensors"), ("absent", "nowhere", "index.json")),
    "index escapes": (lambda f: index(f, absent="../model.safetensors"), ("absent", "../model.safetensors")),
    "index empty": (lambda f: (shard(f), (f / hf.INDEX).write_text("{}")), ("weight_map", "index.json")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_one_line_that_names_it(folder, fault):
    change, words = FAULTS[fault]
    change(folder)
    with pytest.raises(UserError) as error:
        from_hf(folder)
    message = str(error.value)
    assert "\n" not in message
    for word in (*words, "accepted"):
        assert word in message, message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"heads": 5}, ("heads", "5", "32")),
        ({"heads": 0}, ("heads", "0")),
        ({"inner": -1}, ("inner", "-1")),
        ({"eps": 0.0}, ("eps", "0.0")),
        ({"activation": "swish"}, ("activation", "swish", "gelu_new")),
    ],
)
def test_config_refuses_what_is_not_supported(change, words):
    fields = {"vocab": 61, "length": 16, "width": 32, "depth": 2, "heads": 4} | change
    with pytest.raises(UserError) as error:
        gpt2.GPT2Config(**fields)
    assert all(word in str(error.value) for word in (*words, "accepted"))


def test_export_refuses_other_parameters_and_entries_of_its_own(made, tmp_path):
    module, params, _ = made
    with pytest.raises(UserError, match="n_embd"):
        gpt2.to_hf(module, params, tmp_path, n_embd=8)
    with pytest.raises(UserError, match="ln_f/bias.*missing"):
        gpt2.to_hf(module, params | {"ln_f": {"scale": params["ln_f"]["scale"]}}, tmp_path)
    with pytest.raises(UserError, match="projector/kernel.*unexpected"):
        gpt2.to_hf(module, params | {"projector": {"kernel": jnp.ones((2, 2))}}, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        gpt2.to_hf(module, params, tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_export_replaces_a_folder_and_leaves_no_temporary_file(made, folder):
    module, params, _ = made
    gpt2.to_hf(module, jax.tree.map(lambda x: 2 * x, params), folder)
    assert sorted(path.name for path in folder.iterdir()) == [hf.CONFIG, hf.WEIGHTS]
    np.testing.assert_array_equal(from_hf(folder)[1]["wte"]["embedding"], 2 * params["wte"]["embedding"])


def test_folder_hash_is_of_the_bytes_and_not_of_the_place(made, folder):
    want = hf.folder_hash(made[2])
    (folder / "tokenizer.json").write_text("{}")
    assert hf.folder_hash(folder) == want
    configure(folder, eos_token_id=3)
    assert hf.folder_hash(folder) != want
    shutil.rmtree(folder)
    with pytest.raises(UserError):
        hf.folder_hash(folder)


class TestFolderHashIsTakenOnce:
    """And is never that of files as they were."""

    @pytest.fixture
    def reads(self, monkeypatch):
        """One entry each time that the files of a folder are read; files count as settled at once."""
        seen, hash_of = [], hf._files_hash.__wrapped__
        monkeypatch.setattr(hf, "_files_hash", functools.lru_cache(lambda state: seen.append(state) or hash_of(state)))
        monkeypatch.setattr(hf, "SETTLED", -(10**18))
        return seen

    def test_whatever_the_folder_is_called(self, folder, reads, monkeypatch):
        monkeypatch.chdir(folder.parent)
        assert hf.folder_hash(folder) == hf.folder_hash(str(folder)) == hf.folder_hash(folder.name)
        assert len(reads) == 1

    @pytest.mark.parametrize("later", [1, 0], ids=["a new time", "the old time, as cp -p leaves it"])
    def test_other_bytes_of_the_same_size(self, later, folder, reads):
        want, weights = hf.folder_hash(folder), folder / hf.WEIGHTS
        raw, stat = weights.read_bytes(), weights.stat()
        time.sleep(0.02)  # longer than a tick of the file system's clock
        weights.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
        os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns + later))
        assert hf.folder_hash(folder) != want
        weights.write_bytes(raw)
        assert hf.folder_hash(folder) == want

    def test_what_was_written_just_now_is_read_again(self, folder, reads, monkeypatch):
        monkeypatch.setattr(hf, "SETTLED", 10**18)
        assert hf.folder_hash(folder) == hf.folder_hash(folder)
        assert len(reads) == 2


def test_params_hash_sees_values_names_and_dtypes(made):
    params = made[1]
    want = hf.params_hash(params)
    assert hf.params_hash(jax.tree.map(np.asarray, params)) == want
    others = (
        params | {"extra": jnp.zeros(1)},
        params | {"wpe": {"embedding": params["wpe"]["embedding"].at[0, 0].add(1e-6)}},
        jax.tree.map(lambda x: x.astype(jnp.bfloat16), params),
    )
    assert len({want, *map(hf.params_hash, others)}) == 4


class TestHub:
    """A name that is no local path is looked for on the hub."""

    @pytest.fixture
    def calls(self, made, tmp_path, monkeypatch):
        """The calls of snapshot_download on a hub that answers, and has `tiny` and `words`, a tokenizer alone."""
        (tmp_path / "words").mkdir()
        models, calls = {"tiny": made[2], "words": tmp_path / "words"}, []

        def snapshot_download(name, *, allow_patterns, local_files_only):
            calls.append((name, local_files_only, allow_patterns))
            if local_files_only:
                raise LocalEntryNotFoundError("not in the cache")
            if name not in models:
                raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)
            return str(models[name])

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setattr("jaxdistill.hub._reachable", lambda endpoint: True)
        return calls

    def test_it_is_fetched_without_pickles_or_code(self, made, calls):
        found = causal.describe(causal.ModelConfig(path="tiny"), "student", vocab=23, length=8)
        assert (found.width, found.facts["weights"]) == (16, hf.folder_hash(made[2]))
        assert [call[:2] for call in calls] == [("tiny", True), ("tiny", False)]
        unsafe = ("pytorch_model.bin", "model.pt", "flax_model.msgpack", "modeling.py", "training_args.bin")
        assert not any(fnmatch.fnmatch(file, pattern) for file in unsafe for pattern in calls[1][2])

    @pytest.mark.parametrize(("name", "offline", "said"), [
        ("org/none", "0", "it has no such model"), ("words", "0", "it has no whole config.json and safetensors of that name"),
        ("tiny", "1", r"not downloaded, and https://\S+ is out of reach \(offline\)"),
    ])
    def test_what_is_not_there_is_one_line_that_names_the_key(self, calls, name, offline, said, monkeypatch):
        monkeypatch.setenv("HF_HUB_OFFLINE", offline)
        with pytest.raises(UserError, match=f"^config key student.path: found '{name}', no local folder, and of the hub: {said}.*; acc"):
            causal.describe(causal.ModelConfig(path=name), "student", vocab=23, length=8)

    @pytest.mark.parametrize("path", ["/no/such", "./none", "../none", "a/b/c", "~/none"])
    def test_what_can_be_no_name_is_left_as_it_is(self, calls, path):
        assert hf.fetched(path, "student.path") == path
        assert not calls
