"""LoRA adapters: trained on a tiny LLaMA, scored as peft's own merge does, bound to their base,
whole or absent.
"""

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
import transformers

from xinslm.cache import score
from xinslm.cache.config import CacheConfig
from xinslm.cache.folder import Cache
from xinslm.data import prepare
from xinslm.data.config import PrepareConfig
from xinslm.data.dataset import open_dataset
from xinslm.demo.stories import stories
from xinslm.errors import UsageError, XinslmError
from xinslm.model.files import open_model
from xinslm.teachers.huggingface import HuggingFaceTeacher
from xinslm.tokenizer.bpe import BPETokenizer
from xinslm.train import lora as adapt
from xinslm.train.lora_config import AdaptConfig

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 64,
}


def save_llama(folder, tokenizer, seed=0, **changes):
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SHAPE, **changes}))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3 if weight.dim() > 1 else 1)
    model.save_pretrained(folder)
    tokenizer.save(folder)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("adapt")
    texts = list(stories(12_000, 3))
    tokenizer = BPETokenizer(vocab_size=300)
    tokenizer.train(texts)
    save_llama(folder / "base", tokenizer)
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare.run(
        PrepareConfig(
            data_path=(str(folder / "text.jsonl"),),
            tokenizer_path=folder / "base",
            output_dir=folder / "data",
        )
    )
    result = adapt.run(settings(folder, folder / "adapter"))
    return SimpleNamespace(
        folder=folder,
        base=folder / "base",
        adapter=folder / "adapter",
        result=result,
        tokenizer=tokenizer,
    )


def settings(folder, output, **changes):
    options = {
        "lora_r": 8,
        "max_steps": 12,
        "learning_rate": 1e-2,
        "max_seq_length": 64,
        "batch_size": 12,
        "logging_steps": 1,
        "device": "cpu",
        **changes,
    }
    teacher = str(options.pop("teacher", folder / "base"))
    return AdaptConfig(teacher=teacher, data_path=folder / "data", output_dir=output, **options)


def test_validation_falls_and_says_so(small):
    result = small.result
    assert result.after < result.before - 0.2 and result.steps == 12
    manifest = json.loads((small.adapter / "manifest.json").read_text())
    assert manifest["validation"] == {"before": result.before, "after": result.after}
    files = {"adapter_config.json", "adapter_model.safetensors"}
    assert manifest["files"].keys() == files
    run = {"checkpoints", "config.yaml", "manifest.json", "metrics.jsonl", "run.json"}
    assert {p.name for p in small.adapter.iterdir()} == files | run
    assert f"{result.before:.4f} -> {result.after:.4f}" in result.describe()


def test_the_first_loss_is_transformers_own(small):
    """Right pads, masks and the shift by one: against the loss of each document alone."""
    split = open_dataset(small.folder / "data").split("validation")
    model = transformers.AutoModelForCausalLM.from_pretrained(small.base).eval()
    total, count = 0.0, 0
    for a, b in zip(split.documents[:-1], split.documents[1:], strict=True):
        for start in range(int(a), int(b) - 1, 64):
            ids = torch.from_numpy(split.tokens[start : min(start + 65, int(b))].astype(np.int64))[
                None
            ]
            with torch.no_grad():
                logits = model(ids[:, :-1]).logits[0, :, :300]
            total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
            count += ids.shape[1] - 1
    assert small.result.before == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_with_the_adapter_are_those_of_pefts_merged_model(small, dtype):
    teacher = HuggingFaceTeacher(open_model(small.base), dtype, adapter=small.adapter)
    base = transformers.AutoModelForCausalLM.from_pretrained(small.base, dtype=torch.float32)
    merged = peft.PeftModel.from_pretrained(base, small.adapter).merge_and_unload().eval()
    ids = np.arange(5, 45)
    found = teacher.logits(teacher.states([ids]))
    plain = HuggingFaceTeacher(open_model(small.base)).logits
    with torch.no_grad():
        expected = merged(torch.from_numpy(ids)[None]).logits[0, :, :300]
    tolerance = 1e-5 if dtype == "float32" else 0.1
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
    without = HuggingFaceTeacher(open_model(small.base))
    assert (plain(without.states([ids])) - expected).abs().max() > 0.5, "the adapter does something"


def test_the_fingerprint_tells_adapters_apart_but_not_places(small, tmp_path):
    plain = HuggingFaceTeacher(open_model(small.base)).fingerprint
    adapted = HuggingFaceTeacher(open_model(small.base), adapter=small.adapter).fingerprint
    shutil.copytree(small.adapter, tmp_path / "elsewhere")
    shutil.copytree(small.base, tmp_path / "base")
    moved = HuggingFaceTeacher(
        open_model(tmp_path / "base"), adapter=tmp_path / "elsewhere"
    ).fingerprint
    adapt.run(settings(small.folder, tmp_path / "other", seed=1, max_steps=2))
    other = HuggingFaceTeacher(open_model(small.base), adapter=tmp_path / "other").fingerprint
    assert adapted == moved and len({plain, adapted, other}) == 3


def test_the_same_seed_gives_the_same_adapter(small, tmp_path):
    adapt.run(settings(small.folder, tmp_path / "again"))
    name = "adapter_model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (small.adapter / name).read_bytes()


def cache(small, folder, **changes):
    options = {"max_seq_length": 64, "device": "cpu", "adapter": small.adapter, **changes}
    return CacheConfig(str(small.base), small.folder / "data", folder, **options)


def test_a_cache_is_scored_with_the_adapter_and_bound_to_it(small, tmp_path):
    result = score.run(cache(small, tmp_path / "with"))
    without = score.run(cache(small, tmp_path / "without", adapter=None))
    assert result.teacher_nats < without.teacher_nats - 0.2
    a, b = Cache(tmp_path / "with"), Cache(tmp_path / "without")
    assert a.manifest["inputs"]["teacher"] != b.manifest["inputs"]["teacher"]
    with pytest.raises(UsageError, match=r"base with adapter .*adapter"):
        a.require_teacher(b.manifest["inputs"]["teacher"], str(small.base))

    class Stop(Exception):
        pass

    def stop(progress):
        raise Stop

    with pytest.raises(Stop):
        score.run(cache(small, tmp_path / "half", shard_positions=500), stop)
    with pytest.raises(UsageError, match="unfinished cache with another teacher"):
        score.run(cache(small, tmp_path / "half", shard_positions=500, adapter=None))


def test_an_adapter_of_another_base_is_refused(small, tmp_path):
    save_llama(tmp_path / "other", small.tokenizer, seed=9)
    with pytest.raises(
        UsageError, match=r"adapter .* was trained on other weights than those of .*other"
    ):
        HuggingFaceTeacher(open_model(tmp_path / "other"), adapter=small.adapter)
    foreign = tmp_path / "foreign"  # made elsewhere: no manifest to tell
    shutil.copytree(small.adapter, foreign)
    (foreign / "manifest.json").unlink()
    assert HuggingFaceTeacher(open_model(small.base), adapter=foreign).fingerprint
    save_llama(tmp_path / "shallow", small.tokenizer, num_hidden_layers=1)
    with pytest.raises(
        XinslmError, match=r"does not fit teacher .*: 14 of its matrices have no counterpart"
    ):
        HuggingFaceTeacher(open_model(tmp_path / "shallow"), adapter=foreign)
    save_llama(tmp_path / "wide", small.tokenizer, intermediate_size=96)
    with pytest.raises(XinslmError, match="cannot be applied to teacher"):
        HuggingFaceTeacher(open_model(tmp_path / "wide"), adapter=foreign)


def test_folders_that_are_no_adapters(small, tmp_path):
    with pytest.raises(UsageError, match="is not an adapter folder"):
        HuggingFaceTeacher(open_model(small.base), adapter=tmp_path)
    shutil.copytree(small.adapter, tmp_path / "p")
    (tmp_path / "p" / "manifest.json").unlink()
    (tmp_path / "p" / "adapter_model.safetensors").rename(tmp_path / "p" / "adapter_model.bin")
    with pytest.raises(XinslmError, match="safetensors only"):
        HuggingFaceTeacher(open_model(small.base), adapter=tmp_path / "p")
    with pytest.raises(UsageError, match="--adapter is for models"):
        score.run(
            cache(small, tmp_path / "c").__class__(
                "http://localhost:1/v1",
                small.folder / "data",
                tmp_path / "c",
                adapter=small.adapter,
            )
        )


def test_an_adapted_head_learns_too(small, tmp_path):
    """The head's own weight is not what an adapted head computes with."""
    result = adapt.run(
        settings(small.folder, tmp_path / "head", target_modules=("lm_head",), max_steps=6)
    )
    assert result.after < result.before - 0.02
    teacher = HuggingFaceTeacher(open_model(small.base), adapter=tmp_path / "head")
    assert (teacher.logits(teacher.states([np.arange(9)])) - plain_logits(small)).abs().max() > 0.01


def plain_logits(small):
    teacher = HuggingFaceTeacher(open_model(small.base))
    return teacher.logits(teacher.states([np.arange(9)]))


def test_checkpointing_changes_nothing(small, tmp_path):
    a = adapt.run(settings(small.folder, tmp_path / "a", max_steps=3))
    b = adapt.run(settings(small.folder, tmp_path / "b", max_steps=3, gradient_checkpointing=True))
    assert a.after == pytest.approx(b.after, abs=1e-5)


def test_refusals_leave_nothing(small, tmp_path):
    other = BPETokenizer(vocab_size=290)
    other.train(["some other text about other things, and more of it"])
    save_llama(tmp_path / "foreign", other)
    with pytest.raises(UsageError, match=r"the tokenizer of teacher .*foreign"):
        adapt.run(settings(small.folder, tmp_path / "o", teacher=tmp_path / "foreign"))
    with pytest.raises(UsageError, match="--target-modules nothing"):
        adapt.run(settings(small.folder, tmp_path / "o", target_modules=("nothing",)))
    with pytest.raises(UsageError, match="has a context of 64 tokens"):
        adapt.run(settings(small.folder, tmp_path / "o", max_seq_length=65))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["foreign"]
    with pytest.raises(XinslmError, match=r"the (loss|gradient) is (nan|inf).* at step \d+, on"):
        adapt.run(settings(small.folder, tmp_path / "o", learning_rate=1e20, max_grad_norm=0))
    assert not (tmp_path / "o" / "manifest.json").exists()
    with pytest.raises(UsageError, match="already holds this run, finished"):
        adapt.run(settings(small.folder, small.adapter))


def test_killed_and_continued_equals_uninterrupted(small, tmp_path):
    """Dropout's generator, the moments and the order of batches go on where they stood; kill -9,
    not an exception.
    """
    wanted = settings(
        small.folder, tmp_path / "whole", max_steps=12, lora_dropout=0.2, save_steps=5
    )
    whole = adapt.run(wanted)
    again = replace(wanted, output_dir=tmp_path / "killed")
    code = f"""
import os, signal
from pathlib import Path, PosixPath
import torch
torch.set_num_threads(1)
from xinslm.train import lora as adapt
from xinslm.train.lora_config import AdaptConfig
def listen(progress):
    if progress.stage == "adapt" and progress.done == 8:
        os.kill(os.getpid(), signal.SIGKILL)
adapt.run({again!r}, listen)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    with pytest.raises(UsageError, match="unfinished run with another lora_r"):
        adapt.run(replace(again, lora_r=4))
    steps = []
    result = adapt.run(again, lambda progress: steps.append(progress.done))
    assert steps[:2] == [5, 6] and (result.before, result.after) == (whole.before, whole.after)
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("whole", "killed")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert {p.name for p in tmp_path.iterdir()} - {".killed.lock"} == {"killed", "whole"}


def test_a_damaged_checkpoint_says_what_to_do(small, tmp_path):
    wanted = settings(small.folder, tmp_path / "o", max_steps=4, save_steps=2)

    def stop(progress):
        if progress.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        adapt.run(wanted, stop)
    file = tmp_path / "o" / "checkpoints" / "last" / "optimizer.safetensors"
    data = bytearray(file.read_bytes())
    data[-20] ^= 1
    file.write_bytes(data)
    with pytest.raises(XinslmError, match=r"optimizer\.safetensors is missing or damaged.*--force"):
        adapt.run(wanted)
    adapt.run(replace(wanted, max_steps=1, force=True))


def test_without_peft_the_message_says_how_to_get_it(small, tmp_path):
    words = [
        "adapt",
        str(small.base),
        "--data-path",
        str(small.folder / "data"),
        "-o",
        str(tmp_path / "o"),
    ]
    code = f"""
import sys
sys.modules["peft"] = None
from xinslm.cli.main import main
sys.exit(main({words!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and 'pip install "xinslm[lora]"' in done.stderr, done.stderr
