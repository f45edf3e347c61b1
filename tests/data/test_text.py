"""From files to rows: every source, every mistake, the split, the cache."""

import errno
import json
import os
import pathlib

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from jaxdistill import UserError
from jaxdistill.data import text, tokenizer
from jaxdistill.data.packing import batches
from jaxdistill.data.text import TextConfig, documents, load


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    load.cache_clear()
    yield
    load.cache_clear()


def write_files(folder, count=60):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (folder / f"{i:03}.txt").write_text(
            f"document {i}: naïve café 🙂 " + "the cat sat on the mat " * (i % 5 + 1), encoding="utf-8"
        )
    return folder


@pytest.fixture
def folder(tmp_path):
    return write_files(tmp_path / "texts")


def config(folder, **options):
    return TextConfig(
        **{"source": "files", "path": str(folder), "vocab": 300, "length": 16, "validation": 0.2, "test": 0.2} | options
    )


# Sources


def test_files_come_from_a_folder_a_file_or_a_glob(folder):
    (folder / "below").mkdir()
    (folder / "below/code.py").write_bytes(b"x = 1\r\n")
    (folder / "picture.png").write_bytes(b"\xff")
    (folder / "empty.md").write_text("")
    found = dict(documents(config(folder)))
    assert len(found) == 61
    assert found[str(folder / "below/code.py")] == "x = 1\r\n"  # byte for byte
    assert len(list(documents(config(folder / "00*.txt")))) == 10
    assert len(list(documents(config(folder / "003.txt")))) == 1
    assert [name for name, _ in documents(config(folder))] == [name for name, _ in documents(config(folder))]


def test_the_standard_library_without_its_tests():
    found = dict(documents(TextConfig()))
    assert "json/decoder.py" in found
    assert len(found) > 300
    assert not any(part in {"test", "tests", "idle_test", "site-packages"} for name in found for part in name.split("/"))


def test_jsonl(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "one é", "n": 1}\n\n{"body": "two"}\n', encoding="utf-8")
    assert list(documents(config(path, source="jsonl", field="body"))) == [(f"{path}, line 1", "one é"), (f"{path}, line 3", "two")]


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.binary(), "dictionary"])
def test_parquet(tmp_path, kind):
    path = tmp_path / "a.parquet"
    values = pyarrow.array(["one é", None, "two"])
    values = values.dictionary_encode() if kind == "dictionary" else values.cast(kind)
    pyarrow.parquet.write_table(pyarrow.table({"text": values}), path)
    assert list(documents(config(path, source="parquet"))) == [(f"{path}, row 0", "one é"), (f"{path}, row 2", "two")]


def test_tfds(tmp_path):
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()

    class Prose(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        url_infos = {}  # nothing to download, so no list of checksums beside the code

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({"text": tfds.features.Text()}))

        def _split_generators(self, download_manager):
            return {name: self._generate_examples(name) for name in ("train", "test")}

        def _generate_examples(self, name):
            for i in range(3):
                yield i, {"text": f"{name} é {i}"}

    builder = Prose(data_dir=str(tmp_path / "tfds"), file_format="array_record")
    builder.download_and_prepare()
    path = str(builder.data_dir)
    found = sorted(content for _, content in documents(config(path, source="tfds")))
    assert found == [f"{name} é {i}" for name in ("test", "train") for i in range(3)]
    with pytest.raises(UserError, match=r"data.field 'body': .* has only 'text'"):
        list(documents(config(path, source="tfds", field="body")))


@pytest.mark.parametrize("name", ["no_such_dataset", "lm1b"])
def test_a_tfds_dataset_that_is_not_prepared(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(UserError, match=f"data.path '{name}': no TFDS dataset prepared as array_record") as caught:
        list(documents(config(name, source="tfds")))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "content", "message"),
    [
        ("files", b"", "no text"),
        ("files", b"ab\xff", "invalid UTF-8 at byte 2; .*data.invalid_utf8='replace'"),
        ("jsonl", b'{"text": "a"}\n{"text": \n', "line 2: not JSON"),
        ("jsonl", b'{"text": "a", "n": ' + b"1" * 5000 + b"}", "line 1: JSON beyond what is read .Exceeds the limit"),
        ("jsonl", b'{"text": "a", "n": ' + b"[" * 100000 + b"]" * 100000 + b"}", "line 1: JSON beyond what is read .maximum recursion"),
        ("jsonl", b'["a"]', "line 1: a JSON list"),
        ("jsonl", b'{"body": "a", "n": 1}', "data.field 'text': .*line 1 has only 'body', 'n'"),
        ("jsonl", b'{"text": 3}', "data.field 'text': .*line 1 holds a int"),
        ("jsonl", b'{"text": "\\ud800"}', "line 1: invalid UTF-8"),
        ("parquet", b"PAR", "not a readable parquet file"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_unusable_content_is_one_line(tmp_path, source, content, message):
    path = tmp_path / "content"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        list(documents(config(path, source=source)))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_that_cannot_be_read_is_not_left_out_in_silence(tmp_path, monkeypatch):
    for name in ("open", "shut"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(name)

    def scandir(path, scan=os.scandir):  # (permissions do not stop a root user)
        if str(path).endswith("shut"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match=f"^{tmp_path}/shut: Permission denied; a readable folder is accepted$"):
        list(documents(config(tmp_path)))


def test_a_parquet_file_damaged_in_its_pages(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [f"text {i} " * 9 for i in range(99)]}), path, compression="snappy")
    raw = bytearray(path.read_bytes())
    raw[60:400] = bytes(byte ^ 0x5A for byte in raw[60:400])
    path.write_bytes(raw)
    with pytest.raises(UserError, match=f"^{path}: not a readable parquet file") as caught:
        list(documents(config(path, source="parquet")))
    assert "\n" not in str(caught.value)


def test_unusable_parquet_columns(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"n": [1], "text": pyarrow.array([b"\xff"])}), path)
    with pytest.raises(UserError, match="data.field 'body': .* has only 'n', 'text'"):
        list(documents(config(path, source="parquet", field="body")))
    with pytest.raises(UserError, match="data.field 'n': .* holds int64; a column of strings"):
        list(documents(config(path, source="parquet", field="n")))
    twice = pyarrow.table([["a"], ["b"], [1]], names=["text", "text", "n"])
    pyarrow.parquet.write_table(twice, tmp_path / "twice.parquet")
    with pytest.raises(UserError, match="data.field 'text': .*twice.parquet has it twice"):
        list(documents(config(tmp_path / "twice.parquet", source="parquet")))
    with pytest.raises(UserError, match="row 0: invalid UTF-8 at byte 0"):
        list(documents(config(path, source="parquet")))


def test_missing_paths(tmp_path):
    (tmp_path / "bare").mkdir()
    for path, message in {
        tmp_path / "nothing": "not found",
        tmp_path / "*.x": "not found",
        tmp_path / "bare": "without a .txt",
    }.items():
        with pytest.raises(UserError, match=message):
            list(documents(config(path)))


def test_invalid_utf8_replaced_is_counted(folder):
    (folder / "x.txt").write_bytes(b"caf\xe9")
    corpus = load(config(folder, invalid_utf8="replace"))
    assert corpus.facts["replaced"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "web"}, r"data.source 'web': stdlib \| files"),
        ({"path": ""}, "data.path '' with data.source 'files'"),
        ({"source": "stdlib"}, "data.path 'x' with data.source 'stdlib': none"),
        ({"field": ""}, "data.field"),
        ({"invalid_utf8": "drop"}, r"data.invalid_utf8 'drop': error \| replace"),
        ({"vocab": 256}, "data.vocab 256: 257"),
        ({"length": 0}, "data.length 0: 2 or more"),
        ({"validation": 0.0}, "data.validation 0.0"),
        ({"test": 1.0}, "data.test 1.0"),
        ({"validation": 0.5, "test": 0.5}, "data.validation 0.5: less than 1 together"),
        ({"train_tokens": -1}, "data.train_tokens -1"),
        ({"eval_tokens": -1}, "data.eval_tokens -1"),
        ({"length": 12.5}, "data.length 12.5: int"),
        ({"length": True}, "data.length True: int"),
    ],
)
def test_config_values_are_checked(options, message):
    with pytest.raises(UserError, match=message):
        config("x", **options)


# Split


def test_duplicates_stay_together_and_documents_keep_their_side():
    some = [(f"{i}", f"text {i % 40}") for i in range(80)]
    more = [(f"new {i}", f"other {i}") for i in range(100)]
    settings = config("x")
    parts, larger = text.split(some, settings), text.split(more + some, settings)
    sides = {side: {document.text for document in part} for side, part in parts.items()}
    assert sum(map(len, sides.values())) == 40  # no text on two sides
    assert sum(map(len, parts.values())) == 80
    assert all(sides[side] <= {document.text for document in larger[side]} for side in sides)
    assert parts == text.split(reversed(some), settings)


def test_an_empty_split_is_refused_with_the_counts():
    with pytest.raises(UserError, match=r"data.\w+ 0.2: of 1 documents none falls into \w+ \(train \d, validation \d, test \d\)"):
        text.split([("a", "a")], config("x"))


# Load


def test_bytes_of_the_labels_are_the_bytes_of_the_documents(folder):
    settings = config(folder)
    corpus = load(settings)
    for side, part in text.split(documents(settings), settings).items():
        packed, facts = corpus.splits[side], corpus.facts["splits"][side]
        counted = (packed.segments[:, 1:] == packed.segments[:, :-1]) & (packed.segments[:, 1:] > 0)
        size = sum(len(document.text.encode()) for document in part)
        assert corpus.token_bytes[packed.tokens[:, 1:][counted]].sum() == size == facts["bytes"]
        assert counted.sum() == facts["tokens"]
        assert facts["documents"] == len(part)
        # decoded in the order of the hashes, and nothing else
        assert corpus.tokenizer.decode(packed.labels) == "".join(document.text for document in part)
    assert corpus.vocab == len(corpus.token_bytes) == corpus.facts["vocab"]
    assert corpus.eos == corpus.tokenizer.eos
    json.dumps(corpus.facts)


def test_limits_are_exact(folder):
    corpus = load(config(folder, train_tokens=333, eval_tokens=44))
    assert {side: facts["tokens"] for side, facts in corpus.facts["splits"].items()} == {"train": 333, "validation": 44, "test": 44}
    whole = load(config(folder))
    for side, count in {"train": 333, "validation": 44, "test": 44}.items():
        np.testing.assert_array_equal(corpus.splits[side].labels, whole.splits[side].labels[:count])
    assert tokenizer.tokenizer_hash(corpus.tokenizer) == tokenizer.tokenizer_hash(whole.tokenizer)
    with pytest.raises(UserError, match="data.train_tokens 1000000: the train split has"):
        load(config(folder, train_tokens=10**6))


def test_what_is_only_measured_on_may_be_smaller_than_its_limit(folder):
    limited, whole = load(config(folder, eval_tokens=10**6)), load(config(folder))
    assert limited.facts["splits"] == whole.facts["splits"]


def test_the_tokenizer_sees_the_training_split_only(folder):
    settings = config(folder)
    before = load(settings)
    contents = ((f"{i}", f"zqxj{i} " * 20) for i in range(100))
    others = text.split(contents, settings)  # new contents for the two, that fall where the old ones were
    for side in ("validation", "test"):
        for old, new in zip(text.split(documents(settings), settings)[side], others[side], strict=False):
            pathlib.Path(old.name).write_text(new.text)
    load.cache_clear()
    after = load(settings)
    assert before.facts["splits"]["train"] == after.facts["splits"]["train"]
    assert before.facts["splits"]["validation"] != after.facts["splits"]["validation"]
    assert before.facts["tokenizer"] == after.facts["tokenizer"]


def test_one_job_loads_once_and_fresh_processes_read_the_cache(folder, monkeypatch):
    first = load(config(folder))
    assert load(config(folder)) is first
    load.cache_clear()
    refuse = pytest.fail
    monkeypatch.setattr(tokenizer.Tokenizer, "encode", lambda *_: refuse("tokenized again"))
    monkeypatch.setattr(tokenizer.tokenizers.Tokenizer, "train_from_iterator", lambda *_: refuse("trained again"), raising=False)
    again = load(config(folder, length=7))  # other rows of the same tokens
    assert again.facts["tokenizer"] == first.facts["tokenizer"]
    np.testing.assert_array_equal(again.splits["train"].stream, first.splits["train"].stream)


@pytest.mark.parametrize(
    "damage", [lambda raw: raw[: len(raw) // 2], lambda raw: b"", lambda raw: raw[:300] + b"\xff\xfe" + raw[302:]]
)
def test_a_damaged_cache_is_made_again(folder, tmp_path, damage):
    first = load(config(folder))
    entries = sorted((tmp_path / "cache/jaxdistill").iterdir())
    assert len(entries) == 4
    sound = [path.read_bytes() for path in entries]
    for path in entries:
        path.write_bytes(damage(path.read_bytes()))
    load.cache_clear()
    again = load(config(folder))
    assert again.facts == first.facts
    for side in first.splits:
        np.testing.assert_array_equal(again.splits[side].stream, first.splits[side].stream)
    assert [path.read_bytes()[:200] for path in entries] == [raw[:200] for raw in sound]
    assert sorted((tmp_path / "cache/jaxdistill").iterdir()) == entries  # no temporary files left


def test_without_a_writable_cache_nothing_is_kept_and_nothing_fails(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("a file stands where the folder would be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    first = load(config(folder))
    load.cache_clear()
    assert load(config(folder)).facts == first.facts


def test_another_tokenizer_by_folder(folder, tmp_path):
    corpus = load(config(folder))
    tokenizer.save(corpus.tokenizer, str(tmp_path / "tokenizer"))
    again = load(config(folder, tokenizer=str(tmp_path / "tokenizer")))
    assert again.facts == corpus.facts


def test_describe_shows_label_and_mask_under_each_token(folder):
    corpus = load(config(folder, length=40))
    batch = next(batches(corpus.splits["train"], batch=2, seed=0, repeat=False, shuffle=False))
    shown = text.describe(batch, corpus, rows=2, width=80)
    lines = shown.splitlines()
    assert lines[0].startswith("row 0: ")
    assert lines[1].split()[1] == "<|endoftext|>"
    assert lines[1].split()[2:] == lines[2].split()[1:-1]  # each label is the next token, or the end of text, which begins a document too
    assert sum(line.split()[1:].count("1") for line in lines if line.startswith("counts")) == sum(
        (s[1:] > 0).sum() for s in batch["segments"]
    )
    assert max(map(len, lines)) <= 80
