"""The arrows of import point one way: a module imports only what stands above it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import axolotl_asft

SOURCE = Path(axolotl_asft.__file__).parent
ORDER = [
    "errors", "files", "report.drawing", "picture", "redaction", "yaml_config", "strengths", "evaluation.refusals",
    "evaluation.shares", "evaluation.task_scores",
    "penalty", "subspace", "moments", "naming", "hub", "tensor_files", "checkpoint", "fingerprint", "spec",
    "direction", "initialisation", "packing", "tokens", "metrics", "lora", "matching", "saved",
    "sources", "readahead", "partial", "devices", "rank_rule", "extract", "verify",
    "sharding", "layer_groups", "adapter", "diagnostics", "stamp", "history", "adapter_folder", "project", "engines",
    "templates", "prompt_formats", "general_formats", "answer_data", "data_frames", "quiet", "anchor", "anchored",
    "step_gradient",
    "trained", "resuming", "settings", "constraint", "interruption", "attaching",
    "report.spectrum", "report.grid", "report.runs", "report.evaluation_results", "report.findings", "report.gather",
    "report.figures", "report.pictures", "report.page", "report.write",
    "args", "schema", "guard", "registration", "startup", "run_config", "run_data", "plugin", "summary",
    "spectra_chart", "compare", "publish", "console", "cost", "advice", "dry_run", "check_text", "recipes",
    "evaluation.rows", "evaluation.prompts", "evaluation.tasks.functions", "evaluation.generating",
    "evaluation.fitting", "evaluation.resizing", "evaluation.models",
    "evaluation.coherence", "evaluation.asked_in", "evaluation.judge_ways", "evaluation.judges", "evaluation.lm_tasks",
    "evaluation.asking",
    "evaluation.kept", "evaluation.evaluate", "evaluation.basin", "evaluation.basin_texts",
    "evaluation.safety_metrics", "evaluation.kept_metrics", "evaluation.landscape", "evaluation.landscape_chart",
    "demo.prompts", "demo.configs", "demo.model", "demo.score", "demo.run", "demo.chart",
    "cli_evidence", "cli_directions", "cli_configs", "cli_report", "cli", "__main__",
]  # fmt: skip


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def test_every_module_has_a_place():
    modules = {".".join(path.relative_to(SOURCE).with_suffix("").parts) for path in SOURCE.rglob("*.py")}
    assert modules - {"__init__", "demo.__init__", "evaluation.__init__", "report.__init__"} == set(ORDER)


@pytest.mark.parametrize("module", ORDER)
def test_a_module_imports_only_what_stands_above_it(module):
    below = ORDER[ORDER.index(module) :]
    if module == "demo.chart":
        below = []  # run imports it lazily, it names run's result in an annotation
    if module == "demo.run":
        below = [other for other in below if other != "demo.chart"]
    mine = imports(SOURCE / f"{module.replace('.', '/')}.py")
    assert not {f"axolotl_asft.{other}" for other in below} & mine


@pytest.mark.parametrize("module", ORDER)
def test_only_the_plugin_and_the_readers_of_configs_import_axolotl(module):
    names = {name.partition(".")[0] for name in imports(SOURCE / f"{module.replace('.', '/')}.py")}
    assert ("axolotl" in names) == (module in ("plugin", "run_config", "run_data"))


@pytest.mark.parametrize("module", ["penalty", "subspace", "moments"])
def test_the_maths_knows_torch_alone(module):
    names = {name.partition(".")[0] for name in imports(SOURCE / f"{module}.py")}
    assert names <= {"torch", "math", "dataclasses", "collections", "functools"}


def test_what_reads_files_waits_for_no_library_of_models():
    """transformers and PEFT cost seconds, which an error in the arguments need not."""
    homes = ["saved", "project", "diagnostics", "compare", "report.gather", "evaluation.models", "evaluation.judges"]
    imports = "; ".join(f"import axolotl_asft.{home}" for home in homes)
    code = f"import sys; {imports}; print(sorted({{'peft', 'transformers', 'lm_eval', 'axolotl'}} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_files_stay_readable():
    long = {path.name: count for path in SOURCE.rglob("*.py") if (count := len(path.read_text().splitlines())) > 330}
    assert not long
