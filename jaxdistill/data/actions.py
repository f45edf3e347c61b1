"""Skeleton actions from nothing: 50 movements of 25 joints, by people who differ in build, tempo and manner.

An action is a few limb motions (which joint turns, how far, how often, when, once or again and again). Some differ only in side, in
order, in direction, or in whether limbs move together or in turn. The joints are those of the second Kinect, in metres.

A sequence is a pure function of (seed, action, subject, take), the same on every machine: every random number is a hash, and no
library function whose last bit may differ between processors or versions is called (sines, matrix products, a generator's stream).
"""

import dataclasses
import math
from typing import NamedTuple

import numpy as np

from jaxdistill import UserError

JOINTS, FRAMES = 25, 60
# Standing, metres: x to the person's left, y up, z ahead. Left first, then the joints of the right mirrored.
SPINE = {0: (0, 0, 0), 1: (0, 0.25, 0), 20: (0, 0.5, 0), 2: (0, 0.56, 0), 3: (0, 0.72, 0.03)}
ARM = {4: (0.18, 0.48, 0), 5: (0.2, 0.2, 0), 6: (0.21, -0.06, 0.01), 7: (0.21, -0.14, 0.02), 21: (0.21, -0.22, 0.03),
       22: (0.2, -0.16, 0.07)}  # fmt: skip
LEG = {12: (0.09, -0.04, 0), 13: (0.1, -0.46, 0), 14: (0.1, -0.88, 0), 15: (0.12, -0.94, 0.13)}
RIGHT = {4: 8, 5: 9, 6: 10, 7: 11, 21: 23, 22: 24, 12: 16, 13: 17, 14: 18, 15: 19}
UPPER = (1, 2, 3, 20, 4, 5, 6, 7, 21, 22, 8, 9, 10, 11, 23, 24)


def _turns() -> dict[str, tuple[int, tuple[int, ...], int, int]]:
    """Name -> (joint that turns, joints that turn with it, axis, sign), from the hands and feet inwards: the joint that turns is
    then still where it is at rest."""
    found = {}
    for name, joint, moved, axis, sign in (
        ("elbow", 5, (6, 7, 21, 22), 0, -1), ("rotate", 4, (5, 6, 7, 21, 22), 1, 1), ("spread", 4, (5, 6, 7, 21, 22), 2, 1),
        ("raise", 4, (5, 6, 7, 21, 22), 0, -1), ("knee", 13, (14, 15), 0, 1), ("straddle", 12, (13, 14, 15), 2, 1),
        ("hip", 12, (13, 14, 15), 0, -1),
    ):  # fmt: skip
        found[f"left {name}"] = joint, moved, axis, sign
        found[f"right {name}"] = RIGHT[joint], tuple(RIGHT[each] for each in moved), axis, sign if axis == 0 else -sign
    trunk = {name: (0, UPPER, axis, 1) for axis, name in enumerate(("bend", "twist", "lean"))}
    return found | {"nod": (2, (3,), 0, 1), "tilt": (2, (3,), 2, 1), **trunk, "yaw": (0, tuple(range(1, JOINTS)), 1, 1)}


TURNS = _turns()
SHIFTS = {"aside": 0, "jump": 1, "ahead": 2}  # of the whole body, along an axis


class Motion(NamedTuple):
    """of: a key of TURNS or SHIFTS. size: turns, or metres. cycles: in 45 frames at normal tempo; 0: once. phase: of a cycle.
    swing: to both sides of rest; else from rest to `size` and back."""

    of: str
    size: float
    cycles: float = 0.0
    phase: float = 0.0
    swing: bool = False


def _classes() -> dict[str, tuple[Motion, ...]]:
    """Name -> motions of the 50 actions."""
    found = {}
    circle = Motion("raise", 0.13, 2, swing=True)
    for name, motions in {
        "raise": [Motion("raise", 0.3, 2)], "spread": [Motion("spread", 0.25, 2)], "curl": [Motion("elbow", 0.33, 2)],
        "wave": [Motion("elbow", 0.3, 2), Motion("spread", 0.2, 2, 0.25)],
        "circle forwards": [circle, Motion("spread", 0.25, 2)], "circle backwards": [circle, Motion("spread", 0.25, 2, 0.5)],
    }.items():  # fmt: skip
        for side, moved in {"right": {"right": 0.0}, "left": {"left": 0.0}, "both": {"right": 0.0, "left": 0.0},
                            "in turn": {"right": 0.0, "left": 0.5}}.items():  # fmt: skip
            found[f"{name}, {side}"] = [m._replace(of=f"{arm} {m.of}", phase=m.phase + p) for arm, p in moved.items() for m in motions]
    for name, first, second in (("throw", "elbow", "raise"), ("fend", "raise", "elbow")):  # the same two, one after the other
        for side in (("right",), ("left",), ("right", "left")):
            found[f"{name}, {' and '.join(side)}"] = [
                m for arm in side for m in (Motion(f"{arm} {first}", 0.3, 0, -0.35), Motion(f"{arm} {second}", 0.3, 0, 0.35))]
    step = lambda leg, phase: [Motion(f"{leg} hip", 0.22, 2, phase), Motion(f"{leg} knee", 0.25, 2, phase)]  # noqa: E731
    for side in ("right", "left"):
        found[f"kick, {side}"] = [Motion(f"{side} hip", 0.24)]
        found[f"kick aside, {side}"] = [Motion(f"{side} straddle", 0.18)]
        found[f"knee up, {side}"] = step(side, 0.0)
    march = step("right", 0.0) + step("left", 0.5)
    squat = [Motion(f"{side} {joint}", size, 1.5) for side in ("right", "left") for joint, size in (("hip", 0.2), ("knee", 0.34))]
    jack = [Motion(f"{side} {joint}", size, 2) for side in ("right", "left") for joint, size in (("spread", 0.42), ("straddle", 0.08))]
    return found | {
        "march": march, "walk": march + [Motion("left raise", 0.1, 2, 0.0, True), Motion("right raise", 0.1, 2, 0.5, True)],
        "amble": march + [Motion("left raise", 0.1, 2, 0.5, True), Motion("right raise", 0.1, 2, 0.0, True)],
        "squat": squat, "jump": [Motion("jump", 0.3, 2)], "squat jump": squat + [Motion("jump", 0.3, 1.5, 0.5)], "jumping jack": jack,
        "bow": [Motion("bend", 0.22)], "bow again and again": [Motion("bend", 0.22, 2)], "lean": [Motion("lean", 0.08, 2, 0.0, True)],
        "twist": [Motion("twist", 0.13, 2, 0.0, True)], "roll": [Motion("lean", 0.08, 2, 0.0, True), Motion("bend", 0.15, 2)],
        "step ahead": [Motion("ahead", 0.5), *step("right", 0.0)], "step aside": [Motion("aside", 0.5)],
    }


CLASSES = {name: tuple(motions) for name, motions in _classes().items()}


@dataclasses.dataclass(frozen=True)
class Difficulty:
    """What differs between people and takes: each value is drawn uniformly, from (least, most) or from as much either way.

    With these defaults, 50 actions by 16 people twice each, tested on four who never train, the nearest neighbour by cosine is right
    in 39 % and logistic regression in 64 %, given what `sequences.features` tells (mean of the seeds 0 to 2)."""

    build: float = 0.12  # of the length of arms, legs and trunk, each
    posture: float = 0.02  # turns by which a person's joints rest elsewhere
    manner: float = 0.35  # of the size of a person's motions, each
    tempo: tuple[float, float] = (0.7, 1.4)  # of a person
    haste: float = 0.15  # of the tempo of a take
    effort: float = 0.2  # of the size of all motions of a take
    fidget: float = 0.06  # turns: each joint sways by up to this, most by much less
    view: float = 0.12  # turns by which the camera stands to the side
    pitch: float = 0.03  # turns by which it looks up or down
    place: float = 0.15  # metres from the middle of the picture
    noise: tuple[float, float] = (0.01, 0.03)  # standard deviation of a coordinate, metres
    length: tuple[int, int] = (30, 60)  # frames


class Actions(NamedTuple):
    """x: float32 [N, 60, 25, 3], zero beyond each length. length, label, subject, take: int32 [N]."""

    x: np.ndarray
    length: np.ndarray
    label: np.ndarray
    subject: np.ndarray
    take: np.ndarray


def draw(*, classes: int = 50, subjects: int = 16, takes: int = 2, seed: int, difficulty: Difficulty = Difficulty()) -> Actions:
    """Every action of the first `classes`, `takes` times by each of `subjects` people, in that order. A person is the same in all of
    them; different seeds share no person and no draw.

    Raises:
      UserError: more classes than there are.
    """
    for name, value, least, most in (("classes", classes, 2, len(CLASSES)), ("subjects", subjects, 1, 2**20), ("takes", takes, 1, 2**20)):
        if not least <= value <= most:
            raise UserError(f"config key data.{name}: found {value}; accepted: {least} to {most}")
    label, subject, take = (np.asarray(each).ravel() for each in np.meshgrid(*map(np.arange, (classes, subjects, takes)), indexing="ij"))
    each = subjects * takes
    x, length = np.empty((len(label), FRAMES, JOINTS, 3), np.float32), np.empty(len(label), np.int32)
    for at, motions in enumerate(list(CLASSES.values())[:classes]):
        for start in range(at * each, (at + 1) * each, 64):  # so few that the arrays of a step stay in the processor's cache
            part = slice(start, min(start + 64, (at + 1) * each))
            x[part], length[part] = _perform(motions, at, subject[part], take[part], seed, difficulty)
    return Actions(x, length, *(column.astype(np.int32) for column in (label, subject, take)))


def _perform(motions, label: int, subject: np.ndarray, take: np.ndarray, seed: int, d: Difficulty) -> tuple[np.ndarray, np.ndarray]:
    """One action by each (subject, take): ([n, FRAMES, JOINTS, 3], lengths [n])."""
    names = (*TURNS, *SHIFTS)
    person, this = _key(seed, 1, subject), _key(seed, 2, label, subject, take)
    builds, postures, manners = _centred(person, 3, 1), _centred(person, len(names), 2), _centred(person, len(names), 3)
    tempo = _between(_uniform(person, 1, 4), *d.tempo)
    once = _uniform(this, 10, 5)
    start, middle, hasty, effort, yaw, pitch, x0, y0, noise, share = np.moveaxis(once, 1, 0)[..., None]
    length = (d.length[0] + (share[:, 0] * (d.length[1] - d.length[0] + 1)).astype(np.int64)).astype(np.int32)

    frame = np.arange(FRAMES, dtype=np.float64)[None]
    time = frame / 45 * tempo * (1 + d.haste * (2 * hasty - 1))  # in units that cycles are counted in
    centre = (0.3 + 0.4 * middle) * length[:, None]
    shot = (frame - centre) / 45 * tempo * 2.2  # a motion that happens once takes 45 / 2.2 frames at normal tempo
    sways = _uniform(this, 3 * len(names), 6).reshape(len(this), len(names), 3, 1)
    size = 1 + d.effort * (2 * effort - 1)

    angle = {}
    for at, name in enumerate(names):
        strength, rate, phase = (sways[:, at, j] for j in range(3))
        sway = d.fidget * strength**3 * _sine(phase + (0.3 + 1.5 * rate) * frame / 45)
        angle[name] = sway + d.posture * postures[:, at, None]
    for motion in motions:
        if not motion.cycles:
            curve = np.where(np.abs(shot - motion.phase) < 0.5, 0.5 + 0.5 * _cosine(shot - motion.phase), 0)
        elif motion.swing:
            curve = _sine(start + motion.phase + motion.cycles * time)
        else:
            curve = 0.5 - 0.5 * _cosine(start + motion.phase + motion.cycles * time)
        angle[motion.of] = angle[motion.of] + motion.size * size * (1 + d.manner * manners[:, names.index(motion.of), None]) * curve

    rest = _rest(1 + d.build * builds)
    points = np.repeat(rest[:, None], FRAMES, axis=1)
    for name, (joint, moved, axis, sign) in TURNS.items():
        _turn(points, list(moved), rest[:, None, joint, None], axis, sign * angle[name])
    points[..., 1] -= points[..., 1].min(axis=2, keepdims=True)  # the lowest joint stands on the floor
    for name, axis in SHIFTS.items():
        points[..., axis] += angle[name][..., None]
    still = np.zeros((1, 1, 1, 3))
    for axis, turn, most in ((1, yaw, d.view), (0, pitch, d.pitch)):
        _turn(points, slice(None), still, axis, np.broadcast_to(most * (2 * turn - 1), (len(this), FRAMES)))
    points += np.concatenate([d.place * (2 * x0 - 1), -1 + d.place * (2 * y0 - 1), np.full_like(x0, 3.0)], axis=1)[:, None, None]
    points += _between(noise, *d.noise)[..., None, None] * _normal(this, FRAMES * JOINTS * 3).reshape(points.shape)
    points[frame >= length[:, None]] = 0
    return points.astype(np.float32), length


def _rest(scale: np.ndarray) -> np.ndarray:
    """Standing people [n, JOINTS, 3]. scale: [n, 3] of trunk, arms and legs."""
    found = np.zeros((len(scale), JOINTS, 3))
    mirror = np.asarray([-1.0, 1.0, 1.0])[None]
    for joint, place in SPINE.items():
        found[:, joint] = scale[:, :1] * np.asarray(place)[None]
    for limb, root, factor in ((ARM, 4, scale[:, 1:2]), (LEG, 12, scale[:, 2:3])):
        for joint, place in limb.items():
            found[:, joint] = scale[:, :1] * np.asarray(limb[root])[None] + factor * (np.asarray(place) - np.asarray(limb[root]))[None]
            found[:, RIGHT[joint]] = mirror * found[:, joint]
    return found


def _turn(points: np.ndarray, joints, about: np.ndarray, axis: int, angle: np.ndarray) -> None:
    """Turns `joints` of points [n, t, JOINTS, 3] by angle [n, t] turns about an axis through `about` [n, 1, 1, 3], in place."""
    i, j = (axis + 1) % 3, (axis + 2) % 3
    cosine, sine = _cosine(angle)[..., None], _sine(angle)[..., None]
    a, b = points[:, :, joints, i] - about[..., i], points[:, :, joints, j] - about[..., j]
    points[:, :, joints, i] = about[..., i] + cosine * a - sine * b
    points[:, :, joints, j] = about[..., j] + sine * a + cosine * b


# -- numbers that are the same everywhere -------------------------------------------------------------------------------------

SERIES = tuple((-1) ** k / math.factorial(2 * k + 1) for k in range(1, 7))
GOLDEN = 0x9E3779B97F4A7C15


def _sine(turns: np.ndarray) -> np.ndarray:
    """sin(2 pi turns), to 1e-9, by its power series within a quarter turn."""
    x = turns - np.rint(turns)
    x = np.where(np.abs(x) > 0.25, np.copysign(0.5, x) - x, x) * 6.283185307179586
    square = x * x
    total = SERIES[-1] * square
    for factor in SERIES[-2::-1]:
        total = (total + factor) * square
    return x * (1 + total)


def _cosine(turns: np.ndarray) -> np.ndarray:
    return _sine(turns + 0.25)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): uint64 to uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _key(*numbers) -> np.ndarray:
    """One uint64 for each combination of numbers, which are scalars or [n]."""
    found = np.zeros(1, np.uint64)
    for number in numbers:
        found = _mix(found * np.uint64(3) + np.atleast_1d(np.asarray(number)).astype(np.uint64) + np.uint64(GOLDEN))
    return found


def _bits(key: np.ndarray, count: int) -> np.ndarray:
    """uint64 [n, count], of keys [n]."""
    return _mix(key[:, None] + np.uint64(GOLDEN) * np.arange(1, count + 1, dtype=np.uint64)[None])


def _uniform(key: np.ndarray, count: int, use: int) -> np.ndarray:
    """[n, count] from 0 to 1. use: what for; each has draws of its own."""
    return (_bits(_mix(key + np.uint64(use)), count) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _centred(key: np.ndarray, count: int, use: int) -> np.ndarray:
    return 2 * _uniform(key, count, use) - 1


def _between(share: np.ndarray, least: float, most: float) -> np.ndarray:
    return least + (most - least) * share


def _normal(key: np.ndarray, count: int) -> np.ndarray:
    """[n, count] of mean 0 and standard deviation 1: the sum of four uniform numbers of 16 bits, normal enough."""
    bits, pairs = _bits(_mix(key), count), np.uint64(0x0000FFFF0000FFFF)
    bits = (bits & pairs) + ((bits >> np.uint64(16)) & pairs)
    total = (bits & np.uint64(0xFFFFFFFF)) + (bits >> np.uint64(32))
    return (total.astype(np.float64) - 2 * 65535) / 37836.9  # sqrt(4 (2^32 - 1) / 12)
