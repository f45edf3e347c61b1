"""Arrays, tables and skeleton files, as their formats have them."""

import csv

import numpy as np
import pytest
import scipy.io

from jaxdistill import UserError
from jaxdistill.data.sequences import SequenceConfig, load
from jaxdistill.data.skeleton_files import SUBJECTS, read_skeleton


def everything(split) -> dict:
    return split.take(np.arange(len(split)))


def rows(splits) -> dict:
    """Name -> (x of its frames, label), of all splits."""
    found = {}
    for split in splits.values():
        for name, x, length, label in zip(split.names, *(everything(split)[key] for key in ("x", "length", "label")), strict=True):
            found[name] = x[:length], int(label)
    return found


# -- .npz ---------------------------------------------------------------------------------------------------------------------


def test_arrays_with_lengths_groups_and_names(tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 6, 5, 3)), np.tile(np.arange(4) * 2, 10)
    length = rng.integers(1, 7, 40)
    x[np.arange(6)[None] >= length[:, None]] = np.nan  # whatever stands beyond a length is padding
    names = np.asarray([f"class {i}" for i in range(7)])
    np.savez(tmp_path / "a.npz", x=x, y=y, length=length, subject=np.arange(40) // 8 + 10, class_names=names)
    found = load(SequenceConfig(source="npz", path=str(tmp_path / "a.npz"), test_groups=(12,), validation=0.0, length=6))
    assert found.classes == ("class 0", "class 2", "class 4", "class 6")
    assert found.width == 15
    assert {split: set(each.subjects.tolist()) for split, each in found.splits.items()} == {"train": {0, 1, 3, 4}, "test": {2}}
    assert found.splits["test"].names == tuple(f"sequence {i}" for i in range(16, 24))
    for name, (frames, label) in rows(found.splits).items():
        i = int(name.split()[1])
        np.testing.assert_array_equal(frames, x[i, : length[i]].astype(np.float32).reshape(-1, 15))
        assert label == y[i] // 2


@pytest.mark.parametrize(("axis", "frames", "width"), [(1, 4, 6), (2, 6, 4), (0, 1, 24)])
def test_the_axis_of_time(tmp_path, axis, frames, width):
    x = np.arange(480, dtype=np.uint8).reshape(20, 4, 6)
    np.savez(tmp_path / "a.npz", x=x, y=np.arange(20) % 2)
    found = load(SequenceConfig(source="npz", path=str(tmp_path / "a.npz"), time_axis=axis))
    assert (found.width, found.facts["frames"]) == (width, frames)
    for name, (got, _) in rows(found.splits).items():
        one = x[int(name.split()[1])].astype(np.float32)
        np.testing.assert_array_equal(got, {0: one.reshape(1, 24), 1: one, 2: one.T}[axis])


def test_a_folder_of_train_and_test_is_split_as_given(tmp_path):
    for part, count in (("train", 24), ("test", 8)):
        np.savez(tmp_path / f"{part}.npz", x=np.full((count, 3, 2), count, np.uint8), y=np.arange(count) % 4, fold=np.ones(count, int))
    found = load(SequenceConfig(source="npz", path=str(tmp_path), validation=0.25))
    assert {part: len(split) for part, split in found.splits.items()} == {"train": 16, "validation": 8, "test": 8}
    assert (everything(found.splits["test"])["x"] == 8).all()
    assert (everything(found.splits["validation"])["x"] == 24).all()
    assert found.splits["train"].subjects.tolist() == [-1] * 16  # the file knows none


def test_an_array_that_tells_the_split(tmp_path):
    split = np.asarray(["train", "train", "validation", "test"] * 8)
    np.savez(tmp_path / "a.npz", x=np.ones((32, 2, 2)), y=np.repeat(["b", "a"], 16), split=split)
    found = load(SequenceConfig(source="npz", path=str(tmp_path / "a.npz")))
    assert {part: len(each) for part, each in found.splits.items()} == {"train": 16, "validation": 8, "test": 8}
    assert found.classes == ("a", "b")


def test_a_folder_of_sequences(tmp_path):
    for i in range(24):
        (tmp_path / str(i % 3)).mkdir(exist_ok=True)
        np.savez(tmp_path / f"{i % 3}/{i}.npz", x=np.full((i + 1, 4), i + 1.0), y=np.asarray("ab"[i % 2]), subject=i // 4, more=np.ones(3))
    found = load(SequenceConfig(source="npz", path=str(tmp_path), test_groups=(5,), validation=0.2))
    assert found.splits["test"].names == ("0/21", "1/22", "2/20", "2/23")
    assert [len(x) for x, _ in rows({"test": found.splits["test"]}).values()] == [20] * 4
    assert found.facts["frames"] == 20  # of the longest that trains; the test's are resampled to it
    assert found.facts["splits"]["test"]["resampled"] == 4
    assert all((x == int(name.split("/")[1]) + 1).all() for name, (x, _) in rows(found.splits).items())


# -- .csv ---------------------------------------------------------------------------------------------------------------------


def test_a_table(tmp_path):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(30, 3)).round(6)
    with open(tmp_path / "a.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "one", "species", "two", "three", "site"])
        writer.writerows([i, v[0], f"s, {i % 3}", *v[1:], f"site {i // 6}"] for i, v in enumerate(values))
    options = dict(source="csv", path=str(tmp_path / "a.csv"), label="species", ignore=("id",))
    found = load(SequenceConfig(**options, group="site", test_groups=("site 2",), validation=0.0))
    assert found.classes == ("s, 0", "s, 1", "s, 2")
    assert (found.width, found.facts["frames"]) == (3, 1)
    assert found.splits["test"].names == tuple(f"row {i}" for i in range(12, 18))
    for name, (x, label) in rows(found.splits).items():
        i = int(name.split()[1])
        np.testing.assert_array_equal(x, values[i : i + 1].astype(np.float32))
        assert label == i % 3
    stratified = load(SequenceConfig(**(options | {"ignore": ("id", "site")}), split="stratified", test=0.5, validation=0.0))
    assert {part: np.bincount(split.labels).tolist() for part, split in stratified.splits.items()} == {"train": [5] * 3, "test": [5] * 3}


# -- NTU RGB+D ----------------------------------------------------------------------------------------------------------------


def write_skeleton(path, frames: list[dict[str, np.ndarray]]):
    """frames: for each, body id -> [25, 3], in the format of the data set."""
    lines = [str(len(frames))]
    for bodies in frames:
        lines.append(str(len(bodies)))
        for body, xyz in bodies.items():
            lines += [f"{body} 0 1 1 0 0 0 0.05 -0.1 2", str(len(xyz))]
            lines += [" ".join(f"{number:.7g}" for number in joint) + " 250.1 180.2 980.3 500.4 0.1 0.2 0.3 0.9 2" for joint in xyz]
    path.write_text("\r\n".join(lines) + "\r\n")


def moving(seed: int, frames: int, by: float) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(1, 25, 3)) + by * rng.normal(size=(frames, 25, 3))).astype(np.float32)


def test_a_skeleton_file(tmp_path):
    """Two of three bodies, most motion first; one is missing for a while; frames without a body."""
    still, lively, brief = moving(0, 8, 0.01), moving(1, 8, 0.3), moving(2, 1, 0.0)
    frames = [{"72057594037931101": still[t], "72057594037931102": lively[t]} for t in range(8)]
    del frames[2]["72057594037931102"]
    frames[5] = {"72057594037931103": brief[0]}
    frames.insert(4, {})
    write_skeleton(tmp_path / "a.skeleton", frames)
    both = read_skeleton(tmp_path / "a.skeleton")
    assert both.shape == (7, 50, 3)  # not the frame without a body, nor that of the third
    kept = [0, 1, 2, 3, 4, 6, 7]
    wanted = lively[kept].copy()
    wanted[2] = 0
    np.testing.assert_allclose(both[:, :25], wanted, rtol=1e-6)
    np.testing.assert_allclose(both[:, 25:], still[kept], rtol=1e-6)
    one = read_skeleton(tmp_path / "a.skeleton", bodies=1)
    np.testing.assert_allclose(one, lively[[0, 1, 3, 4, 6, 7]], rtol=1e-6)


@pytest.fixture(scope="module")
def kinect(tmp_path_factory):
    """Six subjects (1, 2, 3, 4, 6, 8), three cameras, two actions, in folders; one without a body, one on the list of missing ones."""
    root = tmp_path_factory.mktemp("ntu")
    for i, (subject, camera, action) in enumerate((s, c, a) for s in (1, 2, 3, 4, 6, 8) for c in (1, 2, 3) for a in (7, 50)):
        name = f"S{1 + subject % 2:03}C{camera:03}P{subject:03}R001A{action:03}"
        (root / f"A{action}").mkdir(exist_ok=True)
        write_skeleton(root / f"A{action}/{name}.skeleton", [{"1": frame} for frame in moving(i, 3 + i % 4, 0.1)])
    (root / "S001C001P006R002A007.skeleton").write_text("3\n0\n0\n0\n")
    write_skeleton(root / "S001C001P006R002A050.skeleton", [{"1": moving(9, 1, 0.1)[0]}])
    (root / "missing.txt").write_text("Samples with missing skeletons:\n\nS001C001P006R002A050\nS017C003P020R002A060\n")
    return root


def ntu(root, **options):
    return load(SequenceConfig(source="ntu", path=str(root), skip=str(root / "missing.txt"), **({"validation": 0.25} | options)))


def test_cross_subject(kinect):
    found = ntu(kinect, bodies=1)
    assert found.classes == ("A007", "A050")
    assert found.width == 75
    assert (found.facts["skipped"], found.facts["without_body"]) == (1, 1)
    people = {part: {name[8:12] for name in split.names} for part, split in found.splits.items()}
    assert people["test"] == {"P003", "P006"}  # no training subjects, as published
    assert people["train"] | people["validation"] == {"P001", "P002", "P004", "P008"}
    assert len(people["validation"]) == 1
    for name, (x, _) in rows(found.splits).items():
        np.testing.assert_array_equal(x.reshape(-1, 25, 3), read_skeleton(kinect / f"A{int(name[-3:])}/{name}.skeleton", 1))
    assert SUBJECTS[:20] == (1, 2, 4, 5, 8, 9, 13, 14, 15, 16, 17, 18, 19, 25, 27, 28, 31, 34, 35, 38)
    assert len(set(SUBJECTS)) == 53  # of NTU RGB+D 120


def test_cross_view_and_cross_setup(kinect):
    view = ntu(kinect, group="camera", validation=0.5)
    assert {name[4:8] for name in view.splits["test"].names} == {"C001"}
    assert {name[4:8] for part in ("train", "validation") for name in view.splits[part].names} == {"C002", "C003"}
    assert set(view.splits["test"].subjects.tolist()) == set(range(6))  # the same people
    setup = ntu(kinect, group="setup", validation=0.0)
    assert {name[:4] for name in setup.splits["test"].names} == {"S001"}
    assert {name[:4] for name in setup.splits["train"].names} == {"S002"}


def test_files_are_read_when_asked_for_and_once(kinect, tmp_path):
    for file in kinect.rglob("*.*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    for cache in (1, 0):
        split = ntu(tmp_path, cache=cache).splits["test"]
        before = split.take(np.asarray([3, 3]))
        file = tmp_path / f"{split.names[3]}.skeleton"
        whole = file.read_text()
        file.write_text(whole[: len(whole) // 2])
        if cache:
            np.testing.assert_array_equal(split.take(np.asarray([3]))["x"][0], before["x"][1])
        else:
            with pytest.raises(UserError, match=rf"{split.names[3]}.skeleton: ends at line \d+, in frame \d of \d; accepted: a whole file"):
                split.take(np.asarray([3]))
        file.write_text(whole)


# -- UTD-MHAD -----------------------------------------------------------------------------------------------------------------


def test_utd(tmp_path):
    rng = np.random.default_rng(0)
    stored = {}
    for action in (1, 2, 10):
        for subject in range(1, 9):
            x = rng.normal(size=(20, 3, int(rng.integers(4, 9))))
            stored[f"a{action}_s{subject}_t1"] = x, {1: 0, 2: 1, 10: 2}[action]
            scipy.io.savemat(tmp_path / f"a{action}_s{subject}_t1_skeleton.mat", {"d_skel": x})
    found = load(SequenceConfig(source="utd", path=str(tmp_path), validation=0.25))
    assert found.classes == ("a1", "a2", "a10")
    assert {name.split("_")[1] for name in found.splits["test"].names} == {"s2", "s4", "s6", "s8"}
    assert len(found.splits["validation"]) == 3  # one of the four subjects that train
    longest = found.facts["frames"]
    for name, (x, label) in rows(found.splits).items():
        wanted, action = stored[name]
        assert label == action
        if wanted.shape[2] <= longest:
            np.testing.assert_array_equal(x, wanted.transpose(2, 0, 1).reshape(-1, 60).astype(np.float32))
