"""`xinslm import`: any model, such as a GGUF file, as an ordinary Hugging Face folder.

The weights are those that the file stands for, bit for bit: by default they are stored as float16
or bfloat16 where that holds every value, else as float32. 4-bit values need float32, because each
is the product of a 16-bit scale and a code. Memory holds one tensor at a time.

    run(ImportConfig(model=Path("SmolLM2.Q4_1.gguf"), output_dir=Path("smollm2")))
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from xinslm.config import to_dict
from xinslm.errors import XinslmError
from xinslm.export.config import ImportConfig
from xinslm.files import write_manifest
from xinslm.folders import new_folder, refuse_existing, refuse_inside
from xinslm.model.files import open_model
from xinslm.model.finite import all_finite
from xinslm.model.names import WEIGHTS
from xinslm.model.safetensors_writer import SafetensorsWriter
from xinslm.model.source import ModelSource, weight_shapes
from xinslm.progress import Listener, Progress, ignore
from xinslm.tokenizer.base import check_vocabulary
from xinslm.tokenizer.load import load_tokenizer

KIND, VERSION = "model", 1


@dataclass(frozen=True)
class Result:
    """The folder that was written."""

    folder: Path
    model_type: str
    parameters: int
    dtype: str
    is_exact: bool
    """Whether every weight is stored exactly."""
    vocab_size: int
    has_template: bool

    def describe(self) -> str:
        """Lines for the terminal."""
        exact = "every weight exact" if self.is_exact else "weights rounded"
        chat = "with" if self.has_template else "without"
        return "\n".join(
            [
                f"model     {self.model_type}, {self.parameters:,} parameters, {self.dtype} "
                f"({exact})",
                f"tokenizer {self.vocab_size:,} ids, {chat} a chat template",
                f"output    {self.folder}",
            ]
        )


def run(config: ImportConfig, on_progress: Listener = ignore) -> Result:
    """Write a model with its tokenizer as a Hugging Face folder."""
    refuse_existing(config.output_dir, config.force)
    if config.force:
        refuse_inside(config.output_dir, (config.model, config.tokenizer_path))
    source = open_model(config.model)
    tokenizer = load_tokenizer(config.tokenizer_path or config.model)
    source.require()
    shapes = _shapes(source)
    names = source.require_weights(shapes)
    check_vocabulary(source.settings["vocab_size"], tokenizer, str(config.model))
    exact = _exact_dtypes(source, shapes)
    dtype = exact[0] if config.dtype == "auto" else getattr(torch, config.dtype)
    with new_folder(config.output_dir, config.force) as folder:
        with SafetensorsWriter(folder / WEIGHTS, names) as out:
            for done, name in enumerate(names):
                on_progress(Progress("import", done, len(names), "tensors"))
                out.add(name, _cast(source, name, dtype))
        on_progress(Progress("import", len(names), len(names), "tensors"))
        source.save_config(folder, dtype)
        tokenizer.save(folder)
        inputs = {"model": source.fingerprint}
        write_manifest(
            folder, KIND, VERSION, to_dict(config), inputs, calibration=source.calibration
        )
    return Result(
        config.output_dir,
        source.settings["model_type"],
        source.num_weights,
        str(dtype).removeprefix("torch."),
        dtype in exact,
        tokenizer.vocab_size,
        tokenizer.chat_template is not None,
    )


def _shapes(source: ModelSource) -> dict[str, tuple[int, ...]]:
    """Name and shape of the weights that such a model has, by our class or transformers'."""
    if source.is_own:
        return weight_shapes(source.config)
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {key: value for key, value in source.settings.items() if key != "model_type"}
    try:
        config = AutoConfig.for_model(source.settings["model_type"], **settings)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # transformers raises many types
        raise XinslmError(
            f"transformers has no model like {source.where}: {error!s:.300}"
        ) from None
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    weights = model.state_dict().items()
    return {name: tuple(weight.shape) for name, weight in weights if name not in tied}


def _exact_dtypes(source: ModelSource, shapes: dict[str, tuple[int, ...]]) -> list[torch.dtype]:
    """Types that hold every weight exactly, the narrowest first; stops reading when only float32
    is left.
    """
    exact = [torch.float16, torch.bfloat16]
    for name, shape in shapes.items():
        values = source.rows(name, shape)
        exact = [dtype for dtype in exact if torch.equal(values.to(dtype).float(), values)]
        if not exact:
            break
    return [*exact, torch.float32]


def _cast(source: ModelSource, name: str, dtype: torch.dtype) -> torch.Tensor:
    values = source.tensor(name).to(dtype)
    if not all_finite(values):
        raise XinslmError(
            f"weight '{name}' has values that {str(dtype).removeprefix('torch.')} does not hold: "
            "use --dtype float32"
        )
    return values
