"""Check and time the CUDA kernels alone, without a model.

    python scripts/gpu_kernel_checks.py build DIR     compiles (needs nvcc, no GPU)
    python scripts/gpu_kernel_checks.py run DIR       checks against torch and times (needs a GPU)

`build` writes `kernels.so`, with machine code for `--arch`, and `cases.json`. `run` needs TVM's
runtime, torch and `DIR` alone. Times are of replayed CUDA graphs whose operands rotate past the L2
cache; a product's bandwidth is its weight's bytes over its time.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import itertools
import json
import math
import re
import sys
import time
from pathlib import Path
from typing import Any

FP16, Q4 = "gemv", "q4_gemv"
GEMV: dict[str, tuple[Any, Any, Any]] = {  # (out, in), batches, kinds
    "8b": (
        [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)], (1, 2, 8, 16), (FP16, Q4)
    ),
    "8b, more rows": (
        [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)], (32, 64), (Q4,)
    ),
    "vocabulary": ([(128256, 4096)], (1, 8), (FP16,)),
    "70b": ([(10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)], (1, 8), (FP16, Q4)),
    "8b on 4": ([(1536, 4096), (4096, 1024), (7168, 4096), (4096, 3584)], (1, 8), (FP16,)),
    "70b on 2": ([(5120, 8192), (8192, 4096), (8192, 14336)], (1,), (FP16, Q4)),
    "70b on 4": (
        [(2560, 8192), (8192, 2048), (14336, 8192), (8192, 7168)], (1, 8, 16, 32, 64), (Q4,)
    ),
    "70b on 8": ([(1280, 8192), (8192, 1024), (8192, 3584)], (1,), (Q4,)),
    "odd": ([(1283, 96), (7, 11008), (1000, 5504)], (1, 3, 16), (FP16, Q4)),
    "odd, not whole groups": ([(130, 1048)], (1, 5), (FP16,)),
}  # fmt: skip
GATED = [  # gate and value above each other: (out, in), batch
    ((28672, 4096), 1),
    ((14336, 4096), 1),
    ((57344, 8192), 1),
    ((28672, 8192), 1),
    ((28672, 4096), 8),
    ((14336, 8192), 16),
    ((1286, 96), 3),
    ((1286, 192), 16),
    ((28672, 4096), 64),
    ((14336, 8192), 64),
    ((1296, 512), 21),
]
GROUPS = [
    ((4096, 4096), 64, 1),
    ((4096, 4096), 128, 8),
    ((1001, 1472), 64, 16),
    ((1000, 1536), 64, 50),
    ((4096, 4096), 128, 33),
]
Q4_GEMM = [  # tokens, out, in, group
    (2048, 28672, 4096, 32),
    (2048, 57344, 8192, 32),
    (2048, 8192, 7168, 32),
    (300, 4096, 4096, 64),
    (129, 1000, 256, 128),
    (100, 72, 384, 32),
    (64, 4096, 14336, 32),
    (3, 136, 128, 32),
]
GATED_GEMM = [  # tokens, features, in
    (2048, 14336, 4096),
    (2048, 14336, 8192),
    (1000, 3584, 8192),
    (257, 128, 64),
    (100, 1280, 320),
    (1, 256, 128),
]
NORMS = [4096, 8192, 5120, 1003, 16384, 16]
ATTENTION = [  # heads, kv_heads, head_dim, batch, contexts
    (32, 8, 128, 1, [256]),
    (32, 8, 128, 1, [4000]),
    (32, 8, 128, 1, [16384]),
    (32, 8, 128, 1, [131072]),
    (64, 8, 128, 1, [256]),
    (64, 8, 128, 1, [16384]),
    (16, 4, 128, 1, [256]),
    (16, 2, 128, 1, [256]),
    (16, 2, 128, 1, [4000]),
    (32, 32, 128, 1, [1000]),
    (40, 8, 128, 1, [16384]),
    (16, 8, 128, 1, [16384]),
    (56, 8, 128, 1, [16384]),
    (128, 8, 128, 1, [16384]),
    (128, 8, 128, 1, [256]),
    (64, 8, 80, 1, [301]),
    (128, 8, 256, 1, [256]),
    (128, 8, 256, 1, [16384]),
    (128, 8, 64, 1, [16384]),
    (64, 8, 64, 1, [16384]),
    (32, 2, 128, 1, [16384]),
    (30, 2, 128, 1, [700]),  # pairs of blocks with 8 and 7 query heads
    (18, 2, 256, 1, [40]),  # and with 5 and 4, which further blocks share
    (32, 8, 64, 1, [65536]),
    (32, 8, 80, 1, [65536]),
    (32, 8, 96, 1, [65536]),
    (32, 8, 256, 1, [16384]),
    (32, 8, 128, 4, [1, 17, 4000, 0]),
    (32, 8, 128, 8, [256] * 8),
    (32, 8, 128, 64, [256] * 64),
    (14, 2, 64, 3, [5, 1000, 63]),
    (28, 4, 80, 2, [1, 300]),
    (16, 1, 96, 2, [33, 0]),
    (9, 3, 256, 2, [700, 31]),
    (16, 1, 256, 2, [129, 4000]),
    (10, 2, 32, 2, [129, 4]),
    (4, 4, 16, 2, [3, 2000]),
    (18, 1, 64, 2, [77, 16]),
]
MASKED = dict(window=100, softcap=20.0)
PREFILL = [  # heads, kv_heads, head_dim, (row, from, to) of each piece of the chunk
    (32, 8, 128, [(0, 0, 4096)]),
    (32, 8, 128, [(0, 0, 16384)]),
    (32, 8, 128, [(0, 14336, 16384)]),
    (64, 8, 128, [(0, 0, 4096)]),
    (32, 8, 64, [(0, 0, 8192)]),
    (32, 8, 80, [(0, 0, 8192)]),
    (32, 32, 96, [(0, 0, 8192)]),
    (16, 8, 256, [(0, 0, 8192)]),
    (32, 8, 128, [(2, 10, 19), (0, 0, 7), (1, 100, 1500), (3, 5, 6)]),
    (9, 3, 48, [(1, 0, 300), (0, 50, 51), (2, 0, 129)]),
    (4, 4, 16, [(0, 0, 130), (1, 7, 9)]),
]
LAYERS, PAGE, MAX_LEN, VOCAB = 3, 16, 4096, 128256


def all_cases(tune: bool) -> list[dict[str, Any]]:
    """Every case as plain data: its kind, its name and what its kernel is generated from."""
    cases: list[dict[str, Any]] = []
    for shapes, batches, kinds in GEMV.values():
        for (n, k), batch, kind in itertools.product(shapes, batches, kinds):
            case = dict(kind=kind, name=f"{kind}_{batch}_{n}_{k}", batch=batch, n=n, k=k)
            cases.append(case)
            if tune and n * k >= 2**21:
                cases += tuning(case)
            # Those without tensor cores, for what the others do not take.
            if n * k <= 2**25 and batch <= 8:
                cases.append(case | dict(name=case["name"] + "_plain", plain=True))
    for ((n, k), batch), kind in itertools.product(GATED, (FP16, Q4)):
        name = f"{kind}_{batch}_{n}_{k}_gated"
        cases.append(dict(kind=kind, name=name, batch=batch, n=n, k=k, gated=True))
    for (n, k), group, batch in GROUPS:
        name = f"{Q4}_{batch}_{n}_{k}_group_{group}"
        cases.append(dict(kind=Q4, name=name, batch=batch, n=n, k=k, group=group))
    for heads, kv, dim, batch, contexts in ATTENTION:
        sizes = dict(heads=heads, kv=kv, dim=dim, batch=batch, contexts=contexts)
        name = f"{heads}_{kv}_{dim}_{batch}_{contexts[0]}"
        # On CUDA with the append, joined or apart, and without; and the kernel for any GPU.
        forms = ["joined", "apart", "alone", "plain"] if batch in (3, 4) else ["joined"]
        for form in forms:
            case = dict(kind="decode", name=f"decode_{form}_{name}", form=form, **sizes)
            masked = case | MASKED | dict(name=case["name"] + "_masked")
            cases += [case] if batch in (1, 8, 64) else [case, masked]
            if form == "alone":
                sunk = dict(name=case["name"] + "_sinks", sinks=True)
                cases += [case | sunk, masked | sunk | dict(name=masked["name"] + "_sinks")]
    for heads, kv, dim, chunk in PREFILL:
        sizes = dict(heads=heads, kv=kv, dim=dim, chunk=chunk, batch=4, contexts=[chunk[0][2]])
        name = f"prefill_{heads}_{kv}_{dim}_{sum(end - begin for _, begin, end in chunk)}"
        cases.append(dict(kind="prefill", name=name, form="cuda", **sizes))
        if len(chunk) > 1:
            cases.append(dict(kind="prefill", name=name + "_plain", form="plain", **sizes))
            masked = MASKED | dict(name=name + "_masked")
            cases.append(dict(kind="prefill", form="cuda", **sizes) | masked)
            sunk = dict(kind="prefill", form="cuda", name=name + "_sinks", sinks=True)
            cases.append(sunk | sizes)
    for n, rows, k, group in Q4_GEMM:
        name = f"q4_gemm_{n}_{rows}_{k}_{group}"
        cases.append(dict(kind="q4_gemm", name=name, n=n, rows=rows, k=k, group=group))
    for n, features, k in GATED_GEMM:
        name = f"gated_gemm_{n}_{features}_{k}"
        cases.append(dict(kind="gated_gemm", name=name, n=n, features=features, k=k))
    cases += [
        dict(kind=k, name=k)
        for k in ("rotary", "norm", "sample", "store", "take", "dequantize", "silu_mul")
    ]
    return cases


def tuning(case: dict[str, Any]) -> list[dict[str, Any]]:
    """The same product under other plans: chunk, tiles, depth, split, teams, cluster."""
    plans = [
        (256, 1, 2, 4, 4, 1),
        (256, 1, 2, 2, 8, 1),
        (128, 1, 4, 16, 1, 1),
        (128, 1, 3, 8, 2, 1),
    ]
    if case["batch"] > 1:
        plans = [
            (128, 1, depth, split, 16 // split, cluster)
            for depth in (2, 3)
            for split in (2, 4, 8)
            for cluster in (1, 2)
        ]
    return [
        case | dict(name="_".join(map(str, (case["name"], *plan))), plan=plan) for plan in plans
    ]


def product_kernel(case: dict[str, Any]) -> Any:
    """The kernel that the compiler would take, or another that `case` asks for; None if none is."""
    from shardwright.compiler.kernels import gemv, gemv_mma, gemv_rows, gemv_tokens, q4_batch

    sizes = dict(batch=case["batch"], out_features=case["n"], in_features=case["k"])
    group = case.get("group", 32) if case["kind"] == Q4 else 0
    gated = case.get("gated", False)
    product = gemv_mma.Product(**sizes, group=group, gated=gated)
    rows = None if case.get("plain") or case.get("plan") else gemv_rows.plan(product)
    if rows is not None:
        case["used"] = list(dataclasses.astuple(rows))
        del sizes["batch"]
        return gemv_rows.gemv_rows(
            **sizes, out_dtype="float16", group=group, gated=gated, tuned=rows
        )
    tokens = None if case.get("plain") or case.get("plan") else gemv_tokens.plan(product)
    if tokens is not None:
        case["used"] = list(dataclasses.astuple(tokens))
        return gemv_tokens.gemv_tokens(**sizes, out_dtype="float16", gated=gated, tuned=tokens)
    plan = None if case.get("plain") else gemv_mma.plan(product, clusters=True)
    if case.get("plan"):
        chosen = gemv_mma.Plan(*case["plan"])
        plan = product.in_phases(chosen, gemv_mma.SHARED_BYTES_CLUSTERS)
        if plan is None:
            return None
    if plan is not None:
        case["used"] = list(dataclasses.astuple(plan))
        return gemv_mma.gemv_mma(**sizes, out_dtype="float16", group=group, gated=gated, tuned=plan)
    several = None if case.get("plain") else q4_batch.plan(product)
    if several is not None:
        case["used"] = list(dataclasses.astuple(several))
        sizes |= dict(out_dtype="float16", group=group, gated=gated)
        return q4_batch.q4_batch(**sizes, tuned=several)
    case["used"] = "plain"
    if group:
        return gemv.q4_gemv(**sizes, out_dtype="float16", group=group, gated=gated)
    return gemv.gemv(**sizes, out_dtype="float16", gated=gated)


def max_len_of(case: dict[str, Any]) -> int:
    return max(MAX_LEN, *case["contexts"])


def pages_of(case: dict[str, Any]) -> int:
    return case["batch"] * max_len_of(case) // PAGE + 5


def layers_of(case: dict[str, Any]) -> int:
    """So many that the caches together pass the L2 cache."""
    size = 4 * sum(case["contexts"]) * case["kv"] * case["dim"]
    return max(LAYERS, min(64, 200 * 2**20 // size))


def build(directory: Path, archs: tuple[str, ...], tune: bool, only: str, match: str) -> None:
    import tvm

    from shardwright.compiler.cuda import cuda_target, install_hook
    from shardwright.compiler.kernels import (
        activation,
        attention,
        attention_cuda,
        gated_gemm,
        matmul,
        norm,
        q4_gemm,
        rotary,
        sampling,
        sampling_cuda,
    )
    from shardwright.compiler.pipeline import dependent_launch

    funcs: dict[str, Any] = {}
    cases = [
        case
        for case in all_cases(tune)
        if case["kind"].startswith(only) and re.search(match, case["name"])
    ]
    for case in cases:
        kind, name = case["kind"], case["name"]
        if kind in (FP16, Q4):
            kernel = product_kernel(case)
            if kernel is not None:
                funcs[name] = kernel
        elif kind in ("decode", "prefill"):
            sizes = dict(
                heads=case["heads"], kv_heads=case["kv"], head_dim=case["dim"],
                layers=layers_of(case), pages=pages_of(case), page_size=PAGE, batch=None,
                max_pages=max_len_of(case) // PAGE, dtype="float16", scale=case["dim"] ** -0.5,
                target="cuda", window=case.get("window", 0), softcap=case.get("softcap", 0.0),
            )  # fmt: skip
            sinks = case.get("sinks", False)
            n, form = case["batch"], case["form"]
            arch = min(int(a.removeprefix("sm_").rstrip("af")) for a in archs)
            if kind == "prefill" and form == "plain":
                funcs[name] = attention.attention_prefill(tokens=None, **sizes)
            elif kind == "prefill":
                funcs[name] = attention_cuda.prefill_attention(
                    tokens=None, arch=arch, sinks=sinks, **sizes
                )
            elif form != "plain":
                append = "" if form == "alone" else form
                funcs[name] = attention_cuda.decode_attention(
                    tokens=n, append=append, arch=arch, sinks=sinks, **sizes
                )
                group = case["heads"] // case["kv"]
                plan = attention_cuda.decode_plan(
                    tokens=n, kv_heads=case["kv"], group=group, head_dim=case["dim"], arch=arch
                )
                case["scratch"] = attention_cuda.decode_scratch(
                    plan, n, case["heads"], case["kv"], case["dim"]
                )
                case["plan"] = [plan.parts, plan.warps, plan.stages, plan.few, plan.splits]
            else:
                splits = attention.num_splits(
                    tokens=n, kv_heads=case["kv"], max_len=max_len_of(case)
                )
                funcs[name] = attention.attention_partial(tokens=n, splits=splits, **sizes)
                funcs[name + "_combine"] = attention.attention_combine(
                    tokens=n, heads=case["heads"], head_dim=case["dim"], dtype="float16",
                    splits=splits, target="cuda",
                )  # fmt: skip
                shape = (splits, n, case["heads"])
                case["scratch"], case["plan"] = ((*shape, case["dim"]), (*shape, 2)), [splits]
    funcs["table"] = rotary.rotary_table(
        tokens=None, half=64, scale=1.0, ntk=(2.0, 8192), target="cuda"
    )
    for joined in (False, True):
        funcs["append_joined" if joined else "append"] = rotary.rotary_append(
            tokens=None, heads=32, kv_heads=8, head_dim=128, layers=LAYERS, pages=600,
            page_size=PAGE, batch=None, max_pages=MAX_LEN // PAGE, dtype="float16", target="cuda",
            joined=joined,
        )  # fmt: skip
    for features in NORMS:
        funcs[f"norm_{features}"] = norm.add_rms_norm(
            tokens=None, features=features, eps=1e-5, dtype="float16", target="cuda"
        )
    funcs["sample"] = sampling.sample(batch=None, vocab=VOCAB, max_len=MAX_LEN, target="cuda")
    if "sample".startswith(only) and all(int(arch[3:].rstrip("af")) >= 90 for arch in archs):
        cases.append({"kind": "sample", "name": "sample_cuda"})
        funcs["sample_cuda"] = sampling_cuda.sample(batch=None, vocab=VOCAB, max_len=MAX_LEN)
    funcs["store"] = sampling.store_logits(batch=None, vocab=VOCAB, target="cuda")
    funcs["take"] = matmul.q4_take(
        tokens=None, vocab_rows=1000, features=4096, group=32, dtype="float16", target="cuda"
    )
    funcs["dequantize"] = matmul.q4_dequantize(
        out_features=28672, in_features=4096, group=32, dtype="float16", target="cuda"
    )
    funcs["silu_mul"] = activation.silu_mul(tokens=None, features=14336, dtype="float16")
    funcs["q4_gemm_image"] = q4_gemm.q4_gemm_image()
    for group in {group for *_, group in Q4_GEMM}:
        funcs[f"q4_gemm_{group}"] = q4_gemm.q4_gemm(group=group)
    for rows, group in {(rows, group) for _, rows, _, group in Q4_GEMM if rows % 256 == 0}:
        half = rows // 2
        funcs[f"q4_gemm_silu_{half}"] = q4_gemm.silu_mul_image(features=half)
        gated = q4_gemm.q4_gemm_gated(group=group, features=half)
        funcs[f"q4_gemm_gated_{half}_{group}"] = gated
    for _, features, k in GATED_GEMM:
        name = f"gated_gemm_{features}_{k}"
        funcs[name] = gated_gemm.gated_gemm(features=features, inner=k)
    cases = [c for c in cases if c["kind"] not in (FP16, Q4) or c["name"] in funcs]
    install_hook(archs)
    kept = {c["kind"] for c in cases}
    if only or match:
        funcs = {n: f for n, f in funcs.items() if any(n.startswith(kind) for kind in kept)}
    mod = tvm.IRModule({n: f.with_attr("global_symbol", n) for n, f in funcs.items()})
    directory.mkdir(parents=True, exist_ok=True)
    target = cuda_target(archs)
    with target:
        mod = dependent_launch(mod)
    tvm.compile(mod, target=target).export_library(str(directory / "kernels.so"))
    (directory / "cases.json").write_text(json.dumps(cases))
    print(f"{len(funcs)} kernels, {(directory / 'kernels.so').stat().st_size / 2**20:.1f} MiB")


def weight_bytes(n: int, k: int, group: int) -> int:
    """Bytes of a weight, with its scales if it has any."""
    return n * k // 2 + n * (k // group) * 2 if group else n * k * 2


class _Runner:
    """Runs the cases on a GPU; each method checks one kind and prints a line."""

    def __init__(self, directory: Path) -> None:
        import torch
        import tvm_ffi

        spec = __import__("importlib.util").util.find_spec("tvm")
        lib = Path(spec.origin).parent / "lib"
        for name in ("libtvm_runtime.so", "libtvm_runtime_extra.so", "libtvm_runtime_cuda.so"):
            ctypes.CDLL(str(lib / name), mode=ctypes.RTLD_GLOBAL)
        import tvm  # noqa: F401

        self.torch, self.failures = torch, 0
        self.functions = tvm_ffi.load_module(str(directory / "kernels.so"))
        torch.manual_seed(0)
        self.rows: list[dict[str, Any]] = []
        self.held: tuple[Any, Any] = (None, None)

    def call(self, name: str, *args: Any) -> None:
        self.functions[name](*args)

    def report(self, case: dict[str, Any], error: float, bound: float, **figures: Any) -> None:
        good = error <= bound
        self.failures += not good
        shown = "  ".join(
            f"{k} {v:.2f}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items()
        )
        print(f"{'ok  ' if good else 'FAIL'} {case['name']:44s} error {error:.1e}  {shown}")
        self.rows.append({"name": case["name"], "error": error, "ok": good, **figures})

    def time(self, calls: list[Any], repeat: int = 3) -> float:
        """Microseconds of one call, from a graph that replays all of `calls` (each a thunk)."""
        torch = self.torch
        for call in calls:
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(repeat):
                for call in calls:
                    call()
        # Clocks that fell while operands were made rise within some milliseconds.
        warm = time.perf_counter() + 0.03
        while time.perf_counter() < warm:
            graph.replay()
            torch.cuda.synchronize()
        best = math.inf
        for _ in range(5):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            best = min(best, start.elapsed_time(end) * 1000 / (len(calls) * repeat))
        return best

    def copies(self, size: int) -> int:
        """Operands that together pass the L2 cache three times."""
        return max(1, min(40, 180 * 2**20 // size))

    def unpacked(self, packed: Any, scale: Any, group: int = 32) -> Any:
        torch = self.torch
        shifts = torch.arange(0, 32, 4, device="cuda")
        nibbles = (packed.view(torch.int32)[..., None] >> shifts) & 15
        shape = (packed.shape[0], packed.shape[1] * 8)
        return (nibbles.reshape(shape).double() - 7) * scale.double().repeat_interleave(group, 1)

    def quantized(self, n: int, k: int, group: int = 32) -> tuple[Any, Any]:
        torch = self.torch
        packed = torch.randint(-(2**31), 2**31 - 1, (n, k // 8), device="cuda", dtype=torch.int64)
        scale = (torch.rand(n, k // group, device="cuda") / 64).half()
        return packed.to(torch.int32).view(torch.uint32), scale

    def operands(self, n: int, k: int, batch: int, group: int) -> tuple[Any, list[Any], Any]:
        """x, copies of the weight that pass the L2 cache, and the product of the first of them."""
        torch, key = self.torch, (n, k, batch, group)
        if key != self.held[0]:
            self.held = (None, None)
            x = torch.randn(batch, k, device="cuda").half()
            weights: list[Any] = []
            for _ in range(self.copies(weight_bytes(n, k, group))):
                if group:
                    weights.append(self.quantized(n, k, group))
                else:
                    weights.append((torch.randn(n, k, device="cuda", dtype=torch.half) / 16,))
            dense = self.unpacked(*weights[0], group) if group else weights[0][0].double()
            self.held = (key, (x, weights, x.double() @ dense.T))
        return self.held[1]

    def product(self, case: dict[str, Any]) -> None:
        torch = self.torch
        n, k, batch = case["n"], case["k"], case["batch"]
        group = case.get("group", 32) if case["kind"] == Q4 else 0
        x, weights, want = self.operands(n, k, batch, group)
        if case.get("gated"):
            gate, value = (half.half().double() for half in want.chunk(2, 1))
            want = torch.nn.functional.silu(gate) * value
        outs, again = (torch.full(want.shape, torch.nan, device="cuda").half() for _ in range(2))
        self.call(case["name"], x, *weights[0], outs)
        error = ((outs.double() - want).abs().max() / want.abs().max()).item()
        calls = [lambda w=w: self.call(case["name"], x, *w, outs) for w in weights]
        # Long enough that starting the graph from Python does not count.
        us = self.time(calls, max(3, -(-40 // len(calls))))
        self.call(case["name"], x, *weights[0], again)
        self.call(case["name"], x, *weights[0], outs)
        if not torch.equal(outs, again):
            error = math.inf  # two calls must give the same bits
        bound = 6e-3 if case.get("gated") else 2e-3  # a product of two such sums
        tbps = weight_bytes(n, k, group) / us / 1e6
        self.report(case, error, bound, us=us, TBps=tbps, plan=case["used"])

    def silu_mul(self, case: dict[str, Any]) -> None:
        torch = self.torch
        y = torch.randn(2048, 28672, device="cuda").half()
        out = torch.full((2048, 14336), torch.nan, device="cuda").half()
        self.call("silu_mul", y, out)
        gate, up = y.float().chunk(2, 1)
        want = torch.nn.functional.silu(gate) * up
        error = (out.float() - want).abs().max().item() / want.abs().max().item()
        us = self.time([lambda: self.call("silu_mul", y, out)])
        self.report(case, error, 1e-3, us=us, GBps=6 * out.numel() / us / 1e3)

    def q4_gemm(self, case: dict[str, Any]) -> None:
        torch = self.torch
        n, rows, k, group = (case[key] for key in ("n", "rows", "k", "group"))
        x = torch.randn(n, k, device="cuda").half()
        packed, scale = self.quantized(rows, k, group)
        dense = self.unpacked(packed, scale, group).half()
        want = torch.cat([part.double() @ dense.double().T for part in x.split(256)])
        image = torch.full((-(-n // 256) * 256, k), torch.nan, device="cuda").half()
        out = torch.full(want.shape, torch.nan, device="cuda").half()

        def product() -> None:
            self.call("q4_gemm_image", x, image)
            self.call(f"q4_gemm_{group}", image, packed, scale, out)

        product()
        error = ((out.double() - want).abs().max() / want.abs().max()).item()
        if rows % 256 == 0:
            half = rows // 2
            apart, fused = torch.full((2, len(image), half), torch.nan, device="cuda").half()
            self.call(f"q4_gemm_silu_{half}", out, apart)
            self.call(f"q4_gemm_gated_{half}_{group}", image, packed, scale, n, fused)
            error += float(not torch.equal(apart.view(torch.short), fused.view(torch.short)))
        us, cublas = self.time([product]), self.time([lambda: torch.mm(x, dense.T, out=out)])
        flops = 2 * n * rows * k / 1e6
        self.report(case, error, 2e-3, us=us, TFLOPs=flops / us, cublas_TFLOPs=flops / cublas)

    def gated_gemm(self, case: dict[str, Any]) -> None:
        torch = self.torch
        n, features, k = (case[key] for key in ("n", "features", "k"))
        x, w = torch.randn(n, k, device="cuda").half(), torch.randn(2 * features, k, device="cuda")
        w = (w / k**0.5).half()
        gate, up = (x.double() @ w.double().T).half().double().split(features, 1)
        want = torch.nn.functional.silu(gate) * up
        y = torch.empty(n, 2 * features, device="cuda").half()
        out = torch.full(want.shape, torch.nan, device="cuda").half()

        def product() -> None:
            self.call(f"gated_gemm_{features}_{k}", x, w, out)

        product()
        error = ((out.double() - want).abs().max() / want.abs().max()).item()
        us, cublas = self.time([product]), self.time([lambda: torch.mm(x, w.T, out=y)])
        flops = 4 * n * features * k / 1e6
        self.report(case, error, 2e-3, us=us, TFLOPs=flops / us, cublas_TFLOPs=flops / cublas)

    def cache(self, case: dict[str, Any]) -> tuple[Any, Any, Any]:
        torch = self.torch
        shape = (layers_of(case), pages_of(case), case["kv"], PAGE, case["dim"])
        pages = [torch.randn(shape, device="cuda", dtype=torch.half) for _ in range(2)]
        table = torch.randperm(pages_of(case), device="cuda")
        table = table[: case["batch"] * (max_len_of(case) // PAGE)]
        return *pages, table.reshape(case["batch"], -1).int()

    def expected(
        self, case: dict[str, Any], q: Any, cache: Any, rows: list[int], at: list[int], layer: int
    ) -> Any:
        torch = self.torch
        k_pages, v_pages, table = cache
        out = torch.zeros(q.shape, dtype=torch.double, device="cuda")
        group, softcap = q.shape[1] // k_pages.shape[2], case.get("softcap", 0.0)
        for t, (row, position) in enumerate(zip(rows, at, strict=True)):
            window = case.get("window", 0) or position + 1
            p = torch.arange(max(0, position + 1 - window), position + 1, device="cuda")
            if position < 0:
                continue
            k, v = (
                x[layer][table[row].long()[p // PAGE], :, p % PAGE].double()
                for x in (k_pages, v_pages)
            )
            heads = q[t].double().unflatten(0, (-1, group))
            score = torch.einsum("kgd,pkd->kgp", heads, k) * q.shape[2] ** -0.5
            if softcap:
                score = softcap * (score / softcap).tanh()
            if case.get("sinks"):  # a score whose value is 0
                sink = self.sinks(case).double().view(*score.shape[:2], 1)
                score = torch.cat([score, sink], 2)
                v = torch.cat([v, torch.zeros_like(v[:1])])
            out[t] = torch.einsum("kgp,pkd->kgd", score.softmax(2), v).flatten(0, 1)
        return out

    def sinks(self, case: dict[str, Any]) -> Any:
        """A score for each query head, higher than most others."""
        return self.torch.linspace(-1, 6, case["heads"], device="cuda")

    def decode(self, case: dict[str, Any]) -> None:
        torch, n, form = self.torch, case["batch"], case["form"]
        at = [c - 1 for c in (case["contexts"] * n)[:n]]
        heads, kv, dim = case["heads"], case["kv"], case["dim"]
        cache, layer = self.cache(case), 1
        qkv = torch.randn(n, heads + 2 * kv, dim, device="cuda").half()
        angle = torch.rand(n, 1, dim // 2, device="cuda") * 100
        table = torch.cat([angle.cos(), angle.sin()], 1)
        low, high = qkv[:, : heads + kv].float().chunk(2, 2)
        turned = torch.cat([low * table[:, :1] - high * table[:, 1:],
                            high * table[:, :1] + low * table[:, 1:]], 2).half()  # fmt: skip
        full = [c.clone() for c in cache[:2]]
        for t, p in enumerate(at):
            if p >= 0:
                place = (layer, cache[2][t, p // PAGE].item(), slice(None), p % PAGE)
                full[0][place], full[1][place] = turned[t, heads:], qkv[t, heads + kv :]
        rows = torch.arange(n, device="cuda", dtype=torch.int32)
        where = rows, torch.tensor(at, device="cuda", dtype=torch.int32)
        q = turned[:, :heads].contiguous()
        out = torch.full_like(q, torch.nan)
        scratch = [torch.full(s, torch.nan, device="cuda") for s in case["scratch"]]
        apart = [x.contiguous() for x in qkv.split([heads, kv, kv], 1)]
        first = {"joined": [qkv.flatten(1), table], "apart": [*apart, table]}.get(form, [q])
        pages = [*cache[:2]] if form in ("joined", "apart") else full
        sinks = [self.sinks(case)] if case.get("sinks") else []

        def step(layer: int) -> None:
            args = (*first, *pages, cache[2], *where, *sinks, layer)
            if form == "plain":
                self.call(case["name"], *args, *scratch)
                self.call(case["name"] + "_combine", *scratch, out)
            else:
                self.call(case["name"], *args, out, *scratch)

        step(layer)
        want = self.expected(case, q, (*full, cache[2]), list(range(n)), at, layer)
        error = (out.double() - want).abs().max().item()
        error = max(error, *((p - f).abs().max().item() for p, f in zip(pages, full, strict=True)))
        seen = out.clone()
        step(layer)
        error += 0.0 if torch.equal(seen, out) else 1.0
        us = self.time([lambda i=i: step(i) for i in range(layers_of(case))], 1)
        size = 4 * sum(c + 1 for c in at) * kv * dim
        self.report(case, error, 4e-3, us=us, GBps=size / us / 1e3, plan=case["plan"])

    def prefill(self, case: dict[str, Any]) -> None:
        torch = self.torch
        rows = [row for row, begin, end in case["chunk"] for _ in range(begin, end)] + [0]
        at = [p for _, begin, end in case["chunk"] for p in range(begin, end)] + [-1]
        q = torch.randn(len(rows), case["heads"], case["dim"], device="cuda").half()
        cache, out = self.cache(case), torch.full_like(q, torch.nan)
        tensors = [torch.tensor(x, device="cuda", dtype=torch.int32) for x in (rows, at)]
        tensors += [self.sinks(case)] if case.get("sinks") else []
        self.call(case["name"], q, *cache, *tensors, 2, out)
        some = [*range(0, len(rows), -(-len(rows) // 97)), len(rows) - 1]
        chosen = [rows[i] for i in some], [at[i] for i in some]
        want = self.expected(case, q[some], cache, *chosen, 2)
        error = (out[some].double() - want).abs().max().item()
        seen = out.clone()
        us = self.time([lambda: self.call(case["name"], q, *cache, *tensors, 2, out)], 1)
        error += 0.0 if torch.equal(seen, out) else 1.0
        flops = 4 * sum(p + 1 for p in at) * case["heads"] * case["dim"]
        self.report(case, error, 4e-3, us=us, tokens=len(rows), TFLOPs=flops / us / 1e6)

    def rotary(self, case: dict[str, Any]) -> None:
        torch = self.torch
        positions = torch.tensor([0, 7, 4000, -1, 100_000], device="cuda", dtype=torch.int32)
        lengths = torch.tensor([1, 8192, 8193, 1, 100_001], device="cuda", dtype=torch.int32)
        inv = (10000.0 ** (-torch.arange(64, device="cuda", dtype=torch.double) / 64)).float()
        table = torch.empty(5, 2, 64, device="cuda")
        self.call("table", positions, lengths, inv, table)
        ratio = torch.where(lengths > 8192, 2.0 * lengths / 8192 - 1, 1.0)[:, None].float()
        freq = inv * ratio ** (-2 * torch.arange(64, device="cuda") / 126)
        angle = (positions[:, None].float() * freq).double()
        want = torch.stack([angle.cos(), angle.sin()], 1)
        error = (table - want)[:4].abs().max().item()
        self.report({"name": "rotary_table"}, error, 2e-3)
        q, k, v = (torch.randn(5, h, 128, device="cuda").half() for h in (32, 8, 8))
        shape = (LAYERS, 600, 8, PAGE, 128)
        pages = [torch.zeros(shape, device="cuda", dtype=torch.half) for _ in range(2)]
        table_of = torch.randperm(512, device="cuda").reshape(2, 256).int()
        rows = torch.tensor([1, 0, 1, 0, 0], device="cuda", dtype=torch.int32)
        at = torch.tensor([0, 7, 4000, -1, 33], device="cuda", dtype=torch.int32)
        out = torch.empty_like(q)

        def rotate(x: Any) -> Any:
            c, s = (table[:, i, None].double() for i in range(2))
            a, b = x[..., :64].double(), x[..., 64:].double()
            return torch.cat([a * c - b * s, b * c + a * s], -1)

        wanted = [torch.zeros(shape, device="cuda", dtype=torch.double) for _ in range(2)]
        for t in (0, 1, 2, 4):
            page, slot = table_of[rows[t], at[t] // PAGE], at[t] % PAGE
            wanted[0][1, page, :, slot] = rotate(k)[t]
            wanted[1][1, page, :, slot] = v[t].double()
        qkv = torch.cat([x.flatten(1) for x in (q, k, v)], 1)
        for name, read in (("append", (q, k, v)), ("append_joined", (qkv,))):
            for p in (*pages, out):
                p.zero_()
            args = (*read, table, *pages, table_of, rows, at, 1, out)
            self.call(name, *args)
            error = (out - rotate(q)).abs().max().item()
            error = max(
                error, *((p - w).abs().max().item() for p, w in zip(pages, wanted, strict=True))
            )
            us = self.time([lambda name=name, args=args: self.call(name, *args)] * 10)
            self.report({"name": f"rotary_{name}"}, error, 4e-3, us=us)

    def norm(self, case: dict[str, Any]) -> None:
        torch = self.torch
        for features in NORMS:
            x, y = (torch.randn(5, features, device="cuda").half() for _ in range(2))
            weight = torch.randn(features, device="cuda").half()
            outs = [torch.full_like(x, torch.nan) for _ in range(2)]
            self.call(f"norm_{features}", x, y, weight, *outs)
            total = (x + y).double()
            scale = (total.square().mean(1, keepdim=True) + 1e-5).rsqrt()
            want = total * scale * weight.double()
            error = ((outs[1].double() - want).abs().max() / want.abs().max()).item()
            error += 0.0 if torch.equal(outs[0], x + y) else 1.0
            one = [a[:1] for a in (x, y)], [a[:1] for a in outs]

            def once(features: int = features, weight: Any = weight, one: Any = one) -> None:
                self.call(f"norm_{features}", *one[0], weight, *one[1])

            us = self.time([once] * 10)
            self.report({"name": f"add_rms_norm_{features}"}, error, 1e-3, us=us)

    def sample(self, case: dict[str, Any]) -> None:
        torch = self.torch
        b = 64
        logits = torch.randn(1, VOCAB, device="cuda").repeat(b, 1) * 3
        logits[:, 9] = torch.nan
        options: dict[str, tuple[float, float, float, int]] = {
            "greedy": (0.0, 1.0, 1.0, 0),
            "plain": (1.0, 1.0, 1.0, 0),
            "top_k": (0.7, 1.0, 1.0, 5),
            "top_p": (1.0, 0.2, 1.0, 0),
            "both": (1.0, 0.5, 1.3, 40),
        }
        for name, (temperature, top_p, penalty, top_k) in options.items():
            f = torch.tensor([[temperature, top_p, penalty, 0]], device="cuda").repeat(b, 1)
            i = torch.zeros(b, 8, device="cuda", dtype=torch.int32)
            i[:, 0], i[:, 3], i[:, 4] = top_k, 1, torch.arange(b)
            history = torch.zeros(b, MAX_LEN, device="cuda", dtype=torch.int32)
            eos = torch.full((b, 16), -1, device="cuda", dtype=torch.int32)
            tokens = torch.zeros(b, device="cuda", dtype=torch.int32)
            positions = torch.full((b,), 5, device="cuda", dtype=torch.int32)
            positions[-1] = -1
            scores = torch.empty_like(logits)
            args = (logits, scores, tokens, positions, history, f, i, eos)
            self.call(case["name"], *args)
            x = logits[0].double().nan_to_num(-math.inf)
            x[0] = x[0] / penalty if x[0] > 0 else x[0] * penalty
            order = x.argsort(descending=True)
            keep = VOCAB if temperature else 1
            if top_k:
                keep = min(keep, top_k)
            p = (x[order[:keep]] / (temperature or 1)).softmax(0)
            keep = int((p.cumsum(0) - p < top_p).sum()) if top_p < 1 else keep
            allowed = set(order[:keep].tolist())
            got = tokens[:-1].tolist()
            first = tokens.clone()
            positions[:-1] = 5
            self.call(case["name"], *args)
            same = torch.equal(first, tokens) and positions[-1] == -1 and positions[0] == 6
            bad = sum(t not in allowed for t in got) + (not same) + 10 * (tokens[-1] != 0).item()
            few = len(set(got)) < min(keep, 8) // 2
            times = []
            for rows in (1, 8):
                views = [a[:rows] for a in args]

                def once(views: Any = views) -> None:
                    self.call(case["name"], *views)

                times.append(self.time([once] * 3))
            self.report(
                {"name": f"{case['name']}_{name}"}, float(bad + few), 0,
                us_1=times[0], us_8=times[1], kept=keep, distinct=len(set(got)),
            )  # fmt: skip

    def store(self, case: dict[str, Any]) -> None:
        torch = self.torch
        new, logits = torch.randn(4, VOCAB, device="cuda"), torch.zeros(4, VOCAB, device="cuda")
        last = torch.tensor([3, -1, 0, -1], device="cuda", dtype=torch.int32)
        self.call("store", new, last, logits)
        want = torch.where(last[:, None] >= 0, new, 0)
        us = self.time([lambda: self.call("store", new, last, logits)] * 10)
        self.report(case, (logits - want).abs().max().item(), 0, us=us)

    def take(self, case: dict[str, Any]) -> None:
        torch = self.torch
        packed, scale = self.quantized(1000, 4096)
        ids = torch.tensor([999, 1000, 1999, 2000, 0], device="cuda", dtype=torch.int32)
        rank = torch.ones(1, device="cuda", dtype=torch.int32)
        out = torch.full((5, 4096), torch.nan, device="cuda").half()
        self.call("take", packed, scale, ids, rank, out)
        want = torch.zeros(5, 4096, device="cuda", dtype=torch.double)
        want[1:3] = self.unpacked(packed, scale)[[0, 999]]
        self.report(case, (out - want).abs().max().item(), 1e-4)

    def dequantize(self, case: dict[str, Any]) -> None:
        torch = self.torch
        packed, scale = self.quantized(28672, 4096)
        out = torch.full((28672, 4096), torch.nan, device="cuda").half()
        self.call("dequantize", packed, scale, out)
        error = (out - self.unpacked(packed, scale)).abs().max().item()
        us = self.time([lambda: self.call("dequantize", packed, scale, out)] * 3)
        self.report(case, error, 1e-4, us=us, TBps=28672 * 4096 * (2 + 9 / 16) / us / 1e6)

    def run(self, cases: list[dict[str, Any]]) -> None:
        import traceback

        for case in sorted(cases, key=lambda c: c["kind"] in (FP16, Q4)):
            kind = "product" if case["kind"] in (FP16, Q4) else case["kind"]
            try:
                getattr(self, kind)(case)
            except Exception:
                self.failures += 1
                print("FAIL", case["name"], traceback.format_exc()[-1500:])
            sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("mode", choices=["build", "run"])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--arch", default="sm_90a", help="for build, comma-separated")
    parser.add_argument("--tune", action="store_true", help="build other plans of the products too")
    parser.add_argument("--only", default="", help="for build, cases of kinds that begin so")
    parser.add_argument("--match", default="", help="for build, cases whose name matches this")
    parser.add_argument("--json", type=Path, help="for run, write the figures here")
    args = parser.parse_args()
    if args.mode == "build":
        build(args.directory, tuple(args.arch.split(",")), args.tune, args.only, args.match)
        return 0
    runner = _Runner(args.directory)
    runner.run(json.loads((args.directory / "cases.json").read_text()))
    if args.json:
        args.json.write_text(json.dumps(runner.rows))
    print(f"{len(runner.rows)} cases, {runner.failures} failures")
    return runner.failures > 0


if __name__ == "__main__":
    sys.exit(main())
