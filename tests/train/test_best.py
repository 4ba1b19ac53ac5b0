"""The best model at the top of the run folder: a model folder for everybody, at every moment."""

import os
import shutil

import pytest
import torch
from safetensors.torch import load_file

import training as train
from xinslm.errors import UsageError
from xinslm.model.files import load_model, open_model
from xinslm.tokenizer.load import load_tokenizer
from xinslm.train import best as publishing
from xinslm.train import checkpoint

MODEL = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
}
OPTIMIZER = "optimizer.safetensors"


def names(folder):
    return {path.name for path in folder.iterdir()}


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def steps(world, run, **changes):
    """A run whose best checkpoint is not its last: the rate ruins the model after a few steps."""
    values = {"max_steps": 6, "learning_rate": 0.6, "eval_steps": 1, "warmup_ratio": 0.9}
    return world.pretrain(run, **values | {"decay_ratio": 0} | changes)


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("best") / "run"
    train.run(steps(world, folder))
    return folder


def test_transformers_and_xinslm_find_the_best_model_at_the_top(run):
    transformers = pytest.importorskip("transformers")
    best = run / "checkpoints" / "best"
    assert weights(run) == weights(best) != weights(run / "checkpoints" / "last")
    assert names(run) >= MODEL and not names(run) & {OPTIMIZER, checkpoint.STATE}
    assert OPTIMIZER in names(run / "checkpoints" / "last") and OPTIMIZER not in names(best)
    assert open_model(run).path == run
    assert open_model(run).fingerprint == open_model(best).fingerprint
    theirs, ours = transformers.AutoModelForCausalLM.from_pretrained(run), load_model(run)
    tokenizer = transformers.AutoTokenizer.from_pretrained(run)
    ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
    ours_ids = load_tokenizer(run).encode("Once upon a time")
    assert ids[0].tolist() == [tokenizer.bos_token_id, *ours_ids]
    with torch.no_grad():
        expected = ours.logits(ours.hidden(ids))
        torch.testing.assert_close(theirs(ids).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("links", [True, False])
def test_a_copy_is_a_model_also_without_its_checkpoints(world, run, tmp_path, links):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy, symlinks=links)
    shutil.rmtree(copy / "checkpoints")
    assert weights(copy) == weights(run)
    assert open_model(copy).path == copy and load_model(copy) is not None


def interrupted(world, run, monkeypatch, save):
    """Stop a run while it saves for the `save`th time, after its files, before its links."""
    calls, real = [], checkpoint.publish

    def stop(*args, **kwargs):
        calls.append(1)
        if len(calls) == save:
            raise SystemExit
        real(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "publish", stop)
    with pytest.raises(SystemExit):
        train.run(world.distill(run))
    monkeypatch.setattr(checkpoint, "publish", real)


@pytest.mark.parametrize("save", [1, 2])
def test_a_stop_before_the_top_is_replaced_is_made_good(world, tmp_path, monkeypatch, save):
    folder = tmp_path / "run"
    interrupted(world, folder, monkeypatch, save)
    best = folder / "checkpoints" / "best"
    if save > 1:
        assert weights(open_model(folder).path) != weights(best), "one older, but whole"
        load_model(folder)
    train.run(world.distill(folder))
    train.run(world.distill(tmp_path / "whole"))
    assert weights(folder) == weights(best) == weights(tmp_path / "whole")


def test_a_stop_between_two_files_never_leaves_half_a_model(world, run, tmp_path, monkeypatch):
    """`config.json` is last, so commands go on to use the checkpoint until the top is complete."""
    source, real = run / "checkpoints" / "best", publishing.link_or_copy
    for count in range(len(MODEL)):
        folder, placed = tmp_path / str(count), []
        shutil.copytree(source, folder / "checkpoints" / "best")

        def stop(source, target, placed=placed, count=count):
            if len(placed) == count:
                raise SystemExit
            placed.append(target)
            real(source, target)

        monkeypatch.setattr(publishing, "link_or_copy", stop)
        with pytest.raises(SystemExit):
            publishing.publish(source, folder, ())
        assert open_model(folder).path == folder / "checkpoints" / "best"


def refuse(*args, **kwargs):
    raise PermissionError(1, "Operation not permitted")


def test_file_systems_without_links_hold_the_same_run(world, tmp_path, monkeypatch):
    train.run(world.distill(tmp_path / "linked"))
    monkeypatch.setattr(os, "symlink", refuse)
    monkeypatch.setattr(os, "link", refuse)
    plain = tmp_path / "plain"
    interrupted(world, plain, monkeypatch, 2)
    train.run(world.distill(plain))
    places = plain / "checkpoints"
    assert names(places) == {"best", "last"} and not any(p.is_symlink() for p in places.iterdir())
    for place in ("best", "last"):
        expected = load_file(tmp_path / "linked" / "checkpoints" / place / "model.safetensors")
        found = load_file(places / place / "model.safetensors")
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert OPTIMIZER not in names(places / "best") and OPTIMIZER in names(places / "last")
    assert weights(plain) == weights(places / "best")


def test_a_copy_that_resolved_the_links_is_continued(world, tmp_path, monkeypatch):
    train.run(world.distill(tmp_path / "whole"))
    interrupted(world, tmp_path / "run", monkeypatch, 2)
    shutil.copytree(tmp_path / "run", tmp_path / "copy", symlinks=False)
    train.run(world.distill(tmp_path / "copy"))
    assert weights(tmp_path / "copy") == weights(tmp_path / "whole")
    with pytest.raises(UsageError, match="finished"):
        train.run(world.distill(tmp_path / "copy"))
