"""The tokenizer that the kept requests are read by, and a chat template that is another."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import yaml
from tiny import CHAT_TEMPLATE, OWN_ANSWERS, make_tokenizer, write_config
from trainers import make_trainer

from axolotl_asft import AlignmentDirection, attach
from axolotl_asft.anchor import AnswerAnchor
from axolotl_asft.dry_run import check_config
from axolotl_asft.errors import AsftError
from axolotl_asft.evaluation.models import load_tokenizer
from axolotl_asft.templates import template_warnings, text_tokenizer

OTHER = CHAT_TEMPLATE.replace("'<|assistant|> '", "'<|assistant|> yes '")
SPEC = {"own_answers": OWN_ANSWERS}


@pytest.fixture
def mistral(tmp_path):
    """mistral-common's tokenizer, from the vocabulary that its package carries."""
    package = pytest.importorskip("mistral_common")
    from transformers.tokenization_mistral_common import MistralCommonBackend

    shutil.copy(Path(package.__file__).parent / "data" / "tekken_240718.json", tmp_path / "tekken.json")
    return MistralCommonBackend.from_pretrained(str(tmp_path))


def test_a_tokenizer_that_spells_control_tokens_out(mistral):
    request = mistral.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    right = mistral.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=True, return_dict=False)
    assert mistral(request, add_special_tokens=False)["input_ids"] != right, "why it is refused"
    for attempt in (lambda: text_tokenizer(mistral), lambda: AnswerAnchor(mistral, [(request, "no")])):
        with pytest.raises(AsftError, match=r"the tokenizer is mistral-common's .* expected one of transformers"):
            attempt()


def test_a_model_folder_with_both_kinds(pair, mistral, tmp_path):
    """transformers takes mistral-common's where there is a tekken.json, and the model is a Mistral."""
    model = shutil.copytree(pair[1], tmp_path / "model")
    load_tokenizer(str(model))
    shutil.copy(tmp_path / "tekken.json", model)
    (model / "config.json").write_text(json.dumps({"model_type": "mistral", "architectures": ["MistralForCausalLM"]}))
    with pytest.raises(AsftError, match="the tokenizer is mistral-common's"):
        load_tokenizer(str(model))


def test_a_processor_s_tokenizer():
    from transformers import LlavaProcessor

    tokenizer = make_tokenizer()
    processor = LlavaProcessor.__new__(LlavaProcessor)
    processor.tokenizer = tokenizer
    assert text_tokenizer(processor) is tokenizer
    assert text_tokenizer(tokenizer) is tokenizer


def test_the_end_of_a_turn_is_what_counts():
    tokenizer = make_tokenizer()
    assert template_warnings(tokenizer, SPEC) == []
    tokenizer.chat_template = "today is Monday " + CHAT_TEMPLATE
    assert template_warnings(tokenizer, SPEC) == []
    tokenizer.chat_template = CHAT_TEMPLATE.replace("'<|assistant|> '", "'<|assistant|> <think>'")
    assert template_warnings(tokenizer, SPEC) == []
    tokenizer.chat_template = OTHER
    (found,) = template_warnings(tokenizer, SPEC)
    assert "opens the answer with '</s><|assistant|> yes'" in found
    assert "end in" in found
    assert "</s><|assistant|> '" in found


def test_a_template_of_a_dataset_alone():
    assert template_warnings(make_tokenizer(), SPEC, [CHAT_TEMPLATE]) == []
    (found,) = template_warnings(make_tokenizer(), SPEC, [CHAT_TEMPLATE, OTHER, OTHER])
    assert "opens the answer with '</s><|assistant|> yes'" in found


@pytest.mark.parametrize("template", [None, "{{ raise_exception('no') }}", "{{ 1 // 0 }}"])
def test_nothing_is_said_of_what_cannot_be_told(template):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    assert template_warnings(tokenizer, SPEC) == []
    assert template_warnings(make_tokenizer(), {}) == []
    assert template_warnings(None, SPEC) == []


def test_a_run_says_it(pair, rows, anchored_file, tmp_path, caplog):
    for template, said in ((CHAT_TEMPLATE, False), (OTHER, True)):
        trainer = make_trainer(pair, rows, tmp_path)
        trainer.processing_class = make_tokenizer()
        trainer.processing_class.chat_template = template
        caplog.clear()
        with caplog.at_level(logging.WARNING, "axolotl.asft"):
            attach(trainer, AlignmentDirection.load(anchored_file), anchor_weight=1.0)
        assert ("the run's chat template opens" in caplog.text) == said


def test_check_says_it_before(pair, dataset, anchored_file, tmp_path):
    block = {"direction": str(anchored_file), "anchor_weight": 1.0}
    assert check_config(write_config(tmp_path, pair[1], dataset, block)).warnings == []
    other = {"chat_template": "jinja", "chat_template_jinja": OTHER}
    check = check_config(write_config(tmp_path, pair[1], dataset, block, **other))
    assert [line for line in check.warnings if "the run's chat template opens" in line]
    assert check.fine
    config = write_config(tmp_path, pair[1], dataset, block)
    content = yaml.safe_load(config.read_text())
    content["datasets"][0] |= {"type": "chat_template", **other}
    config.write_text(yaml.safe_dump(content))
    assert [line for line in check_config(config).warnings if "the run's chat template opens" in line]


def test_check_foresees_mistral_common(pair, dataset, anchored_file, mistral, tmp_path):
    model = shutil.copytree(pair[1], tmp_path / "model")
    shutil.copy(tmp_path / "tekken.json", model)
    block = {"direction": str(anchored_file), "anchor_weight": 1.0}
    config = write_config(tmp_path, model, dataset, block, tokenizer_use_mistral_common=True)
    check = check_config(config)
    assert [line for line in check.errors if "mistral-common's" in line], json.dumps(check.as_dict())
