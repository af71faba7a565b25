"""The shipped configs, through axolotl's own validation with the plugin."""

from pathlib import Path

import pytest
import yaml

from axolotl_asft.args import parse_block

CONFIGS = sorted((Path(__file__).parent.parent / "example_configs").glob("*.yml"))


def test_there_are_some():
    assert len(CONFIGS) >= 2


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_valid_with_the_plugin(path):
    from axolotl.cli.config import prepare_plugins
    from axolotl.integrations.base import PluginManager
    from axolotl.utils.config import validate_config
    from axolotl.utils.dict import DictDefault

    text = path.read_text()
    cfg = DictDefault(yaml.safe_load(text))
    PluginManager.get_instance().plugins.clear()
    prepare_plugins(cfg)
    validated = validate_config(
        cfg,
        capabilities={"bf16": True, "fp8": False, "n_gpu": 1, "compute_capability": "sm_89"},
        env_capabilities={"torch_version": "2.13.0"},
    )
    assert parse_block(validated.asft.to_dict()).direction == yaml.safe_load(text)["asft"]["direction"]
    PluginManager.get_instance().plugins.clear()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_says_how_to_make_its_direction(path):
    text = path.read_text()
    assert f"-o {yaml.safe_load(text)['asft']['direction'].removeprefix('./')}" in text
    assert f"axolotl train {path.name}" in text
