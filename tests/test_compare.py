"""`axolotl asft diff`: two directions against each other."""

import json
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from tiny import make_pair
from transformers import AutoModelForCausalLM

from axolotl_asft import AlignmentDirection, extract_direction
from axolotl_asft.cli import asft
from axolotl_asft.compare import compare, comparison_text
from axolotl_asft.errors import AsftError


@pytest.fixture(scope="module")
def direction(pair):
    return extract_direction(*pair, rank=6, dtype="float32")


def turned(direction, angle):
    """Each of the k directions turned by `angle` out of their span, singular values as they are."""
    modules = {}
    for name, module in direction.modules.items():
        U = torch.linalg.qr(torch.cat([module.U.double(), torch.eye(len(module.U), dtype=torch.float64)], dim=1))[0]
        k = module.rank
        U = U[:, :k] * torch.cos(angle) + U[:, k : 2 * k] * torch.sin(angle)
        modules[name] = replace(module, U=U.float())
    return AlignmentDirection(modules, direction.spec)


def test_a_direction_and_itself(direction):
    result = compare(direction, direction)
    assert result["overlap"] == pytest.approx(1, abs=1e-5)
    assert result["cosine"] == pytest.approx(1, abs=1e-5)
    assert result["same_aligned_weights"]
    assert max(module["largest_angle"] for module in result["modules"]) < 0.1


def test_no_more_than_the_same(pair, direction):
    """U is stored in bf16, and rounded columns are not orthonormal: that is no part of the comparison."""
    rounded = extract_direction(*pair, rank=6)
    for other, within in ((rounded, 1e-12), (direction, 1e-4)):
        result = compare(rounded, other)
        for found in (result, *result["modules"]):
            for number in ("cosine", "overlap"):
                assert found[number] <= 1
                assert found[number] == pytest.approx(1, abs=within)


@pytest.mark.parametrize("degrees", [10.0, 60.0, 90.0])
def test_a_known_angle(direction, degrees):
    angle = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    result = compare(direction, turned(direction, angle))
    expected = float(torch.cos(angle) ** 2)
    assert result["overlap"] == pytest.approx(expected, abs=1e-4)
    assert result["cosine"] == pytest.approx(expected, abs=1e-4)
    for module in result["modules"]:
        assert module["largest_angle"] == pytest.approx(degrees, abs=0.2)


def test_against_dense_projectors(direction, tmp_path):
    other = extract_direction(*make_pair(tmp_path, seed=5), rank=3, dtype="float32")
    result = compare(direction, other)
    assert not result["same_aligned_weights"]
    for module in result["modules"]:
        a, b = direction.modules[module["name"]], other.modules[module["name"]]
        P, Q = (m.U.double() @ m.U.double().T for m in (a, b))
        assert module["overlap"] == pytest.approx(float((P * Q).sum()) / 3, rel=1e-4)
        C, D = (m.U.double() @ torch.diag(m.S.double() ** 2) @ m.U.double().T for m in (a, b))
        assert module["cosine"] == pytest.approx(float((C * D).sum() / (C.norm() * D.norm())), rel=1e-4)


def without_fingerprint(direction):
    aligned = {key: value for key, value in direction.spec["aligned"].items() if key != "fingerprint"}
    return AlignmentDirection(direction.modules, direction.spec | {"aligned": aligned})


def test_one_model_is_known_by_the_layers_that_both_files_hold(pair, direction, tmp_path):
    """Their sha256 are of the layers that each was made from, and differ."""
    attention = extract_direction(*pair, rank=3, modules=["self_attn"])
    result = compare(direction, attention)
    assert direction.spec["aligned"]["sha256"] != attention.spec["aligned"]["sha256"]
    assert (result["shared"], result["same_aligned_weights"]) == (8, True)
    assert "aligned  the same weights\n" in comparison_text(result, modules=False)
    other = extract_direction(*make_pair(tmp_path, seed=5), rank=3, modules=["self_attn"])
    assert compare(direction, other)["same_aligned_weights"] is False
    for files in ((direction, without_fingerprint(attention)), (without_fingerprint(direction), attention)):
        result = compare(*files)
        assert result["same_aligned_weights"] is None
        assert "aligned  not known" in comparison_text(result, modules=False)


def test_a_rounded_copy_is_the_same_model(pair, direction, tmp_path):
    for folder in pair:
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(tmp_path / folder.name)
    rounded = extract_direction(tmp_path / "base", tmp_path / "aligned", rank=3)
    assert compare(direction, rounded)["same_aligned_weights"]
    assert compare(rounded, direction)["same_aligned_weights"]


def test_a_pair_the_wrong_way_round(pair, direction):
    swapped = extract_direction(*pair[::-1], rank=6, dtype="float32")
    result = compare(direction, swapped)
    assert result["reverse"]
    assert "in one of them --base and --aligned were swapped." in comparison_text(result, modules=False)
    unread = AlignmentDirection(
        direction.modules, direction.spec | {s: {"id": "a", "sha256": None} for s in ("base", "aligned")}
    )
    for files in ((direction, direction), (direction, unread), (unread, unread)):
        assert not compare(*files)["reverse"]
        assert "swapped" not in comparison_text(compare(*files), modules=False)


def test_nothing_shared(direction):
    renamed = AlignmentDirection({f"x.{name}": m for name, m in direction.modules.items()}, direction.spec)
    with pytest.raises(AsftError, match="the files share no layer"):
        compare(direction, renamed)


def test_the_command(direction, direction_file, tmp_path):
    direction.save(tmp_path / "other.safetensors")
    arguments = ["diff", str(direction_file), str(tmp_path / "other.safetensors")]
    text = CliRunner().invoke(asft, arguments).stdout
    assert "layers   14 shared, 0 in the first alone, 0 in the second alone" in text
    assert "model.layers.1.mlp.down_proj" in text
    assert "aligned  the same weights" in text
    result = json.loads(CliRunner().invoke(asft, [*arguments, "--json"]).stdout)
    assert result["overlap"] == pytest.approx(1, abs=1e-2)
    same = CliRunner().invoke(asft, ["diff", str(direction_file), str(direction_file), "--no-modules"]).stdout
    assert "The files are the same, byte by byte." in same
