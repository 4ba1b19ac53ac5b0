"""Learns the merges: counts the distinct pieces of a text, then repeatedly joins the most frequent
pair.

The result is identical to Hugging Face's `BpeTrainer` (Sennrich et al. 2016, byte-level): ties go
to the smallest pair of ids. Counts are Python integers and do not overflow as 32-bit ones do. Only
distinct pieces are kept, not the text. A token's string has one derivation: in any context, the
merges before its own leave the same two parts. So no merge produces a string that already exists,
and `ignore_merges` does not change the ids of a learned vocabulary.
"""

import heapq
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from operator import methodcaller

from xinslm.tokenizer.alphabet import ALPHABET, Split, spell
from xinslm.tokenizer.base import clean_surrogates
from xinslm.tokenizer.merges import Pair

_FINDALL_CHARACTERS = 1 << 20


def pieces_of(text: str, split: Split) -> Iterable[str]:
    """Cut a text into pieces; a long text lazily, so that its pieces are never all in memory."""
    if len(text) <= _FINDALL_CHARACTERS:
        found: list[str] = split.regex.findall(text)
        return found
    return map(methodcaller("group"), split.regex.finditer(text))


def count_pieces(
    texts: Iterable[str], split: Split, on_text: Callable[[int], None]
) -> Counter[bytes]:
    """Count distinct pieces, as UTF-8; `on_text` receives each text's length in characters."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(pieces_of(text, split))
        on_text(len(text))
    encoded: Counter[bytes] = Counter()
    for piece, count in counts.items():
        try:
            encoded[piece.encode()] += count
        except UnicodeEncodeError:
            encoded[clean_surrogates(piece).encode()] += count
    return encoded


class MergeLearner:
    """Pieces as lists of ids, the count of each pair, and the pieces that contain it."""

    def __init__(self, pieces: Counter[bytes], min_frequency: int, max_token_length: int | None):
        """`max_token_length` is in bytes; pairs that would make a longer token are not counted."""
        self.tokens = list(ALPHABET)
        self.merges: list[tuple[str, str]] = []
        self._minimum = max(1, min_frequency)
        self._longest = max_token_length
        ids = {char: index for index, char in enumerate(ALPHABET)}
        self._words = [[ids[char] for char in spell(piece)] for piece in pieces]
        self._frequency = list(pieces.values())
        self._counts: defaultdict[Pair, int] = defaultdict(int)
        self._where: defaultdict[Pair, set[int]] = defaultdict(set)
        for index, word in enumerate(self._words):
            self._change(index, itertools.pairwise(word))
        self._heap = [(-count, pair) for pair, count in self._counts.items()]
        heapq.heapify(self._heap)

    def _change(self, index: int, pairs: Iterable[Pair]) -> None:
        for pair in pairs:
            if self._fits(pair):
                self._counts[pair] += self._frequency[index]
                self._where[pair].add(index)

    def _fits(self, pair: Pair) -> bool:
        length = len(self.tokens[pair[0]]) + len(self.tokens[pair[1]])
        return self._longest is None or length <= self._longest

    def run(self, num_tokens: int) -> Iterator[int]:
        """Learn until there are `num_tokens` tokens or no pair is left; yield each new size."""
        while len(self.tokens) < num_tokens and self._heap:
            negative, pair = heapq.heappop(self._heap)
            count = self._counts.get(pair, 0)
            # later merges removed occurrences: reinsert the pair with its current count
            if count != -negative:
                if count >= self._minimum:
                    heapq.heappush(self._heap, (-count, pair))
                continue
            if count < self._minimum:
                return
            self._merge(pair)
            yield len(self.tokens)

    def _merge(self, pair: Pair) -> None:
        left, right = self.tokens[pair[0]], self.tokens[pair[1]]
        joined = len(self.tokens)
        self.tokens.append(left + right)
        self.merges.append((left, right))
        touched: set[Pair] = set()
        for index in self._where.pop(pair):
            touched |= self._merge_word(index, pair, joined)
        self._counts.pop(pair, None)
        for new in touched:
            if (count := self._counts.get(new, 0)) > 0:
                heapq.heappush(self._heap, (-count, new))

    def _merge_word(self, index: int, pair: Pair, joined: int) -> set[Pair]:
        """Merge all occurrences of a pair in one piece and return the pairs that are new."""
        word, frequency, counts = self._words[index], self._frequency[index], self._counts
        first, second = pair
        touched: set[Pair] = set()
        at, last = 0, len(word) - 1
        while at < last:
            if word[at] != first or word[at + 1] != second:
                at += 1
                continue
            if at > 0:
                before = word[at - 1]
                counts[before, first] -= frequency
                touched.add((before, joined))
            if at + 2 <= last:
                after = word[at + 2]
                counts[second, after] -= frequency
                touched.add((joined, after))
            word[at : at + 2] = [joined]
            last -= 1
            self._change(index, itertools.pairwise(word[max(at - 1, 0) : at + 2]))
            at += 1
        return touched
