"""The command that writes a teacher's text, and training on it: the text by its definition, resumed to the byte, never mixed up."""

import json
import shutil

import jax
import numpy as np
import pytest

from jaxdistill import UserError, generate, models
from jaxdistill.data import text, tokenizer
from jaxdistill.lock import only_writer
from jaxdistill.models import generation
from tests.recipes.conftest import TEXT, config

FLAGS = ("--documents=19", "--prompt=12", "--tokens=4", "--batch=4", "--seed=5", "--temperature=0.8")


@pytest.fixture(scope="module")
def workdir(job, tmp_path_factory):
    """A job whose teacher is finished."""
    c = config(job)
    c.teacher.path, c.runs = "", ("teacher", "kd")
    c.model = dict(c.student)
    c.run.teacher = dict(recipe="lm", once=True, fills="teacher.path", given="model.path")
    folder = tmp_path_factory.mktemp("workdir")
    shutil.copytree(job / "teacher", folder / "runs/teacher-0/export")
    (folder / "runs/teacher-0/result.json").write_text("{}")
    (folder / "config.json").write_text(json.dumps({key: value for key, value in c.to_dict().items() if key not in ("mesh", "cache")}))
    return folder


@pytest.fixture(scope="module")
def rows(job):
    return text.TextConfig(**TEXT | dict(path=str(job / "text")))


def run(workdir, out, *flags) -> int:
    return generate.main(["generate", str(workdir), str(out), *(flags or FLAGS)])


@pytest.fixture(scope="module")
def whole(workdir, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "new" / "written.jsonl"
    assert run(workdir, out) == 0
    return out


def test_each_document_is_what_the_teacher_generates_by_itself(whole, job, rows):
    documents = [json.loads(line) for line in whole.read_text().splitlines()]
    assert [list(document) for document in documents] == [["text"]] * 19
    tok = tokenizer.load(str(job / "teacher"))
    module, params = models.from_hf(job / "teacher")
    texts = [document.text for document in text.training_documents(rows)]
    assert len(texts) > 19
    short = cut = 0
    for n, ids in enumerate(tok.encode(texts[:19])):
        prompt = [tok.bos, *ids[:12].tolist()]
        short += len(prompt) < 13
        found = generation.generate(module, params, new=4, key=jax.random.key(5), rows=np.array([n]), temperature=0.8, eos=tok.eos,
                                    vocab=tok.vocab, **generation.aligned([prompt], 13))
        written = found.tokens[0, : int(found.mask.sum())].tolist()
        ids = prompt[1:] + [token for token in written if token != tok.eos]
        raw = b"".join(tokenizer.token_pieces(tok)[token] for token in ids)
        missing = 0 if written[-1] == tok.eos else begun(raw)
        cut += missing > 0
        assert documents[n]["text"] == (raw[:-missing].decode(errors="replace") if missing else tok.decode(ids))
    assert short  # some documents are shorter than a prompt
    assert cut  # and some were cut off within a character


def begun(raw: bytes) -> int:
    """Bytes at the end that are the beginning of a character, the rest of which is missing."""
    for count in range(1, 4):
        try:
            raw[-count:].decode()
        except UnicodeDecodeError as error:
            if (error.start, error.reason) == (0, "unexpected end of data"):
                return count
    return 0


@pytest.mark.parametrize(("written", "ends", "text"), [
    (b"a\xf0\x9f\x98", "length", "a"),  # three ids of four
    (b"a\xf0\x9f\x98\x80", "length", "a😀"),
    (b"a\xf0\x9f\x98", "eos", "a\ufffd"),  # the model ended it so
    (b"\xe6a\xe6\x97\xa5\xe6", "length", "\ufffda日"),  # what is wrong within stays
    (b"a\x97", "length", "a\ufffd"),  # no character begins so: nothing is missing after it
    (b"a\xe6\xc3", "length", "a\ufffd"),
    (b"\xe6", "length", "é"),  # the prompt is whole
])
def test_a_document_that_is_cut_off_ends_in_a_whole_character(job, tmp_path, monkeypatch, written, ends, text):
    tok = tokenizer.load(str(job / "teacher"))
    of_byte = {piece: token for token, piece in enumerate(tokenizer.token_pieces(tok)) if len(piece) == 1}
    spell = lambda raw: [of_byte[bytes([byte])] for byte in raw]  # noqa: E731
    ids = [*spell(written), *([tok.eos] if ends == "eos" else [])]
    prompt, text = ("é", text) if text == "é" else ("", text)
    found = generation.Generated(np.array([ids]), np.ones((1, len(ids)), bool), np.zeros((1, len(ids))))
    monkeypatch.setattr(generation, "generate", lambda *args, **options: found)
    wanted = dict(seed=0, batch=1, documents=1, tokens=len(ids), temperature=1.0, top_p=1.0, prompt=2, field="text")
    generate.write(tmp_path / "out", None, None, tok, [[tok.bos, *spell(prompt.encode())]], wanted)
    assert json.loads((tmp_path / "out").read_text()) == {"text": text}


def test_an_id_that_holds_more_than_the_cut_character_keeps_the_rest():
    tok = tokenizer.train(["日本日本日本日本"], 258, "an id of two characters")
    [ids] = tok.encode(["日本日本"])
    pieces = [tokenizer.token_pieces(tok)[token] for token in ids]
    assert b"\xa5\xe6" in pieces  # the end of one, and the beginning of the other
    for count in range(1, len(ids) + 1):
        whole = b"".join(pieces[:count]).decode(errors="ignore")
        assert generate.cut_off(tok, ids[:count].tolist()) == whole
    assert whole == "日本日本"


def test_a_command_that_was_killed_ends_in_the_same_bytes(whole, workdir, tmp_path, monkeypatch, capsys):
    out, partial = tmp_path / "written.jsonl", tmp_path / "written.jsonl.partial"
    sync, calls = generate.os.fsync, []

    def fsync(file):
        calls.append(file)
        if len(calls) == 2:
            raise KeyboardInterrupt
        sync(file)

    with monkeypatch.context() as patch:
        patch.setattr(generate.os, "fsync", fsync)
        assert run(workdir, out) == 130
    assert "The same command goes on from there" in capsys.readouterr().err
    assert not out.exists()
    assert partial.read_bytes().count(b"\n") == 8
    partial.write_bytes(partial.read_bytes()[:-7])  # a kill in the middle of a line: its batch is made again
    assert run(workdir, out) == 0
    assert out.read_bytes() == whole.read_bytes()
    assert not partial.exists()
    before = out.stat().st_mtime_ns
    assert run(workdir, out) == 0
    assert out.stat().st_mtime_ns == before


@pytest.mark.parametrize(("flags", "said"), [
    ((*FLAGS, "--seed=6"), "written.jsonl: was begun from something else: seed (there 5, now 6); accepted: the same command"),
    (("--top_p=0",), "--top_p: found 0.0; accepted: above 0"),
    (("--documents=0",), "--documents: found 0; accepted: 1 or more"),
    (("--temperature=nan",), "--temperature: found nan; accepted: 0 or more"),
    (("--prompt=16",), "--prompt, --tokens: found 16 and 0; accepted: from 1 new token to as many as the 16 positions of the teacher"),
    (("--prompt=12", "--tokens=5"), "--prompt, --tokens: found 12 and 5; accepted: from 1 new token"),
    (("--run=kd-0",), "--run: found 'kd-0', which is not a finished run of"),
    (("--document=x",), "usage: python -m jaxdistill.generate WORKDIR OUT.jsonl"),
])
def test_what_cannot_be_is_one_line_and_leaves_the_file(flags, said, whole, workdir):
    before = whole.read_bytes()
    with pytest.raises(UserError) as caught:
        run(workdir, whole, *flags)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert whole.read_bytes() == before


def test_a_models_folder_is_no_workdir(workdir, tmp_path):
    with pytest.raises(UserError, match=r"export/config.json: found no job \(no runs\); accepted: the workdir of a job"):
        run(workdir / "runs/teacher-0/export", tmp_path / "out")


def test_two_do_not_write_one_file(workdir, tmp_path):
    with only_writer(tmp_path / ".out.lock", "another"), pytest.raises(UserError, match="out: another process is writing it"):
        run(workdir, tmp_path / "out")
    assert not (tmp_path / "out.manifest").exists()


def test_what_is_whole_is_whole_whatever_machine_asks(whole, workdir, tmp_path, capsys):
    shutil.copytree(whole.parent, tmp_path / "moved")
    manifest = tmp_path / "moved" / f"{whole.name}.manifest"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"device": "another", "jax": "0.0"}))
    assert run(workdir, tmp_path / "moved" / whole.name) == 0
    assert "whole already" in capsys.readouterr().out
    (tmp_path / "moved" / whole.name).rename(tmp_path / "moved" / f"{whole.name}.partial")
    with pytest.raises(UserError, match="was begun from something else"):  # the rest would round otherwise
        run(workdir, tmp_path / "moved" / whole.name)


def test_the_text_is_where_the_jobs_data_look_for_it(workdir, tmp_path):
    job = json.loads((workdir / "config.json").read_text())
    shutil.copytree(workdir, tmp_path / "job")
    (tmp_path / "job" / "config.json").write_text(json.dumps(job | {"data": job["data"] | {"field": "content"}}))
    assert run(tmp_path / "job", tmp_path / "out", "--documents=2", "--prompt=12", "--tokens=2") == 0
    assert [list(json.loads(line)) for line in (tmp_path / "out").read_text().splitlines()] == [["content"]] * 2


def test_a_file_that_is_somebody_elses_stays(workdir, tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(UserError, match="mine: exists already; accepted: a new file"):
        run(workdir, tmp_path / "mine")
    with pytest.raises(UserError, match="mine: File exists; accepted: a folder that can be written"):
        run(workdir, tmp_path / "mine" / "out")
    assert (tmp_path / "mine").read_text() == "mine"


def test_it_is_trained_on_and_nothing_else_changes(whole, rows):
    """Validation, test and tokenizer stay those of the real text."""
    real = text.load(rows)
    found = text.load(text.TextConfig(**TEXT | dict(path=rows.path, train_path=str(whole))))
    assert tokenizer.tokenizer_hash(found.tokenizer) == tokenizer.tokenizer_hash(real.tokenizer)
    for side in ("validation", "test"):
        assert found.facts["splits"][side] == real.facts["splits"][side]
    written = {json.loads(line)["text"] for line in whole.read_text().splitlines()}
    packed = found.splits["train"]
    decoded = {found.tokenizer.decode(ids[1:]) for ids in np.split(packed.stream, packed.starts[1:])}
    assert decoded == written
    with pytest.raises(UserError, match=r"^data\.train_path '/nowhere': not found"):
        text.load(text.TextConfig(**TEXT | dict(path=rows.path, train_path="/nowhere")))
