"""axolotl's other commands with the plugin listed, resuming, and Ray's second look at the config."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from tiny import axolotl, child_environment, log_history, write_config

from axolotl_asft.history import read_history

REVALIDATE = """
import sys
from axolotl.cli.config import gpu_capabilities, load_cfg, plugin_set_cfg, prepare_plugins
from axolotl.utils.config import validate_config
from axolotl.utils.dict import DictDefault
first = load_cfg(sys.argv[1])
sent = first.to_dict()  # what the driver gives to each worker
from axolotl.integrations.base import PluginManager
PluginManager.get_instance().plugins.clear()  # a worker is a process of its own
cfg = DictDefault(sent)
prepare_plugins(cfg)
capabilities, environment = gpu_capabilities()
second = validate_config(cfg, capabilities=capabilities, env_capabilities=environment)
assert second.asft.to_dict() == first.asft.to_dict(), (second.asft, first.asft)
print("BLOCK", second.asft.to_dict())
"""


@pytest.fixture(scope="module")
def trained(forked_train, pair, dataset, direction_file, tmp_path_factory):
    """Four steps, with a checkpoint after two."""
    block = {"direction": str(direction_file), "lambda_reg": 5.0, "projector": "subspace"}
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "val_set_size": 0.25, "eval_steps": 2}
    config = write_config(tmp_path_factory.mktemp("run"), pair[1], dataset, block, **options)
    status, output = forked_train(config)
    assert status == 0, output
    return config


@pytest.mark.slow
def test_resuming_gives_the_same_weights(forked_train, pair, dataset, direction_file, tmp_path):
    block = {"direction": str(direction_file), "lambda_reg": 5.0, "projector": "subspace"}
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = write_config(tmp_path / "whole", pair[1], dataset, block, **options)
    start = str(tmp_path / "whole" / "out" / "checkpoint-2")
    resumed = write_config(tmp_path / "resumed", pair[1], dataset, block, resume_from_checkpoint=start, **options)
    for config in (whole, resumed):
        status, output = forked_train(config)
        assert status == 0, output
    weights = [load_file(str(config.parent / "out" / "adapter_model.safetensors")) for config in (whole, resumed)]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-5, atol=1e-6)
    assert any(weight.abs().max() > 0 for name, weight in weights[0].items() if "lora_B" in name)
    lines = [[line for line in log_history(config) if "loss" in line] for config in (whole, resumed)]
    assert lines[1][-1]["asft/penalty"] == pytest.approx(lines[0][-1]["asft/penalty"], rel=1e-4)
    for config in (whole, resumed):
        history = read_history(config.parent / "out")
        assert [line["step"] for line in history.lines if "loss" in line] == [1, 2, 3, 4]


def test_a_plain_run_is_not_gone_on_from(forked_train, pair, dataset, direction_file, tmp_path):
    """Whoever adds the block to a config that trains into the same folder, and resumes by itself."""
    options = {"save_strategy": "steps", "save_steps": 2, "auto_resume_from_checkpoints": True}
    status, output = forked_train(write_config(tmp_path, pair[1], dataset, None, max_steps=2, **options))
    assert status == 0, output
    before = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    block = {"direction": str(direction_file)}
    status, output = forked_train(write_config(tmp_path, pair[1], dataset, block, max_steps=4, **options))
    assert status == 1, output
    (line,) = [line for line in output.splitlines() if line.startswith("asft: ")] or [output]
    assert "checkpoint-2 was trained without the constraint, and a run that continues from it would pass for a" in line
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == before
    assert "asft" not in json.loads((tmp_path / "out" / "adapter_config.json").read_text())


def test_evaluation_lines_have_the_tasks_numbers_alone(trained):
    lines = [line for line in log_history(trained) if "eval_loss" in line]
    assert lines
    assert not [key for line in lines for key in line if "asft" in key]


@pytest.mark.slow
def test_preprocess(trained, tmp_path):
    """It needs no direction file: the machine that tokenizes need not have it."""
    text = trained.read_text().replace("asft.safetensors", "not-here.safetensors")
    config = tmp_path / "config.yml"
    config.write_text(text.replace("/prepared", "/prepared-again"))
    result = axolotl("preprocess", str(config), cwd=tmp_path)
    assert "layers constrained" not in result.stdout + result.stderr


@pytest.mark.slow
def test_evaluate(trained):
    result = axolotl("evaluate", str(trained), "--launcher", "python", cwd=trained.parent)
    assert "eval_loss" in result.stdout + result.stderr


@pytest.mark.slow
def test_inference(trained):
    command = [sys.executable, "-m", "axolotl.cli.main", "inference", str(trained), "--launcher", "python"]
    command += ["--lora-model-dir", str(trained.parent / "out")]
    options = {"cwd": trained.parent, "env": child_environment(), "capture_output": True, "text": True, "timeout": 300}
    result = subprocess.run(command, input="the cat sees\n", **options)
    output = result.stdout + result.stderr
    assert "Give me an instruction" in output, output[-3000:]
    assert "asft: " not in output


@pytest.mark.slow
def test_ray_workers_keep_the_block(trained, tmp_path):
    """Ray's driver validates the config and sends it to workers, which validate it again."""
    config = tmp_path / "config.yml"
    config.write_text(trained.read_text() + "use_ray: true\nray_num_workers: 1\n")
    result = subprocess.run(
        [sys.executable, "-c", REVALIDATE, str(config)],
        cwd=trained.parent,
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    line = next(line for line in result.stdout.splitlines() if line.startswith("BLOCK"))
    assert "'lambda_reg': 5.0" in line
    assert "'projector': 'subspace'" in line


def test_the_stamp_of_a_checkpoint_is_its_own(trained):
    stamps = [
        json.loads((trained.parent / "out" / name / "adapter_config.json").read_text())["asft"]["update_norm"]
        for name in ("checkpoint-2", "checkpoint-4", ".")
    ]
    assert stamps[0] != stamps[1] == pytest.approx(stamps[2], rel=1e-6)
