"""Model families, as tiny random models of the real classes, and what reads text and images for them."""

import copy
import json
from pathlib import Path

import torch
import transformers
from tiny import make_tokenizer

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
DELTA_NET = {
    "num_hidden_layers": 4,  # every fourth has attention as it was
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
QWEN3_VISION = {**VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
GEMMA4 = {**HEADS, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64, "global_head_dim": 8}
LLAMA4 = {**HEADS, **EXPERTS, "num_experts_per_tok": 1, "intermediate_size_mlp": 48}
LLAMA4_VISION = {**SIGLIP, "vision_output_dim": 32, "projector_input_dim": 16, "projector_output_dim": 16}
MAMBA = {
    "num_local_experts": 0,
    "layer_types": ["mamba", "attention"],
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
}
TEXT_TOWER = r".*(language_model|text_model).*\.(q|k|v|o|gate|up|down)_proj"
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
    "Qwen3.5 (text)": ("Qwen3_5TextConfig", {**HEADS, **DELTA_NET}, "Qwen3_5ForCausalLM", "all-linear", 31),
    "OLMo 2": ("Olmo2Config", SMALL, "Olmo2ForCausalLM", "all-linear", 14),
    "OLMo 3": ("Olmo3Config", SMALL, "Olmo3ForCausalLM", "all-linear", 14),
    "Granite": ("GraniteConfig", SMALL, "GraniteForCausalLM", "all-linear", 14),
    "Granite 4 (Mamba and attention)": (
        "GraniteMoeHybridConfig",
        {**SMALL, **MAMBA},
        "GraniteMoeHybridForCausalLM",
        "all-linear",
        10,
    ),
    "GLM-4 (fused gate and up)": ("Glm4Config", HEADS, "Glm4ForCausalLM", "all-linear", 12),
    "Cohere 2": ("Cohere2Config", SMALL, "Cohere2ForCausalLM", "all-linear", 14),
    "LFM2 (convolutions and attention)": (
        "Lfm2Config",
        {**SMALL, "layer_types": ["conv", "full_attention"]},
        "Lfm2ForCausalLM",
        "all-linear",
        12,
    ),
    "gpt-oss (attention)": ("GptOssConfig", {**HEADS, **EXPERTS}, "GptOssForCausalLM", ATTENTION, 8),
    "Qwen3.5 (vision, text tower)": (
        "Qwen3_5Config",
        {"text_config": {**HEADS, **DELTA_NET}, "vision_config": QWEN3_VISION},
        "Qwen3_5ForConditionalGeneration",
        r".*language_model.*\.(q|k|v|o|gate|up|down|in|out)_proj(_qkv|_z)?",
        25,
    ),
    "Qwen3-VL (text tower)": (
        "Qwen3VLConfig",
        {"text_config": {**HEADS, "rope_parameters": MROPE}, "vision_config": QWEN3_VISION},
        "Qwen3VLForConditionalGeneration",
        TEXT_TOWER,
        14,
    ),
    "Gemma 4 (vision, text tower)": (
        "Gemma4Config",
        {"text_config": GEMMA4, "vision_config": SIGLIP},
        "Gemma4ForConditionalGeneration",
        TEXT_TOWER,
        14,
    ),
    "Mistral 3 (vision, text tower)": (
        "Mistral3Config",
        {"text_config": {"model_type": "mistral", **HEADS}, "vision_config": {"model_type": "pixtral", **SIGLIP}},
        "Mistral3ForConditionalGeneration",
        TEXT_TOWER,
        14,
    ),
    "Llama 4 (vision, attention of the text tower)": (
        "Llama4Config",
        {"text_config": LLAMA4, "vision_config": LLAMA4_VISION},
        "Llama4ForConditionalGeneration",
        r".*language_model.*\.(q|k|v|o)_proj",
        8,
    ),
    "SmolVLM (text tower)": (
        "SmolVLMConfig",
        {"text_config": {"model_type": "llama", **SMALL}, "vision_config": SIGLIP},
        "SmolVLMForConditionalGeneration",
        TEXT_TOWER,
        14,
    ),
    "Qwen2.5-VL (text tower)": (
        "Qwen2_5_VLConfig",
        {"text_config": {**SMALL, "rope_parameters": MROPE}, "vision_config": VISION},
        "Qwen2_5_VLForConditionalGeneration",
        TEXT_TOWER,
        14,
    ),
    "Qwen2-VL (text tower)": (
        "Qwen2VLConfig",
        {"text_config": {**SMALL, "rope_parameters": MROPE}, "vision_config": QWEN2_VISION},
        "Qwen2VLForConditionalGeneration",
        TEXT_TOWER,
        14,
    ),
    "Gemma 3 (vision, text tower)": (
        "Gemma3Config",
        {"text_config": HEADS, "vision_config": SIGLIP, "mm_tokens_per_image": 4},
        "Gemma3ForConditionalGeneration",
        TEXT_TOWER,
        14,
    ),
}


def make_family(folder, family, **changes):
    """Base and aligned checkpoints of a tiny model of this family, as save_pretrained writes them.

    `changes` are to its (text model's) configuration.
    """
    config_class, arguments, model_class, targets, layers = FAMILIES[family]
    arguments = copy.deepcopy(arguments)
    arguments.get("text_config", arguments).update(changes)
    config = getattr(transformers, config_class)(**arguments)
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


# what the processors of models that read images are made of, and the tokens by which they know an image's place
READS_IMAGES = {
    "Gemma 3 (vision, text tower)": (
        {"boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": "<img>"},
        {"image_processor_type": "Gemma3ImageProcessor", "processor_class": "Gemma3Processor"}
        | {"size": {"height": 8, "width": 8}, "image_seq_length": 4},
    ),
    "Qwen3.5 (vision, text tower)": (
        {"image_token": "<img>", "video_token": "<video>", "vision_bos_token": "<vision>", "vision_eos_token": "<end>"},
        {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen3VLProcessor"},
    ),
}


def save_what_reads(folder: Path, family: str) -> None:
    """A tokenizer and, for a model that reads images, what prepares them: axolotl loads both."""
    tokens, _ = READS_IMAGES.get(family, ({}, {}))
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens.values())})
    tokenizer.save_pretrained(folder)
    if family in READS_IMAGES:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | tokens | {"extra_special_tokens": tokens}))
        save_what_prepares_images(folder, family)


def save_what_prepares_images(folder: Path, family: str) -> None:
    _, prepares = READS_IMAGES[family]
    (folder / "preprocessor_config.json").write_text(json.dumps(prepares))
