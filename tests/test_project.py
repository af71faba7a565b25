"""Safe LoRA's projection against its published formula on dense matrices, and as adapters on disk."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import child_environment, make_pair
from trainers import make_trainer
from transformers import AutoModelForCausalLM

from axolotl_asft import AlignmentDirection, attach, extract_direction
from axolotl_asft.cli import asft
from axolotl_asft.errors import AsftError
from axolotl_asft.project import as_dict, attenuated, project_adapter, projection_cosine, summary_text
from axolotl_asft.saved import PREFIX

F64 = torch.float64


def layer(seed: int, out: int = 12, columns: int = 10, r: int = 3):
    """A, B, and the direction d of one layer."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(*shape, generator=generator, dtype=F64) for shape in ((r, columns), (out, r), (out, columns))
    )


def eigen(d, k):
    U, S, _ = torch.linalg.svd(d, full_matrices=False)
    return U[:, :k], (S**2 / d.norm())[:k]


# --------------------------------------------------------------------------------------------------------- formulas
@pytest.mark.parametrize("seed", range(5))
def test_the_projection_is_the_published_formula(seed):
    """C = d d^T / ||d||_F; W' = C W; the cosine of the flattened matrices."""
    A, B, d = layer(seed)
    C = d @ d.T / d.norm()
    U, c = eigen(d, k=10)
    before, after = B @ A, C @ B @ A
    expected = torch.nn.functional.cosine_similarity(after.reshape(1, -1), before.reshape(1, -1)).item()
    assert projection_cosine(A, B, U, c) == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(attenuated(B, U, c) @ A, after)


@pytest.mark.parametrize("factor", [0.0, 0.3, 1.0])
def test_attenuation_takes_a_part_of_what_is_orthogonal(factor):
    A, B, d = layer(0)
    U, c = eigen(d, k=4)
    C = U @ torch.diag(c) @ U.T
    torch.testing.assert_close(attenuated(B, U, c, factor) @ A, B @ A - factor * (B @ A - C @ B @ A))


def test_a_true_projector_projects_once_and_for_all():
    A, B, d = layer(1)
    U, _ = eigen(d, k=4)
    ones = torch.ones(4, dtype=F64)
    once = attenuated(B, U, ones)
    torch.testing.assert_close(attenuated(once, U, ones), once)
    assert projection_cosine(A, once, U, ones) == pytest.approx(1)


@pytest.mark.parametrize("scale", [1e-6, 1e4])
def test_the_cosine_of_very_small_and_very_large_factors(scale):
    A, B, d = (factor.float() for factor in layer(1))
    U, c = eigen(d, k=4)
    expected = projection_cosine(A, B, U, c)
    assert projection_cosine(scale * A, scale * B, U, 1e-2 * c) == pytest.approx(expected, rel=1e-4)


def test_the_paper_s_c_shrinks_what_it_projects():
    """It is no projector: projecting twice shrinks twice, which is why once matters."""
    A, B, d = layer(2)
    U, c = eigen(0.05 * d, k=10)
    once = attenuated(B, U, c)
    assert attenuated(once, U, c).norm() < 0.5 * once.norm() < 0.25 * B.norm()
    assert not math.isnan(projection_cosine(A, B, U, c))


def test_no_angle_without_an_update():
    A, B, d = layer(3)
    U, c = eigen(d, k=4)
    assert math.isnan(projection_cosine(A, 0 * B, U, c))
    assert math.isnan(projection_cosine(A, B, U[:, :0], c[:0]))


# ------------------------------------------------------------------------------------------------- adapters on disk
@pytest.fixture(scope="module")
def full_direction(pair, tmp_path_factory):
    """All directions in fp32, so that U diag(c) U^T is d d^T / ||d||_F."""
    path = tmp_path_factory.mktemp("full") / "full.safetensors"
    extract_direction(*pair, rank="full", dtype="float32").save(path)
    return path, AlignmentDirection.load(path)


@pytest.fixture(scope="module")
def trained(pair, full_direction, tmp_path_factory):
    """The output_dir of a run under the constraint, with its card and report; and what the run was asked for."""
    folder = tmp_path_factory.mktemp("run") / "out"
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8], "attention_mask": [1] * 4}] * 8
    trainer = make_trainer(pair, rows, folder, max_steps=1)
    constraint = attach(trainer, full_direction[1], 1.0, max_drift=None)
    trainer.train()
    folder.joinpath("README.md").write_text("---\nbase_model: x\n---\n# Card\n\n![Mine](mine.png)\n")
    for name in ("asft_report.html", "asft_report_training.png"):
        (folder / name).write_text("x")
    trainer.save_model()
    return folder, constraint


def make_adapter(pair, folder, dtype=torch.float32, **changes):
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False} | changes
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(pair[1]), LoraConfig(**settings))
    model.to(dtype).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(pair, tmp_path_factory):
    return make_adapter(pair, tmp_path_factory.mktemp("trained") / "adapter")


def dense(pair, adapter):
    """What the authors' way computes, name -> (d d^T / ||d||_F, B A, its cosine), in fp64, and the pairs (A, B)."""
    base, aligned = (load_file(str(folder / "model.safetensors")) for folder in pair)
    tensors = load_file(str(adapter / "adapter_model.safetensors"))
    found = {}
    for key in tensors:
        if key.endswith(".lora_A.weight"):
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            d = aligned[f"{name}.weight"].double() - base[f"{name}.weight"].double()
            C = d @ d.T / d.norm()
            update = tensors[key.replace("lora_A", "lora_B")].double() @ tensors[key].double()
            cosine = torch.nn.functional.cosine_similarity((C @ update).reshape(1, -1), update.reshape(1, -1))
            found[name] = C, update, float(cosine)
    return found


def updates(adapter):
    tensors = load_file(str(adapter / "adapter_model.safetensors"))
    return {
        key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): tensors[
            key.replace("lora_A", "lora_B")
        ].double()
        @ tensors[key].double()
        for key in tensors
        if key.endswith(".lora_A.weight")
    }


def test_a_threshold_projects_the_layers_below_it(pair, adapter, full_direction, tmp_path):
    expected = dense(pair, adapter)
    cosines = sorted(cosine for _, _, cosine in expected.values())
    threshold = (cosines[4] + cosines[5]) / 2
    report = project_adapter(adapter, full_direction[1], tmp_path / "out", threshold=threshold)
    assert report.projected == 5
    written = updates(tmp_path / "out")
    for row in report.layers:
        C, update, cosine = expected[row.name]
        assert row.cosine == pytest.approx(cosine, rel=1e-3)
        assert row.projected == (cosine <= threshold)
        torch.testing.assert_close(written[row.name], C @ update if row.projected else update, rtol=1e-3, atol=1e-7)
        assert row.norm_before == pytest.approx(2 * float(update.norm()), rel=1e-4)
        assert row.norm_after == pytest.approx(2 * float(written[row.name].norm()), rel=1e-4)


@pytest.mark.parametrize("count", [1, 3, 14])
def test_a_number_projects_so_many_and_once(pair, adapter, full_direction, tmp_path, count):
    expected = dense(pair, adapter)
    smallest = sorted(expected, key=lambda name: expected[name][2])[:count]
    report = project_adapter(adapter, full_direction[1], tmp_path / "out", layers=count)
    assert {row.name for row in report.layers if row.projected} == set(smallest)
    written = updates(tmp_path / "out")
    for name in smallest:
        C, update, _ = expected[name]
        torch.testing.assert_close(written[name], C @ update, rtol=1e-3, atol=1e-7)


def test_layers_that_did_not_train_are_left_out(adapter, full_direction, tmp_path):
    """PEFT saves what was frozen, B = 0: of a tower of images its layers, without a direction, and its convolution."""
    folder = shutil.copytree(adapter, tmp_path / "frozen")
    tensors = load_file(str(folder / "adapter_model.safetensors"))
    trained = [key for key in sorted(tensors) if key.endswith("lora_B.weight")]
    for key in trained[:4]:
        tensors[key].zero_()
    tower = f"{PREFIX}model.visual"
    for name, A, B in (("proj", (4, 8), (8, 4)), ("patch_embed.proj", (4, 3, 2, 4, 4), (8, 4, 1, 1, 1))):
        tensors |= {f"{tower}.{name}.lora_A.weight": torch.ones(A), f"{tower}.{name}.lora_B.weight": torch.zeros(B)}
    save_file(tensors, str(folder / "adapter_model.safetensors"), {"format": "pt"})
    report = project_adapter(folder, full_direction[1], tmp_path / "out", layers=6)
    assert len(report.layers) == len(trained) - 4
    assert report.settings["uncovered"] == 0
    assert all(row.norm_after < row.norm_before for row in report.layers if row.projected)
    assert set(load_file(str(tmp_path / "out" / "adapter_model.safetensors"))) == set(tensors)
    for key in trained:
        tensors[key].zero_()
    save_file(tensors, str(folder / "adapter_model.safetensors"), {"format": "pt"})
    with pytest.raises(AsftError, match="B A is 0 in every layer, so there is nothing to project"):
        project_adapter(folder, full_direction[1], tmp_path / "nothing", layers=6)


def test_attenuation_of_all_layers(adapter, full_direction, tmp_path):
    direction = full_direction[1]
    none = project_adapter(adapter, direction, tmp_path / "none", attenuate=0.0)
    half = project_adapter(adapter, direction, tmp_path / "half", attenuate=0.5, projector="subspace", rank=4)
    assert none.projected == half.projected == 14
    before, same, halved = updates(adapter), updates(tmp_path / "none"), updates(tmp_path / "half")
    for name, update in before.items():
        torch.testing.assert_close(same[name], update)
        U = direction.modules[name].U[:, :4].double()
        inside = U @ (U.T @ update)
        torch.testing.assert_close(halved[name], inside + 0.5 * (update - inside), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_is_an_adapter(pair, full_direction, tmp_path, dtype):
    folder = make_adapter(pair, tmp_path / "in", dtype)
    (folder / "README.md").write_text("---\nbase_model: x\n---\n# Card\n")
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "optimizer.pt").write_bytes(b"x")
    report = project_adapter(folder, full_direction[1], tmp_path / "out", layers=14)
    before, after = (load_file(str(f / "adapter_model.safetensors")) for f in (folder, tmp_path / "out"))
    assert {k: (v.dtype, v.shape) for k, v in after.items()} == {k: (v.dtype, v.shape) for k, v in before.items()}
    assert all(torch.equal(before[key], after[key]) for key in before if "lora_A" in key)
    stamp = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["asft_projection"]
    assert (stamp["projected"], stamp["layers"], stamp["direction_sha256"]) == (14, 14, full_direction[1].sha256)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "## Projection after training" in card
    assert "- safe-lora" in card
    assert (tmp_path / "out" / "tokenizer_config.json").exists()
    assert not (tmp_path / "out" / "optimizer.pt").exists()
    model = AutoModelForCausalLM.from_pretrained(pair[1])
    merged = PeftModel.from_pretrained(model, tmp_path / "out").merge_and_unload().state_dict()
    original = load_file(str(pair[1] / "model.safetensors"))
    for row in report.layers:
        change = merged[f"{row.name}.weight"].double() - original[f"{row.name}.weight"].double()
        torch.testing.assert_close(change, 2 * updates(tmp_path / "out")[row.name], rtol=1e-2, atol=1e-5)


def test_what_the_training_measured_is_not_said_of_the_projected(trained, full_direction, tmp_path):
    """The run's settings stay in stamp and card; its numbers, history, report and picture do not."""
    folder, constraint = trained
    before = json.loads((folder / "adapter_config.json").read_text())["asft"]
    assert set(before) > set(constraint.settings())
    assert "asft_report_training.png" in (folder / "README.md").read_text()
    project_adapter(folder, full_direction[1], tmp_path / "out", attenuate=1.0)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["asft"] == constraint.settings()
    card = (tmp_path / "out" / "README.md").read_text()
    for text in ("## Safety constraint", "- direction: `", "- `lambda_reg`: 1,", "The constraint makes", "![Mine]"):
        assert text in card
    assert "at the end" not in card
    assert "asft_report" not in card
    assert not list((tmp_path / "out").glob("asft*"))
    assert (folder / "asft_history.jsonl").is_file()


def test_evaluations_of_the_old_adapter_are_not_copied(adapter, full_direction, tmp_path):
    shutil.copytree(adapter, tmp_path / "in")
    measured = (
        "eval.json", "eval_results.json", "results.json", "results.md", "all_results.json", "train_results.json",
        "asft-eval.json", "landscape.json", "landscape.png",
    )  # fmt: skip
    for name in (*measured, "special_tokens_map.json"):
        (tmp_path / "in" / name).write_text("{}")
    project_adapter(tmp_path / "in", full_direction[1], tmp_path / "out", layers=1)
    assert (tmp_path / "out" / "special_tokens_map.json").is_file()
    assert not [name for name in measured if (tmp_path / "out" / name).exists()]


def test_it_says_how_much_of_the_direction_it_projects_on(adapter, full_direction, tmp_path):
    direction = full_direction[1]
    whole = project_adapter(adapter, direction, tmp_path / "whole", layers=1)
    assert whole.settings["energy"] == 1.0
    assert "of ||d||^2" not in summary_text(whole)
    part = project_adapter(adapter, direction, tmp_path / "part", layers=1, rank=1)
    shares = sorted(
        float(m.S[0].double() ** 2 / m.S.double().square().sum())
        for m in (direction.modules[x.name] for x in part.layers)
    )
    middle = (shares[len(shares) // 2] + shares[(len(shares) - 1) // 2]) / 2
    assert part.settings["energy"] == pytest.approx(middle, abs=2e-3)
    assert f"{part.settings['energy']:.0%} of ||d||^2 in the median layer" in summary_text(part)
    left = summary_text(replace(part, uncovered=["lm_head"]))
    assert "in the median layer" in left
    assert "not covered, left as they are: 1 (lm_head)" in left


def test_what_is_not_finite_is_null_for_programs(adapter, full_direction, tmp_path):
    report = project_adapter(adapter, full_direction[1], tmp_path / "out", layers=1)
    broken = replace(report.layers[0], cosine=math.nan, norm_before=math.inf, norm_after=math.nan)
    (layer,) = as_dict(replace(report, layers=(broken,)))["layers"]
    assert (layer["cosine"], layer["norm_before"], layer["norm_after"]) == (None, None, None)
    assert layer["name"] == broken.name


def test_it_says_whether_the_direction_was_compared(adapter, full_direction, tmp_path):
    """A base model on the Hub is not read for that."""
    shutil.copytree(adapter, tmp_path / "in")
    report = project_adapter(tmp_path / "in", full_direction[1], tmp_path / "near", layers=1)
    assert as_dict(report)["settings"]["verified"]
    assert "not compared" not in summary_text(report)
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": "me/chat"}
    (tmp_path / "in" / "adapter_config.json").write_text(json.dumps(config))
    report = project_adapter(tmp_path / "in", full_direction[1], tmp_path / "far", layers=1)
    assert not as_dict(report)["settings"]["verified"]
    said = "the direction was not compared with the base model's weights"
    assert f"{said} (they have to be in a local folder)\n" in summary_text(report)
    report = project_adapter(adapter, full_direction[1], tmp_path / "unasked", layers=1, verify_model=False)
    assert not report.settings["verified"]
    assert f"{said}\n" in summary_text(report)


@pytest.mark.parametrize("initialisation", ["corda", "lora_ga", "mica", "unheard_of"])
def test_an_initialisation_that_is_not_known_is_refused(adapter, full_direction, tmp_path, initialisation):
    """CorDA and LoRA-GA take a part out of the weight, too: their B A is not the change."""
    shutil.copytree(adapter, tmp_path / "in")
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"init_lora_weights": initialisation}
    (tmp_path / "in" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AsftError, match=f"initialised by '{initialisation}', so that B A need not be the change"):
        project_adapter(tmp_path / "in", full_direction[1], tmp_path / "out", layers=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing says which layers"),
        ({"threshold": 0.3, "layers": 2}, "both --threshold and --layers"),
        ({"threshold": 1.5}, "expected a cosine"),
        ({"layers": 0}, "expected 1 or more"),
        ({"layers": 15}, "has 14 layers"),
        ({"attenuate": -0.1}, "expected 0"),
        ({"attenuate": 1, "projector": "none"}, "expected one of paper"),
        ({"attenuate": 1, "rank": 0}, "would erase"),
        ({"attenuate": 1, "on_uncovered": "maybe"}, "expected one of error, warn, ignore"),
    ],
)
def test_settings_out_of_range_are_refused(adapter, full_direction, tmp_path, options, message):
    with pytest.raises(AsftError, match=message):
        project_adapter(adapter, full_direction[1], tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_other_adapters_are_refused(pair, full_direction, tmp_path):
    direction = full_direction[1]

    def attempt(folder, **options):
        return project_adapter(folder, direction, tmp_path / "out", attenuate=1.0, **options)

    with pytest.raises(AsftError, match=r"there is no folder .*nothing; expected the folder of"):
        attempt(tmp_path / "nothing")
    with pytest.raises(AsftError, match="uses DoRA"):
        attempt(make_adapter(pair, tmp_path / "dora", use_dora=True, init_lora_weights=True))
    with pytest.raises(AsftError, match="'pissa'"):
        attempt(make_adapter(pair, tmp_path / "pissa", init_lora_weights="pissa"))
    other = make_adapter(pair, tmp_path / "head", target_modules=["q_proj", "lm_head"])
    with pytest.raises(AsftError, match=r"1 of 3 layers have no direction \(lm_head\).* or --on-uncovered ignore"):
        attempt(other)
    report = attempt(other, on_uncovered="ignore")
    assert (report.projected, "lm_head" in report.uncovered) == (2, True)
    alone = make_adapter(pair, tmp_path / "alone", target_modules=["lm_head"])
    with pytest.raises(AsftError, match=r"1 of 1 layers have no direction .*; use the direction of the adapter's mo"):
        attempt(alone, on_uncovered="ignore", force=True)
    with pytest.raises(AsftError, match=r"/embeddings holds no LoRA of a linear layer, so there is nothing to pr"):
        attempt(make_adapter(pair, tmp_path / "embeddings", target_modules=["embed_tokens"]), force=True)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("adapter_config.json", b'{"peft_type": "LORA", ', "cannot be read as JSON"),
        ("adapter_config.json", b"[" * 100_000, "cannot be read as JSON"),
        ("adapter_config.json", b"[]", "holds no JSON object"),
        ("adapter_config.json", b"{}", "has no number lora_alpha"),
        ("adapter_model.safetensors", b"\x00" * 4, "is not a readable PEFT adapter"),
    ],
)
def test_torn_adapters_are_refused(adapter, full_direction, tmp_path, name, content, message):
    shutil.copytree(adapter, tmp_path / "torn")
    (tmp_path / "torn" / name).write_bytes(content)
    with pytest.raises(AsftError, match=message) as error:
        project_adapter(tmp_path / "torn", full_direction[1], tmp_path / "out", attenuate=1.0)
    assert "\n" not in str(error.value)


UNCOVERED = {
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, r"1 tensors are neither A nor B \(lm_head.weight\)"),
    "lora_bias": ({"lora_bias": True}, r"14 tensors are neither A nor B \(.*down_proj.lora_B.bias, .*, \.\.\.\)"),
    "embeddings": ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens.lora_embedding_A"),
    "trainable tokens": ({"trainable_token_indices": [4, 5]}, "1 tensors are neither A nor B .*trainable_tokens_delta"),
}


@pytest.mark.parametrize("kind", UNCOVERED)
def test_what_is_no_pair_of_factors_is_refused_or_counted(pair, full_direction, tmp_path, caplog, kind):
    changes, message = UNCOVERED[kind]
    folder = make_adapter(pair, tmp_path / "in", **changes)
    with pytest.raises(AsftError, match=message):
        project_adapter(folder, full_direction[1], tmp_path / "out", attenuate=1.0)
    assert not (tmp_path / "out").exists()
    report = project_adapter(folder, full_direction[1], tmp_path / "out", attenuate=1.0, on_uncovered="warn")
    assert re.search(message, caplog.text)
    before, after = (load_file(str(f / "adapter_model.safetensors")) for f in (folder, tmp_path / "out"))
    assert len(report.uncovered) == len(before) - 2 * len(report.layers) > 0
    assert all(torch.equal(before[PREFIX + name], after[PREFIX + name]) for name in report.uncovered)
    assert as_dict(report)["uncovered"] == list(report.uncovered)
    assert as_dict(report)["settings"]["uncovered"] == len(report.uncovered)
    assert f"left as they are: {len(report.uncovered)} ({report.uncovered[0]}" in summary_text(report)


def test_an_adapter_of_factors_alone_has_nothing_uncovered(adapter, full_direction, tmp_path):
    report = project_adapter(adapter, full_direction[1], tmp_path / "out", attenuate=1.0)
    assert (report.uncovered, report.settings["uncovered"]) == ((), 0)
    assert "left as they are" not in summary_text(report)


def test_a_direction_of_other_weights_is_refused(pair, adapter, tmp_path):
    """The shapes fit, the weights do not: with the adapter's base model at hand that is seen."""
    make_pair(tmp_path, seed=5)
    other = extract_direction(tmp_path / "base", tmp_path / "aligned", rank=4)
    with pytest.raises(AsftError, match="extracted for another model"):
        project_adapter(adapter, other, tmp_path / "out", layers=2)
    swapped = extract_direction(pair[1], pair[0], rank=4)
    with pytest.raises(AsftError, match="extracted for another model"):
        project_adapter(adapter, swapped, tmp_path / "out", layers=2)
    assert not (tmp_path / "out").exists()
    assert project_adapter(adapter, other, tmp_path / "out", layers=2, verify_model=False).projected == 2


def test_an_output_is_not_overwritten_by_accident(adapter, full_direction, tmp_path):
    output = tmp_path / "out"
    project_adapter(adapter, full_direction[1], output, layers=1)
    with pytest.raises(AsftError, match="exists; give another --output, or --force"):
        project_adapter(adapter, full_direction[1], output, layers=2)
    assert project_adapter(adapter, full_direction[1], output, layers=2, force=True).projected == 2
    with pytest.raises(AsftError, match="is the adapter itself"):
        project_adapter(adapter, full_direction[1], adapter, layers=2, force=True)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("x")
    with pytest.raises(AsftError, match="holds no adapter"):
        project_adapter(adapter, full_direction[1], tmp_path / "precious", layers=2, force=True)
    with pytest.raises(AsftError, match="holds no adapter"):
        project_adapter(adapter, full_direction[1], tmp_path / "precious" / "thesis.txt", layers=2, force=True)
    with pytest.raises(AsftError, match="nothing can be written to /proc/nothing"):
        project_adapter(adapter, full_direction[1], "/proc/nothing/out", layers=2)


def test_what_is_read_and_what_is_written_do_not_lie_in_each_other(adapter, full_direction, tmp_path):
    """A checkpoint projected over its training would take all checkpoints away, and itself."""
    training = tmp_path / "training"
    shutil.copytree(adapter, training)
    shutil.copytree(adapter, training / "checkpoint-10")
    before = sorted(training.rglob("*"))

    def refused(message, source, output):
        for force in (True, False):
            with pytest.raises(AsftError, match=message):
                project_adapter(source, full_direction[1], output, layers=2, force=force)
        assert sorted(training.rglob("*")) == before

    refused("checkpoint-10 lies inside .*training; give another", training / "checkpoint-10", training)
    refused("out lies inside the adapter's folder .*training; give another", training, training / "out")
    (tmp_path / "link").symlink_to(training)
    refused("checkpoint-10 lies inside .*link; give another", training / "checkpoint-10", tmp_path / "link")
    refused("is the adapter itself", training, tmp_path / "link")


@pytest.mark.parametrize(
    ("extra", "ours", "replaced"),
    [
        ("tokenizer.json", False, True),
        ("asft_history.jsonl", False, False),
        ("asft_history.jsonl", True, True),
        ("checkpoint-10", False, False),
        ("checkpoint-10", True, False),
    ],
)
def test_force_deletes_an_adapter_and_nothing_else(adapter, full_direction, tmp_path, extra, ours, replaced):
    """One that was written here may hold what its source had beside it; neither holds folders."""
    output = tmp_path / "out"
    if ours:
        project_adapter(adapter, full_direction[1], output, layers=1)
    else:
        shutil.copytree(adapter, output)
    if extra == "checkpoint-10":
        (output / extra).mkdir()
    else:
        (output / extra).write_text("x")
    if replaced:
        project_adapter(adapter, full_direction[1], output, layers=2, force=True)
        assert json.loads((output / "adapter_config.json").read_text())["asft_projection"]["layers"] == 2
    else:
        with pytest.raises(AsftError, match=f"holds {extra}, which is not part of an adapter.*give another --output"):
            project_adapter(adapter, full_direction[1], output, layers=2, force=True)
    assert (output / extra).exists() != replaced
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_replacing_leaves_the_old_or_the_new(adapter, full_direction, tmp_path, monkeypatch):
    """The old goes aside, the new comes; where that fails, the old comes back."""
    output, rename, seen = tmp_path / "out", os.rename, []
    project_adapter(adapter, full_direction[1], output, layers=1)

    def failing(source, target):
        seen.append([path for path in tmp_path.iterdir() if (path / "adapter_config.json").is_file()])
        if len(seen) == 2:
            raise OSError("the disk is gone")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="the disk is gone"):
        project_adapter(adapter, full_direction[1], output, layers=2, force=True)
    assert [len(folders) for folders in seen] == [2, 2, 2], "the old, aside or in its place, and the new"
    assert json.loads((output / "adapter_config.json").read_text())["asft_projection"]["layers"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_link_stays_a_link(adapter, full_direction, tmp_path):
    project_adapter(adapter, full_direction[1], tmp_path / "out", layers=1)
    (tmp_path / "link").symlink_to(tmp_path / "out")
    project_adapter(adapter, full_direction[1], tmp_path / "link", layers=2, force=True)
    assert (tmp_path / "link").is_symlink()
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["asft_projection"]["layers"] == 2


def test_the_command(adapter, full_direction, tmp_path):
    arguments = ["project", "--adapter", str(adapter), "--direction", str(full_direction[0]), "-o"]
    result = CliRunner().invoke(asft, [*arguments, str(tmp_path / "a"), "--layers", "3"])
    assert result.exit_code == 0, result.output
    assert "projected 3 of 14 layers" in result.stdout
    result = CliRunner().invoke(asft, [*arguments, str(tmp_path / "b"), "--threshold", "1", "--json"])
    content = json.loads(result.stdout)
    assert sum(row["projected"] for row in content["layers"]) == 14
    result = CliRunner().invoke(asft, [*arguments, str(tmp_path / "b"), "--threshold", "1"])
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)


def test_an_error_is_all_that_stands_on_the_terminal(adapter, tmp_path):
    """In a process of its own: importing PEFT has other libraries write about the machine."""
    command = [sys.executable, "-m", "axolotl_asft", "project", "--adapter", str(adapter), "--layers", "2"]
    command += ["--direction", str(tmp_path / "nothing.safetensors"), "-o", str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, env=child_environment())
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1), result.stderr
    assert result.stderr.startswith("asft: no direction file at ")
