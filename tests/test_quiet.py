"""A model asked aside in the middle of its training: nothing random, nothing changed afterwards."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import OWN_ANSWERS, make_tokenizer
from torch import nn
from trainers import lora_weights, make_trainer
from transformers import AutoModelForCausalLM

from axolotl_asft import AlignmentDirection, attach
from axolotl_asft.anchor import AnswerAnchor
from axolotl_asft.quiet import without_adapter, without_noise


def noisy_model(pair, checkpointing=None, dropout=0.3, attention_dropout=0.2):
    """In training, with dropout of both kinds, B away from 0."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(pair[1], attention_dropout=attention_dropout)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=dropout)
    model = get_peft_model(model, config)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
        model.enable_input_require_grads()
    return model.train()


def anchor_gradient(model):
    anchor = AnswerAnchor(make_tokenizer(), OWN_ANSWERS)
    anchor.remember(model)
    with without_noise(model):
        anchor.loss(model, 0).backward()
    return torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.requires_grad])


@pytest.mark.parametrize("checkpointing", [None, "reentrant", "not reentrant"])
def test_the_gradient_is_that_of_a_model_without_dropout(pair, checkpointing):
    """Checkpointing asks the layers once more in the backward pass, and has to get the same answer."""
    wanted = anchor_gradient(noisy_model(pair, dropout=0.0, attention_dropout=0.0))
    found = anchor_gradient(noisy_model(pair, checkpointing))
    assert wanted.norm() > 1e-3
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_run_with_dropout_and_checkpointing(pair, rows, anchored_file, tmp_path, reentrant):
    """Of a step without a task (its rows teach nothing), the anchor's gradient alone is left."""
    silent = [{**row, "labels": [-100] * len(row["labels"])} for row in rows]
    after = []
    for dropout, checkpointed in ((0.0, False), (0.3, True)):
        options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
        trainer = make_trainer(pair, silent, tmp_path / str(dropout), max_steps=2, **options if checkpointed else {})
        trainer.model = trainer.model_wrapped = noisy_model(pair, dropout=dropout, attention_dropout=0.0)
        trainer.processing_class = make_tokenizer()
        trainer.compute_loss_func = lambda outputs, labels, **_: 0.0 * outputs.logits.sum()
        before = lora_weights(trainer)
        attach(trainer, AlignmentDirection.load(anchored_file), lambda_reg=0, anchor_weight=3.0)
        trainer.train()
        after.append(lora_weights(trainer))
    for name, weight in after[0].items():
        torch.testing.assert_close(after[1][name], weight, rtol=1e-3, atol=1e-6)
    assert any((weight - before[name]).abs().max() > 1e-4 for name, weight in after[1].items())


def test_every_module_comes_back_as_it_was(pair):
    model = noisy_model(pair, "not reentrant")
    model.base_model.model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    assert len(set(before)) == 2
    with without_noise(model):
        assert not any(m.training for m in model.modules() if isinstance(m, nn.Dropout | nn.Embedding))
        assert all(layer.training for layer in model.base_model.model.model.layers), "or they would not checkpoint"
    assert [module.training for module in model.modules()] == before


def test_layers_in_4_bit_keep_their_weights(pair):
    """In eval mode bitsandbytes repacks them for inference on a CPU."""
    from bitsandbytes.nn import Linear4bit
    from transformers import BitsAndBytesConfig

    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(pair[1], quantization_config=quantised, dtype=torch.bfloat16)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.3)).train()
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    packed = [layer.weight.data.clone() for layer in layers]
    AnswerAnchor(make_tokenizer(), OWN_ANSWERS).remember(model)
    assert layers
    assert all(torch.equal(layer.weight.data, before) for layer, before in zip(layers, packed, strict=True))


def test_what_is_frozen_stays_frozen(pair, rows, anchored_file, tmp_path):
    """PEFT unfreezes the whole adapter when it is switched on again; the norm of the gradient would show it."""
    norms = []
    for weight in (0.0, 1e-9):
        trainer = make_trainer(pair, rows, tmp_path / str(weight), max_grad_norm=1.0, max_steps=2, learning_rate=0.0)
        trainer.processing_class = make_tokenizer()
        for name, factor in trainer.model.named_parameters():
            if "layers.0." in name:
                factor.requires_grad_(False)
        options = {"modules": [r"layers\.1\."], "lambda_reg": 0}
        attach(trainer, AlignmentDirection.load(anchored_file), anchor_weight=weight, **options)
        trainer.train()
        trained = [name for name, factor in trainer.model.named_parameters() if factor.requires_grad]
        assert trained
        assert all("layers.1." in name for name in trained)
        norms.append([line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line])
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_an_adapter_that_transformers_added(pair):
    model = AutoModelForCausalLM.from_pretrained(pair[1])
    ids = torch.tensor([[7, 8, 9, 10]])
    with torch.no_grad():
        aligned = model(input_ids=ids).logits
        model.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
        with without_adapter(model):
            assert torch.equal(model(input_ids=ids).logits, aligned)
        assert not torch.allclose(model(input_ids=ids).logits, aligned)
