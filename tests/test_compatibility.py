"""docs/compatibility.md is kept true: every row names tests that exist, on the machine it says."""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
TABLE = TESTS.parent / "docs" / "compatibility.md"
FAMILIES = (TESTS / "families.py").read_text()  # cases of several tests
ROW = re.compile(r"^\| (?P<what>[^|]+?) *\| (?P<status>[^|]+?) *\| (?P<tests>[^|]+?) *\|$", re.MULTILINE)


def rows():
    text = TABLE.read_text()
    found = [match.groupdict() for match in ROW.finditer(text)]
    return [row for row in found if row["status"] not in ("status", "---") and set(row["what"]) != {"-"}]


def named_tests(row):
    return re.findall(r"`(test_\w+)::(test_\w+)(?:\[([^\]`]+)\])?`", row["tests"])


@pytest.mark.parametrize("row", rows(), ids=lambda row: row["what"])
def test_a_row(row):
    assert row["status"].split(" ")[0] in ("supported", "refused", "GPU"), row["status"]
    tests = named_tests(row)
    assert tests, f"{row['what']} names no test"
    for file, name, case in tests:
        source = (TESTS / f"{file}.py").read_text()
        functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
        function = next((node for node in functions if node.name == name), None)
        assert function is not None, f"{file}.py has no {name}"
        if case:
            assert f'"{case}"' in source + FAMILIES, f"{file}.py has no case {case!r}"
            assert any("parametrize" in ast.unparse(mark) for mark in function.decorator_list)
        on_gpu = "pytest.mark.gpu" in source[: source.index("def ")] or any(
            "mark.gpu" in ast.unparse(mark) for mark in function.decorator_list
        )
        assert on_gpu == (row["status"] == "GPU"), f"{name}: a row that only a GPU shows says so"


def test_the_table_speaks_of_everything_that_is_parametrized():
    """A case added to these lists of cases has to get its row."""
    text = TABLE.read_text()
    import families
    import test_gpu
    import test_lora_kinds
    import test_trainers

    lists = {
        "test_families::test_every_lora_layer_finds_its_direction": families.FAMILIES,
        "test_trainers::test_a_feature": test_trainers.FEATURES,
        "test_lora_kinds::test_the_penalty_is_that_of_the_dense_change": test_lora_kinds.KINDS,
        "test_lora_kinds::test_refused_kinds": test_lora_kinds.REFUSED,
        "test_lora_kinds::test_other_trained_weights_are_uncovered": test_lora_kinds.UNCOVERED,
        "test_gpu::test_the_penalty_counts_once": test_gpu.FEATURES,
    }
    missing = [f"{test}[{case}]" for test, cases in lists.items() for case in cases if f"`{test}[{case}]`" not in text]
    assert not missing
