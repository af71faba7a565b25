"""The start-up hook: cheap, silent, and in place before axolotl looks for its plugins."""

import importlib
import importlib.util
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
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


@pytest.fixture
def waited_for(tmp_path, monkeypatch):
    """A module, and a finder that waits for it to put `guard.resolve_plugin_name` around its value."""
    from axolotl_asft.startup import _Finder

    finder = _Finder()
    finder.waiting = {"waited_for": ("value", "guard", "resolve_plugin_name")}
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "waited_for.py").write_text("value = 'asft'")
    yield tmp_path / "waited_for.py"
    sys.modules.pop("waited_for", None)


def test_a_module_that_was_only_looked_for_is_waited_for_still(waited_for):
    """`importlib.util.find_spec` says whether a package is there; other tools ask it before they import."""
    for _ in range(2):
        assert importlib.util.find_spec("waited_for").origin == str(waited_for)
    assert importlib.import_module("waited_for").value == "axolotl_asft.AsftPlugin"


def test_a_module_that_failed_is_waited_for_still(waited_for):
    waited_for.write_text("1 / 0")
    with pytest.raises(ZeroDivisionError):
        importlib.import_module("waited_for")
    waited_for.write_text("value = 'asft'")
    importlib.invalidate_caches()
    assert importlib.import_module("waited_for").value == "axolotl_asft.AsftPlugin"


def test_a_finder_that_looks_again_from_within(waited_for, monkeypatch):
    """As ours once did: a look-up inside a look-up ends, and the module is wrapped once."""

    class Again:
        is_looking = False

        def find_spec(self, fullname, path=None, target=None):
            if fullname != "waited_for" or self.is_looking:
                return None
            self.is_looking = True
            try:
                return importlib.util.find_spec(fullname)
            finally:
                self.is_looking = False

    wrapped = []
    monkeypatch.setattr("axolotl_asft.guard.resolve_plugin_name", lambda name: wrapped.append(name) or name)
    monkeypatch.setattr(sys, "meta_path", [sys.meta_path[0], Again(), *sys.meta_path[1:]])
    importlib.import_module("waited_for")
    assert wrapped == ["asft"]


def test_the_guard_is_there_after_a_look_up(tmp_path):
    code = (
        "from importlib.util import find_spec; find_spec('axolotl.utils.config'); import axolotl.utils.config as c; "
        "print(c.validate_config.__code__.co_filename)"
    )
    assert python(code).endswith("axolotl_asft/guard.py")


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


def test_a_run_without_the_hook_hears_of_it(monkeypatch, caplog, pair, direction_file):
    """Under --target and PYTHONPATH the .pth line is not read: the plugin works, what guards other runs does not."""
    from axolotl.utils.dict import DictDefault

    from axolotl_asft import AsftPlugin
    from axolotl_asft.startup import _Finder

    cfg = DictDefault({
        "base_model": str(pair[1]), "adapter": "lora", "plugins": ["axolotl_asft.AsftPlugin"],
        "asft": {"direction": str(direction_file)},
    })  # fmt: skip
    AsftPlugin().register(cfg)
    assert "did not read axolotl_asft.pth" not in caplog.text
    monkeypatch.setattr(sys, "meta_path", [finder for finder in sys.meta_path if not isinstance(finder, _Finder)])
    AsftPlugin().register(cfg)
    assert "did not read axolotl_asft.pth" in caplog.text
