"""What the benchmark scripts make of their measurements."""

import importlib.util
import io
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner
from rich.console import Console

from shardwright.runtime.artifact import Kernel

ROOT = Path(__file__).parent.parent


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def result(ranks: int, ms: float) -> dict:
    decode = {"batch": 1, "bytes_per_step": 8e9 / ranks, "ms_per_token": ms}
    decode |= {"mean_ms_per_token": ms, "busy_mean_ms_per_token": 1.01 * ms}
    return {
        "artefact": f"big-n{ranks}",
        "model": "big",
        "layers": 32,
        "hidden_size": 4096,
        "quantization": "q0f16",
        "ranks": ranks,
        "decode": [decode],
        "first_token": [{"prompt": 2048, "seconds": 0.02, "rested_seconds": 0.018}],
        "load_s": 3.0,
    }


REPORT = {
    "copy_bytes_per_s": 4e12,
    "context": 256,
    "results": [result(2, 2.5), result(1, 4.0), {"path": "x", "error": "no"}],
}
PEERS = json.loads((ROOT / "scripts/peers.json").read_text())["figures"]


def test_tables_of_models_over_ranks_and_of_measurements():
    console = Console(width=160, record=True, file=io.StringIO())
    for table in script("bench_decode").tables(REPORT, PEERS):
        console.print(table)
    text = console.export_text()
    row = next(line for line in text.splitlines() if "4.00 / 2.00" in line)
    assert row.split("│")[1].split() == ["big"] and "2.50 / 1.00" in row
    line = next(line for line in text.splitlines() if "big-n1" in line)
    assert (
        "50%" in line and "2000" in line and "+1.0%" in line and "20.0, rested 18.0 (2048)" in line
    )
    assert "4.69 gpt-fast, 4.81 vLLM 0.25" in line


def test_a_label_is_the_name_without_its_ranks():
    label = script("bench_decode").model_label
    assert [label(n, 8) for n in ("llama-8", "llama-q4-n8", "llama_tp8", "llama-8b", "a-x16")] == [
        *("llama", "llama-q4", "llama", "llama-8b", "a-x16")
    ]


def test_lines_to_draw():
    plot = script("plot_performance")
    assert plot.series(REPORT) == {1: {"big": [(1, 4.0, 2.0), (2, 2.5, 1.0)]}}
    assert plot.peer_points(PEERS, REPORT, "big", 1) == [(1, 4.69), (2, 3.39), (4, 2.5)]
    assert plot.peer_points(PEERS, REPORT, "big", 2) == []


def test_drawing(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "r.json").write_text(json.dumps(REPORT))
    arguments = [str(tmp_path / "r.json"), "--peers", str(ROOT / "scripts/peers.json")]
    done = CliRunner().invoke(
        script("plot_performance").main, [*arguments, "-o", str(tmp_path / "a.svg")]
    )
    assert done.exit_code == 0, done.output
    text = (tmp_path / "a.svg").read_text()
    assert text.startswith("<?xml") and "</svg>" in text
    assert "bench_decode" not in sys.modules


def test_a_profile_has_bytes_gaps_and_the_host():
    profile = script("profile_decode")
    kernels = {"gemv": Kernel(2, 8_480_000, False), "attention": Kernel(1, 0, True)}
    events = []
    for step in range(2):
        at = 10.0 * step
        for name, start, elapsed in (
            ("gemv_kernel", 0, 2),
            ("gemv_kernel_1", 1.5, 1.5),  # begins before the one in front has ended
            ("attention_kernel", 4, 1),
            ("ncclDevKernel_AllReduce(x)", 5, 1),
            ("sample_kernel", 6, 2),
        ):
            events.append(profile.Event(name, at + start, elapsed))
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(profile.kernel_table(events, 2, kernels, 2_120_000, 4.24))
    lines = {
        cells[1].strip(): [cell.strip() for cell in cells[2:-1]]
        for line in console.export_text().splitlines()
        if len(cells := line.split("│")) > 3
    }
    assert lines["gemv"] == ["2", "1.75", "3.5", "38.9%", "8.5", "2.0", "57%", "-0.25"]
    assert lines["attention"] == ["1", "1.00", "1.0", "11.1%", "2.1", "0.5", "50%", "1.00"]
    assert lines["communication"][2] == "1.0" and lines["gaps"][2] == "2.0"
    assert lines["whole"][2] == "9.0" and lines["whole"][6] == "28%"
    calls = [profile.Event("cudaGraphLaunch", 0, 5), profile.Event("cudaMemcpyAsync", 6, 1)]
    text = "\n".join(profile.host_lines(calls * 2, 2))
    assert "cudaGraphLaunch 1.00 a step, 5.0 us" in text and "0.00 launches of single" in text
    text = "\n".join(profile.host_lines([*calls, profile.Event("cuLaunchKernelEx", 7, 1)], 1))
    assert "1.00 launches of single" in text
