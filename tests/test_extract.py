"""Two checkpoints in, one direction out."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import copied, write_wide_checkpoint
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tiny import make_pair

from axolotl_asft import AlignmentDirection, extract_direction
from axolotl_asft.checkpoint import Checkpoint
from axolotl_asft.cli import asft
from axolotl_asft.errors import AsftError
from axolotl_asft.verify import verify_checkpoint


def assert_same(one: AlignmentDirection, other: AlignmentDirection) -> None:
    assert list(one.modules) == list(other.modules)
    for name, module in one.modules.items():
        assert torch.equal(module.U, other.modules[name].U), name
        assert torch.equal(module.S, other.modules[name].S), name


def test_against_the_dense_difference(pair):
    direction = extract_direction(*pair, rank="full", dtype="float32", keep_v=True)
    base, aligned = (load_file(str(folder / "model.safetensors")) for folder in pair)
    assert len(direction.modules) == 14
    for name, module in direction.modules.items():
        d = aligned[f"{name}.weight"].float() - base[f"{name}.weight"].float()
        torch.testing.assert_close(module.U @ torch.diag(module.S) @ module.V.T, d, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(module.norm, torch.linalg.matrix_norm(d))


def test_modules_are_those_of_the_training_model(pair):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(pair[1])
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)} - {"lm_head"}
    assert set(extract_direction(*pair, rank=2).modules) == linear


def test_shards_and_a_single_file_agree(pair, tmp_path):
    sharded = make_pair(tmp_path, max_shard_size="60KB")
    assert len(list(sharded[0].glob("*.safetensors"))) > 2
    assert_same(extract_direction(*pair, rank=4), extract_direction(*sharded, rank=4))


def test_bfloat16_is_subtracted_in_float32(tmp_path):
    pair = make_pair(tmp_path, dtype=torch.bfloat16)
    name = "model.layers.1.mlp.down_proj"
    direction = extract_direction(*pair, rank=1, modules=[name])
    base, aligned = (load_file(str(folder / "model.safetensors"))[f"{name}.weight"] for folder in pair)
    exact = torch.linalg.matrix_norm(aligned.float() - base.float())
    assert float(direction.modules[name].norm) == pytest.approx(float(exact), rel=1e-6)
    assert float(torch.linalg.matrix_norm((aligned - base).float())) != pytest.approx(float(exact), rel=1e-6)


def test_same_inputs_and_seed_give_the_same_file(pair, tmp_path):
    files = []
    for i in range(2):
        direction = extract_direction(*pair, rank=4)
        direction.spec["created"] = "then"
        direction.save(tmp_path / f"{i}.safetensors")
        files.append((tmp_path / f"{i}.safetensors").read_bytes())
    assert files[0] == files[1]


def test_rank_by_energy(pair):
    direction = extract_direction(*pair, rank=None, energy=0.5, max_rank=3, dtype="float32")
    assert direction.spec["rank"] == {"rule": "energy", "energy": 0.5, "max_rank": 3}
    assert {module.rank for module in direction.modules.values()} <= {1, 2, 3}
    for name, module in direction.modules.items():
        assert direction.spec["modules"][name]["energy"] >= 0.5 or module.rank == 3
    for options, message in (
        ({"rank": 4, "energy": 0.5}, "energy and max_rank go with rank None"),
        ({"rank": None, "energy": 1.5}, "energy is 1.5; expected a share"),
        ({"rank": None, "max_rank": 0}, "max_rank is 0"),
    ):
        with pytest.raises(AsftError, match=message):
            extract_direction(*pair, **options)


def test_rank_by_tolerance(pair):
    direction = extract_direction(*pair, rank=None, tolerance=0.002, dtype="float32")
    assert all(entry["bound"] <= 0.002 for entry in direction.spec["modules"].values())
    assert {entry["k"] for entry in direction.spec["modules"].values()} <= set(range(1, 8))


def test_transposed_checkpoints_are_turned(tmp_path):
    """GPT-2 keeps (in, out); a direction is always (out, in)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=2))
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.01 * torch.randn_like(weight)
    model.save_pretrained(tmp_path / "aligned")
    direction = extract_direction(tmp_path / "base", tmp_path / "aligned", rank=2)
    shapes = {name.split(".", 3)[-1]: module.shape for name, module in direction.modules.items()}
    assert shapes["attn.c_attn"] == (96, 32)
    checkpoint = Checkpoint.open(tmp_path / "aligned")
    name = next(name for name in direction.modules if name.endswith("attn.c_proj"))
    weight = checkpoint.weight(name)
    assert torch.equal(checkpoint.values(name, 70, 50), weight.reshape(-1)[70:120])


def test_a_few_values_are_read_without_a_look_at_the_other_tensors(pair):
    """A mixture of experts has thousands of tensors, each of which is asked for its block."""

    class LookedUp(dict):
        def items(self):
            raise AssertionError("all tensors were gone through")

    checkpoint = Checkpoint.open(pair[1])
    name = "model.layers.0.mlp.up_proj"
    expected = checkpoint.weight(name).reshape(-1)[70:134]
    assert torch.equal(replace(checkpoint, tensors=LookedUp(checkpoint.tensors)).values(name, 70, 64), expected)


def test_refused_pairs(pair, tmp_path):
    base, aligned = pair
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(AsftError, match=r"no checkpoint folder at .*nowhere"):
        extract_direction(tmp_path / "nowhere", aligned)
    with pytest.raises(AsftError, match=r"no checkpoint folder at name; .*give owner/name of a model on the Hub"):
        extract_direction("name", aligned)
    with pytest.raises(AsftError, match="is a file; expected the checkpoint folder"):
        extract_direction(base / "model.safetensors", aligned)
    with pytest.raises(AsftError, match="have the same weights, so there is no alignment direction"):
        extract_direction(aligned, aligned)
    lacking = copied(base, tmp_path / "lacking", lambda tensors: tensors.pop(name))
    with pytest.raises(AsftError, match=r"1 of 14 layers of aligned are not in lacking, the first model\.layers\.0"):
        extract_direction(lacking, aligned)
    wider = copied(base, tmp_path / "wider", lambda tensors: tensors.update({name: torch.zeros(256, 64)}))
    with pytest.raises(AsftError, match=r"up_proj is \(128, 64\) in aligned and \(256, 64\) in wider"):
        extract_direction(wider, aligned)
    broken = copied(base, tmp_path / "broken", lambda tensors: tensors[name].fill_(float("nan")))
    with pytest.raises(AsftError, match="up_proj: the difference holds NaN or infinity"):
        extract_direction(broken, aligned)
    integers = copied(base, tmp_path / "int", lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    with pytest.raises(AsftError, match=r"up_proj\.weight is I8; expected one of"):
        extract_direction(integers, aligned)
    stranger = copied(base, tmp_path / "stranger", lambda tensors: tensors[name].mul_(500))
    with pytest.raises(AsftError, match="check that they belong together"):
        extract_direction(stranger, aligned)
    quantized = copied(base, tmp_path / "quantized", config=lambda config: config.update(quantization_config={"a": 1}))
    with pytest.raises(AsftError, match="is a quantised checkpoint"):
        extract_direction(quantized, aligned)
    with pytest.raises(AsftError, match="rank is 0"):
        extract_direction(base, aligned, rank=0)
    with pytest.raises(AsftError, match="rank is True; expected a positive number"):
        extract_direction(base, aligned, rank=True)
    with pytest.raises(AsftError, match="device is 'tpu'; expected cpu, cuda, or one GPU or more like cuda:0,cuda:1"):
        extract_direction(base, aligned, device="tpu")
    with pytest.raises(AsftError, match="dtype is 'int8'"):
        extract_direction(base, aligned, dtype="int8")


@pytest.mark.parametrize(
    ("turns", "message"),
    [([("x" * 10_001, "No.")], "10,000 characters at most"), ([("a", "b")] * 513, "513 own_answers; expected 512")],
)
def test_answers_that_no_file_takes_are_refused_at_once(pair, tmp_path, turns, message):
    output = tmp_path / "direction.safetensors"
    with pytest.raises(AsftError, match=rf"the direction file would have .*{message}"):
        extract_direction(*pair, rank=4, output=output, own_answers=turns)
    assert not list(tmp_path.iterdir())


def test_a_quantised_checkpoint_is_left_to_the_loaded_weights(pair, direction_file, tmp_path):
    folder = copied(pair[1], tmp_path / "float8")
    file = folder / "model.safetensors"
    tensors = load_file(str(file))
    save_file({k: v.to(torch.float8_e4m3fn) if v.ndim == 2 else v for k, v in tensors.items()}, str(file))
    assert verify_checkpoint(AlignmentDirection.load(direction_file), str(folder)) is False


def test_a_large_difference_is_told(pair, tmp_path, caplog):
    """A few percent is what alignment does; a model of another origin differs by far more, and passes below 100 %."""
    generator = torch.Generator().manual_seed(0)

    def blur(tensors):
        for name, weight in tensors.items():
            if ".layers." in name and weight.ndim == 2:
                weight += 0.6 * weight.std() * torch.randn(weight.shape, generator=generator)

    extract_direction(*pair, rank=2)
    assert not caplog.messages
    extract_direction(copied(pair[0], tmp_path / "relative", blur), pair[1], rank=2)
    assert len(caplog.messages) == 1
    assert re.fullmatch(
        r"relative and aligned differ by 6\d% of the weights' norm; a base and its aligned model differ by a few "
        "percent; check that they belong together",
        caplog.messages[0],
    )


def test_an_output_that_is_a_folder(pair, tmp_path):
    """Said before the work, which --force would lose as well."""
    output = tmp_path / "d.safetensors"
    output.mkdir()
    with pytest.raises(AsftError, match="is a folder; expected the name of a file"):
        extract_direction(*pair, rank=2, output=output)
    arguments = ["extract", "--base", str(pair[0]), "--aligned", str(pair[1]), "-o", str(output), "--force"]
    refused = CliRunner().invoke(asft, arguments)
    assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
    assert refused.stderr == f"asft: {output} is a folder; expected the name of a file, give another --output\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rank", "auto", "--tolerance", "0"], "tolerance is 0.0; expected a positive number"),
        (["--energy", "0.5"], "--energy goes with --rank auto, but the rank is 64; add --rank auto"),
        (["--device", "cpu,foo"], "device is 'cpu,foo'; expected cpu, cuda, or one GPU or more like cuda:0,cuda:1"),
    ],
)
def test_options_are_judged_before_the_model_is_asked(pair, tmp_path, options, message):
    """There are no such prompts: whatever asks the model says that first."""
    arguments = ["extract", "--base", str(pair[0]), "--aligned", str(pair[1]), "-o", str(tmp_path / "d.safetensors")]
    arguments += ["--metric", "fisher", "--prompts", str(tmp_path / "no-prompts.txt")]
    refused = CliRunner().invoke(asft, [*arguments, *options])
    assert (refused.exit_code, refused.stderr) == (2, f"asft: {message}\n")


def test_the_home_folder_is_one_place_for_reading_and_writing(pair, tmp_path, monkeypatch):
    """Shells leave `~` as it is after `=`, and Python does everywhere."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    found = extract_direction(*pair, rank=4, output="~/python.safetensors")
    found.save("~/saved.safetensors")
    arguments = ["extract", "--base", str(pair[0]), "--aligned", str(pair[1]), "--rank", "4"]
    assert CliRunner().invoke(asft, [*arguments, "--output=~/shell.safetensors"]).exit_code == 0
    names = ["python", "saved", "shell"]
    assert len({AlignmentDirection.load(f"~/{name}.safetensors").sha256 for name in names[:2]}) == 1
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.safetensors" for name in names}


def test_refused_folders(pair, tmp_path):
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(AsftError, match="holds pickled weights"):
        Checkpoint.open(pickled)
    (tmp_path / "empty").mkdir()
    with pytest.raises(AsftError, match=r"holds no model\.safetensors"):
        Checkpoint.open(tmp_path / "empty")
    shards = make_pair(tmp_path / "shards", max_shard_size="60KB")[0]
    missing = sorted(shards.glob("*.safetensors"))[0]
    missing.unlink()
    with pytest.raises(AsftError, match=f"lacks 1 of its .* shards, the first {missing.name}"):
        Checkpoint.open(shards)
    cut = copied(pair[0], tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((pair[0] / "model.safetensors").read_bytes()[:-10])
    with pytest.raises(AsftError, match="is not a readable safetensors file"):
        Checkpoint.open(cut)


def test_before_the_model_is_loaded(pair, direction_file, tmp_path):
    direction = AlignmentDirection.load(direction_file)
    verify_checkpoint(direction, str(pair[1]))
    verify_checkpoint(direction, "owner/on-the-hub")
    for other in (pair[0], make_pair(tmp_path, seed=3)[1]):
        with pytest.raises(AsftError, match="extracted for another model"):
            verify_checkpoint(direction, str(other))


def test_the_command(pair, tmp_path):
    output = tmp_path / "d.safetensors"
    arguments = ["extract", "--base", str(pair[0]), "--aligned", str(pair[1]), "-o", str(output), "--rank", "4"]
    result = CliRunner().invoke(asft, [*arguments, "--modules", "self_attn", "--json"])
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert len(printed["modules"]) == 8
    assert printed["sha256"] == AlignmentDirection.load(output).sha256
    again = CliRunner().invoke(asft, arguments)
    assert again.exit_code == 2
    assert again.stderr == f"asft: {output} exists; give another --output, or --force to replace it\n"
    assert "Use it:" in CliRunner().invoke(asft, [*arguments, "--force"]).stdout
    for wrong in (["--rank", "0"], ["--rank", "many"], ["--dtype", "int8"]):
        assert CliRunner().invoke(asft, [*arguments, *wrong]).exit_code == 2
    inspected = CliRunner().invoke(asft, ["inspect", str(output)])
    assert "14, 4 directions each" in inspected.stdout
    assert inspected.stdout.count("self_attn.q_proj") == 2
    assert CliRunner().invoke(asft, ["inspect", str(tmp_path / "none.safetensors")]).exit_code == 2


# Not getrusage: what that tells of a child is at least what this process holds.
PEAK = """
import re, sys
from axolotl_asft import extract_direction
extract_direction(sys.argv[1], sys.argv[2], rank=4, output=sys.argv[3] if len(sys.argv) > 3 else None)
print(1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]))
"""


def test_a_stale_index_beside_a_single_file_is_passed_over(pair, tmp_path):
    """transformers takes the single file first, and so do we: the direction is that of the weights that train."""
    folder = copied(pair[1], tmp_path / "both", lambda tensors: None)
    stale = {name: torch.zeros_like(weight) for name, weight in load_file(folder / "model.safetensors").items()}
    save_file(stale, str(folder / "old.safetensors"))
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(stale, "old.safetensors")})
    )
    assert Checkpoint.open(folder).weight("model.layers.0.mlp.up_proj").any()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for the peak")
def test_memory_does_not_grow_with_the_model(tmp_path):
    """Neither with the checkpoints nor, written to a file, with the result."""
    peaks = {}
    for layers in (3, 24):
        pair = [write_wide_checkpoint(tmp_path / str(layers) / str(seed), layers, seed) for seed in (0, 1)]
        for output in ([], [str(tmp_path / f"{layers}.safetensors")]):
            command = [sys.executable, "-c", PEAK, *map(str, pair), *output]
            # pages of mapped files count too, and go when the kernel likes; what is kept is kept every time
            tries = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(3)]
            peaks[layers, bool(output)] = min(int(done.stdout) for done in tries)
    # 21 more layers are 168 MB more of checkpoints, 21 pairs
    assert peaks[24, False] - peaks[3, False] < 24e6, peaks
    assert peaks[24, True] - peaks[3, True] < 24e6, peaks


def test_a_model_s_weights_are_not_replaced(pair, tmp_path):
    folder = copied(pair[1], tmp_path / "aligned")
    file = folder / "model.safetensors"
    before = file.read_bytes()
    command = ["extract", "--base", str(pair[0]), "--aligned", str(folder), "--rank", "4", "--force", "-o", str(file)]
    result = CliRunner().invoke(asft, command)
    assert result.exit_code == 2
    assert "holds other tensors, perhaps a model's, and is not replaced" in result.output
    assert file.read_bytes() == before
