"""What is drawn, and what an image is in re-identification: whatever its file, folder or camera is called."""

import numpy as np
import pytest
from PIL import Image

from jaxdistill import UserError
from jaxdistill.data.images import ImageConfig, load


def test_a_split_does_not_depend_on_what_the_file_is_called(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        rng = np.random.default_rng(0)
        np.savez(tmp_path / f"{name}.npz", x=rng.integers(0, 255, (40, 8, 8), np.uint8), y=np.arange(40) % 4)
    one, other = (load(ImageConfig(source="npz", path=str(tmp_path / f"{name}.npz"), size=(8, 8))) for name in "ab")
    for split in one.splits:
        np.testing.assert_array_equal(one.splits[split].places, other.splits[split].places)


def test_cameras_of_some_images_only(tmp_path):
    for name, camera in (("some", [0, 1, -1, 1] * 10), ("none", [-2] * 40)):
        np.savez(tmp_path / f"{name}.npz", x=np.zeros((40, 8, 8), np.uint8), y=np.arange(40) // 4, camera=np.asarray(camera))
    config = dict(source="npz", task="reid", size=(8, 8))
    with pytest.raises(UserError, match="found no camera, where other train images have one; accepted: cameras of all images, or of none"):
        load(ImageConfig(path=str(tmp_path / "some.npz"), **config))
    test = load(ImageConfig(path=str(tmp_path / "none.npz"), **config)).splits["test"]
    assert len(set(test.cameras.tolist())) == (~test.gallery).sum()  # each of its own: a query's copy is excluded


def test_a_folder_of_junk_is_junk(tmp_path):
    """As in Market-1501: -1 is nobody, and trains no class."""
    for split, labels in (("train", ("-1", "0002", "0007")), ("query", ("0011",)), ("gallery", ("-1", "0000", "0011"))):
        for label in labels:
            (tmp_path / split / label).mkdir(parents=True)
            for camera in (1, 2):
                Image.new("L", (8, 8), 20 * camera).save(tmp_path / split / label / f"{label}_c{camera}_{split}.png")
    found = load(ImageConfig(source="folder", path=str(tmp_path), task="reid", size=(8, 8), validation=0.0))
    assert found.classes == ("0002", "0007")
    test = found.splits["test"]
    assert (test.labels < 0).tolist() == ["/-1/" in name for name in test.names]
    assert (test.labels < 0).sum() == 2


def test_queries_that_can_find_nothing_are_told_before_any_training(tmp_path):
    """Every identity was taken by one camera of its own: all of its gallery images are left out by the same-camera rule."""
    label = np.arange(40) // 4
    np.savez(tmp_path / "a.npz", x=np.zeros((40, 8, 8), np.uint8), y=label, camera=label)
    with pytest.raises(UserError, match=r"other test images: none of 8 queries has an image of its identity in the gallery that another"):
        load(ImageConfig(path=str(tmp_path / "a.npz"), source="npz", task="reid", size=(8, 8), validation=0.0))


@pytest.mark.parametrize(("name", "what"), [("y", "identity"), ("camera", "camera")])
def test_numbers_that_would_wrap_around(name, what, tmp_path):
    arrays = {"x": np.zeros((40, 8, 8), np.uint8), "y": np.arange(40) // 4, "camera": np.arange(40) % 4}
    np.savez(tmp_path / "a.npz", **arrays | {name: arrays[name] + 2**31})
    with pytest.raises(UserError, match=rf"image \d+: {what} 21474836\d\d; accepted: numbers below 2\^31"):
        load(ImageConfig(path=str(tmp_path / "a.npz"), source="npz", task="reid", size=(8, 8), validation=0.0))
