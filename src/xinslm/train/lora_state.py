"""Where the training of an adapter stands, in one hidden file beside the folder to come, until that
is written.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from xinslm.errors import UsageError, XinslmError
from xinslm.files import new_file, sha256_json

MOMENTS = ("exp_avg", "exp_avg_sq")


class AdaptState:
    """Saves and restores weights, AdamW's moments and the generator of dropout; `plan` says what
    they belong to.
    """

    def __init__(self, output_dir: Path, plan: dict[str, Any]) -> None:
        self.path = output_dir.parent / f".{output_dir.name}.training.safetensors"
        self.plan = sha256_json(plan)

    def save(
        self, step: int, before: float | None, weights: Sequence[nn.Parameter], optimizer: Any
    ) -> None:
        """Replace the file; `before` is the validation loss without the adapter."""
        tensors: dict[str, Tensor] = {"generator": torch.get_rng_state()}
        for number, weight in enumerate(weights):
            tensors[f"{number}.weight"] = weight.detach().contiguous()
            tensors |= {f"{number}.{name}": optimizer.state[weight][name] for name in MOMENTS}
        metadata = {"plan": self.plan, "step": str(step), "before": json.dumps(before)}
        with new_file(self.path) as partial:
            save_file(tensors, partial, metadata)

    def look(self) -> tuple[int, float | None]:
        """Steps done, and the validation loss before the first; (0, None) where nothing was begun.

        Raises UsageError if what stands there was begun with other options, XinslmError if it is
        damaged.
        """
        if not self.path.is_file():
            return 0, None
        try:
            with safe_open(self.path, "pt") as file:
                found = file.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise XinslmError(f"{self.path}: damaged ({error}); --force begins anew") from None
        if found.get("plan") != self.plan:
            raise UsageError(
                f"{self.path} is of an unfinished adapter begun with other options or data: give "
                "those again, take "
                f"another --output-dir, or begin anew with --force"
            )
        return int(found["step"]), json.loads(found["before"])

    def restore(self, weights: Sequence[nn.Parameter], optimizer: Any) -> None:
        """Fill weights, moments and generator from the file."""
        with safe_open(self.path, "pt") as file, torch.no_grad():
            step = torch.tensor(float(file.metadata()["step"]))
            for number, weight in enumerate(weights):
                weight.copy_(file.get_tensor(f"{number}.weight"))
                moments = {
                    name: file.get_tensor(f"{number}.{name}").to(weight.device) for name in MOMENTS
                }
                optimizer.state[weight] = {"step": step.clone(), **moments}
            torch.set_rng_state(file.get_tensor("generator"))

    def remove(self) -> None:
        """Delete the file."""
        self.path.unlink(missing_ok=True)
