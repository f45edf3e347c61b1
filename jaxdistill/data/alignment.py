"""One text in two tokenizations: which tokens end at the same byte, and rows of both for training.

Everything is counted in UTF-8 bytes: the pieces of one emoji share its character, but no byte. Two tokens are aligned when
they have consumed exactly the same bytes; what follows them has no say in it, so that a teacher's state at the aligned
place knows nothing that the student must still predict. Sequences are never truncated to the shorter one, nor stretched.
"""

import dataclasses

import numpy as np

from jaxdistill.data import tokenizer
from jaxdistill.data.packing import Packed
from jaxdistill.data.tokenizer import Tokenizer


def ends(stream: np.ndarray, starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """int64 [T]: the byte at which each token of a stream of documents (see `Packed`) ends.

    A prefix counts as one byte, whatever its id stands for: so prefixes meet prefixes, and no document its neighbour.

    Args:
      sizes: int32 [vocab], the bytes of each id, as `tokenizer.token_bytes` gives them.
    """
    each = sizes[stream]
    each[starts] = 1
    return np.cumsum(each, dtype=np.int64)


def align(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All pairs (i, j) of tokens that end at the same byte, as int64 [pairs] each, both rising.

    A token of no bytes ends where the one before it did, and is in no pair: a pair is settled once its own tokens are
    there, whatever comes after them.

    Args:
      a, b: the ends of the tokens of two tokenizations of one text, never falling. Either may stop earlier.
    """
    size = max(a.max(initial=0), b.max(initial=0)) + 1

    def met(these, others):
        ends_here = np.zeros(size, bool)
        ends_here[others] = True
        return np.flatnonzero(ends_here[these] & (np.diff(these, prepend=0) > 0))

    return met(a, b), met(b, a)


def shared(a: Tokenizer, b: Tokenizer) -> np.ndarray:
    """int32 [vocab of a]: the id in b that stands for the same bytes as each id of a, else -1.

    Where several ids of one tokenizer stand for the same bytes, the last one is taken: SentencePiece lists its 256 bytes,
    which it falls back on, before its pieces. So no two ids of a share one of b, except that the marks before and after
    a document are matched by role, and a tokenizer may have one id for both (the end's match wins there).
    """
    last_a, last_b = ({piece: index for index, piece in enumerate(tokenizer.token_pieces(tok)) if piece} for tok in (a, b))
    ids = np.full(a.vocab, -1, np.int32)
    for piece, index in last_a.items():
        ids[index] = last_b.get(piece, -1)
    ids[a.bos] = b.bos
    ids[a.eos] = b.eos
    return ids


@dataclasses.dataclass(frozen=True, eq=False)
class Paired:
    """The student's rows, and beside each the teacher's tokens of the same bytes. Goes wherever `Packed` does.

    A row of the student is a stretch of bytes. The teacher's row is every token of its own that lies within that stretch:
    it may begin later than the student's, where a token straddles the beginning, and never ends later.

    Attributes:
      packed: the student's split.
      stream, starts: the teacher's tokens of the same documents, laid out as in `Packed`.
      partner: int64 [T], for each token of the student's stream the aligned one of the teacher's, else -1.
      first, after: int64 [rows], the stretch of the teacher's stream beside each row.
      width: M, the number of labels in a row of the teacher.
    """

    packed: Packed
    stream: np.ndarray
    starts: np.ndarray
    partner: np.ndarray
    first: np.ndarray
    after: np.ndarray
    width: int

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.packed)

    @property
    def labels(self) -> np.ndarray:
        """int32: the labels that count and at whose place the teacher has a state too, over all rows, in order.

        The others, of `packed.labels`: no token of the teacher ends there, or it straddles the beginning of the row, or
        it is beyond the `width` inputs of the row.
        """
        place = np.delete(np.arange(len(self.packed.stream) - 1), self.packed.starts[1:] - 1)  # all but the ends of documents
        beside = self._beside(place, place // self.packed.length)
        return self.packed.stream[place + 1][(beside >= 0) & (beside < self.width)]

    def rows(self, index) -> dict[str, np.ndarray]:
        """The rows `index` [B]: int32, those of `Packed.rows` as they are, and M = `width` with

          teacher_tokens, teacher_segments, teacher_positions [B, M + 1]: of equal numbers where segments are of the same
            document; padding is 0.
          aligned [B, length + 1]: the place in the teacher's row of the token that ends at the same byte of the same
            document (prefixes with each other), else -1.
          spans [B, length], teacher_spans [B, M]: the span to which each label belongs, else -1. A span runs from one
            aligned place to the next in the same segment and spells the same bytes on both sides; numbered 0, 1, ... in
            a row.
        """
        index = np.asarray(index)
        rows, length = self.packed.rows(index), self.packed.length
        known = np.minimum(index, len(self) - 1)
        first = self.first[known][:, None]
        place = first + np.arange(self.width + 1)
        real = (place < self.after[known][:, None]) & (index < len(self))[:, None]
        place = np.where(real, place, 0)
        document = np.searchsorted(self.starts, place, side="right") - 1
        begins_in = np.searchsorted(self.packed.starts, known * length, side="right") - 1
        teacher = {
            "tokens": self.stream[place],
            "segments": document - begins_in[:, None] + 1,
            "positions": place - np.maximum(self.starts[document], first),
        }
        rows |= {f"teacher_{name}": np.where(real, array, 0).astype(np.int32) for name, array in teacher.items()}
        inside = rows["segments"] > 0
        student_place = np.where(inside, index[:, None] * length + np.arange(length + 1), 0)
        aligned = np.where(inside, self._beside(student_place, known[:, None]), -1)
        hit = np.zeros((len(index), self.width + 2), bool)
        np.put_along_axis(hit, aligned, True, axis=1)  # -1 is the place too many
        return rows | {
            "aligned": aligned.astype(np.int32),
            "spans": _spans(aligned >= 0, rows["segments"]),
            "teacher_spans": _spans(hit[:, :-1], rows["teacher_segments"]),
        }

    def _beside(self, place: np.ndarray, row: np.ndarray) -> np.ndarray:
        """The place in the teacher's `row` that is aligned with `place` of the student's stream, else -1."""
        partner, first = self.partner[place], self.first[row]
        return np.where((partner >= first) & (partner < self.after[row]), partner - first, -1)


def _spans(aligned: np.ndarray, segments: np.ndarray) -> np.ndarray:
    """int32 [B, N] from [B, N + 1]: the span of each label. Segments rise along a row, up to the padding."""
    none = np.iinfo(segments.dtype).max
    before = np.maximum.accumulate(np.where(aligned, segments, 0), axis=1)[:, :-1]  # of the last aligned place before the label
    after = np.minimum.accumulate(np.where(aligned, segments, none)[:, :0:-1], axis=1)[:, ::-1]  # of the next one, at it or later
    inside = (before == segments[:, 1:]) & (after == segments[:, 1:])
    closes = inside & aligned[:, 1:]
    return np.where(inside, np.cumsum(closes, axis=1) - closes, -1).astype(np.int32)


def pair(packed: Packed, sizes: np.ndarray, stream: np.ndarray, starts: np.ndarray, teacher_sizes: np.ndarray, cap: int = 0) -> Paired:
    """Lays the teacher's documents beside the student's rows.

    Args:
      packed: the student's split; its last document may be cut anywhere.
      sizes: int32 [vocab], the bytes of each id of the student's.
      stream, starts: the teacher's tokens of the same documents, whole; they are cut where the student's text ends.
      teacher_sizes: int32 [vocab of the teacher].
      cap: at most so many labels in a row of the teacher; 0: as many as the longest needs. Tokens beyond are left out, and
        `Paired.labels` are what remains.

    Raises:
      ValueError: the documents are not the same, in number or in bytes.
    """
    ours, theirs = ends(packed.stream, packed.starts, sizes), ends(stream, starts, teacher_sizes)
    if not np.array_equal(ours[packed.starts], theirs[starts]) or theirs[-1] < ours[-1]:
        raise ValueError("the two tokenizations are not of the same documents")
    kept = np.searchsorted(theirs, ours[-1], side="right")
    stream, theirs = stream[:kept], theirs[:kept]

    i, j = align(ours, theirs)
    partner = np.full(len(ours), -1, np.int64)
    partner[i] = j
    begin = np.arange(len(packed)) * packed.length
    byte = np.append(0, ours[:-1])[begin]
    # Not beside the row: what begins before it, and what has no bytes and ends where it begins (the document's before).
    first = np.maximum(np.searchsorted(np.append(0, theirs[:-1]), byte), np.searchsorted(theirs, byte, side="right"))
    after = np.searchsorted(theirs, ours[np.minimum(begin + packed.length, len(ours) - 1)], side="right")
    width = max(1, int(np.max(after - first)) - 1)
    width = min(width, cap) if cap else width
    return Paired(packed, stream, starts, partner, first, np.minimum(after, first + width + 1), width)
