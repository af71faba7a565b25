"""`--asft.lambda_reg 5` and sweeps: axolotl sets top-level keys alone, and ignores what it does not know."""

import json

import pytest
from tiny import axolotl, train, write_config

from axolotl_asft.args import AsftArgs
from axolotl_asft.errors import AsftError
from axolotl_asft.guard import LISTS, OPTIONS, add_options, fold_dotted_keys


def test_every_key_of_the_block_is_an_option():
    assert set(OPTIONS) == set(AsftArgs.model_fields) - set(LISTS), "a list cannot be given on the command line"
    for key, kind in OPTIONS.items():
        assert kind in str(AsftArgs.model_fields[key].annotation) or key in ("projector", "on_uncovered", "metric")


def test_both_spellings(monkeypatch):
    monkeypatch.setattr("sys.argv", ["axolotl", "train", "c.yml", "--asft.lambda_reg=5", "--no-asft.lora-scaling"])
    options = {name: declarations for declarations, name, _, _ in add_options(())}
    assert options["asft__lambda_reg"] == ("--asft.lambda-reg", "--asft.lambda_reg")
    assert options["asft__rank"] == ("--asft.rank",)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--asft.lambda", "--asft.lambda is not an option; did you mean --asft.lambda_reg?"),
        ("--asft.modules=q_proj", "--asft.modules is not an option, since it is a list; set it in the asft block"),
        (
            "--asft.prompt-formats=x",
            "--asft.prompt-formats is not an option, since it is a list; set it in the asft block",
        ),
        ("--asft.zzzzzzzzzzz", "set it in the asft block of the config"),
    ],
)
def test_an_option_that_is_none(monkeypatch, argument, message):
    monkeypatch.setattr("sys.argv", ["axolotl", "train", "c.yml", argument])
    with pytest.raises(AsftError) as error:
        add_options(())
    assert message in str(error.value)


def test_dotted_keys():
    config = {"asft": {"direction": "a", "lambda_reg": 1}, "asft.lambda_reg": 5, "asftish": 1}
    fold_dotted_keys(config)
    assert config == {"asft": {"direction": "a", "lambda_reg": 5}, "asftish": 1}
    config = {"asft.direction": "b"}
    fold_dotted_keys(config)
    assert config == {"asft": {"direction": "b"}}
    with pytest.raises(AsftError, match="expected a block of keys"):
        fold_dotted_keys({"asft": "a file", "asft.rank": 1})


@pytest.fixture
def config(pair, dataset, direction_file, tmp_path):
    block = {"direction": str(direction_file), "lambda_reg": 1.0, "projector": "subspace"}
    return write_config(tmp_path, pair[1], dataset, block, max_steps=2)


def stamp(folder):
    return json.loads((folder / "adapter_config.json").read_text())["asft"]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["python", "accelerate", "torchrun"])
def test_the_command_line_is_obeyed(config, launcher):
    train(config, "--asft.lambda_reg", "5", "--no-asft.lora-scaling", launcher=launcher)
    written = stamp(config.parent / "out")
    assert (written["lambda_reg"], written["lora_scaling"]) == (5, False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--asft.lambda_regg", "5"], "asft: --asft.lambda_regg is not an option; did you mean --asft.lambda_reg?"),
        (["--asft.lambda_reg", "-5"], "asft: asft.lambda_reg is -5.0; input should be greater than or equal to 0"),
    ],
)
def test_a_bad_option_trains_nothing(config, arguments, message):
    result = train(config, *arguments, check=False)
    assert result.returncode == 1
    assert message in result.stderr
    assert not (config.parent / "out" / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_a_sweep(config):
    sweep = config.parent / "sweep.yml"
    sweep.write_text("asft.lambda_reg: [0.5, 2]\n")
    train(config, "--sweep", str(sweep))
    found = {stamp(folder)["lambda_reg"] for folder in (config.parent / "out").glob("sweep*")}
    assert found == {0.5, 2}


def test_help_lists_the_options(tmp_path):
    text = axolotl("train", "--help", cwd=tmp_path).stdout
    assert "--asft.lambda-reg, --asft.lambda_reg FLOAT" in text
