"""A stopped `quantize` continues after its last finished layer and ends with the same bytes,
whatever happened to its files; nothing is continued that follows from other input.
"""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from small_models import TEMPLATE, save_dataset, save_random_model, save_tokenizer, tree_hash
from xinslm.data.packing import Batch
from xinslm.errors import Interrupted, UsageError, XinslmError
from xinslm.model.files import open_model
from xinslm.precision import float32_setting
from xinslm.quantize import finished_layers
from xinslm.quantize.activations import BatchFile
from xinslm.quantize.calibration import CalibrationRows
from xinslm.quantize.config import QuantizeConfig
from xinslm.quantize.kept_rows import load_rows, save_rows
from xinslm.quantize.pipeline import Quantization
from xinslm.quantize.run import run
from xinslm.quantize.self_generated import write_rows
from xinslm.tokenizer.load import load_tokenizer

LAYERS = 4
VALUES = {"num_calibration_samples": 12, "max_seq_length": 96}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("stopped")
    save_random_model(root / "model", num_hidden_layers=LAYERS)
    save_dataset(root / "data", load_tokenizer(root / "model").fingerprint())
    for method in ("gptaq", "gptq"):
        run(options(root, root / method, method=method))
    return root


def options(folders, output, **changes):
    given = {"data_path": folders / "data", **VALUES, **changes}
    return QuantizeConfig(given.pop("model", folders / "model"), output, **given)


def unfinished(output):
    return output.parent / f".{output.name}.unfinished"


def same_codes(one, other):
    """Equal files, up to what the manifest says of paths."""
    manifests = [json.loads((folder / "manifest.json").read_text()) for folder in (one, other)]
    for manifest in manifests:
        manifest.pop("config")
    weights = [folder / "quantized.safetensors" for folder in (one, other)]
    return manifests[0] == manifests[1] and weights[0].read_bytes() == weights[1].read_bytes()


def stop_at(layer, error=KeyboardInterrupt):
    def listen(progress):
        if progress.done == layer and not progress.note:
            raise error

    return listen


def stopped(folders, output, layer, **changes):
    """A run that Ctrl-C has stopped when `layer` began."""
    with pytest.raises(Interrupted):
        run(options(folders, output, **changes), stop_at(layer))
    return unfinished(output)


class Watch:
    """Counts the layers that are computed, and keeps notes."""

    def __init__(self, monkeypatch):
        self.computed, self.notes, compute = [], [], Quantization._layer

        def counted(work, index, out):
            self.computed.append(index)
            compute(work, index, out)

        monkeypatch.setattr(Quantization, "_layer", counted)

    def __call__(self, progress):
        if progress.note:
            self.notes.append(progress.note)


@pytest.fixture
def watch(monkeypatch):
    return Watch(monkeypatch)


CHILD = """
import os, signal, sys
from pathlib import Path
from xinslm.quantize.activations import BatchFile
from xinslm.quantize.config import QuantizeConfig
from xinslm.quantize.run import run

root, output, writes = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
write, count = BatchFile.write, 0

def counted(*arguments):
    global count
    count += 1
    if count == writes:
        os.kill(os.getpid(), signal.SIGKILL)
    return write(*arguments)

BatchFile.write = counted
run(QuantizeConfig(root / "model", output, root / "data", num_calibration_samples=12,
                   max_seq_length=96), print)
"""


def test_sigkill_anywhere_and_the_same_command(folders, tmp_path):
    """Killed at ever later writes of activations, until nothing is left to kill."""
    output, kills, continued = tmp_path / "q", 0, 0
    while not output.exists():
        child = subprocess.run(
            [sys.executable, "-c", CHILD, str(folders), str(output), "11"],
            capture_output=True,
            text=True,
        )
        assert child.returncode in (0, -signal.SIGKILL), child.stderr
        kills += child.returncode != 0
        continued += "taken over" in child.stdout
        assert kills < 20
    assert kills >= 2 and continued >= 2
    assert same_codes(output, folders / "gptaq")
    assert [path.name for path in tmp_path.iterdir()] == ["q"]


@pytest.mark.parametrize("method", ["gptaq", "gptq"])
@pytest.mark.parametrize("layer", [1, 3, LAYERS])
def test_ctrl_c_and_the_same_command(folders, tmp_path, watch, method, layer):
    finished = "1 finished layer is" if layer == 1 else f"{layer} finished layers are"
    with pytest.raises(Interrupted, match=f"stopped; {finished} in .*continues"):
        run(options(folders, tmp_path / "q", method=method), stop_at(layer))
    assert watch.computed == list(range(layer))
    watch.computed.clear()
    run(options(folders, tmp_path / "q", method=method), watch)
    assert watch.computed == list(range(layer, LAYERS))
    are = "is" if layer == 1 else "are"
    assert watch.notes == [f"continuing: {layer} of {LAYERS} layers {are} taken over"]
    assert same_codes(tmp_path / "q", folders / method)
    assert [path.name for path in tmp_path.iterdir()] == ["q"]


def test_nothing_is_left_if_no_layer_was_finished(folders, tmp_path):
    with pytest.raises(Interrupted, match="no layer was finished"):
        run(options(folders, tmp_path / "q"), stop_at(0))
    assert list(tmp_path.iterdir()) == []


def test_what_is_left_holds_codes_and_one_layers_activations(folders, tmp_path):
    left = stopped(folders, tmp_path / "q", 2)
    names = {path.name for path in left.iterdir()}
    layers = {f"layer-{index}.{end}" for index in (0, 1) for end in ("json", "safetensors")}
    assert names == {"plan.json", "original-states-2", "quantized-states-2"} | layers
    with pytest.raises(UsageError, match="is not a model folder"):
        open_model(left)
    with pytest.raises(XinslmError):
        load_tokenizer(left)


def damage(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("method", ["gptaq", "gptq"])
@pytest.mark.parametrize(
    ("names", "again"),
    [
        (["layer-0.safetensors"], [0]),
        (["layer-1.safetensors"], [1]),
        (["layer-1.json"], [1]),
        (["layer-2.json", "layer-2.safetensors"], [2]),
        (["layer-1.safetensors", "quantized-states-3"], [1]),
        (["quantized-states-3"], []),
        (["layer-0.json", "layer-1.json", "layer-2.json"], [0, 1, 2]),
    ],
)
def test_damaged_files_are_found_and_only_those_layers_computed_again(
    folders, tmp_path, watch, method, names, again
):
    left = stopped(folders, tmp_path / "q", 3, method=method)
    for name in names:
        damage(left / name)
    watch.computed.clear()
    run(options(folders, tmp_path / "q", method=method), watch)
    assert watch.computed == [*again, 3]
    assert same_codes(tmp_path / "q", folders / method)
    named = {1: f"layer {again[0]}", 3: "layers 0, 1 and 2"}[len(again)] if again else ""
    left_over = f"{3 - len(again)} of 4 layers are taken over"
    damaged = f"; the files of {named} are damaged, computing again" if again else ""
    assert watch.notes[0] == f"continuing: {left_over}{damaged}"


def test_missing_files_and_a_damaged_original_stream(folders, tmp_path, watch):
    left = stopped(folders, tmp_path / "q", 3)
    (left / "layer-2.safetensors").unlink()
    damage(left / "original-states-3")
    watch.computed.clear()
    run(options(folders, tmp_path / "q"), watch)
    assert watch.computed == [2, 3]
    assert any("computing the activations after layer 1 again" in note for note in watch.notes)
    assert same_codes(tmp_path / "q", folders / "gptaq")


def test_layers_after_one_that_came_out_otherwise_are_computed_again(folders, tmp_path, watch):
    """Sound files of another quantization: their hashes are right, but not what they follow."""
    left = stopped(folders, tmp_path / "q", 3)
    other = stopped(folders, tmp_path / "other", 2, seed=1)
    for end in ("json", "safetensors"):
        shutil.copy(other / f"layer-1.{end}", left / f"layer-1.{end}")
    watch.computed.clear()
    run(options(folders, tmp_path / "q"), watch)
    assert watch.computed == [1, 3], "layer 2 follows from the right layer 1"
    assert same_codes(tmp_path / "q", folders / "gptaq")


CHANGES = {
    "seed": ("seed (0)", {"seed": 1}),
    "method": ("method (gptaq)", {"method": "gptq"}),
    "rounding": ("method (gptaq)", {"method": "rtn", "data_path": None}),
    "bits": ("bits (4), method (gptaq)", {"bits": 8, "data_path": None}),
    "length": ("max seq length (96)", {"max_seq_length": 64}),
    "dataset": ("dataset", {}),
    "model": ("model", {}),
    "self-generated": ("dataset", {"data_path": None, "self_generate": True}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_input_is_refused_by_name_and_keeps_the_layers(folders, tmp_path, watch, change):
    left = stopped(folders, tmp_path / "q", 2)
    before = tree_hash(left)
    named, changes = CHANGES[change]
    if change == "dataset":
        fingerprint = load_tokenizer(folders / "model").fingerprint()
        save_dataset(tmp_path / "data", fingerprint, seed=2)
        changes = {"data_path": tmp_path / "data"}
    if change == "model":
        save_random_model(tmp_path / "model", seed=5, num_hidden_layers=LAYERS)
        changes = {"model": tmp_path / "model"}
    with pytest.raises(UsageError) as error:
        run(options(folders, tmp_path / "q", **changes))
    assert f"of a stopped run with another {named}. Run the command" in str(error.value)
    assert "--force" in str(error.value)
    assert tree_hash(left) == before
    watch.computed.clear()
    run(options(folders, tmp_path / "q", **changes, force=True), watch)
    assert watch.computed == list(range(LAYERS))
    if change not in ("rounding", "bits"):
        assert watch.notes == [f"starting over: the stopped run has another {named}"]
    assert not left.exists()
    if change == "method":
        assert same_codes(tmp_path / "q", folders / "gptq")


def test_the_default_length_is_part_of_the_plan_as_a_number(folders, tmp_path, watch):
    left = stopped(folders, tmp_path / "q", 2, max_seq_length=None)
    assert json.loads((left / "plan.json").read_text())["max_seq_length"] == 128
    watch.computed.clear()
    run(options(folders, tmp_path / "q", max_seq_length=128), watch)
    assert watch.computed == [2, 3]


def test_what_only_follows_the_codes_may_change(folders, tmp_path, watch):
    stopped(folders, tmp_path / "q", LAYERS)
    watch.computed.clear()
    run(options(folders, tmp_path / "q", scale_steps=1), watch)
    assert watch.computed == []


@pytest.mark.parametrize("content", ["[]", "{", "{}"])
def test_a_damaged_plan_starts_over(folders, tmp_path, watch, content):
    left = stopped(folders, tmp_path / "q", 2)
    (left / "plan.json").write_text(content)
    run(options(folders, tmp_path / "q"), watch)
    assert watch.notes[0] == "starting over: the stopped run has a damaged plan"
    assert same_codes(tmp_path / "q", folders / "gptaq")


def test_force_keeps_the_old_folder_until_the_new_one_is_complete(folders, tmp_path):
    run(QuantizeConfig(folders / "model", tmp_path / "q", bits=8))
    old = tree_hash(tmp_path / "q")
    stopped(folders, tmp_path / "q", 2, force=True)
    assert tree_hash(tmp_path / "q") == old
    run(options(folders, tmp_path / "q", force=True))
    assert same_codes(tmp_path / "q", folders / "gptaq")


@pytest.mark.parametrize("failing", ["activations", "codes", "hashes"])
def test_a_full_disk_is_explained_and_what_is_finished_stays(
    folders, tmp_path, monkeypatch, watch, failing
):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def begin_to_fail(progress):
        if progress.done == 2:
            target, name = {
                "activations": (BatchFile, "write"),
                "codes": (finished_layers.SafetensorsWriter, "add"),
                "hashes": (finished_layers, "write_json"),
            }[failing]
            monkeypatch.setattr(target, name, fail)

    def fail(*_):
        raise full

    with monkeypatch.context() as patches, pytest.raises(XinslmError) as error:
        monkeypatch = patches
        run(options(folders, tmp_path / "q"), begin_to_fail)
    assert "no space is left on the disk of" in str(error.value)
    assert "; 2 finished layers are in" in str(error.value)
    assert not (tmp_path / "q").exists()
    watch.computed.clear()
    run(options(folders, tmp_path / "q"), watch)
    assert watch.computed == [2, 3]
    assert same_codes(tmp_path / "q", folders / "gptaq")


def test_a_full_disk_without_calibration(folders, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(finished_layers.SafetensorsWriter, "add", fail)
    with pytest.raises(XinslmError, match=r"no space is left on the disk of .*/q, so it was not"):
        run(QuantizeConfig(folders / "model", tmp_path / "q", method="rtn"))
    assert list(tmp_path.iterdir()) == []


def test_too_little_space_is_found_before_the_work(folders, tmp_path, monkeypatch, watch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    with pytest.raises(XinslmError, match=r"quantizing needs [2-9] MB on the disk of .*are free"):
        run(options(folders, tmp_path / "q"))
    assert watch.computed == [] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("refusal", ["disk", "size", "length", "data"])
def test_a_refused_run_keeps_the_layers(folders, tmp_path, monkeypatch, watch, refusal):
    left = stopped(folders, tmp_path / "q", 2)
    before, changes = tree_hash(left), {}
    with monkeypatch.context() as patches, pytest.raises(XinslmError) as error:
        if refusal == "disk":
            usage = shutil.disk_usage(tmp_path)._replace(free=1000)
            patches.setattr(shutil, "disk_usage", lambda _: usage)
        else:
            changes = {
                "size": {"target_size": "1KB"},
                "length": {"max_seq_length": 4096},
                "data": {"data_path": tmp_path / "missing"},
            }[refusal]
        run(options(folders, tmp_path / "q", **changes))
    assert isinstance(error.value, UsageError) == (refusal != "disk")
    if refusal in ("disk", "size"):
        assert "; 2 finished layers are in" in str(error.value)
        command = {"disk": "the same", "size": "the corrected"}[refusal]
        assert f"and {command} command continues from there" in str(error.value)
    assert tree_hash(left) == before
    watch.computed.clear()
    run(options(folders, tmp_path / "q"), watch)
    assert watch.computed == [2, 3]
    assert same_codes(tmp_path / "q", folders / "gptaq")


def test_only_the_file_is_left_to_write(folders, tmp_path, monkeypatch):
    """Room for it is enough, if all layers are finished: activations are not written again."""
    stopped(folders, tmp_path / "q", LAYERS)
    size = (folders / "gptaq" / "quantized.safetensors").stat().st_size
    usage = shutil.disk_usage(tmp_path)._replace(free=2 * size)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    run(options(folders, tmp_path / "q"))
    assert same_codes(tmp_path / "q", folders / "gptaq")


def replace_model(folder, seed, keep_times=False):
    """Rename another model's file over that of `folder`, as a download does."""
    file = folder / "model.safetensors"
    times = file.stat()
    save_random_model(folder.parent / f"seed-{seed}", seed=seed, num_hidden_layers=LAYERS)
    os.replace(folder.parent / f"seed-{seed}" / "model.safetensors", file)
    if keep_times:
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("method", ["gptaq", "rtn"])
@pytest.mark.parametrize("keep_times", [False, True])
def test_a_model_that_is_replaced_meanwhile_is_refused(
    folders, tmp_path, watch, method, keep_times
):
    shutil.copytree(folders / "model", tmp_path / "model")
    data = {} if method == "gptaq" else {"data_path": None}
    changes = {"model": tmp_path / "model", "method": method, **data}

    def listen(progress):
        if progress.done == 2 and not progress.note:
            replace_model(tmp_path / "model", 5, keep_times)

    with pytest.raises(XinslmError, match=r"model\.safetensors was replaced or deleted while"):
        run(options(folders, tmp_path / "q", **changes), listen)
    assert not (tmp_path / "q").exists()
    if method == "rtn":
        return
    assert unfinished(tmp_path / "q").exists()
    with pytest.raises(UsageError, match="another model"):
        run(options(folders, tmp_path / "q", **changes))
    shutil.copy(folders / "model" / "model.safetensors", tmp_path / "model")
    watch.computed.clear()
    run(options(folders, tmp_path / "q", **changes), watch)
    assert watch.computed == [2, 3]
    assert same_codes(tmp_path / "q", folders / "gptaq")


def test_a_copy_of_the_same_model_is_no_other_model(folders, tmp_path):
    shutil.copytree(folders / "model", tmp_path / "model")

    def listen(progress):
        if progress.done == 2 and not progress.note:
            file = tmp_path / "model" / "model.safetensors"
            shutil.copyfile(file, tmp_path / "copy")
            os.replace(tmp_path / "copy", file)

    run(options(folders, tmp_path / "q", model=tmp_path / "model"), listen)
    assert same_codes(tmp_path / "q", folders / "gptaq")


@pytest.mark.parametrize("options_of", [{"method": "rtn"}, {"method": "absmax"}, {"bits": 8}])
def test_a_run_without_calibration_takes_the_lock_and_the_place(folders, tmp_path, options_of):
    config = QuantizeConfig(folders / "model", tmp_path / "q", force=True, **options_of)
    stopped(folders, tmp_path / "q", 2)

    def second(progress):
        if progress.done == 1:
            run(config)

    with pytest.raises(UsageError, match="is in use by process"):
        run(config, second)
    assert unfinished(tmp_path / "q").exists(), "it failed"
    run(config)
    assert [path.name for path in tmp_path.iterdir()] == ["q"]


def test_a_run_that_only_rounds_keeps_no_layers(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(finished_layers.FinishedLayers, "write", None)
    for number, changes in enumerate(({"method": "rtn"}, {"method": "absmax"}, {"bits": 8})):
        run(QuantizeConfig(folders / "model", tmp_path / f"q{number}", **changes))
        names = {path.name for path in (tmp_path / f"q{number}").iterdir()}
        assert "quantized.safetensors" in names and not any("layer-" in name for name in names)


def test_files_of_finished_layers_are_hashed_once(folders, tmp_path, monkeypatch):
    stopped(folders, tmp_path / "q", 3)
    hashed, hash_file = [], finished_layers.sha256_file
    monkeypatch.setattr(
        finished_layers, "sha256_file", lambda path: hashed.append(path.name) or hash_file(path)
    )
    run(options(folders, tmp_path / "q"))
    assert hashed == [f"layer-{index}.safetensors" for index in range(LAYERS)]


def test_two_runs_into_one_folder_do_not_share_files(folders, tmp_path):
    def second(progress):
        if progress.done == 1:
            run(options(folders, tmp_path / "q"))

    with pytest.raises(UsageError, match="is in use by process"):
        run(options(folders, tmp_path / "q"), second)


def written_options(folders, output, **changes):
    """A run on text that the model writes."""
    return options(folders, output, data_path=None, self_generate=True, method="gptq", **changes)


def stop_quantizing_at(layer):
    return lambda progress: stop_at(layer)(progress) if progress.stage == "quantize" else None


def test_text_that_the_model_wrote_is_not_written_again(folders, tmp_path, monkeypatch):
    run(written_options(folders, tmp_path / "whole"))
    with pytest.raises(Interrupted):
        run(written_options(folders, tmp_path / "q"), stop_quantizing_at(1))
    monkeypatch.setattr("xinslm.quantize.run.write_rows", None)
    run(written_options(folders, tmp_path / "q"))
    assert same_codes(tmp_path / "q", tmp_path / "whole")


def test_text_alone_is_kept_and_the_message_says_so(folders, tmp_path, monkeypatch):
    left = unfinished(tmp_path / "q")

    with pytest.raises(Interrupted) as error:
        run(written_options(folders, tmp_path / "q"), stop_quantizing_at(0))
    message = "stopped; the calibration text that the model wrote is in"
    assert str(error.value).startswith(f"{message} {left}, and the same command continues")
    add = finished_layers.WeightWriter.coded

    def stop(*arguments):
        add(*arguments)
        if arguments[1].startswith("model.layers.0.self_attn.o_proj"):
            assert (left / "quantized-states-0").exists()
            raise KeyboardInterrupt

    with monkeypatch.context() as patches, pytest.raises(Interrupted, match=message):
        patches.setattr(finished_layers.WeightWriter, "coded", stop)
        run(written_options(folders, tmp_path / "q"))
    names = {path.name for path in left.iterdir()}
    assert names == {"plan.json", "rows.json", "rows.safetensors"}


@pytest.mark.parametrize("file", ["rows.json", "rows.safetensors"])
@pytest.mark.parametrize("is_same", [True, False])
def test_damaged_text_is_written_again_and_layers_follow_it(
    folders, tmp_path, monkeypatch, watch, file, is_same
):
    """If it comes out otherwise, as with other rounding, no layer of the old text stays."""
    with pytest.raises(Interrupted):
        run(written_options(folders, tmp_path / "q"), stop_quantizing_at(2))
    damage(unfinished(tmp_path / "q") / file)
    if not is_same:
        write = write_rows

        def other(source, tokenizer, shape, seed, listener):
            return write(source, tokenizer, shape, seed + 1, listener)

        monkeypatch.setattr("xinslm.quantize.run.write_rows", other)
    watch.computed.clear()
    run(written_options(folders, tmp_path / "q"), watch)
    monkeypatch.setattr("xinslm.quantize.run.write_rows", write_rows)
    assert watch.computed == ([2, 3] if is_same else [0, 1, 2, 3])
    assert (
        watch.notes[0] == "the calibration text that the model wrote is damaged, writing it again"
    )
    follow = (
        "; layers 0 and 1 follow from other calibration text or another layer before"
        in (watch.notes[1])
    )
    assert follow != is_same
    run(written_options(folders, tmp_path / "whole", seed=0 if is_same else 1))
    weights = [tmp_path / name / "quantized.safetensors" for name in ("q", "whole")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_another_chat_template_is_noticed(folders, tmp_path):
    shutil.copytree(folders / "model", tmp_path / "model")
    config = written_options(folders, tmp_path / "q", model=tmp_path / "model")
    with pytest.raises(Interrupted):
        run(config, stop_quantizing_at(2))
    for file in (tmp_path / "model").glob("*template*"):
        file.unlink()
    save_tokenizer(tmp_path / "model", template=TEMPLATE.replace("}}<|end|>", "}} <|end|>"))
    with pytest.raises(UsageError, match=r"stopped run with another chat template\. Run"):
        run(config)


def test_rows_come_back_as_they_were(tmp_path):
    draw = np.random.default_rng(0)
    batches = [
        Batch(*(draw.integers(-100, 2**40, (rows, 7)) for _ in range(5))) for rows in (3, 3, 1)
    ]
    rows = CalibrationRows(batches, {"method": "x"}, ["id"], None, ["a note"])
    save_rows(tmp_path, rows)
    found = load_rows(tmp_path)
    assert (found.facts, found.texts, found.dataset, found.notes) == (
        rows.facts,
        rows.texts,
        None,
        rows.notes,
    )
    for one, other in zip(batches, found.batches, strict=True):
        for name, array in vars(one).items():
            assert array.dtype == other.__dict__[name].dtype
            assert np.array_equal(array, other.__dict__[name])
    damage(tmp_path / "rows.safetensors")
    assert load_rows(tmp_path) is None
    (tmp_path / "rows.json").unlink()
    assert load_rows(tmp_path) is None


def test_a_batch_file_is_a_plain_array(tmp_path):
    """Numpy reads what is written, and the other way round."""
    shapes = [(2, 3, 5), (2, 3, 5), (1, 3, 5)]
    tensors = [torch.randn(shape) for shape in shapes]
    file = BatchFile(tmp_path / "f", shapes)
    for index in (2, 0, 1):
        file.write(index, tensors[index])
    stored = np.fromfile(tmp_path / "f", np.float32)
    assert np.array_equal(stored, np.concatenate([t.numpy().ravel() for t in tensors]))
    (stored * 2).tofile(tmp_path / "f")
    assert torch.equal(file.read(1), tensors[1] * 2)


def test_the_codes_of_the_layers_are_those_of_the_folder(folders, tmp_path):
    left = stopped(folders, tmp_path / "q", LAYERS)
    whole = load_file(folders / "gptaq" / "quantized.safetensors")
    for index in range(LAYERS):
        layer = load_file(left / f"layer-{index}.safetensors")
        assert len(layer) == 16
        for name, tensor in layer.items():
            assert torch.equal(tensor, whole[name]), name


@pytest.mark.parametrize("left", ["none", "bf16"])
def test_an_earlier_computation_in_the_process_changes_no_code(folders, tmp_path, left):
    """The library of float32 products is chosen by each run, not left over from another."""
    torch.backends.mkldnn.matmul.fp32_precision = left
    run(options(folders, tmp_path / "q"))
    assert torch.backends.mkldnn.matmul.fp32_precision == float32_setting()
    assert same_codes(tmp_path / "q", folders / "gptaq")
