"""The stage `prepare`: raw text and chats in, a dataset folder out.

    xinslm prepare --data-path stories.jsonl.gz --tokenizer-path runs/tokenizer --output-dir out

A plain text becomes BOS (EOS if the tokenizer has no BOS), its tokens, and the end token; all but
the first are targets. A chat is rendered with the chat template; its answers are the targets.
Documents are streamed: memory holds one batch of documents and a hash of each.
"""

import hashlib
import shutil
import time
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from xinslm.config import to_dict
from xinslm.data.config import PrepareConfig
from xinslm.data.dataset import KIND, VERSION
from xinslm.data.encode import Encoded, Encoder, show
from xinslm.data.holdout import draw_number, plan_holdout, share_holds
from xinslm.data.read import ReadOptions, read_documents
from xinslm.data.records import Document
from xinslm.data.unigram import measure_unigram_nats
from xinslm.data.writer import SplitWriter
from xinslm.errors import XinslmError
from xinslm.files import write_manifest
from xinslm.folders import new_folder, refuse_existing, refuse_inside, refuse_output_in
from xinslm.progress import Listener, Progress, ignore
from xinslm.tokenizer.base import Tokenizer, id_dtype

_BATCH_CHARACTERS, _BATCH_DOCUMENTS = 1 << 20, 1024


@dataclass(frozen=True)
class PrepareResult:
    """What was written."""

    output_dir: Path
    splits: dict[str, dict[str, int]]
    duplicates_dropped: int
    without_targets: int
    samples: tuple[str, ...]
    warning: str = ""
    """Why the held-out share is not the requested one."""

    def describe(self) -> str:
        """Return a table of the splits, after the documents that `show` requests."""
        columns = ("documents", "tokens", "targets", "bytes")
        heads = "".join(f"{column:>16}" for column in columns)
        lines = [*self.samples, f"{'':10}{heads}    bytes/target"]
        for name, split in self.splits.items():
            ratio = split["bytes"] / max(split["targets"], 1)
            counts = "".join(f"{split[column]:16,}" for column in columns)
            lines.append(f"{name:10}{counts}{ratio:16.2f}")
        lines.append(f"exact duplicates dropped: {self.duplicates_dropped:,}")
        if self.without_targets:
            lines.append(f"documents without an answer dropped: {self.without_targets:,}")
        if self.warning:
            lines.append(f"note: {self.warning}")
        return "\n".join([*lines, f"written to {self.output_dir}"])


def run(config: PrepareConfig, on_progress: Listener = ignore) -> PrepareResult:
    """Write the dataset folder `config.output_dir` atomically."""
    from xinslm.tokenizer.load import load_tokenizer

    config.check()
    inputs = (*config.data_path, *config.validation_path)
    refuse_output_in(config.output_dir, inputs)
    refuse_existing(config.output_dir, config.force)
    if config.force:
        refuse_inside(config.output_dir, (*inputs, config.tokenizer_path))
    return _Stage(config, load_tokenizer(config.tokenizer_path), on_progress).run()


class _Stage:
    """One run: the writers, the hashes of the documents seen, and the counts."""

    def __init__(self, config: PrepareConfig, tokenizer: Tokenizer, on_progress: Listener) -> None:
        self.config, self.tokenizer, self.on_progress = config, tokenizer, on_progress
        self.encoder = Encoder(tokenizer, config.document_end, config.train_on_prompts)
        self.seen: set[bytes] = set()
        self.dtype = np.dtype(id_dtype(tokenizer.vocab_size))
        # of each document of a split: its draw, and whether it can be cut
        self.draws = {"train": array("d"), "validation": array("d")}
        self.divisible = {"train": bytearray(), "validation": bytearray()}
        self.sources: Counter[str] = Counter()
        self.numbers: dict[str, int] = {}
        self.duplicates = self.without_targets = 0
        self.samples: list[str] = []
        self.started = time.monotonic()

    def run(self) -> PrepareResult:
        config = self.config
        with new_folder(config.output_dir, config.force) as folder:
            with ExitStack() as files:
                self._open(folder, files)
                self._fill()
                warning = self._hold_share(folder, files)
                self._require()
                splits = {name: writer.finish() for name, writer in self.writers.items()}
            self.tokenizer.save(folder / "tokenizer")
            write_manifest(
                folder,
                KIND,
                VERSION,
                to_dict(config),
                {"tokenizer": self.tokenizer.fingerprint()},
                vocab_size=self.tokenizer.vocab_size,
                dtype=self.dtype.name,
                document_end=config.document_end,
                splits=splits,
                unigram_nats=measure_unigram_nats(
                    folder, splits, self.dtype, self.tokenizer.vocab_size
                ),
                duplicates_dropped=self.duplicates,
                sources=dict(self.sources),
                source_names=list(self.numbers),
                without_targets_dropped=self.without_targets,
            )
        dropped = self.duplicates, self.without_targets
        return PrepareResult(config.output_dir, splits, *dropped, tuple(self.samples), warning)

    def _open(self, folder: Path, files: ExitStack) -> None:
        self.writers = {
            name: files.enter_context(SplitWriter(folder / name, self.dtype))
            for name in ("train", "validation")
        }

    def _fill(self) -> None:
        """Read all data into the two splits."""
        config = self.config
        names = ("split_documents", "text_field", "dataset_name", "dataset_split")
        options = ReadOptions(**{n: getattr(config, n) for n in names}, on_note=self._note)
        documents = read_documents(config.data_path, options)
        if config.validation_path:
            # Validation comes first: a copy in the training data is then dropped as the
            # duplicate.
            self._write(read_documents(config.validation_path, options), "validation")
            self._write(documents, "train")
        else:
            self._write(documents, "train" if config.validation_fraction == 0 else None)

    def _write(self, documents: Iterable[Document], split: str | None) -> None:
        """Tokenize documents into one split, or each into the split of its draw."""
        for batch in _batches(self._new(documents)):
            for (document, digest), encoded in zip(
                batch, self.encoder([d for d, _ in batch]), strict=True
            ):
                if not encoded.mask.any():
                    self.without_targets += 1
                    continue
                draw = draw_number(digest, self.config.seed)
                is_held = draw < self.config.validation_fraction
                target = split or ("validation" if is_held else "train")
                self._append(target, document, encoded, draw)
                limit = self.config.max_tokens
                if target == "train" and limit and self.writers["train"].num_tokens >= limit:
                    self._report()
                    return
            self._report()

    def _new(self, documents: Iterable[Document]) -> Iterator[tuple[Document, bytes]]:
        """Yield the documents that were not seen before, with the hash of their content."""
        for document in documents:
            digest = hashlib.blake2b(document.content(), digest_size=16).digest()
            if not self.config.keep_duplicates:
                if digest in self.seen:
                    self.duplicates += 1
                    continue
                self.seen.add(digest)
            yield document, digest

    def _append(self, split: str, document: Document, encoded: Encoded, draw: float) -> None:
        source = document.source.rpartition(":")[0]
        self.sources[source] += 1
        number = self.numbers.setdefault(source, len(self.numbers))
        self.writers[split].append(encoded.tokens, encoded.mask, encoded.num_bytes, number)
        self.draws[split].append(draw)
        self.divisible[split].append(self.encoder.can_cut(document, encoded))
        if len(self.samples) < self.config.show:
            self.samples.append(show(self.tokenizer, document, encoded))

    def _hold_share(self, folder: Path, files: ExitStack) -> str:
        """Hold the planned tokens out; return a warning if the share is not the requested one."""
        config = self.config
        lengths = np.concatenate([np.diff(writer.documents) for writer in self.writers.values()])
        total = int(lengths.sum())
        if config.validation_path or config.validation_fraction == 0 or total == 0:
            return ""
        limit = config.max_tokens
        tails = plan_holdout(
            lengths,
            np.concatenate([np.asarray(draws) for draws in self.draws.values()]),
            np.concatenate([np.frombuffer(flags, bool) for flags in self.divisible.values()]),
            config.validation_fraction,
            total - limit if limit is not None and limit <= total else None,
        )
        drawn = np.repeat([False, True], [len(writer) for writer in self.writers.values()])
        if not np.array_equal(tails, np.where(drawn, lengths, 0)):
            self._split_again(folder, files, tails)
        held = self.writers["validation"].num_tokens
        if share_holds(held, total, config.validation_fraction):
            return ""
        warning = (
            f"validation has {held / total:.1%} of the tokens, not "
            f"{config.validation_fraction:.1%}: there are too few documents, or too few that can "
            "be cut (chats are not). Add data or pass --validation-path"
        )
        self._note(warning)
        return warning

    def _split_again(self, folder: Path, files: ExitStack, tails: np.ndarray) -> None:
        """Write the last `tails` tokens of each document to validation, the others to train."""
        drawn = folder / "drawn"
        drawn.mkdir()
        old = list(self.writers.values())
        for writer in old:
            writer.folder.rename(drawn / writer.folder.name)
        self._open(folder, files)
        train, validation = self.writers.values()
        pieces = (writer.read(index) for writer in old for index in range(len(writer)))
        cut = cut_tokens = 0
        for tail, (tokens, mask, num_bytes, source) in zip(tails.tolist(), pieces, strict=True):
            if tail in (0, len(tokens)):
                (validation if tail else train).append(tokens, mask, num_bytes, source)
                continue
            parts = self.encoder.cut(Encoded(tokens, mask, num_bytes), tail)
            for writer, part in zip((train, validation), parts, strict=True):
                writer.append(part.tokens, part.mask, part.num_bytes, source)
            cut, cut_tokens = cut + 1, cut_tokens + len(parts[1].tokens)
        shutil.rmtree(drawn)
        if cut:
            self._note(
                f"few or long documents: the last {cut_tokens:,} tokens of {cut} of them are held "
                "out for validation"
            )

    def _require(self) -> None:
        """Raise XinslmError if there are no training tokens, or fewer than `max_tokens`."""
        train, limit = self.writers["train"].num_tokens, self.config.max_tokens
        if train == 0:
            raise XinslmError(
                f"no training data is left: {self.duplicates:,} documents were dropped as "
                f"duplicates, {self.without_targets:,} because they have no answer. Pass other "
                "data to --data-path"
            )
        if limit is not None and train < limit:
            raise XinslmError(
                f"--max-tokens is {limit:,}, but the data has only {train:,} training tokens. Set "
                f"it to at most {train:,}, leave it out, or add data"
            )

    def _note(self, note: str) -> None:
        self.on_progress(Progress("prepare", note=note))

    def _report(self) -> None:
        tokens = sum(writer.num_tokens for writer in self.writers.values())
        documents = sum(map(len, self.writers.values()))
        speed = tokens / max(time.monotonic() - self.started, 1e-9)
        values = {"tokens": tokens, "tokens/s": speed}
        self.on_progress(Progress("prepare", documents, unit="documents", values=values))


def _batches(documents: Iterable[tuple[Document, bytes]]) -> Iterator[list[tuple[Document, bytes]]]:
    batch: list[tuple[Document, bytes]] = []
    size = 0
    for item in documents:
        batch.append(item)
        size += len(item[0].plain_text)
        if size >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
