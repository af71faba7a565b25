"""The start-up hook: cheap, silent, and in place before axolotl looks for its plugins."""

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from tiny import ENVIRONMENT

ROOT = Path(__file__).parent.parent


def python(code: str, *flags: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, *flags, "-c", code],
        env={**os.environ, **ENVIRONMENT, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout.strip()


def test_every_interpreter_has_the_hook_and_nothing_heavy():
    code = "import sys; print([type(f).__module__ for f in sys.meta_path], [m for m in sys.modules if 'asft' in m])"
    printed = python(code)
    assert "axolotl_asft.startup" in printed
    assert python("import sys; print('torch' in sys.modules, 'axolotl' in sys.modules)") == "False False"


def test_it_costs_under_a_millisecond(tmp_path):
    """What the line in the .pth file does, timed inside fresh interpreters that start without it."""
    line = (ROOT / "startup" / "axolotl_asft.pth").read_text().strip()
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import time; start = time.perf_counter(); "
        f"exec({line!r}); print((time.perf_counter() - start) * 1e3)"
    )
    cached = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(tmp_path)}  # as pip leaves an installation
    python(code, "-S", **cached)
    milliseconds = [float(python(code, "-S", **cached)) for _ in range(15)]
    print(f"start-up hook: median {statistics.median(milliseconds):.2f} ms, best {min(milliseconds):.2f} ms")
    assert min(milliseconds) < 1.0, milliseconds


def test_a_look_up_costs_next_to_nothing():
    from axolotl_asft.startup import _Finder

    finder = _Finder()
    start = time.perf_counter()
    for _ in range(10_000):
        finder.find_spec("some.module")
    assert (time.perf_counter() - start) / 10_000 < 5e-6


def test_the_line_survives_a_missing_package():
    line = (ROOT / "startup" / "axolotl_asft.pth").read_text().strip()
    assert python(f"exec({line!r}); print('fine')", "-S", "-I") == "fine"


def test_start_file_names_a_callable():
    """PEP 829: from Python 3.15 on, `module:callable` lines in a .start file."""
    module, _, function = (ROOT / "startup" / "axolotl_asft.start").read_text().strip().partition(":")
    assert (
        python(
            f"import {module} as m; m.{function}(); m.{function}(); import sys; print("
            "sum('axolotl_asft' in type(f).__module__ for f in sys.meta_path))"
        )
        == "1"
    )


def test_axolotl_loads_the_plugin_by_each_of_its_names():
    names = ["asft", "axolotl_asft.AsftPlugin", "axolotl_asft.plugin.AsftPlugin"]
    code = f"from axolotl.integrations.base import load_plugin; print([type(load_plugin(n)).__name__ for n in {names}])"
    assert python(code).endswith(str(["AsftPlugin"] * 3))


def test_our_commands_leave_standard_output_to_programs(direction_file):
    import json

    command = [sys.executable, "-m", "axolotl.cli.main", "asft", "inspect", str(direction_file), "--json"]
    result = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, check=True)
    assert len(json.loads(result.stdout)["modules"]) == 14
