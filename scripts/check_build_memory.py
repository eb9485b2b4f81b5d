"""Show that a build's memory does not grow with the checkpoint, and what conversion costs.

Generates a Llama checkpoint of random bfloat16 numbers, 10 GB unless told otherwise, in a temporary
directory, runs `shardwright build` on it in a process of its own, and prints that process's peak
resident memory and time; then the same for `shardwright reshard` of the result. Conversion is what
takes longer than without weights; beside it stands how long one thread takes that only reads the
checkpoint and writes as many bytes as the shards have. Exits with 1 if a peak is not below the
limit. Needs free disk space of twice the checkpoint.

    python scripts/check_build_memory.py [--gigabytes 10] [--num-shards 2] [--dir DIR]
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import BinaryIO

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
    parser.add_argument("--limit", type=float, default=2.5, help="gigabytes of memory allowed")
    parser.add_argument("--dir", help="where to put the checkpoint, removed afterwards")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.dir) as temporary:
        root = Path(temporary)
        (root / "model").mkdir()
        start = time.monotonic()
        written = write_checkpoint(root / "model", int(options.gigabytes * 1e9))
        print(f"checkpoint: {written / 1e9:.2f} GB in {time.monotonic() - start:.0f} s", flush=True)
        model, out = root / "model", root / "out"
        options_of_build = [
            *("--quantization", options.quantization, "--num-shards", str(options.num_shards)),
            *("--target", "cpu", "--max-seq-len", "2048"),
        ]
        build = ["build", "--model", model, *options_of_build, "-o"]
        compiled, _ = run([*build, root / "empty", "--build-model-only"])
        seconds, peak = run([*build, out])
        shards = sum(f.stat().st_size for f in (out / "shards").iterdir())
        print(f"shards: {shards / 1e9:.2f} GB for {options.num_shards} ranks")
        plain = copy(sorted(model.iterdir()), root / "copy", shards)
        report("build", seconds, compiled, plain, peak)
        more = 2 * options.num_shards
        seconds, peak_again = run(["reshard", out, "--num-shards", str(more), "-o", root / "more"])
        plain = copy(sorted((out / "shards").iterdir()), root / "copy", shards)
        report(f"reshard for {more} ranks", seconds, compiled, plain, peak_again)
    return 0 if max(peak, peak_again) < options.limit * 1e9 else 1


def report(what: str, seconds: float, compiled: float, plain: float, peak: int) -> None:
    converted = max(seconds - compiled, 0)
    print(
        f"{what}: {seconds:.0f} s, of which conversion {converted:.1f} s; reading and writing "
        f"alone {plain:.1f} s ({converted / plain:.1f} x); "
        f"peak resident memory {peak / 1e9:.2f} GB",
        flush=True,
    )


def run(arguments: list[str | Path]) -> tuple[float, int]:
    """Run the command; seconds, and bytes of its peak resident memory."""
    code = (
        "import resource, sys; from shardwright.cli import run; code = run(sys.argv[1:]); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(code)"
    )
    began = time.monotonic()
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    seconds = time.monotonic() - began
    unit = 1 if sys.platform == "darwin" else 1024
    return seconds, int(done.stdout.splitlines()[-1]) * unit


def copy(sources: list[Path], target: Path, written: int) -> float:
    """Seconds to read all of `sources`, and to write `written` bytes."""
    block = bytearray(1 << 24)
    began = time.monotonic()
    for path in sources:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(block):
                pass
    with open(target, "wb", buffering=0) as file:
        while written > 0:
            written -= file.write(memoryview(block)[: min(len(block), written)])
    seconds = time.monotonic() - began
    target.unlink()
    return seconds


if __name__ == "__main__":
    sys.exit(main())
