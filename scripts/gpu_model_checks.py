"""Run small models of every family and every weight format on a GPU against transformers.

    python scripts/gpu_model_checks.py build DIR      here: compiles (needs nvcc, no GPU)
    python scripts/gpu_model_checks.py run DIR        there: needs one GPU and TVM's runtime

`build` needs the `reference` extra. It makes random checkpoints, the logits that transformers
computes for them in float32 (with the dequantized weights of a quantized one), and an artefact of
each for CUDA. `run` compares logits of a prefill and of decoding steps, two rows of different
lengths, and lets `selftest` compare every kernel with float64.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]

PROMPTS, STEPS, VOCAB = (150, 37), 6, 384
TOLERANCE = 2e-2
"""Largest error of a logit, of the largest logit: activations and weights are float16, products
round to it after every layer. Measured on an H200: 3e-4 to 5.5e-3. A wrong scale or head is off by
over 0.2."""

FAMILIES = (
    *("mistral", "qwen2", "qwen2-window", "qwen3", "gemma2", "gemma3", "phi3", "phi3-longrope"),
    *("phi4-mini", "mixtral", "qwen3-moe", "qwen3-moe-normalized", "gpt-oss"),
)
SCHEMES = ("q4f16_1", "q3f16_1", "q8f16_1", "fp8f16")


@dataclass(frozen=True)
class Check:
    """A model to build: its config.json, and the scheme or the checkpoint's format."""

    name: str
    config: dict[str, Any]
    quantization: str | None = None
    stored: str | None = None
    """Format of `tests/quantized_models.py` that the checkpoint is in."""


def checks() -> Iterator[Check]:
    """All models."""
    import quantized_models
    from reference import families, models

    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 512,
    }
    llama = models._config(4, 2, 256, 512) | sizes
    yield Check("llama", llama, "q0f16")
    for name in FAMILIES:
        config = next(c.config for c in families.cases() if c.name == name) | sizes
        if "moe_intermediate_size" in config:
            config["moe_intermediate_size"] = 192
        if name.startswith("gemma"):
            config["head_dim"] = config["query_pre_attn_scalar"] = 256 if name == "gemma3" else 128
        if name.startswith("phi"):
            del config["head_dim"]
            turned = int(64 * config.get("partial_rotary_factor", 1.0)) // 2
            if config.get("rope_scaling"):
                long = [1.5 + 0.25 * i for i in range(turned)]
                short = [1.0 + 0.02 * i for i in range(turned)]
                config["rope_scaling"] = {
                    "type": "longrope",
                    "short_factor": short,
                    "long_factor": long,
                }
                config["original_max_position_embeddings"] = 100
        if config.get("sliding_window") and config["sliding_window"] < 20:
            config["sliding_window"] = 24
        yield Check(name, config, "q0f16")
    moe = next(c.config for c in families.cases() if c.name == "qwen3-moe-normalized") | sizes
    moe |= {"moe_intermediate_size": 192}
    for scheme in SCHEMES:
        yield Check(scheme, llama, scheme)
        yield Check(f"moe-{scheme}", moe, scheme)
    one_layer = {"num_hidden_layers": 1, "intermediate_size": 384}
    for name in [*quantized_models.FORMATS, *quantized_models.EXPERTS]:
        config = quantized_models.case_of(name).config | sizes | one_layer
        if "moe_intermediate_size" in config or config["model_type"] == "mixtral":
            config |= {"intermediate_size": 192, "moe_intermediate_size": 192}
        if config["model_type"] == "mixtral":
            del config["moe_intermediate_size"]
        yield Check(name, config, None, name)


def weights(name: str, shapes: dict[str, list[int]], tied: bool) -> dict[str, Any]:
    """Random weights; every row of a matrix is made of pieces of one random row.

    So they can be packed into little, and yet rows that follow each other differ.
    """
    piece, count = 160, 37  # whole groups of 32 and 40
    base = np.random.default_rng(zlib.crc32(b"base")).uniform(-(3**0.5), 3**0.5, piece * count)
    tensors = {}
    for key, shape in shapes.items():
        start = zlib.crc32(f"{name}/{key}".encode()) % count
        if len(shape) == 1:
            values = base[start * piece :][: shape[0]] / (6 if "norm" in key else 3)
            values = np.resize(values, shape) + (1.0 if "norm" in key else 0.0)
        else:
            deviation = 1.0 if "embed" in key and not tied else shape[-1] ** -0.5
            if any(part in key for part in ("q_proj", "k_proj", "qkv_proj")):
                deviation *= 1.5
            rows = [
                np.resize(np.roll(base, -piece * ((start + 11 * r) % count)), shape[-1])
                for r in range(count)
            ]
            whole = np.stack(rows)[np.arange(int(np.prod(shape[:-1]))) % count]
            values = whole.reshape(shape) * deviation
        tensors[key] = values.astype(np.float16).astype(np.float32)
    return tensors


def write(check: Check, quantized: Path, plain: Path) -> None:
    """Write the checkpoint that is built, and the one that transformers runs."""
    import make_reference
    import quantized_models
    from reference import models

    from shardwright.compiler.packing import dequantize, pack
    from shardwright.compiler.quantization import quantization, quantize

    case = models.Case(check.name, check.config, (), ())
    if check.stored is not None:
        whole = quantized_models.write(quantized, check.stored, case=case)
        quantized_models.save(plain, check.config, whole)
        return
    assert check.quantization is not None
    shapes = make_reference.saved_shapes(case)
    whole = weights(check.name, shapes, check.config.get("tie_word_embeddings", True))
    quantized_models.save(quantized, check.config, whole)
    packing = quantization(check.quantization).packing
    for name, values in whole.items():
        if packing is None or values.ndim != 2 or name.endswith("gate.weight"):
            continue
        sizes = SimpleNamespace(head_dim=64)  # a multiple of every group
        how = quantization(check.quantization).quantized(name, values.shape, ("", ""), sizes)
        assert how is not None
        codes, scale = quantize(values, how.packing)
        whole[name] = dequantize(pack(codes, packing.bits), scale, None, how.packing)
        whole[name] = whole[name][:, : values.shape[1]]
    quantized_models.save(plain, check.config, whole)


def build(folder: Path, only: list[str], archs: tuple[str, ...]) -> None:
    """Build every model that is not there yet, and compute its logits."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "scripts")]
    import make_reference
    import transformers
    from reference import models

    from shardwright.compiler.build import build as build_model
    from shardwright.compiler.options import BuildOptions

    transformers.utils.logging.disable_progress_bar()
    for check in checks():
        out = folder / check.name
        if (out / "expected.npz").is_file() or (only and check.name not in only):
            continue
        start = time.perf_counter()
        prompts = tuple(models._tokens(f"{check.name}/{n}", n, VOCAB) for n in PROMPTS)
        steps = tuple(models._tokens(f"{check.name}/step{i}", 2, VOCAB) for i in range(STEPS))
        case = models.Case(check.name, check.config, prompts, steps)
        with tempfile.TemporaryDirectory() as name:
            quantized, plain = Path(name) / "quantized", Path(name) / "plain"
            write(check, quantized, plain)
            logits = make_reference.case_logits(case, plain)
            options = {"max_batch_size": 2, "max_seq_len": 256, "use_cuda_graph": True}
            build_model(
                BuildOptions(
                    *(str(quantized), out / "dist", check.quantization),
                    target="cuda",
                    archs=archs,
                    **options,
                )
            )
        arrays = {f"prompt{i}": np.array(p) for i, p in enumerate(prompts)}
        np.savez_compressed(out / "expected.npz", logits=logits, steps=np.array(steps), **arrays)
        print(f"{check.name:24} {time.perf_counter() - start:6.1f} s", flush=True)


def run(folder: Path, only: list[str]) -> int:
    """Check every model under `folder`; the number that are wrong."""
    from shardwright import Session
    from shardwright.runtime.selftest import run as selftest

    wrong = 0
    print(f"{'model':24} {'prefill':>8} {'decode':>8} {'greedy':>7}  kernels checked, worst")
    for path in sorted(folder.glob("*/expected.npz")):
        name = path.parent.name
        if only and name not in only:
            continue
        with np.load(path) as file:
            want, steps = file["logits"], file["steps"]
            prompts = [file[f"prompt{i}"].tolist() for i in range(2)]
        try:
            with Session(path.parent / "dist") as session:
                got = [session.prefill(prompts)]
                got += [session.decode(list(map(int, step))) for step in steps]
                logits = np.stack(got).astype(np.float64)
                session.reset()
                findings = selftest(session)
        except Exception as error:  # the other models are still worth a look
            print(f"{name:24} {type(error).__name__}: {str(error)[:300]}", flush=True)
            wrong += 1
            continue
        errors = np.abs(logits - want).max(axis=(1, 2)) / np.abs(want).max()
        same = (logits.argmax(-1) == want.argmax(-1)).mean()
        bad = [f for f in findings if not f.passed and not f.note]
        missing = [f.name for f in findings if f.note == "no reference"]
        worst = max((f.error for f in findings if not f.note), default=0.0)
        fine = bool(errors.max() < TOLERANCE and not bad)
        wrong += not fine
        checked = sum(not f.note for f in findings)
        text = f"{checked} of {len(findings)}, {worst:.1e}"
        if bad:
            text += " WRONG: " + ", ".join(f"{f.name} {f.error:.1e}" for f in bad[:4])
        if missing:
            text += " no reference: " + ", ".join(missing[:6])
        print(
            f"{name:24} {errors[0]:8.1e} {errors[1:].max():8.1e} {same:7.2f}  {text}"
            f"{'' if fine else '  <<<'}",
            flush=True,
        )
    print(f"{wrong} wrong")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=("build", "run"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--arch", default="sm_90a")
    parser.add_argument("--only", nargs="*", default=[])
    args = parser.parse_args()
    if args.command == "run":
        return int(run(args.folder, args.only) > 0)
    args.folder.mkdir(parents=True, exist_ok=True)
    build(args.folder, args.only, tuple(args.arch.split(",")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
