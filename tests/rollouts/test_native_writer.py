"""Answers of a teacher and texts of a student from the native engine: whose they are, whatever the
batch, and who writes where it cannot.
"""

import gc
import itertools
import shutil
import weakref
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from small_models import save_random_model
from xinslm.cache.folder import Cache
from xinslm.data.dataset import open_dataset
from xinslm.errors import UsageError, XinslmError
from xinslm.inference.native_batch import NativeBatch, to_q8, with_8_bit_weights
from xinslm.inference.raw_weights import open_raw
from xinslm.model.files import open_model
from xinslm.native import library, reason
from xinslm.native.model import BF16, F16, F32, Q8_APART, Weight
from xinslm.quantize.config import QuantizeConfig
from xinslm.quantize.run import run as quantize
from xinslm.rollouts import onpolicy, synthesize
from xinslm.rollouts.native_writer import NativeWriter, open_writer
from xinslm.rollouts.onpolicy_config import OnPolicyConfig
from xinslm.rollouts.synthesize_config import SynthesizeConfig
from xinslm.sampling import Sampling
from xinslm.teachers.open import open_teacher
from xinslm.teachers.own import OwnTeacher

needs_library = pytest.mark.skipif(
    library() is None, reason=f"the native library is not there: {reason()}"
)
GREEDY = Sampling(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0)
PROMPTS = ["One day a", "The little dog", "Tom and Lily went to the", "It was", "A", "In the sea"]


def decoded(weight: Weight) -> np.ndarray:
    codes = weight.data.reshape(-1, 32).astype(np.float32)
    return (codes * weight.scales[:, None].astype(np.float32)).reshape(weight.shape)


@pytest.mark.parametrize("kind", [F32, F16, BF16])
def test_weights_lie_on_the_grid_of_q8_0(kind) -> None:
    """The values are within half a step of those given, and as near as those of gguf, whose scales
    have more bits.
    """
    values = torch.randn(6, 96, generator=torch.Generator().manual_seed(0))
    values[2, :32] = 0
    dtype = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}[kind]
    stored = values.to(dtype)
    raw = stored.view(torch.int32 if kind == F32 else torch.int16).numpy().view(np.uint8)
    made = to_q8(Weight(kind, (6, 96), raw.reshape(-1)))
    assert made.type == Q8_APART and made.data.dtype == np.int8 and made.scales.dtype == np.float16
    wanted = stored.float().numpy()
    step = np.repeat(made.scales.reshape(6, 3).astype(np.float32), 32, axis=1)
    assert (np.abs(decoded(made) - wanted) <= step * 0.76).all()  # the largest code is clamped
    assert not decoded(made)[2, :32].any()
    theirs = gguf.quants.quantize(wanted, gguf.GGMLQuantizationType.Q8_0)
    theirs = gguf.quants.dequantize(theirs, gguf.GGMLQuantizationType.Q8_0)
    assert np.square(decoded(made) - wanted).sum() < 1.1 * np.square(theirs - wanted).sum()


def test_magnitudes_beyond_the_scales_stay_floats() -> None:
    values = np.full((2, 32), 1e8, np.float32)
    assert to_q8(Weight(F32, (2, 32), values)) is None


@needs_library
def test_greedy_answers_are_those_of_the_8_bit_twin(world, tmp_path) -> None:
    """`quantize --bits 8` without calibration is the same rounding, and `--activations int8` in
    PyTorch the same arithmetic with float32 keys and values.
    """
    quantize(QuantizeConfig(world.teacher, tmp_path / "q8", bits=8, method="rtn"))
    writer = open_writer("native", str(world.teacher), "cpu", "auto")
    assert isinstance(writer, NativeWriter)
    twin = OwnTeacher(open_model(tmp_path / "q8"), "float32", "cpu", activations="int8")
    ours, theirs = (
        model.generate(PROMPTS, range(6), GREEDY, max_new_tokens=30) for model in (writer, twin)
    )
    assert [answer.text for answer in ours] == [answer.text for answer in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine.log_probs, other.log_probs, atol=5e-3)
    assert writer.fingerprint == open_teacher(str(world.teacher)).fingerprint


@needs_library
def test_an_answer_does_not_depend_on_those_written_with_it(world) -> None:
    writer = open_writer("auto", str(world.teacher), "cpu", "auto")
    warm = Sampling(temperature=0.9, top_k=0, top_p=0.95, min_p=0.0, seed=4)
    together = writer.generate(PROMPTS, range(6), warm, 25, rows=6)
    for rows in (1, 4):
        alone = writer.generate(PROMPTS, range(6), warm, 25, rows=rows)
        assert [a.log_probs for a in alone] == [a.log_probs for a in together]  # to the last bit
        assert [a.text for a in alone] == [a.text for a in together]


@needs_library
def test_rows_that_the_grid_does_not_fit_stay_floats(tmp_path) -> None:
    save_random_model(tmp_path, hidden_size=48, num_attention_heads=3, num_key_value_heads=3)
    raw = with_8_bit_weights(open_raw(tmp_path))
    kinds = {name: raw.read(name).type for name in raw.names}
    assert kinds["model.layers.0.self_attn.q_proj.weight"] == F32
    assert kinds["model.norm.weight"] == F32
    width = open_raw(tmp_path).config.intermediate_size
    assert kinds["model.layers.0.mlp.down_proj.weight"] == (F32 if width % 32 else Q8_APART)
    decoder = NativeBatch(raw, raw.config.vocab_size).open_decoder(1, 8)
    logits, _ = decoder.read([0], [np.array([1, 2, 3])])
    model = open_model(tmp_path).transformer(torch.float32)
    with torch.no_grad():
        wanted = model.logits(model.hidden(torch.tensor([[1, 2, 3]])))[0, -1]
    assert (logits[0] - wanted).abs().max() < 0.05 * wanted.std()


def settings(world, folder, **changes) -> SynthesizeConfig:
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n")
    fields = {"max_new_tokens": 12, "device": "cpu", "max_seq_length": 64, **changes}
    teacher = fields.pop("teacher", str(world.teacher))
    return SynthesizeConfig(teacher=teacher, prompts=prompts, output_dir=folder / "s", **fields)


@needs_library
def test_what_the_cache_holds_is_the_teachers_own_in_floats(world, tmp_path) -> None:
    result = synthesize.run(settings(world, tmp_path))
    assert "written by  the native engine (" in result.describe()
    model = open_model(world.teacher).transformer(torch.float32)
    split = open_dataset(tmp_path / "s" / "data").split("train")
    start, end = split.documents[:2]
    ids = torch.from_numpy(split.tokens[start:end].astype(np.int64))
    with torch.no_grad():
        log_p = model.logits(model.hidden(ids[None]))[0].log_softmax(1)
    targets = Cache(tmp_path / "s" / "cache").split("train").targets(np.arange(start, end - 1))
    valid = targets.valid_mask
    wanted = log_p[:-1].gather(1, targets.top_k_ids)[valid]
    torch.testing.assert_close(targets.top_k_log_probs[valid], wanted, atol=0.06, rtol=0.02)


def test_pytorch_writes_where_there_is_no_library(world, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XINSLM_NATIVE", "off")
    assert "written by  PyTorch" in synthesize.run(settings(world, tmp_path)).describe()
    with pytest.raises(UsageError, match="--engine native: "):
        synthesize.run(settings(world, tmp_path, engine="native", force=True))


@needs_library
def test_refusals_name_the_setting(world, tmp_path) -> None:
    cases = {
        "--engine native: --dtype bfloat16 is a setting of PyTorch": {"dtype": "bfloat16"},
        "--engine native is for local teachers, and http": {"teacher": "http://localhost:1/v1"},
        "--engine native runs no code of --trust-remote-code": {"trust_remote_code": True},
    }
    for message, changes in cases.items():
        with pytest.raises(UsageError, match=message):
            synthesize.run(settings(world, tmp_path, engine="native", **changes))
        assert not (tmp_path / "s").exists()
    for changes in ({"dtype": "float32"}, {"trust_remote_code": True}, {"engine": "pytorch"}):
        result = synthesize.run(settings(world, tmp_path, keep_cache=False, force=True, **changes))
        assert "written by  PyTorch" in result.describe()


@needs_library
def test_weights_that_are_not_finite_are_an_error(world, tmp_path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(open_model(world.teacher).path, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(weights, broken / "model.safetensors")
    with pytest.raises(XinslmError, match=r"not finite|NaN"):
        synthesize.run(settings(world, tmp_path, teacher=str(broken), engine="native"))


def rounds(world, folder, **changes):
    fields = {"max_new_tokens": 12, "prompt_tokens": 6, "completions": 16, "rounds": 2}
    fields |= {"max_seq_length": 64, "support_top_k": 8, "batch_size": 4, "device": "cpu"}
    fields |= {"student": world.teacher, "teacher": str(world.teacher), "prompts": world.data}
    return OnPolicyConfig(output_dir=folder, **(fields | changes))


@needs_library
def test_a_student_writes_its_rounds_natively(world, tmp_path) -> None:
    config = rounds(world, tmp_path / "n", engine="native")
    result = onpolicy.run(config)
    assert result.texts == 32 and result.state.step > 0
    native = open_dataset(tmp_path / "n" / "round-001" / "data").split("train")
    onpolicy.run(replace(config, output_dir=tmp_path / "p", engine="pytorch"))
    pytorch = open_dataset(tmp_path / "p" / "round-001" / "data").split("train")
    texts = [
        [tuple(split.tokens[a:b]) for a, b in itertools.pairwise(split.documents)]
        for split in (native, pytorch)
    ]
    same = sum(a == b for a, b in zip(*texts, strict=True))
    assert same >= 8  # the same numbers are drawn; rounding moves few of them
    for made, engine in (("n", "native"), ("p", "pytorch")):
        manifest = open_dataset(tmp_path / made / "round-002" / "data").manifest
        assert manifest["config"]["engine"] == engine


@pytest.mark.parametrize("engine", ["native", "pytorch"])
def test_the_teacher_that_wrote_is_gone_when_it_scores(
    world, tmp_path, monkeypatch, engine
) -> None:
    if engine == "native" and library() is None:
        pytest.skip("the native library is not there")
    opened = []
    for kind in (NativeWriter, OwnTeacher):
        monkeypatch.setattr(kind, "__init__", _noted(kind.__init__, opened))
    score = synthesize.score_answers

    def checked(config, on_progress):
        gc.collect()
        assert len(opened) == 1 and opened[0]() is None
        return score(config, on_progress)

    monkeypatch.setattr(synthesize, "score_answers", checked)
    synthesize.run(settings(world, tmp_path, engine=engine))
    assert len(opened) == 2


def _noted(begin, opened):
    def init(self, *arguments, **more):
        opened.append(weakref.ref(self))
        begin(self, *arguments, **more)

    return init


@pytest.mark.parametrize("command", ["synthesize", "onpolicy"])
def test_a_lost_library_is_told(world, tmp_path, monkeypatch, command) -> None:
    monkeypatch.setattr("xinslm.native.reason", lambda: "libxinslm.so cannot be loaded")
    monkeypatch.setattr("xinslm.native.library", lambda: None)

    def told(engine: str) -> int:
        notes = []
        if command == "synthesize":
            config = settings(world, tmp_path, engine=engine, force=True)
            synthesize.run(config, lambda progress: notes.append(progress.note))
        else:
            config = rounds(world, tmp_path / engine, engine=engine)
            onpolicy.run(config, lambda progress: notes.append(progress.note))
        return sum("PyTorch runs the model" in (note or "") for note in notes)

    assert told("auto") == 1
    assert told("pytorch") == 0
