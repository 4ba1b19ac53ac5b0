"""Teacher distributions for a student of any other tokenizer, over buckets of its tokens that begin
alike.

At a byte where both tokenizers begin a token, the teacher's tokens spell prefixes of possible
continuations: if the text's tokens are u1 u2 ..., the prefixes are u1..uj v for each j and each
alternative token v; their probabilities follow from the chain rule. The mass of a prefix x goes to
the student's tokens that begin with x, and to shorter ones if the student cuts before x ends. How
often it does either is counted in the dataset, so the masses are right on average for any two
tokenizers. How a bucket's mass divides among its tokens is unknown.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from xinslm.alignment.spans import Pair, SpanAligner

SAMPLE_TOKENS = 200_000
"""Tokens of the dataset in which the student's cuts are counted."""
LEAST_MASS = 1e-3
"""Less likely prefixes are left to the rest."""
UNSEEN = 0.1
"""Count in favour of a cut that was never seen, where longer tokens exist."""
CERTAIN = 0.5
"""Count in favour of the longer tokens before anything was seen."""
LEAST_P = 1e-30
"""Least probability of a teacher's token in the text, which may be 0 by rounding."""
LEVELS = 15
"""Most levels after the first."""
REPORT_TOKENS = 1000
"""Tokens between two reports of progress."""

Range = tuple[int, int]
Bucket = tuple[int, int, int, bool, float]
"""Begin and end, level, whether the next level is inside it, share of its level's set."""


def prediction_dtype(candidates: int) -> np.dtype[Any]:
    """A teacher's most likely tokens at a place, and the probability of the text's token."""
    fields = [("top_ids", "<i4", (candidates,)), ("top_probs", "<f4", (candidates,))]
    return np.dtype([*fields, ("label_prob", "<f8")])


def byte_order(tokenizer: Any) -> np.ndarray:
    """A tokenizer's tokens by their bytes, control tokens last; int64 (vocabulary,)."""
    control = set(tokenizer.special_tokens.values())
    pieces = map(tokenizer.token_bytes, range(tokenizer.vocab_size))
    spelled = [b"" if i in control else piece for i, piece in enumerate(pieces)]
    order = sorted(range(len(spelled)), key=lambda i: (not spelled[i], spelled[i], i))
    return np.array(order, dtype=np.int64)


class BytePrefixAligner(SpanAligner):
    """Converts a teacher's predictions to masses of ranges of the student's vocabulary."""

    kind = "byte_prefix"

    def __init__(
        self, student: Any, teacher: Any, document_end: str, sample: Iterable[np.ndarray] = ()
    ) -> None:
        """`sample` gives documents of the dataset, ids, in which the student's cuts are counted."""
        super().__init__(student, teacher, document_end)
        self.order = byte_order(student)
        spelled = [self.student.bytes[i] for i in self.order.tolist() if i not in self.control]
        self._sorted = [piece for piece in spelled if piece]
        self.place = np.argsort(self.order)
        self._prefixes = {b[:size] for b in self._sorted for size in range(1, len(b) + 1)}
        self.to_student = {theirs: ours for ours, theirs in reversed(self.specials.items())}
        self.teacher_control = set(teacher.special_tokens.values())
        without_text = {teacher.pad_id, teacher.special_tokens.get("<unk>")}
        self.control_without_text = without_text - {teacher.bos_id, teacher.eos_id, None}
        """The teacher's control tokens without text: pad and unknown."""
        self._counts: dict[bytes, dict[int, int]] = {}
        for ids in sample:
            self._count(ids)
        self._shares: dict[bytes, list[tuple[int, Range, float]]] = {}

    def _count(self, ids: np.ndarray) -> None:
        """Note for each beginning of a token how long the token was, 0 for as long or longer."""
        pieces = [b"" if i in self.control else self.student.bytes[i] for i in ids.tolist()]
        text = b"".join(pieces)
        begin = 0
        for piece in pieces:
            size = 1
            while piece and begin + size <= len(text):
                x = text[begin : begin + size]
                tally = self._counts.setdefault(x, {})
                length = 0 if size <= len(piece) else len(piece)
                tally[length] = tally.get(length, 0) + 1
                if size > len(piece) and x not in self._prefixes:
                    break
                size += 1
            begin += len(piece)

    def range_of(self, x: bytes) -> Range:
        """Places of the tokens that begin with x."""
        low = high = bisect_left(self._sorted, x)
        if x in self._prefixes:
            high = bisect_left(self._sorted, _behind(x), lo=low)
        return low, high

    def alone(self, piece: bytes) -> Range:
        """Places of the tokens that are just `piece`."""
        low = bisect_left(self._sorted, piece)
        return low, bisect_left(self._sorted, piece + b"\0", lo=low)

    def shares(self, x: bytes) -> list[tuple[int, Range, float]]:
        """Where the mass of texts that begin with x goes: lengths of x, ranges, shares (sum 1)."""
        if x not in self._shares:
            if len(self._shares) > 1 << 20:
                self._shares.clear()
            self._shares[x] = self._find_shares(x)
        return self._shares[x]

    def _find_shares(self, x: bytes) -> list[tuple[int, Range, float]]:
        tally = self._counts.get(x, {})
        shorter = {size: count for size, count in tally.items() if size}
        longer = tally.get(0, 0) + CERTAIN if x in self._prefixes else 0.0
        total = longer + sum(shorter.values())
        if not total:
            first = self._first_piece(x)
            return [(len(first), self.alone(first), 1.0)] if first else []
        found = [(size, self.alone(x[:size]), count / total) for size, count in shorter.items()]
        return [*found, (len(x), self.range_of(x), longer / total)] if longer else found

    def _first_piece(self, x: bytes) -> bytes:
        """The student's token that a text begins with, of which only the beginning x is known."""
        try:
            ids = self.student.encode_inner([x.decode()])[0]
        except UnicodeDecodeError:
            ids = []
        piece = self.student.bytes[ids[0]] if ids and ids[0] not in self.control else b""
        if piece and x.startswith(piece):
            return piece
        beginnings = (x[:size] for size in range(len(x), 0, -1))
        return next((piece for piece in beginnings if _size(self.alone(piece))), b"")

    def buckets(
        self,
        ids: np.ndarray,
        pair: Pair,
        predictions: np.ndarray,
        report: Callable[[int], None] | None = None,
    ) -> tuple[list[list[Bucket]], np.ndarray]:
        """Buckets of each token of a document but the first; none if the teacher does not cover it.

        ids: the student's. predictions: (teacher tokens,) `prediction_dtype`. `report` takes the
        number of tokens done. Also returns log p of each token's bytes where teacher tokens spell
        exactly those, else NaN, (tokens - 1,).
        """
        begins, label_prob = pair.teacher_starts[:-1], predictions["label_prob"]
        at = np.searchsorted(begins, pair.student_starts[1:-1], side="right") - 1
        known = (at >= 1) & (begins[at] == pair.student_starts[1:-1]) & ~pair.foreign[1:]
        known &= pair.teacher_spaced[at] == pair.student_spaced[1:]
        known &= np.isfinite(label_prob[at])
        found: list[list[Bucket]] = []
        label_log_probs = np.full(len(ids) - 1, np.nan)
        for number, (first, usable) in enumerate(zip(at.tolist(), known.tolist(), strict=True)):
            if report is not None and number % REPORT_TOKENS == 0:
                report(number)
            buckets: list[Bucket] = []
            if usable:
                label_log_probs[number] = self._walk(
                    int(ids[number]), int(ids[number + 1]), first, pair, predictions, buckets
                )
            found.append(buckets)
        return found, label_log_probs

    def cut_share(self, before: bytes, x: bytes) -> float:
        """How often the student's token `before` ends where it does, if the text goes on with x."""
        tally = self._counts.get(before + x)
        if tally is None:
            return UNSEEN if before + x in self._prefixes else 1.0
        return (tally.get(len(before), 0) + UNSEEN) / (sum(tally.values()) + 1.0)

    def _walk(
        self,
        before: int,
        label: int,
        first: int,
        pair: Pair,
        predictions: np.ndarray,
        buckets: list[Bucket],
    ) -> float:
        """Append a level's buckets for each teacher token in the label; return its log p or NaN."""
        spelled = b"" if label in self.control else self.student.bytes[label]
        piece = b"" if before in self.control else self.student.bytes[before]
        level = _Level(self, piece, (0, len(self.order)))
        log_p, label_log_probs = 0.0, np.nan
        for at in range(first, len(pair.teacher_ids)):
            label_prob = float(predictions["label_prob"][at])
            if not np.isfinite(label_prob):
                break
            actual, p = int(pair.teacher_ids[at]), max(label_prob, LEAST_P)
            piece = b"" if actual in self.teacher_control else self.teacher.bytes[actual]
            x = level.spelled + piece
            # the teacher's tokenizer rewrote the text
            if not x.startswith(spelled) and not spelled.startswith(x):
                return np.nan
            tops = (predictions[name][at].tolist() for name in ("top_ids", "top_probs"))
            level.read(actual, p, *tops)
            log_p += float(np.log(p))
            if x == spelled and (piece or not spelled):
                label_log_probs = log_p
            is_decided = len(x) > len(spelled) or _size(self.range_of(x)) <= 1
            if not piece or is_decided or level.number == LEVELS:
                break
            level.go_on(x, buckets)
        level.close(buckets)
        return label_log_probs


class _Level:
    """What may follow inside the tokens that begin with what is spelled so far."""

    def __init__(self, owner: BytePrefixAligner, before: bytes, place: Range) -> None:
        self.owner, self.before, self.place = owner, before, place
        self.spelled, self.number = b"", 0
        self.texts: list[tuple[bytes | int, float]] = []
        """Prefixes, or a control token after what is spelled, and their masses."""
        self.scale, self.unlisted = 1.0, 0.0

    def read(self, actual: int, p: float, tokens: list[int], probs: list[float]) -> None:
        """Take the teacher's next tokens: the one in the text, and the likeliest others."""
        owner = self.owner
        listed = p
        pairs = [(actual, p)]
        for token, of_token in zip(tokens, probs, strict=True):
            if of_token < LEAST_MASS:
                break
            if token != actual:
                listed += of_token
                pairs.append((token, of_token))
        for token, of_token in pairs:
            if token in owner.control_without_text:
                listed -= of_token
                continue
            piece = owner.teacher.bytes[token]
            x = token if token in owner.teacher_control or not piece else self.spelled + piece
            self.texts.append((x, self.scale * of_token))
        self.unlisted = self.scale * max(1 - listed, 0.0)

    def go_on(self, x: bytes, buckets: list[Bucket]) -> None:
        """Close this level, and begin the one of the tokens that begin with x."""
        place = self.owner.range_of(x)
        if place != self.place:  # else nothing was to be decided
            self.close(buckets, place, x)
            self.number += 1
        longer = ((text, mass) for text, mass in self.texts if isinstance(text, bytes))
        further = [(text, mass) for text, mass in longer if text.startswith(x)]
        total = sum(mass for _, mass in further)
        self.texts = [(text, mass / total) for text, mass in further if text != x]
        self.scale = sum(mass for text, mass in further if text == x) / total
        self.spelled, self.place = x, place

    def close(
        self, buckets: list[Bucket], onward: Range | None = None, x: bytes | None = None
    ) -> None:
        """Append this level's buckets; `onward` holds the tokens that begin with x."""
        masses: dict[Range, float] = {}
        total = self.unlisted
        for text, mass in self.texts:
            for place, of_place in self._places(text, mass, x):
                masses[place] = masses.get(place, 0.0) + of_place
                total += of_place
        for place, of_place in masses.items():
            if place != self.place and place[0] < place[1] and of_place:
                buckets.append((*place, self.number, place == onward, of_place / total))

    def _places(
        self, text: bytes | int, mass: float, onward: bytes | None
    ) -> list[tuple[Range, float]]:
        """Where the mass of a beginning goes inside this level's set, and how much of it does."""
        owner = self.owner
        if isinstance(text, int):
            ours = owner.to_student.get(text)
            if self.spelled:  # the text ends there, and the student's token with it
                return [(owner.alone(self.spelled), mass)]
            if ours is None:
                return []
            place = int(owner.place[ours])
            return [((place, place + 1), mass)]
        if self.before:
            mass *= owner.cut_share(self.before, text)
        if onward is not None and text.startswith(onward):
            text = onward
        least, shares = len(self.spelled), owner.shares(text)
        return [(place, mass * share) for size, place, share in shares if size >= least]


def _size(place: Range) -> int:
    return place[1] - place[0]


def _behind(x: bytes) -> bytes:
    """The least string after all that begin with x."""
    stripped = x.rstrip(b"\xff")
    return stripped[:-1] + bytes([stripped[-1] + 1]) if stripped else b"\xff" * 64
