"""Text for language models: documents, split by content, tokenized and packed, with every byte accounted for.

The order matters. Documents are split before anything is learned from them: the tokenizer is trained on the training
split alone. A document's split follows from the hash of its content, so that a duplicate never sits on both sides and a
document keeps its side when others are added.
"""

import collections
import dataclasses
import functools
import hashlib
import platform
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from jaxdistill import UserError
from jaxdistill.data import alignment, cache, packing, tokenizer
from jaxdistill.data.alignment import Paired
from jaxdistill.data.documents import SOURCES, documents
from jaxdistill.data.packing import Packed
from jaxdistill.data.tokenizer import SMALLEST_VOCAB, Tokenizer

LARGEST_VOCAB = 2**20  # several times that of any language model; the trainer makes room for all of it at once


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The section `data` of text: what to read and how to cut it. Hashable: `load` remembers what it loaded."""

    source: str = "stdlib"  # stdlib | files | jsonl | parquet | tfds
    path: str = ""  # file, folder or glob; tfds: the dataset's name or folder
    field: str = "text"  # of jsonl, parquet and tfds
    invalid_utf8: str = "error"  # error | replace (by U+FFFD, counted)
    tokenizer: str = ""  # folder, tokenizer.json or hub name; "": byte-level BPE trained on the training split
    vocab: int = 2048  # ids of the trained BPE
    length: int = 128  # labels in a row
    validation: float = 0.05  # fraction of the documents
    test: float = 0.05
    train_tokens: int = 0  # predicted tokens to keep; 0: all
    eval_tokens: int = 0  # at most as many, of validation and of test; 0: all
    train_path: str = ""  # jsonl with this `field`, as jaxdistill.generate writes: trained on in place of the split's own documents

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), type(field.default)
            if not (type(value) is kind or (kind is float and type(value) is int)):
                self._refuse(field.name, kind.__name__)
        if self.source not in SOURCES:
            self._refuse("source", " | ".join(SOURCES))
        if bool(self.path) == (self.source == "stdlib"):
            self._refuse("path", "a path" if not self.path else "none", f" with data.source {self.source!r}")
        if self.invalid_utf8 not in ("error", "replace"):
            self._refuse("invalid_utf8", "error | replace")
        if not self.field:
            self._refuse("field", "a field's name")
        if not self.tokenizer and not SMALLEST_VOCAB <= self.vocab <= LARGEST_VOCAB:
            self._refuse("vocab", f"{SMALLEST_VOCAB} (all bytes and the end of text) to {LARGEST_VOCAB}")
        if self.length < 2:
            self._refuse("length", "2 or more")
        for name in ("validation", "test"):
            if not 0 < getattr(self, name) < 1:
                self._refuse(name, "a fraction above 0 and below 1")
        if self.validation + self.test >= 1:
            self._refuse("validation", f"less than 1 together with data.test {self.test}")
        for name in ("train_tokens", "eval_tokens"):
            if getattr(self, name) < 0:
                self._refuse(name, "0 (all) or more")

    def _refuse(self, name: str, accepted: str, condition: str = ""):
        raise UserError(f"data.{name} {getattr(self, name)!r}{condition}: {accepted} is accepted")


class Document(NamedTuple):
    digest: bytes  # SHA-256 of the text
    name: str
    text: str


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """Text, ready to train on.

    Attributes:
      splits: "train", "validation", "test" -> rows.
      tokenizer: with `bos`, the id before every document.
      vocab: number of ids.
      token_bytes: int32 [vocab], UTF-8 bytes that each id stands for: the denominator of bits per byte.
      eos: the end-of-text id.
      facts: JSON-able identity and size of what was read; the manifest's data fingerprint.
      teacher: of `paired`, the second tokenizer.
    """

    splits: dict[str, Packed | Paired]
    tokenizer: Tokenizer
    vocab: int
    token_bytes: np.ndarray
    eos: int
    facts: dict
    teacher: Tokenizer | None = None


def split(read: Iterable[tuple[str, str]], config: TextConfig) -> dict[str, list[Document]]:
    """Documents by split, each split in the order of its hashes (random in content, the same on every machine)."""
    parts = {"train": [], "validation": [], "test": []}
    for name, text in read:
        digest = hashlib.sha256(text.encode()).digest()
        u = int.from_bytes(digest[:8], "big") / 2**64
        side = "test" if u < config.test else "validation" if u < config.test + config.validation else "train"
        parts[side].append(Document(digest, name, text))
    counts = {side: len(part) for side, part in parts.items()}
    for side in ("test", "validation", "train"):
        if not counts[side]:
            key = "validation" if side == "train" else side
            raise UserError(
                f"data.{key} {getattr(config, key)}: of {sum(counts.values())} documents none falls into {side} "
                f"({', '.join(f'{name} {count}' for name, count in counts.items())}); another fraction or more documents "
                "are accepted (a file is one document and is never divided: cut a large one into several)"
            )
    return {side: sorted(part) for side, part in parts.items()}


@functools.lru_cache(maxsize=4)  # the runs of one job share one corpus
def load(config: TextConfig) -> Corpus:
    """Reads, splits, tokenizes and packs; tokenizer and token ids come from the cache where it has them.

    Raises:
      UserError: whatever of the user's does not fit, in one line (see `documents`, `split`, `tokenizer.load`, `verify`).
    """
    counts = collections.Counter(skipped=0, replaced=0, empty=0)
    parts, prints = _read(config, counts)
    if config.tokenizer:
        tok = tokenizer.load(config.tokenizer)
    else:
        own, own_prints = _read(dataclasses.replace(config, train_path=""), collections.Counter()) if config.train_path else (parts, prints)
        tok = tokenizer.train([document.text for document in own["train"]], config.vocab, own_prints["train"])
    facts = {"source": config.source, **counts, "tokenizer": tokenizer.tokenizer_hash(tok), "vocab": tok.vocab, "splits": {}}
    if config.source == "stdlib":
        facts["python"] = platform.python_version()
    sizes = tokenizer.token_bytes(tok)
    splits = {}
    for side, part in parts.items():
        limit = config.train_tokens if side == "train" else config.eval_tokens
        stream, starts = _tokenized(part, tok, limit, side, (prints[side], facts["tokenizer"]))
        packed = splits[side] = Packed(stream, starts, config.length)
        facts["splits"][side] = {
            "sha256": prints[side],
            "documents": len(starts),
            "bytes": int(sizes[packed.labels].sum(dtype=np.int64)),
            "tokens": packed.predicted,
            "rows": len(packed),
        }
    return Corpus(splits, tok, tok.vocab, sizes, tok.eos, facts)


@functools.lru_cache(maxsize=4)
def paired(config: TextConfig, teacher: str, cap: int = 0) -> Corpus:
    """`load(config)` with a teacher's tokens beside each row: its splits are `alignment.Paired`.

    Args:
      teacher: the second tokenizer: a folder, tokenizer.json or hub name.
      cap: at most so many labels in a row of the teacher (its longest sequence); 0: as many as the longest row needs.

    Raises:
      UserError: as `load`, and where the text changed since it was loaded.
    """
    corpus, tok = load(config), tokenizer.load(teacher, "the tokenizer of teacher.path")
    parts, prints = _read(config, collections.Counter())
    identity, sizes = tokenizer.tokenizer_hash(tok), tokenizer.token_bytes(tok)
    splits, facts = {}, {}
    for side, packed in corpus.splits.items():
        if prints[side] != corpus.facts["splits"][side]["sha256"]:
            raise UserError(f"data.path {config.path!r}: its {side} documents changed while they were read; text that stays is accepted")
        used = len(packed.starts)  # of a limited split the first documents
        stream, starts = _tokenized(parts[side][:used], tok, 0, side, (prints[side], identity, used))
        rows = splits[side] = alignment.pair(packed, corpus.token_bytes, stream, starts, sizes, cap)
        aligned = {"teacher_tokens": len(rows.stream) - len(starts), "teacher_length": rows.width}
        facts[side] = corpus.facts["splits"][side] | aligned | {"aligned": len(rows.labels) / packed.predicted}
    return dataclasses.replace(
        corpus, splits=splits, facts=corpus.facts | {"teacher_tokenizer": identity, "splits": facts}, teacher=tok
    )


def _given(config: TextConfig, counts: collections.Counter) -> list[Document]:
    """The documents of `config.train_path`, in the order of their hashes, as a split's own are."""
    try:
        read = list(documents(dataclasses.replace(config, source="jsonl", path=config.train_path, train_path=""), counts))
    except UserError as error:
        raise UserError(str(error).replace("data.path", "data.train_path", 1)) from None
    return sorted(Document(hashlib.sha256(text.encode()).digest(), name, text) for name, text in read)


def training_documents(config: TextConfig) -> list[Document]:
    """The documents that `load(config)` trains on, in order; the last of them it may have cut."""
    return _read(config, collections.Counter())[0]["train"][: len(load(config).splits["train"].starts)]


def _read(config: TextConfig, counts: collections.Counter) -> tuple[dict[str, list[Document]], dict[str, str]]:
    """(documents, SHA-256 of them all) by split."""
    parts = split(documents(config, counts), config)
    if config.train_path:
        parts["train"] = _given(config, counts)
    return parts, {side: cache.key(*(document.digest for document in part)) for side, part in parts.items()}


def _tokenized(part: list[Document], tok: Tokenizer, limit: int, side: str, identity) -> tuple[np.ndarray, np.ndarray]:
    """(stream, starts) of a split's first `limit` predicted tokens, cached."""

    def make():
        kept, total = [], 0
        for ids in tok.encode(document.text for document in part):
            kept.append(ids)
            total += len(ids)
            if limit and total >= limit:
                break
        used = part[: len(kept)]
        tokenizer.verify(tok, [document.name for document in used], [document.text for document in used], kept)
        if total < limit and side == "train":  # a budget is exact; what is only measured on may be smaller
            raise UserError(
                f"data.train_tokens {limit}: the train split has {total} tokens; at most {total}, or 0 for all, is accepted"
            )
        return packing.concatenate(kept, tok.bos, min(limit, total))

    def read(file):
        with np.load(file) as arrays:  # a zip file: its checksums find damage
            return arrays["stream"], arrays["starts"]

    name = f"tokens-{cache.key('tokens 1', *identity, tok.bos, limit)}.npz"
    return cache.cached(name, make=make, read=read, write=lambda value, file: np.savez(file, stream=value[0], starts=value[1]))


def describe(batch: dict[str, np.ndarray], corpus: Corpus, rows: int = 1, width: int = 100) -> str:
    """The first `rows` rows of a batch for people: under each token its label, and whether that label counts.

    Args:
      batch: as `batches` yields it.
      width: characters in a line.
    """
    pieces = tokenizer.token_pieces(corpus.tokenizer)

    def show(index):
        text = pieces[index].decode("utf-8", "backslashreplace") or corpus.tokenizer.backend.id_to_token(int(index)) or ""
        return repr(text)[1:-1].replace(" ", "·")

    lines, heads = [], ["token ", "label ", "counts"]
    for row in range(min(rows, len(batch["tokens"]))):
        tokens, segments = batch["tokens"][row], batch["segments"][row]
        counted = segments[1:] > 0
        labels = np.where(counted & (segments[1:] != segments[:-1]), corpus.eos, tokens[1:])  # where a document ends, that is learned
        lines.append(
            f"row {row}: {counted.sum()} of {len(counted)} labels count; {segments.max()} document(s) or parts; "
            f"{(segments == 0).sum()} padding"
        )
        block = heads
        for token, label, counts in zip(tokens[:-1], labels, counted, strict=True):
            cells = [show(token), show(label), "1" if counts else "0"]
            wide = max(map(len, cells))
            if len(block[0]) + 1 + wide > width and block != heads:
                lines += [*block, ""]
                block = heads
            block = [f"{line} {cell:<{wide}}" for line, cell in zip(block, cells, strict=True)]
        lines += [*block, ""]
    return "\n".join(line.rstrip() for line in lines).rstrip() + "\n"
