"""Published sets in the layouts they unpack to: what is read from each, and one line for whatever is missing or misformed."""

import numpy as np
import pytest
import scipy.io
from PIL import Image

from jaxdistill import UserError
from jaxdistill.data import images
from jaxdistill.data.images import ImageConfig, load


@pytest.fixture(autouse=True)
def fresh():
    load.cache_clear()
    yield
    load.cache_clear()


def picture(path, grey=100, size=(12, 10)):
    """A JPEG of one grey, `size` (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (grey, grey, grey)).save(path, quality=95)


def text(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def config(source, path, **options):
    return ImageConfig(**{"source": source, "path": str(path), "size": (8, 8), "channels": 3, "validation": 0.25} | options)


def shape(split):
    return {label: int(count) for label, count in zip(*np.unique(split.labels, return_counts=True), strict=True)}


def grey(split, i):
    return int(split.read(i).mean() + 0.5)


# Fine-grained sets


def write_cub(root, per_class=8):
    """Two classes, every fourth image in the test; image n has grey 10 n."""
    names = [f"{label}/bird_{i}.jpg" for label in ("001.Albatross", "002.Wren") for i in range(per_class)]
    for number, name in enumerate(names, 1):
        picture(root / "images" / name, 10 * number)
    text(root / "images.txt", *(f"{number} {name}" for number, name in enumerate(names, 1)))
    text(root / "image_class_labels.txt", *(f"{number} {1 + (number > per_class)}" for number in range(1, len(names) + 1)))
    text(root / "train_test_split.txt", *(f"{number} {int(number % 4 > 0)}" for number in range(1, len(names) + 1)))
    text(root / "classes.txt", "1 001.Albatross", "2 002.Wren")
    return root


@pytest.mark.parametrize("inside", ["", "CUB_200_2011"])
def test_cub(tmp_path, inside):
    write_cub(tmp_path / inside)
    found = load(config("cub", tmp_path))
    assert found.classes == ("001.Albatross", "002.Wren")
    assert {name: shape(split) for name, split in found.splits.items()} == {
        "train": {0: 4, 1: 4},  # of 6 a class
        "validation": {0: 2, 1: 2},
        "test": {0: 2, 1: 2},
    }
    test = found.splits["test"]
    assert test.names == tuple(f"images/{label}/bird_{i}.jpg" for label in found.classes for i in (3, 7))
    assert [grey(test, i) for i in range(4)] == [40, 80, 120, 160]
    assert (test.read(0).shape, test.read(0).dtype) == ((8, 8, 3), np.uint8)


def test_cub_first_classes(tmp_path):
    write_cub(tmp_path)
    for name in ("images.txt", "image_class_labels.txt", "train_test_split.txt"):
        with open(tmp_path / name, "a") as file:
            for number in range(17, 21):
                line = {"images.txt": f"003.Xema/bird_{number}.jpg", "image_class_labels.txt": "3", "train_test_split.txt": str(number % 2)}
                file.write(f"{number} {line[name]}\n")
    for number in range(17, 21):
        picture(tmp_path / f"images/003.Xema/bird_{number}.jpg")
    text(tmp_path / "classes.txt", "1 001.Albatross", "2 002.Wren", "3 003.Xema")
    assert len(load(config("cub", tmp_path)).classes) == 3
    two = load(config("cub", tmp_path, classes=2))
    assert two.classes == ("001.Albatross", "002.Wren")
    assert all(split.labels.max() == 1 for split in two.splits.values())


@pytest.mark.parametrize(
    ("file", "lines", "message"),
    [
        ("images.txt", None, "without images.txt"),
        ("images.txt", ["1 001.Albatross/none.jpg"], r"image 2 is not in it and in images.txt alike"),
        ("classes.txt", None, "classes.txt: No such file"),
        ("classes.txt", ["1 001.Albatross"], r"image_class_labels.txt: class 2, which is not in classes.txt"),
        ("image_class_labels.txt", ["1 one two", "x"], r"image_class_labels.txt, line 2: found 'x'"),
        ("train_test_split.txt", ["1 1"], r"train_test_split.txt: image 2 is not in it"),
        ("images/001.Albatross/bird_3.jpg", None, r"bird_3.jpg: No such file .*accepted: the image file that the data set lists"),
    ],
)
def test_cub_misformed(tmp_path, file, lines, message):
    write_cub(tmp_path)
    (tmp_path / file).unlink() if lines is None else text(tmp_path / file, *lines)
    refused(config("cub", tmp_path), message)


def refused(chosen, message):
    load.cache_clear()
    with pytest.raises(UserError, match=message) as caught:
        load(chosen)
    assert "\n" not in str(caught.value)


def annotations(**columns):
    """A MATLAB struct array, its boxes as in the published files."""
    rows = list(zip(*columns.values(), strict=True))
    array = np.empty((1, len(rows)), dtype=[("bbox_x1", object), *((name, object) for name in columns)])
    for i, row in enumerate(rows):
        array[0, i] = (np.uint16(1), *row)
    return array


def cells(*names):
    array = np.empty((1, len(names)), object)
    array[0] = names
    return array


CARS = ("Acura Integra Type R 2001", "Ram C/V Cargo Van Minivan 2012")


def write_cars(root, labels="devkit"):
    names = [f"{number:05}.jpg" for number in range(1, 9)]
    for folder in ("cars_train", "cars_test"):
        for number, name in enumerate(names, 1):
            picture(root / folder / name, 20 * number)
    (root / "devkit").mkdir()
    kinds = [np.uint8(number % 2 + 1) for number in range(1, 9)]
    scipy.io.savemat(root / "devkit/cars_meta.mat", {"class_names": cells(*CARS)})
    scipy.io.savemat(root / "devkit/cars_train_annos.mat", {"annotations": annotations(**{"class": kinds, "fname": names})})
    scipy.io.savemat(root / labels / "cars_test_annos_withlabels.mat", {"annotations": annotations(**{"class": kinds, "fname": names})})
    return root


@pytest.mark.parametrize("labels", ["devkit", "."])
def test_cars(tmp_path, labels):
    found = load(config("cars", write_cars(tmp_path, labels)))
    assert found.classes == CARS
    assert shape(found.splits["train"]) == {0: 3, 1: 3}
    assert shape(found.splits["test"]) == {0: 4, 1: 4}
    assert [grey(found.splits["test"], i) for i in range(8)] == list(range(20, 180, 20))
    assert found.splits["test"].labels.tolist() == [1, 0] * 4


def test_cars_in_the_older_layout(tmp_path):
    names = [f"car_ims/{number:06}.jpg" for number in range(1, 13)]
    for number, name in enumerate(names, 1):
        picture(tmp_path / name, 10 * number)
    columns = {"relative_im_path": names, "class": [np.uint8(n % 2 + 1) for n in range(12)], "test": [np.uint8(n >= 8) for n in range(12)]}
    scipy.io.savemat(tmp_path / "cars_annos.mat", {"annotations": annotations(**columns), "class_names": cells(*CARS)})
    found = load(config("cars", tmp_path))
    assert found.classes == CARS
    assert found.splits["test"].names == tuple(names[8:])
    assert shape(found.splits["train"]) == {0: 3, 1: 3}


def test_cars_misformed(tmp_path):
    write_cars(tmp_path)
    scipy.io.savemat(tmp_path / "devkit/cars_test_annos_withlabels.mat", {"annotations": annotations(fname=["00001.jpg"])})
    refused(config("cars", tmp_path), r"annotations have no 'class' \(labels of the test are in cars_test_annos_withlabels.mat\)")
    (tmp_path / "devkit/cars_test_annos_withlabels.mat").unlink()
    refused(config("cars", tmp_path), "cars_test_annos_withlabels.mat: No such file")
    scipy.io.savemat(tmp_path / "devkit/cars_meta.mat", {"class_names": cells(CARS[0])})
    refused(config("cars", tmp_path), "cars_train_annos.mat: class 2, which is not in class_names")
    (tmp_path / "devkit/cars_meta.mat").write_bytes(b"MATLAB")
    refused(config("cars", tmp_path), "cars_meta.mat: not a readable MATLAB file")


def test_aircraft_trains_on_train_and_val_and_loses_its_banner(tmp_path):
    for part, numbers in (("train", range(6)), ("val", range(6, 12)), ("test", range(12, 16))):
        text(tmp_path / f"data/images_variant_{part}.txt", *(f"{n:07} {('A330-200', 'F-16A/B')[n % 2]}" for n in numbers))
        for n in numbers:
            image = np.full((60, 80, 3), 10 * n, np.uint8)
            image[-20:] = 255
            (tmp_path / "data/images").mkdir(exist_ok=True)
            Image.fromarray(image).save(tmp_path / f"data/images/{n:07}.jpg", quality=95)
    found = load(config("aircraft", tmp_path))
    assert found.classes == ("A330-200", "F-16A/B")
    assert {name: len(split) for name, split in found.splits.items()} == {"train": 8, "validation": 4, "test": 4}
    test = found.splits["test"]
    assert [abs(grey(test, i) - 10 * (12 + i)) <= 1 for i in range(4)] == [True] * 4
    assert test.picture(0).size == (40, 20)  # decoded at half its 80 x 60, of which 20 rows are the banner
    text(tmp_path / "data/images_variant_val.txt", "A330-200 1")
    refused(config("aircraft", tmp_path), "images_variant_val.txt, line 1: found 'A330-200 1'")


# Re-identification sets


def write_market(root, train="bounding_box_train", query="query", gallery="bounding_box_test", name="{:04d}_c{}s1_{:06d}_03.jpg"):
    for identity in (2, 7, 10, 11):
        for camera in (1, 2, 6):
            picture(root / train / name.format(identity, camera, 5), identity)
    for camera in (1, 3):
        picture(root / query / name.format(20, camera, 9), 20)
        picture(root / gallery / name.format(20, camera, 10), 20)
    picture(root / gallery / name.format(0, 4, 11), 3)
    picture(root / gallery / ("-1" + name.format(0, 5, 12)[4:]), 4)
    (root / train / "Thumbs.db").write_bytes(b"")
    return root


def test_market1501(tmp_path):
    found = load(config("market1501", write_market(tmp_path)))
    assert found.facts["task"] == config("market1501", tmp_path).task == "reid"
    train, validation, test = (found.splits[name] for name in ("train", "validation", "test"))
    assert len(found.classes) == 3
    assert shape(train) == {0: 3, 1: 3, 2: 3}
    assert [found.classes[label] for label in train.labels] == [str(int(name.split("/")[1][:4])) for name in train.names]
    assert sorted(set(train.cameras.tolist())) == [1, 2, 6]
    assert test.labels.tolist() == [20, 20, -1, 0, 20, 20]
    assert test.cameras.tolist() == [1, 3, 5, 4, 1, 3]
    assert test.gallery.tolist() == [False] * 2 + [True] * 4
    assert len(set(validation.labels.tolist())) == 1  # one identity of four, each image a query once and in the gallery once
    assert validation.gallery.tolist() == [False] * 3 + [True] * 3
    assert validation.names[:3] == validation.names[3:]
    assert set(train.names).isdisjoint(validation.names)
    assert found.facts["splits"]["test"] | {"sha256": ""} == {"sha256": "", "images": 6, "classes": 2, "cameras": 4, "queries": 2}


@pytest.mark.parametrize(
    ("source", "folders", "name"),
    [
        ("duke", ("bounding_box_train", "query", "bounding_box_test"), "{:04d}_c{}_f{:07d}.jpg"),
        ("veri776", ("image_train", "image_query", "image_test"), "{:04d}_c{:03d}_{:08d}_0.jpg"),
    ],
)
def test_sets_that_are_named_alike(tmp_path, source, folders, name):
    found = load(config(source, write_market(tmp_path, *folders, name)))
    assert sorted(set(found.splits["train"].cameras.tolist())) == [1, 2, 6]
    assert found.splits["test"].labels.tolist() == [20, 20, -1, 0, 20, 20]


def test_market1501_misformed(tmp_path):
    write_market(tmp_path)
    picture(tmp_path / "query/pedestrian.jpg")
    refused(config("market1501", tmp_path), "pedestrian.jpg: its name tells no identity; accepted: as in 0002_c1s1")
    (tmp_path / "query/pedestrian.jpg").unlink()
    for path in (tmp_path / "query").iterdir():
        path.unlink()
    refused(config("market1501", tmp_path), "gallery without query")
    (tmp_path / "query").rmdir()
    refused(config("market1501", tmp_path), "query: No such file or directory")
    refused(config("market1501", tmp_path / "nowhere"), "nowhere': not found; accepted: the folder that the market1501 set unpacks to")


def write_msmt17(root, train="train", test="test"):
    """Five identities, four images of each in both folders under the same names: grey from 100 on where they train."""
    lists = {"train": [], "val": [], "query": [], "gallery": []}
    for identity in range(5):
        for i in range(4):
            name = f"{identity:04}/{identity:04}_{i:03}_{i + 5:02}_0303morning_0015_0.jpg"
            picture(root / train / name, 100 + 20 * identity + i)
            picture(root / test / name, 20 * identity + i)
            lists["val" if i == 3 else "train"].append(f"{name} {identity}")
            lists["query" if i == 0 else "gallery"].append(f"{name} {identity}")
    for name, lines in lists.items():
        text(root / f"list_{name}.txt", *lines)
    return root


@pytest.mark.parametrize("version", [("train", "test"), ("mask_train_v2", "mask_test_v2")])
def test_msmt17(tmp_path, version):
    found = load(config("msmt17", write_msmt17(tmp_path, *version)))
    for name, split in found.splits.items():  # of one name, two pictures
        greys = [np.asarray(split.picture(i)).mean() for i in range(len(split))]
        assert max(greys) < 98 if name == "test" else min(greys) > 98
    assert len(found.classes) == 4  # of 5 identities one validates
    assert all(count == 4 for count in shape(found.splits["train"]).values())  # train and val alike
    test = found.splits["test"]
    assert (len(test), int(test.gallery.sum())) == (20, 15)
    assert sorted(set(test.cameras.tolist())) == [5, 6, 7, 8]
    text(tmp_path / "list_query.txt", "0000/unnamed.jpg 0")
    refused(config("msmt17", tmp_path), "list_query.txt: 0000/unnamed.jpg tells no camera")
    (tmp_path / "list_query.txt").unlink()
    refused(config("msmt17", tmp_path), "list_query.txt: No such file")


# Folders of classes


def write_folder(root, labels=("ash", "oak"), count=6, name="{}.jpg"):
    for label in labels:
        for i in range(count):
            picture(root / label / name.format(i), 20 * i)
    return root


def test_folders_of_classes_are_split_by_name(tmp_path):
    write_folder(tmp_path, count=10)
    (tmp_path / "ash/notes.txt").write_text("")
    (tmp_path / ".git/x").mkdir(parents=True)
    found = load(config("folder", tmp_path, test=0.3, validation=0.3))
    assert found.classes == ("ash", "oak")
    assert {name: shape(split) for name, split in found.splits.items()} == {
        "train": {0: 5, 1: 5}, "validation": {0: 2, 1: 2}, "test": {0: 3, 1: 3},
    }  # fmt: skip
    assert sorted(sum((split.names for split in found.splits.values()), ())) == sorted(
        f"{label}/{i}.jpg" for label in ("ash", "oak") for i in range(10)
    )


def test_an_image_keeps_its_side_when_classes_come(tmp_path):
    write_folder(tmp_path)
    before = set(load(config("folder", tmp_path)).splits["test"].names)
    load.cache_clear()
    write_folder(tmp_path, ("elm",))
    after = set(load(config("folder", tmp_path)).splits["test"].names)
    assert before < after


@pytest.mark.parametrize("validation", ["val", "validation", None])
def test_folders_that_are_split(tmp_path, validation):
    for part, count in (("train", 6), ("test", 2), *([(validation, 3)] if validation else [])):
        write_folder(tmp_path / part, count=count)
    found = load(config("folder", tmp_path))
    assert len(found.splits["test"]) == 4
    assert len(found.splits["train"]) == (12 if validation else 8)
    assert len(found.splits["validation"]) == (6 if validation else 4)


def test_without_a_validation_share_there_is_no_validation(tmp_path):
    write_folder(tmp_path / "train")
    write_folder(tmp_path / "test")
    found = load(config("folder", tmp_path, validation=0.0))
    assert {name: len(split) for name, split in found.splits.items()} == {"train": 12, "test": 12}


@pytest.mark.parametrize(("name", "cameras"), [("{}.jpg", 0), ("x_c{}.jpg", 4)])
def test_folders_of_identities(tmp_path, name, cameras):
    write_folder(tmp_path, [f"person {i}" for i in range(10)], 4, name)
    found = load(config("folder", tmp_path, task="reid", test=0.3, validation=0.2))
    train, validation, test = (found.splits[name] for name in ("train", "validation", "test"))
    assert (len(train), len(validation), len(test)) == (24, 4 * 2, 12 * 2)
    assert len(found.classes) == 6
    assert found.facts["splits"]["test"]["cameras"] == cameras
    owners = [{name.split("/")[0] for name in split.names} for split in (train, validation, test)]
    assert sum(map(len, owners)) == len(set.union(*owners)) == 10
    assert test.names[:12] == test.names[12:]
    np.testing.assert_array_equal(test.cameras[:12], test.cameras[12:])  # a query's own copy is of its own camera
    assert len(set(test.cameras.tolist())) == (cameras or 12)
    assert [f"person {label}" for label in test.labels] == [name.split("/")[0] for name in test.names]


def test_folders_that_do_not_fit(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(config("folder", empty), "no image in it")
    refused(config("folder", tmp_path / "none"), "not found")
    write_folder(tmp_path / "mixed", ("ash", "train"))
    refused(config("folder", tmp_path / "mixed"), "found ash, train; accepted: either folders of classes or val, train")
    write_folder(tmp_path / "one", ("ash",))
    refused(config("folder", tmp_path / "one"), "1 classes to train on .*accepted: two or more")
    write_folder(tmp_path / "apart/train")
    write_folder(tmp_path / "apart/test", ("ash", "yew"))
    refused(config("folder", tmp_path / "apart"), "test class 'yew' has no training image")
    write_folder(tmp_path / "half/train")
    refused(config("folder", tmp_path / "half"), "no test images")
    write_folder(tmp_path / "people/train", "abcde")
    write_folder(tmp_path / "people/query", "xyz")
    refused(config("folder", tmp_path / "people", task="reid"), "query without gallery")
    write_folder(tmp_path / "people/gallery", "xyz")
    refused(config("folder", tmp_path / "people"), "query and gallery images .*accepted: data.task 'reid'")
    write_folder(tmp_path / "few", count=1)
    refused(config("folder", tmp_path / "few"), "data.validation: found 0.25, and no class has two images")
    refused(config("folder", tmp_path / "few", validation=0.0), "no test images")


def print_of(root):
    load.cache_clear()
    return {name: split["sha256"] for name, split in load(config("folder", root)).facts["splits"].items()}


def test_the_fingerprint_is_of_names_labels_and_sizes_and_of_no_place(tmp_path):
    first = print_of(write_folder(tmp_path / "a"))
    assert first == print_of(write_folder(tmp_path / "b"))
    (tmp_path / "b/oak/3.jpg").write_bytes((tmp_path / "b/oak/3.jpg").read_bytes() + b" ")
    assert first != print_of(tmp_path / "b")


@pytest.mark.parametrize("suffix", [".bmp", ".ppm", ".pgm", ".tif"])
@pytest.mark.parametrize("side", [4, 100])  # smaller and larger than what is read of a file
@pytest.mark.parametrize("at", [0, -1])
def test_the_fingerprint_tells_pictures_of_one_size_apart(suffix, side, at, tmp_path):
    pixels = np.zeros((side, side, 3), np.uint8)[..., slice(None) if suffix != ".pgm" else 0]

    def draw(value):
        pixels[at, at] = value
        for name in ("ash", "oak"):
            (tmp_path / name).mkdir(exist_ok=True)
            for i in range(8):
                Image.fromarray(pixels).save(tmp_path / name / f"{i}{suffix}")
        return (tmp_path / f"oak/0{suffix}").stat().st_size, print_of(tmp_path)

    (size, first), (same, other) = draw(0), draw(1)
    assert size == same
    assert first != other


def test_every_source_of_the_config_is_a_function():
    assert set(images.SOURCES) == {"glyphs", "npz", "tfds", "folder", "cub", "cars", "aircraft", "market1501", "duke", "msmt17", "veri776"}
