"""The Python face: what other people's code may lean on does not change unnoticed."""

import inspect

import pytest

import axolotl_asft

SIGNATURES = {
    "extract_direction": "base aligned rank adapter output tolerance energy max_rank modules dtype keep_v metrics "
    "own_answers seed device progress",
    "AlignmentPenalty": "model direction projector rank metric lora_scaling modules on_uncovered verify_model",
    "attach": "trainer direction lambda_reg max_drift anchor_weight chat_templates prompt_formats general_formats "
    "options",
    "AlignmentDirection": "modules spec sha256",
    "AsftError": None,
    "AsftPlugin": "",
}
METHODS = {
    "AlignmentDirection": {"load": "path sha256", "save": "self path"},
    "AlignmentPenalty": {
        "__call__": "self",
        "add_gradient": "self weight",
        "measure": "self",
        "shorten": "self max_drift",
    },
}


def names_of(function) -> str:
    return " ".join(inspect.signature(function).parameters)


def test_the_public_names():
    assert set(axolotl_asft.__all__) == {*SIGNATURES, "__version__"}


@pytest.mark.parametrize("name", [name for name, expected in SIGNATURES.items() if expected is not None])
def test_the_parameters(name):
    """In order: all of them can be given by position somewhere out there."""
    assert names_of(getattr(axolotl_asft, name)) == SIGNATURES[name]


@pytest.mark.parametrize(("name", "method"), [(name, method) for name in METHODS for method in METHODS[name]])
def test_the_methods(name, method):
    function = getattr(getattr(axolotl_asft, name), method)
    assert names_of(function) == METHODS[name][method]
    assert inspect.getdoc(function)


@pytest.mark.parametrize("name", SIGNATURES)
def test_everything_is_documented(name):
    """A promise first; then every parameter by its name."""
    thing = getattr(axolotl_asft, name)
    text = inspect.getdoc(thing)
    assert text
    assert text.partition("\n\n")[0].rstrip().endswith((".", ":"))
    described = text.partition("Args:")[2] + text.partition("Attributes:")[2]
    missing = [p for p in (SIGNATURES[name] or "").split() if p not in described]
    assert not missing


def test_it_is_typed():
    from pathlib import Path

    assert (Path(axolotl_asft.__file__).parent / "py.typed").is_file()
    for name in ("extract_direction", "attach"):
        signature = inspect.signature(getattr(axolotl_asft, name))
        parameters = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        assert all(p.annotation is not p.empty for p in parameters)
        assert signature.return_annotation is not signature.empty
