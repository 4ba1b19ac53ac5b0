"""Learning of merges in the native library, with the interface and the results of `learn.py`."""

from collections.abc import Callable, Iterable, Iterator

from xinslm.native.bpe import NativeLearner
from xinslm.tokenizer.alphabet import ALPHABET, Split
from xinslm.tokenizer.learn import count_pieces


class LibraryLearner:
    """A `MergeLearner` whose pieces and pairs are in the native library."""

    def __init__(self, native: NativeLearner):
        self.tokens = list(ALPHABET)
        self.merges: list[tuple[str, str]] = []
        self._native = native

    def count(
        self, texts: Iterable[str], split: Split, on_text: Callable[[int], None]
    ) -> "LibraryLearner":
        """Count the pieces of texts; `on_text` receives each text's length in characters."""
        for text in texts:
            try:
                self._native.add_text(text)
            except UnicodeEncodeError:
                # cut before lone surrogates are replaced, as all texts are in `count_pieces`
                for piece, count in count_pieces([text], split, lambda _: None).items():
                    self._native.add_piece(piece, count)
            on_text(len(text))
        return self

    def start(self, min_frequency: int, max_token_length: int | None) -> int:
        """End counting; return the number of distinct pieces."""
        return self._native.start(min_frequency, max_token_length)

    def run(self, num_tokens: int) -> Iterator[int]:
        """Learn until there are `num_tokens` tokens or no pair is left; yield the size 100 times.

        Sizes are multiples of a hundredth of `num_tokens`, except the last.
        """
        step = max(1, num_tokens // 100)
        size = len(self.tokens)
        while size < num_tokens:
            target = min((size // step + 1) * step, num_tokens)
            size = self._native.run(target)
            if size < target:
                break
            yield size
        self._take_merges()

    def _take_merges(self) -> None:
        for left, right in self._native.merges().tolist():
            pair = self.tokens[left], self.tokens[right]
            self.merges.append(pair)
            self.tokens.append(pair[0] + pair[1])
