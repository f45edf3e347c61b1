"""Tokenizers: a byte-level BPE trained here, or any fast Hugging Face tokenizer, local or by hub name.

Two things must be exact, because results are reported in bits per UTF-8 byte and unlike tokenizers are aligned by bytes:
text that spells a special token ("<|endoftext|>" in a source file) is encoded as the text it is, and the bytes of a
document's tokens are the document's bytes. The dummy space that SentencePiece puts before a text is therefore off.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from jaxdistill import UserError
from jaxdistill.data import cache, tokenizer_files

END = tokenizer_files.END
SMALLEST_VOCAB = 257  # 256 bytes and the end of text


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """A fast tokenizer with the two ids that mark documents.

    Attributes:
      backend: the `tokenizers.Tokenizer`; its truncation, padding and dummy prefix are off.
      bos: the id put before every document: the tokenizer's bos, else its eos.
      eos: the end-of-text id: the tokenizer's eos, else its bos.
      name: where it came from, for messages.
    """

    backend: tokenizers.Tokenizer
    bos: int
    eos: int
    name: str

    @property
    def vocab(self) -> int:
        """Number of ids: the largest + 1, gaps included (the least size of a model's embedding)."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, texts: Iterable[str], *, at_once: int = 256, characters: int = 1 << 22) -> Iterator[np.ndarray]:
        """Yields int32 [tokens] for each text, without special tokens; lazily, in parallel over up to `at_once` texts of up to
        `characters` together (a longer one alone): what the tokenizer says of a text is many times its size."""
        for batch in _batches(texts, at_once, characters):
            # As a list, so that nothing of one batch is left when the next is tokenized.
            yield from [np.array(encoding.ids, np.int32) for encoding in self.backend.encode_batch_fast(batch, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=False)


def train(texts: Sequence[str], vocab: int, fingerprint: str) -> Tokenizer:
    """A byte-level BPE of `vocab` ids (fewer where the text runs out of pairs), cached.

    Args:
      texts: the training split's documents, and no others.
      fingerprint: hash of `texts`, by which the result is cached.
    """

    def make():
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()  # all 256 bytes: nothing is ever unknown
        trainer = trainers.BpeTrainer(vocab_size=vocab, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
        backend.train_from_iterator(texts, trainer, length=len(texts))
        return backend

    key = cache.key("byte-level BPE 1", tokenizers.__version__, vocab, fingerprint)
    backend = cache.cached(
        f"tokenizer-{key}.json",
        make=make,
        read=lambda file: tokenizers.Tokenizer.from_str(file.read().decode()),
        write=lambda backend, file: file.write(backend.to_str().encode()),
    )
    return _wrap(backend, END, END, f"byte-level BPE of {vocab}")


def load(name: str, key: str = "data.tokenizer") -> Tokenizer:
    """The tokenizer `name`: a folder, a tokenizer.json, or a hub name. key: where the config names it, for errors.

    Raises:
      UserError: not found, not readable, offline, without a fast tokenizer, or without eos and bos.
    """
    try:
        return _wrap(*tokenizer_files.find(name), name)
    except UserError as error:
        raise UserError(f"{key} {name!r}: {error}") from None


def save(tok: Tokenizer, folder: str) -> None:
    """Writes `folder` so that `transformers.AutoTokenizer.from_pretrained` gives the same ids, with eos and bos set."""
    os.makedirs(folder, exist_ok=True)
    tok.backend.save(os.path.join(folder, "tokenizer.json"))
    config = {
        # The class that takes tokenizer.json as it is: a model's own class would rebuild its pieces.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tok.backend.id_to_token(tok.bos),
        "eos_token": tok.backend.id_to_token(tok.eos),
        "clean_up_tokenization_spaces": False,
    }
    with open(os.path.join(folder, "tokenizer_config.json"), "w", encoding="utf-8") as file:
        json.dump(config, file, indent=2, ensure_ascii=False)


def tokenizer_hash(tok: Tokenizer) -> str:
    """SHA-256 over all of tokenizer.json that decides which ids a text gets: equal hashes, interchangeable ids."""
    spec = json.loads(tok.backend.to_str())
    deciding = {part: spec[part] for part in ("normalizer", "pre_tokenizer", "model", "added_tokens")}
    return cache.key(json.dumps(deciding, sort_keys=True, ensure_ascii=False))


@functools.lru_cache(maxsize=8)  # half a second for 50,000 tokens, and asked for by every split
def token_pieces(tok: Tokenizer) -> tuple[bytes, ...]:
    """The bytes of text that each id stands for; b"" for special tokens and for ids without a token."""
    spec = json.loads(tok.backend.to_str())
    form = json.dumps([spec[part] for part in ("normalizer", "pre_tokenizer", "decoder")], ensure_ascii=False)
    if '"ByteLevel"' in form:
        piece = _byte_level
    elif "▁" in form:
        piece = _sentencepiece
    else:
        piece = str.encode
    pieces = [b""] * tok.vocab
    for token, index in tok.backend.get_vocab(with_added_tokens=True).items():
        pieces[index] = piece(token)
    for index, token in tok.backend.get_added_tokens_decoder().items():
        pieces[index] = b"" if token.special else token.content.encode()
    return tuple(pieces)


def token_bytes(tok: Tokenizer) -> np.ndarray:
    """int32 [vocab]: how many bytes of UTF-8 each id stands for; 0 for special tokens."""
    return np.array([len(piece) for piece in token_pieces(tok)], np.int32)


def verify(tok: Tokenizer, names: Sequence[str], texts: Sequence[str], ids: Sequence[np.ndarray], *, spelled: int = 32) -> None:
    """Raises UserError unless every document's tokens have its number of bytes, and the first `spelled` spell it."""
    pieces, sizes = token_pieces(tok), token_bytes(tok)
    for i, (name, text, tokens) in enumerate(zip(names, texts, ids, strict=True)):
        raw, size = text.encode(), int(sizes[tokens].sum())
        if size != len(raw) or (i < spelled and b"".join(pieces[token] for token in tokens) != raw):
            found = f"{size} bytes" if size != len(raw) else "other bytes"
            raise UserError(
                f"data.tokenizer {tok.name!r}: the tokens of {name} spell {found}, its text has {len(raw)}; "
                "a tokenizer that keeps every byte is accepted (byte-level, or with byte fallback)"
            )


def _batches(texts: Iterable[str], most: int, characters: int) -> Iterator[list[str]]:
    batch, size = [], 0
    for text in texts:
        if batch and (len(batch) == most or size + len(text) > characters):
            yield batch
            batch, size = [], 0
        batch.append(text)
        size += len(text)
    if batch:
        yield batch


def _byte_level(token: str) -> bytes:
    # A character outside the 256 occurs only in tokens that were put in by hand, as plain text.
    return bytes(BYTE_OF[char] for char in token) if all(char in BYTE_OF for char in token) else token.encode()


def _sentencepiece(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes.fromhex(token[3:5])
    return token.replace("▁", " ").encode()


def _byte_of() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 is itself, the other bytes are U+0100, U+0101, ... in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF = _byte_of()


def _wrap(backend, bos: str | None, eos: str | None, name: str) -> Tokenizer:
    if not bos and not eos:
        raise UserError(
            "neither eos nor bos; one whose tokenizer_config.json names eos_token is accepted"
        )
    backend = tokenizers.Tokenizer.from_str(json.dumps(_without_dummy_prefix(json.loads(backend.to_str()))))
    backend.encode_special_tokens = True  # "<|endoftext|>" within a text is text
    marks = bos or eos, eos or bos
    for mark in marks:
        if backend.token_to_id(mark) is None:
            raise UserError(f"{mark!r} is not in its vocabulary; one that knows its own eos is accepted")
    return Tokenizer(backend, *map(backend.token_to_id, marks), name)


def _without_dummy_prefix(spec: dict) -> dict:
    """tokenizer.json that neither truncates, nor pads, nor puts a space before a text that has none."""

    def clean(part, inner):
        if part is None or part["type"] == "Prepend":
            return None
        if inner in part:
            return part | {inner: [kept for kept in (clean(each, inner) for each in part[inner]) if kept]}
        off = {"ByteLevel": {"add_prefix_space": False}, "Metaspace": {"prepend_scheme": "never"}}
        return part | off.get(part["type"], {})

    normalizer, pre_tokenizer = clean(spec["normalizer"], "normalizers"), clean(spec["pre_tokenizer"], "pretokenizers")
    return spec | {"truncation": None, "padding": None, "normalizer": normalizer, "pre_tokenizer": pre_tokenizer}
