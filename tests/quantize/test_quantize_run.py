"""The whole quantization of a model: sequential, without padding or validation text, whole or
absent.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from small_models import make_config, save_dataset, save_random_model, tree_hash
from xinslm.data.dataset import Dataset
from xinslm.errors import UsageError, XinslmError
from xinslm.model.files import load_model, read_tensors
from xinslm.quantize import calibration
from xinslm.quantize.config import QuantizeConfig
from xinslm.quantize.gptq import layer_loss
from xinslm.quantize.run import run
from xinslm.tokenizer.load import load_tokenizer

ROWS, LENGTH = 12, 96


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("quantize")
    save_random_model(root / "model")
    save_dataset(root / "data", load_tokenizer(root / "model").fingerprint())
    return root


def options(folders, output, **changes):
    values = {
        "data_path": folders / "data",
        "num_calibration_samples": ROWS,
        "max_seq_length": LENGTH,
    }
    return QuantizeConfig(folders / "model", output, **(values | changes))


@pytest.fixture(scope="module")
def gptq(folders):
    result = run(options(folders, folders / "gptq", method="gptq"))
    return folders / "gptq", result


def calibration_batches(folders, config, rows=ROWS):
    fingerprint = load_tokenizer(folders / "model").fingerprint()
    return calibration.read_rows(folders / "data", fingerprint, config, rows, LENGTH, 0)[0]


def linear_inputs(model, batches, kind="_proj"):
    """Inputs of every linear, or of modules with another end of their name, from a plain run of
    each document on its own: no packing, no padding.
    """
    seen = {}
    for name, module in model.named_modules():
        if name.endswith(kind):
            module.register_forward_pre_hook(
                lambda _, inputs, name=name: seen.setdefault(name, []).append(
                    inputs[0].flatten(0, 1)
                )
            )
    with torch.no_grad():
        for batch in batches:
            for ids, segments in zip(batch.input_ids, batch.segments, strict=True):
                for segment in range(segments.max() + 1):
                    model.hidden(torch.from_numpy(ids[segments == segment])[None])
    return {name: torch.cat(parts) for name, parts in seen.items()}


def test_losses_are_those_of_inputs_from_the_quantized_model(folders, gptq):
    """Sequential order, padding and document borders at once: the recorded loss of each linear is
    recomputed with the inputs that it gets in the finished quantized model, each document run
    alone."""
    model, original = (
        load_model(gptq[0]),
        dict(load_model(folders / "model").named_parameters()),
    )
    inputs = linear_inputs(model, calibration_batches(folders, model.config))
    recorded = json.loads((gptq[0] / "manifest.json").read_text())["layers"]
    assert recorded.keys() == inputs.keys() and len(recorded) == 14
    weights = dict(read_tensors(gptq[0]))
    for name, x in inputs.items():
        hessian = (x.double().T @ x.double() / len(x)).float()
        loss = layer_loss(original[f"{name}.weight"].detach(), weights[f"{name}.weight"], hessian)
        assert recorded[name]["loss"] == pytest.approx(loss, rel=1e-3), name
        assert recorded[name]["loss"] <= recorded[name]["rtn_loss"], name


def divergence(original, other, batches):
    with torch.no_grad():
        total = 0.0
        for batch in batches:
            keep = torch.from_numpy(batch.segments >= 0)
            arguments = (
                torch.from_numpy(a) for a in (batch.input_ids, batch.positions, batch.segments)
            )
            arguments = list(arguments)
            p, q = (m.logits(m.hidden(*arguments))[keep].log_softmax(-1) for m in (original, other))
            total += float((p.exp() * (p - q)).sum(-1).mean())
    return total / len(batches)


def test_gptq_keeps_more_than_rounding(folders, gptq):
    run(options(folders, folders / "rtn", method="rtn", data_path=None))
    original = load_model(folders / "model")
    batches = calibration_batches(folders, original.config)
    losses = [divergence(original, load_model(folders / name), batches) for name in ("gptq", "rtn")]
    assert losses[0] < 0.8 * losses[1]
    assert gptq[1].loss_ratio < 0.8
    assert "q4_0" in gptq[1].describe() and "of what rounding to nearest adds" in gptq[1].describe()


def test_eight_bits_are_nearly_exact(folders):
    result = run(options(folders, folders / "q8", bits=8, data_path=None))
    original = load_model(folders / "model")
    batches = calibration_batches(folders, original.config)
    assert divergence(original, load_model(folders / "q8"), batches) < 0.01
    assert set(result.formats) == {"q8_0", "f32"} and result.loss_ratio is None


def test_sizes_are_counted(gptq):
    folder, result = gptq
    config = make_config()
    norms = 5 * 64
    linears = config.num_parameters - norms - 320 * 64
    assert result.formats == {"q4_0": (14, linears), "q8_0": (1, 320 * 64), "f32": (5, norms)}
    bits = linears * 4.5 + 320 * 64 * 8.5 + norms * 32
    assert result.bits_per_weight == pytest.approx(bits / config.num_parameters)
    header = int.from_bytes((folder / "quantized.safetensors").read_bytes()[:8], "little") + 8
    assert result.file_bytes == header + bits / 8


def test_same_input_same_bytes(folders, gptq, tmp_path):
    run(options(folders, tmp_path / "again", method="gptq"))
    assert tree_hash(tmp_path / "again") == tree_hash(gptq[0])


def test_sharded_bfloat16_source_gives_the_same_as_one_file(folders, tmp_path):
    tensors = {
        name: w.bfloat16() for name, w in load_file(folders / "model" / "model.safetensors").items()
    }
    for kind in ("one", "shards"):
        folder = tmp_path / kind
        folder.mkdir()
        for path in (folders / "model").iterdir():
            if path.suffix != ".safetensors":
                (folder / path.name).write_bytes(path.read_bytes())
    save_file(tensors, tmp_path / "one" / "model.safetensors")
    names, weight_map = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"model-0000{number + 1}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, tmp_path / "shards" / file)
        weight_map |= dict.fromkeys(part, file)
    index = tmp_path / "shards" / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for kind in ("one", "shards"):
        run(QuantizeConfig(tmp_path / kind, tmp_path / f"{kind}-4", method="rtn"))
    assert tree_hash(tmp_path / "one-4") == tree_hash(tmp_path / "shards-4")


def test_rows_that_are_no_multiple_of_32_stay_at_16_bits(tmp_path):
    save_random_model(tmp_path / "model", intermediate_size=172)
    save_dataset(tmp_path / "data", load_tokenizer(tmp_path / "model").fingerprint())
    result = run(options(tmp_path, tmp_path / "out"))
    assert result.formats["f16"] == (2, 2 * 172 * 64)
    assert any("mlp.down_proj and 1 more: rows of 172" in note for note in result.notes)
    assert torch.isfinite(load_model(tmp_path / "out").hidden(torch.tensor([[1, 2]]))).all()


def test_magnitudes_beyond_float16_keep_the_weight_unquantized(tmp_path):
    save_random_model(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    big, small = "model.layers.0.self_attn.v_proj.weight", "model.layers.1.mlp.up_proj.weight"
    tensors[big], tensors[small] = tensors[big] * 1e7, tensors[small] * 1e-8
    save_file(tensors, file)
    result = run(QuantizeConfig(tmp_path / "model", tmp_path / "out", method="rtn"))
    weights = dict(read_tensors(tmp_path / "out"))
    assert torch.equal(weights[big], tensors[big]) and torch.equal(weights[small], tensors[small])
    assert any("float16 scales cannot hold" in note for note in result.notes)


def test_never_reads_validation_text(folders, tmp_path, monkeypatch):
    names, split = [], Dataset.split
    monkeypatch.setattr(
        Dataset, "split", lambda self, name: names.append(name) or split(self, name)
    )
    run(options(folders, tmp_path / "out"))
    assert set(names) == {"train"}


def test_calibration_rows_are_drawn_from_all_of_the_text(folders):
    batches = calibration_batches(folders, make_config())
    first = {int(batch.stream.max()) for batch in batches}
    rows = np.concatenate([batch.stream.max(axis=1) for batch in batches])
    assert len(rows) == ROWS and len(np.unique(rows)) == ROWS and len(first) == len(batches)


def test_more_rows_than_there_are(folders, tmp_path):
    """All are taken, as if so many had been asked for, and a note says so."""
    result = run(options(folders, tmp_path / "out", num_calibration_samples=9999))
    count = json.loads((tmp_path / "out" / "manifest.json").read_text())["calibration_rows"]["rows"]
    assert any(f"has only {count} rows of 96 tokens" in note for note in result.notes)
    other = run(options(folders, tmp_path / "other", num_calibration_samples=count))
    assert not any("has only" in note for note in other.notes)
    tensors = dict(read_tensors(tmp_path / "other"))
    for name, tensor in read_tensors(tmp_path / "out"):
        assert torch.equal(tensor, tensors[name]), name


def test_a_dataset_without_text_to_train_on(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration.PackedDataset, "__len__", lambda self: 0)
    with pytest.raises(UsageError, match="has no row of 96 tokens to train on"):
        run(options(folders, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_dataset_of_another_tokenizer(folders, tmp_path):
    save_dataset(tmp_path / "other", "f" * 64)
    with pytest.raises(UsageError, match="the tokenizer of the model to quantize"):
        run(options(folders, tmp_path / "out", data_path=tmp_path / "other"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 5}, "^bits is 5"),
        ({"data_path": None}, "--data-path"),
        ({"num_calibration_samples": 0}, "^num_calibration_samples is 0"),
        ({"seed": -1}, "^seed is -1, but must be at least 0"),
        ({"seed": 2**31}, "^seed is 2147483648, but must be at most 2,147,483,647"),
        ({"max_seq_length": 4096}, "reads at most 128"),
        ({"data_path": Path("nowhere")}, "nowhere"),
        ({"model": Path("no-model-here")}, "no-model-here"),
    ],
)
def test_bad_requests(folders, tmp_path, changes, message):
    model = changes.pop("model", folders / "model")
    values = {"data_path": folders / "data", "num_calibration_samples": ROWS} | changes
    with pytest.raises(UsageError, match=message):
        run(QuantizeConfig(model, tmp_path / "out", **values))
    assert list(tmp_path.iterdir()) == []


def test_what_is_quantized_can_be_quantized_again(gptq, folders, tmp_path):
    """Values of a grid are rounded to themselves, whatever the scale's last bits."""
    run(QuantizeConfig(gptq[0], tmp_path / "out", method="rtn", bits=8))
    before, after = load_model(gptq[0]).state_dict(), load_model(tmp_path / "out").state_dict()
    for name, weight in before.items():
        assert (weight - after[name]).abs().max() <= weight.abs().max() / 127, name
    with pytest.raises(UsageError, match="already holds something"):
        run(options(folders, gptq[0]))


def test_other_programs_do_not_take_it_for_a_model(gptq):
    """transformers would load codes under the usual name as random weights; its tokenizer works."""
    transformers = pytest.importorskip("transformers")
    for kind in (transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM):
        with pytest.raises(OSError, match=r"no file named model\.safetensors"):
            kind.from_pretrained(gptq[0])
    text = "The quick brown fox"
    ids = transformers.AutoTokenizer.from_pretrained(gptq[0])(text).input_ids
    assert ids == load_tokenizer(gptq[0]).encode(text)


def test_broken_weights_are_named(tmp_path):
    save_random_model(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.gate_proj.weight"][3, 4] = torch.nan
    save_file(tensors, file)
    with pytest.raises(XinslmError, match=r"model.layers.1.mlp.gate_proj.weight' holds NaN"):
        run(QuantizeConfig(tmp_path / "model", tmp_path / "out", method="rtn"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_run_folder_lists_the_file_once(folders, tmp_path):
    with pytest.raises(UsageError, match="is not a run folder"):
        run(options(folders, tmp_path / "out", run=tmp_path / "run"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()
    for _ in range(2):
        run(options(folders, tmp_path / "out", method="rtn", run=tmp_path / "run", force=True))
    (row,) = json.loads((tmp_path / "run" / "files.json").read_text())["rows"]
    assert row["bytes"] == (tmp_path / "out" / "quantized.safetensors").stat().st_size
    assert 4.5 < row["bits_per_weight"] < 8.5


CHILD = """
import os, resource, signal, sys
from pathlib import Path
from xinslm.quantize.config import QuantizeConfig
from xinslm.quantize.run import run

root, end = Path(sys.argv[1]), sys.argv[2]
if end == "full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

def stop(progress):
    if progress.done == 1 and end == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if progress.done == 1 and end == "interrupt":
        raise KeyboardInterrupt

run(QuantizeConfig(root / "model", root / "out" / "q4", method="rtn", force=True), stop)
"""


@pytest.mark.parametrize("end", ["kill", "interrupt", "full"])
def test_an_end_in_the_middle_leaves_nothing_half_written(folders, tmp_path, end):
    """kill -9, Ctrl-C, and a disk that is full (a file size limit stands in): the old result stays
    whole.
    """
    os.symlink(folders / "model", tmp_path / "model")
    before = run(QuantizeConfig(tmp_path / "model", tmp_path / "out" / "q4", bits=8))
    old = tree_hash(before.folder)
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path), end], capture_output=True, text=True
    )
    # Python ends by the signal itself after an uncaught Ctrl-C, or with 1 where the signal is
    # ignored
    codes = {"kill": {-signal.SIGKILL}, "interrupt": {1, -signal.SIGINT}, "full": {1}}
    assert child.returncode in codes[end], child.stderr
    expected = {"kill": "", "interrupt": "KeyboardInterrupt", "full": "File too large"}[end]
    assert expected in child.stderr
    assert tree_hash(before.folder) == old
    if end != "kill":
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["q4"]
    run(QuantizeConfig(tmp_path / "model", tmp_path / "out" / "q4", method="rtn", force=True))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["q4"]
    assert tree_hash(before.folder) != old


def test_stories260k_says_the_same_at_eight_bits(shared_data, tmp_path):
    """A real model, its down_proj at 16 bits: the most likely tokens do not change."""
    source = shared_data / "models" / "stories260K"
    run(QuantizeConfig(source, tmp_path / "q8", bits=8))
    ids = torch.tensor(
        [[1, *load_tokenizer(source).encode("Once upon a time, there was a little girl")]]
    )
    original, q8 = load_model(source), load_model(tmp_path / "q8")
    with torch.no_grad():
        a, b = (model.logits(model.hidden(ids)) for model in (original, q8))
    assert torch.equal(a.argmax(-1), b.argmax(-1))


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_model_without_its_own_tokenizer_is_refused_before_the_work(folders, tmp_path, method):
    save_random_model(tmp_path / "model", vocab_size=300)  # its tokenizer has 320 ids
    seen = []
    with pytest.raises(
        XinslmError, match="the tokenizer has 320 ids, but the model's embedding only 300 rows"
    ):
        run(
            QuantizeConfig(tmp_path / "model", tmp_path / "out", folders / "data", method=method),
            seen.append,
        )
    for path in (tmp_path / "model").glob("*token*"):
        path.unlink()
    with pytest.raises(XinslmError, match=r"it has no tokenizer\.json"):
        run(
            QuantizeConfig(tmp_path / "model", tmp_path / "out", folders / "data", method=method),
            seen.append,
        )
    assert seen == [] and not (tmp_path / "out").exists()
