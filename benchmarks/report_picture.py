"""docs/report.png: the report of one run of the safety benchmark under the default, beside the same run without it.

    python -m benchmarks.safety prepare --work safety-bench
    python -m benchmarks.report_picture --work safety-bench

Trains both, once, logging every step, and shows the first screen of `axolotl asft report` in Chromium.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from axolotl_asft.errors import AsftError
from benchmarks.safety import HERE, SETTINGS, Bench, Run, trained
from benchmarks.safety_table import DEFAULT

PICTURE = HERE.parent / "docs" / "report.png"
STRENGTHS = {"report-asft": {}, "report-plain": {"lambda_reg": 0, "anchor_weight": 0}}  # in place of the default's
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
WIDTH, HEIGHT = 1145, 1650


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("safety-bench"), help="folder of benchmarks.safety")
    work = parser.parse_args().work.resolve()
    browser = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if browser is None:
        raise SystemExit(f"none of {', '.join(CHROMIUM)} is installed; the picture needs one")
    settings = yaml.safe_load(SETTINGS.read_text())
    block, every_step = settings["methods"][DEFAULT]["asft"], {"logging_steps": 1}
    methods = {name: {"asft": block | changes, "training": every_step} for name, changes in STRENGTHS.items()}
    bench = Bench(settings | {"methods": methods}, work)
    asft, plain = (trained(bench, Run("classification", 0.1, method, 0))[0] for method in methods)
    page = work / "report-picture" / "report.html"
    page.parent.mkdir(exist_ok=True)
    report = [sys.executable, "-m", "axolotl_asft", "report", str(asft), "--compare", f"plain={plain}", "-o", str(page)]
    subprocess.run(report, check=True)
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
    show = [f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={PICTURE}", page.as_uri()]
    subprocess.run([browser, *options, *show], check=True, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    try:
        main()
    except AsftError as error:
        raise SystemExit(f"asft: {error}") from error
