"""Check every kernel call of a model's first rank against numpy in float64, on an emulated GPU.

    python tests/amd/check_kernels.py ARTEFACT ARCH

Runs a prefill of rows of different lengths, the sampler, and a step of every batch bucket. Before
each call of a kernel its arguments are kept; after it, what it wrote is compared with the reference
of its kind. A kernel that the program names and no call has reached fails.
The other ranks are not there: a sum over ranks is this rank's summand, a gather its part repeated.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Arrays = list[Any]
LOWEST = -3.0e38

CONTEXTS = (37, 5, 18, 1)
"""Tokens of the rows' prompts: over several pages, within one, one token."""


# ---- references: from a call's arguments before it to what each of them is after ---------------


def weight_of(packed: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The weight [N, K] that words [N, K/8] and scales [N, K/group] stand for."""
    nibbles = packed[..., None] >> (4 * np.arange(8, dtype="uint32")) & 15
    flat = nibbles.reshape(packed.shape[0], -1).astype("float64") - 7
    return flat * scale.astype("float64").repeat(flat.shape[1] // scale.shape[1], 1)


def norm(x: np.ndarray, weight: np.ndarray, eps: float = 1e-5) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def silu_gate(both: np.ndarray) -> np.ndarray:
    gate, value = np.split(both, 2, axis=-1)
    return gate / (1 + np.exp(-gate)) * value


def product(x: np.ndarray, weight: np.ndarray, out: np.ndarray) -> np.ndarray:
    """`x @ weight.T`; if `out` has half as many columns, rounded and through the gate."""
    y = x.astype("float64") @ weight.T.astype("float64")
    return y if y.shape == out.shape else silu_gate(y.astype(out.dtype).astype("float64"))


def attention(q, k_pages, v_pages, table, rows, positions, layer) -> np.ndarray:
    """Of queries [n,H,D] to the cache; zeros for inactive tokens."""
    out, group = np.zeros(q.shape), q.shape[1] // k_pages.shape[2]
    for t, position in enumerate(positions):
        if position < 0:
            continue
        at = np.arange(position + 1)
        pages = table[rows[t], at // k_pages.shape[3]], at % k_pages.shape[3]
        k, v = (
            pool[layer, pages[0], :, pages[1]].astype("float64").repeat(group, 1)
            for pool in (k_pages, v_pages)
        )
        s = np.einsum("hd,phd->hp", q[t].astype("float64"), k) / np.sqrt(q.shape[-1])
        w = np.exp(s - s.max(1)[:, None])
        out[t] = np.einsum("hp,phd->hd", w / w.sum(1)[:, None], v)
    return out


def combine(sums: np.ndarray, stats: np.ndarray) -> np.ndarray:
    """Pieces of attention joined; the sums of a piece without mass do not count."""
    highest, mass = stats[..., 0].astype("float64"), stats[..., 1].astype("float64")
    weight = np.exp2(highest - highest.max(0))
    total = (weight * mass).sum(0)
    parts = np.where((mass > 0)[..., None], sums.astype("float64") * weight[..., None], 0)
    return parts.sum(0) / np.where(total == 0, 1, total)[..., None]


def rotary_append(args: Arrays, after: Arrays) -> list[tuple[np.ndarray, Any]]:
    *read, table, k_pages, v_pages, pages, rows, positions, layer, q_out = args
    n, heads, dim = q_out.shape
    kv = k_pages.shape[2]
    joined = np.concatenate([x.reshape(n, -1) for x in read], 1).reshape(n, -1, dim)
    q, k, v = np.split(joined.astype("float64"), [heads, heads + kv], 1)
    half = table.shape[-1]
    cos, sin = (table[:, i, None].astype("float64") for i in (0, 1))

    def rotate(x: np.ndarray) -> np.ndarray:
        a, b, rest = np.split(x, [half, 2 * half], -1)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1)

    want_k, want_v = k_pages.astype("float64"), v_pages.astype("float64")
    for t in range(n):
        if positions[t] >= 0:
            page, slot = divmod(positions[t], k_pages.shape[3])
            at = (layer, pages[rows[t], page], slice(None), slot)
            want_k[at], want_v[at] = rotate(k)[t], v[t]
    active = (positions >= 0)[:, None, None]
    first = len(read) + 1
    return [
        (after[first], want_k),
        (after[first + 1], want_v),
        (np.where(active, after[-1], 0), np.where(active, rotate(q), 0)),
    ]


def sample(args: Arrays, after: Arrays) -> list[tuple[np.ndarray, Any]]:
    """Greedy with a repetition penalty; other rows' draws are not predicted."""
    logits, _, tokens, positions, history, floats, _, _ = args
    want_tokens, want_positions, want_history = tokens.copy(), positions.copy(), history.copy()
    for r, position in enumerate(positions):
        if position < 0 or position + 1 >= history.shape[1]:
            continue
        scores, penalty = logits[r].astype("float64"), floats[r, 2]
        seen = np.unique(history[r, : position + 1])
        x = scores[seen]
        scores[seen] = np.where(x > 0, x / penalty, x * penalty)
        assert floats[r, 0] == 0
        want_tokens[r] = scores.argmax()
        want_positions[r] += 1
        want_history[r, position + 1] = want_tokens[r]
    return [(after[2], want_tokens), (after[3], want_positions), (after[4], want_history)]


def store_logits(args: Arrays, after: Arrays) -> list[tuple[np.ndarray, Any]]:
    new, last, old = args
    return [(after[2], np.where((last >= 0)[:, None], new, old))]


def q4_take(packed, scale, ids, rank, out) -> np.ndarray:
    local = ids - rank[0] * packed.shape[0]
    mine = (local >= 0) & (local < packed.shape[0])
    found = weight_of(packed, scale)[np.where(mine, local, 0)]
    return np.where(mine[:, None], found, 0)


def rotary_table(positions, lengths, inv_freq, _out) -> np.ndarray:
    angle = positions.astype("float64")[:, None] * inv_freq.astype("float64")
    return np.stack([np.cos(angle), np.sin(angle)], 1)


def last_of(reference: Callable[..., np.ndarray]) -> Callable[..., Any]:
    """The last argument is the result."""
    return lambda args, after: [(after[-1], reference(*args))]


REFERENCES: dict[str, Callable[[Arrays, Arrays], list[tuple[np.ndarray, Any]]]] = {
    "rotary_table_kernel": last_of(rotary_table),
    "q4_take_kernel": last_of(q4_take),
    "q4_dequantize_kernel": last_of(lambda packed, scale, out: weight_of(packed, scale)),
    "q4_gemv_kernel": last_of(lambda x, p, s, out: product(x, weight_of(p, s), out)),
    "gemv_kernel": last_of(product),
    "matmul_rocm_kernel": last_of(product),
    "rms_norm": last_of(lambda x, w, out: norm(x.astype("float64"), w)),
    "add_rms_norm_kernel": lambda args, after: [
        (after[3], args[0].astype("float64") + args[1]),
        (after[4], norm((args[0] + args[1]).astype("float64"), args[2])),
    ],
    "fused_NT_matmul_cast": last_of(product),
    "NT_matmul": last_of(product),
    "rotary_append_kernel": rotary_append,
    "attention_prefill_kernel": last_of(lambda *args: attention(*args[:-1])),
    # Each piece counts: joined, they are the whole.
    "attention_partial_kernel": lambda args, after: [
        (combine(after[-2], after[-1]), attention(*args[:-2]))
    ],
    "attention_combine_kernel": last_of(lambda sums, stats, out: combine(sums, stats)),
    "silu_mul_kernel": last_of(lambda both, out: silu_gate(both.astype("float64"))),
    "maximum": last_of(lambda x, out: np.maximum(x, 0)),
    "add": last_of(lambda x, out: x + 1),
    "take": last_of(lambda x, at, out: x[at].astype("float64")),
    "transpose": last_of(lambda x, out: x.T),
    "store_logits_kernel": store_logits,
    "sample_kernel": sample,
}


def kind_of(name: str, arch: str) -> str:
    """`q4_gemv_kernel7_gfx1100` -> `q4_gemv_kernel`."""
    return re.sub(r"(?<=[a-z]{2})\d+(?=_|$)", "", name.removesuffix(f"_{arch}"))


def compare(name: str, got: np.ndarray, want: np.ndarray) -> float:
    """The largest error in units of what is allowed; raises AssertionError above 1."""
    want = np.asarray(want)
    if got.dtype.kind in "iu":
        np.testing.assert_array_equal(got, want, err_msg=name)
        return 0.0
    got, half = got.astype("float64"), got.dtype == np.float16
    assert got.shape == want.shape and np.isfinite(got).all(), name
    # Float16 has 11 bits; a sum's rounding grows with its terms, which the scale stands for.
    scale = np.sqrt((want**2).mean()) if want.size else 0
    unit = 2.0**-10 if half else 2.0**-16
    allowed = unit * (np.abs(want) + scale) + 1e-7
    error = np.abs(got - want) / allowed
    assert error.max(initial=0) <= 1, f"{name}: {error.max():.2f} of the error that is allowed"
    return float(error.max(initial=0))


class Ranks:
    """Collectives of a rank that is alone."""

    def all_reduce(self, x: Any, out: Any) -> None:
        out.copyfrom(x.numpy())

    def all_gather(self, x: Any, out: Any) -> None:
        copies = out.numel() // x.numel()
        out.copyfrom(np.concatenate([x.numpy().ravel()] * copies).reshape(out.shape))


class Checker:
    """Compares each call of a kernel."""

    def __init__(self, arch: str) -> None:
        self.arch = arch
        self.calls: Counter[str] = Counter()
        self.worst: dict[str, float] = {}
        self.problem: BaseException | None = None
        self._before: Arrays = []

    def __call__(self, _func: Any, name: str, before: bool, _ret: Any, *args: Any) -> int:
        if not name.endswith(f"_{self.arch}") or self.problem is not None:
            return 0
        try:
            now = [a.numpy() if hasattr(a, "dtype") else a for a in args]
            if before:
                self._before = now
            else:
                self._check(name, now)
        except BaseException as error:
            # An exception would not come through the virtual machine as it is.
            self.problem = error
        return 0

    def _check(self, name: str, after: Arrays) -> None:
        kind = kind_of(name, self.arch)
        if kind not in REFERENCES:
            raise AssertionError(f"{name}: there is no reference for kernels {kind}")
        for got, want in REFERENCES[kind](self._before, after):
            self.worst[kind] = max(self.worst.get(kind, 0.0), compare(name, got, want))
        self.calls[name] += 1


def check(directory: Path, arch: str) -> dict[str, Any]:
    """Run the model; number of kernels, of calls, and each kind's largest error."""
    from shardwright.runtime import collectives, tvm_runtime

    tvm_runtime.load("rocm")
    from tvm.runtime import load_module

    from shardwright.runtime.artifact import load_manifest
    from shardwright.runtime.code_object import code_objects
    from shardwright.runtime.hip import HipDevice
    from shardwright.runtime.program import Clock, Program

    collectives.install()
    manifest = load_manifest(directory)
    vocab, rows = manifest.model.vocab_size, manifest.limits.max_batch_size
    device, checker = HipDevice(0, False), Checker(arch)
    rng = np.random.default_rng(0)
    with collectives.activate(Ranks()), device.scope():
        program = Program(directory, manifest, 0, device, lambda done, total: None, Clock())
        program._vm.set_instrument(checker)
        contexts = CONTEXTS[:rows]
        order = [(r, p) for r, count in enumerate(contexts) for p in range(count)]
        chunk = {
            "tokens": rng.integers(3, vocab, len(order)),
            "rows": [r for r, _ in order],
            "positions": [p for _, p in order],
            "lengths": [contexts[r] for r, _ in order],
            "last": np.cumsum(contexts) - 1,
        }
        history = np.zeros((rows, manifest.limits.max_seq_len), np.int32)
        for (r, p), token in zip(order, chunk["tokens"], strict=True):
            history[r, p] = token
        floats = np.zeros((rows, 4), np.float32)
        floats[:, 1:3] = 1, 1
        floats[-1, 2] = 1.5  # a row with a repetition penalty
        integers = np.zeros((rows, 8), np.int32)
        integers[:, 3] = contexts
        state = {"history": history, "sampling_f": floats, "sampling_i": integers}
        state["positions"] = np.array(contexts, np.int32) - 1
        for name, array in state.items():
            program.write(name, array)
        program.prefill({k: np.ascontiguousarray(v, np.int32) for k, v in chunk.items()})
        program.sample()
        for bucket in manifest.decode_buckets:
            program.decode(bucket)
            # One row of the next step is inactive.
            positions = np.array(contexts, np.int32) + 1 + manifest.decode_buckets.index(bucket)
            positions[rows // 2] = -1
            program.write("positions", positions)
    if checker.problem is not None:
        raise checker.problem
    # TVM compiles kernels whose result it then makes a view of their argument instead.
    listing = load_module(str(directory / "model.so"))["as_text"]()
    used = set(re.findall(rf"\w+_{arch}\b", listing))
    (code,) = (c for c in code_objects(directory / "model.so") if c.arch == arch)
    names = {k.name for k in code.kernels}
    missed = [
        k.name
        for k in code.kernels
        if (host := re.sub(r"_kernel(_\d+)?$", "", k.name)) not in checker.calls and host in used
    ]
    assert not missed, f"kernels that no call has checked: {missed}"
    assert set(checker.calls) == {name for name in used if f"{name}_kernel" in names}
    return {
        "kernels": len(checker.calls),
        "calls": sum(checker.calls.values()),
        "worst": {kind: round(error, 3) for kind, error in checker.worst.items()},
    }


def main() -> None:
    directory, arch = Path(sys.argv[1]), sys.argv[2]
    if os.environ.get("AMD_EMULATOR_ARCH") != arch:
        # The loader reads the library path when a process starts.
        from emulator import environment

        os.environ.update(environment(arch))
        os.execv(sys.executable, [sys.executable, *sys.argv])
    print(json.dumps(check(directory, arch)))


if __name__ == "__main__":
    main()
