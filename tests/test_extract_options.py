"""Options of `axolotl asft extract` that would do nothing: refused in a line, before any file is looked at."""

import pytest
import yaml
from click.testing import CliRunner

from axolotl_asft.cli import asft

MISTAKES = {
    "--prompts mine.txt": "--prompts goes with --metric; add --metric fisher, or leave it out",
    "--prompts harmful": "--prompts goes with --metric; add --metric fisher, or leave it out",
    "--load-in-4bit": "--load-in-4bit goes with --metric; add --metric fisher, or leave it out",
    "--metric-rank 8": "--metric-rank goes with --metric; add --metric fisher, or leave it out",
    "--metric-energy 0.5": "--metric-energy goes with --metric; add --metric fisher, or leave it out",
    "--batch-size 2": "--batch-size goes with --metric; add --metric fisher, or leave it out",
    "--tolerance 0.1": "--tolerance goes with --rank auto, but the rank is 64; add --rank auto",
    "--energy 0.5": "--energy goes with --rank auto, but the rank is 64; add --rank auto",
    "--rank full --max-rank 8": "--max-rank goes with --rank auto, but the rank is full; add --rank auto",
    "--rank auto --energy 0.5 --tolerance 0.1": "--tolerance and --energy both set how many directions are kept; give "
    "only one",
}


@pytest.mark.parametrize("options", MISTAKES)
def test_an_option_that_would_do_nothing(options, tmp_path):
    arguments = ["--base", "/no/base", "--aligned", "/no/aligned", "-o", str(tmp_path / "d.safetensors")]
    refused = CliRunner().invoke(asft, ["extract", *arguments, *options.split()])
    assert (refused.exit_code, refused.stderr) == (2, f"asft: {MISTAKES[options]}\n")


@pytest.mark.parametrize("name", ["d.safetensors", "a: b #c.safetensors"])
def test_what_is_printed_is_yaml(pair, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    arguments = ["--base", str(pair[0]), "--aligned", str(pair[1]), "-o", name, "--rank", "2"]
    printed = CliRunner().invoke(asft, ["extract", *arguments]).stdout.partition("Use it:\n")[2]
    assert yaml.safe_load(printed.partition("\n\n")[0]) == {"plugins": ["asft"], "asft": {"direction": name}}
    assert ("direction: d.safetensors\n" in printed) == (name == "d.safetensors")


@pytest.mark.parametrize(
    "options",
    [
        "",
        "--metric fisher --prompts harmful --load-in-4bit --metric-rank 8 --metric-energy 1 --batch-size 2",
        "--rank auto --tolerance 0.1 --max-rank 8",
        "--rank auto --energy 0.5",
    ],
)
def test_what_goes_together_goes_on_to_the_models(options, tmp_path):
    arguments = ["--base", "/no/base", "--aligned", "/no/aligned", "-o", str(tmp_path / "d.safetensors")]
    refused = CliRunner().invoke(asft, ["extract", *arguments, *options.split()])
    assert refused.stderr.startswith("asft: no checkpoint folder at /no/base")
