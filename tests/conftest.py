import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# The compiler, before anything loads TVM in runtime-only mode: a process cannot have both.
import tvm  # noqa: F401

sys.path.insert(0, str(Path(__file__).parent))

# A shell lets what it runs in the background ignore Ctrl-C, and so would the programs under test.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def fake_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The artefact of `fake_artifact` for N ranks. Read only; copy it to damage it."""
    from fake_artifact import build_fake

    root = tmp_path_factory.mktemp("fake")

    def get(world: int) -> Path:
        directory = root / f"fake-{world}"
        return directory if directory.exists() else build_fake(directory, world)

    return get


@pytest.fixture
def fake_copy(fake_model: Callable[[int], Path], tmp_path: Path) -> Callable[[int], Path]:
    """A copy of the fake artefact to damage."""

    def copy(world: int) -> Path:
        return Path(shutil.copytree(fake_model(world), tmp_path / "model"))

    return copy
