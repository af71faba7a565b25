"""`axolotl asft inspect --plot`: a picture of any direction file, in the one size."""

import struct
import sys

import pytest
import torch
from click.testing import CliRunner
from matplotlib.figure import Figure

from axolotl_asft import AlignmentDirection
from axolotl_asft.cli import asft
from axolotl_asft.direction import ModuleDirection
from axolotl_asft.spectra_chart import draw_spectra


def size_of(png):
    data = png.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def made(names, ranks, **entry):
    modules, entries = {}, {}
    for name, k in zip(names, ranks, strict=True):
        U = torch.eye(8)[:, :k]
        modules[name] = ModuleDirection(U, torch.linspace(2, 1, k) if k else torch.zeros(0), torch.tensor(9.0), 8)
        entries[name] = {"shape": [8, 8], "k": k, "energy": 0.9, "bound": 0.1} | entry
    ends = {"base": {"id": "base"}, "aligned": {"id": "$\\aligned$"}}
    return AlignmentDirection(modules, ends | {"modules": entries})


def test_the_command(direction_file, tmp_path):
    picture = tmp_path / "d.png"
    shown = CliRunner().invoke(asft, ["inspect", str(direction_file), "--no-modules", "--plot", str(picture)])
    assert shown.exit_code == 0, shown.output
    assert size_of(picture) == (2160, 750)
    assert shown.stdout.startswith(f"{picture}\n\nfile ")
    refused = CliRunner().invoke(asft, ["inspect", str(direction_file), "--plot", str(tmp_path / "d.pdf")])
    assert refused.exit_code == 2
    assert refused.stderr.endswith("d.pdf; expected a name that ends in .png\n")


def test_only_what_is_missing_is_called_missing(direction_file, tmp_path, monkeypatch):
    """An import of ours that fails is a bug, with its traceback."""
    arguments = ["inspect", str(direction_file), "--plot", str(tmp_path / "d.png")]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "axolotl_asft.spectra_chart", None)
        assert isinstance(CliRunner().invoke(asft, arguments).exception, ImportError)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert CliRunner().invoke(asft, arguments).stderr.startswith("asft: --plot needs matplotlib; pip install ")


@pytest.mark.parametrize(
    ("names", "ranks", "entry"),
    [
        (["model.layers.0.mlp.up_proj"], [1], {}),
        ([f"model.layers.{i}.mlp.up_proj" for i in range(3)], [0, 2, 8], {}),
        ([f"model.layers.{i}.mlp.up_proj" for i in range(2)], [0, 0], {"energy": 1.0, "bound": 0.0}),
        ([f"model.layers.0.mlp.experts.{i}.w{j}" for i in range(9) for j in range(9)], [3] * 81, {"bound": 1e250}),
        (["no.layer.at.all", "$x_{"], [2, 3], {"energy": 0.0, "bound": -1.0}),
        (["_hidden"], [1], {}),
    ],
)
def test_whatever_a_file_holds(tmp_path, names, ranks, entry):
    draw_spectra(made(names, ranks, **entry), tmp_path / "d.png")
    assert size_of(tmp_path / "d.png") == (2160, 750)


def legend_of(names, tmp_path, monkeypatch):
    """The labels, and whether they lie inside the picture and below its panels."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: (figures.append(figure), save(figure, *a, **k)))
    draw_spectra(made(names, [2] * len(names)), tmp_path / "d.png")
    box = figures[0].legends[0].get_window_extent()
    panels = min(axes.get_tightbbox().y0 for axes in figures[0].axes)
    fits = box.x0 >= 0 and box.x1 <= figures[0].bbox.width and box.y0 >= 0 and box.y1 <= panels
    return [text.get_text() for text in figures[0].legends[0].get_texts()], fits


def test_kinds(tmp_path, monkeypatch):
    names = [f"model.layers.{layer}.mlp.experts.{i}.up_proj" for layer in range(3) for i in range(2)]
    names.append("model.layers.1.self_attn.q_proj")
    assert legend_of(names, tmp_path, monkeypatch) == (["mlp.experts.*.up_proj", "self_attn.q_proj"], True)


def test_a_vision_tower_has_lines_of_its_own(tmp_path, monkeypatch):
    """Both call a layer `layers.0.self_attn.q_proj`; the long names of many kinds still have room."""
    towers = ("model.language_model.layers", "model.vision_tower.encoder.layers")
    kinds = [f"self_attn.{kind}_proj" for kind in "qkvo"] + [f"linear_attn.in_proj_{kind}" for kind in "abcd"]
    names = [f"{tower}.{layer}.{kind}" for tower in towers for layer in range(2) for kind in kinds]
    labels = [f"{tower}: {kind}" for tower in towers for kind in kinds]
    assert legend_of(names, tmp_path, monkeypatch) == (labels, True)
