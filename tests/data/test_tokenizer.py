"""Tokens spell their documents byte for byte, for each family of tokenizer; files and errors."""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from jaxdistill import UserError
from jaxdistill.data import tokenizer

TEXTS = ["def f(x):\n    return x\n" * 5, "the cat sat on the mat, the cat sat\n" * 9, "naïve café 🙂 日本語 " * 7]


@pytest.fixture(scope="module")
def trained():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", os.devnull)
        return tokenizer.train(TEXTS, 300, "texts")


def spelled(tok, text):
    [ids] = tok.encode([text])
    pieces, sizes = tokenizer.token_pieces(tok), tokenizer.token_bytes(tok)
    assert sizes.dtype == np.int32
    assert sizes.shape == (tok.vocab,)
    assert sizes[ids].sum() == len(text.encode())
    return b"".join(pieces[token] for token in ids).decode()


HARD = "e\u0301 👩‍👩‍👧 \x00 \ufffd <|endoftext|> \r\n \u2581 İ ﬁ <0x41>"


@settings(deadline=None, max_examples=150)
@given(text=st.text())
@example(text=HARD)
@example(text="")
def test_byte_level_tokens_spell_any_text(trained, text):
    assert spelled(trained, text) == text


def test_texts_are_batched_by_their_characters_and_keep_their_ids(trained):
    class Backend:
        def encode_batch_fast(self, texts, **options):
            seen.append([len(text) for text in texts])
            return trained.backend.encode_batch_fast(texts, **options)

    seen, texts = [], ["a b" * 10, "", "c d" * 40, "e", "f", "g", "h i" * 10, ""]
    found = list(dataclasses.replace(trained, backend=Backend()).encode(iter(texts), at_once=4, characters=100))
    assert seen == [[30, 0], [120], [1, 1, 1, 30], [0]]
    assert [ids.tolist() for ids in found] == [trained.backend.encode(text, add_special_tokens=False).ids for text in texts]
    assert {ids.dtype for ids in found} == {np.dtype(np.int32)}
    assert list(trained.encode([])) == []


def test_special_tokens_stand_for_no_bytes_also_when_a_text_spells_them(trained):
    assert tokenizer.token_bytes(trained)[trained.eos] == 0
    [ids] = trained.encode([tokenizer.END])
    assert trained.eos not in ids
    assert trained.bos == trained.eos
    assert trained.vocab == 300


def test_training_is_deterministic_across_processes(trained, tmp_path):
    code = f"from jaxdistill.data import tokenizer; print(tokenizer.tokenizer_hash(tokenizer.train({TEXTS!r}, 300, 'texts')))"
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "PYTHONHASHSEED": "7"}
    found = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == tokenizer.tokenizer_hash(trained)


def write(folder, backend, **config):
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)


def sentencepiece(prepend):
    """Llama's layout: ▁ for spaces, byte fallback, and a dummy space before every text, in either of two places."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "ab", "▁ab"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    merges = [("▁", "a"), ("a", "b"), ("▁a", "b")]
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    if prepend == "normalizer":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


@pytest.mark.parametrize("prepend", ["normalizer", "pre-tokenizer"])
def test_sentencepiece_tokens_spell_any_text(tmp_path, prepend):
    tok = tokenizer.load(write(tmp_path, sentencepiece(prepend), bos_token="<s>", eos_token={"content": "</s>"}))
    assert (tok.bos, tok.eos) == (1, 2)
    text = HARD.replace("\u2581", "") + " ab  a </s> bab"
    assert spelled(tok, text) == text
    assert spelled(tok, "ab") == "ab"
    assert tokenizer.token_pieces(tok)[:5] == (b"", b"", b"", b"\x00", b"\x01")


def test_truncation_padding_and_prefix_space_of_the_file_are_off(trained, tmp_path):
    backend = tokenizers.Tokenizer.from_str(trained.backend.to_str())
    backend.enable_truncation(2)
    backend.enable_padding(length=50)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tok = tokenizer.load(write(tmp_path, backend, eos_token=tokenizer.END))
    assert spelled(tok, TEXTS[0]) == TEXTS[0]
    assert tokenizer.tokenizer_hash(tok) == tokenizer.tokenizer_hash(trained)


def test_saved_tokenizers_load_in_transformers_with_the_same_ids(trained, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save(trained, str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    auto = AutoTokenizer.from_pretrained(tmp_path)
    [ids] = trained.encode([TEXTS[2]])
    assert auto(TEXTS[2])["input_ids"] == ids.tolist()
    assert auto.decode(ids) == trained.decode(ids) == TEXTS[2]
    assert (auto.bos_token_id, auto.eos_token_id) == (trained.bos, trained.eos)
    for name in (tmp_path, tmp_path / "tokenizer.json"):
        assert tokenizer.tokenizer_hash(tokenizer.load(str(name))) == tokenizer.tokenizer_hash(trained)


def test_the_hash_tells_tokenizers_apart(trained):
    assert tokenizer.tokenizer_hash(tokenizer.train(TEXTS, 299, "texts")) != tokenizer.tokenizer_hash(trained)


def test_a_tokenizer_that_loses_bytes_is_refused(tmp_path):
    backend = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "</s>": 2, "B": 3}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tok = tokenizer.load(write(tmp_path, backend, eos_token="</s>"))
    with pytest.raises(UserError, match=r"the tokens of notes.txt spell 2 bytes, its text has 3; .* keeps every byte"):
        tokenizer.verify(tok, ["notes.txt"], ["a a"], list(tok.encode(["a a"])))
    backend.normalizer = normalizers.Lowercase()  # as many bytes, but not the same
    tok = tokenizer.load(write(tmp_path, backend, eos_token="</s>"))
    with pytest.raises(UserError, match="spell other bytes"):
        tokenizer.verify(tok, ["notes.txt"], ["A"], list(tok.encode(["A"])))


def test_errors_name_the_tokenizer(trained, tmp_path):
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    bare = write(tmp_path / "bare", backend)
    foreign = write(tmp_path / "foreign", backend, eos_token="</s>")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/tokenizer.json").write_text("{")
    (tmp_path / "empty").mkdir()
    (tmp_path / "listed_alone").mkdir()
    (tmp_path / "listed_alone/tokenizer_config.json").write_text("[1]")
    half = write(tmp_path / "half", trained.backend)
    pathlib.Path(half, "tokenizer_config.json").write_text("{")
    listed = write(tmp_path / "listed", trained.backend)
    pathlib.Path(listed, "tokenizer_config.json").write_text("[1]")
    for name, message in {
        bare: "neither eos nor bos",
        foreign: "'</s>' is not in its vocabulary",
        str(tmp_path / "broken"): "is not a tokenizer.json",
        str(tmp_path / "missing"): "not found",
        str(tmp_path / "empty"): "data.tokenizer",
        str(tmp_path / "listed_alone"): "not readable by transformers .AttributeError: ",
        half: "tokenizer_config.json: cannot be read as JSON",
        listed: "tokenizer_config.json: found a JSON list",
        write(tmp_path / "number", trained.backend, eos_token=3): "tokenizer_config.json: eos_token: found 3; accepted: a token's text",
        write(tmp_path / "nameless", trained.backend, eos_token={"id": 3}): "eos_token: found {'id': 3}; accepted: a token's text",
        "nobody/nothing": "offline",
    }.items():
        with pytest.raises(UserError, match=message) as caught:
            tokenizer.load(name)
        assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    data = os.environ.get("JAXDISTILL_DATA")
    if not data or not (pathlib.Path(data) / "gpt2_bpe").is_dir():
        pytest.skip("JAXDISTILL_DATA names no folder with gpt2_bpe/encoder.json and vocab.bpe")
    folder = tmp_path_factory.mktemp("gpt2")
    shutil.copy(pathlib.Path(data, "gpt2_bpe/encoder.json"), folder / "vocab.json")
    shutil.copy(pathlib.Path(data, "gpt2_bpe/vocab.bpe"), folder / "merges.txt")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    return tokenizer.load(str(folder))


@settings(deadline=None, max_examples=100)
@given(text=st.text())
@example(text=HARD)
def test_gpt2_tokens_spell_any_text(gpt2, text):
    assert spelled(gpt2, text) == text


def test_gpt2_ids_are_the_published_ones(gpt2):
    [ids] = gpt2.encode(["Hello world"])
    assert ids.tolist() == [15496, 995]
    assert (gpt2.vocab, gpt2.bos, gpt2.eos) == (50257, 50256, 50256)
