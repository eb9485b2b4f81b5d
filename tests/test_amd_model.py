"""Built models on emulated AMD GPUs: every kernel against numpy, and the demo model's answers.

The emulator (tests/amd) executes the machine code of the built library.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from amd.emulator import ARCHS, Device, environment

import demo
from shardwright.compiler.build import build
from shardwright.compiler.options import BuildOptions
from shardwright.runtime.code_object import code_objects

HERE = Path(__file__).parent
GQA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The demo model for two ranks, and a model of two layers with grouped queries for one."""
    root = tmp_path_factory.mktemp("amd")
    (root / "config").mkdir()
    (root / "config" / "config.json").write_text(json.dumps(GQA))
    common = dict(quantization=demo.QUANTIZATION, target="rocm", archs=ARCHS)
    model = str(demo.DEMO / "model")
    options = dict(num_shards=2, max_batch_size=demo.BATCH, use_cuda_graph=True, **common)
    build(BuildOptions(model, root / "demo", **options))
    model = str(root / "config")
    options = dict(max_batch_size=2, dummy_weights=True, **common)
    build(BuildOptions(model, root / "gqa", **options))
    return {"demo": root / "demo", "gqa": root / "gqa"}


def run(arch: str, devices: int, *command: str | Path, **variables: str) -> str:
    """Output of a Python program that has emulated GPUs."""
    done = attempt(arch, devices, *command, **variables)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def attempt(
    arch: str, devices: int, *command: str | Path, **variables: str
) -> subprocess.CompletedProcess[str]:
    # Consumer GPUs are warned about where this is not set.
    base = {**os.environ, "NCCL_P2P_DISABLE": "1"}
    everything = {**base, **environment(arch, devices), **variables}
    arguments = [sys.executable, *map(str, command)]
    return subprocess.run(arguments, env=everything, capture_output=True, text=True, timeout=590)


@pytest.mark.parametrize("name", ["demo", "gqa"])
def test_every_instruction_is_known(name: str, artefacts: dict[str, Path]) -> None:
    found = code_objects(artefacts[name] / "model.so")
    assert sorted(code.arch for code in found) == sorted(ARCHS)
    for code in found:
        listing = Device(code.arch, code.data).listing()
        assert len(listing) > 10000
        assert not [line for line in listing if line.startswith("?")]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("name", "order"), [("demo", ""), ("gqa", ""), ("gqa", "reversed")])
def test_every_kernel_against_numpy(
    name: str, order: str, arch: str, artefacts: dict[str, Path]
) -> None:
    """With the blocks of a kernel and the waves of a block in either order."""
    variables = {"AMD_EMULATOR_REVERSED": "1"} if order else {}
    command = (HERE / "amd" / "check_kernels.py", artefacts[name], arch)
    checked = json.loads(run(arch, 1, *command, **variables))
    # Those of a prefill, of each batch bucket, and the sampler.
    assert checked["kernels"] > 30
    assert {"q4_gemv_kernel", "attention_prefill_kernel", "attention_combine_kernel"} <= set(
        checked["worst"]
    )


def test_demo_on_two_ranks_gives_the_tokens_of_a_cpu(artefacts: dict[str, Path]) -> None:
    """With its steps as graphs, and all-reduces in them."""
    output = run("gfx1100", 2, HERE / "demo.py", artefacts["demo"], AMD_EMULATOR_THREADS="1")
    assert "demo: 32 of 32 replies are the CPU's" in output


def test_a_fault_on_the_gpu_ends_all_ranks_with_one_error(artefacts: dict[str, Path]) -> None:
    command = ("-m", "shardwright", "chat", artefacts["demo"], "--prompt", "1 plus 2?")
    done = attempt("gfx1100", 2, *command, AMD_EMULATOR_STEPS="300")
    assert done.returncode == 1 and done.stdout == ""
    errors = [line for line in done.stderr.splitlines() if not line.startswith("AMD emulator:")]
    assert len(errors) == 1 and errors[0].startswith("Error: rank-")
    assert "_gfx1100_kernel" in errors[0] and "the kernel does not end" in errors[0]
