"""Aligned tokens end at the same byte: against sets, for any Unicode text and each family of tokenizer; rows of both."""

import itertools
import os
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdistill import UserError
from jaxdistill.data import text, tokenizer
from jaxdistill.data.alignment import align, ends, pair, shared
from jaxdistill.data.packing import Packed, batches, concatenate
from tests.data.test_tokenizer import sentencepiece, write

ATOMS = [
    *"aab ab  the \n\t.,(", "the cat sat ", "👩‍👩‍👧", "👍🏽", "🇺🇦", "🙂", "e\u0301", "a\u0323\u0302", "日本語", "한국", "नमस्ते",
    "\x00", "\ufffd", "\ufeff", "𝔘", "\U0010ffff", "\u200d", "é", "ﬁ", "İ", "<0x41>", "<|endoftext|>", "</s>", "\r\n", "שלום",
]  # fmt: skip


def random_texts(count, seed, longest=40):
    rng = np.random.default_rng(seed)
    return ["".join(ATOMS[i] for i in rng.integers(len(ATOMS), size=size)) for size in rng.integers(1, longest, count)]


@pytest.fixture(scope="module")
def toks(tmp_path_factory):
    """Byte-level BPEs of 300 and 700 ids, and Llama's layout."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", os.devnull)
        small = tokenizer.train(random_texts(300, 1), 300, "")
        large = tokenizer.train(random_texts(2000, 2), 700, "")
    folder = write(tmp_path_factory.mktemp("pieces"), sentencepiece("pre-tokenizer"), bos_token="<s>", eos_token="</s>")
    return {"small": small, "large": large, "pieces": tokenizer.load(folder)}


PAIRS = list(itertools.permutations(["small", "large", "pieces"], 2))


def by_sets(sizes_a, sizes_b):
    """Pairs by a dictionary of the bytes at which tokens of a and b end."""

    def first(sizes):
        found, byte = {}, 0
        for place, size in enumerate(sizes):
            byte += int(size)
            if size:
                found[byte] = place
        return found

    a, b = first(sizes_a), first(sizes_b)
    return sorted((a[byte], b[byte]) for byte in a.keys() & b.keys())


def pairs(sizes_a, sizes_b):
    return list(zip(*(each.tolist() for each in align(*(np.cumsum(sizes, dtype=np.int64) for sizes in (sizes_a, sizes_b)))), strict=True))


# Pairs


def test_aligned_tokens_have_spelled_the_same_bytes_and_none_are_missed(toks):
    texts = random_texts(10_000, 0)
    ids = {name: list(tok.encode(texts)) for name, tok in toks.items()}
    sizes = {name: tokenizer.token_bytes(tok) for name, tok in toks.items()}
    total = 0
    for a, b in itertools.combinations(toks, 2):
        for ids_a, ids_b, each in zip(ids[a], ids[b], texts, strict=True):
            found = pairs(sizes[a][ids_a], sizes[b][ids_b])
            assert found == by_sets(sizes[a][ids_a], sizes[b][ids_b])
            assert found[-1] == (len(ids_a) - 1, len(ids_b) - 1)
            assert len(each.encode()) == sizes[a][ids_a].sum()
            total += len(found)
    assert total > 100_000
    for name, tok in toks.items():  # and the bytes are those of the text, token by token
        pieces = tokenizer.token_pieces(tok)
        assert all(b"".join(pieces[token] for token in each) == raw.encode() for each, raw in zip(ids[name], texts, strict=True))


SIZES = st.lists(st.integers(0, 4), max_size=30)


@settings(deadline=None, max_examples=300)
@given(a=SIZES, b=SIZES)
def test_pairs_equal_sets_also_with_tokens_of_no_bytes_and_texts_of_unlike_length(a, b):
    assert pairs(a, b) == by_sets(a, b)


@settings(deadline=None, max_examples=200)
@given(a=SIZES, b=SIZES, rest_a=SIZES, rest_b=SIZES)
def test_what_follows_changes_no_earlier_pair(a, b, rest_a, rest_b):
    byte = min(sum(a), sum(b))
    earlier = [(i, j) for i, j in pairs(a + rest_a, b + rest_b) if i < len(a) and j < len(b)]
    assert [(i, j) for i, j in earlier if sum(a[: i + 1]) <= byte] == pairs(a, b)


def test_ten_million_tokens_take_about_a_second():
    rng = np.random.default_rng(0)
    sizes_a, sizes_b = rng.integers(1, 9, 4096).astype(np.int32), rng.integers(1, 11, 8192).astype(np.int32)
    a, b = rng.integers(0, 4096, 2_000_000, np.int32), rng.integers(0, 8192, 1_600_000, np.int32)
    start = time.process_time()
    i, _ = align(ends(a, np.array([0]), sizes_a), ends(b, np.array([0]), sizes_b))
    assert len(a) / (time.process_time() - start) > 3e6  # 40 million a second where nothing else runs
    assert len(i) > 100_000


# Vocabularies


def test_shared_ids_stand_for_the_same_bytes(toks):
    for a, b in PAIRS:
        found = shared(toks[a], toks[b])
        assert found.dtype == np.int32
        assert found.shape == (toks[a].vocab,)
        assert found[toks[a].eos] == toks[b].eos
        pieces_a, pieces_b = tokenizer.token_pieces(toks[a]), tokenizer.token_pieces(toks[b])
        same = [i for i in range(toks[a].vocab) if found[i] >= 0 and i not in (toks[a].bos, toks[a].eos)]
        assert all(pieces_a[i] == pieces_b[found[i]] for i in same)
        assert len(set(found[same])) == len(same) == len(set(pieces_a) & set(pieces_b) - {b""})
        assert len(same) >= 256
    pieces = toks["pieces"]
    byte = lambda tok, char: tok.backend.token_to_id(char)  # noqa: E731
    assert shared(toks["small"], pieces)[byte(toks["small"], "a")] == byte(pieces, "a")  # the piece, and not <0x61>
    assert shared(pieces, toks["small"])[byte(pieces, "<0x61>")] == -1
    assert shared(pieces, toks["small"])[[pieces.bos, pieces.eos]].tolist() == [toks["small"].eos] * 2


# Rows


def paired(toks, a, b, texts, length, limit=0, cap=0):
    ours = concatenate(list(toks[a].encode(texts)), toks[a].bos, limit)
    theirs = concatenate(list(toks[b].encode(texts[: len(ours[1])])), toks[b].bos)
    sizes = [tokenizer.token_bytes(toks[name]) for name in (a, b)]
    return pair(Packed(*ours, length), sizes[0], *theirs, sizes[1], cap)


def spelled(pieces, tokens, places):
    return b"".join(pieces[token] for token in tokens[places])


def check_spelling(rows, pieces_a, pieces_b, marks):
    """What the rows of both spell, place by place. Returns the number of aligned places and of spans."""
    spans = 0
    for r in range(len(rows["tokens"])):
        row = {name: array[r] for name, array in rows.items()}
        aligned, segments, theirs = row["aligned"], row["segments"], row["teacher_segments"]
        hit = np.flatnonzero(aligned >= 0)
        assert np.all(np.diff(aligned[hit]) > 0)
        np.testing.assert_array_equal(theirs[aligned[hit]], segments[hit])
        for segment in range(1, segments.max(initial=0) + 1):
            ours = np.flatnonzero(segments == segment)
            beside = np.flatnonzero(theirs == segment)
            text_a, text_b = (spelled(p, t, w) for p, t, w in ((pieces_a, row["tokens"], ours), (pieces_b, row["teacher_tokens"], beside)))
            assert text_b in text_a  # nothing beyond the student's piece
            if row["tokens"][ours[0]] == marks[0] and len(beside):
                assert row["teacher_tokens"][beside[0]] == marks[1]
                assert aligned[ours[0]] == beside[0]
                assert text_a.startswith(text_b)
            np.testing.assert_array_equal(row["teacher_positions"][beside], np.arange(len(beside)))
            for place in ours[aligned[ours] >= 0]:  # exactly the student's bytes, fewer earlier ones at most, none later
                seen = spelled(pieces_b, row["teacher_tokens"], beside[beside <= aligned[place]])
                assert spelled(pieces_a, row["tokens"], ours[ours <= place]).endswith(seen)
        numbers = np.unique(row["spans"][row["spans"] >= 0])
        np.testing.assert_array_equal(numbers, np.arange(len(numbers)))
        np.testing.assert_array_equal(np.unique(row["teacher_spans"][row["teacher_spans"] >= 0]), numbers)
        for number in numbers:
            ours, beside = np.flatnonzero(row["spans"] == number) + 1, np.flatnonzero(row["teacher_spans"] == number) + 1
            assert spelled(pieces_a, row["tokens"], ours) == spelled(pieces_b, row["teacher_tokens"], beside) != b""
            assert aligned[ours[-1]] == beside[-1]  # from one aligned place to the next
            assert aligned[ours[0] - 1] == beside[0] - 1
            assert np.all(aligned[ours[:-1]] == -1)
            assert len(set(segments[ours[0] - 1 : ours[-1] + 1])) == 1
        in_piece = (aligned[1:] >= 0) & (np.maximum.accumulate(np.where(aligned >= 0, segments, 0))[:-1] == segments[1:])
        assert in_piece.sum() == len(numbers)  # every aligned place that is not the first of its piece closes a span
        spans += len(numbers)
    return int((rows["aligned"] >= 0).sum()), spans


def check_by_loop(found, *sizes):
    """Teacher's rows and aligned places against a plain loop: what lies within the row's bytes, and ends where a set says."""
    rows, packed = found.rows(np.arange(len(found))), found.packed
    ours, theirs = (
        [1 if place in starts else int(size[token]) for place, token in enumerate(stream)]
        for stream, starts, size in zip((packed.stream, found.stream), (packed.starts, found.starts), sizes, strict=True)
    )
    ends_a, ends_b = list(itertools.accumulate(ours)), list(itertools.accumulate(theirs))
    partner = dict(by_sets(ours, theirs))
    for r in range(len(found)):
        first, last = r * packed.length, min((r + 1) * packed.length, len(packed.stream) - 1)
        begin, stop = ends_a[first] - ours[first], ends_a[last]
        inside = [j for j, end in enumerate(ends_b) if end - theirs[j] >= begin and begin < end <= stop][: found.width + 1]
        np.testing.assert_array_equal(rows["teacher_tokens"][r, : len(inside)], found.stream[inside])
        assert np.all(rows["teacher_segments"][r, : len(inside)] > 0)
        assert not rows["teacher_segments"][r, len(inside) :].any()
        wanted = [inside.index(partner[i]) if partner.get(i) in inside else -1 for i in range(first, last + 1)]
        assert rows["aligned"][r].tolist() == wanted + [-1] * (packed.length + 1 - len(wanted))


@pytest.mark.parametrize(("a", "b"), PAIRS)
@pytest.mark.parametrize(("length", "limit", "cap"), [(7, 0, 0), (24, 1001, 0), (24, 0, 9), (3, 500, 0)])
def test_rows_keep_every_promise(toks, a, b, length, limit, cap):
    found = paired(toks, a, b, random_texts(60, 5), length, limit, cap)
    index = np.arange(len(found) + 2)
    rows = found.rows(index)
    for name, array in found.packed.rows(index).items():
        np.testing.assert_array_equal(rows[name], array)
    shapes = {"aligned": length + 1, "spans": length, "teacher_spans": found.width}
    shapes |= dict.fromkeys(("teacher_tokens", "teacher_segments", "teacher_positions"), found.width + 1)
    assert {name: (rows[name].shape[1], rows[name].dtype) for name in shapes} == {name: (n, np.int32) for name, n in shapes.items()}
    if cap:
        assert found.width == cap
    else:
        assert (rows["teacher_segments"] > 0).sum(1).max() == found.width + 1
    pieces, sizes = ([f(toks[name]) for name in (a, b)] for f in (tokenizer.token_pieces, tokenizer.token_bytes))
    aligned, spans = check_spelling(rows, *pieces, (toks[a].bos, toks[b].bos))
    check_by_loop(found, *sizes)
    assert aligned > spans > 0
    counted = (rows["segments"][:, 1:] == rows["segments"][:, :-1]) & (rows["segments"][:, 1:] > 0)
    usable = (rows["aligned"][:, :-1] >= 0) & (rows["aligned"][:, :-1] < found.width)
    np.testing.assert_array_equal(found.labels, rows["tokens"][:, 1:][counted & usable])
    for name, array in rows.items():  # past the end: padding
        assert np.all(array[-2:] == (-1 if name in ("aligned", "spans", "teacher_spans") else 0))


def test_a_tokenizer_beside_itself_is_the_same_row_twice(toks):
    found = paired(toks, "large", "large", random_texts(30, 6), 16)
    rows = found.rows(np.arange(len(found)))
    assert found.width == 16
    for name in ("tokens", "segments", "positions"):
        np.testing.assert_array_equal(rows[f"teacher_{name}"], rows[name])
    np.testing.assert_array_equal(rows["aligned"], np.where(rows["segments"] > 0, np.arange(17), -1))
    np.testing.assert_array_equal(rows["spans"], rows["teacher_spans"])
    assert len(found.labels) == found.packed.predicted


PREFIX = 0
DOCUMENTS = st.lists(st.tuples(st.lists(st.integers(0, 4), max_size=9), st.lists(st.integers(0, 4), max_size=9)), min_size=1, max_size=6)


def numbered(documents, side):
    """Ids 1.. for sizes 0.., and a last token that brings both sides of a document to the same bytes."""
    texts = []
    for both in documents:
        missing = max(map(sum, both)) + 1 - sum(both[side])
        texts.append(np.array([size + 1 for size in (*both[side], missing)], np.int32))
    return concatenate(texts, PREFIX)


SIZE_OF = np.array([0, *range(60)], np.int32)


@settings(deadline=None, max_examples=200)
@given(documents=DOCUMENTS, length=st.integers(1, 8), cap=st.integers(0, 6))
def test_rows_with_tokens_of_no_bytes_against_a_plain_loop(documents, length, cap):
    found = pair(Packed(*numbered(documents, 0), length), SIZE_OF, *numbered(documents, 1), SIZE_OF, cap)
    check_by_loop(found, SIZE_OF, SIZE_OF)


def test_what_follows_changes_no_earlier_place_of_a_row(toks):
    """Two texts with the same beginning: up to any aligned pair of equal tokens on both sides, the rows are the same."""
    rng = np.random.default_rng(0)
    sizes = [tokenizer.token_bytes(toks[name]) for name in ("small", "large")]
    for seed in range(40):
        kept = paired(toks, "small", "large", random_texts(5, seed), 32)
        places = np.flatnonzero(kept.partner >= 0)
        i = int(rng.choice(places[places > kept.packed.starts[-1]]))
        j = int(kept.partner[i])
        tail = rng.integers(1, 256, 60).astype(np.int32)  # other tokens of the same bytes on both sides
        tail = tail[(sizes[0][tail] == 1) & (sizes[1][tail] == 1)]
        streams = [np.concatenate([s[: p + 1], tail]) for s, p in ((kept.packed.stream, i), (kept.stream, j))]
        other = pair(Packed(streams[0], kept.packed.starts, 32), sizes[0], streams[1], kept.starts, sizes[1])
        row, place = divmod(i, 32)
        a, b = (each.rows([row]) for each in (kept, other))
        upto = a["aligned"][0, place]
        assert upto == b["aligned"][0, place]
        for name in a:
            theirs = name.startswith("teacher")
            stop = (upto if theirs else place) + (0 if name.endswith("spans") else 1)
            np.testing.assert_array_equal(a[name][0, : max(stop, 0)], b[name][0, : max(stop, 0)])


def test_pairs_go_through_batches(toks):
    found = paired(toks, "small", "large", random_texts(60, 5), 16)
    rows = found.rows(np.arange(len(found)))
    got = list(batches(found, batch=4, seed=0, repeat=False, shuffle=False))
    for name, array in rows.items():
        np.testing.assert_array_equal(np.concatenate([batch[name][batch["valid"]] for batch in got]), array)
    again = [next(batches(found, batch=4, seed=1, repeat=True, shuffle=True)) for _ in range(2)]
    for name in rows:
        np.testing.assert_array_equal(again[0][name], again[1][name])


def test_other_documents_are_refused(toks):
    sizes = tokenizer.token_bytes(toks["small"])
    stream = lambda texts: concatenate(list(toks["small"].encode(texts)), toks["small"].bos)  # noqa: E731
    packed = Packed(*stream(["one text", "another"]), 8)
    for others in (["one text"], ["one text", "anoth"], ["one texts", "another"]):
        with pytest.raises(ValueError, match="not of the same documents"):
            pair(packed, sizes, *stream(others), sizes)


# From files


def forget():
    text.load.cache_clear()
    text.paired.cache_clear()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    forget()
    (tmp_path / "texts").mkdir()
    for i, content in enumerate(random_texts(80, 7)):
        (tmp_path / f"texts/{i:03}.txt").write_bytes(content.encode())
    yield tmp_path
    forget()


def config(folder, **options):
    values = {"source": "files", "path": str(folder / "texts"), "vocab": 300, "length": 16, "validation": 0.2, "test": 0.2}
    return text.TextConfig(**values | options)


def test_a_corpus_with_a_second_tokenizer(toks, folder):
    tokenizer.save(toks["large"], str(folder / "teacher"))
    limited = config(folder, train_tokens=400, eval_tokens=100)
    plain, both = text.load(limited), text.paired(limited, str(folder / "teacher"))
    assert both.tokenizer is plain.tokenizer
    assert tokenizer.tokenizer_hash(both.teacher) == both.facts["teacher_tokenizer"] == tokenizer.tokenizer_hash(toks["large"])
    assert both.facts["tokenizer"] == plain.facts["tokenizer"]
    for side, rows in both.splits.items():
        assert rows.packed is plain.splits[side]
        facts = both.facts["splits"][side]
        assert facts["tokens"] == plain.facts["splits"][side]["tokens"]
        assert 0.2 < facts["aligned"] < 1
        assert facts["teacher_tokens"] < facts["tokens"]
        pieces = [tokenizer.token_pieces(tok) for tok in (both.tokenizer, both.teacher)]
        ours, theirs = (b"".join(p[token] for token in stream) for p, stream in zip(pieces, (rows.packed.stream, rows.stream), strict=True))
        assert 0 <= len(ours) - len(theirs) < 40  # cut where the student's last document is, at a token of its own
        assert ours.startswith(theirs)
    text.paired.cache_clear()
    again = text.paired(limited, str(folder / "teacher"))  # now from the cache on disk
    np.testing.assert_array_equal(again.splits["train"].stream, both.splits["train"].stream)
    capped = text.paired(limited, str(folder / "teacher"), 5)
    assert capped.splits["train"].width == 5
    assert capped.facts["splits"]["train"]["aligned"] < both.facts["splits"]["train"]["aligned"]


def test_invalid_utf8_is_refused_or_replaced_here_too(toks, folder):
    (folder / "texts/bad.txt").write_bytes(b"caf\xe9 " * 50)
    tokenizer.save(toks["large"], str(folder / "teacher"))
    with pytest.raises(UserError, match="invalid UTF-8 at byte 3"):
        text.paired(config(folder), str(folder / "teacher"))
    both = text.paired(config(folder, invalid_utf8="replace"), str(folder / "teacher"))
    assert both.facts["replaced"] == 1
    pieces = [tokenizer.token_pieces(tok) for tok in (both.tokenizer, both.teacher)]
    spell = [
        b"".join(b"".join(p[token] for token in stream) for stream in streams)
        for p, streams in zip(
            pieces, ([r.packed.stream for r in both.splits.values()], [r.stream for r in both.splits.values()]), strict=True
        )
    ]
    assert spell[0] == spell[1]
    assert "caf\ufffd ".encode() in spell[0]


def test_text_that_changes_between_the_two_readings_is_refused(toks, folder):
    tokenizer.save(toks["large"], str(folder / "teacher"))
    text.load(config(folder))
    for path in (folder / "texts").iterdir():
        path.write_text("something else " + path.name)
    with pytest.raises(UserError, match="documents changed while they were read"):
        text.paired(config(folder), str(folder / "teacher"))


def test_a_teacher_that_loses_bytes_is_refused(toks, folder):
    (folder / "texts/meta.txt").write_text("a \u2581 b")  # SentencePiece's own sign for a space
    pieces = write(folder / "pieces", sentencepiece("pre-tokenizer"), eos_token="</s>")
    with pytest.raises(UserError, match=r"the tokens of .*meta.txt spell"):
        text.paired(config(folder), pieces)
