"""What needs a GPU: axolotl's FSDP2 and DeepSpeed paths, fp16 with loss scaling, fused kernels, offloading; and that
what the commands measure on one is what they measure on a CPU.

ASFT_TEST_GPU=1 python -m pytest -m gpu
"""

import json

import pytest
import torch
from checkpoints import write_wide_checkpoint
from lora_models import lora_model, shake
from safetensors.torch import load_file
from tiny import axolotl, deepspeed_config, make_tokenizer, train, write_config

from axolotl_asft import extract_direction
from axolotl_asft.evaluation.evaluate import Questions, evaluate
from axolotl_asft.evaluation.models import load_model
from axolotl_asft.layer_groups import TEMPORARY_BYTES_ON_GPU
from axolotl_asft.metrics import activation_metric, fisher_metric

pytestmark = pytest.mark.gpu
PLUGINS = ["recorder_plugin.RecorderPlugin", "asft"]
LLAMA_LAYER = {"transformer_layer_cls_to_wrap": "LlamaDecoderLayer", "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
FSDP2 = {"fsdp_version": 2, "fsdp_config": {**LLAMA_LAYER, "state_dict_type": "FULL_STATE_DICT"}}


def config_with(folder, pair, dataset, direction_file, weight=0, **changes):
    block = {"direction": str(direction_file), "lambda_reg": 0.3, "projector": "subspace", "anchor_weight": weight}
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
    "layer offloading": {"bf16": True, "layer_offloading": True},
}


@pytest.mark.parametrize("feature", FEATURES)
def test_the_penalty_counts_once(pair, dataset, direction_file, tmp_path, feature):
    config = config_with(tmp_path, pair, dataset, direction_file, **{"plugins": PLUGINS, **FEATURES[feature]})
    train(config)
    steps = json.loads((tmp_path / "out" / "record.json").read_text())["steps"]
    for step in steps[1:]:
        assert step["error"] < 0.02 * step["expected"]


IN_16_BIT = {"adapter": "lora", "load_in_4bit": None}


@pytest.mark.parametrize(
    ("weight", "changes"), [(0, IN_16_BIT), (2, IN_16_BIT), (0, {}), (2, {})],
    ids=["LoRA", "LoRA and the anchor", "QLoRA", "QLoRA and the anchor"],
)  # fmt: skip
def test_fsdp2_through_axolotl_equals_one_process(pair, dataset, anchored_file, tmp_path, weight, changes):
    """As many processes as there are GPUs; one shards too."""
    assert_equals_one_process(pair, dataset, anchored_file, tmp_path, weight, changes, FSDP2, "training on FSDP")


@pytest.mark.parametrize("stage", [1, 2], ids=["ZeRO-1", "ZeRO-2"])
def test_deepspeed_through_axolotl_equals_one_process(pair, dataset, anchored_file, tmp_path, stage):
    """QLoRA and the anchor; as many processes as there are GPUs."""
    pytest.importorskip("deepspeed")
    carried = {"deepspeed": deepspeed_config(stage)}
    assert_equals_one_process(pair, dataset, anchored_file, tmp_path, 2, {}, carried, "training on DEEPSPEED")


def assert_equals_one_process(pair, dataset, anchored_file, tmp_path, weight, changes, carried, said):
    shake(lora_model(pair[1], random_b=False, r=8, lora_alpha=16)).save_pretrained(tmp_path / "start")
    count = torch.cuda.device_count()
    start = {"lora_model_dir": str(tmp_path / "start"), **changes}
    adapters = []
    torchrun = ("--launcher", "torchrun", "--", f"--nproc_per_node={count}")
    for name, more, launch, seen in (
        ("one", {"gradient_accumulation_steps": count}, ("--launcher", "python"), {"CUDA_VISIBLE_DEVICES": "0"}),
        ("many", {**carried, "gradient_accumulation_steps": 1}, torchrun, {}),
    ):
        config = config_with(tmp_path / name, pair, dataset, anchored_file, weight, **start, **more)
        result = axolotl("train", str(config), *launch, cwd=config.parent, **seen)
        assert (said in result.stdout + result.stderr) == (name == "many")
        adapters.append(load_file(str(tmp_path / name / "out" / "adapter_model.safetensors")))
    for name, weights in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], weights, rtol=1e-2, atol=1e-4)


def test_the_penalty_waits_for_nothing_and_takes_little():
    """Eight decoder layers of a 7B Llama: no synchronisation, and no more than a group may take beside what stays."""
    from benchmarks.shapes import SHAPES, random_penalty

    penalty = random_penalty(SHAPES["7B"], layers=8, r=16, k=64, sketch=256, device="cuda")
    penalty.add_gradient()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_sync_debug_mode("error")
    try:
        penalty.add_gradient()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.max_memory_allocated() - before < TEMPORARY_BYTES_ON_GPU


def test_the_gradient_is_the_same_where_a_run_allows_tf32():
    """To the bit, though products of the run itself are rounded there."""
    from benchmarks.shapes import SHAPES, random_penalty

    penalty = random_penalty(SHAPES["SmolLM2-135M"], layers=2, r=16, k=64, device="cuda")
    factors = [factor for layer in penalty.layers for factor in (layer.A, layer.B)]
    square = torch.randn(512, 512, generator=torch.Generator().manual_seed(0)).cuda()
    matmul, gradients, products = torch.backends.cuda.matmul, [], []
    before = matmul.fp32_precision
    try:
        for precision in ("ieee", "tf32"):
            matmul.fp32_precision = precision
            for factor in factors:
                factor.grad = None
            penalty.add_gradient()
            gradients.append([factor.grad for factor in factors])
            products.append(square @ square)
    finally:
        matmul.fp32_precision = before
    assert not torch.equal(*products)
    for in_fp32, where_allowed in zip(*gradients, strict=True):
        assert in_fp32.any()
        assert torch.equal(in_fp32, where_allowed)


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


def test_an_evaluation_on_a_gpu_is_the_cpus(pair, tmp_path):
    """In fp32 the same answers; in NF4, which computes in bf16 there, the same prompts and a perplexity close by."""
    shake(lora_model(pair[1], random_b=False, r=8, lora_alpha=16)).save_pretrained(tmp_path / "tuned")
    adapters, rows = [f"tuned={tmp_path / 'tuned'}"], {}
    for device in ("cpu", "cuda"):
        for small in (False, True):
            questions = Questions(limit=24, max_new_tokens=8, load_in_4bit=small)
            rows[device, small] = evaluate(
                str(pair[1]), adapters, tmp_path / f"{device}-{small}", questions, device=device
            )
    for name in ("model", "tuned"):
        kept = [json.loads((tmp_path / f"{device}-False" / f"{name}.json").read_text()) for device in ("cpu", "cuda")]
        answers = [[answer["answer"] for answer in each["harmful"]["harmful"]["answers"]] for each in kept]
        assert answers[0] == answers[1]
    for small, within in ((False, 1e-3), (True, 0.2)):
        for on_cpu, on_gpu in zip(rows["cpu", small], rows["cuda", small], strict=True):
            assert on_gpu.harmfulness["harmful"].n == on_cpu.harmfulness["harmful"].n == 24
            # a model of random weights may answer nothing, on both: then there is none
            assert on_gpu.perplexity == pytest.approx(on_cpu.perplexity, rel=within, nan_ok=True)


@pytest.mark.parametrize("metric", [activation_metric, fisher_metric])
def test_a_metric_from_a_gpu_is_the_cpus(pair, metric):
    """The tokens of the Fisher metric are drawn on the CPU; what is left between the two is rounding."""
    turns = [("<|user|> the cat sees a dog </s><|assistant|> ", "yes no"), ("<|user|> red </s><|assistant|> ", "no")]
    found = []
    for device in ("cpu", "cuda"):
        model = load_model(str(pair[1]), "float32", device=device)
        layers = [name for name, _ in model.named_modules() if name.endswith("_proj")]
        found.append(metric(model, make_tokenizer(), turns, layers, rank=64, energy=1.0).layers)
    for name in found[0]:
        for factor in ("X", "Y"):
            on_cpu, on_gpu = (getattr(each[name], factor) for each in found)
            if on_cpu is not None:
                torch.testing.assert_close(on_gpu @ on_gpu.T, on_cpu @ on_cpu.T, rtol=1e-3, atol=1e-5)
