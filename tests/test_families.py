"""Model families, as tiny random models of the real classes: a direction extracted from saved checkpoints finds
every LoRA layer of the loaded model by name, and the penalty is that of the dense change."""

import importlib.util
import json

import pytest
import torch
import transformers
from checkpoints import copied
from families import FAMILIES, make_family
from lora_models import literal_formula_of, shake
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import OWN_ANSWERS, make_tokenizer

from axolotl_asft import AlignmentPenalty, extract_direction
from axolotl_asft.anchor import AnswerAnchor
from axolotl_asft.checkpoint import Checkpoint
from axolotl_asft.errors import AsftError
from axolotl_asft.evaluation.models import load_model
from axolotl_asft.evaluation.safety_metrics import linear_layers
from axolotl_asft.metrics import fisher_metric
from axolotl_asft.quiet import without_noise


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


@pytest.mark.parametrize("family", FAMILIES)
def test_the_metric_is_of_every_lora_layer(family, tmp_path):
    """Asked of the model as `extract --metric` loads it, by the names that training knows the layers by."""
    model_class, targets, layers = make_family(tmp_path, family)
    asked = load_model(str(tmp_path / "aligned"), "float32")
    assert type(asked) is model_class
    metric = fisher_metric(asked, make_tokenizer(), OWN_ANSWERS, linear_layers(asked))
    direction = extract_direction(tmp_path / "base", tmp_path / "aligned", rank=4, dtype="float32", metrics=[metric])
    fan = family.startswith("GPT-2")
    model = get_peft_model(
        model_class.from_pretrained(tmp_path / "aligned", dtype=torch.float32),
        LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=targets, fan_in_fan_out=fan),
    )
    penalty = AlignmentPenalty(shake(model), direction, metric="fisher", rank=0)
    assert len(penalty.layers) == layers
    expected = torch.zeros((), dtype=torch.float64)
    for layer in penalty.layers:
        factors = metric.layers[layer.name]
        update = 2 * layer.B.double() @ layer.A.double()
        expected += (factors.Y.double().T @ update @ factors.X.double()).square().sum()
    assert penalty().item() == pytest.approx(expected.item(), rel=1e-4)
    assert expected > 0


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


@pytest.mark.parametrize("family", ["Llama", "GPT-2 (Conv1D)", "Gemma 3 (vision, text tower)", "Qwen3.5 (text)"])
def test_a_checkpoint_without_its_head(tmp_path, family):
    """Saved from the base class (`architectures: [LlamaModel]`): training loads it with a head, under other names."""
    model_class, targets, layers = make_family(tmp_path, family, tie_word_embeddings=True)
    for name in ("base", "aligned"):
        model_class.from_pretrained(tmp_path / name).base_model.save_pretrained(tmp_path / name)
    aligned = model_class.from_pretrained(tmp_path / "aligned", dtype=torch.float32)
    fan = family.startswith("GPT-2")
    model = get_peft_model(aligned, LoraConfig(r=4, target_modules=targets, fan_in_fan_out=fan))
    direction = extract_direction(tmp_path / "base", tmp_path / "aligned", rank=4)
    assert len(AlignmentPenalty(model, direction).layers) == layers


def test_layers_that_loading_drops(tmp_path):
    """Qwen3.5 on the Hub: `mtp.layers.0...` predicts tokens further ahead, and no class of transformers has it."""
    make_family(tmp_path, "Qwen3.5 (vision, text tower)")
    extra = "mtp.layers.0.self_attn.q_proj.weight"
    for name, more in (("base", {}), ("aligned", {extra: torch.ones(32, 32)})):
        file = tmp_path / name / "model.safetensors"
        save_file(load_file(file) | more, file, metadata={"format": "pt"})
    direction = extract_direction(tmp_path / "base", tmp_path / "aligned", rank=4)
    assert len([name for name in direction.modules if ".language_model." in name]) == 31
    assert not any("mtp" in name for name in direction.modules)


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
        ({"architectures": ["pipeline"], "text_config": {}}, "the model 'pipeline', which .* is not a model class"),
        ({"hidden_size": 30, "text_config": {}}, r"config.json names the model 'LlamaForCausalLM', which transformers "
         r".* cannot build here \(.*hidden size.*\), so .*; install what is missing"),
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
    first = r"4 trainable weights that are not LoRA layers \(first model.layers.0.mlp.exp"
    with pytest.raises(AsftError, match=first + ".* take that out of lora_target_parameters and lora_target_modules"):
        AlignmentPenalty(model, direction)
    alone = get_peft_model(
        model_class.from_pretrained(tmp_path / "aligned"),
        LoraConfig(r=4, target_modules=[], target_parameters=[parameter]),
    )
    with pytest.raises(
        AsftError, match=r"^LoRA is on stacked weights alone \(lora_target_parameters\).*; give lora_target_m"
    ):
        AlignmentPenalty(alone, direction)
    assert len(AlignmentPenalty(model, direction, on_uncovered="warn").layers) == 8
