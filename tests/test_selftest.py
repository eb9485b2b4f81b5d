"""`shardwright selftest`: every kernel of an artefact and the collectives, on this machine."""

from pathlib import Path

import numpy as np
import pytest

from shardwright import cli
from shardwright.compiler.build import BuildOptions, build
from shardwright.runtime import references
from shardwright.runtime.selftest import _compare

DEMO = Path(__file__).parents[1] / "demo" / "model"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("selftest") / "demo"
    build(BuildOptions(str(DEMO), out, num_shards=2, max_batch_size=2, max_seq_len=128))
    return out


def test_every_kernel_and_collective_is_right(
    demo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["selftest", str(demo), "--target", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "cpu, 2 ranks" in lines[0]
    results = {line.split()[0]: line.split()[-1] for line in lines[3:-2]}
    assert "WRONG" not in results.values() and "reference" not in results.values()
    for kernel in ("attention_cpu", "quantized_matmul_cpu", "rotary_append", "sample", "q4_take"):
        assert results[f"{kernel}_kernel"] == "ok"
    # A size a line.
    assert sum(line.startswith("all_reduce float16 ") for line in lines) >= 4
    assert ", 0 wrong, " in lines[-1]


def test_a_wrong_kernel_is_named(
    demo: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = references.REFERENCES["rotary_append"]

    def wrong(before, after, note):
        return [(got, want * 1.01) for got, want in right(before, after, note)]

    monkeypatch.setitem(references.REFERENCES, "rotary_append", wrong)
    assert cli.run(["selftest", str(demo)]) == 1
    captured = capsys.readouterr()
    assert "checks failed: rotary_append_kernel\n" in captured.err
    (line,) = [x for x in captured.out.splitlines() if x.startswith("rotary_append_kernel")]
    assert line.endswith("WRONG")


def test_another_target_is_refused(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["selftest", str(demo), "--target", "cuda"]) == 2
    assert "was built for cpu, not cuda" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("got", "wanted", "passed"),
    [
        (np.float16([1, 2]), np.float64([1, 2.001]), True),
        (np.float16([1, 2]), np.float64([1, 2.1]), False),
        (np.float16([1, np.nan]), np.float64([1, 2]), False),
        (np.float32([-np.inf, 2]), np.float64([-np.inf, 2]), True),
        (np.int32([5]), np.int32([6]), False),
        (np.float32([1, 2, 3]), np.float64([1, 2]), False),
    ],
)
def test_comparison(got: np.ndarray, wanted: np.ndarray, passed: bool) -> None:
    assert _compare("x", [(got, wanted)]).passed == passed
    # The worst pair counts, in any order.
    fine = (np.float16([1]), np.float64([1]))
    assert _compare("x", [(got, wanted), fine]).passed == passed
    assert _compare("x", [fine, (got, wanted)]).passed == passed


@pytest.mark.parametrize(
    ("kernel", "reference"),
    [
        ("q4_gemv_kernel11", references.matmul),
        ("gemv_kernel", references.matmul),
        ("fused_NT_matmul6_cast4", references.matmul),
        ("fused_strided_slice4_strided_slice5_silu2_multiply2", references.gate),
        ("add_rms_norm_kernel3", references.add_rms_norm),
        ("take1", references.take),
        ("no_such_kernel", None),
    ],
)
def test_references_are_found_by_name(kernel: str, reference: references.Reference) -> None:
    assert references.reference_of(kernel) is reference
