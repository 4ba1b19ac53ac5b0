"""Names of a model folder's files and parameters, and what a quantized folder calls itself; without
PyTorch.
"""

CONFIG, GENERATION = "config.json", "generation_config.json"
WEIGHTS = "model.safetensors"
QUANTIZED_WEIGHTS = "quantized.safetensors"
"""Codes and scales that `xinslm quantize` writes. If they were named `WEIGHTS`, transformers would
load the folder with random weights; with this name it refuses the folder.
"""
QUANTIZED_KIND, QUANTIZED_VERSION, QUANTIZED_BY = "quantized", 2, "xinslm quantize"
"""Kind and version in the manifest of a quantized folder, and the command that makes one."""


def parameter_name(stem: str) -> str:
    """Name of a parameter that the manifest names without '.weight'."""
    return stem if stem.endswith(".bias") else f"{stem}.weight"
