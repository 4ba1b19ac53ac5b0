"""`--activations int8` is what llama.cpp computes with the GGUF file of a quantized model."""

import numpy as np
import pytest
import torch

from llama_cpp import LlamaCpp
from small_models import save_random_model
from xinslm.export.config import GgufConfig
from xinslm.export.gguf import run as export
from xinslm.model.files import load_model
from xinslm.quantize.config import QuantizeConfig
from xinslm.quantize.run import run as quantize


@pytest.mark.parametrize("bits", [4, 8])
def test_llama_cpp_agrees_with_int8_far_better_than_with_float_activations(tmp_path, bits):
    """Of a model with peaked attention; what is left is the order of float32 sums, and codes near
    a tie that it moves.
    """
    save_random_model(tmp_path / "model", num_hidden_layers=3, intermediate_size=160)
    quantize(QuantizeConfig(tmp_path / "model", tmp_path / "q", method="rtn", bits=bits))
    export(GgufConfig(tmp_path / "q", tmp_path / "m.gguf"))
    models = [load_model(tmp_path / "q", activations=kind) for kind in ("float", "int8")]
    divergences = []
    with LlamaCpp(tmp_path / "m.gguf") as llama:
        for seed in range(8):
            ids = np.random.default_rng(seed).integers(5, 320, 40).tolist()
            theirs = llama.next_logprobs(ids, 320)
            for model in models:
                with torch.no_grad():
                    logits = model.logits(model.hidden(torch.tensor([ids])))[0, -1]
                ours = logits.double().log_softmax(-1).numpy()
                divergences.append(float((np.exp(theirs) * (theirs - ours)).sum()))
    plain, rounded = np.array(divergences).reshape(-1, 2).mean(0)
    print(f"{bits} bits: KL(llama.cpp || float) {plain:.1e}, KL(llama.cpp || int8) {rounded:.1e}")
    assert plain > 1e-4, "rounding of activations is visible"
    assert rounded < plain / 20
