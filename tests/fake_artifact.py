"""A built artefact without a compiler of ours: a model whose tokens and logits are arithmetic.

Row r at position p, with the tokens fed to it so far adding up to s, has the logits
`scale * -((7 s + 3 p - v) mod V)`, so that the greedy token is `(7 s + 3 p) mod V`. The sum runs
over the cache, so a wrong position, page or row shows. Every rank contributes its weight times the
arithmetic, and `scale` is the sum of all weights: 1 + 2 + ... + N.
"""

import json
from pathlib import Path

import numpy as np
import tvm
from safetensors.numpy import save_file
from tvm import relax
from tvm.script import tirx as T

from shardwright.runtime import artifact

VOCAB, BATCH, LENGTH, PAGE, CHUNK = 101, 4, 48, 4, 8
PAGES = LENGTH // PAGE
EOS = 2


def expected_logits(row: list[int], world: int) -> np.ndarray:
    """Logits at the last position of a row."""
    code = 7 * sum(row) + 3 * (len(row) - 1)
    scale = world * (world + 1) // 2
    return -((code - np.arange(VOCAB)) % VOCAB).astype(np.float32) * scale


def expected_tokens(row: list[int], count: int) -> list[int]:
    """Greedy continuation of a row."""
    row = list(row)
    for _ in range(count):
        row.append((7 * sum(row) + 3 * (len(row) - 1)) % VOCAB)
    return row[-count:]


@T.prim_func
def prefill_kernel(
    tokens_: T.handle,
    rows_: T.handle,
    positions_: T.handle,
    last: T.Buffer((BATCH,), "int32"),
    table: T.Buffer((BATCH, PAGES), "int32"),
    pages: T.Buffer((BATCH * PAGES, PAGE), "float32"),
    logits: T.Buffer((BATCH, VOCAB), "float32"),
    scores: T.Buffer((BATCH, VOCAB), "float32"),
    weight: T.Buffer((1,), "float32"),
):
    T.func_attr({"global_symbol": "prefill_kernel", "tirx.noalias": False})
    n = T.int64()
    tokens = T.match_buffer(tokens_, (n,), "int32")
    rows = T.match_buffer(rows_, (n,), "int32")
    positions = T.match_buffer(positions_, (n,), "int32")
    total = T.alloc_buffer((1,), "float32")
    for t in range(n):
        pages[table[rows[t], positions[t] // PAGE], positions[t] % PAGE] = T.Cast(
            "float32", tokens[t]
        )
    for r in range(BATCH):
        if last[r] >= 0:
            total[0] = T.float32(0)
            for p in range(positions[last[r]] + 1):
                total[0] = total[0] + pages[table[r, p // PAGE], p % PAGE]
            for v in range(VOCAB):
                scores[r, v] = (
                    T.Cast(
                        "float32",
                        (T.Cast("int32", total[0]) * 7 + positions[last[r]] * 3 - v + VOCAB)
                        % VOCAB,
                    )
                    * T.float32(-1)
                    * weight[0]
                )


@T.prim_func
def keep_kernel(
    last: T.Buffer((BATCH,), "int32"),
    summed: T.Buffer((BATCH, VOCAB), "float32"),
    logits: T.Buffer((BATCH, VOCAB), "float32"),
):
    T.func_attr({"global_symbol": "keep_kernel", "tirx.noalias": False})
    for r in range(BATCH):
        if last[r] >= 0:
            for v in range(VOCAB):
                logits[r, v] = summed[r, v]


@T.prim_func
def decode_kernel(
    tokens_: T.handle,
    positions_: T.handle,
    table_: T.handle,
    pages: T.Buffer((BATCH * PAGES, PAGE), "float32"),
    scores_: T.handle,
    weight: T.Buffer((1,), "float32"),
):
    T.func_attr({"global_symbol": "decode_kernel", "tirx.noalias": False})
    b = T.int64()
    tokens = T.match_buffer(tokens_, (b,), "int32")
    positions = T.match_buffer(positions_, (b,), "int32")
    table = T.match_buffer(table_, (b, PAGES), "int32")
    scores = T.match_buffer(scores_, (b, VOCAB), "float32")
    total = T.alloc_buffer((1,), "float32")
    for r in range(b):
        if positions[r] >= 0:
            pages[table[r, positions[r] // PAGE], positions[r] % PAGE] = T.Cast(
                "float32", tokens[r]
            )
            total[0] = T.float32(0)
            for p in range(positions[r] + 1):
                total[0] = total[0] + pages[table[r, p // PAGE], p % PAGE]
            for v in range(VOCAB):
                scores[r, v] = (
                    T.Cast(
                        "float32",
                        (T.Cast("int32", total[0]) * 7 + positions[r] * 3 - v + VOCAB) % VOCAB,
                    )
                    * T.float32(-1)
                    * weight[0]
                )


@T.prim_func
def sample_kernel(logits_: T.handle, tokens_: T.handle, positions_: T.handle, history_: T.handle):
    T.func_attr({"global_symbol": "sample_kernel", "tirx.noalias": False})
    b = T.int64()
    logits = T.match_buffer(logits_, (b, VOCAB), "float32")
    tokens = T.match_buffer(tokens_, (b,), "int32")
    positions = T.match_buffer(positions_, (b,), "int32")
    history = T.match_buffer(history_, (b, LENGTH), "int32")
    best = T.alloc_buffer((1,), "int32")
    for r in range(b):
        if positions[r] >= 0 and positions[r] + 1 < LENGTH:
            best[0] = 0
            for v in range(VOCAB):
                if logits[r, v] > logits[r, best[0]]:
                    best[0] = v
            tokens[r] = best[0]
            positions[r] = positions[r] + 1
            history[r, positions[r]] = best[0]


def state_specs(rows: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of the state tensors, for the first `rows` rows."""
    return {
        "tokens": ((rows,), "int32"),
        "rows": ((rows,), "int32"),
        "positions": ((rows,), "int32"),
        "page_table": ((rows, PAGES), "int32"),
        "k_pages": ((BATCH * PAGES, PAGE), "float32"),
        "v_pages": ((1,), "float32"),
        "history": ((rows, LENGTH), "int32"),
        "sampling_f": ((rows, 4), "float32"),
        "sampling_i": ((rows, 8), "int32"),
        "eos": ((rows, 16), "int32"),
        "logits": ((rows, VOCAB), "float32"),
        "scores": ((rows, VOCAB), "float32"),
        "rank": ((1,), "int32"),
    }


class _Builder:
    """Emits Relax functions that are sequences of packed calls, and notes their arguments."""

    def __init__(self) -> None:
        self.bb = relax.BlockBuilder()
        self.arguments: dict[str, list[dict]] = {}

    def function(self, name, inputs, state, weights, calls):
        """`inputs`, `state`, `weights`: name -> (shape, dtype); `calls`: (function, names)."""
        n = tvm.tirx.Var("n", "int64")
        variables, specs = {}, []
        for group in (inputs, state, {"workspace": ((), "object")}, weights):
            for key, (shape, dtype) in group.items():
                if dtype == "object":
                    variables[key] = relax.Var(key, relax.AnyType())
                else:
                    dims = [n if d == "n" else d for d in shape]
                    # An input hides the state tensor of its name, as in the real program.
                    variables[key if key not in variables else f"{key}_state"] = relax.Var(
                        key, relax.TensorType(dims, dtype)
                    )
                specs.append({"name": key, "shape": list(shape), "dtype": dtype})
        self.arguments[name] = specs
        with self.bb.function(name, list(variables.values()), pure=False):
            for callee, names in calls:
                self.bb.emit(
                    relax.Call(
                        relax.ExternFunc(callee),
                        [variables[key] for key in names],
                        ty_args=[relax.AnyType()],
                    )
                )
            self.bb.emit_func_output(relax.ShapeExpr([1]))


def build_fake(directory: Path, world: int) -> Path:
    """Write an artefact for `world` CPU ranks."""
    builder = _Builder()
    weights = {"weight": ((1,), "float32")}
    reduce = "shardwright.all_reduce"
    inputs = {name: (("n",), "int32") for name in ("tokens", "rows", "positions", "lengths")} | {
        "last": ((BATCH,), "int32")
    }
    state = {k: v for k, v in state_specs(BATCH).items() if k not in inputs}
    state["summed"] = ((BATCH, VOCAB), "float32")
    sums = [(reduce, ["scores", "summed"])] if world > 1 else []
    builder.function(
        "prefill",
        inputs,
        state,
        weights,
        [
            (
                "prefill_kernel",
                "tokens rows positions last page_table k_pages logits scores weight".split(),
            ),
            *sums,
            ("keep_kernel", ["last", "summed" if world > 1 else "scores", "logits"]),
        ],
    )
    for bucket in (1, 2, 4):
        builder.function(
            f"decode_{bucket}",
            {},
            state_specs(bucket),
            weights,
            [
                (
                    "decode_kernel",
                    ["tokens", "positions", "page_table", "k_pages", logits_in(world), "weight"],
                ),
                *([(reduce, ["scores", "logits"])] if world > 1 else []),
                ("sample_kernel", ["logits", "tokens", "positions", "history"]),
            ],
        )
    builder.function(
        "sample",
        {},
        state_specs(BATCH),
        {},
        [("sample_kernel", ["logits", "tokens", "positions", "history"])],
    )
    with builder.bb.function("workspace", []):
        builder.bb.emit_func_output(relax.ShapeExpr([1]))
    mod = builder.bb.finalize()
    for kernel in (prefill_kernel, keep_kernel, decode_kernel, sample_kernel):
        mod[kernel.attrs["global_symbol"]] = kernel
    (directory / "shards").mkdir(parents=True)
    tvm.compile(mod, "llvm").export_library(str(directory / "model.so"))
    names = ["model.so"]
    for rank in range(world):
        names.append(artifact.shard_name(rank, world))
        save_file({"weight": np.array([rank + 1], np.float32)}, directory / names[-1])
    _write_manifest(directory, world, builder.arguments, names)
    return directory


def logits_in(world: int) -> str:
    """Where a rank's own logits go: to be summed, or to the end."""
    return "scores" if world > 1 else "logits"


def _write_manifest(directory, world, arguments, names) -> None:
    state = state_specs(BATCH) | {"summed": ((BATCH, VOCAB), "float32")}
    manifest = {
        "schema": 1,
        "version": "0.1.0",
        "name": directory.name,
        "model": {
            "architecture": "FakeForCausalLM",
            "config": {},
            "vocab_size": VOCAB,
            "bos": 1,
            "eos": [EOS],
            "num_layers": 1,
        },
        "target": {"kind": "cpu", "archs": []},
        "mesh": {"axes": ["tp"], "shape": [world]},
        "quantization": "q0f32",
        "dtype": "float32",
        "limits": {
            "max_seq_len": LENGTH,
            "max_batch_size": BATCH,
            "prefill_chunk_size": CHUNK,
            "page_size": PAGE,
            "num_pages": BATCH * PAGES,
        },
        "use_cuda_graph": False,
        "decode_buckets": [1, 2, 4],
        "workspace_bytes": 0,
        "state": [
            {"name": name, "shape": list(shape), "dtype": dtype}
            for name, (shape, dtype) in state.items()
        ],
        "functions": {name: {"args": specs} for name, specs in arguments.items()},
        "weights": [{"name": "weight", "shape": [1], "dtype": "float32", "placement": "Replicate"}],
        "has_weights": True,
        "dummy_weights": False,
        "files": {
            name: {
                "sha256": artifact.sha256_file(directory / name),
                "bytes": (directory / name).stat().st_size,
            }
            for name in names
        },
    }
    (directory / artifact.MANIFEST).write_text(json.dumps(manifest))
