"""Bad inputs of sequences, as tests/test_bad_images.py has them for images: one line that names the key or file, what was found and
what would be accepted, exit code 2."""

from pathlib import Path

import numpy as np
import pytest
import scipy.io

import jaxdistill
from jaxdistill.data import array_batches
from jaxdistill.data.sequences import SequenceConfig, load
from tests.data.test_sequence_files import moving, write_skeleton
from tests.test_bad_inputs import one_line


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Arrays, tables and skeletons, each of them spoilt in one way."""
    root = tmp_path_factory.mktemp("files")
    x, y, subject = np.random.default_rng(0).normal(size=(48, 5, 4, 3)), np.arange(48) % 4, np.arange(48) // 8
    nan, inf, zeros = x.copy(), x.copy(), x.copy()
    nan[17, 3, 2, 1], inf[9, 0, 0, 0], zeros[30] = np.nan, 1e300, 0
    split = np.asarray(["train", "test"] * 24)
    for name, arrays in {
        "good": {}, "nan": {"x": nan}, "inf": {"x": inf}, "zeros": {"x": zeros}, "short": {"y": y[:9]}, "unnamed": {"y": y / 2},
        "empty": {"length": np.where(subject == 2, 0, 5)}, "long": {"length": np.full(48, 6)}, "both": {"split": split},
        "parts": {"split": np.where(split == "test", "testing", "train")}, "unseen": {"y": np.where(subject == 5, 9, y)},
        "few": {"y": np.where((y == 3) & (subject > 0), 0, y)}, "one": {"y": y * 0}, "text": {"x": np.full((48, 5, 3), "a")},
        "flat": {"x": np.arange(48)}, "titles": {"class_names": np.asarray(["a", "b"])},
        "rowless": {"x": x[:0], "y": y[:0], "subject": y[:0]},
    }.items():
        np.savez(root / f"{name}.npz", **({"x": x, "y": y, "subject": subject} | arrays))
    np.savez(root / "frames.npz", frames=x, y=y)
    (root / "words.npz").write_text("not a zip")
    (root / "cut.npz").write_bytes((root / "good.npz").read_bytes()[:2000])
    for name, joints, frames, label in (("joints", 5, 3, 0), ("none", 4, 0, 0), ("labels", 4, 3, [0, 1])):
        for i in range(12):
            (root / name).mkdir(exist_ok=True)
            last = i == 11
            shape = (frames, joints, 3) if last else (3, 4, 3)
            np.savez(root / f"{name}/{i:02}.npz", x=np.ones(shape), y=np.asarray(label if last else i % 2))
    (root / "nothing").mkdir()

    table = ["id,kind,a,b", *(f"{i},{'xy'[i % 2]},{i / 7},{i}" for i in range(20))]
    for name, row in (("good", "3,y,0.5,4"), ("cell", "3,y,tall,4"), ("blank", "3,y,,4"), ("missing", "3,y,nan,4"), ("huge", "3,y,1e60,4"),
                      ("narrow", "3,y,0.5")):  # fmt: skip
        (root / f"{name}.csv").write_text("\n".join([*table[:4], row, *table[5:]]))
    (root / "header.csv").write_text(table[0])
    (root / "void.csv").write_text("")
    (root / "twice.csv").write_text("\n".join(["id,kind,a,a", *table[1:]]))

    body = moving(0, 4, 0.1)
    for name in ("cut", "joints", "numbers", "words", "names", "bodies", "nan", "skipped"):
        (root / f"ntu_{name}").mkdir()
        for subject in range(1, 5):  # 3 is a test subject
            for action in (1, 2):
                file = root / f"ntu_{name}/S001C001P{subject:03}R001A{action:03}.skeleton"
                frames = [{"7": frame} for frame in body]
                if name == "bodies":
                    frames = [{}, {}]
                elif name == "joints":
                    frames[2] = {"7": body[2, :20]}
                elif name == "nan":
                    frames[2] = {"7": np.full((25, 3), np.nan)}
                write_skeleton(file, frames)
                lines = file.read_text().split("\n")
                if name == "cut":
                    file.write_text("\n".join(lines[:40]))
                elif name == "numbers":
                    file.write_text("\n".join([*lines[:10], "0.1 left 0.3", *lines[11:]]))
                elif name == "words":
                    file.write_text("a skeleton")
    (root / "ntu_names/walking.skeleton").write_text("1\n0\n")
    (root / "list.txt").write_text("nothing here")
    (root / "all.txt").write_text(" ".join(path.stem for path in (root / "ntu_skipped").iterdir()))

    for name, key, shape in (("key", "skel", (20, 3, 5)), ("turned", "d_skel", (5, 20, 3)), ("counts", "d_skel", (20, 3, 5)),
                             ("name", "d_skel", (20, 3, 5)), ("mat_cut", "d_skel", (20, 3, 5))):  # fmt: skip
        (root / f"utd_{name}").mkdir()
        for subject in range(1, 5):
            shape = (25, 3, 5) if (name, subject) == ("counts", 4) else shape
            scipy.io.savemat(root / f"utd_{name}/a1_s{subject}_t1_skeleton.mat", {key: np.ones(shape)})
    (root / "utd_name/first_skeleton.mat").write_bytes(b"")
    (root / "utd_mat_cut/a1_s1_t1_skeleton.mat").write_bytes((root / "utd_key/a1_s1_t1_skeleton.mat").read_bytes()[:150])
    return root


def npz(name: str, **more) -> dict:
    return {"source": "npz", "path": f"{{files}}/{name}.npz", "test_groups": (5,), **more}


def folder(name: str) -> dict:
    return {"source": "npz", "path": f"{{files}}/{name}"}


def csv(name: str, **more) -> dict:
    return {"source": "csv", "path": f"{{files}}/{name}.csv", "label": "kind", **more}


def ntu(name: str, **more) -> dict:
    return {"source": "ntu", "path": f"{{files}}/ntu_{name}", "min_per_class": 1, "validation": 0.0, **more}


def utd(name: str) -> dict:
    return {"source": "utd", "path": f"{{files}}/utd_{name}"}


@pytest.mark.parametrize(("change", "said"), [
    # The section
    pytest.param({"source": "kinect"}, "config key data.source: found 'kinect'; accepted: actions | ntu | utd | npz | csv", id="source"),
    pytest.param({"path": "x"}, "config key data.path: found 'x'; accepted: none with data.source 'actions'", id="path"),
    pytest.param({"source": "ntu"}, "config key data.path: found ''; accepted: a path with data.source 'ntu'", id="no path"),
    pytest.param({"fit": "crop"}, "config key data.fit: found 'crop'; accepted: 'pad' | 'cut' | 'stretch'", id="fit"),
    pytest.param({"takes": 2.0}, "config key data.takes: found 2.0; accepted: int", id="a float for a number"),
    pytest.param({"classes": 51}, "config key data.classes: found 51; accepted: 2 to 50", id="more actions than there are"),
    pytest.param(npz("good", classes=9), "config key data.classes: found 9; accepted: at most 4 (0: all)", id="more classes"),
    pytest.param(npz("good", subjects=4), "config key data.subjects: found 4; accepted: 16, as it is of data.source 'actions'",
                 id="a key of another source"),
    pytest.param({"components": 4}, "config key data.components: found 4; accepted: 0, as it is of data.reduce 'pca'", id="no reduction"),
    pytest.param({"reduce": "ica"}, "config key data.reduce: found 'ica'; accepted: '' | 'pca' | 'tucker'", id="unknown reduction"),
    pytest.param(npz("good", reduce="pca", components=13), "config key data.components: found 13; accepted: 1 to 12", id="components"),
    pytest.param(npz("good", reduce="tucker", ranks=(0, 9, 3)), "config key data.ranks: found (0, 9, 3); accepted: one for", id="ranks"),
    pytest.param(npz("good", reduce="tucker", ranks=(3, 2, 2)), "config key data.ranks: found (3, 2, 2); accepted: 0 for the frames",
                 id="ranks of frames"),
    # The split
    pytest.param(npz("both", test_groups=()), "config key data.group: found 'subject', of which 0, 1, 2, 3, 4, 5 is in train and in test "
                 "(train 24, validation 0, test 24)", id="a subject on both sides"),
    pytest.param(npz("good", split="stratified", test_groups=()), "of which 0, 1, 2, 3, 4, 5 is in train and in test", id="drawn subjects"),
    pytest.param(npz("unseen"), "config key data.split: found 'groups', and test classes that never train: 9 (train 32, validation 8, test "
                 "8)", id="a class without training samples"),
    pytest.param(npz("few", test_groups=(1,), validation=0.0, min_per_class=5), "config key data.min_per_class: found 5, and fewer "
                 "training examples of 3 2 (train 40, validation 0, test 8)", id="too few samples of a class"),
    pytest.param(npz("good", per_class=11), "config key data.per_class: found 11; accepted: at most the training examples of each class; "
                 "fewer have 0 10, 1 10, 2 10, 3 10", id="more than there are"),
    pytest.param(npz("good", test_groups=(9,)), "data.test_groups: found 9, a subject that no example has", id="unknown subject"),
    pytest.param(npz("good", test_groups=(0, 1, 2, 3, 4, 5)), "no train example (train 0, validation 0, test 48)", id="no training"),
    pytest.param(npz("good", test_groups=(1, 2, 3, 4, 5)), "data.validation: found 0.1, and nothing to cut it from", id="one group"),
    pytest.param(npz("good", group="room"), "data.group: found 'room'; accepted: subject, as data.source 'npz'", id="unknown group"),
    pytest.param(npz("one"), "and 1 class to train on (train 32, validation 8, test 8); accepted: two or more", id="one class"),
    pytest.param(csv("good", split="given"), "config key data.split: found 'given'; accepted: groups | stratified", id="not split"),
    pytest.param(ntu("joints", test_groups=(2, 5)), "data.test_groups: found 5, a subject that no example has", id="test subject"),
    # Arrays
    pytest.param(npz("nowhere"), "nowhere.npz': not found; accepted: an .npz file, or a folder of them", id="missing file"),
    pytest.param(folder("nothing"), "nothing': no *.npz in it; accepted: one or more", id="empty folder"),
    pytest.param(npz("words"), "words.npz': not a readable .npz file", id="text for arrays"),
    pytest.param(npz("cut"), "cut.npz': not a readable .npz file", id="truncated arrays"),
    pytest.param(npz("frames"), "frames.npz: has frames, y; accepted: x and y", id="arrays of other names"),
    pytest.param(npz("nan"), "nan.npz, sequence 17, frame 3, column 2, 1: found nan; accepted: finite numbers", id="nan"),
    pytest.param(npz("inf"), "inf.npz, sequence 9, frame 0, column 0, 0: found inf; accepted: finite numbers", id="beyond float32"),
    pytest.param(npz("zeros"), "sequence 30: all 5 frames are zeros, as padding is; accepted: sequences with frames", id="all padding"),
    pytest.param(npz("empty"), "empty.npz: length of sequence 16 is 0; accepted: 1 to 5 (frames beyond it are padding)", id="zero length"),
    pytest.param(npz("rowless"), "rowless.npz: no sequence in it; accepted: one or more", id="no rows"),
    pytest.param(npz("long"), "long.npz: length of sequence 0 is 6; accepted: 1 to 5", id="length beyond x"),
    pytest.param(npz("short"), "short.npz: y is int64 (9,); accepted: whole numbers or text [48], one for each", id="short labels"),
    pytest.param(npz("unnamed"), "unnamed.npz: y is float64 (48,); accepted: whole numbers or text", id="labels of floats"),
    pytest.param(npz("parts", test_groups=()), "parts.npz: split 'testing'; accepted: train, validation, test", id="unknown part"),
    pytest.param(npz("text"), "text.npz: x is <U1 (48, 5, 3); accepted: numbers", id="x of text"),
    pytest.param(npz("flat"), "flat.npz: x is int64 (48,); accepted: numbers, with one or more axes", id="x of one axis"),
    pytest.param(npz("titles"), "titles.npz: class_names (2,) do not name its labels", id="too few names"),
    pytest.param(npz("good", time_axis=4), "config key data.time_axis: found 4; accepted: 0 (none) to 3, as ", id="axis of time"),
    pytest.param(folder("joints"), "11: frames are (5, 3), where those of 00 are (4, 3); accepted: one shape for all", id="joint counts"),
    pytest.param(folder("none"), "11: a sequence without frames; accepted: one or more", id="no frames"),
    pytest.param(folder("labels"), "labels/11.npz: y is int64 (2,); accepted: one whole number or text", id="two labels"),
    # Tables
    pytest.param(csv("nowhere"), "nowhere.csv': [Errno 2] No such file or directory", id="missing table"),
    pytest.param(csv("good", label=""), "config key data.label: found ''; accepted: the column of the class", id="no label"),
    pytest.param(csv("good", label="species"), "config key data.label: found 'species'; accepted: a column of ", id="missing label column"),
    pytest.param(csv("good", ignore=("ID",)), "config key data.ignore: found 'ID'; accepted: columns of ", id="missing ignored column"),
    pytest.param(csv("good", split="groups"), "config key data.group: found 'subject'; accepted: a column of ", id="missing group column"),
    pytest.param(csv("cell"), "cell.csv, row 4, column 'a': found 'tall'; accepted: a number", id="text cell"),
    pytest.param(csv("blank"), "blank.csv, row 4, column 'a': found ''; accepted: a number", id="empty cell"),
    pytest.param(csv("missing"), "missing.csv, row 4, column 'a': found 'nan'; accepted: a finite number", id="nan in a table"),
    pytest.param(csv("huge"), "huge.csv, row 4, column 'a': found '1e60'; accepted: a finite number", id="too large for float32"),
    pytest.param(csv("narrow"), "narrow.csv, row 4: found 3 cells; accepted: 4, as in the header", id="short row"),
    pytest.param(csv("header"), "header.csv: 0 rows of 3 features; accepted: one or more of each", id="header alone"),
    pytest.param(csv("twice"), "twice.csv: column 'a' is there twice; accepted: each name once", id="column twice"),
    pytest.param(csv("void"), "config key data.label: found 'kind'; accepted: a column of ", id="empty table"),
    # Skeletons
    pytest.param(ntu("gone"), "ntu_gone': not found; accepted: a folder of *.skeleton", id="missing folder"),
    pytest.param(ntu("cut"), "A001.skeleton: ends at line 40, in frame 2 of 4; accepted: a whole file", id="truncated skeleton"),
    pytest.param(ntu("joints"), ".skeleton, line 60: found 20 joints; accepted: 25", id="skeleton of another device"),
    pytest.param(ntu("numbers"), ".skeleton, lines 5 to 29: could not convert string to float: 'left'", id="word in a skeleton"),
    pytest.param(ntu("nan"), ".skeleton, frame 2, column 0, 0: found nan; accepted: finite numbers", id="nan in a skeleton"),
    pytest.param(ntu("words"), ".skeleton, line 1: found 'a skeleton'; accepted: the number of frames", id="no skeleton"),
    pytest.param(ntu("names"), "walking.skeleton: accepted: the name SsssCcccPpppRrrrAaaa.skeleton", id="name of a skeleton"),
    pytest.param(ntu("bodies"), "ntu_bodies': no file with a body in it (0 skipped, 8 without)", id="no bodies"),
    pytest.param(ntu("skipped", skip="{files}/all.txt"), "no file with a body in it (8 skipped, 0 without)", id="all skipped"),
    pytest.param(ntu("skipped", skip="{files}/none.txt"), "none.txt' (No such file or directory); accepted: a file of", id="no list"),
    pytest.param(ntu("skipped", skip="{files}/list.txt"), "list.txt', without a name SsssCcccPpppRrrrAaaa; accepted: one", id="empty list"),
    pytest.param(utd("key"), "a1_s1_t1_skeleton.mat: has skel; accepted: d_skel [joints, 3, frames]", id="no d_skel"),
    pytest.param(utd("turned"), "d_skel is float64 (5, 20, 3); accepted: numbers [joints, 3, frames]", id="axes of d_skel"),
    pytest.param(utd("counts"), "a1_s4_t1: frames are (25, 3), where those of a1_s1_t1 are (20, 3)", id="joints of d_skel"),
    pytest.param(utd("name"), "first_skeleton.mat: accepted: the name aA_sS_tT_skeleton.mat", id="name of a .mat"),
    pytest.param(utd("mat_cut"), "a1_s1_t1_skeleton.mat: not a readable .mat file", id="truncated .mat"),
])
def test_a_config(change, said, files, capsys):
    def body():
        config = SequenceConfig(**{key: x.replace("{files}", str(files)) if isinstance(x, str) else x for key, x in change.items()})
        for split in load(config).splits.values():  # files are read when asked for
            list(array_batches.batches(split, batch=4, seed=0, training=False))

    with pytest.raises(SystemExit) as stop:
        jaxdistill.command(body)
    assert said in one_line(stop.value.code, capsys.readouterr().err)
