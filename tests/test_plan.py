"""The plan against what a build makes, and what it says."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from reference import families

from shardwright import cli, planning
from shardwright.compiler import plan
from shardwright.compiler.build import build
from shardwright.compiler.options import BuildOptions
from shardwright.compiler.quantization import quantization
from shardwright.compiler.trace import Limits
from shardwright.errors import DeviceError, UsageError
from shardwright.model_defs import family_of
from shardwright.runtime.artifact import load_manifest
from shardwright.runtime.memory import of_manifest

DEMO = Path(__file__).parent.parent / "demo/model"
LLVM = tvm.target.Target("llvm")


def estimate(ranks: int, scheme: str, limits: Limits, config=None) -> plan.Estimate:
    config = config or json.loads((DEMO / "config.json").read_text())
    _, family = family_of(config)
    return plan.estimate(
        family, family.config.from_hf(config), quantization(scheme), ranks, LLVM, limits
    )


@pytest.mark.parametrize(("ranks", "scheme"), [(1, "q4f16_1"), (3, "q0f16")])
def test_a_plan_is_what_a_build_takes(tmp_path, ranks, scheme):
    sizes = {"max_seq_len": 100, "max_batch_size": 3, "prefill_chunk_size": 48}
    options = {"quantization": scheme, "num_shards": ranks, "dummy_weights": True}
    build(BuildOptions(str(DEMO), tmp_path, **options, **sizes))
    manifest = load_manifest(tmp_path)
    found = estimate(ranks, scheme, Limits(100, 3, 48, 16))
    assert found.memory(3, 100) == of_manifest(manifest)
    # What the plan takes a step to read is what the kernels of a step were built to read.
    kernels = manifest.functions["decode_1"].kernels.values()
    assert found.read == sum(kernel.weight_bytes for kernel in kernels)


def family_config(name: str) -> dict[str, Any]:
    return next(case.config for case in families.cases() if case.name == name)


def test_a_step_reads_the_chosen_experts_only():
    limits, config = Limits(32, 1, 16, 16), family_config("mixtral")
    two = estimate(2, "q0f32", limits, config)
    five = estimate(2, "q0f32", limits, config | {"num_experts_per_tok": 5})
    # Rank 0 has 64 of the 104 rows of five experts, in 2 layers of 3 matrices.
    assert two.weights == five.weights and two.read == five.read
    assert two.experts == five.experts == 2 * 3 * 5 * 64 * 64 * 4
    assert (two.chosen, five.chosen) == (0.4, 1.0)


def test_a_model_with_kinds_of_layers_is_planned_with_few_of_them():
    assert estimate(2, "q0f32", Limits(32, 1, 16, 16), family_config("gemma3")).workspace > 0


def small(**changes) -> plan.Estimate:
    found = plan.Estimate(
        ranks=2,
        kind="cuda",
        layers=10,
        weights=1 << 30,
        read=900 << 20,
        workspace=0,
        state=(),
        fixed=0,
        collectives=(("all-reduce", 1000), ("all-gather", 4000)),
    )
    return dataclasses.replace(found, **changes)


def test_seconds_are_reading_layers_and_collectives():
    machine = plan.Machine(24 << 30, 1e12, link=1e9, latency=1e-5)
    reading = (900 << 20) / (1e12 * plan.EFFICIENCY) + 10 * plan.LAYER_SECONDS
    assert small(ranks=1, collectives=()).seconds(machine, 1, 7) == pytest.approx(reading)
    # Two ranks: of an all-reduce each sends all of it, of an all-gather half.
    sent = 4 * (1000 + 2000) / 1e9 + 2e-5
    assert small().seconds(machine, 4, 7) == pytest.approx(reading + sent)


def test_rows_share_experts():
    machine = plan.Machine(24 << 30, 1e12)
    one = small(ranks=1, collectives=(), experts=800 << 20, chosen=0.25)
    layers, speed = 10 * plan.LAYER_SECONDS, 1e12 * plan.EFFICIENCY
    assert one.seconds(machine, 1, 7) == pytest.approx((300 << 20) / speed + layers)
    both = 100 + 800 * (1 - 0.75**2)
    assert one.seconds(machine, 2, 7) == pytest.approx(both * (1 << 20) / speed + layers)


def test_the_rank_whose_experts_are_chosen_most():
    # Of two experts of four, on two ranks: both on one rank in 2 of 6 choices.
    assert plan.busiest(2, 2, 2) == pytest.approx(4 / 3)
    assert plan.busiest(5, 1, 8) == 5 and plan.busiest(8, 4, 2) == 2 and plan.busiest(0, 2, 2) == 0
    rng = np.random.default_rng(0)
    counts = [np.bincount(rng.permutation(24)[:7] // 6, minlength=4).max() for _ in range(4000)]
    assert plan.busiest(7, 4, 6) == pytest.approx(np.mean(counts), rel=0.02)
    machine = plan.Machine(24 << 30, 1e12)
    cut = small(collectives=(), experts=800 << 20, chosen=0.5)
    whole = dataclasses.replace(cut, whole_experts=4)
    more = (4 / 3 / 2 - 0.5) * (800 << 20) / (1e12 * plan.EFFICIENCY)
    assert whole.seconds(machine, 1, 7) - cut.seconds(machine, 1, 7) == pytest.approx(more)


def test_whole_experts_on_each_rank():
    limits, config = Limits(32, 1, 16, 16), family_config("mixtral")
    _, family = family_of(config)
    model = family, family.config.from_hf(config), quantization("q4f16_1")
    cut, whole = (plan.estimate(*model, 2, LLVM, limits, each) for each in (False, True))
    # Three of five experts with all 104 rows, and five with 64 of them.
    assert (cut.whole_experts, whole.whole_experts) == (0, 5)
    assert 0 < whole.packed == whole.read - (cut.read - cut.packed)
    assert whole.experts / cut.experts == pytest.approx(3 * 104 / (5 * 64), rel=0.2)
    qwen = family_config("qwen3")
    with pytest.raises(UsageError, match="this model has no experts"):
        plan.estimate(
            *(family_of(qwen)[1], family_of(qwen)[1].config.from_hf(qwen)),
            *(quantization("q0f16"), 2, LLVM, limits, True),
        )


def test_quantized_weights_are_read_more_slowly():
    machine = plan.Machine(24 << 30, 1e12)
    plain, packed = small(collectives=()), small(collectives=(), packed=900 << 20)
    more = packed.seconds(machine, 1, 7) - plain.seconds(machine, 1, 7)
    slower = (900 << 20) / 1e12 * (1 / plan.PACKED_EFFICIENCY - 1 / plan.EFFICIENCY)
    assert more == pytest.approx(slower + 10 * plan.PACKED_LAYER_SECONDS)


def test_replicas_where_links_are_slow():
    one = small(ranks=1, collectives=(), read=1800 << 20, weights=2 << 30)
    slow = plan.Machine(24 << 30, 1e12, link=1e6, latency=1e-3)
    fast = plan.Machine(24 << 30, 1e12, link=1e12, latency=1e-6)
    lines = plan.advice([one, small()], slow, [1, 8], 100, 100)
    assert len(lines) == 2 and "2 shards are no faster than 1" in lines[0]
    assert "two replicas of 1 GPUs, 4 rows each" in lines[1]
    assert plan.advice([one, small()], fast, [1, 8], 100, 100) == []
    # Half the GPUs that cannot hold the model are no replica.
    huge = dataclasses.replace(one, weights=30 << 30)
    assert plan.advice([huge, small()], slow, [1, 8], 100, 100) == []


def test_amounts_and_counts():
    amount = planning.parse_amount
    assert amount("24GiB", "--x") == 24 << 30 and amount("1.5 TB/s", "--x") == 1_500_000_000_000
    assert amount("80gb", "--x") == 80_000_000_000 and amount("123", "--x") == 123
    assert planning.parse_counts("8, 1,2", "--x") == [1, 2, 8]
    for text in ("", "24 apples", "-3GiB"):
        with pytest.raises(UsageError, match="--x"):
            amount(text, "--x")
    for text in ("", "1,,2", "0", "two"):
        with pytest.raises(UsageError, match="--x"):
            planning.parse_counts(text, "--x")


def test_the_command(capsys):
    options = ["--gpu-memory", "700MiB", "--num-shards", "1,2", "--batch", "1,64"]
    options += ["--max-seq-len", "512", "--bandwidth", "1GB/s", "--context", "64"]
    assert cli.run(["plan", str(DEMO), *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines]
    assert [row[:2] for row in rows if row[-1:] == ["MEMORY"]] == [["2", "1"], ["2", "64"]]
    fitting = [row for row in rows if "fits" in row]
    assert [row[:2] for row in fitting] == [["1", "1"], ["1", "64"]]
    assert 0 < float(fitting[0][-1]) < float(fitting[1][-1])
    assert cli.run(["plan", str(DEMO), "--gpu-memory", "1GiB", "--num-shards", "17"]) == 2
    assert "at most 16" in capsys.readouterr().err


def test_a_build_refuses_what_does_not_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "shardwright.compiler.build.targets_of", lambda options: (tvm.target.Target("llvm"),)
    )
    options = BuildOptions(
        str(DEMO), tmp_path, target="cuda", archs=("sm_80",), gpu_memory=601 << 20
    )
    with pytest.raises(DeviceError, match=r"--gpu-memory leaves 0\.00 GiB; build it with"):
        build(options)
    assert not (tmp_path / "model.so").exists()
