"""`axolotl asft report`: the numbers behind it, the page in a real browser, and what is refused."""

import itertools
import json
import os
import re
import shutil
import time
from pathlib import Path

import pytest
import torch
from browser import CHROMIUM, browser
from click.testing import CliRunner
from tiny import write_config
from trainers import make_trainer

from axolotl_asft import AlignmentDirection, attach
from axolotl_asft.cli import asft
from axolotl_asft.cli_report import report_command
from axolotl_asft.direction import file_sha256
from axolotl_asft.errors import AsftError
from axolotl_asft.history import HISTORY_FILE, HistoryWriter, read_history
from axolotl_asft.report.figures import spectrum_panels, training_panels
from axolotl_asft.report.findings import multiple, number, percent
from axolotl_asft.report.gather import gather
from axolotl_asft.report.grid import Grid
from axolotl_asft.report.page import page
from axolotl_asft.report.spectrum import update_spectrum
from axolotl_asft.report.write import draw_training_picture

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium or google-chrome on PATH")
KEPT = "asft-eval/results.json"  # in a run's folder
HOSTILE = "<script>complain()</script>$x_1^{"


def shares(value: float) -> dict:
    return {"value": value, "low": max(0.0, value - 0.1), "high": min(1.0, value + 0.1), "n": 40}


def results(run: Path) -> dict:
    """As `axolotl asft eval` writes them."""
    rows, sha256 = [], file_sha256(run / "adapter_model.safetensors")
    for name, adapter, harmful in (("model", None, 0.1), ("asft", run, 0.15), ("plain", "elsewhere", 0.95)):
        rows.append(
            {
                "name": name, "adapter": adapter and str(adapter), "adapter_sha256": sha256 if adapter is run else None,
                "harmfulness": {"harmful": shares(harmful)},
                "over_refusal": {"borderline": shares(0.2)}, "judged": {}, "perplexity": 8.0, "repetitive": shares(0),
                "empty": shares(0), "tasks": {"gsm8k": {"exact_match": 0.5, "exact_match_stderr": 0.05}}, "seconds": 1,
            }
        )  # fmt: skip
    return {"model": "m", "questions": {}, "rows": rows, "version": "0"}


def keep(run: Path, found: object) -> None:
    """Where `axolotl asft eval config.yml` does."""
    (run / KEPT).parent.mkdir(exist_ok=True)
    (run / KEPT).write_text(json.dumps(found))


@pytest.fixture(scope="module")
def folders(pair, rows, direction_file, tmp_path_factory) -> tuple[Path, Path]:
    """A constrained run of 8 steps and an unconstrained one, as trainers leave them; an evaluation of both."""
    folder = tmp_path_factory.mktemp("runs")
    for name, lambda_reg in (("asft", 20.0), ("plain", 0.0)):
        trainer = make_trainer(pair, rows, folder / name, max_steps=8)
        constraint = attach(trainer, AlignmentDirection.load(direction_file), lambda_reg, projector="subspace")
        config = {"base_model": "tiny", "asft": {"direction": str(direction_file)}, "wandb_api_key": "s3cr3t"}
        constraint.history.header["config"] = config
        trainer.train()
        trainer.save_model()
    keep(folder / "asft", results(folder / "asft"))
    return folder / "asft", folder / "plain"


@pytest.fixture
def run(folders, tmp_path) -> Path:
    """A copy of the constrained run, to be damaged."""
    return Path(shutil.copytree(folders[0], tmp_path / "run"))


def rewrite(run: Path, change) -> None:
    """Change header and lines of a run's history."""
    header, *lines = map(json.loads, (run / HISTORY_FILE).read_text().splitlines())
    change(header, lines)
    (run / HISTORY_FILE).write_text("".join(json.dumps(entry) + "\n" for entry in [header, *lines]))


def stamp(run: Path, **changes) -> None:
    path = run / "adapter_config.json"
    config = json.loads(path.read_text())
    config["asft"] |= changes
    path.write_text(json.dumps(config))


def words(text: str) -> str:
    return text.replace("\u00a0", " ")


@pytest.fixture(scope="module")
def drawn(folders, tmp_path_factory) -> Path:
    """The page, drawn by the command."""
    output = tmp_path_factory.mktemp("drawn") / "report.html"
    options = ["--compare", f"plain={folders[1]}", "-o", str(output)]
    result = CliRunner().invoke(asft, ["report", str(folders[0]), *options])
    assert result.exit_code == 0, result.output
    return output


def test_the_spectrum_is_that_of_the_dense_update():
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(5, 30, generator=generator), torch.randn(40, 5, generator=generator)
    U, _ = torch.linalg.qr(torch.randn(40, 6, generator=generator))
    found = update_spectrum(A, B, 0.5, U)
    dense = 0.5 * B.double() @ A.double()
    left, values, _ = torch.linalg.svd(dense, full_matrices=False)
    assert found.values == pytest.approx(values[:5].tolist(), rel=1e-5)
    assert found.inside == pytest.approx((U.double().T @ left[:, :5]).square().sum(0).tolist(), rel=1e-4, abs=1e-6)
    assert found.share == pytest.approx(float((U.double().T @ dense).norm() ** 2 / dense.norm() ** 2), rel=1e-5)
    assert found.chance == 6 / 40


def test_updates_inside_and_outside_the_subspace():
    generator = torch.Generator().manual_seed(1)
    Q, _ = torch.linalg.qr(torch.randn(24, 12, generator=generator))
    A = torch.randn(3, 10, generator=generator)
    mix = torch.randn(6, 3, generator=generator)
    assert update_spectrum(A, Q[:, :6] @ mix, 1.0, Q[:, :6]).share == pytest.approx(1.0, abs=1e-5)
    assert update_spectrum(A, Q[:, 6:] @ mix, 1.0, Q[:, :6]).share == pytest.approx(0.0, abs=1e-5)
    assert update_spectrum(A, torch.zeros(24, 3), 1.0, Q[:, :6]).share == 0.0
    assert update_spectrum(1e25 * A, 1e25 * Q[:, :3], 1.0, Q[:, :6]).share == pytest.approx(1.0), "of a run gone wild"
    wide = update_spectrum(torch.randn(16, 10, generator=generator), torch.randn(8, 16, generator=generator), 1.0, None)
    assert len(wide.values) == 8, "a rank above the smaller side"


def test_names_become_a_grid():
    grid = Grid.of(["model.layers.2.mlp.up_proj", "model.layers.10.mlp.up_proj", "model.layers.10.attn.q"])
    assert (grid.kinds, grid.layers) == (("mlp.up_proj", "attn.q"), (2, 10))
    assert str(grid.fill([1.0, 2.0, None])) == "[[1.0, 2.0], [nan, nan]]"
    experts = Grid.of([f"model.layers.0.mlp.experts.{i}.up" for i in range(3)])
    assert experts.kinds == ("mlp.experts.*.up",)
    assert experts.fill([1.0, 3.0, 2.0]) == [[3.0]]
    towers = Grid.of(["vision.blocks.0.q", "model.layers.0.q", "lm_head"])
    assert towers.kinds == ("vision.blocks: q", "model.layers: q", "lm_head")
    assert Grid.of(["h.0"]).kinds == ("h",)


def test_words_for_numbers():
    assert [percent(x).replace("\u00a0", " ") for x in (1e-17, 0.0001, 0.0123, 0.5, 1)] == [
        "0 %", "under 0.1 %", "1.2 %", "50 %", "100 %",
    ]  # fmt: skip
    assert [number(x) for x in (0, 0.000123, 0.0123, 1.2345, 123.4, 54321, 1e9, None, float("nan"))] == [
        "0", "0.000123", "0.0123", "1.23", "123", "54,321", "1.00e+09", "none", "none",
    ]  # fmt: skip
    assert multiple(2.5).replace("\u00a0", " ") == "2.50 times"


def test_the_command_writes_a_page_and_pictures(drawn, folders):
    text = drawn.read_text()
    assert [path.name for path in sorted(drawn.parent.iterdir())] == [
        "report.html", "report_layers.png", "report_spectrum.png", "report_training.png",
    ]  # fmt: skip
    assert all(path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for path in drawn.parent.glob("*.png"))
    history, stamp = read_history(folders[0]), json.loads((folders[0] / "adapter_config.json").read_text())["asft"]
    assert multiple(history.lines[-1]["asft/max_drift"]) in text
    assert stamp["direction_sha256"] in text
    assert "s3cr3t" not in text
    assert "[redacted]" in text
    assert "Harmful prompts not refused: 10\u00a0% before, 15\u00a0% after this run, 95\u00a0% under plain" in text
    assert "What is left out" not in text


@pytest.mark.parametrize(
    ("model", "title"),
    [("/home/somebody/models/aligned", "aligned"), ("./aligned", "aligned"), ("owner/model@main", "owner/model@main")],
)
def test_the_title_names_a_folder_alone(run, model, title):
    rewrite(run, lambda header, lines: header["config"].update(base_model=model))
    text = page(gather(run))
    assert f"AsFT training report · {title}<" in text
    assert f"· {title}</title>" in text


def test_a_compared_run_without_a_log(run, tmp_path):
    plain = shutil.copytree(run, tmp_path / "plain")
    (plain / HISTORY_FILE).unlink()
    report = gather(run, {"silent": plain})
    assert [note for note in report.notes if "silent has no curves: its folder holds neither" in note]
    legend = re.search(r'<ul class="legend">.*?</ul>', page(report), re.S)
    assert legend
    assert "this run" in legend[0]
    assert "silent" not in legend[0]


def test_an_evaluation_that_was_asked_from_another_folder(folders, tmp_path):
    found = results(folders[0])
    found["rows"][1]["adapter"] = f"{folders[0].parent.name}/{folders[0].name}"
    (tmp_path / "results.json").write_text(json.dumps(found))
    evaluation = gather(folders[0], evaluation=tmp_path).evaluation
    assert [point.role for point in evaluation.measures[0].points] == ["before", "this", "other"]
    scores = evaluation.measures[-1].points
    assert (scores[0].low, scores[0].high) == pytest.approx((0.5 - 1.96 * 0.05, 0.5 + 1.96 * 0.05), abs=1e-5)


def test_a_run_to_compare_with_may_have_an_equals_sign_in_its_folder(folders, tmp_path):
    """As sweeps name theirs."""
    other = Path(shutil.copytree(folders[1], tmp_path / "lr=1e-4"))
    compare = ["--compare", str(other), "--compare", f"slow={other}", "--compare", f"plain={folders[1]}"]
    result = CliRunner().invoke(asft, ["report", str(folders[0]), "--json", "-o", str(tmp_path / "x.html"), *compare])
    assert result.exit_code == 0, result.output
    assert set(json.loads(result.stdout)["compared"]) == {"lr=1e-4", "slow", "plain"}


def test_json_for_programs(folders, tmp_path):
    result = CliRunner().invoke(
        asft, ["report", str(folders[0]), "--json", "-o", str(tmp_path / "x.html"), "--compare", str(folders[1])]
    )
    found = json.loads(result.stdout)
    lines = read_history(folders[0]).lines
    assert found["numbers"]["steps"] == 8
    assert found["numbers"]["loss_last"] == lines[-2]["loss"]
    assert found["numbers"]["max_drift"] == lines[-1]["asft/max_drift"]
    assert set(found["compared"]) == {"plain"}
    assert found["compared"]["plain"]["update_norm"] > found["numbers"]["update_norm"]
    assert 0 < found["aligned_share_by_chance"] < found["aligned_share"] <= 1
    assert [Path(file).exists() for file in found["files"]] == [True] * 4


def test_the_docs_list_every_option():
    text = (Path(__file__).parent.parent / "docs" / "report.md").read_text()
    options = {option for parameter in report_command.params for option in parameter.opts if option[:1] == "-"}
    listed = set(re.findall(r"^\| `(-[\w-]+)", text, flags=re.MULTILINE))
    assert listed == options - {"--output"}
    assert f"`{HISTORY_FILE}`" in text


@needs_browser
def test_the_page_in_a_browser(drawn):
    with browser() as tab:
        tab.open(drawn)
        cells = "[...document.querySelectorAll('#heat b')].map((cell) => cell.style.getPropertyValue('--v'))"
        colour = "getComputedStyle(document.querySelectorAll('#heat b')[9]).backgroundColor"
        assert tab.ask("document.querySelectorAll('figure svg path').length") > 50
        assert tab.ask("document.querySelectorAll('#heat b').length") == 14
        at_the_end, shade = tab.ask(cells), tab.ask(colour)
        tab.ask("document.getElementById('time').focus()")
        tab.press("Home")
        assert tab.ask("document.getElementById('time-shown').textContent") == "step 1"
        assert tab.ask(cells) != at_the_end
        assert tab.ask(colour) != shade
        tab.press("End")
        assert (tab.ask(cells), tab.ask(colour)) == (at_the_end, shade)
        tab.click(".choice label:nth-child(2)")
        assert tab.ask("document.querySelector('.choice input:checked').value") == "drift"
        assert tab.ask(cells) != at_the_end
        tab.move_to("#heat b")
        assert tab.ask("document.getElementById('readout').textContent").startswith("layer 0, self_attn.q_proj: ")
        tab.click("#play")
        tab.ask("new Promise((done) => setInterval(() => play.textContent === 'Play' && done(1), 50))")
        assert tab.ask("document.getElementById('time').value") == "7", "the last of 8 frames"
        tab.move_to("#share b")
        assert "times chance" in tab.ask("document.getElementById('share-readout').textContent")
        assert tab.complaints == []


@needs_browser
def test_the_page_fits_every_screen(drawn):
    with browser() as tab:
        for width, dark in itertools.product((320, 390, 800, 1600), (False, True)):
            tab.open(drawn, width, dark=dark)
            assert tab.ask("document.documentElement.scrollWidth") <= width
            light = sum(json.loads(f"[{tab.ask('getComputedStyle(document.body).backgroundColor')[4:-1]}]")) > 380
            assert light != dark
        assert tab.complaints == []


@needs_browser
def test_what_came_from_files_is_text(run, tmp_path):
    """A run folder from a stranger: no name or value of it becomes markup or script."""
    path = run / HISTORY_FILE
    header, *lines = path.read_text().splitlines()
    content = json.loads(header)
    content["layers"][0] = f"model.layers.0.{HOSTILE}"
    content["config"] |= {"base_model": HOSTILE, "note": f"</pre>{HOSTILE}"}
    content |= {"device": HOSTILE, "versions": {HOSTILE: HOSTILE}}
    path.write_text("\n".join([json.dumps(content), *lines]) + "\n")
    evaluation = results(run)
    evaluation["rows"][2]["name"] = evaluation["rows"][1]["name"] = HOSTILE
    evaluation["rows"][0]["harmfulness"][HOSTILE] = shares(0.5)
    keep(run, evaluation)
    output = tmp_path / "hostile.html"
    other = shutil.copytree(run, tmp_path / "other")
    result = CliRunner().invoke(asft, ["report", str(run), "-o", str(output), "--compare", f"{HOSTILE}={other}"])
    assert result.exit_code == 0, result.output
    with browser() as tab:
        tab.open(output)
        assert tab.ask("[...document.scripts].map((script) => script.type)") == ["application/json"] * 2 + [""]
        assert HOSTILE in tab.ask("document.querySelector('#heat').innerText")
        assert HOSTILE in tab.ask("document.querySelector('#reproduce').textContent")
        assert tab.complaints == []


def test_a_page_without_the_direction_says_so(run):
    path = run / HISTORY_FILE
    header, *lines = path.read_text().splitlines()
    content = json.loads(header)
    content["config"]["asft"]["direction"] = "/gone/direction.safetensors"
    path.write_text("\n".join([json.dumps(content), *lines]) + "\n")
    report = gather(run)
    assert report.direction is None
    assert report.run.spectra
    (note,) = report.notes
    assert "no direction file at /gone/direction.safetensors" in note
    text = page(report)
    assert "--direction FILE adds it" in text
    assert "times what chance" not in text


@pytest.mark.parametrize(
    ("change", "left_out"),
    [
        (lambda run: (run / HISTORY_FILE).unlink(), "the heat map is left out"),
        (lambda run: (run / "adapter_model.safetensors").unlink(), "No adapter_model.safetensors"),
        (lambda run: (run / "adapter_model.safetensors").write_bytes(b"x"), "singular values of the update are"),
    ],
)  # fmt: skip
def test_a_page_of_what_there_is(run, direction_file, change, left_out):
    change(run)
    report = gather(run, direction=direction_file)
    assert any(left_out in note for note in report.notes)
    assert left_out in page(report)


def test_a_checkpoint_is_told_from_a_run(run):
    checkpoint = Path(shutil.copytree(run, run.parent / "checkpoint-8")).rename(run / "checkpoint-8")
    (checkpoint / HISTORY_FILE).unlink()
    with pytest.raises(
        AsftError, match=f"checkpoint-8 is a checkpoint, which has no history; give .* {run.resolve()}$"
    ):
        gather(checkpoint)
    (run / HISTORY_FILE).unlink()
    (note,) = (note for note in gather(checkpoint).notes if "heat map" in note)
    assert note.startswith(f"No {HISTORY_FILE}: the run was trained by an earlier version")


NUMBERS = ("asft/penalty", "asft/drift", "asft/update_norm", "asft/max_drift", "asft/penalty_peak")


@pytest.mark.parametrize("since", [1, 5])
def test_a_run_that_diverged(run, since):
    """Nothing of it reads as if it were safe: the trainer logs a loss of 0 then, and the numbers are null."""
    from safetensors.torch import load_file, save_file

    def diverge(_, lines):
        for line in (line for line in lines if line["step"] >= since):
            line |= dict.fromkeys(NUMBERS & line.keys()) | ({"loss": 0.0} if "loss" in line else {})
            line |= {"layers": {key: [None] * 14 for key in line["layers"]}} if "layers" in line else {}

    rewrite(run, diverge)
    stamp(run, drift=None, update_norm=None, penalty_peak=None)
    (run / KEPT).unlink()
    path = run / "adapter_model.safetensors"
    save_file({name: tensor * float("nan") for name, tensor in load_file(path).items()}, path)
    again = shutil.copytree(run, run.with_name("again"))
    result = CliRunner().invoke(asft, ["report", str(run), "--json", "--compare", f"again={again}"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout, parse_constant=pytest.fail)
    assert found["finding"] == f"The training diverged: from step {since} on, the update is not finite"
    assert found["diverged_at_step"] == since
    assert (run / "asft_report_training.png").exists() == (since > 1)
    draw_training_picture(run)
    ends = ("loss_last", "penalty_peak", "penalty_last", "update_norm", "drift", "max_drift")
    assert {found["numbers"][name] for name in ends} == {None}
    assert found["furthest_layer"] is None
    text = (run / "asft_report.html").read_text()
    assert "14 of the adapter&#39;s 14 layers hold numbers that are not finite (first model.layers.0." in text
    assert f"not finite<small>from step {since}</small>" in text
    for boast in ("fell from", "off the alignment direction</h3>", "0\u00a0%", "has moved yet", "peaked"):
        assert boast not in text
    assert ("until the training diverged in step 5" in text) == (since == 5)
    assert ("Layer by layer up to step 4, before the training diverged" in text) == (since == 5)


@pytest.mark.parametrize("number", [None, float("nan")])
def test_a_run_that_diverged_and_has_no_history(run, number):
    (run / HISTORY_FILE).unlink()
    stamp(run, drift=number, update_norm=number)
    found = gather(run).summary()
    assert found["finding"].startswith("The training diverged")
    assert found["constraint"]["update_norm"] is None


def test_one_bad_step_is_no_divergence(run):
    rewrite(run, lambda _, lines: lines[3].update({"asft/update_norm": None, "loss": None}))
    assert gather(run).run.diverged_at is None


@pytest.mark.parametrize("untouched", [6, 14])
def test_layers_that_alignment_did_not_touch_are_not_close_to_it(run, tmp_path, untouched):
    def no_yardstick(_, lines):
        for line in lines:
            if "layers" in line:
                line["layers"]["relative"][:untouched] = [None] * untouched
            if untouched == 14 and "asft/max_drift" in line:
                line["asft/max_drift"] = None

    rewrite(run, no_yardstick)
    output = tmp_path / "page.html"
    result = CliRunner().invoke(asft, ["report", str(run), "--json", "-o", str(output)])
    assert result.exit_code == 0, result.output
    found, text = json.loads(result.stdout), output.read_text()
    assert found["layers_without_yardstick"] == untouched
    if untouched == 14:
        assert found["finding"] == "The update moved only layers that alignment had not touched"
        assert found["furthest_layer"] is found["numbers"]["max_drift"] is None
        assert "<h2>No layer that alignment touched has moved</h2>" in text
    else:
        assert found["finding"].endswith(" moved, in the 8 of 14 layers that it touched")
        assert found["furthest_layer"]["relative"] <= 1.001 * found["numbers"]["max_drift"]
    assert f"Of {untouched} layers it is not known: alignment had not touched them" in text
    assert f"Alignment did not touch {untouched} of the layers, so that their cells are empty" in text


@needs_browser
def test_a_cell_says_that_alignment_did_not_touch_it(run, tmp_path):
    def no_yardstick(_, lines):
        for line in (line for line in lines if "layers" in line):
            line["layers"]["relative"] = [None] * 14

    rewrite(run, no_yardstick)
    (tmp_path / "page.html").write_text(page(gather(run)))
    with browser() as tab:
        tab.open(tmp_path / "page.html")
        tab.move_to("#heat b")
        told = tab.ask("document.getElementById('readout').textContent")
        assert told.startswith("layer 0, self_attn.q_proj: alignment did not touch it, ")
        tab.click(".choice label:nth-child(3)")
        assert tab.complaints == []


def test_no_drift_at_all_is_not_always_the_direction(run):
    """As earlier versions wrote it, of layers that alignment had not touched."""

    def zero(_, lines):
        for line in lines:
            line |= dict.fromkeys({"asft/max_drift"} & line.keys(), 0.0)

    rewrite(run, zero)
    assert gather(run).summary()["finding"] == "The update moved nothing that alignment had moved"
    rewrite(run, lambda _, lines: [line.update({"asft/drift": 0.0}) for line in lines])
    assert gather(run).summary()["finding"] == "The update never left the alignment direction"


@pytest.mark.parametrize(
    ("changes", "how"),
    [
        ({"metric": "fisher"}, "metric fisher, not weights"),
        ({"rank": 4, "projector": "paper"}, "rank 4, not all, projector paper, not subspace"),
        ({"direction_sha256": "0" * 64}, "another direction"),
        ({"lambda_reg": 3.0, "max_drift": 0.5}, None),
    ],
)
def test_what_was_measured_otherwise_is_not_compared(run, folders, tmp_path, changes, how):
    other = Path(shutil.copytree(folders[1], tmp_path / "other"))
    rewrite(other, lambda header, _: header["constraint"].update(changes))
    report = gather(run, {"other": other})
    numbers = report.summary()["compared"]["other"]
    text = words(page(report))
    assert numbers["update_norm"] > 0
    assert (numbers["max_drift"] is None) == (numbers["drift"] is None) == (how is not None)
    assert ("In other it was" in text) == (how is None)
    assert report.notes == ([f"The drift of other is left out: it was measured differently ({how})."] if how else [])
    panels = {panel.note: panel.draw.keywords["runs"] for panel in training_panels([report.run, *report.others])}
    assert len(panels["in units of what alignment moved it, by step"]) == (1 if how else 2)
    assert len(panels["loss of the task, by step"]) == 2


@pytest.mark.parametrize(("in_the_end", "in_lines", "peak"), [(3.0, 2.0, 3.0), (2.0, 3.0, 3.0), (None, 2.0, 2.0)])
def test_the_peak_of_a_resumed_run(run, in_the_end, in_lines, peak):
    """The last line may be of the resumed part alone, and the stamp of an earlier run."""

    def lower(_, lines):
        for line in lines:
            line |= {"asft/penalty": in_lines if line["step"] == 2 else 1.0}
        lines[-1]["asft/penalty_peak"] = in_the_end

    rewrite(run, lower)
    stamp(run, penalty_peak=77.0)
    assert gather(run).summary()["numbers"]["penalty_peak"] == peak


def test_without_a_history_the_peak_is_the_stamp_s(run):
    (run / HISTORY_FILE).unlink()
    stamp(run, penalty_peak=3.0)
    assert gather(run).summary()["numbers"]["penalty_peak"] == 3.0


def test_what_lies_there_of_an_earlier_run_does_not_speak_for_this_one(run):
    """Trained anew in the same folder, in which adapter, stamp and evaluation are replaced at the end alone."""
    stamp(run, drift=None, update_norm=None, penalty_peak=77.0, lambda_reg=20.0)
    writer = HistoryWriter(read_history(run).layers)
    writer.header["constraint"] = json.loads((run / "adapter_config.json").read_text())["asft"] | {"lambda_reg": 0.1}
    for name in ("drift", "update_norm", "penalty_peak"):
        del writer.header["constraint"][name]
    yesterday = time.time() - 86400
    os.utime(run / "adapter_model.safetensors", (yesterday, yesterday))
    writer.begin(run, 0, 3, [])
    found = gather(run).summary()
    assert found["diverged_at_step"] is None
    assert found["finding"] == "A run under the safety constraint"
    assert found["constraint"] == writer.header["constraint"]
    writer.add(1, 0.1, {"loss": 2.0, "asft/penalty": 0.01, "asft/update_norm": 0.5}, None, last=False)
    report = gather(run, evaluation=run / KEPT)
    found = report.summary()
    assert (found["numbers"]["penalty_peak"], found["diverged_at_step"]) == (0.01, None)
    assert report.run.spectra == {}
    assert found["aligned_share"] is None
    assert any("is older than this run" in note for note in report.notes)
    assert [point.role for point in report.evaluation.measures[0].points] == ["before", "other"]
    assert any("asft is left out: the adapter evaluated" in note for note in report.notes)
    writer.add(3, 0.3, {"train_loss": 2.0}, None, last=True)
    assert gather(run).run.spectra, "saved by this run, whatever a copy made of its time"


def test_training_anew_removes_all_that_was_drawn(run):
    result = CliRunner().invoke(asft, ["report", str(run), "--json"])
    files = [Path(file) for file in json.loads(result.stdout)["files"]]
    assert [file.is_file() for file in files] == [True] * 4
    HistoryWriter(read_history(run).layers).begin(run, 0, 3, [])
    assert [file for file in files if file.exists()] == []


def test_an_evaluation_of_another_adapter_is_not_this_run_s(run):
    from safetensors.torch import load_file, save_file

    found, path = results(run), run / "adapter_model.safetensors"
    keep(run, found)
    assert [point.role for point in gather(run).evaluation.measures[0].points] == ["before", "this", "other"]
    moved = Path(shutil.copytree(run, run.parent / "moved"))
    report = gather(moved)
    assert [point.role for point in report.evaluation.measures[0].points] == ["before", "this", "other"]
    assert report.notes == []
    save_file({name: 2 * tensor for name, tensor in load_file(path).items()}, path)  # trained anew
    report = gather(run)
    assert [point.role for point in report.evaluation.measures[0].points] == ["before", "other"]
    note = f"{run / KEPT}: asft is left out: the adapter evaluated was not this run's"
    assert report.notes == [f"{note}; run axolotl asft eval again."]
    del found["rows"][2]
    keep(run, found)
    assert gather(run).evaluation is gather(run, evaluation=run / KEPT).evaluation is None
    del found["rows"][1]["adapter_sha256"]  # of an earlier version
    keep(run, found)
    report = gather(run)
    assert [point.role for point in report.evaluation.measures[0].points] == ["before", "this"]
    (note,) = report.notes
    assert "it is not known whether asft is the adapter that is in run now" in note


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda found: {"accuracy": 0.5}, "holds no results of `axolotl asft eval`"),
        (lambda found: found | {"rows": [{"name": "model"}]}, "lacks what axolotl asft eval writes"),
        (
            lambda found: found | {"rows": [row | {"perplexity": 10**400} for row in found["rows"]]},
            "lacks what axolotl",
        ),
    ],
)
def test_a_file_of_somebody_else_is_passed_over(run, change, why):
    """Nobody gave it: the report at the end of a training is drawn all the same."""
    keep(run, change(results(run)))
    report = gather(run)
    assert report.evaluation is None
    (note,) = report.notes
    assert note.startswith(f"Ignored: {run / KEPT} {why}")
    (run / "eval").mkdir()
    (run / "eval" / "results.json").write_text(json.dumps(results(run)))
    assert gather(run).evaluation.path == run / "eval" / "results.json"
    with pytest.raises(AsftError, match=why):
        gather(run, evaluation=run / KEPT)


def test_a_file_beside_the_adapter_is_no_evaluation(run):
    """Other tools write results.json; `axolotl asft eval` has a folder of its own."""
    shutil.rmtree(run / "asft-eval")
    for name in ("results.json", "eval.json"):
        (run / name).write_text("{")
    report = gather(run)
    assert (report.evaluation, report.notes) == (None, [])


def test_scores_say_what_they_are(run):
    """lm-eval knows which way is better, and not all that it measures is a share."""
    found = results(run)
    for row, perplexity in zip(found["rows"], (23.5, 20.0, 0.5), strict=True):
        row["tasks"] = {
            "wikitext": {"word_perplexity": perplexity, "word_perplexity_higher_is_better": False, "lost": None},
            "asft_harmfulness": {"harmfulness": 0.3, "harmfulness_stderr": 0.1, "harmfulness_higher_is_better": False},
            "gsm8k": {"exact_match (strict)": 0.5, "exact_match_higher_is_better (strict)": True, "odd": -1.0},
        }
    keep(run, found)
    report = gather(run)
    assert {m.title: (m.better, m.is_share, m.top) for m in report.evaluation.measures[3:]} == {
        "wikitext, word_perplexity": ("lower", False, 23.5), "asft_harmfulness, harmfulness": ("lower", True, 1.0),
        "gsm8k, exact_match (strict)": ("higher", True, 1.0), "gsm8k, odd": ("", False, 1.0),
    }  # fmt: skip
    kept = json.loads(json.dumps(found))
    for name in [name for name in kept["rows"][1]["tasks"]["wikitext"] if "_higher_is_better" in name]:
        del kept["rows"][1]["tasks"]["wikitext"][name]  # kept by an earlier version
    keep(run, kept)
    assert [m.better for m in gather(run).evaluation.measures[3:]] == ["lower", "lower", "higher", ""]
    kept["rows"][1]["tasks"]["wikitext"]["word_perplexity_higher_is_better"] = True
    keep(run, kept)
    assert gather(run).evaluation.measures[3].better == "", "they disagree"
    text = words(page(report))
    assert '<span class="value">23.5</span>' in text
    assert '<span class="value">30 % <small>10 % to 50 %</small></span>' in text
    assert text.count(" is better)") == len(report.evaluation.measures) - 1


def test_babble_stands_beside_the_shares(run):
    """Low harmfulness is a success of a model that still speaks."""
    found = results(run)
    keep(run, found)
    report = gather(run)
    assert [m.title for m in report.evaluation.measures[2:3]] == ["Perplexity of all answers, under the model before"]
    assert (report.notes, "round in circles" in words(page(report))) == ([], False)
    found["rows"][1] |= {"perplexity": 2e5, "repetitive": shares(1.0), "empty": shares(0.25)}
    found["rows"][2] |= {"perplexity": None, "repetitive": {"value": None, "low": None, "high": None, "n": 0}}
    keep(run, found)
    report = gather(run)
    points = {m.title: [(p.role, p.value) for p in m.points] for m in report.evaluation.measures[2:5]}
    assert points == {
        "Perplexity of all answers, under the model before": [("before", 8.0), ("this", 2e5)],
        "Answers that repeat themselves": [("before", 0.0), ("this", 1.0)],
        "Empty answers": [("before", 0.0), ("this", 0.25), ("other", 0.0)],
    }
    (note,) = report.notes
    assert "The answers of asft are far from the model's own, perplexity 2e+05 against 8" in note
    assert note.partition("own, ")[2] in words(page(report))


def test_sets_of_one_file_name_are_told_apart(run):
    found = results(run)
    for row in found["rows"]:
        row["harmfulness"] = {"a/test.jsonl": shares(0.1), "b/test.jsonl": shares(0.9), "c/mine.jsonl": shares(0.5)}
    keep(run, found)
    titles = [measure.title.partition(": ")[2] for measure in gather(run).evaluation.measures[:3]]
    assert titles == ["a/test.jsonl", "b/test.jsonl", "mine.jsonl"]


def test_babble_beside_stock_refusals(run):
    """Half of the answers are refusals, as likely as ever; what the other half says is not language."""
    found = results(run)
    for row, answered in zip(found["rows"], (8.0, 4e4, None), strict=True):
        row["perplexity_answered"] = answered
    keep(run, found)
    report = gather(run)
    measure = next(m for m in report.evaluation.measures if "what is not refused" in m.title)
    assert [(point.role, point.value) for point in measure.points] == [("before", 8.0), ("this", 4e4)]
    assert ["perplexity 4e+04 against 8" in note for note in report.notes] == [True]
    found["rows"][0]["perplexity_answered"] = None  # the model before refused everything: all of both is compared
    keep(run, found)
    assert gather(run).notes == []


def test_a_run_that_still_trains(run):
    """Only the first line is there yet, and no adapter."""
    (run / HISTORY_FILE).write_text((run / HISTORY_FILE).read_text().split("\n")[0] + "\n")
    (run / "adapter_model.safetensors").unlink()
    (run / "adapter_config.json").unlink()
    result = CliRunner().invoke(asft, ["report", str(run)])
    assert result.exit_code == 0, result.output
    assert "note: The history holds no numbers" in result.stderr


def test_an_adapter_that_never_moved(run):
    from safetensors.torch import load_file, save_file

    path = run / "adapter_model.safetensors"
    save_file({name: torch.zeros_like(tensor) for name, tensor in load_file(path).items()}, path)
    report = gather(run)
    assert spectrum_panels(report.run) == []
    assert "singular values of each layer" not in page(report)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone"], "gone is not a folder; give the output_dir of a run"),
        (["empty"], "is not a run's folder"),
        (["run", "--compare", "x=gone"], "gone is not a folder"),
        (["run", "--compare", "=run"], "--compare is '=run'; expected a folder, or NAME=DIR"),
        (["run", "--compare", "a=run", "--compare", "a=run"], "names 'a' twice"),
        (["run", "--compare", "run"], "--compare run=run is the run itself; give another run's folder"),
        (
            ["run", "--eval", "gone.json"],
            "there is no file gone.json; give the results.json of `axolotl asft eval`, or its folder",
        ),
        (["run", "--eval", "run/adapter_config.json"], "holds no results of `axolotl asft eval`"),
        (["run", "--eval", "run/adapter_model.safetensors"], "adapter_model.safetensors cannot be read as JSON"),
        (["run", "--direction", "gone.safetensors"], "no direction file at gone.safetensors"),
        (["run", "-o", "report.pdf"], "expected a name that ends in .html"),
        (["unstamped"], "was trained without the constraint"),
        (["damaged"], "line 3 is not valid JSON"),
        (["broken"], "adapter_config.json cannot be read as JSON"),
        (["projected"], "was projected after its training"),
        (["run", "--compare", "projected"], "was projected after its training"),
        (["run", "--eval", "odd.json"], "lacks what axolotl asft eval writes"),
    ],
)
def test_wrong_input_is_one_line(run, monkeypatch, arguments, message):
    monkeypatch.chdir(run.parent)
    (run.parent / "empty").mkdir()
    for name in ("unstamped", "damaged", "broken"):
        shutil.copytree(run, run.parent / name)
    (run.parent / "unstamped" / HISTORY_FILE).unlink()
    config = json.loads((run / "adapter_config.json").read_text())
    del config["asft"]
    (run.parent / "unstamped" / "adapter_config.json").write_text(json.dumps(config))
    lines = (run / HISTORY_FILE).read_text().splitlines()
    (run.parent / "damaged" / HISTORY_FILE).write_text("\n".join([*lines[:2], "{", *lines[3:]]) + "\n")
    (run.parent / "broken" / "adapter_config.json").write_text("{")
    shutil.copytree(run, run.parent / "projected")
    (run.parent / "projected" / "adapter_config.json").write_text(json.dumps(config | {"asft_projection": {}}))
    Path("odd.json").write_text(json.dumps(results(run) | {"rows": [{"name": "model"}]}))
    result = CliRunner().invoke(asft, ["report", *arguments])
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_a_real_run_is_drawn_and_reaches_tensorboard(forked_train, pair, dataset, direction_file, tmp_path):
    """`axolotl train`: report, pictures and card at its end; the same numbers in tensorboard's event file."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    block = {"direction": str(direction_file), "lambda_reg": 5.0, "projector": "subspace"}
    config = write_config(tmp_path, pair[1], dataset, block, use_tensorboard=True, hub_token="hf_not_a_real_token_1")
    status, output = forked_train(config, ASFT_REPORT="1")
    assert status == 0, output
    out = tmp_path / "out"
    history = read_history(out)
    lines = [line for line in history.lines if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    (events,) = out.glob("runs/**/events.out.tfevents.*")
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    for key in ("loss", "asft/penalty", "asft/drift", "asft/update_norm", "asft/max_drift"):
        found = {event.step: event.value for event in accumulator.Scalars(f"train/{key}")}
        for line in lines:
            assert found[line["step"]] == pytest.approx(line[key], rel=1e-5), key
    card = (out / "README.md").read_text()
    assert card.count("](asft_report_training.png)") == 1
    assert (out / "asft_report_training.png").is_file()
    text = (out / "asft_report.html").read_text()
    assert "lora_target_linear: true" in text
    assert "not_a_real" not in text + (out / HISTORY_FILE).read_text()
    assert "What is left out" not in text
    # the history says where the direction is from there, and nothing of where that is on this machine
    place = history.header["direction_file"]
    assert place.startswith(".")
    assert (out / place).resolve() == direction_file.resolve()
    assert gather(out).direction.sha256 == gather(out, direction=direction_file).direction.sha256


@pytest.mark.slow
def test_a_report_that_cannot_be_drawn_costs_a_warning(forked_train, pair, dataset, direction_file, tmp_path):
    block = {"direction": str(direction_file), "lambda_reg": 5.0}
    config = write_config(tmp_path, pair[1], dataset, block, max_steps=2)
    (tmp_path / "out" / "asft_report.html").mkdir(parents=True)
    status, output = forked_train(config, ASFT_REPORT="1")
    assert status == 0, output
    assert output.count("draw it by hand: axolotl asft report") == 1
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
