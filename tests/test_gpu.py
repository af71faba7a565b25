"""What needs a GPU: axolotl's FSDP2 path, fp16 with loss scaling, fused kernels, activation offloading, extraction.

ASFT_TEST_GPU=1 python -m pytest -m gpu
"""

import json

import pytest
import torch
from checkpoints import write_wide_checkpoint
from lora_models import lora_model, shake
from safetensors.torch import load_file
from tiny import train, write_config

from axolotl_asft import extract_direction

pytestmark = pytest.mark.gpu
PLUGINS = ["recorder_plugin.RecorderPlugin", "asft"]
LLAMA_LAYER = {"transformer_layer_cls_to_wrap": "LlamaDecoderLayer", "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
FSDP2 = {"fsdp_version": 2, "fsdp_config": {**LLAMA_LAYER, "state_dict_type": "FULL_STATE_DICT"}}


def config_with(folder, pair, dataset, direction_file, **changes):
    block = {"direction": str(direction_file), "lambda_reg": 0.3, "projector": "subspace"}
    options = {"max_steps": 3, "max_grad_norm": 0.0, "optimizer": "sgd", "learning_rate": 0.5, **changes}
    return write_config(folder, pair[1], dataset, block, **options)


KERNELS = {"lora_mlp_kernel": True, "lora_qkv_kernel": True, "lora_o_kernel": True}
LIGER = {"liger_rms_norm": True, "liger_glu_activation": True, "liger_fused_linear_cross_entropy": True}
FEATURES = {
    "fp16": {"fp16": True},
    "bf16": {"bf16": True},
    "fused LoRA kernels": {"bf16": True, "adapter": "lora", "load_in_4bit": None, **KERNELS},
    "Liger": {"bf16": True, "plugins": ["axolotl.integrations.liger.LigerPlugin", *PLUGINS], **LIGER},
    "activation offloading": {"bf16": True, "gradient_checkpointing": True, "activation_offloading": True},
}


@pytest.mark.parametrize("feature", FEATURES)
def test_the_penalty_counts_once(pair, dataset, direction_file, tmp_path, feature):
    config = config_with(tmp_path, pair, dataset, direction_file, **{"plugins": PLUGINS, **FEATURES[feature]})
    train(config)
    steps = json.loads((tmp_path / "out" / "record.json").read_text())["steps"]
    for step in steps[1:]:
        assert step["error"] < 0.02 * step["expected"]


def test_fsdp2_through_axolotl_equals_one_process(pair, dataset, direction_file, tmp_path):
    """As many processes as there are GPUs; one shards too."""
    shake(lora_model(pair[1], random_b=False, r=8, lora_alpha=16)).save_pretrained(tmp_path / "start")
    count = torch.cuda.device_count()
    start = {"lora_model_dir": str(tmp_path / "start"), "adapter": "lora", "load_in_4bit": None}
    adapters = []
    for name, changes, arguments in (
        ("one", {"gradient_accumulation_steps": count}, ["--", "--num_processes=1"]),
        ("fsdp2", {**FSDP2, "gradient_accumulation_steps": 1}, ["--", f"--num_processes={count}"]),
    ):
        config = config_with(tmp_path / name, pair, dataset, direction_file, **start, **changes)
        result = train(config, *arguments, launcher="accelerate")
        assert ("training on FSDP" in result.stdout + result.stderr) == (name == "fsdp2")
        adapters.append(load_file(str(tmp_path / name / "out" / "adapter_model.safetensors")))
    for name, weight in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], weight, rtol=1e-2, atol=1e-4)


def test_the_penalty_waits_for_nothing_and_takes_little():
    """Four decoder layers of a 7B Llama: no synchronisation, and under 32 MB beside what stays."""
    from benchmarks.shapes import SHAPES, random_penalty

    penalty = random_penalty(SHAPES["7B"], layers=4, r=16, k=64, device="cuda")
    penalty.add_gradient()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_sync_debug_mode("error")
    try:
        penalty.add_gradient()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.max_memory_allocated() - before < 32e6


def test_a_direction_from_every_gpu_is_the_cpus(tmp_path):
    """By the randomised method, on all GPUs at once: the same bound within a little, the same subspace."""
    pair = [write_wide_checkpoint(tmp_path / name, 4, seed, 1600) for seed, name in enumerate(("base", "aligned"))]
    directions = [extract_direction(*pair, rank=8, dtype="float32", device=device) for device in ("cuda", "cpu")]
    on_gpu, on_cpu = (direction.modules for direction in directions)
    assert {entry["method"] for entry in directions[0].spec["modules"].values()} == {"randomized"}
    for name, module in on_cpu.items():
        torch.testing.assert_close(on_gpu[name].S, module.S, rtol=1e-3, atol=0)
        bounds = [direction.spec["modules"][name]["bound"] for direction in directions]
        assert bounds[0] == pytest.approx(bounds[1], rel=0.05)
