"""Show that a build's memory does not grow with the checkpoint, and what conversion costs.

Generates a Llama checkpoint of random bfloat16 numbers, 10 GB unless told otherwise, in a temporary
directory, and writes the weights of `shardwright build` from it, then those of `shardwright
reshard` from the result, in turns with a loop that only reads the same files and writes as many
bytes. Prints the seconds of both, `--repeat` times each, and the peak resident memory of a build's
process. A `warm` turn begins with the files in the page cache; a `cold` one with none of them there
and ends when all that it wrote is on the disk. Exits with 1 if a peak is not below the limit. Needs
free disk space of three times the checkpoint.

    python scripts/check_build_memory.py [--gigabytes 10] [--num-shards 2] [--dir DIR]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

HIDDEN, MLP, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 4096, 14336, 32, 8, 128, 128256
BLOCK = 1 << 24
SHARD_BYTES = 4 << 30


def layer_tensors(layer: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one layer of Llama-3-8B."""
    shapes = {
        "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
        "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
        "mlp.gate_proj": (MLP, HIDDEN),
        "mlp.up_proj": (MLP, HIDDEN),
        "mlp.down_proj": (HIDDEN, MLP),
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
    }
    return {f"model.layers.{layer}.{name}.weight": shape for name, shape in shapes.items()}


def write_checkpoint(root: Path, total: int) -> int:
    """Write a sharded checkpoint of about `total` bytes; its exact length."""
    tensors: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "lm_head.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    layers = 0
    while size(tensors) < total:
        tensors |= layer_tensors(layers)
        layers += 1
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (root / "config.json").write_text(json.dumps(config))
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in tensors.items():
        if size(groups[-1]) + size({name: shape}) > SHARD_BYTES:
            groups.append({})
        groups[-1][name] = shape
    rng = np.random.default_rng(0)
    index = {}
    for i, group in enumerate(groups):
        file_name = f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors"
        index |= dict.fromkeys(group, file_name)
        with open(root / file_name, "wb") as file:
            write_shard(file, group, rng)
    (root / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return size(tensors)


def size(tensors: dict[str, tuple[int, ...]]) -> int:
    """Bytes in bfloat16."""
    return 2 * sum(math.prod(shape) for shape in tensors.values())


def write_shard(
    file: BinaryIO, tensors: dict[str, tuple[int, ...]], rng: np.random.Generator
) -> None:
    header = {}
    offset = 0
    for name, shape in tensors.items():
        end = offset + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for start in range(0, offset // 2, BLOCK):
        bits = rng.integers(0, 1 << 16, min(BLOCK, offset // 2 - start), np.uint16)
        # A random sign and mantissa, and one of four exponents: from 2^-7 to 2^-3.
        bits &= 0x81FF
        bits |= 0x3C00
        file.write(bits.data)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=10.0, help="size of the checkpoint")
    parser.add_argument("--num-shards", type=int, default=2)
    parser.add_argument("--quantization", default="q4f16_1")
    parser.add_argument("--repeat", type=int, default=3, help="turns of each")
    parser.add_argument("--state", default="warm,cold", help="warm, cold, or both")
    parser.add_argument("--limit", type=float, default=2.5, help="gigabytes of memory allowed")
    parser.add_argument("--dir", help="where to put the checkpoint, removed afterwards")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.dir) as temporary:
        root = Path(temporary)
        (root / "model").mkdir()
        start = time.monotonic()
        written = write_checkpoint(root / "model", int(options.gigabytes * 1e9))
        print(f"checkpoint: {written / 1e9:.2f} GB in {time.monotonic() - start:.0f} s", flush=True)
        ranks, more = str(options.num_shards), str(2 * options.num_shards)
        build = ["build", root / "model", root / "out", options.quantization, ranks]
        reshard = ["reshard", root / "out", root / "more", "", more]
        peak = 0
        for what, command in (
            (f"build for {ranks} ranks", build),
            (f"reshard for {more}", reshard),
        ):
            for state in options.state.split(","):
                peak = max(peak, compare(what, command, state, options.repeat))
    return 0 if peak < options.limit * 1e9 else 1


def compare(what: str, command: list[Any], state: str, repeat: int) -> int:
    """Time converting and plain copying in turns; bytes of the converting process's peak memory."""
    source, out = Path(command[1]), Path(command[2])
    sources = sorted(source.rglob("*.safetensors"))
    converted, plain, peaks = [], [], []
    for _ in range(repeat):
        shutil.rmtree(out, ignore_errors=True)
        prepare(sources, state)
        seconds, peak = run([*command, state])
        converted.append(seconds)
        peaks.append(peak)
        shards = sum(f.stat().st_size for f in (out / "shards").iterdir())
        prepare(sources, state)
        plain.append(copy(sources, out.with_name("copy"), shards, state))
    read = sum(path.stat().st_size for path in sources)
    ratios = [a / b for a, b in zip(converted, plain, strict=True)]
    print(
        f"{what}, {state}: {read / 1e9:.2f} GB read, {shards / 1e9:.2f} GB written; "
        f"converted in {listed(converted)} s, reading and writing alone {listed(plain)} s, "
        f"{listed(ratios, 2)} x; peak resident memory {max(peaks) / 1e9:.2f} GB",
        flush=True,
    )
    return max(peaks)


def listed(values: list[float], digits: int = 1) -> str:
    """Numbers, with slashes between them."""
    return " / ".join(f"{value:.{digits}f}" for value in values)


def prepare(sources: list[Path], state: str) -> None:
    """Bring `sources` into memory, or out of it, with nothing left to write."""
    os.sync()
    for path in sources:
        descriptor = os.open(path, os.O_RDONLY)
        if state == "cold":
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        else:
            block = bytearray(BLOCK)
            while os.readv(descriptor, [block]):
                pass
        os.close(descriptor)


def run(arguments: list[Any]) -> tuple[float, int]:
    """Convert in a process of its own; seconds, and bytes of its peak resident memory."""
    command = [sys.executable, __file__, "--convert", *map(str, arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    seconds, peak = done.stdout.splitlines()[-1].split()
    return float(seconds), int(peak) * 1024


def convert(kind: str, source: str, out: str, quantization: str, ranks: str, state: str) -> None:
    """Build or reshard, and print the seconds of writing the weights and the peak memory in KiB."""
    from shardwright.compiler.build import build
    from shardwright.compiler.options import BuildOptions
    from shardwright.compiler.reshard import reshard

    timer = WriteTimer(Path(out) if state == "cold" else None)
    if kind == "build":
        options = BuildOptions(
            source, Path(out), quantization, num_shards=int(ranks), max_seq_len=2048
        )
        build(options, timer)
    else:
        reshard(Path(source), Path(out), int(ranks), timer)
    print(timer.seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


class WriteTimer:
    """Times the step that writes the weights; with `out`, until its files are on the disk."""

    def __init__(self, out: Path | None) -> None:
        self.out, self.seconds = out, 0.0

    @contextmanager
    def step(self, name: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        """See `Progress` of the compiler."""
        began = time.monotonic()
        yield lambda amount: None
        if name == "Write weights":
            for path in (self.out / "shards").iterdir() if self.out else ():
                flush(path)
            self.seconds = time.monotonic() - began


def flush(path: Path) -> None:
    """Wait until a file is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def copy(sources: list[Path], target: Path, written: int, state: str) -> float:
    """Seconds to read all of `sources`, and to write `written` bytes."""
    block = bytearray(BLOCK)
    began = time.monotonic()
    for path in sources:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(block):
                pass
    with open(target, "wb", buffering=0) as file:
        while written > 0:
            written -= file.write(memoryview(block)[: min(len(block), written)])
    if state == "cold":
        flush(target)
    seconds = time.monotonic() - began
    target.unlink()
    return seconds


if __name__ == "__main__":
    if sys.argv[1:2] == ["--convert"]:
        convert(*sys.argv[2:])
    else:
        sys.exit(main())
