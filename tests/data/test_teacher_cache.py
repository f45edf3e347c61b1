"""The cache of a teacher on disk: what was put in comes out, a kill leaves nothing half, and damage is told."""

import errno
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from jaxdistill import UserError
from jaxdistill.data import shards, teacher_cache
from jaxdistill.data.shards import Layout
from jaxdistill.data.teacher_cache import Cache, Options
from jaxdistill.lock import only_writer
from tests.data import produced

ROOT = Path(__file__).parents[2]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    produced.write(folder)
    return folder


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    folder = tmp_path / "copy"
    for name, content in contents(whole).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_what_was_put_in_comes_out(whole):
    cache = Cache(whole)
    order = np.random.default_rng(0).permutation(produced.ROWS["train"])
    epochs = np.arange(len(order))
    found = cache.rows("train", order, epochs)
    assert found["cached_states"].dtype == ml_dtypes.bfloat16
    for i, row in enumerate(order.tolist()):
        assert found["cached_states"][i].tobytes() == produced.states("train", row)[0].tobytes()
        assert np.array_equal(found["cached_ids"][i], produced.ids("train", row)[i % 3])  # the draws in turn
    past = cache.rows("test", np.array([7, 3]), np.zeros(2, int))  # a batch's padding
    assert not past["cached_states"][0].any()
    assert past["cached_ids"][1].tolist() == produced.ids("test", 3)[0].tolist()
    assert cache.constants()["head"].tolist() == np.arange(12.0).reshape(4, 3).tolist()
    assert cache.fields("train") == {"ids": ("uint16", (6,)), "states": ("bfloat16", (6, 5))}
    assert len([path for path in (whole / "shards").iterdir() if path.name.startswith("train")]) > 5


def test_few_files_are_held_open(whole, monkeypatch):
    monkeypatch.setattr(shards, "OPEN", 2)
    cache = Cache(whole)
    order = np.random.default_rng(1).integers(0, produced.ROWS["train"], 60)
    found = cache.rows("train", order, np.zeros(60, int))
    assert all(np.array_equal(found["cached_ids"][i], produced.ids("train", row)[0]) for i, row in enumerate(order.tolist()))
    assert len(cache._tables["train"]._open) == 2


def test_a_shard_is_an_npy_file_that_says_its_own_checksum(whole):
    path = sorted((whole / "shards").glob("test-*"))[0]
    packed = np.load(path)
    assert packed.dtype == np.uint8
    assert packed[0].tobytes() == produced.ids("test", 0).tobytes() + produced.states("test", 0).tobytes()
    assert path.stem.split("-")[-1] == f"{shards._crc32(path):08x}"


def test_a_reader_goes_to_another_process_without_its_files(whole):
    cache = Cache(whole)
    cache.rows("train", np.array([0]), np.array([0]))
    packed = pickle.dumps(cache)
    assert len(packed) < 5_000
    assert np.array_equal(*(one.rows("train", np.array([9]), np.array([1]))["cached_ids"] for one in (cache, pickle.loads(packed))))


def test_it_is_found_wherever_the_process_goes_meanwhile(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(whole.parent)
    cache = Cache(whole.name)
    monkeypatch.chdir(tmp_path)
    assert cache.rows("train", np.array([9]), np.array([1]))["cached_ids"][0].tolist() == produced.ids("train", 9)[1].tolist()


KILLS = [("sync", 1), ("replace", 1), ("put", 1), ("half a file", 1), ("replace", 1), ("replace", 2), ("half a file", 3), ("put", 4),
         ("replace", 4), ("unlink", 1)]  # in turn, in one folder: at its beginning, in one shard after another, at the manifest, after it


def test_killed_ten_times_it_ends_with_the_same_bytes(whole, tmp_path):
    for moment, count in KILLS:
        done = subprocess.run([sys.executable, "-m", "tests.data.produced", tmp_path / "cache", moment, str(count)], cwd=ROOT)
        assert done.returncode == -9
        assert contents(tmp_path / "cache").keys() != contents(whole).keys()
    produced.write(tmp_path / "cache")
    assert contents(tmp_path / "cache") == contents(whole)


@pytest.mark.parametrize(("moment", "count"), [(moment, count) for moment in ("half a file", "replace") for count in (1, 12)])
def test_killed_once_it_ends_with_the_same_bytes(moment, count, whole, tmp_path):
    done = subprocess.run([sys.executable, "-m", "tests.data.produced", tmp_path, moment, str(count)], cwd=ROOT)
    assert done.returncode == -9
    with pytest.raises(UserError, match="unfinished|no manifest"):
        Cache(tmp_path)
    told = []
    produced.write(tmp_path, say=told.append)
    assert contents(tmp_path) == contents(whole)
    assert any("already there" in line for line in told) == (count > 2)


def test_a_shard_that_was_damaged_before_the_rest_was_written_is_written_again(whole, tmp_path):
    subprocess.run([sys.executable, "-m", "tests.data.produced", tmp_path, "put", "4"], cwd=ROOT)
    first = sorted((tmp_path / "shards").glob("train-00000-*"))[0]
    flip(first, 300)
    produced.write(tmp_path)
    assert contents(tmp_path) == contents(whole)


def test_where_there_is_no_room_what_is_there_is_kept(tmp_path, whole, monkeypatch):
    calls, sync = [], shards.sync

    def full(file):
        calls.append(file)
        if len(calls) == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(file)

    monkeypatch.setattr(shards, "sync", full)
    with pytest.raises(UserError, match="-unfinished: No space left on device; accepted: .*: the same command goes on"):
        produced.write(tmp_path)
    assert len(list((tmp_path / "shards").glob("*.npy"))) == 2
    produced.write(tmp_path)
    assert contents(tmp_path) == contents(whole)


def test_a_finished_cache_is_left_alone(copy):
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.name != ".lock"}
    produced.write(copy)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


def shard(folder: Path) -> Path:
    return sorted((folder / "shards").glob("train-00002-*"))[0]


DAMAGE = {
    "a flipped bit": (lambda folder: flip(shard(folder), 333), "do not match their checksum"),
    "a flipped bit in the header": (lambda folder: flip(shard(folder), 20), "do not match their checksum"),
    "a missing shard": (lambda folder: shard(folder).unlink(), "missing; accepted"),
    "a truncated shard": (lambda folder: os.truncate(shard(folder), 400), "found 400 bytes, where"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_to_a_shard_is_one_line(name, copy):
    """What is not there, or too short, is known before anything trains; contents, when the shard is opened."""
    act, said = DAMAGE[name]
    path = shard(copy)
    act(copy)
    opened = Cache(copy) if "bit" in name else None
    if opened:
        opened.rows("train", np.array([0]), np.array([0]))  # of another shard
    with pytest.raises(UserError, match=said) as error:
        opened.rows("train", np.array([17]), np.array([0])) if opened else Cache(copy)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_damaged_manifest_is_refused(copy):
    manifest = copy / teacher_cache.MANIFEST
    manifest.write_text(manifest.read_text().replace('"per": 6', '"per": 4', 1))
    with pytest.raises(UserError, match="manifest.json: found contents that do not match"):
        Cache(copy)
    manifest.write_text('{"versions": {}}')  # as a run has one
    with pytest.raises(UserError, match="manifest.json: found no teacher cache's; accepted: a folder"):
        Cache(copy)
    manifest.write_text("[")
    with pytest.raises(UserError, match="manifest.json: cannot be read as JSON"):
        Cache(copy)
    manifest.unlink()
    with pytest.raises(UserError, match="found no manifest.json"):
        Cache(copy)


@pytest.mark.parametrize(("change", "said"), [
    ({"tokenizer": "u"}, "found tokenizer t in .*; accepted: u"),
    ({"packing": {"length": 7}}, "found packing.length 6 in .*; accepted: 7"),
    ({"teacher": {"weights": "v"}}, "found teacher.weights w"),
    ({"data": {"sha256": "e"}, "tokenizer": "t"}, "found data.sha256 d"),
    ({"classes": 3}, "found classes nothing"),
])
def test_what_it_was_made_from_must_be_what_is_wanted(change, said, whole):
    cache = Cache(whole)
    cache.check(produced.MADE)
    with pytest.raises(UserError, match="^config key teacher.cache: " + said):
        cache.check(produced.MADE | change)


def test_a_folder_of_another_cache_is_left_alone(copy, tmp_path):
    before = contents(copy)
    with pytest.raises(UserError, match=r"found a cache of packing.length 6, and 9 is asked for"):
        produced.write(copy, produced.MADE | {"packing": {"length": 9}})
    assert contents(copy) == before
    subprocess.run([sys.executable, "-m", "tests.data.produced", tmp_path / "begun", "put", "4"], cwd=ROOT)
    with pytest.raises(UserError, match="found an unfinished cache of tokenizer t, and u is asked for"):
        produced.write(tmp_path / "begun", produced.MADE | {"tokenizer": "u"})
    begun = tmp_path / "begun" / teacher_cache.BEGUN
    begun.write_text(json.dumps(json.loads(begun.read_text()) | {"machine": {"jax": "1"}}))
    with pytest.raises(UserError, match="found an unfinished cache of jax 1"):
        produced.write(tmp_path / "begun")


def test_one_process_writes_at_a_time(tmp_path):
    with only_writer(tmp_path / ".lock", "a cache"), pytest.raises(UserError, match="another process is writing"):
        produced.write(tmp_path)
    produced.write(tmp_path)


def test_same_contents_have_the_same_digest_and_no_others(whole, tmp_path):
    produced.write(tmp_path)
    assert Cache(tmp_path).digest == Cache(whole).digest
    other = tmp_path / "other"
    produced.write(other, produced.MADE | {"tokenizer": "u"})
    assert Cache(other).digest != Cache(whole).digest


@pytest.mark.parametrize(("option", "value"), [
    ("format", "dense"), ("dtype", "int8"), ("k", 0), ("samples", 0), ("draws", 0), ("views", 0), ("seed", -1), ("gamma", 0.0),
    ("temperatures", (1.0, 0.0))])
def test_options_name_what_they_refuse(option, value):
    with pytest.raises(UserError, match=f"^--{option}: found"):
        Options(**{option: value})


def test_rows_of_the_wrong_kind_are_not_written(tmp_path):
    layout = Layout.of({"x": np.zeros((1, 3), np.float32)})
    writer = shards.Writer(tmp_path, "t", layout, 4)
    with pytest.raises(ValueError, match="x: found float64"):
        writer.put(0, {"x": np.zeros((4, 3))})
    with pytest.raises(ValueError, match="found 3 rows; accepted: 4"):
        writer.put(0, {"x": np.zeros((3, 3), np.float32)})
