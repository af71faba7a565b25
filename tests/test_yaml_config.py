"""Configs as they stand in their files: what YAML takes in silence, and what is wrong with a file."""

import pytest

from axolotl_asft.errors import AsftError
from axolotl_asft.yaml_config import read_config, refuse_repeated_keys


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("plugins: [a.B]\nbase_model: m\nplugins:\n  - asft\n", "plugins: in line 1 and again in line 3"),
        ("asft: {direction: d}\nasft:\n  direction: e\n", "asft: in line 1 and again in line 2"),
        ("asft:\n  lambda_reg: 0.5\n  direction: d\n  lambda_reg: 0\n", "lambda_reg: in line 2 and again in line 4"),
    ],
)
def test_a_key_of_ours_that_is_there_twice(tmp_path, text, line):
    """YAML takes the last without a word, which may be the weaker constraint, or none of the other plugins."""
    (tmp_path / "c.yml").write_text(text)
    for read in (read_config, refuse_repeated_keys):
        with pytest.raises(AsftError, match=f"has {line}, and only the last would count"):
            read(tmp_path / "c.yml")


def test_merged_keys_are_no_repetition(tmp_path):
    (tmp_path / "c.yml").write_text("x: &x {rank: 1}\nasft:\n  <<: *x\n  rank: 2\n")
    assert read_config(tmp_path / "c.yml")["asft"] == {"rank": 2}
    refuse_repeated_keys(tmp_path / "c.yml")


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "a: [", "asft: [1]\nasft_: 2\n", "? {a: 1}\n: 2\n? {a: 1}\n: 3\n"])
def test_other_files_are_looked_at_in_peace(tmp_path, text):
    (tmp_path / "c.yml").write_text(text)
    refuse_repeated_keys(tmp_path / "c.yml")


def test_what_is_wrong_with_the_yaml_is_said(tmp_path):
    (tmp_path / "c.yml").write_text("a: 1\n\tb: 2\n")
    with pytest.raises(AsftError, match=r"line 2 is not valid YAML .*cannot start any token"):
        read_config(tmp_path / "c.yml")
