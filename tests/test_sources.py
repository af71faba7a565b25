"""What a direction can be made from: pairs of checkpoints whose names differ, and adapters that are the difference."""

import json
import shutil

import pytest
import torch
from checkpoints import copied
from click.testing import CliRunner
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from axolotl_asft import AlignmentDirection, AlignmentPenalty, extract_direction
from axolotl_asft.cli import asft
from axolotl_asft.errors import AsftError
from axolotl_asft.partial import Parts
from axolotl_asft.verify import verify_checkpoint

UP = "model.layers.0.mlp.up_proj"


# ------------------------------------------------------------------------------------ an adapter as the difference
def make_adapter(base, folder, dtype=torch.float32, size=0.03, **changes):
    """A LoRA on a base that moved it by a few percent."""
    settings = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]} | changes
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**settings))
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_B" in name:
                    weight.normal_(0, size)
    model.to(dtype).save_pretrained(folder)
    return folder


def merge(base, adapter, folder, dtype=torch.float32, safe=False):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), adapter)
    model.merge_and_unload(safe_merge=safe).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def lora(pair, tmp_path_factory):
    """A base, an adapter, and the two merged."""
    folder = tmp_path_factory.mktemp("lora")
    adapter = make_adapter(pair[0], folder / "adapter", rank_pattern={"down_proj": 5}, use_rslora=True)
    return pair[0], adapter, merge(pair[0], adapter, folder / "merged")


@pytest.mark.parametrize("side", ["base", "aligned"])
def test_the_same_as_from_the_merged_weights(lora, side):
    base, adapter, merged = lora
    models = {"base": base} if side == "base" else {"aligned": merged}
    found = extract_direction(**models, adapter=adapter, rank=2, dtype="float32", keep_v=True)
    dense = extract_direction(base, merged, rank=2, dtype="float32", keep_v=True)
    assert list(found.modules) == list(dense.modules)
    assert found.spec["relative_norm"] == pytest.approx(dense.spec["relative_norm"], rel=1e-4)
    for name, module in found.modules.items():
        other, entry = dense.modules[name], found.spec["modules"][name]
        if "q_proj" not in name and "down_proj" not in name:
            assert (module.rank, float(module.norm), entry["bound"]) == (0, 0.0, 0.0), "the adapter leaves it alone"
            continue
        assert entry["method"] == "factored"
        torch.testing.assert_close(module.norm, other.norm, rtol=1e-4, atol=0)
        torch.testing.assert_close(module.S, other.S, rtol=1e-4, atol=0)
        torch.testing.assert_close(module.U, other.U, rtol=0, atol=1e-3)
        torch.testing.assert_close(module.V, other.V, rtol=0, atol=1e-3)
        assert entry["bound"] == pytest.approx(dense.spec["modules"][name]["bound"], rel=1e-3)
    side_sha256 = extract_direction(base, merged, rank=1).spec[side]["sha256"]
    assert found.spec[side]["sha256"] == side_sha256
    assert found.spec["adapter"]["layers"] == 4


def test_all_of_it_fits_in_its_own_rank(lora):
    found = extract_direction(aligned=lora[2], adapter=lora[1], rank=64, dtype="float32")
    ranks = {name.rpartition(".")[2]: module.rank for name, module in found.modules.items()}
    assert (ranks["q_proj"], ranks["down_proj"], ranks["up_proj"]) == (3, 5, 0)
    assert all(entry["bound"] < 1e-6 and entry["energy"] > 1 - 1e-6 for entry in found.spec["modules"].values())


@pytest.mark.parametrize(
    ("dtype", "safe"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False), (torch.float16, False)]
)
def test_training_recognises_the_merged_model(pair, lora, tmp_path, dtype, safe):
    """Made from the base and the adapter, before there was a merged model; merged by PEFT afterwards."""
    base, adapter, _ = lora
    if dtype != torch.float32:
        AutoModelForCausalLM.from_pretrained(base, dtype=dtype).save_pretrained(tmp_path / "base")
        base = tmp_path / "base"
    merged = merge(base, adapter, tmp_path / "merged", dtype, safe)
    direction = extract_direction(base, adapter=adapter, rank=4)
    assert verify_checkpoint(direction, str(merged))
    for other in (base, pair[1]):
        with pytest.raises(AsftError, match="extracted for another model"):
            verify_checkpoint(direction, str(other))
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(merged), LoraConfig(r=2, target_modules=["q_proj", "up_proj"])
    )
    assert len(AlignmentPenalty(model, direction).layers) == 4


@pytest.mark.slow
def test_axolotl_merges_to_what_was_foreseen(lora, tmp_path):
    """`axolotl merge-lora` sums in fp32 too, a shard at a time."""
    from axolotl.cli.utils.lora_merge import merge_lora_sharded_efficient

    AutoModelForCausalLM.from_pretrained(lora[0], dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    merge_lora_sharded_efficient(tmp_path / "base", lora[1], tmp_path / "merged")
    direction = extract_direction(tmp_path / "base", adapter=lora[1], rank=4)
    assert verify_checkpoint(direction, str(tmp_path / "merged"))
    with pytest.raises(AsftError, match="extracted for another model"):
        verify_checkpoint(direction, str(tmp_path / "base"))


def test_refused_adapters(pair, lora, tmp_path):
    base, adapter, merged = lora
    with pytest.raises(AsftError, match=r"an adapter is the difference itself; .*not both"):
        extract_direction(base, merged, adapter=adapter)
    with pytest.raises(AsftError, match="not alone"):
        extract_direction(adapter=adapter)
    with pytest.raises(AsftError, match="only the aligned model is given; expected base and aligned, or"):
        extract_direction(aligned=merged)
    with pytest.raises(AsftError, match="only the base is given"):
        extract_direction(base)
    with pytest.raises(AsftError, match="expected the folder of a PEFT adapter"):
        extract_direction(base, adapter=base)
    untrained = make_adapter(base, tmp_path / "untrained", size=0.0)
    with pytest.raises(AsftError, match="have the same weights, so there is no alignment direction"):
        extract_direction(base, adapter=untrained)
    broken = make_adapter(base, tmp_path / "broken", size=float("inf"))
    with pytest.raises(AsftError, match="the adapter holds NaN or infinity"):
        extract_direction(base, adapter=broken)
    trained_whole = make_adapter(base, tmp_path / "whole", modules_to_save=["up_proj"])
    with pytest.raises(AsftError, match=r"also changes .*up_proj.*; give the base and the merged model instead"):
        extract_direction(base, adapter=trained_whole)
    with pytest.raises(AsftError, match="uses DoRA"):
        extract_direction(base, adapter=make_adapter(base, tmp_path / "dora", use_dora=True))
    other = copied(base, tmp_path / "other", lambda tensors: tensors.pop("model.layers.0.self_attn.q_proj.weight"))
    with pytest.raises(AsftError, match=r"has the layer model\.layers\.0\.self_attn\.q_proj, which is not in other"):
        extract_direction(other, adapter=adapter)
    wider = {"model.layers.0.self_attn.q_proj.weight": torch.zeros(64, 128)}
    wider = copied(base, tmp_path / "wider", lambda tensors: tensors.update(wider))
    with pytest.raises(AsftError, match=r"q_proj is \(64, 64\) \(out, in\) in .*adapter and \(64, 128\) in wider"):
        extract_direction(wider, adapter=adapter)


def with_config(adapter, folder, **changes):
    """A copy of an adapter, with another adapter_config.json."""
    shutil.copytree(adapter, folder)
    config = json.loads((adapter / "adapter_config.json").read_text()) | changes
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_the_base_given_for_the_aligned_model(lora, tmp_path):
    """--aligned for --base is one slip; what it made would approve of a training on the base."""
    base, adapter, _ = lora
    with pytest.raises(AsftError, match=r"^base is the base of the adapter .*adapter, not what it was .* as --base$"):
        extract_direction(aligned=base, adapter=adapter)
    again = copied(base, tmp_path / "again")
    with pytest.raises(AsftError, match=r"again is not .*base, the adapter's base, with the adapter merged in: 0% of"):
        extract_direction(aligned=again, adapter=adapter)
    twice = merge(base, with_config(adapter, tmp_path / "doubled", lora_alpha=12), tmp_path / "twice")
    with pytest.raises(AsftError, match=r"twice is not .* merged in: 200% of what it adds is there; give the merged"):
        extract_direction(aligned=twice, adapter=adapter)
    elsewhere = with_config(adapter, tmp_path / "elsewhere", base_model_name_or_path=str(tmp_path / "gone"))
    assert extract_direction(aligned=again, adapter=elsewhere, rank=1), "nothing to hold it against"


def test_another_model_given_for_the_adapter_s_base(pair, lora, tmp_path):
    base, adapter, _ = lora
    with pytest.raises(AsftError, match=r"aligned is not .*base, which the adapter .* was trained on: \d+ of"):
        extract_direction(pair[1], adapter=adapter)
    assert extract_direction(copied(base, tmp_path / "again"), adapter=adapter, rank=1)
    elsewhere = with_config(adapter, tmp_path / "elsewhere", base_model_name_or_path=str(tmp_path / "gone"))
    assert extract_direction(pair[1], adapter=elsewhere, rank=1), "nothing to hold it against"


def test_a_merge_is_known_after_any_rounding(pair, lora, tmp_path):
    """Also one into weights that went through NF4, which is how axolotl merges what QLoRA trained."""
    from axolotl.cli.utils.lora_merge import merge_lora_sharded_efficient

    base, adapter, _ = lora
    merge_lora_sharded_efficient(base, adapter, tmp_path / "nf4", simulate_nf4=True)
    models = [tmp_path / "nf4", merge(base, adapter, tmp_path / "half", torch.float16)]
    models.append(merge(base, adapter, tmp_path / "twice", torch.bfloat16, safe=True))
    for merged in models:
        assert extract_direction(aligned=merged, adapter=adapter, rank=1).spec["aligned"]["id"] == merged.name
    small = make_adapter(base, tmp_path / "small", size=3e-5)  # below what bf16 can hold
    merged = merge(base, small, tmp_path / "lost", torch.bfloat16)
    assert extract_direction(aligned=merged, adapter=small, rank=1)


def test_an_adapter_scaled_otherwise_starts_afresh(lora, tmp_path, monkeypatch, caplog):
    """The same weights under another lora_alpha are another difference: no file holds layers of both."""
    base, adapter, _ = lora
    adapter, output, keep = with_config(adapter, tmp_path / "adapter"), tmp_path / "d.safetensors", Parts.keep

    def stops(self, name, part):
        keep(self, name, part)
        if name.endswith("1.self_attn.q_proj"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Parts, "keep", stops)
        with pytest.raises(KeyboardInterrupt):
            extract_direction(base, adapter=adapter, rank=4, output=output)
    shutil.rmtree(adapter)
    with_config(lora[1], adapter, lora_alpha=60)
    found = extract_direction(base, adapter=adapter, rank=4, output=output)
    assert "is from an extraction that differs in adapter; starting afresh" in caplog.text
    whole = extract_direction(base, adapter=adapter, rank=4)
    assert all(float(found.modules[name].norm) == float(module.norm) for name, module in whole.modules.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha_pattern": ["q_proj"]}, r"alpha_pattern in adapter_config.json is \['q_proj'\]; expected patterns of"),
        ({"alpha_pattern": {"q_proj": "8"}}, "expected patterns of layers with a number each"),
        ({"alpha_pattern": {"q_proj(": 8}}, "expected patterns of layers with a number each"),
        ({"lora_alpha": float("nan")}, "has no number lora_alpha"),
    ],
)
def test_a_damaged_scaling(lora, tmp_path, changes, message):
    with pytest.raises(AsftError, match=message):
        extract_direction(lora[0], adapter=with_config(lora[1], tmp_path / "adapter", **changes))


def test_factors_of_two_ranks(lora, tmp_path):
    adapter = with_config(lora[1], tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    key = next(key for key in tensors if key.endswith("q_proj.lora_B.weight"))
    for rank in (2, 0):
        tensors[key] = tensors[key][:, :rank].contiguous()
        save_file(tensors, adapter / "adapter_model.safetensors")
        with pytest.raises(AsftError, match=f"q_proj has an A of rank 3 and a B of rank {rank}; expected one rank"):
            extract_direction(lora[0], adapter=adapter)


@pytest.mark.parametrize(
    ("recorded", "shown"),
    [
        ("owner/base", "owner/base"), ("owner/base@v1", "owner/base@v1"), ("runs/base:v1", "base:v1"),
        ("runs/more/base", "base"), ("./runs/base", "base"), (None, "unknown"),
    ],
)  # fmt: skip
def test_a_base_model_that_is_only_recorded(lora, tmp_path, recorded, shown):
    """It is not read, so that whatever the adapter calls it will do; and no path of another machine is kept."""
    adapter = with_config(lora[1], tmp_path / "adapter", base_model_name_or_path=recorded)
    direction = extract_direction(aligned=lora[2], adapter=adapter, rank=1)
    assert direction.spec["base"]["id"] == shown


def test_a_head_under_lora_is_no_layer_of_the_decoder(pair, tmp_path):
    adapter = make_adapter(pair[0], tmp_path / "adapter", target_modules=["q_proj", "lm_head"])
    assert extract_direction(pair[0], adapter=adapter, rank=4).spec["adapter"]["layers"] == 2


def test_the_command(lora, tmp_path):
    base, adapter, merged = lora
    output = tmp_path / "d.safetensors"
    command = ["extract", "--adapter", str(adapter), "-o", str(output)]
    made = CliRunner().invoke(asft, [*command, "--aligned", str(merged)])
    assert made.exit_code == 0, made.output
    assert "base          base  (not read: the adapter adapter is the difference)" in made.stdout
    shown = json.loads(CliRunner().invoke(asft, ["inspect", str(output), "--json"]).stdout)
    assert shown["base"]["id"] == "base"
    assert str(tmp_path) not in json.dumps(AlignmentDirection.load(output).spec)
    refused = CliRunner().invoke(asft, [*command, "--base", str(base), "--metric", "fisher", "--force"])
    assert refused.exit_code == 2
    assert refused.stderr == "asft: --metric is taken from the aligned model; merge the adapter and give --aligned\n"


# ---------------------------------------------------------------------------------------------- pairs that differ
def renamed(change):
    def rename(tensors):
        for name in list(tensors):
            tensors[change(name)] = tensors.pop(name)

    return rename


def test_another_vocabulary_padding_and_heads(pair, tmp_path):
    """Embeddings and heads are no linear layers of the decoder: they may differ, or be missing."""

    def larger(tensors):
        tensors["model.embed_tokens.weight"] = torch.randn(96, 64)
        tensors["lm_head.weight"] = torch.randn(128, 64)
        tensors["score.weight"] = torch.randn(1, 64)

    aligned = copied(pair[1], tmp_path / "aligned", larger)
    base = copied(pair[0], tmp_path / "base", lambda tensors: tensors.pop("model.embed_tokens.weight"))
    found, plain = extract_direction(base, aligned, rank=4), extract_direction(*pair, rank=4)
    assert found.spec["aligned"]["sha256"] == plain.spec["aligned"]["sha256"]
    assert all(torch.equal(found.modules[name].U, module.U) for name, module in plain.modules.items())


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model.", ""])
def test_a_wrapper_s_prefix(pair, tmp_path, prefix):
    """`model.layers.0...` against `model.language_model.layers.0...`: named as the aligned model names them."""
    rename = renamed(lambda name: name.replace("model.", prefix, 1))
    bare = lambda config: config.pop("architectures")  # noqa: E731 - so that transformers renames nothing
    plain = extract_direction(*pair, rank=4)
    for base, aligned in (
        (pair[0], copied(pair[1], tmp_path / "aligned", rename, bare)),
        (copied(pair[0], tmp_path / "base", rename, bare), pair[1]),
    ):
        found = extract_direction(base, aligned, rank=4)
        assert len(found.modules) == 14
        for name, module in found.modules.items():
            assert name.startswith("model." if aligned == pair[1] else f"{prefix}layers.")
            other = name if aligned == pair[1] else f"model.{name.removeprefix(prefix)}"
            assert torch.equal(module.U, plain.modules[other].U)


def test_a_vision_tower_that_the_base_lacks(pair, tmp_path):
    def wrapped(tensors):
        renamed(lambda name: name.replace("model.", "model.language_model.", 1))(tensors)
        tensors["model.visual.blocks.0.attn.qkv.weight"] = torch.randn(48, 16)

    aligned = copied(pair[1], tmp_path / "aligned", wrapped, lambda config: config.pop("architectures"))
    with pytest.raises(AsftError, match=r"1 of 15 layers .*the first model\.visual\.blocks.*modules \(--modules\)"):
        extract_direction(pair[0], aligned)
    assert len(extract_direction(pair[0], aligned, rank=2, modules=["language_model"]).modules) == 14


def test_fused_against_split(pair, tmp_path):
    """The error says what stands there instead, and what to do."""

    def fuse(tensors):
        parts = [tensors.pop(f"model.layers.0.self_attn.{part}_proj.weight") for part in "qkv"]
        tensors["model.layers.0.self_attn.qkv_proj.weight"] = torch.cat(parts)

    def experts(tensors):
        tensors["model.layers.0.mlp.experts.gate_up_proj"] = torch.randn(2, 64, 8)
        for part in ("gate", "up", "down"):
            tensors.pop(f"model.layers.0.mlp.{part}_proj.weight")

    for change, there in ((fuse, "model.layers.0.self_attn.qkv_proj"), (experts, "layers.0.mlp.experts.gate_up_proj")):
        base = copied(pair[0], tmp_path / f"base-{change.__name__}", change)
        with pytest.raises(
            AsftError, match=f"3 of 14 layers .*; it has .*{there} there: weights that are fused in one"
        ):
            extract_direction(base, pair[1])
        if change is fuse:
            with pytest.raises(AsftError, match=r"1 of 12 layers of base-fuse are .*; it has .*self_attn\.k_proj"):
                extract_direction(pair[1], base)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes, 4 bit"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes, 8 bit"),
        ({"quant_method": "gptq", "bits": 4}, "gptq, 4 bit"),
        ({"quant_method": "awq", "bits": 4}, "awq, 4 bit"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ("damaged", "an unknown method"),
    ],
)
def test_quantised_checkpoints(pair, tmp_path, settings, words):
    quantised = copied(pair[1], tmp_path / "q", config=lambda config: config.update(quantization_config=settings))
    with pytest.raises(AsftError) as refused:
        extract_direction(pair[0], quantised)
    message = str(refused.value)
    assert f"is a quantised checkpoint ({words})" in message
    assert "give the full-precision model that it was made from" in message
    assert "\n" not in message


def test_quantised_tensors_without_a_word_in_the_config(pair, tmp_path):
    def pack(tensors):
        tensors["model.layers.0.mlp.up_proj.qweight"] = torch.zeros(4, 4, dtype=torch.int32)

    quantised = copied(pair[1], tmp_path / "q", pack)
    with pytest.raises(
        AsftError, match=r"is a quantised checkpoint \(it has model\.layers\.0\.mlp\.up_proj\.qweight\)"
    ):
        extract_direction(pair[0], quantised)


def test_gguf(pair, tmp_path):
    folder = tmp_path / "gguf"
    folder.mkdir()
    (folder / "model-f16.gguf").write_bytes(b"GGUF")
    for location in (folder, folder / "model-f16.gguf"):
        with pytest.raises(
            AsftError, match=r"is GGUF; .*F32, F16 or BF16 .*gguf_file=.model-f16\.gguf.*a quantised one"
        ):
            extract_direction(pair[0], location)


# --------------------------------------------------------------------------------------------- an abliterated copy
def test_an_abliterated_copy_as_the_base(pair, tmp_path):
    """W_base = (I - r r^T) W: d = r r^T W is of rank one, and its direction is r."""
    r = torch.nn.functional.normalize(torch.randn(64, generator=torch.Generator().manual_seed(3)), dim=0)
    writing = ("self_attn.o_proj.weight", "mlp.down_proj.weight")

    def ablate(tensors):
        for name in tensors:
            if name.endswith(writing):
                tensors[name] = tensors[name] - torch.outer(r, r @ tensors[name])

    base = copied(pair[1], tmp_path / "abliterated", ablate)
    direction = extract_direction(base, pair[1], rank=8, dtype="float32")
    aligned = load_file(pair[1] / "model.safetensors")
    for name, module in direction.modules.items():
        if not f"{name}.weight".endswith(writing):
            assert module.rank == 0
            continue
        assert abs(float(module.U[:, 0] @ r)) == pytest.approx(1, abs=1e-5)
        assert float(module.S[0]) == pytest.approx(float((r @ aligned[f"{name}.weight"]).norm()), rel=1e-4)
        assert float(module.S[1]) < 1e-4 * float(module.S[0])
    smallest = extract_direction(base, pair[1], rank=None, energy=0.999, dtype="float32")
    assert {module.rank for module in smallest.modules.values()} == {0, 1}
    assert all(entry["energy"] > 0.999 for entry in smallest.spec["modules"].values())
