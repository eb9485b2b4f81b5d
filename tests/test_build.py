"""Builds that stop before they compile anything."""

from pathlib import Path

import pytest

from shardwright.compiler.build import build
from shardwright.compiler.options import BuildOptions
from shardwright.errors import BuildError

DEMO = Path(__file__).parent.parent / "demo/model"


def test_an_output_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "model"
    with pytest.raises(BuildError, match=r"file/model: cannot write there .*another directory"):
        build(BuildOptions(model=str(DEMO), out=out))
