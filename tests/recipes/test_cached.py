"""A teacher that was stored: training from it is training beside it, in every format, and what it was not made for is one line."""

import json
import shutil
import types
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxdistill
from jaxdistill.data import text, tokenizer
from jaxdistill.data.teacher_cache import Cache, Options
from jaxdistill.recipe import Schedule
from jaxdistill.recipes.cached import Cached
from jaxdistill.training import loop, teach
from jaxdistill.training.metrics import record
from tests.recipes.conftest import ON, TEXT, build, config, ready, refusal, teacher

KINDS = {
    "float32": Options(dtype="float32"), "bfloat16": Options(), "all": Options("topk", "float32", k=10_000), "few": Options("topk", k=8),
    "drawn": Options("sampled", samples=12, draws=3, seed=7),
}


@pytest.fixture(scope="module")
def caches(job, tmp_path_factory) -> dict[str, Path]:
    """Kind -> its folder: of one teacher, in every format."""
    root = tmp_path_factory.mktemp("caches")
    for kind, options in KINDS.items():
        teach.run(config(job), root / kind, options, say=lambda line: None)
    return {kind: root / kind for kind in KINDS}


def lines(one, updates: int = 3) -> list[dict]:
    """The first updates' records, and the parameters after them under "params"."""
    data, state, found = one.built.recipe.data("train", 0), one.state, []
    batch = one.place(next(data))
    step = one.step.lower(state, one.frozen, batch).compile()
    for number in range(1, updates + 1):
        state, metrics = step(state, one.frozen, batch)
        found.append(record(number, jax.device_get(metrics)))
        batch = one.place(next(data))
    return [*found, {"params": jax.device_get(state.params)}]


def kd_of(found: list[dict]) -> list[float]:
    return [line["terms"]["kd"]["raw"] for line in found[:-1]]


@pytest.fixture(scope="module")
def online(job) -> list[dict]:
    return lines(ready(job))


class TestEqualToOnline:
    def test_float32_states_train_the_same_bits(self, job, caches, tmp_path):
        """A whole run: every line, the exported student, and what is measured."""
        rows, exported = {}, {}
        for name, cache in (("online", ""), ("cached", str(caches["float32"]))):
            chosen = config(job)
            chosen.teacher.cache = cache
            rows[name] = loop.run(chosen, tmp_path / name, quiet=True)["rows"][0]
            exported[name] = load_file(tmp_path / name / "runs/kd-0/export/model.safetensors")
            rows[name].pop("seconds")
            rows[name]["lines"] = [json.loads(line) for line in (tmp_path / name / "runs/kd-0/metrics.jsonl").read_text().splitlines()]
        assert rows["cached"] == rows["online"]
        for name, tensor in exported["online"].items():
            assert exported["cached"][name].tobytes() == tensor.tobytes(), name
        facts = json.loads((tmp_path / "cached/runs/kd-0/manifest.json").read_text())["facts"]
        assert facts["teacher"] == {"cache": Cache(caches["float32"]).digest}

    @pytest.mark.usefixtures("optimised")
    def test_also_as_users_compile_it(self, job, tmp_path):
        """The teacher's program too: compiled otherwise, its last bits are others."""
        teach.run(config(job), tmp_path, KINDS["float32"], say=lambda line: None)
        beside, read = (lines(ready(job, teacher=dict(cache=cache))) for cache in ("", str(tmp_path)))
        assert [line["loss"] for line in read[:-1]] == [line["loss"] for line in beside[:-1]]
        jax.tree.map(np.testing.assert_array_equal, read[-1]["params"], beside[-1]["params"])

    def test_bfloat16_states_are_theirs_rounded(self, job, caches, online):
        exact, rounded = (Cache(caches[kind]).rows("train", np.arange(5), np.zeros(5, int))["cached_states"]
                          for kind in ("float32", "bfloat16"))
        assert np.array_equal(exact.astype(ml_dtypes.bfloat16), rounded)
        found = kd_of(lines(ready(job, teacher=dict(cache=str(caches["bfloat16"])))))
        assert found != kd_of(online)
        np.testing.assert_allclose(found, kd_of(online), rtol=2**-8)

    @pytest.mark.parametrize("mode", ["alm", "projector"])
    def test_a_teacher_of_another_tokenizer_is_read_on_its_own_tokens(self, mode, job, other, tmp_path):
        kd = dict(mode=mode, temperature=((0.0, 1.0),))
        chosen = config(job)
        chosen.update(dict(kd=kd, teacher=dict(path=str(other))))
        teach.run(chosen, tmp_path / "cache", KINDS["float32"], say=lambda line: None)
        changes = (dict(path=str(other)), dict(path="", cache=str(tmp_path / "cache")))  # which needs no file of the teacher's
        beside, read = (lines(ready(job, kd=kd, teacher=change), 1) for change in changes)
        assert read[0]["loss"] == beside[0]["loss"]
        assert read[0]["terms"] == beside[0]["terms"]

    def test_a_mesh_of_eight_reads_the_same(self, job, caches, online):
        cut = lines(ready(job, mesh=(4, 2, 1), teacher=dict(cache=str(caches["float32"]))), 1)
        assert cut[0]["loss"] == pytest.approx(online[0]["loss"], rel=1e-6)


class TestTopK:
    def test_all_ids_are_the_full_divergence(self, job, caches, online):
        found = lines(ready(job, teacher=dict(cache=str(caches["all"]))))
        np.testing.assert_allclose(kd_of(found), kd_of(online), rtol=1e-6)
        assert [line["loss"] for line in found[:-1]] == pytest.approx([line["loss"] for line in online[:-1]], rel=1e-6)

    def test_few_ids_are_at_most_the_full_divergence(self, job, caches, online):
        found = kd_of(lines(ready(job, teacher=dict(cache=str(caches["few"])))))
        assert 0.1 * kd_of(online)[0] < found[0] < kd_of(online)[0]

    def test_they_are_the_likeliest_with_all_that_is_left_in_the_tail(self, job, caches):
        cache = Cache(caches["few"])
        found = {name.removeprefix("cached_"): array for name, array in cache.rows("train", np.arange(4), np.zeros(4, int)).items()}
        states = Cache(caches["float32"]).rows("train", np.arange(4), np.zeros(4, int))["cached_states"]
        logits = states.astype(np.float64) @ cache.constants()["head"].T
        order = np.argsort(-logits, axis=-1)[..., :8]
        there = np.any(states != 0, axis=-1)  # not padding, whose logits are all alike
        assert found["ids"].dtype == np.uint16
        assert np.array_equal(found["ids"][there], order[there])
        z = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
        kept = np.take_along_axis(z, order, axis=-1)
        np.testing.assert_allclose(found["logits"][there], kept[there], rtol=2**-10)
        scaled = np.exp(z / 2)  # the config's temperature
        tail = scaled.sum(-1) - np.take_along_axis(scaled, order, axis=-1).sum(-1)
        np.testing.assert_allclose(found["tails"][there][:, 0], np.log(tail)[there], atol=2e-5)


class TestSampled:
    def test_draws_are_a_function_of_seed_row_and_number(self, job, caches, tmp_path):
        other = config(job)
        other.train.batch = 4  # other batches, other shards
        teach.run(other, tmp_path / "same", KINDS["drawn"], say=lambda line: None)
        teach.run(config(job), tmp_path / "unlike", Options("sampled", samples=12, draws=3, seed=8), say=lambda line: None)
        index, there = np.arange(6), np.repeat(np.arange(3), 2)
        kept, same, unlike = (Cache(folder).rows("train", index, there)["cached_ids"]
                              for folder in (caches["drawn"], tmp_path / "same", tmp_path / "unlike"))
        assert np.array_equal(kept, same)
        assert np.mean(kept == unlike) < 0.9

    def test_epochs_take_the_draws_in_turn(self, job, caches):
        recipe = ready(job, teacher=dict(cache=str(caches["drawn"])), dry=True).built.recipe
        data, rows = recipe.data("train", 0), {}
        n = json.loads((caches["drawn"] / "manifest.json").read_text())["made"]["data"]["splits"]["train"]["rows"]
        for _ in range(-(-4 * n // 8)):
            batch = next(data)
            for i, tokens in enumerate(batch["tokens"]):
                rows.setdefault(tokens.tobytes(), []).append(batch["cached_ids"][i])
        first = next(seen for seen in rows.values() if len(seen) >= 4)
        assert not np.array_equal(first[0], first[1])
        assert not np.array_equal(first[1], first[2])
        assert np.array_equal(first[0], first[3])
        position = data.get_state()
        after = next(data)
        data.set_state(position)
        assert np.array_equal(next(data)["cached_ids"], after["cached_ids"])

    def test_their_mean_is_the_teachers_distribution(self, job, caches, tmp_path):
        """Of 1,200 draws of each token at the temperature of kd: no id is further from it than chance allows."""
        teach.run(config(job), tmp_path, Options("sampled", samples=12, draws=100), say=lambda line: None)
        cache = Cache(tmp_path)
        states = Cache(caches["float32"]).rows("train", np.zeros(1, int), np.zeros(1, int))["cached_states"][0]
        logits = states.astype(np.float64) @ cache.constants()["head"].T / 2  # the config's temperature
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        ids = np.stack([cache.rows("train", np.zeros(1, int), np.full(1, e))["cached_ids"][0] for e in range(100)], axis=1)
        found = np.stack([np.bincount(row.ravel(), minlength=p.shape[1]) for row in ids]) / 1200
        there = np.any(states != 0, axis=-1)
        z = (found - p)[there] / np.sqrt(p * (1 - p) / 1200)[there]
        likely = p[there] > 0.01
        assert np.abs(z[likely]).max() < 5
        assert 0.8 < np.std(z[likely]) < 1.2

    def test_it_trains(self, job, caches, online):
        found = lines(ready(job, teacher=dict(cache=str(caches["drawn"]))))
        assert all(np.isfinite(kd_of(found)))
        assert [line["terms"]["lm"]["raw"] for line in found[:1]] == [line["terms"]["lm"]["raw"] for line in online[:1]]


def test_the_tail_is_that_of_kds_temperature_and_drawn_ids_keep_their_weights():
    def read(temperature, **arrays):
        cache = types.SimpleNamespace(made={"options": {"temperatures": [1.0, 2.0], "samples": 2}})
        given = {f"cached_{name}": np.asarray(array, np.float32)[None, None] for name, array in arrays.items()}
        return Cached(None, cache, True, Schedule(((0.0, temperature),))).outputs({}, given)[1]

    for at, temperature in enumerate((1.0, 2.0)):
        assert read(temperature, ids=[3, 4], logits=[-1, -2], tails=[-5, -7]).log_tail.tolist() == [[(-5.0, -7.0)[at]]]
    assert read(1.0, ids=[3, 4], weights=[0.25, 0.5]).weights.tolist() == [[[0.25, 0.5]]]
    assert read(1.0, ids=[3, 4]).weights.tolist() == [[[0.5, 0.5]]]


def test_several_caches_are_their_mixture(job, caches, tmp_path):
    """Two teachers, one cache each; and what has no mean is refused."""
    second = str(tmp_path / "second")
    teacher(tmp_path / "second", tokenizer.load(str(job / "teacher")), length=16, width=24, heads=4, depth=1)
    chosen = config(job)
    chosen.teacher.path = second
    teach.run(chosen, tmp_path / "cache", KINDS["float32"], say=lambda line: None)
    paths, stored = (str(job / "teacher"), second), (str(caches["float32"]), str(tmp_path / "cache"))
    weights = dict(teacher_weights=(0.3, 0.7))
    beside, read = (lines(ready(job, teacher=change, kd=weights), 1) for change in (dict(path=paths), dict(path=paths, cache=stored)))
    assert read[0]["loss"] == beside[0]["loss"]
    for path, cache, said in ((paths[::-1], stored, "found teacher.weights"), (second, stored, "found 2 folder"),
                              ((), (stored[0], str(caches["few"])), "of format topk among several")):
        with pytest.raises(jaxdistill.UserError, match=said):
            build(job, teacher=dict(path=path, cache=cache))


def test_the_teachers_body_is_not_in_memory(job, caches):
    frozen = ready(job, teacher=dict(cache=str(caches["few"]), path="")).frozen
    assert jax.tree.map(lambda x: x.shape, frozen["teacher"]) == {"wte": {"embedding": (300, 16)}}


def test_what_is_measured_is_measured_exactly_whatever_trains(job, caches):
    """Validation and test hold states in every format."""
    for kind in KINDS:
        assert set(Cache(caches[kind]).fields("validation")) == {"states"}


CANNOT = {  # kind, change, what is said
    "blocks": ("float32", dict(hidden=ON), "hidden.weight: found a weight with teacher.cache"),
    "routed blocks": ("float32", dict(router=ON), "router.weight: found a weight"),
    "attention rows": ("float32", dict(attention=ON), "attention.weight: found a weight"),
    "states, of topk": ("few", dict(contrastive=ON), "contrastive.weight: found a weight"),
    "spans, of topk": ("few", dict(kd=dict(mode="alm")), "kd.mode: found 'alm'"),
    "spans, of one that has no rows for them": ("float32", dict(kd=dict(mode="alm")), "found packing.train.teacher_length 0"),
    "another divergence, of draws": ("drawn", dict(kd=dict(kind="reverse_kl")), "kd.kind: found 'reverse_kl'"),
    "another temperature, of topk": ("few", dict(kd=dict(temperature=((0.0, 1.0),))), "kd.temperature: found 1.0"),
    "a moving temperature, of draws": ("drawn", dict(kd=dict(temperature=((0.0, 2.0), (1.0, 1.0)))), "kd.temperature: found (2.0, 1.0)"),
    "what the student writes": (
        "float32", dict(on_policy=dict(fraction=((0.0, 0.5),), prompt=4)), "on_policy.fraction: found ((0.0, 0.5),) with a teacher"),
    "another packing": ("float32", dict(data=dict(length=8)), "found packing.train.length 16"),
    "another dtype of the computation": ("float32", dict(teacher=dict(dtype="bfloat16")), "teacher.dtype: found 'bfloat16' with teacher"),
    "fewer rows": ("float32", dict(data=dict(train_tokens=100)), "found data.splits.train.documents"),
    "fewer rows to measure on": ("float32", dict(data=dict(eval_tokens=50)), "found data.splits.validation.documents"),
    "another split, hence another tokenizer": ("float32", dict(data=dict(validation=0.3)), "found tokenizer"),
}


@pytest.mark.parametrize("name", CANNOT)
def test_what_it_cannot_serve_is_one_line(name, job, caches, tmp_path, capsys):
    kind, changes, said = CANNOT[name]
    chosen = config(job)
    chosen.update(changes)
    chosen.teacher.cache = str(caches[kind])
    assert said in refusal(lambda: loop.run(chosen, tmp_path / "w", quiet=True), capsys)
    assert not list((tmp_path / "w").rglob("identity.json"))  # before anything trained


def test_another_teacher_is_one_line(job, caches, tmp_path, capsys):
    corpus = text.load(text.TextConfig(**TEXT | dict(path=str(job / "text"))))
    teacher(tmp_path / "teacher", corpus.tokenizer, length=16, depth=1)
    chosen = config(job)
    chosen.teacher.update(dict(path=str(tmp_path / "teacher"), cache=str(caches["float32"])))
    assert "found teacher.weights" in refusal(lambda: loop.run(chosen, tmp_path / "w", quiet=True), capsys)


def test_another_tokenizer_is_one_line(job, caches, tmp_path, capsys):
    chosen = config(job)
    tokenizer.save(tokenizer.train(["another text"], 280, "another"), str(tmp_path / "tokenizer"))
    chosen.data.tokenizer = str(tmp_path / "tokenizer")
    chosen.teacher.update(dict(path="", cache=str(caches["float32"])))
    assert "found tokenizer " in refusal(lambda: loop.run(chosen, tmp_path / "w", quiet=True), capsys)


@pytest.mark.parametrize(("damage", "said"), [("flip", "do not match their checksum"), ("cut", "bytes, where"), ("lose", "missing")])
def test_a_damaged_shard_is_one_line(damage, said, job, caches, tmp_path, capsys):
    shutil.copytree(caches["float32"], tmp_path / "cache")
    path = next((tmp_path / "cache/shards").glob("train-00000-*"))
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content if damage == "flip" else content[:5000])
    if damage == "lose":
        path.unlink()
    chosen = config(job)
    chosen.teacher.cache = str(tmp_path / "cache")
    line = refusal(lambda: loop.run(chosen, tmp_path / "w", quiet=True), capsys)
    assert said in line
    assert path.name in line
