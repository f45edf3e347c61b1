"""Drawn actions: deterministic, bodies that hold together, people who differ, and differences that only time tells."""

import dataclasses

import numpy as np
import pytest

from jaxdistill import UserError
from jaxdistill.data import actions
from jaxdistill.data.actions import CLASSES, Difficulty, draw

CALM = Difficulty(build=0.0, posture=0.0, manner=0.0, tempo=(1.0, 1.0), haste=0.0, effort=0.0, fidget=0.0, view=0.0, pitch=0.0, place=0.0,
                  noise=(0.0, 0.0))  # fmt: skip
NAMES = list(CLASSES)
BONES = ((0, 1), (1, 20), (20, 2), (2, 3), (20, 4), (4, 5), (5, 6), (6, 7), (7, 21), (20, 8), (8, 9), (9, 10), (10, 11), (11, 23), (0, 12),
         (12, 13), (13, 14), (14, 15), (0, 16), (16, 17), (17, 18), (18, 19))  # fmt: skip


@pytest.fixture(scope="module")
def small():
    return draw(subjects=4, takes=2, seed=0)


def test_shapes_and_order(small):
    assert len(CLASSES) == 50
    assert small.x.shape == (400, 60, 25, 3)
    assert small.x.dtype == np.float32
    assert np.isfinite(small.x).all()
    assert small.label.tolist() == np.repeat(np.arange(50), 8).tolist()
    assert small.subject.tolist() == np.tile(np.repeat(np.arange(4), 2), 50).tolist()
    assert small.take.tolist() == [0, 1] * 200
    assert all(column.dtype == np.int32 for column in small[1:])
    assert set(small.length.tolist()) == set(range(30, 61))
    beyond = np.arange(60)[None] >= small.length[:, None]
    assert (small.x[beyond] == 0).all()
    assert (np.abs(small.x[~beyond]).max(axis=(1, 2)) > 0.5).all()  # none of the frames is empty


def test_a_sequence_is_a_function_of_its_numbers_alone(small):
    again = draw(subjects=4, takes=2, seed=0)
    np.testing.assert_array_equal(small.x, again.x)
    fewer = draw(classes=7, subjects=3, takes=1, seed=0)  # no other sequence has a part in it
    for label, subject in ((0, 0), (6, 2), (3, 1)):
        one = (small.label == label) & (small.subject == subject) & (small.take == 0)
        other = (fewer.label == label) & (fewer.subject == subject)
        np.testing.assert_array_equal(small.x[one], fewer.x[other])
    many = draw(classes=2, subjects=40, takes=2, seed=0)  # more than a chunk
    np.testing.assert_array_equal(many.x[(many.subject < 4)], small.x[small.label < 2])


def test_seeds_and_takes_share_no_draw(small):
    other = draw(subjects=4, takes=2, seed=1)
    assert np.abs(small.x - other.x).max(axis=(1, 2, 3)).min() > 0.05
    first, second = (small.x[small.take == take] for take in (0, 1))
    assert np.abs(first - second).max(axis=(1, 2, 3)).min() > 0.05


def lengths(points: np.ndarray, bones=BONES) -> np.ndarray:
    """[..., 25, 3] -> [..., bones]"""
    return np.stack([np.linalg.norm(points[..., a, :] - points[..., b, :], axis=-1) for a, b in bones], axis=-1)


def test_bones_keep_their_length_whatever_the_movement():
    calm = dataclasses.replace(Difficulty(), noise=(0.0, 0.0))
    found = draw(subjects=3, takes=2, seed=0, difficulty=calm)
    person = {}
    for x, length, subject in zip(found.x, found.length, found.subject.tolist(), strict=True):
        bones = lengths(x[:length])
        person.setdefault(subject, bones[0])
        np.testing.assert_allclose(bones, np.broadcast_to(person[subject], bones.shape), atol=2e-6)
    arms = [each[6] for each in person.values()]
    assert max(arms) - min(arms) > 0.005  # people differ in build


def test_a_mirrored_action_is_the_mirror_image():
    """Without what is drawn per joint, the left action is the right one in a mirror."""
    found = draw(subjects=1, takes=1, seed=0, difficulty=dataclasses.replace(CALM, length=(60, 60)))
    mirror = list(range(25))
    for left, right in actions.RIGHT.items():
        mirror[left], mirror[right] = right, left

    def shape(name):  # of joints about the base of the spine, whenever it happens
        x = found.x[NAMES.index(name)]
        return x - x[:, :1]

    for name in ("raise, right", "circle forwards, right", "kick aside, right", "throw, right"):
        right, left = shape(name), shape(name.replace("right", "left"))
        flipped = right[:, mirror] * np.asarray([-1, 1, 1], np.float32)
        spread = lambda x: np.sort(x.reshape(60, -1).std(axis=0))  # noqa: E731
        np.testing.assert_allclose(spread(flipped), spread(left), atol=0.03)
        assert np.abs(left[:, [7, 15]]).std(axis=0).max() > 5 * np.abs(left[:, [11, 19]]).std(axis=0).max()  # the left alone moves


def test_every_action_moves_and_no_two_are_the_same():
    found = draw(subjects=1, takes=1, seed=0, difficulty=dataclasses.replace(CALM, length=(60, 60)))
    assert (found.x.std(axis=1).max(axis=(1, 2)) > 0.03).all()
    assert len(set(CLASSES.values())) == 50


def test_some_actions_differ_in_time_alone():
    """Forwards and backwards go through the same poses; a hand's turning direction tells which."""
    found = draw(subjects=6, takes=2, seed=0, difficulty=dataclasses.replace(CALM, length=(60, 60)))

    def turning(name):
        hand = found.x[found.label == NAMES.index(name)][:, :, 11] - found.x[found.label == NAMES.index(name)][:, :, 8]
        x, z = (hand[..., i] - hand[..., i].mean(axis=1, keepdims=True) for i in (0, 2))
        return (x[:, :-1] * z[:, 1:] - z[:, :-1] * x[:, 1:]).sum(axis=1)

    one, other = turning("circle forwards, right"), turning("circle backwards, right")
    assert len(set(np.sign(one).tolist())) == len(set(np.sign(other).tolist())) == 1
    assert np.sign(one[0]) == -np.sign(other[0])


def test_sines_and_normal_numbers():
    turns = np.linspace(-3, 3, 10_001)
    np.testing.assert_allclose(actions._sine(turns), np.sin(2 * np.pi * turns), atol=2e-9)
    np.testing.assert_allclose(actions._cosine(turns), np.cos(2 * np.pi * turns), atol=2e-9)
    drawn = actions._normal(actions._key(0, np.arange(50)), 4000)
    assert abs(drawn.mean()) < 0.01
    assert drawn.std() == pytest.approx(1, abs=0.01)
    uniform = actions._uniform(actions._key(0, np.arange(50)), 4000, 1)
    assert np.histogram(uniform, 10, (0, 1))[0] == pytest.approx(20_000, rel=0.03)
    assert abs(np.corrcoef(uniform[:-1].ravel(), uniform[1:].ravel())[0, 1]) < 0.01


@pytest.mark.parametrize(("options", "said"), [
    ({"classes": 51}, "config key data.classes: found 51; accepted: 2 to 50"),
    ({"classes": 1}, "config key data.classes: found 1; accepted: 2 to 50"),
    ({"takes": 0}, "config key data.takes: found 0; accepted: 1 to"),
])  # fmt: skip
def test_sizes_that_do_not_fit_are_one_line(options, said):
    with pytest.raises(UserError, match=said):
        draw(seed=0, **options)
