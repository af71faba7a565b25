"""A run that asked for the constraint never trains without it: each bad input ends the run, in one clear line.

Every case goes through `axolotl.cli.train`, as `axolotl train` starts it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lora_models import lora_model, shake
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import ENVIRONMENT, axolotl, make_pair, train, write_config

MODEL_LOADED = "Loading weights"


@pytest.fixture(scope="module")
def refused(forked_train, pair, dataset, tmp_path_factory):
    """Train with these changes to a good config; returns the one line that refused it."""

    def run(asft: dict | None, model_loads: bool = False, **changes) -> str:
        config = write_config(
            tmp_path_factory.mktemp("run"), changes.pop("base_model", pair[1]), dataset, asft, **changes
        )
        status, output = forked_train(config)
        lines = [line for line in output.splitlines() if line.startswith("asft: ")]
        assert status == 1, output
        assert len(lines) == 1, output
        assert "Traceback" not in output.split(lines[0])[1], output
        assert not (config.parent / "out" / "adapter_model.safetensors").exists()
        assert (MODEL_LOADED in output) == model_loads, output
        return lines[0]

    return run


@pytest.fixture
def changed_file(direction_file, tmp_path):
    """A copy of the direction file, changed by a function of (tensors, metadata)."""

    def make(change) -> str:
        with safe_open(str(direction_file), "pt") as file:
            tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
        change(tensors, metadata)
        path = tmp_path / "changed.safetensors"
        save_file(tensors, str(path), metadata=metadata)
        return str(path)

    return make


def test_a_good_config_trains(forked_train, pair, dataset, direction_file, tmp_path):
    """The other tests here would pass on anything if this one did not train."""
    config = write_config(tmp_path, pair[1], dataset, {"direction": str(direction_file)})
    status, output = forked_train(config)
    assert status == 0, output
    assert "14 layers constrained" in output
    assert MODEL_LOADED in output
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_plugin_without_block(refused):
    assert "no asft: block" in refused(None, plugins=["asft"])


def test_block_in_capitals(refused, direction_file):
    line = refused(None, AsFT={"direction": str(direction_file)})
    assert "AsFT: is not an axolotl key, and axolotl drops it; did you mean asft:?" in line


def test_block_without_plugin(refused, direction_file):
    line = refused({"direction": str(direction_file)}, plugins=None)
    assert "plugins: lists nothing; add `- asft` under plugins:" in line


def test_block_with_another_plugin_only(refused, direction_file):
    plugin = "axolotl.integrations.liger.LigerPlugin"
    assert plugin in refused({"direction": str(direction_file)}, plugins=[plugin])


@pytest.mark.parametrize(
    "name",
    ["asfft", "Asft", "axolotl-asft.AsftPlugin", "axolotl_asf.AsftPlugin", "asft.AsftPlugin", "axolotl_asft.Asft"],
)
@pytest.mark.parametrize("with_block", [True, False])
def test_plugin_name_nearly_ours(refused, direction_file, name, with_block):
    block = {"direction": str(direction_file)} if with_block else None
    line = refused(block, plugins=[name])
    assert repr(name) in line
    assert "did you mean 'asft'" in line


def test_plugin_listed_twice(refused, direction_file):
    line = refused({"direction": str(direction_file)}, plugins=["asft", "axolotl_asft.AsftPlugin"])
    assert "more than once" in line


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({}, "asft.direction is missing"),
        ({"direction": "d", "lambda_reg": -1}, "asft.lambda_reg is -1"),
        ({"direction": "d", "lambda_reg": float("nan")}, "asft.lambda_reg is nan"),
        ({"direction": "d", "lambda_reg": float("inf")}, "asft.lambda_reg is inf"),
        ({"direction": "d", "lamda_reg": 1}, "asft.lamda_reg is not a key of the asft block; did you mean lambda_reg?"),
        ({"direction": "d", "projector": "papper"}, "asft.projector is 'papper'"),
        ({"direction": "d", "on_uncovered": "skip"}, "asft.on_uncovered is 'skip'"),
        ({"direction": "d", "rank": -1}, "asft.rank is -1"),
        ("yes", "expected a block of keys"),
    ],
)
def test_bad_block(refused, block, message):
    assert message in refused(block)


@pytest.mark.parametrize("adapter", [None, "llama-adapter"])
def test_no_lora(refused, direction_file, adapter):
    line = refused({"direction": str(direction_file)}, adapter=adapter, load_in_4bit=None)
    assert "set adapter: qlora or adapter: lora" in line


def test_direction_missing(refused):
    assert "no direction file at nowhere.safetensors" in refused({"direction": "nowhere.safetensors"})


@pytest.mark.parametrize("content", [b"not a tensor", b"\x80\x04\x95\x00", b""])
def test_direction_no_safetensors(refused, tmp_path, content):
    path = tmp_path / "file.safetensors"
    path.write_bytes(content)
    assert "is not a readable safetensors file" in refused({"direction": str(path)})


def test_direction_truncated(refused, direction_file, tmp_path):
    path = tmp_path / "cut.safetensors"
    path.write_bytes(direction_file.read_bytes()[:-100])
    assert "is not a readable safetensors file" in refused({"direction": str(path)})


def test_a_model_is_no_direction(refused, pair):
    assert "is not a direction file" in refused({"direction": str(pair[1] / "model.safetensors")})


def test_direction_of_another_version(refused, changed_file):
    path = changed_file(lambda tensors, metadata: metadata.update(format_version="2"))
    assert "has format version '2'; this axolotl-asft reads '1'" in refused({"direction": path})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_direction_with_non_finite_numbers(refused, changed_file, value):
    def spoil(tensors, metadata):
        tensors["model.layers.1.mlp.up_proj.U"][0, 0] = value

    assert "model.layers.1.mlp.up_proj.U holds NaN or infinity" in refused({"direction": changed_file(spoil)})


def test_direction_sha256(refused, direction_file):
    line = refused({"direction": str(direction_file), "direction_sha256": "0" * 64})
    assert f"expected {'0' * 64}" in line


def test_direction_for_other_shapes(refused, changed_file):
    def widen(tensors, metadata):
        spec = json.loads(metadata["spec"])
        spec["modules"]["model.layers.0.mlp.up_proj"]["shape"] = [256, 64]
        metadata["spec"] = json.dumps(spec)
        name = "model.layers.0.mlp.up_proj.U"
        tensors[name] = torch.cat([tensors[name], torch.zeros_like(tensors[name])])

    line = refused({"direction": changed_file(widen)})
    assert "model.layers.0.mlp.up_proj is (128, 64)" in line
    assert "(256, 64) in the direction" in line


def test_direction_for_another_model(refused, direction_file, tmp_path):
    _, other = make_pair(tmp_path, seed=5)
    line = refused({"direction": str(direction_file)}, base_model=other)
    assert "extracted for another model" in line


def test_the_base_in_place_of_the_aligned_model(refused, pair, direction_file):
    line = refused({"direction": str(direction_file)}, base_model=pair[0])
    assert "base_model has to be the aligned model" in line


def test_lora_layer_without_direction(refused, pair, tmp_path):
    from axolotl_asft import extract_direction

    path = tmp_path / "attention.safetensors"
    extract_direction(*pair, rank=4, modules=["self_attn"]).save(path)
    line = refused({"direction": str(path)}, model_loads=True)
    assert "6 LoRA layers without a direction (first model.layers.0.mlp.gate_proj)" in line


def test_weights_trained_beside_lora(refused, direction_file):
    line = refused({"direction": str(direction_file)}, model_loads=True, lora_modules_to_save=["lm_head"])
    assert "1 trainable weights that are not LoRA layers (first lm_head" in line


FSDP = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_use_dora": True}, "peft_use_dora is not supported by the constraint: DoRA also rescales the rows"),
        (
            {"relora": True, "jagged_restart_steps": 2, "jagged_restart_warmup_steps": 1},
            "relora is not supported by the constraint: it merges the update",
        ),
        ({"deepspeed": {"zero_optimization": {"stage": 3}}}, "DeepSpeed's ZeRO-3 is not supported by the constraint"),
        (
            {"deepspeed": {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}},
            "DeepSpeed's offload_optimizer is not supported by the constraint",
        ),
        ({"deepspeed": {"fp16": {"enabled": True}}}, "fp16 under DeepSpeed is not supported"),
        ({"deepspeed": {"zero_optimization": {}}, "fp16": True}, "fp16 under DeepSpeed is not supported"),
        ({"deepspeed": "nowhere.json"}, "there is no file nowhere.json"),
        ({"fsdp_version": 1, "fsdp_config": FSDP}, "FSDP1 is not supported by the constraint"),
        ({"context_parallel_size": 2}, "context_parallel_size is not supported by the constraint"),
        ({"sequence_parallel_degree": 2}, "sequence_parallel_degree is not supported by the constraint"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size is not supported by the constraint"),
        ({"expert_parallel_size": 2}, "expert_parallel_size is not supported by the constraint"),
        ({"qat": {"activation_dtype": "int8", "weight_dtype": "int4"}}, "qat is not supported by the constraint"),
        ({"qat": {}}, "qat is not supported by the constraint"),
        ({"tensor_parallel_size": "2"}, "tensor_parallel_size is not supported by the constraint"),
        ({"lisa_n_layers": 1, "lisa_step_interval": 2}, "is not supported by the constraint: LISA trains whole layers"),
        ({"fix_untrained_tokens": 1}, "fix_untrained_tokens is not supported by the constraint"),
        ({"reinit_weights": True}, "reinit_weights is not supported by the constraint"),
        ({"peft_layer_replication": [[0, 2], [0, 2]]}, "peft_layer_replication is not supported by the constraint"),
        ({"adapter": None, "load_in_4bit": None}, "adapter is not set; the constraint needs LoRA"),
        ({"adapter": "mora"}, "adapter is mora; the constraint needs LoRA"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_ways_of_training_that_are_not_supported(refused, direction_file, changes, message):
    assert message in refused({"direction": str(direction_file)}, **changes)


@pytest.mark.slow
def test_import_failure_of_our_package(tmp_path, pair, dataset, direction_file):
    """axolotl swallows an ImportError from a plugin; here one of our own modules fails to import."""
    config = write_config(tmp_path, pair[1], dataset, {"direction": str(direction_file)})
    for plugin in ("asft", "axolotl_asft.AsftPlugin"):
        content = yaml.safe_load(config.read_text()) | {"plugins": [plugin]}
        config.write_text(yaml.safe_dump(content))
        result = _train_with_blocked_module(config, "axolotl_asft.penalty")
        assert result.returncode == 1, result.stderr
        assert "asft: axolotl-asft cannot be imported" in result.stderr
        assert MODEL_LOADED not in result.stderr


@pytest.mark.slow
def test_exit_status_through_the_command_line(tmp_path, pair, dataset):
    """The whole way: axolotl train, accelerate launch, its child."""
    config = write_config(tmp_path, pair[1], dataset, {"direction": "nowhere.safetensors"})
    for launcher in ("accelerate", "python"):
        result = train(config, launcher=launcher, check=False)
        assert result.returncode == 1
        assert "asft: no direction file at nowhere.safetensors" in result.stderr
    assert axolotl("preprocess", str(config), cwd=tmp_path, check=False).returncode == 0


def _train_with_blocked_module(config: Path, module: str):
    code = f"import sys; sys.modules[{module!r}] = None; from axolotl.cli.train import do_cli; do_cli({str(config)!r})"
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=config.parent,
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
    )


def test_a_pissa_adapter_is_not_gone_on_from(refused, pair, direction_file, tmp_path):
    """PEFT takes B0 A0 out of the weights again, and then loads what was trained over them: the start is lost."""
    shake(lora_model(pair[1], random_b=False, init_lora_weights="pissa")).save_pretrained(tmp_path / "pissa")
    start = {"lora_model_dir": str(tmp_path / "pissa"), "adapter": "lora", "load_in_4bit": None}
    line = refused({"direction": str(direction_file), "anchor_weight": 0}, model_loads=True, **start)
    assert "removed a part of the weights, and how far it has moved since is not known" in line
