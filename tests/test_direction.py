"""The direction file: round trip, golden header, and every refusal."""

import json
import pickle
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from axolotl_asft import AlignmentDirection
from axolotl_asft.direction import ModuleDirection, select_modules
from axolotl_asft.errors import AsftError

UP = "model.layers.0.mlp.up_proj"


@pytest.fixture
def changed(direction_file, tmp_path):
    """The direction file with a change to (tensors, metadata, spec)."""

    def make(change):
        with safe_open(str(direction_file), "pt") as file:
            tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
        spec = json.loads(metadata["spec"])
        change(tensors, metadata, spec)
        if "spec" in metadata and not metadata["spec"].startswith("!"):
            metadata["spec"] = json.dumps(spec)
        path = tmp_path / "changed.safetensors"
        save_file(tensors, str(path), metadata=metadata)
        return path

    return make


def test_round_trip_is_byte_exact(direction_file, tmp_path):
    direction = AlignmentDirection.load(direction_file)
    sha256 = direction.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == direction_file.read_bytes()
    assert sha256 == direction.sha256
    assert list(tmp_path.iterdir()) == [tmp_path / "again.safetensors"], "no temporary files stay"


def test_golden_header(direction_file):
    """The format is fixed: other people's files depend on it."""
    with direction_file.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    metadata = header.pop("__metadata__")
    assert (metadata["format"], metadata["format_version"]) == ("asft-direction", "1")
    assert set(metadata) == {"format", "format_version", "spec"}
    assert {key: (entry["dtype"], entry["shape"]) for key, entry in header.items() if UP in key} == {
        f"{UP}.U": ("BF16", [128, 8]),
        f"{UP}.S": ("F32", [8]),
        f"{UP}.norm": ("F32", []),
    }
    spec = json.loads(metadata["spec"])
    assert {"base", "aligned", "rank", "svd", "modules", "tool", "created"} <= set(spec)
    assert set(spec["modules"][UP]) == {"shape", "k", "energy", "bound", "method"}
    assert {"id", "revision", "sha256", "read_as"} <= set(spec["base"])
    assert set(spec["aligned"]["fingerprint"]["blocks"]) == set(spec["modules"])
    assert len(header) == 3 * 14


def test_v_is_optional(pair, tmp_path):
    from axolotl_asft import extract_direction

    extract_direction(*pair, rank=4, modules=["q_proj"], keep_v=True).save(tmp_path / "v.safetensors")
    module = AlignmentDirection.load(tmp_path / "v.safetensors").modules["model.layers.0.self_attn.q_proj"]
    assert module.V.shape == (64, 4)


def test_missing_file(tmp_path):
    with pytest.raises(
        AsftError, match=r"no direction file at .*nothing.safetensors \(seen from .*expected a .safeten"
    ):
        AlignmentDirection.load(tmp_path / "nothing.safetensors")


@pytest.mark.parametrize(
    "content", [b"", b"short", pickle.dumps({"U": [1, 2]}), b"PK\x03\x04" + bytes(100), b"\xff" * 64]
)
def test_not_safetensors(tmp_path, content):
    path = tmp_path / "file.safetensors"
    path.write_bytes(content)
    with pytest.raises(AsftError, match="is not a readable safetensors file"):
        AlignmentDirection.load(path)


def test_truncated(direction_file, tmp_path):
    path = tmp_path / "cut.safetensors"
    content = direction_file.read_bytes()
    for size in (len(content) - 1, len(content) // 2, 100):
        path.write_bytes(content[:size])
        with pytest.raises(AsftError, match="is not a readable safetensors file"):
            AlignmentDirection.load(path)


def test_another_hash(direction_file):
    with pytest.raises(AsftError, match="expected 0000"):
        AlignmentDirection.load(direction_file, sha256="0" * 64)
    sha256 = AlignmentDirection.load(direction_file).sha256
    assert AlignmentDirection.load(direction_file, sha256=sha256.upper()).sha256 == sha256


def _set(tensor, index, value):
    tensor[index] = value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m, s: m.pop("format"), "is not a direction file: its format is None"),
        (lambda t, m, s: m.update(format_version="2"), "has format version '2'; this axolotl-asft reads '1'"),
        (lambda t, m, s: m.pop("spec"), "its spec is not JSON"),
        (lambda t, m, s: m.update(spec="!{"), "its spec is not JSON"),
        (lambda t, m, s: s.pop("aligned"), "its spec lacks aligned"),
        (lambda t, m, s: s.update(modules={}), "its spec names no modules"),
        (lambda t, m, s: s.update(base={}), "its spec names no base model"),
        (lambda t, m, s: s["modules"][UP].pop("bound"), f"its spec for {UP} lacks bound"),
        (lambda t, m, s: s["modules"][UP].update(energy="all"), "has energy 'all'; expected a number"),
        (lambda t, m, s: s["modules"][UP].update(k=-1), "and k -1; expected"),
        (
            lambda t, m, s: s["modules"][UP].update(k=4),
            r"\.S has shape \(8,\); expected \(4,\)|\.U has shape \(128, 8\)",
        ),
        (lambda t, m, s: s["modules"][UP].update(shape=[64, 64]), r"\.U has shape \(128, 8\); expected \(64, 8\)"),
        (lambda t, m, s: t.pop(f"{UP}.U"), rf"lacks the tensor {UP}\.U"),
        (lambda t, m, s: t.pop(f"{UP}.norm"), rf"lacks the tensor {UP}\.norm"),
        (lambda t, m, s: t.update(extra=torch.ones(1)), "has a tensor extra that its spec does not name"),
        (lambda t, m, s: _set(t[f"{UP}.U"], (3, 2), float("nan")), r"U holds NaN or infinity"),
        (lambda t, m, s: _set(t[f"{UP}.S"], 0, float("inf")), r"S holds NaN or infinity"),
        (lambda t, m, s: t.update({f"{UP}.U": t[f"{UP}.U"] * 1.5}), "are not orthonormal"),
        (
            lambda t, m, s: t.update({f"{UP}.U": t[f"{UP}.U"].to(torch.int8)}),
            "dtype I8; expected one of F32, BF16, F16",
        ),
        (lambda t, m, s: t.update({f"{UP}.U": t[f"{UP}.U"].to(torch.float8_e4m3fn)}), "dtype F8_E4M3; expected one of"),
        (lambda t, m, s: s["aligned"].update(id="a\x1b[2Kb"), r"control characters in 'a\\x1b\[2Kb'"),
        (lambda t, m, s: s["base"].update(revision="main\n"), "control characters in"),
        (lambda t, m, s: s.update(tool="\x9b31m"), "control characters in"),
        (lambda t, m, s: s.update(created="\ud800"), "control characters in"),
        (lambda t, m, s: s.update(metrics={"fisher": {"answers": "\x07"}}), "control characters in"),
        (lambda t, m, s: s["modules"].update({"x\r": s["modules"][UP]}), "control characters in"),
        (lambda t, m, s: t.update({"\x1b[2K": torch.ones(1)}), r"has a tensor \\x1b\[2K that its spec does not name"),
        (lambda t, m, s: t.update({f"{UP}.S": t[f"{UP}.S"].flip(0).contiguous()}), "is not descending"),
        (lambda t, m, s: t.update({f"{UP}.norm": t[f"{UP}.norm"] * 0.1}), "less than the norm of its singular values"),
    ],
)
def test_refused(changed, change, message):
    with pytest.raises(AsftError, match=message) as refused:
        AlignmentDirection.load(changed(change))
    assert "\n" not in str(refused.value)
    assert "axolotl asft extract" in str(refused.value)


def test_a_failed_save_leaves_the_old_file(direction_file, tmp_path):
    path = tmp_path / "kept.safetensors"
    path.write_bytes(direction_file.read_bytes())
    direction = AlignmentDirection.load(path)
    unwritable = {**direction.modules, "bad": ModuleDirection(torch.ones(2, 1), None, torch.ones(()), 2)}
    with pytest.raises(AttributeError):
        AlignmentDirection(unwritable, direction.spec).save(path)
    with pytest.raises(ValueError, match="JSON"):
        AlignmentDirection(direction.modules, {**direction.spec, "x": float("nan")}).save(path)
    assert path.read_bytes() == direction_file.read_bytes()
    assert list(tmp_path.iterdir()) == [path]


def test_select_modules():
    names = ["a.q_proj", "a.k_proj", "b.q_proj"]
    assert select_modules(names, ["q_proj"]) == ["a.q_proj", "b.q_proj"]
    with pytest.raises(AsftError, match="matches none of 3 layers"):
        select_modules(names, ["v_proj"])
    with pytest.raises(AsftError, match="not a regular expression"):
        select_modules(names, ["("])


def test_the_recommended_block_is_one():
    import yaml

    from axolotl_asft.args import parse_block
    from axolotl_asft.summary import recommended

    spec = {"metrics": {"fisher": {}}, "own_answers": [["a", "b"]]}
    block = parse_block({"direction": "d", **yaml.safe_load(recommended(spec))})
    assert (block.metric, block.lambda_reg, block.anchor_weight) == ("fisher", 0.1, 3)
    assert recommended({"metrics": {"fisher": {}}}) == recommended({}) == ""


def test_own_answers_keep_their_newlines(direction_file, tmp_path):
    direction = AlignmentDirection.load(direction_file)
    spec = {**direction.spec, "own_answers": [["<|user|>\nask\t", "no\n\n"]]}
    AlignmentDirection(direction.modules, spec).save(tmp_path / "kept.safetensors")
    assert AlignmentDirection.load(tmp_path / "kept.safetensors").spec["own_answers"] == spec["own_answers"]


def test_what_inspect_says_of_a_hollow_file(direction_file, tmp_path):
    """How many of the kept answers decline, and in how many layers a metric holds anything."""
    from click.testing import CliRunner

    from axolotl_asft.cli import asft
    from axolotl_asft.direction import Metric

    direction = AlignmentDirection.load(direction_file)
    fillings = [(torch.ones, 1), (torch.zeros, 1), (torch.ones, 0)]  # all other layers have no metric at all
    modules, entries = dict(direction.modules), dict(direction.spec["modules"])
    for (fill, m), (name, module) in zip(fillings, direction.modules.items(), strict=False):
        metric = Metric(fill(module.in_features, m), torch.ones(()), torch.ones(module.shape[0], 1))
        modules[name] = replace(module, metrics={"fisher": metric})
        entries[name] = {**entries[name], "metrics": {"fisher": {"inputs": m, "outputs": 1}}}
    answers = [
        ["a", "I'm sorry, but I can't help with that."],
        ["b", "Sure, here is a red house."],
        ["c", "I cannot do that."],
    ]
    spec = {**direction.spec, "modules": entries, "metrics": {"fisher": {"answers": 2}}, "own_answers": answers}
    path = tmp_path / "hollow.safetensors"
    AlignmentDirection(modules, spec).save(path)
    table = CliRunner().invoke(asft, ["inspect", str(path), "--no-modules"]).stdout
    assert "metrics       weights, fisher in 1 of 14 layers (from 2 answers)\n" in table
    assert "own answers   3, of which 2 decline; for anchor_weight\n" in table
    found = json.loads(CliRunner().invoke(asft, ["inspect", str(path), "--json"]).stdout)
    assert (found["own_answers_declining"], found["metrics"]["fisher"]["layers"]) == (2, 1)
    assert found["own_answers"] == answers
