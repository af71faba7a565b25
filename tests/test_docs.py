"""README and docs: the code understands every block of code, every link leads somewhere, every message exists."""

import ast
import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

import axolotl_asft
from axolotl_asft.args import parse_block
from axolotl_asft.cli import asft

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    (page.name, language, block)
    for page in PAGES
    for language, block in re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
]
LINES = [
    (page, line)
    for page, language, block in BLOCKS
    if language == "bash"
    for line in re.sub(r"\\\n\s*", " ", block).splitlines()
    if line.strip() and not line.lstrip().startswith("#")
]
OTHER_COMMANDS = {"pip", "axolotl train", "axolotl merge-lora", "hf download", "hf auth", "lm_eval"}


def blocks(*languages: str) -> list:
    return [
        pytest.param(block, id=f"{page}-{i}")
        for i, (page, language, block) in enumerate(BLOCKS)
        if language in languages
    ]


def test_the_blocks_are_of_known_languages():
    assert {language for _, language, _ in BLOCKS} <= {"bash", "yaml", "python", "json", "text"}


@pytest.mark.parametrize(("page", "line"), LINES)
def test_a_command_line_is_understood(page, line):
    """Ours are parsed as the command line would be, without running them; of others the program has to be known."""
    for command in re.split(r"\s&&\s|\s\|\s", line):
        words = shlex.split(command, comments=True)
        while words and "=" in words[0] and not words[0].startswith("-"):
            words = words[1:]  # a variable for the command
        program = Path(words[0]).name
        if program == "python3" and words[1:3] == ["-m", "venv"]:
            continue
        if program.startswith("python") and words[1] == "-m" and words[2] == "axolotl_asft":
            words = ["axolotl", "asft", *words[3:]]
        elif program.startswith("python") and words[1] == "-m":
            assert importlib.util.find_spec(words[2]), words[2]
            continue
        elif program.startswith("python"):
            assert (ROOT / words[1]).is_file(), words[1]
            continue
        elif program in ("pre-commit", "pytest"):
            continue
        else:
            words[0] = program
        if words[:2] == ["axolotl", "asft"]:
            name, *arguments = words[2:]
            group = asft.commands[name]
            if hasattr(group, "commands"):
                name, *arguments = arguments
                group = group.commands[name]
            with group.make_context(name, arguments, resilient_parsing=False):
                pass
        else:
            assert words[0] in OTHER_COMMANDS or " ".join(words[:2]) in OTHER_COMMANDS, command


@pytest.mark.parametrize("text", blocks("yaml"))
def test_a_yaml_block_is_valid(text):
    content = yaml.safe_load(text.replace("HASH", "a" * 64)) or {}  # a block may be a comment alone
    if "asft" in content:
        assert parse_block(content["asft"])


@pytest.mark.parametrize("text", blocks("json"))
def test_a_json_block_is_valid(text):
    json.loads(text)


@pytest.mark.parametrize("code", blocks("python"))
def test_a_python_block_compiles_and_its_names_exist(code):
    """Two of them are run whole: tests/test_trl.py and tests/test_adapter.py."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("axolotl_asft"):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def messages() -> str:
    """All text that the package's code holds, with {} where something is put in."""
    found = []
    for path in Path(axolotl_asft.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(v.value if isinstance(v, ast.Constant) else "{}" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_troubleshooting_names_messages_that_exist():
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    headings = re.findall(r"^### `(.+)`$", page, re.M)
    text = messages()
    assert len(headings) > 10
    assert not [heading for heading in headings if heading not in text]


def test_every_page_is_linked_from_the_readme():
    readme = PAGES[0].read_text(encoding="utf-8")
    assert not [page.name for page in PAGES[1:] if page.name not in readme]


def test_the_costs_are_the_measured_ones():
    """Row by row as the benchmark wrote them; the README rounds some of them."""
    page = (ROOT / "docs" / "cost.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ") and "---" not in line]
    measured = (ROOT / "benchmarks" / "results" / "step_overhead.md").read_text(encoding="utf-8").splitlines()
    assert len(rows) > 6
    assert not [row for row in rows if row not in measured]
    start = "| 7B, r = 16, accumulation 1, fisher, 256 columns, and the anchor, N"
    cells = [cell.strip() for cell in next(row for row in rows if row.startswith(start)).split("|")]
    readme = PAGES[0].read_text(encoding="utf-8")
    section = readme[readme.index("## What it costs") :].split("\n## ")[0]
    (without, *units), (added, *more), (penalty, *last) = (cell.split() for cell in cells[2:5])
    assert units == more == last == ["ms"]
    without, penalty = float(without), float(penalty)
    assert f"about {100 * float(added) / (8 * without):.0f} % ({added} ms)" in section
    assert f"| {float(cells[5].rstrip('%')):.0f} % |" in section
    assert f"| {100 * penalty / without:.0f} % ({penalty:.0f} ms) |" in section
    assert f"| {cells[7].replace('1.28', '1.3')} for the metric" in section
