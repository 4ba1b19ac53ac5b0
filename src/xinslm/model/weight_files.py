"""Which safetensors files hold a model folder's weights; without PyTorch."""

from pathlib import Path

from xinslm.errors import XinslmError
from xinslm.files import read_json
from xinslm.model.names import WEIGHTS


def safetensors_files(folder: Path) -> list[Path]:
    """The files of a model's weights, one or the shards of an index, by name.

    XinslmError if one is missing, the index is damaged, or the weights are pickles.
    """
    index = folder / f"{WEIGHTS}.index.json"
    if index.is_file():
        content = read_json(index)
        places = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(places, dict) or not all(
            isinstance(name, str) for name in places.values()
        ):
            raise XinslmError(
                f"{index}: must contain a 'weight_map' from weights to files. Copy the complete "
                "model folder"
            )
        files = [folder / name for name in sorted(set(places.values()))]
        for file in files:
            if not file.is_file():
                raise XinslmError(
                    f"{file} is missing; {index.name} lists it. Copy the complete model folder"
                )
        return files
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    pickles = sorted(
        p.name for suffix in ("bin", "pt", "pth", "ckpt", "pkl") for p in folder.glob(f"*.{suffix}")
    )
    if pickles:
        raise XinslmError(
            f"{folder} has its weights in {pickles[0]}, a pickle, which can run code when opened; "
            "xinslm reads only safetensors. If you trust the file, load it with transformers and "
            "convert it with save_pretrained"
        )
    raise XinslmError(f"{folder} has no {WEIGHTS}")
