"""Outside axolotl: `attach` on a TRL SFTTrainer, as the documentation shows it, and on its reward and DPO trainers."""

import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny import make_tokenizer
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from axolotl_asft import AlignmentDirection, AlignmentPenalty, attach
from axolotl_asft.stamp import read_stamp

DOCUMENT = Path(__file__).parent.parent / "docs" / "python.md"
LAMBDA = 5.0
COMMON = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 2,
    "learning_rate": 0.05,
    "lr_scheduler_type": "constant",
    "optim": "sgd",
    "max_grad_norm": 0.0,
    "logging_steps": 1,
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "save_strategy": "no",
    "gradient_checkpointing": False,
}


def make_trainer(kind, pair, folder):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(pair[1])
    words = ["the cat sees a dog", "a red house and the tree", "the dog likes the cat", "yes then no"]
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    options = {"model": model, "processing_class": make_tokenizer(), "peft_config": lora}
    if kind == "sft":
        data = Dataset.from_list([{"text": text} for text in words * 4])
        return SFTTrainer(args=SFTConfig(output_dir=str(folder), **COMMON), train_dataset=data, **options)
    data = Dataset.from_list([{"prompt": "the cat ", "chosen": text, "rejected": "no no"} for text in words * 4])
    return DPOTrainer(args=DPOConfig(output_dir=str(folder), **COMMON), train_dataset=data, **options)


def weights(trainer):
    return {name: weight for name, weight in trainer.model.named_parameters() if weight.requires_grad}


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_two_steps_differ_by_the_closed_form(pair, direction_file, tmp_path, kind):
    """Gradient descent with the constraint, against the same trainer's task gradient plus lambda dP/dA, dP/dB."""
    direction = AlignmentDirection.load(direction_file)
    plain, constrained = make_trainer(kind, pair, tmp_path / "a"), make_trainer(kind, pair, tmp_path / "b")
    penalty = AlignmentPenalty(plain.model, direction)
    start = {name: weight.detach().clone() for name, weight in weights(plain).items()}
    for name, weight in weights(constrained).items():
        assert torch.equal(weight, start[name])
    gradients = dict(zip(start, torch.autograd.grad(penalty(), list(weights(plain).values())), strict=True))
    for trainer in (plain, constrained):
        trainer.args.max_steps = 1
    attach(constrained, direction, LAMBDA)
    plain.train()
    constrained.train()
    for name, weight in weights(constrained).items():
        difference = (weights(plain)[name] - weight).detach()
        torch.testing.assert_close(difference, 0.05 * LAMBDA * gradients[name], rtol=1e-3, atol=1e-6)


def test_an_earlier_adapter_gets_no_stamp_of_a_run_that_broke_off(pair, direction_file, tmp_path):
    """TRL writes a model card into output_dir at every checkpoint; what lies beside it may be another run's."""

    class Break(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise KeyboardInterrupt

    plain = make_trainer("sft", pair, tmp_path)
    plain.train()
    plain.save_model()
    again = make_trainer("sft", pair, tmp_path)
    again.args.save_strategy, again.args.save_steps, again.args.max_steps = "steps", 1, 4
    again.args.__post_init__()
    attach(again, AlignmentDirection.load(direction_file), LAMBDA)
    again.add_callback(Break())
    with pytest.raises(KeyboardInterrupt):
        again.train()
    assert read_stamp(tmp_path / "checkpoint-1")["lambda_reg"] == LAMBDA
    assert read_stamp(tmp_path) == {}
    assert "Safety constraint" not in (tmp_path / "README.md").read_text()


def test_the_documented_example_runs(pair, direction_file, tmp_path, monkeypatch, capsys):
    """docs/python.md, with a tiny model and data in place of the names in it."""
    code = re.search(r"<!-- trl -->\n```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL).group(1)
    make_tokenizer().save_pretrained(pair[1])
    (tmp_path / "train.jsonl").write_text('{"text": "the cat sees a dog"}\n{"text": "a red house"}\n' * 8)
    for name, value in {
        "path/to/aligned-model": str(pair[1]),
        "model.asft.safetensors": str(direction_file),
        "train.jsonl": str(tmp_path / "train.jsonl"),
        'output_dir="out"': f'output_dir="{tmp_path / "out"}", use_cpu=True, bf16=False, report_to="none", max_steps=2',
    }.items():
        assert name in code
        code = code.replace(name, value)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(DOCUMENT), "exec"), {})
    assert '"asft"' in (tmp_path / "out" / "adapter_config.json").read_text()
    assert re.search(r"drift [\d.]+", capsys.readouterr().out)
