"""Byte pair encoding of one piece of text: apply the learned merges, lowest rank first, leftmost
first.

Words repeat (98 % of the pieces of unseen text were seen before), so a bounded table from piece to
ids does nearly all the work, and merging runs only for pieces that it lacks. A short piece is
rescanned after every merge, which is fastest for words. A long piece uses a heap over a linked
list, so that 100,000 equal letters do not take quadratic time.
"""

import heapq
import itertools
from collections.abc import Iterator

import numpy as np

from xinslm.tokenizer.alphabet import spell
from xinslm.tokenizer.base import id_dtype

Pair = tuple[int, int]

_NEVER = 1 << 62
_LONG_SYMBOLS = 200
_CACHED_CHARACTERS = 128
_CACHE_ENTRIES = 1 << 18


class Merger:
    """The vocabulary and merges of a byte-level BPE, applied to bytes."""

    def __init__(self, vocab: dict[str, int], merges: list[tuple[str, str]], ignore_merges: bool):
        """`vocab` and `merges` are spelled as in tokenizer.json.

        With `ignore_merges`, a piece in the vocabulary is one token, independent of the merges.
        Bytes that the vocabulary lacks are dropped, as in Hugging Face.
        """
        self.bytes_to_id = [vocab.get(spell(bytes([byte]))) for byte in range(256)]
        self.ranks: dict[Pair, tuple[int, int]] = {
            (vocab[left], vocab[right]): (rank, vocab[left + right])
            for rank, (left, right) in enumerate(merges)
        }
        self.whole_pieces = vocab if ignore_merges else {}

    def encode(self, piece: bytes) -> list[int]:
        """Return the ids of one piece."""
        if self.whole_pieces:
            token = self.whole_pieces.get(spell(piece))
            if token is not None:
                return [token]
        symbols = [token for byte in piece if (token := self.bytes_to_id[byte]) is not None]
        if len(symbols) > _LONG_SYMBOLS:
            return self._merge_long(symbols)
        for _ in self.steps(symbols):
            pass
        return symbols

    def steps(self, symbols: list[int]) -> Iterator[tuple[int, int]]:
        """Merge `symbols` in place, one merge at a time; yield the rank and the index of each."""
        get, none = self.ranks.get, (_NEVER, 0)
        found = [get(pair, none) for pair in itertools.pairwise(symbols)]
        while found:
            best = min(found)
            if best[0] == _NEVER:
                return
            at = found.index(best)
            symbols[at : at + 2] = [best[1]]
            del found[at]
            if at > 0:
                found[at - 1] = get((symbols[at - 1], symbols[at]), none)
            if at < len(found):
                found[at] = get((symbols[at], symbols[at + 1]), none)
            yield best[0], at

    def _merge_long(self, symbols: list[int]) -> list[int]:
        """Merge with a heap of (rank, index); entries that later merges made stale are skipped."""
        ranks, end = self.ranks, len(symbols)
        following = list(range(1, end + 1))
        previous = list(range(-1, end - 1))
        pairs = enumerate(itertools.pairwise(symbols))
        heap = [(ranks[pair][0], at, pair) for at, pair in pairs if pair in ranks]
        heapq.heapify(heap)
        while heap:
            _, at, pair = heapq.heappop(heap)
            right = following[at]
            if right >= end or (symbols[at], symbols[right]) != pair:
                continue
            symbols[at] = ranks[pair][1]
            symbols[right] = -1
            after = following[at] = following[right]
            following[right] = end
            if after < end:
                previous[after] = at
            for left, next_ in ((previous[at], at), (at, after)):
                if left >= 0 and next_ < end:
                    new = (symbols[left], symbols[next_])
                    if new in ranks:
                        heapq.heappush(heap, (ranks[new][0], left, new))
        return [token for token in symbols if token >= 0]


class PieceTable(dict[str, bytes]):
    """Pieces to packed arrays of ids; computes what is missing and keeps a bounded number.

    Packed ids reduce the encoding of a text to one `b"".join` over its pieces.
    """

    def __init__(self, merger: Merger, vocab_size: int):
        super().__init__()
        self.merger = merger
        self.dtype = np.dtype(id_dtype(vocab_size))

    def __missing__(self, piece: str) -> bytes:
        ids = np.array(self.merger.encode(piece.encode()), self.dtype).tobytes()
        if len(piece) <= _CACHED_CHARACTERS:
            if len(self) >= _CACHE_ENTRIES:
                self.clear()
            self[piece] = ids
        return ids
