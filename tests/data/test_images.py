"""The config's errors, arrays and drawn letters as sources, the draws, and what a set says of itself."""

import dataclasses
import os
import pathlib
import pickle

import numpy as np
import pytest
from PIL import Image

from jaxdistill import UserError
from jaxdistill.data import image_splits
from jaxdistill.data.images import ImageConfig, describe, load, statistics
from jaxdistill.training.plan import Watched

DATA = os.environ.get("JAXDISTILL_DATA")


@pytest.fixture(autouse=True)
def fresh():
    load.cache_clear()
    yield
    load.cache_clear()


# The config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "cub2"}, r"data.source: found 'cub2'; accepted: glyphs \| npz \| tfds \| folder \| cub"),
        ({"source": "cub"}, "data.path: found ''; accepted: a path with data.source 'cub'"),
        ({"path": "x"}, "data.path: found 'x'; accepted: none with data.source 'glyphs'"),
        ({"source": "cub", "path": "x", "task": "reid"}, "data.task: found 'reid'; accepted: 'classification' with data.source 'cub'"),
        ({"source": "duke", "path": "x", "task": "classification"}, "data.task: found 'classification'; accepted: 'reid'"),
        ({"task": "retrieval"}, r"data.task: found 'retrieval'; accepted: classification \| reid"),
        ({"size": (32,)}, r"data.size: found \(32,\); accepted: two whole numbers"),
        ({"size": (32, 32.0)}, "data.size: found .*accepted: two whole numbers"),
        ({"size": (0, 32)}, r"data.size: found \(0, 32\); accepted: 1 to 4096 each way"),
        ({"size": 32}, "data.size: found 32; accepted: tuple"),
        ({"resize": (16, 40)}, r"data.resize: found \(16, 40\); accepted: \(0, 0\), or data.size \(32, 32\) or more each way"),
        ({"channels": 4}, r"data.channels: found 4; accepted: 1 \| 3"),
        ({"classes": 1}, r"data.classes: found 1; accepted: 0 \(all\), or 2 or more"),
        ({"classes": -1}, "data.classes: found -1; accepted: 0 or more"),
        ({"validation": 1.0}, "data.validation: found 1.0; accepted: 0 to 0.9"),
        ({"test": -0.1}, "data.test: found -0.1; accepted: 0 to 0.9"),
        ({"flip": 1}, "data.flip: found 1; accepted: bool"),
        ({"workers": -1}, "data.workers: found -1; accepted: 0 to 256"),
        ({"corrupt": -1}, "data.corrupt: found -1; accepted: 0 or more"),
        ({"rotate": 200}, "data.rotate: found 200; accepted: 0 to 180"),
        ({"erasing": 1.5}, "data.erasing: found 1.5; accepted: 0 to 1"),
        ({"erasing": float("nan")}, "data.erasing: found nan; accepted: 0 to 1"),
        ({"erasing_fill": "black"}, r"data.erasing_fill: found 'black'; accepted: pixels \| mean"),
        ({"source": "npz", "path": "x", "group": "drawer"}, r"data.test_groups: found \(\); accepted: data.group and data.test_groups"),
        ({"source": "npz", "path": "x", "test_groups": (1,)}, "data.group: found ''; accepted: data.group and data.test_groups"),
        ({"group": "drawer", "test_groups": (1,)}, "data.group: found 'drawer'; accepted: '' with data.source 'glyphs'"),
        ({"camera": "drawer"}, "data.camera: found 'drawer'; accepted: '' with data.source 'glyphs'"),
        ({"source": "npz", "path": "x", "test_families": ("stix",)}, r"data.test_families: found \('stix',\); accepted: \(\)"),
    ],
)
def test_mistakes_in_the_config_are_one_line(options, message):
    with pytest.raises(UserError, match=message) as caught:
        ImageConfig(**options)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("config key data.")


def test_the_config_is_built_from_a_section_and_can_be_hashed():
    built = Watched({"source": "market1501", "path": "x", "size": [256, 128], "rotate": 3}, {}, set(), "data.").build(ImageConfig)
    assert (built.task, built.size) == ("reid", (256, 128))
    assert hash(built) == hash(dataclasses.replace(built))
    with pytest.raises(UserError, match="config key data.rotate: found 'x'"):
        Watched({"rotate": "x"}, {}, set(), "data.").build(ImageConfig)


# Arrays


def arrays(path, count=40, **more):
    """Image i is of grey i, of class i % 4."""
    image = np.repeat(np.arange(count, dtype=np.uint8), 64).reshape(count, 8, 8)
    np.savez(path, **({"x": image, "y": np.arange(count) % 4} | more))
    return path


def config(path, **options):
    return ImageConfig(**{"source": "npz", "path": str(path), "size": (8, 8), "test": 0.25} | options)


def greys(split):
    return [int(split.read(i)[0, 0, 0]) for i in range(len(split))]


def test_arrays_are_split_within_each_class(tmp_path):
    found = load(config(arrays(tmp_path / "a.npz"), validation=0.2))
    train, validation, test = (found.splits[name] for name in ("train", "validation", "test"))
    assert [np.bincount(split.labels).tolist() for split in (train, validation, test)] == [[6] * 4, [1] * 4, [3] * 4]
    assert sorted(greys(train) + greys(validation) + greys(test)) == list(range(40))
    for split in (train, validation, test):
        assert [value % 4 for value in greys(split)] == split.labels.tolist()  # an image keeps its label
        assert (split.labels.dtype, split.cameras.dtype, split.gallery.dtype) == (np.int32, np.int32, np.bool_)
    assert found.classes == ("0", "1", "2", "3")
    assert found.facts["splits"]["test"] | {"sha256": ""} == {"sha256": "", "images": 12, "classes": 4}


def test_the_draw_is_always_the_same_and_its_share_exact():
    names = [f"image {i}" for i in range(1000)]
    first = image_splits.held_out(names, 0.1)
    assert len(first) == 100
    assert image_splits.held_out(names[::-1], 0.1) == first
    assert image_splits.held_out(["only"], 0.5) == set()
    assert len(image_splits.held_out(["a", "b"], 0.01)) == len(image_splits.held_out(["a", "b"], 0.9)) == 1
    assert image_splits.held_out(names, 0) == set()


def test_arrays_that_say_their_split(tmp_path):
    split = np.repeat(["train", "validation", "test"], [20, 8, 12])
    found = load(config(arrays(tmp_path / "a.npz", split=split)))
    assert {name: greys(split) for name, split in found.splits.items()} == {
        "train": list(range(20)), "validation": list(range(20, 28)), "test": list(range(28, 40)),
    }  # fmt: skip


def test_groups_make_the_test(tmp_path):
    path = arrays(tmp_path / "a.npz", writer=np.arange(40) // 10, hand=np.repeat(["a", "b"], 20))
    assert greys(load(config(path, group="writer", test_groups=(1, 3))).splits["test"]) == [*range(10, 20), *range(30, 40)]
    assert greys(load(config(path, group="hand", test_groups=("b",))).splits["test"]) == list(range(20, 40))
    with pytest.raises(UserError, match=r"data.group: found 'pen'; accepted: an array of .* \(x, y, writer, hand\)"):
        load(config(path, group="pen", test_groups=(1,)))
    with pytest.raises(UserError, match="data.test_groups: found 7, which no image has; accepted: some of 0, 1, 2, 3"):
        load(config(path, group="writer", test_groups=(3, 7)))


def test_arrays_for_re_identification(tmp_path):
    """Four images of each of ten identities, by cameras 0 and 1; three images are junk."""
    label = np.concatenate([np.arange(40) % 10, [-1, -1, -1]])
    path = arrays(tmp_path / "a.npz", 43, y=label, camera=np.arange(43) // 10 % 2)
    found = load(config(path, task="reid", validation=0.25))
    train, validation, test = (found.splits[name] for name in ("train", "validation", "test"))
    assert found.facts["junk"] == 3
    assert sorted(set(train.labels.tolist())) == list(range(len(found.classes)))
    assert [int(found.classes[label]) for label in train.labels] == [value % 10 for value in greys(train)]
    for split in (validation, test):
        assert split.labels.tolist() == [value % 10 for value in greys(split)]  # identities as they are
        assert split.cameras.tolist() == [value // 10 % 2 for value in greys(split)]
        half = len(split) // 2
        assert split.gallery.tolist() == [False] * half + [True] * half
        assert greys(split)[:half] == greys(split)[half:]
    identities = [{value % 10 for value in greys(split)} for split in (train, validation, test)]
    assert sum(map(len, identities)) == 10
    assert set.union(*identities) == set(range(10))


def test_the_camera_may_have_another_name(tmp_path):
    path = arrays(tmp_path / "a.npz", y=np.arange(40) % 10, writer=np.arange(40) // 10, camera=np.arange(40) // 20)
    named = load(config(path, task="reid", validation=0.0, camera="writer"))
    for split in named.splits.values():
        assert split.cameras.tolist() == [value // 10 for value in greys(split)]
    assert {split["cameras"] for split in named.facts["splits"].values()} == {4}
    assert set(load(config(path, task="reid", validation=0.0)).splits["test"].cameras.tolist()) == {0, 1}
    with pytest.raises(UserError, match=r"data.camera: found 'pen'; accepted: an array of .* \(x, y, writer, camera\)"):
        load(config(path, task="reid", camera="pen"))


def test_the_first_identities(tmp_path):
    split = np.repeat(["train", "query", "gallery"], [24, 8, 8])
    path = arrays(tmp_path / "a.npz", y=np.concatenate([np.arange(24) % 6, 6 + np.arange(16) % 4]), split=split)
    whole = load(config(path, task="reid", validation=0.0))
    part = load(config(path, task="reid", validation=0.0, classes=2))
    assert (whole.classes, part.classes) == (tuple("012345"), ("0", "1"))
    assert len(part.splits["train"]) == 8
    assert part.splits["test"].labels.tolist() == whole.splits["test"].labels.tolist() == [6, 7, 8, 9] * 4
    assert whole.splits["test"].gallery.tolist() == [False] * 8 + [True] * 8


def test_names_of_classes_colour_and_channels(tmp_path):
    colour = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), np.uint8)
    path = tmp_path / "a.npz"
    np.savez(path, images=colour, labels=np.repeat([0, 2], 20), class_names=np.array(["ash", "elm", "oak"]))
    found = load(config(path, channels=3))
    assert found.classes == ("ash", "oak")
    places = [int(name.split()[1]) for name in found.splits["test"].names]
    np.testing.assert_array_equal(np.stack([found.splits["test"].read(i) for i in range(len(places))]), colour[places])
    grey = load(config(path, channels=1)).splits["test"].read(0)
    np.testing.assert_array_equal(grey[..., 0], np.asarray(Image.fromarray(colour[places[0]]).convert("L")))
    np.savez(path, x=colour[..., :1], y=np.repeat(["b", "a"], 20))
    found = load(config(path, channels=3, validation=0.0))
    assert found.classes == ("a", "b")
    assert (np.ptp(found.splits["test"].read(0), axis=-1) == 0).all()


@pytest.mark.parametrize(
    ("more", "options", "message"),
    [
        ({"x": np.zeros((40, 8, 8), np.float32)}, {}, "images are float32 .*accepted: uint8"),
        ({"x": np.zeros((40, 8, 8, 2), np.uint8)}, {}, r"images are uint8 \(40, 8, 8, 2\)"),
        ({"y": np.zeros(39, int)}, {}, r"labels is int64 \(39,\); accepted: whole numbers or text \[40\]"),
        ({"y": np.zeros(40)}, {}, r"labels is float64 \(40,\)"),
        ({"y": np.zeros(40, int)}, {}, "1 classes to train on"),
        ({"y": np.arange(40) % 4 - 1}, {}, "label -1 in classification"),
        ({"camera": np.zeros(40)}, {}, r"camera is float64 \(40,\); accepted: whole numbers \[40\]"),
        ({"split": np.repeat(["train", "dev"], 20)}, {}, "split 'dev'; accepted: train, validation, test"),
        ({"split": np.repeat("train", 40)}, {}, "no test images"),
        ({"class_names": np.array(["a", "b"])}, {}, r"class_names \(2,\) do not name its labels"),
        ({"y": np.arange(40), "split": np.repeat(["train", "test"], 20)}, {}, "no class has two images"),
        ({"y": np.arange(40) // 10, "split": np.repeat(["train", "test"], 20)}, {}, "test class 2 has no training image"),
        ({}, {"test": 0.0}, "no test images"),
    ],
)
def test_arrays_that_do_not_fit_are_one_line(tmp_path, more, options, message):
    with pytest.raises(UserError, match=message) as caught:
        load(config(arrays(tmp_path / "a.npz", **more), **options))
    assert "\n" not in str(caught.value)


def test_files_that_are_no_arrays(tmp_path):
    path = tmp_path / "a.npz"
    with pytest.raises(UserError, match="a.npz': not found; accepted: an .npz file"):
        load(config(path))
    path.write_bytes(b"PK\x03\x04 damaged")
    with pytest.raises(UserError, match="a.npz': not a readable .npz file"):
        load(config(path))
    np.savez(path, x=np.array([{}], object))
    with pytest.raises(UserError, match="a.npz': not a readable .npz file .*pickle"):
        load(config(path))
    np.savez(path, pixels=np.zeros(3))
    with pytest.raises(UserError, match="has pixels; accepted: an array image or images or x"):
        load(config(path))


def test_the_fingerprint_is_of_the_content(tmp_path):
    def print_of(path):
        load.cache_clear()
        return {name: split["sha256"] for name, split in load(config(path)).facts["splits"].items()}

    image = np.repeat(np.arange(40, dtype=np.uint8), 64).reshape(40, 8, 8)
    first = print_of(arrays(tmp_path / "a.npz"))
    assert first == print_of(arrays(tmp_path / "a.npz"))
    image[3, 0, 0] += 1
    changed = print_of(arrays(tmp_path / "a.npz", x=image))
    assert sum(first[name] != changed[name] for name in first) == 1


def test_a_split_travels_to_other_processes(tmp_path):
    split = load(config(arrays(tmp_path / "a.npz"))).splits["train"]
    assert greys(pickle.loads(pickle.dumps(split))) == greys(split)


def test_what_was_loaded_is_remembered(tmp_path):
    path = arrays(tmp_path / "a.npz")
    assert load(config(path)) is load(config(path))


# TFDS


def test_tfds(tmp_path):
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "mask.png").write_bytes(b"no picture, as nobody asks for it")

    class Trees(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        url_infos = {}  # nothing to download, so no list of checksums beside the code

        def _info(self):
            label = tfds.features.ClassLabel(names=["ash", "oak"])
            features = tfds.features.FeaturesDict({"image": tfds.features.Image(), "label": label, "mask": tfds.features.Image()})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, download_manager):
            return {"train": self._generate_examples(0, 20), "test": self._generate_examples(20, 26)}

        def _generate_examples(self, first, last):
            for i in range(first, last):
                Image.new("RGB", (9, 7), (i, i, i)).save(folder / f"{i}.png")
                yield i, {"image": str(folder / f"{i}.png"), "label": i % 2, "mask": str(folder / "mask.png")}

    builder = Trees(data_dir=str(tmp_path / "tfds"), file_format="array_record")
    builder.download_and_prepare()
    chosen = ImageConfig(source="tfds", path=str(builder.data_dir), size=(7, 9), channels=3)
    found = load(chosen)
    assert found.classes == ("ash", "oak")
    assert {name: len(split) for name, split in found.splits.items()} == {"train": 18, "validation": 2, "test": 6}
    assert sorted(greys(found.splits["test"])) == list(range(20, 26))
    assert [value % 2 for value in greys(found.splits["train"])] == found.splits["train"].labels.tolist()
    assert len(greys(pickle.loads(pickle.dumps(found.splits["test"])))) == 6


def test_a_tfds_dataset_that_is_not_prepared(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    for name in ("no_such_dataset", "caltech_birds2011"):
        with pytest.raises(UserError, match=f"data.path '{name}': no TFDS dataset prepared as array_record") as caught:
            load(ImageConfig(source="tfds", path=name))
        assert "\n" not in str(caught.value)


# Drawn letters


def test_glyphs():
    found = load(ImageConfig(classes=12, per_class=10, test_per_class=4, size=(20, 20)))
    assert len(found.classes) == 12
    assert {name: np.bincount(split.labels).tolist() for name, split in found.splits.items()} == {
        "train": [9] * 12, "validation": [1] * 12, "test": [4] * 12,
    }  # fmt: skip
    pictures = {name: {split.read(i).tobytes() for i in range(len(split))} for name, split in found.splits.items()}
    assert sum(map(len, pictures.values())) == len(set.union(*pictures.values())) == 12 * 14
    load.cache_clear()
    again = load(ImageConfig(classes=12, per_class=10, test_per_class=4, size=(20, 20)))
    assert again.facts == found.facts
    assert load(ImageConfig(classes=12, per_class=10, test_per_class=4, size=(20, 20), seed=1)).facts["splits"] != found.facts["splits"]


def test_glyphs_of_unseen_families():
    found = load(ImageConfig(classes=4, per_class=24, test_per_class=8, test_families=("stix",)))
    faces = {name: set(split.cameras.tolist()) for name, split in found.splits.items()}
    assert len(faces["train"]) == 12
    assert len(faces["test"]) == 4
    assert faces["train"].isdisjoint(faces["test"])
    for families in (("comic",), ("sans", "mono", "serif", "stix")):
        with pytest.raises(UserError, match="data.test_families: found .*accepted: some of sans, mono, serif, stix, not all"):
            load(ImageConfig(classes=4, test_families=families))


def test_glyphs_for_re_identification():
    found = load(ImageConfig(classes=20, per_class=16, test_per_class=8, task="reid", test=0.25, validation=0.2))
    train, validation, test = (found.splits[name] for name in ("train", "validation", "test"))
    assert (len(found.classes), len(train), len(validation), len(test)) == (12, 12 * 16, 3 * 16 * 2, 5 * 8 * 2)
    assert set(validation.labels.tolist()).isdisjoint(test.labels.tolist())
    assert (test.cameras >= 0).all()
    with pytest.raises(UserError, match="data.classes: found 9999; accepted: at most"):
        load(ImageConfig(classes=9999))


# Omniglot


@pytest.mark.skipif(not DATA, reason="JAXDISTILL_DATA is not set")
def test_omniglot():
    path = str(pathlib.Path(DATA) / "omniglot/omniglot_small12_28.npz")
    by_drawer = ImageConfig(source="npz", path=path, size=(28, 28), group="drawer", test_groups=tuple(range(11, 21)), validation=0.0)
    found = load(by_drawer)
    assert {name: len(split) for name, split in found.splits.items()} == {"train": 2420, "test": 2420}
    assert len(found.classes) == 242
    assert all((np.bincount(split.labels) == 10).all() for split in found.splits.values())
    assert found.splits["train"].read(0).shape == (28, 28, 1)
    fifty = load(dataclasses.replace(by_drawer, classes=50))
    assert {name: len(split) for name, split in fifty.splits.items()} == {"train": 500, "test": 500}
    by_alphabet = dataclasses.replace(by_drawer, group="alphabet", test_groups=(0, 1), task="reid")
    found = load(by_alphabet)
    owners = {name: set(split.labels.tolist()) for name, split in found.splits.items()}
    assert len(owners["train"]) + len(owners["test"]) == 242
    assert len(found.splits["train"]) == 20 * len(owners["train"])
    assert len(found.splits["test"]) == 2 * 20 * len(owners["test"])
    assert all(name.startswith(("Balinese", "Early_Aramaic")) is False for name in found.classes)


def test_a_batch_for_people(tmp_path):
    split = load(config(arrays(tmp_path / "a.npz"))).splits["train"]
    batch = {
        "image": np.stack([split.read(i) for i in range(3)]), "label": np.array([1, 3, 900]), "camera": np.array([4, 5, 6]),
        "valid": np.ones(3, bool), "row": np.arange(3), "partner": np.array([1, 2, 0]),
    }  # fmt: skip
    text = describe(batch, ("ash", "elm", "oak", "yew"))
    assert "3 images of 8 x 8 x 1" in text
    assert "row 0: label 1 (elm), camera 4, partner 1" in text
    assert "label 900 (no class)" in text


def test_the_mean_and_deviation_of_a_split(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (40, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "a.npz", x=pixels, y=np.arange(40) % 4)
    split = load(ImageConfig(source="npz", path=str(tmp_path / "a.npz"), size=(8, 8), channels=3)).splits["train"]
    mean, deviation = statistics(split)
    values = pixels[split.places] / 255
    np.testing.assert_allclose((mean, deviation), (values.mean((0, 1, 2)), values.std((0, 1, 2))), atol=6e-4)


def test_letters_are_not_mirrored():
    with pytest.raises(UserError, match="data.flip: found True; accepted: False with data.source 'glyphs'"):
        load(ImageConfig(flip=True))
