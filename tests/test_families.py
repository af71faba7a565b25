"""Model families, as tiny random models of the real classes: a direction extracted from saved checkpoints finds
every LoRA layer of the loaded model by name, and the penalty is that of the dense change."""

import copy
import importlib.util
import json

import pytest
import torch
import transformers
from checkpoints import copied
from lora_models import literal_formula_of, shake
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import OWN_ANSWERS, make_tokenizer

from axolotl_asft import AlignmentPenalty, extract_direction
from axolotl_asft.anchor import AnswerAnchor
from axolotl_asft.checkpoint import Checkpoint
from axolotl_asft.errors import AsftError
from axolotl_asft.quiet import without_noise

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
HEADS = {**SMALL, "head_dim": 8}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
NEOX = {key: value for key, value in SMALL.items() if key != "num_key_value_heads"}
FALCON = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {
    "depth": 1,
    "hidden_size": 16,
    "embed_dim": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 4,
    "fullatt_block_indexes": [0],
}
QWEN2_VISION = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4}
SIGLIP = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}

# family -> (configuration class, its arguments, model class, LoRA targets, layers under LoRA)
FAMILIES = {
    "Llama": ("LlamaConfig", SMALL, "LlamaForCausalLM", "all-linear", 14),
    "Qwen2": ("Qwen2Config", SMALL, "Qwen2ForCausalLM", "all-linear", 14),
    "Qwen3": ("Qwen3Config", HEADS, "Qwen3ForCausalLM", "all-linear", 14),
    "Mistral": ("MistralConfig", SMALL, "MistralForCausalLM", "all-linear", 14),
    "Gemma 2": ("Gemma2Config", HEADS, "Gemma2ForCausalLM", "all-linear", 14),
    "Gemma 3 (text)": ("Gemma3TextConfig", HEADS, "Gemma3ForCausalLM", "all-linear", 14),
    "Phi-3 (fused qkv)": ("Phi3Config", SMALL, "Phi3ForCausalLM", "all-linear", 8),
    "Mixtral (attention)": ("MixtralConfig", {**SMALL, **EXPERTS}, "MixtralForCausalLM", ATTENTION, 8),
    "Qwen3-MoE (attention)": ("Qwen3MoeConfig", {**HEADS, **EXPERTS}, "Qwen3MoeForCausalLM", ATTENTION, 8),
    "GPT-2 (Conv1D)": ("GPT2Config", GPT2, "GPT2LMHeadModel", ["c_attn", "c_proj", "c_fc"], 8),
    "GPT-NeoX (fused qkv)": ("GPTNeoXConfig", NEOX, "GPTNeoXForCausalLM", "all-linear", 8),
    "Falcon (fused qkv)": ("FalconConfig", FALCON, "FalconForCausalLM", "all-linear", 8),
    "SmolLM3": ("SmolLM3Config", SMALL, "SmolLM3ForCausalLM", "all-linear", 14),
    "Qwen2.5-VL (text tower)": (
        "Qwen2_5_VLConfig",
        {"text_config": {**SMALL, "rope_parameters": MROPE}, "vision_config": VISION},
        "Qwen2_5_VLForConditionalGeneration",
        r".*language_model.*\.(q|k|v|o|gate|up|down)_proj",
        14,
    ),
    "Qwen2-VL (text tower)": (
        "Qwen2VLConfig",
        {"text_config": {**SMALL, "rope_parameters": MROPE}, "vision_config": QWEN2_VISION},
        "Qwen2VLForConditionalGeneration",
        r".*language_model.*\.(q|k|v|o|gate|up|down)_proj",
        14,
    ),
    "Gemma 3 (vision, text tower)": (
        "Gemma3Config",
        {"text_config": HEADS, "vision_config": SIGLIP, "mm_tokens_per_image": 4},
        "Gemma3ForConditionalGeneration",
        r".*language_model.*\.(q|k|v|o|gate|up|down)_proj",
        14,
    ),
}


def make_family(folder, family):
    """Base and aligned checkpoints of a tiny model of this family, as save_pretrained writes them."""
    config_class, arguments, model_class, targets, layers = FAMILIES[family]
    config = getattr(transformers, config_class)(**copy.deepcopy(arguments))
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(config).float()
    model.save_pretrained(folder / "base")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight += 0.01 * torch.randn(weight.shape, generator=generator)
    model.save_pretrained(folder / "aligned")
    return getattr(transformers, model_class), targets, layers


@pytest.mark.parametrize("family", FAMILIES)
def test_every_lora_layer_finds_its_direction(family, tmp_path):
    model_class, targets, layers = make_family(tmp_path, family)
    direction = extract_direction(tmp_path / "base", tmp_path / "aligned", rank="full", dtype="float32")
    base, aligned = (model_class.from_pretrained(tmp_path / name, dtype=torch.float32) for name in ("base", "aligned"))
    weights = [{name: weight.detach().clone() for name, weight in m.named_parameters()} for m in (base, aligned)]
    fan = family.startswith("GPT-2")
    model = get_peft_model(
        aligned, LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=targets, fan_in_fan_out=fan)
    )
    penalty = AlignmentPenalty(shake(model), direction)
    assert len(penalty.layers) == layers == len([n for n, _ in model.named_modules() if n.endswith(".lora_A")])
    expected = literal_formula_of(model, *weights, transposed=fan)
    assert penalty().item() == pytest.approx(4 * expected.item(), rel=1e-4)
    anchor = AnswerAnchor(make_tokenizer(), OWN_ANSWERS)
    anchor.remember(model)
    with without_noise(model):
        loss = anchor.loss(model, 0)
        assert 1e-6 < float(loss) < 10
        loss.backward()
    assert all(layer.B.grad.any() for layer in penalty.layers), "texts alone reach every layer"
    wrong = get_peft_model(
        model_class.from_pretrained(tmp_path / "base", dtype=torch.float32),
        LoraConfig(r=4, target_modules=targets, fan_in_fan_out=fan),
    )
    with pytest.raises(AsftError, match="extracted for another model"):
        AlignmentPenalty(wrong, direction)


def test_a_checkpoint_without_the_prefix_of_its_head(tmp_path):
    """GPT-2 on the Hub: `h.0.attn.c_attn.weight`, which the model calls `transformer.h.0.attn.c_attn.weight`."""
    make_family(tmp_path, "GPT-2 (Conv1D)")
    for name in ("base", "aligned"):
        file = tmp_path / name / "model.safetensors"
        stored = {key.removeprefix("transformer."): weight for key, weight in load_file(file).items()}
        assert "h.0.attn.c_attn.weight" in stored
        save_file(stored, file, metadata={"format": "pt"})
    direction = extract_direction(tmp_path / "base", tmp_path / "aligned", rank=4)
    assert "transformer.h.0.attn.c_attn" in direction.modules
    aligned = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "aligned")
    model = get_peft_model(aligned, LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True))
    assert len(AlignmentPenalty(model, direction).layers) == 2


def as_on_the_hub(folder):
    """Qwen2-VL and Qwen2.5-VL of the Hub: one flat config.json, and the layers under the names of a text model."""
    file = folder / "model.safetensors"
    changes = {"model.language_model.": "model.", "model.visual.": "visual."}
    stored = load_file(file)
    for new, old in changes.items():
        stored = {key.replace(new, old): weight for key, weight in stored.items()}
    assert {key.partition(".")[0] for key in stored} == {"model", "visual", "lm_head"}
    save_file(stored, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config = config.pop("text_config") | config
    config |= {"rope_theta": 10000.0, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("family", ["Qwen2-VL (text tower)", "Qwen2.5-VL (text tower)"])
def test_a_vision_model_as_it_lies_on_the_hub(tmp_path, family):
    """transformers keeps their renamings under the names of their classes."""
    model_class, targets, layers = make_family(tmp_path, family)
    for name in ("base", "aligned"):
        as_on_the_hub(tmp_path / name)
    direction = extract_direction(tmp_path / "base", tmp_path / "aligned", rank=4, modules=["language_model"])
    assert "model.language_model.layers.0.self_attn.q_proj" in direction.modules
    aligned = model_class.from_pretrained(tmp_path / "aligned", dtype=torch.float32)
    model = get_peft_model(aligned, LoraConfig(r=4, target_modules=targets))
    assert len(AlignmentPenalty(model, direction).layers) == layers


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": [None]}, r"config.json has model_type 'llama' and architectures \[None\]; expected a name"),
        ({"architectures": {"model": 1}}, r"architectures \{'model': 1\}; expected a name and a list of names"),
        ({"model_type": ["llama"]}, r"config.json has model_type \['llama'\]"),
        ({"architectures": ["pipeline"], "text_config": {}}, "the model 'pipeline', which .* is no class of models"),
        ({"hidden_size": 30, "text_config": {}}, r"config.json names the model 'LlamaForCausalLM', which transformers "
         r".* cannot build here \(.*hidden size.*\), so that .*; install what is missing"),
        ({"architectures": ["Gemma3nForConditionalGeneration"], "model_type": "gemma3n", "text_config": {}},
         "cannot build here .*requires the timm library"),
    ],
)  # fmt: skip
def test_a_config_that_names_no_model(pair, tmp_path, changes, message):
    if "timm" in message and importlib.util.find_spec("timm"):
        pytest.skip("timm is here")
    checkpoint = copied(pair[1], tmp_path / "aligned", config=lambda config: config.update(changes))
    with pytest.raises(AsftError, match=message) as refused:
        Checkpoint.open(checkpoint)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("family", "parameter"),
    [("Mixtral (attention)", "mlp.experts.gate_up_proj"), ("Qwen3-MoE (attention)", "mlp.experts.down_proj")],
)
def test_experts_as_one_parameter_are_uncovered(tmp_path, family, parameter):
    """`lora_target_parameters`: LoRA on a stack of experts has no weight matrix of its own, and is named."""
    model_class, targets, _ = make_family(tmp_path, family)
    direction = extract_direction(tmp_path / "base", tmp_path / "aligned", rank=4)
    aligned = model_class.from_pretrained(tmp_path / "aligned", dtype=torch.float32)
    model = get_peft_model(aligned, LoraConfig(r=4, target_modules=targets, target_parameters=[parameter]))
    with pytest.raises(AsftError, match=r"4 trainable weights that are no LoRA layer \(first model.layers.0.mlp.exp"):
        AlignmentPenalty(model, direction)
    assert len(AlignmentPenalty(model, direction, on_uncovered="warn").layers) == 8
