"""The stage `xinslm evaluate`: load a model, score documents, and add the metrics to a run folder.

Use bits per byte to compare models with different tokenizers; perplexity is per token of the
model's own tokenizer.

    xinslm evaluate runs/student --data-path data/stories --run runs/student --name student
"""

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from xinslm.baseline import uninformed
from xinslm.evaluate.config import EvaluateConfig
from xinslm.files import read_json
from xinslm.machine import OtherLoad, environment, is_shared
from xinslm.progress import Listener, Progress, ignore


@dataclass(frozen=True)
class Result:
    """The metrics of one model on one text; the fields are those of a row of evaluation.json."""

    name: str
    model: str
    kind: str
    parameters: int
    file_bytes: int
    activations: str
    """float, or in how many linear layers they were int8."""
    data: str
    documents: int
    tokens: int
    """Scored tokens."""
    bytes: int
    """UTF-8 bytes of the text that they represent."""
    nats_per_token: float
    perplexity: float
    bits_per_byte: float
    tokens_per_second: float
    other_load: float | None
    """Share of the machine's CPU time that other processes used; None if unknown."""
    unigram_bits_per_byte: float | None
    """Bits per byte from the token frequencies of the dataset's train split; None for raw files."""
    trained_by: str | None
    """Command that made the run folder of the model: pretrain, distill or onpolicy."""
    date: str
    machine: str
    """Processor, cores and version of torch."""

    def row(self) -> dict[str, Any]:
        """The row for evaluation.json."""
        return asdict(self)

    def describe(self) -> str:
        """A few aligned lines for the terminal."""
        megabytes = self.file_bytes / 1e6
        lines = [
            (
                "model",
                f"{self.name} ({self.kind}, {self.parameters:,} parameters, {megabytes:,.2f} MB)",
            ),
            (
                "data",
                f"{self.data}: {self.documents:,} documents, {self.bytes:,} bytes, "
                f"{self.tokens:,} tokens",
            ),
            ("bits per byte", f"{self.bits_per_byte:.4f}"),
            ("perplexity", f"{self.perplexity:.3f} per token ({self.nats_per_token:.4f} nats)"),
            ("speed", f"{self.tokens_per_second:,.0f} tokens/s{self._shared()}"),
        ]
        if self.activations != "float":
            lines.insert(1, ("activations", self.activations))
        warning = uninformed(
            self.name, self.bits_per_byte, self.unigram_bits_per_byte, "bits per byte"
        )
        if warning:
            lines.append(("warning", warning))
        return "\n".join(f"{label:<14}{text}" for label, text in lines)

    def _shared(self) -> str:
        """Warn that other processes slowed the measurement."""
        if not is_shared(self.other_load):
            return ""
        return f", while other processes took {self.other_load:.0%} of the CPU time"


def run(config: EvaluateConfig, on_progress: Listener = ignore) -> Result:
    """Measure bits per byte and perplexity of a model on a dataset or on raw files.

    UsageError if the model is quantized and text among them calibrated it.
    """
    from xinslm.device import pick_device
    from xinslm.evaluate.calibration import refuse_calibration_text
    from xinslm.evaluate.documents import frequencies_bits_per_byte, read_items
    from xinslm.evaluate.perplexity import score
    from xinslm.evaluate.scorers import load_scorer
    from xinslm.runs import add_row, require_run, row_name

    config.check()
    if config.run is not None:
        require_run(config.run)
    load = OtherLoad()  # from here, because scoring a small model takes too little time to tell
    device = pick_device(config.device)
    scorer, facts = load_scorer(
        config.model,
        device,
        config.dtype,
        config.max_seq_length,
        config.activations,
    )
    on_progress(Progress("read documents"))
    items = read_items(config.data_path, config.split, scorer.tokenizer, config.max_documents)
    refuse_calibration_text(config.model, items, scorer.tokenizer)
    total = sum(len(item.tokens) - 1 for item in items)
    done = 0
    start = time.perf_counter()

    def report(tokens: int) -> None:
        nonlocal done
        done = min(done + tokens, total)  # windows overlap, so their sum exceeds the documents'
        speed = done / (time.perf_counter() - start)
        on_progress(Progress("evaluate", done, total, "tokens", {"tokens/s": speed}))

    scores = score(scorer, items, config.batch_tokens, report)
    seconds = time.perf_counter() - start
    other_load = load.share()
    nats, tokens = -sum(s.log_likelihood for s in scores), sum(s.tokens for s in scores)
    num_bytes = sum(item.num_bytes for item in items)
    result = Result(
        name=config.name or row_name(config.model, config.activations),
        model=str(config.model),
        kind=str(facts["kind"]),
        parameters=int(facts["parameters"]),
        file_bytes=int(facts["file_bytes"]),
        activations=str(facts["activations"]),
        data=" ".join(config.data_path),
        documents=len(items),
        tokens=tokens,
        bytes=num_bytes,
        nats_per_token=nats / tokens,
        perplexity=math.exp(nats / tokens),
        bits_per_byte=nats / math.log(2) / num_bytes,
        tokens_per_second=tokens / seconds,
        other_load=other_load,
        unigram_bits_per_byte=frequencies_bits_per_byte(config.data_path, config.split),
        trained_by=_trained_by(config.model),
        **environment(device),
    )
    if config.run is not None:
        add_row(config.run, "evaluation.json", result.row())
    return result


def _trained_by(model: Path) -> str | None:
    """Command that trained the model, if it is a run folder or one of its checkpoints."""
    folder = model.resolve()
    for path in (folder / "run.json", folder.parent.parent / "run.json"):
        if path.is_file():
            facts = read_json(path)
            return str(facts["command"]) if isinstance(facts, dict) and "command" in facts else None
    return None
