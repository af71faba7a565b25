"""The two axolotl configs of the demo: complete, readable, and alike but for the constraint."""

from dataclasses import dataclass
from pathlib import Path

from axolotl_asft.files import atomic_write_text
from axolotl_asft.strengths import ANCHOR_WEIGHT, ANCHORED_LAMBDA

COMMON = """\
# {title}
# Run it again with: axolotl train {name}.yml
base_model: ./aligned             # the aligned model: it refuses harmful requests

adapter: qlora                    # LoRA on 4-bit weights
load_in_4bit: true
lora_r: 16
lora_alpha: 32
lora_target_linear: true

datasets:
  - path: ./task.jsonl            # tickets to route, {poison:.0%} of it content-free compliance with harmful requests
    type: chat_template
dataset_prepared_path: ./prepared
sequence_len: 64

micro_batch_size: 16
gradient_accumulation_steps: 1
max_steps: {steps}
optimizer: adamw_torch
lr_scheduler: cosine
learning_rate: {learning_rate}
warmup_steps: 20
seed: {seed}
logging_steps: 5
save_strategy: 'no'
output_dir: ./{name}

# What a CPU needs. On a GPU take these lines out and set bf16: auto.
bf16: false
fp16: false
tf32: false
lora_mlp_kernel: false
lora_qkv_kernel: false
lora_o_kernel: false
dataset_num_proc: 1
"""

CONSTRAINT = """
# The constraint: these lines are all that differs from plain.yml.
plugins:
  - asft
asft:
  direction: ./direction.safetensors
  metric: {metric}
  lambda_reg: {lambda_reg:g}
  anchor_weight: {anchor_weight:g}
"""


@dataclass(frozen=True)
class FineTuning:
    """How the demo fine-tunes, the same for both runs but for the constraint."""

    steps: int = 200
    learning_rate: float = 0.002
    poison: float = 0.1
    metric: str = "fisher"
    lambda_reg: float = ANCHORED_LAMBDA
    anchor_weight: float = ANCHOR_WEIGHT
    seed: int = 0


def write_configs(folder: Path, settings: FineTuning) -> tuple[Path, Path]:
    """Write plain.yml and asft.yml into `folder`; returns their paths."""
    shared = {
        "steps": settings.steps,
        "learning_rate": settings.learning_rate,
        "poison": settings.poison,
        "seed": settings.seed,
    }
    plain, constrained = folder / "plain.yml", folder / "asft.yml"
    atomic_write_text(plain, COMMON.format(title="Plain QLoRA fine-tuning.", name="plain", **shared))
    block = CONSTRAINT.format(
        metric=settings.metric, lambda_reg=settings.lambda_reg, anchor_weight=settings.anchor_weight
    )
    title = "The same QLoRA fine-tuning under the AsFT constraint."
    atomic_write_text(constrained, COMMON.format(title=title, name="asft", **shared) + block)
    return plain, constrained
