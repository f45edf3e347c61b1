"""Drawn letters: the same everywhere, every one to be told from its neighbours, hard enough and not too hard."""

import hashlib
import subprocess
import sys
import time
import unicodedata

import matplotlib
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from jaxdistill import UserError
from jaxdistill.data import cache, glyphs

STILL = glyphs.Difficulty(
    rotation=0, scale=(1, 1), aspect=0, shear=0, shift=0, thickness=0, blur=(0.03, 0.03), ink=(1, 1), paper=(0, 0), noise=(0, 0), strokes=0
)  # fmt: skip
LETTERS, FACES = len(glyphs.CLASSES), len(glyphs.FACES)


@pytest.fixture(scope="module")
def plain():
    """Every letter in every face, nothing done to it: float [faces, letters, 32, 32]."""
    drawn = glyphs.draw(classes=LETTERS, count=LETTERS * FACES, seed=0, difficulty=STILL)
    return drawn.image.reshape(FACES, LETTERS, 32, 32).astype(np.float64) / 255


def digest(drawn) -> str:
    return hashlib.sha256(b"".join(array.tobytes() for array in drawn[:4])).hexdigest()


def test_classes_are_distinct_letters_beside_their_base():
    assert LETTERS >= 150
    assert len(set(glyphs.CLASSES)) == LETTERS
    strokes = {"ø", "ł", "ŀ", "ŋ", "Ŋ", "Ŀ", "Ł", "đ", "Đ", "ħ", "Ħ", "ŧ", "Ŧ", "ƙ", "ȷ", "i"}  # letters of their own to Unicode
    for group in glyphs.GROUPS:
        base = "i" if group[0] == "ı" else group[0]
        assert len(group) > 2
        for letter in group[1:]:
            assert unicodedata.normalize("NFD", letter)[0] == base or letter in strokes


def test_every_letter_is_drawn_and_differs_from_its_look_alikes(plain):
    assert plain.sum((2, 3)).min() > 20  # pixels of ink
    assert max(plain[:, :, edge].max() for edge in (0, -1)) < 0.5  # nothing is cut off
    assert max(plain[..., edge].max() for edge in (0, -1)) < 0.5
    shared, at = [], 0
    for group in glyphs.GROUPS:
        several = plain[:, at : at + len(group)]
        apart = np.abs(several[:, :, None] - several[:, None]).sum((3, 4)) + 1e3 * np.eye(len(group))[None]
        assert apart.min() > 2.5, (group, apart.min())  # pixels' worth of ink
        shared.append((np.minimum(several, several[:, :1]).sum((2, 3)) / several[:, :1].sum((2, 3)))[:, 1:].ravel())
        at += len(group)
    shared = np.concatenate(shared)  # of the base letter's ink, what lies at the same place in a look-alike
    assert np.mean(shared > 0.8) > 0.9


def test_faces_differ(plain):
    o = plain[:, 0].reshape(FACES, -1)
    assert len(np.unique(o, axis=0)) == FACES


@pytest.mark.parametrize(
    ("face", "letter"),
    [("DejaVuSerif-Bold", "ő"), ("STIXGeneralItalic", "ø"), ("DejaVuSansMono", "Ģ"), ("DejaVuSans", "ą"), ("STIXGeneral", "Ħ")],
)
def test_outline_against_freetype(face, letter):
    """What is inside of the outline is what FreeType fills, at the place that the group's frame gives it."""
    font = ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/{face}.ttf", 512, layout_engine=ImageFont.Layout.BASIC)
    group = next(group for group in glyphs.GROUPS if letter in group)
    pages = {}
    for other in group:
        pages[other] = Image.new("L", (1400, 1400))
        ImageDraw.Draw(pages[other]).text((400, 300), other, 255, font)
    boxes = np.asarray([page.getbbox() for page in pages.values()])
    low, high = boxes[:, :2].min(0), boxes[:, 2:].max(0)
    side, middle = (high - low).max() / glyphs.FILL, (low + high) / 2
    box = (*(middle - side / 2), *(middle + side / 2))
    want = np.asarray(pages[letter].resize((glyphs.CELLS,) * 2, Image.Resampling.BOX, box=box)) / 255
    templates, _ = glyphs._templates()
    cells = templates[glyphs.CLASSES.index(letter) * FACES + glyphs.FACES.index(face)] * (glyphs.REACH / 127)
    assert (cells[want == 1] > -0.25).all()  # a cell: the corner of a serif, FreeType's whole pixels
    assert (cells[want == 0] < 0.25).all()
    assert np.clip(cells + 0.5, 0, 1).sum() == pytest.approx(want.sum(), rel=0.02)


def test_same_in_a_fresh_process():
    here = glyphs.draw(classes=20, size=24, count=700, seed=5)
    code = "from tests.data.test_glyphs import digest, glyphs; print(digest(glyphs.draw(classes=20, size=24, count=700, seed=5)))"
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert there == digest(here)


def test_image_depends_on_seed_class_face_and_index_alone():
    few = glyphs.draw(classes=30, count=500, seed=1)
    many = glyphs.draw(classes=30, count=1500, seed=1)
    assert all(np.array_equal(a, b[:500]) for a, b in zip(few[:4], many[:4], strict=True))
    fewer = glyphs.draw(classes=10, count=300, seed=1, families=("mono",))
    whole = glyphs.draw(classes=30, count=30 * FACES * 8, seed=1)
    for label, face in ((0, 4), (9, 7)):
        pick = lambda drawn: drawn.image[(drawn.label == label) & (drawn.face == face)]  # noqa: E731, B023
        assert np.array_equal(pick(fewer), pick(whole)[: len(pick(fewer))])
        assert len(pick(fewer)) > 5
    other = glyphs.draw(classes=30, count=500, seed=2)
    assert len(np.unique(np.concatenate([few.image, other.image]).reshape(1000, -1), axis=0)) == 1000


def test_labels_faces_and_families_are_balanced_and_families_disjoint():
    train = glyphs.draw(classes=12, count=12 * 12 * 3, seed=0, families=("sans", "mono", "serif"))
    test = glyphs.draw(classes=12, count=12 * 4 * 3, seed=1, families=("stix",))
    assert set(np.bincount(train.label * FACES + train.face)) == {0, 3}
    assert not set(train.face) & set(test.face)
    for drawn, families in ((train, {"sans", "mono", "serif"}), (test, {"stix"})):
        assert {drawn.families[i] for i in drawn.family} == families
        assert all(drawn.faces[f] in glyphs.FAMILIES[drawn.families[g]] for f, g in zip(drawn.face, drawn.family, strict=True))
    assert train.image.dtype == np.uint8
    assert {array.dtype for array in train[1:4]} == {np.dtype(np.int32)}
    assert train.classes == tuple(glyphs.CLASSES[:12])


def test_fast():
    glyphs.draw(count=64, seed=0)  # templates
    began = time.process_time()
    glyphs.draw(count=4000, seed=0)
    assert 4000 / (time.process_time() - began) > 2500, "images per second of one core; two make 5000"


def test_templates_are_cached(monkeypatch, tmp_path):
    want, fonts = glyphs._templates()
    assert (cache.folder() / f"glyphs-{fonts[:16]}").read_bytes() == want.tobytes()
    monkeypatch.setattr(glyphs, "_letters", None)  # would be called to make them anew
    again, _ = glyphs._templates.__wrapped__()
    assert np.array_equal(want, again)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(classes=LETTERS + 1), "classes"), (dict(classes=1), "classes"), (dict(size=4), "size"), (dict(count=-1), "count"),
        (dict(families=("stix", "comic")), "families.*comic"), (dict(families=()), "families"),
    ],
)  # fmt: skip
def test_user_errors(options, said):
    with pytest.raises(UserError, match=said):
        glyphs.draw(**(dict(count=10, seed=0) | options))


def test_font_that_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(matplotlib, "get_data_path", lambda: str(tmp_path))
    with pytest.raises(UserError, match="DejaVuSans.ttf: No such file"):
        glyphs._templates.__wrapped__()
