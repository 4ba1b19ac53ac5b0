"""Converts a sentencepiece BPE model (LLaMA-2's `tokenizer.model`) to a tokenizer.json.

The sentencepiece library parses the file. Its BPE joins the pair whose joined piece has the best
score, so the merges are all splits of each piece into two known ones, in the order of the scores.
"""

from pathlib import Path
from typing import Any

from xinslm.errors import UsageError, XinslmError
from xinslm.tokenizer.files import tokenizer_json
from xinslm.tokenizer.start import start_processor

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_BPE = 2


def translate(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return a .model file's tokenizer.json, and its BOS, EOS, pad and unknown tokens by name."""
    model = _parse(path)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    if trainer.model_type != _BPE:
        raise XinslmError(
            f"{path}: this sentencepiece model is not BPE; convert it to tokenizer.json first"
        )
    if normalizer.precompiled_charsmap:
        raise XinslmError(
            f"{path}: this sentencepiece model normalizes text before it splits it; convert it to "
            "tokenizer.json first"
        )
    pieces = [(piece.piece, piece.type, piece.score) for piece in model.pieces]
    content = to_tokenizer_json(
        pieces,
        trainer.unk_id,
        bool(trainer.byte_fallback),
        normalizer.add_dummy_prefix,
        normalizer.remove_extra_whitespaces,
    )
    unknown = pieces[trainer.unk_id][0]
    ids = {"bos_token": trainer.bos_id, "eos_token": trainer.eos_id, "pad_token": trainer.pad_id}
    named = {name: pieces[index][0] for name, index in ids.items() if 0 <= index < len(pieces)}
    if "bos_token" in named:  # as LLaMA's own reader of such files does
        content["post_processor"] = start_processor(named["bos_token"], trainer.bos_id)
    return content, named | {"unk_token": unknown}


def to_tokenizer_json(
    pieces: list[tuple[str, int, float]],
    unknown_id: int,
    byte_fallback: bool,
    dummy_prefix: bool,
    single_spaces: bool,
) -> dict[str, Any]:
    """Return the tokenizer.json of `pieces`: text, type (1 to 6) and score, in id order."""
    vocab = {piece: index for index, (piece, _, _) in enumerate(pieces)}
    added = [
        (index, piece, kind != _USER)
        for index, (piece, kind, _) in enumerate(pieces)
        if kind in (_UNKNOWN, _CONTROL, _USER)
    ]
    steps = {
        "normalizer": _normalizer(dummy_prefix, single_spaces),
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": _decoder(dummy_prefix),
    }
    model = {
        "unk_token": pieces[unknown_id][0],
        "fuse_unk": True,
        "byte_fallback": byte_fallback,
        "vocab": vocab,
        "merges": _merges(pieces, vocab),
    }
    return tokenizer_json(added, steps, model)


def _parse(path: Path) -> Any:
    try:
        from sentencepiece import sentencepiece_model_pb2 as schema
    except ImportError:
        raise UsageError(
            f"{path}: reading a sentencepiece model needs two more packages: pip install "
            "'xinslm[sentencepiece]'"
        ) from None
    from google.protobuf.message import DecodeError

    model: Any = getattr(schema, "ModelProto")()  # noqa: B009 (made at run time)
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError:
        raise XinslmError(f"{path}: not a sentencepiece model, or the file is incomplete") from None
    if not model.pieces:
        raise XinslmError(
            f"{path}: a sentencepiece model without pieces; the file may be incomplete"
        )
    return model


def _merges(pieces: list[tuple[str, int, float]], vocab: dict[str, int]) -> list[tuple[str, str]]:
    usable = {piece for piece, kind, _ in pieces if kind == _NORMAL}
    merges = []
    for piece, kind, _ in sorted(pieces, key=lambda entry: -entry[2]):
        if kind == _NORMAL:
            cuts = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
            known = [cut for cut in cuts if cut[0] in usable and cut[1] in usable]
            merges += sorted(known, key=lambda cut: (vocab[cut[0]], vocab[cut[1]]))
    return merges


def _normalizer(dummy_prefix: bool, single_spaces: bool) -> dict[str, Any]:
    steps: list[dict[str, Any]] = []
    if single_spaces:
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
        steps.append({"type": "Replace", "pattern": {"Regex": r"\A | \z"}, "content": ""})
    if dummy_prefix:
        steps.append({"type": "Prepend", "prepend": "▁"})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})
    return {"type": "Sequence", "normalizers": steps}


def _decoder(dummy_prefix: bool) -> dict[str, Any]:
    space = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    steps: list[dict[str, Any]] = [space, {"type": "ByteFallback"}, {"type": "Fuse"}]
    if dummy_prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}
