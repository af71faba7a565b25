"""Names of plugins, and configs that would lose the constraint in silence."""

import subprocess
import sys

import pytest

from axolotl_asft.errors import AsftError
from axolotl_asft.guard import PLUGIN, add_options, refuse_strays, require_plugin, resolve_plugin_name, wrap_load_plugin


def test_the_short_name():
    assert resolve_plugin_name("asft") == PLUGIN
    assert resolve_plugin_name(PLUGIN) == PLUGIN


@pytest.mark.parametrize(
    "name", ["axolotl.integrations.liger.LigerPlugin", "diffusion.DiffusionPlugin", "os.PathLike", "my.plugin.Plugin"]
)
def test_other_plugins_are_left_alone(name):
    assert resolve_plugin_name(name) == name


@pytest.mark.parametrize(
    "name", ["ASFT", "asf", "asft.Plugin", "axolotl-asft", "axolotl_asft.Plugin", "axolotl_aft.AsftPlugin"]
)
def test_near_names_are_refused(name):
    with pytest.raises(AsftError, match="did you mean 'asft'"):
        resolve_plugin_name(name)


@pytest.mark.parametrize(("name", "hint"), [("afst", "expected asft, or package"), ("a", "is plugins: a list, with")])
def test_a_name_without_a_dot_is_no_plugin(name, hint):
    """axolotl splits it at a dot, and ends in a traceback; a text in place of a list is read letter by letter."""
    with pytest.raises(AsftError, match=f"plugins: '{name}' is not a plugin.*{hint}"):
        resolve_plugin_name(name)


@pytest.mark.parametrize("cloud", [["--cloud", "cloud.yml"], ["--cloud=cloud.yml"]])
def test_options_that_do_not_reach_a_cloud_run(monkeypatch, cloud):
    monkeypatch.setattr(sys, "argv", ["axolotl", "train", "c.yml", *cloud, "--asft.lambda-reg", "5"])
    with pytest.raises(AsftError, match=r"--asft.lambda-reg does not reach a run under --cloud"):
        add_options(())
    monkeypatch.setattr(sys, "argv", ["axolotl", "train", "c.yml", *cloud])
    assert add_options(())


def test_the_list_of_layers_is_no_option(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["axolotl", "train", "c.yml", "--asft.modules", "q_proj"])
    with pytest.raises(
        AsftError, match=r"--asft.modules is not an option, since it is a list; set it in the asft block"
    ):
        add_options(())


def test_an_importable_plugin_of_a_similar_name_is_left_alone(tmp_path, monkeypatch):
    (tmp_path / "asftx.py").write_text("class Plugin: ...")
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve_plugin_name("asftx.Plugin") == "asftx.Plugin"


def test_import_errors_of_others_stay_import_errors():
    def load_plugin(name):
        raise ImportError(name)

    with pytest.raises(ImportError, match="other"):
        wrap_load_plugin(load_plugin)("other.Plugin")
    with pytest.raises(AsftError, match="cannot be imported"):
        wrap_load_plugin(load_plugin)("asft")


@pytest.mark.parametrize("plugins", [None, [], ["other.Plugin"]])
def test_block_without_plugin(plugins):
    with pytest.raises(AsftError, match="add `- asft` under plugins"):
        require_plugin({"asft": {"direction": "d"}, "plugins": plugins})


@pytest.mark.parametrize("key", ["asft_direction", "asft-direction", "asft_lambda_reg", "asft-lambda-reg"])
def test_keys_of_a_block_that_is_not_there(key):
    """Neither block nor plugin: axolotl would drop them, and train unconstrained."""
    bare = key[5:].replace("-", "_")
    message = f"{key} stands outside the asft: block, where axolotl drops it; indent it under asft:, or give it as asft"
    with pytest.raises(AsftError, match=rf"{message}\.{bare} in a sweep"):
        require_plugin({"base_model": "m", key: 1})


@pytest.mark.parametrize(
    "cfg",
    [
        {},
        {"asft": None},
        {"asft": {"direction": "d"}, "plugins": ["asft"]},
        {"rank": 8, "direction": "d", "asft_note": "of somebody else"},
    ],
)
def test_configs_that_pass(cfg):
    require_plugin(cfg)


@pytest.mark.parametrize(
    "key",
    [
        "lambda_reg",
        "max_drift",
        "direction_sha256",
        "modules",
        "prompt_formats",
        "general_formats",
        "asft_lambda_reg",
        "asft-anchor-weight",
    ],
)
def test_a_key_that_lost_its_indentation(key):
    """axolotl drops what it does not know: the run would be held less than it was asked to be."""
    config = {"base_model": "m", "plugins": ["asft"], "asft": {"direction": "d"}, key: 1}
    with pytest.raises(AsftError, match=f"{key} stands outside the asft: block, where axolotl drops it; indent it"):
        refuse_strays(config)
    refuse_strays(config, [key])


def test_no_key_of_axolotl_is_taken_for_ours():
    from axolotl.utils.schemas.config import AxolotlInputConfig

    refuse_strays(dict.fromkeys(AxolotlInputConfig.model_fields))


def test_an_error_in_the_middle_of_a_progress_bar_begins_a_line():
    code = (
        "from tqdm import tqdm; from axolotl_asft.errors import AsftError; from axolotl_asft import guard\n"
        "guard.print_user_errors_in_one_line()\n"
        "bar = tqdm(total=9, mininterval=0); bar.update()\n"  # as transformers holds it
        "raise AsftError('no direction file')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "1/9 [" in done.stderr, "the bar is there"
    assert "asft: no direction file" in done.stderr.split("\n"), "and ends before the line begins"
