"""The README says what the code does."""

import json
import re
from pathlib import Path

import yaml
from click.testing import CliRunner

import axolotl_asft
from axolotl_asft.args import AsftArgs, parse_block
from axolotl_asft.cli import asft
from axolotl_asft.penalty import PROJECTORS
from axolotl_asft.strengths import strengths

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def table_keys(header: str, page: str = README) -> dict[str, str]:
    """First and second column of the table that begins with `header`."""
    lines = page[page.index(header) :].split("\n\n")[0].splitlines()[2:]
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


def test_what_null_means():
    table = README[README.index("| | `metric` | `rank` |") :].split("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in table]
    fisher, plain = {"own_answers": [("a", "b")]}, {}
    found = [
        strengths("fisher", fisher, taken_out=False),
        strengths("fisher", fisher, max_drift=1.0, taken_out=False),
        strengths("fisher", fisher, anchor_weight=0.0, taken_out=False),
        strengths("weights", plain, taken_out=False),
    ]
    for (_, metric, rank, lambda_reg, anchor), strength in zip(rows, found, strict=True):
        assert (metric, rank) in (("fisher", "0"), ("weights", "all"))
        assert float(lambda_reg.partition(",")[0]) == strength.lambda_reg
        assert float(anchor or 0) == strength.anchor_weight
    assert strengths("weights", plain, max_drift=1.0, taken_out=False).lambda_reg == 0


def test_every_projector_is_listed():
    page = (ROOT / "docs/method.md").read_text()
    assert tuple(table_keys("| projector | c_i | |", page)) == PROJECTORS


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


# Row of the README's table of results -> method of the benchmark.
RESULTS = {
    "the aligned model": "aligned",
    "plain LoRA": "plain",
    "the paper's penalty, `projector: paper`, lambda 1": "paper-1",
    "`projector: normalized`, lambda 1": "normalized-1",
    "`projector: subspace`, k = 8, lambda 10": "subspace-k8-10",
    "a random subspace of the same size": "random-k8-10",
    "L2 on the update (`rank: 0`), lambda 1": "l2-1",
    "Safe LoRA, half of the layers projected": "safelora-50",
    "Safe LoRA, all layers": "safelora-all",
    "5 % safety examples in the data": "mix-5",
    "as many of the model's own answers in the data as the anchor asks for, in batches twice as large": "own-100-equal",
    "`metric: fisher`, lambda 1": "fisher-1",
    "the anchor and the metric in first turns alone, `general_formats: false`": "fisher-0.1-anchor-3",
    "the default: `metric: fisher`, lambda 0.1, `anchor_weight: 3`": "fisher-0.1-anchor-3-general",
}


def test_the_results_are_those_of_the_benchmark():
    results = [json.loads(line) for line in (ROOT / "benchmarks/results/safety.jsonl").read_text().splitlines()]
    table = README[README.index("| method | seeds | classification | generation |") :].split("\n\n")[0]
    rows = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    assert {row[0] for row in rows} == set(RESULTS)
    for label, seeds, *cells in rows:
        for task, cell in zip(("classification", "generation"), cells, strict=True):
            method = RESULTS[label]
            poison = 0.0 if method == "aligned" else 0.1
            runs = [r for r in results if (r["task"], r["method"], r["poison"]) == (task, method, poison)]
            assert str(len(runs)) in seeds.split(" and "), (label, task)
            for key, shown in zip(("harmfulness", "over_refusal", "accuracy"), cell.split(" / "), strict=True):
                mean = 100 * sum(run[key] for run in runs) / len(runs)
                assert abs(mean - int(shown)) <= 0.5 + 1e-9, (label, task, key, mean)
