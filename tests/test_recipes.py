"""`axolotl asft recipes` and `axolotl asft schema`."""

import json
import re
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner
from jsonschema import Draft202012Validator

from axolotl_asft.args import AsftArgs, parse_block
from axolotl_asft.cli import asft
from axolotl_asft.recipes import recipes, with_direction
from axolotl_asft.schema import config_schema

NAME = "llama-3.1-8b-qlora-24gb"
HASH = "ab" * 32


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(asft, list(arguments))


def test_list(run):
    text = run("recipes", "list").stdout
    listed = json.loads(run("recipes", "list", "--json").stdout)
    assert [entry["name"] for entry in listed] == [recipe.name for recipe in recipes()]
    for entry in listed:
        assert entry["name"] in text
        assert entry["title"] in text
        assert entry["base_model"]
        assert "under AsFT" in entry["title"]


@pytest.mark.parametrize("name", [NAME, f"{NAME}.yml"])
def test_show_and_copy_give_the_file_itself(run, tmp_path, name):
    text = next(recipe.text for recipe in recipes() if recipe.name == NAME)
    assert run("recipes", "show", name).stdout == text
    assert run("recipes", "copy", name).exit_code == 0
    assert (tmp_path / f"{NAME}.yml").read_text() == text


def test_copy_with_a_direction_changes_nothing_else(run, tmp_path):
    result = run(
        "recipes", "copy", NAME, "-o", "mine.yml", "--direction", "me/chat-asft@v1", "--sha256", HASH, "--json"
    )
    assert json.loads(result.stdout) == {"file": "mine.yml", "recipe": NAME}
    text = next(recipe.text for recipe in recipes() if recipe.name == NAME)
    expected = yaml.safe_load(text)
    expected["asft"] |= {"direction": "me/chat-asft@v1", "direction_sha256": HASH}
    written = (tmp_path / "mine.yml").read_text()
    assert yaml.safe_load(written) == expected
    kept = text.replace(f"{NAME}.yml", "mine.yml").splitlines()
    assert [line for line in written.splitlines() if "irection" not in line and "How to make" not in line] == [
        line for line in kept if "irection" not in line
    ]


@pytest.mark.parametrize("name", [recipe.name for recipe in recipes()])
def test_the_head_of_a_copy_is_the_copy_s(run, tmp_path, name):
    """The commands in it name the copy, and make the file that it reads."""
    result = run("recipes", "copy", name, "-o", "mine.yml", "--direction", "./my.safetensors")
    head, _, rest = (tmp_path / "mine.yml").read_text().partition("\nbase_model:")
    assert f"{name}.yml" not in head + rest
    assert "axolotl asft check mine.yml" in head
    assert "axolotl train mine.yml" in head
    assert "# The direction of this copy: ./my.safetensors\n# How to make one" in head
    assert "Make the direction once" not in head
    assert "-o ./my.safetensors\n" in head
    assert head.count(".safetensors") == 2
    assert result.stderr.startswith("note: there is no file ./my.safetensors yet (seen from ")
    (tmp_path / "my.safetensors").touch()
    assert not run("recipes", "copy", name, "-o", "mine.yml", "--direction", "./my.safetensors", "--force").stderr
    assert not run("recipes", "copy", name, "-o", "my 2.yml", "--direction", "me/chat@v1").stderr
    text = (tmp_path / "my 2.yml").read_text()
    assert "axolotl asft check 'my 2.yml'" in text
    assert "# The direction of this copy: me/chat@v1\n" in text


@pytest.mark.parametrize("direction", ["owner/name@abc:sub/file.safetensors", "./a: b #c.safetensors", "'", "~/d", "1"])
def test_directions_of_all_spellings(direction):
    for recipe in recipes():
        text = with_direction(with_direction(recipe.text, "first", HASH), direction)
        assert parse_block(yaml.safe_load(text)["asft"]).direction == direction
        assert "direction_sha256" not in yaml.safe_load(text)["asft"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "llama-8b-24gb"], "did you mean llama-3.1-8b-"),
        (["copy", "gema-2-9b-qlora"], "did you mean gemma-2-9b-qlora-16gb?"),
        (["show", "Qwen"], "expected one of qwen-2.5-7b-dpo-qlora-24gb, qwen-2.5-7b-qlora-16gb, qwen-3"),
        (["show", "zzzzz"], "`axolotl asft recipes list` shows them"),
        (["show", "../README"], "there is no recipe"),
        (["copy", NAME, "-o", "there.yml"], "there.yml exists; give another --output, or --force"),
        (["copy", NAME, "-o", "config.txt"], "expected a name that ends in .yml"),
        (["copy", NAME, "--sha256", HASH], "--sha256 pins the file of --direction"),
        (["copy", NAME, "--direction", "a/b", "--sha256", "12"], "asft.direction_sha256 is '12'"),
        (["copy", NAME, "--direction", __file__, "--sha256", HASH], f"expected {HASH} (--sha256); get the pinned file"),
        (["copy", NAME, "--direction", "a\nb: c"], "expected one line"),
        (["copy", NAME, "--direction", "a\u2028b: c"], "expected one line"),
        (["copy", NAME, "--direction", ""], "asft.direction is ''"),
    ],
)
def test_mistakes(run, tmp_path, arguments, message):
    (tmp_path / "there.yml").write_text("mine")
    result = run("recipes", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert (tmp_path / "there.yml").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["there.yml"]


def test_force(run, tmp_path):
    (tmp_path / "there.yml").write_text("mine")
    assert run("recipes", "copy", NAME, "-o", "there.yml", "--force").exit_code == 0
    assert "base_model" in (tmp_path / "there.yml").read_text()


@pytest.mark.parametrize(
    ("arguments", "command"), [(["chek"], "check"), (["extrat"], "extract"), (["recipes", "lst"], "list")]
)
def test_misspelt_commands_get_a_suggestion(run, arguments, command):
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Did you mean" in result.stderr
    assert f"'{command}'" in result.stderr


@pytest.mark.parametrize("command", ["check", "schema", "recipes", "recipes list", "recipes show", "recipes copy"])
def test_every_help_has_an_example(run, command):
    result = run(*command.split(), "--help")
    assert result.exit_code == 0
    assert "Example:\n" in result.stdout
    assert f"axolotl asft {command}" in result.stdout


def test_the_schema_knows_every_key():
    schema = config_schema()
    block = schema["$defs"]["AsftArgs"]
    assert set(block["properties"]) == set(AsftArgs.model_fields)
    assert block["additionalProperties"] is False
    assert block["required"] == ["direction"]
    assert schema["properties"]["asft"]["anyOf"][0] == {"$ref": "#/$defs/AsftArgs"}
    assert all(entry["description"] for entry in block["properties"].values())


def test_the_schema_judges_configs():
    validator = Draft202012Validator(config_schema())
    Draft202012Validator.check_schema(config_schema())
    for recipe in recipes():
        assert not list(validator.iter_errors(yaml.safe_load(recipe.text)))
    good = {"base_model": "m", "plugins": ["asft"], "asft": {"direction": "d"}}
    assert validator.is_valid(good)
    for bad in (
        {**good, "asft": {"direction": "d", "lamda_reg": 1}},
        {**good, "asft": {"direction": "d", "lambda_reg": -1}},
        {**good, "asft": {"direction": "d", "projector": "papper"}},
        {**good, "asft": {}},
        {"base_model": "m", "asft": {"direction": "d"}},
    ):
        assert not validator.is_valid(bad), bad


def test_the_schema_as_a_file(run, tmp_path):
    assert run("schema", "-o", "asft.schema.json").exit_code == 0
    assert json.loads((tmp_path / "asft.schema.json").read_text()) == json.loads(run("schema").stdout)
    refused = run("schema", "-o", "asft.schema.json")
    assert (refused.exit_code, refused.stderr.startswith("asft: asft.schema.json exists")) == (2, True)
    (tmp_path / "folder").mkdir()
    refused = run("schema", "-o", "folder", "--force")
    assert (refused.exit_code, refused.stderr.startswith("asft: folder is a folder; expected")) == (2, True)
    assert run("schema", "-o", "asft.schema.json", "--force").exit_code == 0


def test_the_documented_commands_exist():
    """docs/recipes.md: every command of ours in it, with every option."""
    text = (Path(__file__).parent.parent / "docs" / "recipes.md").read_text()
    commands = re.findall(r"axolotl asft ([^\n`]+)", text)
    assert len(commands) > 10
    for line in commands:
        command, words = asft, line.split()
        while words and isinstance(command, click.Group) and words[0] in command.commands:
            command = command.commands[words.pop(0)]
        assert not isinstance(command, click.Group), line
        options = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("-")} <= options, line


def test_the_documented_block_is_valid():
    text = (Path(__file__).parent.parent / "docs" / "recipes.md").read_text()
    block = yaml.safe_load(re.search(r"```yaml\n(asft:.*?)```", text, flags=re.DOTALL)[1])["asft"]
    assert parse_block({**block, "direction_sha256": HASH}).direction == "owner/name@revision"


@pytest.mark.parametrize("command", ["copy", "show"])
def test_the_help_names_recipes_that_there_are(command):
    text = CliRunner().invoke(asft, ["recipes", command, "--help"]).output
    named = re.findall(r"recipes (?:copy|show) ([a-z][\w.-]+)", text)
    assert named
    assert set(named) <= {recipe.name for recipe in recipes()}
