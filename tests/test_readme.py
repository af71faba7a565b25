"""The README says what the code does."""

import re
from pathlib import Path

import yaml
from click.testing import CliRunner

import axolotl_asft
from axolotl_asft.args import AsftArgs, parse_block
from axolotl_asft.cli import asft
from axolotl_asft.penalty import PROJECTORS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def table_keys(header: str) -> dict[str, str]:
    """First and second column of the table that begins with `header`."""
    lines = README[README.index(header) :].split("\n\n")[0].splitlines()[2:]
    cells = [tuple(cell.strip().strip("`") for cell in line.split("|")[1:3]) for line in lines]
    return dict(cells)


def test_the_yaml_is_valid():
    (text,) = blocks("yaml")
    config = yaml.safe_load(text)
    assert config["plugins"] == ["asft"]
    assert parse_block(config["asft"])


def test_every_key_is_listed_with_its_default():
    listed = table_keys("| key | default | what |")
    assert list(listed) == list(AsftArgs.model_fields)
    for name, field in AsftArgs.model_fields.items():
        written = "" if field.is_required() else yaml.safe_load(listed[name])
        assert written == ("" if field.is_required() else field.default), name


def test_every_projector_is_listed():
    assert tuple(table_keys("| projector | c_i | |")) == PROJECTORS


def test_the_python_names_exist():
    (code,) = blocks("python")
    compile(code, "README.md", "exec")
    for name in re.search(r"from axolotl_asft import (.*)", code).group(1).split(", "):
        assert getattr(axolotl_asft, name)


def test_every_command_is_listed():
    assert set(re.findall(r"axolotl asft (\w+)", README)) == set(asft.commands)
    for name in asft.commands:
        result = CliRunner().invoke(asft, [name, "--help"])
        assert result.exit_code == 0
        assert "Example:" in result.output


def test_the_two_commands_are_marked():
    tests = "python -m pytest -n auto --dist loadfile"
    for marker, ending in (("<!-- demo -->", "axolotl asft demo"), ("<!-- tests -->", tests)):
        command = README[README.index(marker) :].split("```")[1].removeprefix("bash\n").strip()
        assert command.endswith(ending)
        assert "\n" not in command
