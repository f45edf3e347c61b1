"""Skeletons as data sets store them: NTU RGB+D and UTD-MHAD. One function a source: config -> Listing."""

import os
import re
from pathlib import Path

import numpy as np

from jaxdistill import UserError
from jaxdistill.data.sequence_files import Listing, finite, first_line, listed, ragged

# -- NTU RGB+D (Shahroudy et al. 2016, arXiv 1604.02808; Liu et al. 2019, arXiv 1905.04757) ------------------------------------

NAME = re.compile(r"S(\d{3})C(\d{3})P(\d{3})R(\d{3})A(\d{3})")
# The first 20 are those of NTU RGB+D, whose subjects are 1 to 40; all of them those of NTU RGB+D 120.
SUBJECTS = (1, 2, 4, 5, 8, 9, 13, 14, 15, 16, 17, 18, 19, 25, 27, 28, 31, 34, 35, 38, 45, 46, 47, 49, 50, 52, 53, 54, 55, 56, 57, 58,
            59, 70, 74, 78, 80, 81, 82, 83, 84, 85, 86, 89, 91, 92, 93, 94, 95, 97, 98, 100, 103)  # fmt: skip
KINECT = 25  # joints
LEAST = 4096  # bytes: a smaller file may well hold no body, and is read to see


def ntu(config) -> Listing:
    """A folder of SsssCcccPpppRrrrAaaa.skeleton, at any depth; each is read when asked for. The columns `subject`, `camera` and
    `setup` split as published (cross-subject, cross-view, cross-setup). Left out and counted: files without any body, and those
    whose names stand in the file `skip` (the published list of missing skeletons)."""
    files = listed(config, "*.skeleton")
    skip = set()
    if config.skip:
        try:
            text = Path(os.path.expanduser(config.skip)).read_text(errors="replace")
        except OSError as error:
            raise UserError(f"config key data.skip: found {config.skip!r} ({error.strerror}); accepted: a file of sample names") from None
        skip = {match.group() for match in NAME.finditer(text)}
        if not skip:
            raise UserError(f"config key data.skip: found {config.skip!r}, without a name SsssCcccPpppRrrrAaaa; accepted: one or more")
    kept, lengths, numbers, skipped, empty = [], [], [], 0, 0
    for file in files:
        match = NAME.fullmatch(file.stem)
        if not match:
            raise UserError(f"{file}: accepted: the name SsssCcccPpppRrrrAaaa.skeleton, three digits each")
        skipped += file.stem in skip
        if file.stem in skip:
            continue
        with open(file, errors="replace") as text:
            head = text.readline().strip()
        if not head.isdigit():
            raise UserError(f"{file}, line 1: found {head[:20]!r}; accepted: the number of frames")
        if head == "0" or (file.stat().st_size < LEAST and not len(read_skeleton(file, config.bodies))):
            empty += 1
            continue
        kept.append(file)
        lengths.append(int(head))
        numbers.append([int(number) for number in match.groups()])
    if not kept:
        raise UserError(f"data.path {config.path!r}: no file with a body in it ({skipped} skipped, {empty} without); accepted: one or more")
    setup, camera, subject, _, action = (list(column) for column in zip(*numbers, strict=True))

    def read(i: int) -> np.ndarray:
        found = read_skeleton(kept[i], config.bodies)
        if not len(found):
            raise UserError(f"{kept[i]}: no body in any frame; accepted: one or more (data.skip leaves samples out)")
        return found

    return Listing(
        [file.stem for file in kept], action, lengths, (config.bodies * KINECT, 3), read, lambda i: kept[i].stat().st_size,
        columns={"subject": subject, "camera": camera, "setup": setup},
        trains={"subject": SUBJECTS, "camera": (2, 3), "setup": tuple(range(2, 33, 2))},
        class_names={number: f"A{number:03}" for number in set(action)},
        facts={"skipped": skipped, "without_body": empty}, lazy=True,
    )  # fmt: skip


def read_skeleton(file: Path, bodies: int = 2) -> np.ndarray:
    """A .skeleton file -> float32 [frames, bodies x 25, 3], metres in the camera's frame: the `bodies` tracked bodies that move most
    (variance of the joints, summed), most first. Zeros where a body is missing; frames without any of them are left out.

    Raises:
      UserError: a file that is cut off, or other than the format: frames; for each frame bodies; for each body ten numbers, its
        joints (25), and for each joint x, y, z and nine others.
    """
    lines = file.read_text(errors="replace").splitlines()
    at = 0

    def numbers(rows: int, least: int) -> list[list[str]]:
        nonlocal at
        found = [line.split() for line in lines[at : at + rows]]
        if len(found) < rows:
            raise UserError(f"{file}: ends at line {len(lines)}, in frame {frame + 1} of {count}; accepted: a whole file")
        for i, row in enumerate(found):
            if len(row) < least:
                raise UserError(f"{file}, line {at + i + 1}: found {len(row)} numbers; accepted: {least} or more")
        at += rows
        return found

    def whole() -> int:
        value = numbers(1, 1)[0][0]
        if not value.isdigit():
            raise UserError(f"{file}, line {at}: found {value[:20]!r}; accepted: a whole number")
        return int(value)

    frame = count = 0
    count = whole()
    tracks: dict[str, dict[int, np.ndarray]] = {}
    for frame in range(count):  # noqa: B007 (told in errors)
        for _ in range(whole()):
            body = numbers(1, 1)[0][0]
            if (joints := whole()) != KINECT:
                raise UserError(f"{file}, line {at}: found {joints} joints; accepted: {KINECT}")
            rows = [row[:3] for row in numbers(KINECT, 3)]
            try:
                tracks.setdefault(body, {})[frame] = np.asarray(rows, np.float64)
            except ValueError as error:
                raise UserError(f"{file}, lines {at - KINECT + 1} to {at}: {error}; accepted: numbers") from None
    moving = [(list(track), np.stack(list(track.values()))) for track in tracks.values()]
    moving = sorted(moving, key=lambda each: -each[1].var(axis=0).sum())[:bodies]
    here = sorted({frame for frames, _ in moving for frame in frames})
    found = np.zeros((len(here), bodies, KINECT, 3), np.float32)
    for body, (frames, xyz) in enumerate(moving):
        found[np.searchsorted(here, frames), body] = xyz
    return finite(found.reshape(len(here), bodies * KINECT, 3), file)


# -- UTD-MHAD (Chen, Jafari, Kehtarnavaz 2015) --------------------------------------------------------------------------------


def utd(config) -> Listing:
    """A folder of aA_sS_tT_skeleton.mat with d_skel [20, 3, frames]. Odd subjects train, as published."""
    import scipy.io

    found, numbers, names = [], [], []
    for file in listed(config, "*_skeleton.mat"):
        match = re.fullmatch(r"a(\d+)_s(\d+)_t(\d+)_skeleton", file.stem)
        if not match:
            raise UserError(f"{file}: accepted: the name aA_sS_tT_skeleton.mat")
        try:
            stored = scipy.io.loadmat(file)
        except Exception as error:  # scipy raises many kinds for a damaged file
            raise UserError(f"{file}: not a readable .mat file ({type(error).__name__}: {first_line(error)})") from None
        if "d_skel" not in stored:
            there = [name for name in stored if not name.startswith("__")]
            raise UserError(f"{file}: has {', '.join(there) or 'no array'}; accepted: d_skel [joints, 3, frames]")
        x = stored["d_skel"]
        if x.ndim != 3 or x.shape[1] != 3 or x.dtype.kind not in "fiu":
            raise UserError(f"{file}: d_skel is {x.dtype} {x.shape}; accepted: numbers [joints, 3, frames]")
        found.append(finite(np.moveaxis(x, 2, 0), file))
        numbers.append([int(number) for number in match.groups()])
        names.append(file.stem.removesuffix("_skeleton"))
    action, subject, _ = (list(column) for column in zip(*numbers, strict=True))
    classes = {number: f"a{number}" for number in set(action)}
    return ragged(names, action, found, columns={"subject": subject}, trains={"subject": (1, 3, 5, 7)}, class_names=classes)


SOURCES = {"ntu": ntu, "utd": utd}
