"""What carries the training: several processes, weights in pieces, DeepSpeed, Ray."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from lora_models import lora_model, shake
from safetensors.torch import load_file
from tiny import axolotl, child_environment, deepspeed_config, log_history, write_config

from axolotl_asft.history import read_history

LAMBDA = 0.3
STEPS = 4
# Plain gradient descent, so that weights and not the signs of gradients are compared.
RUN = {
    "optimizer": "sgd",
    "learning_rate": 0.5,
    "max_steps": STEPS,
    "save_strategy": "steps",
    "save_steps": STEPS,
    "max_grad_norm": 100.0,
}


def block(direction_file, **changes):
    return {"direction": str(direction_file), "lambda_reg": LAMBDA, "projector": "subspace", **changes}


def adapter(config):
    return load_file(str(config.parent / "out" / "adapter_model.safetensors"))


def distance(one, other):
    assert one.keys() == other.keys()
    difference = sum(float((one[name] - other[name]).square().sum()) for name in one)
    return (difference / sum(float(weight.square().sum()) for name, weight in one.items() if "lora_B" in name)) ** 0.5


@pytest.fixture(scope="module")
def start(pair, tmp_path_factory):
    """The adapter that every run starts from, since two processes draw other random numbers than one."""
    folder = tmp_path_factory.mktemp("start")
    shake(lora_model(pair[1], random_b=False, r=8, lora_alpha=16)).save_pretrained(folder)
    return {"lora_model_dir": str(folder)}


@pytest.fixture(scope="module")
def one_process(forked_train, pair, dataset, direction_file, start, tmp_path_factory):
    """The run that all others are compared with: a global batch of 8 as 2 micro-batches of 4, on one device."""
    config = write_config(tmp_path_factory.mktemp("one"), pair[1], dataset, block(direction_file), **RUN, **start)
    status, output = forked_train(config)
    assert status == 0, output
    return config


@pytest.fixture(scope="module")
def unconstrained(forked_train, pair, dataset, direction_file, start, tmp_path_factory):
    zero = block(direction_file, lambda_reg=0)
    config = write_config(tmp_path_factory.mktemp("zero"), pair[1], dataset, zero, **RUN, **start)
    assert forked_train(config)[0] == 0
    return config


def two_processes(config, launcher, count, check=True, **environment):
    return axolotl(
        "train",
        str(config),
        "--launcher",
        launcher,
        "--",
        *count,
        cwd=config.parent,
        check=check,
        OMP_NUM_THREADS="1",
        **(environment or {"ACCELERATE_USE_CPU": "true"}),
    )


def two_ranks(worker, *arguments, **environment):
    """What rank 0 of a worker script says in its line of JSON."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    result = subprocess.run(
        [*command, str(Path(__file__).parent / worker), *map(str, arguments)],
        env=child_environment(OMP_NUM_THREADS="1", **environment),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(next(line for line in result.stdout.splitlines() if line.startswith('{"')))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "count", "changes"),
    [
        ("accelerate", ["--multi_gpu", "--num_processes=2"], {}),
        ("torchrun", ["--nproc_per_node=2"], {}),
        ("torchrun", ["--nproc_per_node=2"], {"gradient_checkpointing": True}),
    ],
    ids=["accelerate", "torchrun", "reentrant checkpointing"],
)
def test_ddp_equals_one_process(
    one_process, unconstrained, start, pair, dataset, direction_file, tmp_path, launcher, count, changes
):
    """Two processes with a micro-batch of 4 each: the same global batch of 8, the same weights after 4 steps."""
    plugins = ["asft", "cpu_plugin.CpuPlugin"]
    batch = {"micro_batch_size": 4, "gradient_accumulation_steps": 1}
    options = {**RUN, **start, **batch, **changes, "plugins": plugins}
    config = write_config(tmp_path, pair[1], dataset, block(direction_file), **options)
    result = two_processes(config, launcher, count)
    assert "training on MULTI_CPU" in result.stdout + result.stderr, "not two single processes beside each other"
    # the penalty's part of the weights is much larger than what is allowed for rounding
    assert distance(adapter(one_process), adapter(unconstrained)) > 0.1
    assert distance(adapter(one_process), adapter(config)) < 0.002
    for one, two in zip(log_history(one_process)[:STEPS], log_history(config)[:STEPS], strict=True):
        for key in ("asft/penalty", "asft/drift", "asft/update_norm"):
            assert two[key] == pytest.approx(one[key], rel=2e-3), key
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-3)
    history = read_history(config.parent / "out")
    assert [line["step"] for line in history.lines if "loss" in line] == list(range(1, STEPS + 1)), "one rank writes"
    assert history.header["processes"] == 2
    stamp = json.loads((config.parent / "out" / "adapter_config.json").read_text())["asft"]
    assert stamp["update_norm"] == pytest.approx(log_history(config)[STEPS - 1]["asft/update_norm"], rel=1e-4)


@pytest.mark.slow
def test_the_anchor_under_ddp_equals_one_process(forked_train, start, pair, dataset, anchored_file, tmp_path):
    """The answers of a step are shared out; two processes ask for the same ones as a single one."""
    batches = (
        {"micro_batch_size": 4, "gradient_accumulation_steps": 2},
        {
            "micro_batch_size": 4,
            "gradient_accumulation_steps": 1,
        },
    )
    configs = [
        write_config(
            tmp_path / name, pair[1], dataset, block(anchored_file, lambda_reg=0, anchor_weight=weight),
            **{**RUN, **start, **batch, "plugins": ["asft", "cpu_plugin.CpuPlugin"]},
        )
        for name, weight, batch in (("free", 0, batches[0]), ("one", 2, batches[0]), ("two", 2, batches[1]))
    ]  # fmt: skip
    for config in configs[:2]:
        status, output = forked_train(config)
        assert status == 0, output
    two_processes(configs[2], "torchrun", ["--nproc_per_node=2"])
    free, one, two = (adapter(config) for config in configs)
    assert distance(one, free) > 0.02
    assert distance(one, two) < 0.002
    for line, other in zip(log_history(configs[1])[:STEPS], log_history(configs[2])[:STEPS], strict=True):
        assert other["asft/anchor_kl"] == pytest.approx(line["asft/anchor_kl"], rel=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2], ids=["ZeRO-1", "ZeRO-2"])
def test_deepspeed_equals_one_process(
    one_process, unconstrained, start, pair, dataset, direction_file, tmp_path, stage
):
    """QLoRA by axolotl under ZeRO: the same weights as of one process; then a run that goes on from half way."""
    options = {
        **RUN,
        **start,
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "deepspeed": deepspeed_config(stage),
        "save_steps": STEPS // 2,
        "plugins": ["asft", "deepspeed_on_cpu.DeepSpeedOnCpu"],
    }
    config = write_config(tmp_path / "whole", pair[1], dataset, block(direction_file), **options)
    result = two_processes(config, "torchrun", ["--nproc_per_node=2"], ACCELERATE_USE_CPU="false")
    assert "training on DEEPSPEED" in result.stdout + result.stderr
    assert distance(adapter(one_process), adapter(unconstrained)) > 0.1
    assert distance(adapter(one_process), adapter(config)) < 0.002
    for one, two in zip(log_history(one_process)[:STEPS], log_history(config)[:STEPS], strict=True):
        for key in ("asft/penalty", "asft/drift", "asft/update_norm"):
            assert two[key] == pytest.approx(one[key], rel=2e-3), key
    if stage == 2:
        halfway = {"resume_from_checkpoint": str(tmp_path / "whole" / "out" / f"checkpoint-{STEPS // 2}")}
        rest = write_config(tmp_path / "rest", pair[1], dataset, block(direction_file), **options, **halfway)
        two_processes(rest, "torchrun", ["--nproc_per_node=2"], ACCELERATE_USE_CPU="false")
        assert distance(adapter(config), adapter(rest)) < 1e-6


@pytest.mark.slow
def test_deepspeed_in_python(pair, anchored_file, tmp_path):
    """Without ZeRO, with the anchor and accumulation: the weights of DDP; and no step past the constraint is taken."""
    found = two_ranks("deepspeed_worker.py", *pair, anchored_file, tmp_path)
    assert found["deepspeed"] < 1e-5 < 0.01 < found["constraint"]
    assert "takes a step outside its training_step" in found["past"]


@pytest.mark.slow
def test_a_checkpoint_of_another_constraint_ends_every_process(one_process, pair, dataset, direction_file, tmp_path):
    """The main process looks at it, and says so to the others, on whose disks it need not be."""
    checkpoint = sorted((one_process.parent / "out").glob("checkpoint-*"))[0]
    options = {**RUN, "resume_from_checkpoint": str(checkpoint), "plugins": ["asft", "cpu_plugin.CpuPlugin"]}
    config = write_config(tmp_path, pair[1], dataset, block(direction_file, lambda_reg=7.0), **options)
    result = two_processes(config, "torchrun", ["--nproc_per_node=2"], check=False)
    assert result.returncode != 0
    output = result.stdout + result.stderr
    assert f"{checkpoint} was trained under lambda_reg" in output, output
    assert "and this run asks for 7.0" in output
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("rank", [4, 3])
def test_fsdp2_shards(pair, direction_file, rank):
    """Raw fully_shard on two gloo processes; rank 3 does not divide by two."""
    answer = two_ranks("fsdp2_worker.py", pair[1], direction_file, rank, "0.001")
    assert answer["sharded"]
    assert answer["uneven"] == (rank == 3)
    assert answer["gathered value"] == pytest.approx(answer["value"], rel=1e-6)
    assert answer["gradient"] < 1e-4 < 0.1 < answer["without the penalty"]
    assert answer["weights"] < 1e-4
    assert answer["shortened"][0] == pytest.approx(answer["shortened"][1], rel=1e-4)
    assert answer["shortened"][0] < 0.9
    assert answer["weights within the budget"] < 1e-4
    assert answer["autograd"] < 1e-4
    assert answer["anchor"] < 1e-4 < 0.05 < answer["anchor's part"]
    assert answer["drift"][0] == pytest.approx(answer["drift"][1], rel=1e-6)
    assert 1 < max(answer["groups"]) < sum(answer["groups"]), answer["groups"]
    assert answer["most whole factors"] <= max(answer["groups"]), "the A or the B of one group at a time"


@pytest.mark.slow
def test_ddp_in_python(pair, anchored_file, tmp_path):
    """The main process may save alone, where nobody else comes to a collective; all ranks measure from one start."""
    found = two_ranks("ddp_worker.py", *pair, anchored_file, tmp_path, ACCELERATE_USE_CPU="true")
    assert found["anchored"]["stamp"]["anchor_weight"] == 3
    assert found["niter"]["start"] < 1e-6
    assert found["anchored"]["apart"] == found["niter"]["apart"] == 0
