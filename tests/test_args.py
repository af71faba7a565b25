"""The asft block: every key is read, and mistakes are one clear line."""

import re
from types import SimpleNamespace

import pytest

from axolotl_asft import AlignmentDirection
from axolotl_asft.args import AsftArgs, parse_block
from axolotl_asft.errors import AsftError


def test_every_field_reaches_the_constraint(direction_file, monkeypatch):
    """Fields that nothing reads are promises that nothing keeps: what the block says is what `attach` is given."""
    from axolotl.utils.dict import DictDefault

    from axolotl_asft import plugin

    given = {
        "direction": str(direction_file),
        "direction_sha256": AlignmentDirection.load(direction_file).sha256,
        "lambda_reg": 2.5,
        "projector": "subspace",
        "rank": 3,
        "metric": "weights",
        "max_drift": 0.2,
        "anchor_weight": 0.5,
        "prompt_formats": ["Q: {prompt} A:"],
        "general_formats": False,
        "lora_scaling": False,
        "modules": ["q_proj"],
        "on_uncovered": "warn",
        "verify_model": False,
    }
    assert set(given) == set(AsftArgs.model_fields)
    defaults = AsftArgs(direction="d").model_dump()
    assert all(value != defaults[name] for name, value in given.items())
    received = {}

    def attach(trainer, direction, lambda_reg, chat_templates, **options):
        received.update(options, direction=direction, lambda_reg=lambda_reg)
        return SimpleNamespace(
            history=SimpleNamespace(header={}), holds_answers=False, prompt_formats=(), anchor_weight=0.0
        )

    monkeypatch.setattr(plugin, "attach", attach)
    trainer = SimpleNamespace(add_callback=lambda callback: None)
    plugin.AsftPlugin().post_trainer_create(DictDefault({"asft": given, "output_dir": "out"}), trainer)
    direction = received.pop("direction")
    assert (str(direction_file), direction.sha256) == (given.pop("direction"), given.pop("direction_sha256"))
    assert received == given


@pytest.mark.parametrize("field", AsftArgs.model_fields.items(), ids=lambda item: item[0])
def test_every_field_is_described(field):
    assert len(field[1].description) > 20


def test_defaults():
    block = parse_block({"direction": "d"})
    assert (block.projector, block.rank, block.lora_scaling) == ("paper", None, True)
    assert (block.lambda_reg, block.max_drift, block.anchor_weight) == (None, None, None), "tests/test_strengths.py"
    assert (block.modules, block.on_uncovered, block.verify_model) == (None, "error", True)


def test_yaml_writes_small_numbers_as_text():
    assert parse_block({"direction": "d", "lambda_reg": "1e-3"}).lambda_reg == 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lamda": 1}, "asft.lamda is not a key of the asft block; did you mean lambda_reg?"),
        ({"projectr": "paper"}, "did you mean projector?"),
        ({"zzz": 1}, "known keys: direction, direction_sha256, lambda_reg"),
        ({"lambda_reg": -0.1}, "asft.lambda_reg is -0.1; input should be greater than or equal to 0"),
        ({"lambda_reg": float("nan")}, "asft.lambda_reg is nan"),
        ({"lambda_reg": "much"}, "asft.lambda_reg is 'much'"),
        ({"projector": "Paper"}, "asft.projector is 'Paper'; input should be 'paper', 'normalized' or 'subspace'"),
        ({"direction_sha256": "abc"}, "asft.direction_sha256 is 'abc'"),
        ({"modules": []}, "asft.modules is []"),
        ({"modules": "q_proj"}, "asft.modules is 'q_proj'; input should be a valid list"),
        ({"direction": ""}, "asft.direction is ''"),
        ({"anchor_weight": -1}, "asft.anchor_weight is -1; input should be greater than or equal to 0"),
        *(
            ({key: value}, f"asft.{key} is {value}; expected a number (YAML reads yes, on and true as booleans)")
            for key in ("lambda_reg", "rank", "max_drift", "anchor_weight")
            for value in (True, False)
        ),
        ({"anchor": 1}, "asft.anchor is not a key of the asft block; did you mean anchor_weight?"),
    ],
)
def test_mistakes(changes, message):
    with pytest.raises(AsftError, match=re.escape(message)) as refused:
        parse_block({"direction": "d", **changes})
    assert "\n" not in str(refused.value)
