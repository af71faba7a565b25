"""The package as it is installed: wheel and editable, in clean environments."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from tiny import ENVIRONMENT, write_config

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module", params=["wheel", "editable"])
def environment(request, distributions, tmp_path_factory) -> Path:
    """A fresh virtual environment with the package alone; its dependencies are seen through a path line."""
    folder = tmp_path_factory.mktemp(request.param)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    source = [str(next(distributions.glob("*.whl")))] if request.param == "wheel" else ["-e", str(ROOT)]
    # Dependencies are shared: a path line adds the folder itself, and none of the .pth files in it.
    site_packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    (site_packages / "zz_dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--force-reinstall"]
    subprocess.run([str(python), "-m", "pip", "install", *options, *source], check=True)
    return python


def run(python: Path, *arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(python), *arguments],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        check=True,
        **options,
    )


def test_what_the_wheel_carries(distributions):
    wheel = next(distributions.glob("*.whl"))
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"axolotl_asft.pth", "axolotl_asft.start", "axolotl_asft/py.typed"} <= names
    for config in (ROOT / "example_configs").glob("*.yml"):
        assert f"axolotl_asft/example_configs/{config.name}" in names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/"))]
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {f"axolotl_asft/report/page.{kind}" for kind in ("html", "css", "js")} <= names
    assert wheel.stat().st_size < 2_000_000


def test_what_the_source_distribution_carries(distributions):
    archive = next(distributions.glob("*.tar.gz"))
    with tarfile.open(archive) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "startup/axolotl_asft.pth", "tests/tiny.py"} <= names


def test_the_version_is_in_one_place(environment):
    code = "import importlib.metadata as m, axolotl_asft as a; print(m.version('axolotl-asft') == a.__version__)"
    assert run(environment, "-c", code).stdout.strip() == "True"


def test_the_short_name_works_when_installed(environment):
    code = "from axolotl.integrations.base import load_plugin; print(load_plugin('asft').get_input_args())"
    assert "axolotl_asft.args.AsftPluginArgs" in run(environment, "-c", code).stdout


def test_the_commands_work_when_installed(environment, direction_file):
    assert "extract" in run(environment, "-m", "axolotl.cli.main", "asft", "--help").stdout
    assert "sha256" in run(environment, "-m", "axolotl_asft", "inspect", str(direction_file)).stdout


def test_the_recipes_are_there_when_installed(environment, tmp_path):
    names = {path.stem for path in (ROOT / "example_configs").glob("*.yml")}
    listed = run(environment, "-m", "axolotl_asft", "recipes", "list", cwd=tmp_path).stdout
    assert {line.split()[0] for line in listed.splitlines()} == names


@pytest.mark.slow
def test_a_run_trains_when_installed(environment, pair, dataset, direction_file, tmp_path):
    config = write_config(tmp_path, pair[1], dataset, {"direction": str(direction_file)}, max_steps=2)
    result = run(environment, "-m", "axolotl.cli.train", str(config), cwd=tmp_path)
    assert "14 layers constrained" in result.stdout + result.stderr
