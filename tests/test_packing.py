"""4-bit weights on a CPU with AVX512-BF16 keep their gradient, whatever was asked of the model in between."""

import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from lora_models import lora_model
from tiny import make_tokenizer
from trainers import make_trainer

from axolotl_asft import AlignmentDirection, attach
from axolotl_asft.errors import AsftError
from axolotl_asft.evaluation.models import load_model
from axolotl_asft.metrics import fisher_metric
from axolotl_asft.packing import never_packed

pytestmark = pytest.mark.skipif(not has_avx512bf16(), reason="bitsandbytes repacks on CPUs with AVX512-BF16 alone")
IDS = torch.arange(6, 18)[None]


def answer(model):
    """As an evaluation does."""
    training = model.training
    with torch.no_grad():
        model.eval()(input_ids=IDS)
    model.train(training)


def gradient(model):
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return torch.cat([weight.grad.flatten() for name, weight in model.named_parameters() if "lora_B" in name])


@pytest.mark.parametrize("kept", [True, False])
def test_the_gradient_after_an_evaluation(pair, kept):
    model = lora_model(pair[1], quantized="plain").train()
    before = gradient(model)
    if kept:
        never_packed(model)
    answer(model)
    same = torch.allclose(gradient(model), before, rtol=1e-3, atol=1e-5 * float(before.abs().max()))
    assert same == kept, "without it bitsandbytes gives another gradient, unsaid"


def test_a_model_that_has_answered_before_is_refused(pair, rows, direction_file, tmp_path):
    trainer = make_trainer(pair, rows, tmp_path)
    trainer.model = lora_model(pair[1], quantized="plain")
    answer(trainer.model)
    with pytest.raises(AsftError, match=r"q_proj.* has run in eval mode on this CPU.*; load the model again"):
        attach(trainer, AlignmentDirection.load(direction_file))


def test_a_metric_after_the_answers(pair):
    model = load_model(str(pair[1]), "float32", load_in_4bit=True, device="cpu")
    never_packed(model)
    answer(model)
    names = ["model.layers.0.mlp.up_proj"]
    found = fisher_metric(model, make_tokenizer(), [("a red dog", " a blue cat")], names, rank=4)
    assert float(found.layers[names[0]].Y.norm()) > 0


def test_attaching_keeps_a_run_s_evaluations_harmless(pair, rows, direction_file, tmp_path):
    trainer = make_trainer(pair, rows, tmp_path)
    trainer.model = lora_model(pair[1], quantized="plain")
    attach(trainer, AlignmentDirection.load(direction_file))
    answer(trainer.model)
    states = [module.weight.quant_state for module in trainer.model.modules() if hasattr(module, "compute_type_is_set")]
    assert states
    assert not any(getattr(state, "packing_format_for_cpu", False) for state in states)
