# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-redef"
# (TVMScript is parsed, never run, so it has no Python types.)
"""Products of many tokens on AMD's matrix cores: MFMA on CDNA, WMMA on RDNA 3.

A block computes ROWS tokens x COLUMNS features. It copies DEPTH of the inner dimension of both
operands to shared memory, the next ones already on their way to registers, and each wave multiplies
its part in pieces of 16 x 16. Layouts of the pieces in the lanes: AMD's "RDNA3" and "Instinct
MI200" Instruction Set Architecture guides. No figure here was tuned: nothing was timed.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from .common import SCHEDULED, extent, warp_size_of

THREADS = 256
ROWS, COLUMNS, DEPTH = 64, 128, 32
PIECE = 16  # tokens, features and elements of the inner dimension in a matrix instruction
PADDED = DEPTH + 8  # so that the rows of a piece lie in different banks


def matrix_cores(target: Any) -> str:
    """The matrix instructions of a target such as "rocm:gfx1100": "mfma", "wmma" or none, ""."""
    arch = target.partition(":")[2] if isinstance(target, str) else ""
    if arch in ("gfx908", "gfx90a", "gfx942"):
        return "mfma"
    return "wmma" if arch.startswith("gfx11") else ""


def supported(*, out_features: int, in_features: int, dtype: str, target: Any) -> bool:
    """Whether there is a kernel for such a product; a weight of few rows gains nothing from it."""
    fits = out_features >= 2 * PIECE and in_features % 8 == 0 and dtype == "float16"
    return fits and bool(matrix_cores(target))


def matmul_rocm(
    *, tokens: int | None, out_features: int, in_features: int, out_dtype: str, target: Any
) -> tirx.PrimFunc:
    """`(x [n,K] f16, w [N,K] f16) -> x @ w.T [n,N]`, summed in float32; see `supported`."""
    n = extent(tokens)
    mfma = matrix_cores(target) == "mfma"
    wave = warp_size_of(target)
    across = 2  # waves along the tokens
    along = THREADS // wave // across  # waves along the features
    high, wide = ROWS // across // PIECE, COLUMNS // along // PIECE  # pieces of a wave
    # Elements of a piece's result in a lane, and of an operand that a lane reads at once.
    results = PIECE * PIECE // wave
    lane_reads = 8 if mfma else 16
    # With MFMA a lane reads 16 bytes, enough for two instructions; which elements of the inner
    # dimension meet in one does not matter as long as both operands agree.
    steps = DEPTH // (2 * PIECE) if mfma else DEPTH // PIECE
    units = in_features // 8
    x_units, w_units = ROWS * DEPTH // 8 // THREADS, COLUMNS * DEPTH // 8 // THREADS
    blocks = -(-out_features // COLUMNS)
    large = out_features * in_features >= 2**31

    def multiply(a: Any, at_a: Any, b: Any, at_b: Any, c: Any, at_c: Any, part: int) -> Any:
        """The piece of `c` plus the product of pieces of `a` and `b`."""
        total = c[T.Ramp(at_c, 1, results)]
        if mfma:
            first, second = (s[T.Ramp(at + 4 * part, 1, 4)] for s, at in ((a, at_a), (b, at_b)))
            return T.call_llvm_pure_intrin(
                "float32x4",
                "llvm.amdgcn.mfma.f32.16x16x16f16",
                *(first, second, total, T.int32(0), T.int32(0), T.int32(0)),
            )
        return T.call_llvm_pure_intrin(
            "float32x8",
            "llvm.amdgcn.wmma.f32.16x16x16.f16",
            *(a[T.Ramp(at_a, 1, 16)], b[T.Ramp(at_b, 1, 16)], total),
        )

    def depth_of(step: Any, lane: Any) -> Any:
        """Where in DEPTH a lane's reads begin."""
        return step * 32 + lane // PIECE * 8 if mfma else step * PIECE

    def row_of(lane: Any, element: Any) -> Any:
        """The token, in a piece, of an element of a lane's results; its feature is lane % 16."""
        return lane // PIECE * 4 + element if mfma else element * 2 + lane // PIECE

    def place(unit: Any) -> Any:
        """Where 16 bytes of a tile lie in shared memory."""
        return unit // (DEPTH // 8) * PADDED + unit % (DEPTH // 8) * 8

    def weight_row(row: Any) -> Any:
        return T.cast(row, "int64") if large else row

    @T.inline
    def fetch(source, registers, count, first, last, depth, tid, is_weight):
        """16 bytes at a time of rows from `first` on; past the inner dimension's end zeros."""
        for i in T.unroll(count):
            at: T.let[T.int32] = i * THREADS + tid
            unit: T.let[T.int32] = depth * (DEPTH // 8) + at % (DEPTH // 8)
            if unit < units:
                for e in T.vectorized(8):
                    registers[i * 8 + e] = source[
                        weight_row(T.min(first + at // (DEPTH // 8), last))
                        if is_weight
                        else T.min(first + at // (DEPTH // 8), last),
                        unit * 8 + e,
                    ]
            else:
                for e in T.unroll(8):
                    registers[i * 8 + e] = T.float16(0)

    @T.inline
    def store(registers, shared, count, tid):
        for i in T.unroll(count):
            for e in T.vectorized(8):
                shared[place(i * THREADS + tid) + e] = registers[i * 8 + e]

    @T.prim_func(s_tir=True)
    def matmul_rocm(x_h: T.handle, w_h: T.handle, out_h: T.handle):
        T.func_attr(SCHEDULED)
        x = T.match_buffer(x_h, (n, in_features), "float16")
        w = T.match_buffer(w_h, (out_features, in_features), "float16")
        out = T.match_buffer(out_h, (n, out_features), out_dtype)
        with T.sblock("root"):
            T.reads()
            T.writes()
            for bx in T.thread_binding(blocks, thread="blockIdx.x"):
                for by in T.thread_binding((n + ROWS - 1) // ROWS, thread="blockIdx.y"):
                    for tid in T.thread_binding(THREADS, thread="threadIdx.x"):
                        x_shared = T.alloc_buffer((ROWS * PADDED,), "float16", scope="shared")
                        w_shared = T.alloc_buffer((COLUMNS * PADDED,), "float16", scope="shared")
                        x_next = T.alloc_buffer((x_units * 8,), "float16", scope="local")
                        w_next = T.alloc_buffer((w_units * 8,), "float16", scope="local")
                        a = T.alloc_buffer((high * lane_reads,), "float16", scope="local")
                        b = T.alloc_buffer((wide * lane_reads,), "float16", scope="local")
                        c = T.alloc_buffer((high * wide * results,), "float32", scope="local")
                        lane: T.let[T.int32] = tid % wave
                        row0: T.let[T.int32] = tid // wave // along * (high * PIECE)
                        column0: T.let[T.int32] = tid // wave % along * (wide * PIECE)
                        last: T.let[T.int32] = T.cast(x.shape[0] - 1, "int32")
                        top: T.let[T.int32] = T.cast(by, "int32") * ROWS
                        for i in T.unroll(high * wide * results):
                            c[i] = T.float32(0)
                        fetch(x, x_next, x_units, top, last, 0, tid, False)
                        fetch(w, w_next, w_units, bx * COLUMNS, out_features - 1, 0, tid, True)
                        # Blocks have no third dimension, so zero is added. LLVM does not know it;
                        # a short loop it would unroll, with all of its loads in front.
                        zero: T.let[T.int32] = T.call_llvm_pure_intrin(
                            "int32", "llvm.amdgcn.workgroup.id.z"
                        )
                        for depth in T.serial(-(-in_features // DEPTH) + zero):
                            T.tvm_storage_sync("shared")
                            store(x_next, x_shared, x_units, tid)
                            store(w_next, w_shared, w_units, tid)
                            T.tvm_storage_sync("shared")
                            fetch(x, x_next, x_units, top, last, depth + 1, tid, False)
                            fetch(
                                w,
                                w_next,
                                w_units,
                                bx * COLUMNS,
                                out_features - 1,
                                depth + 1,
                                tid,
                                True,
                            )
                            for s in T.unroll(steps):
                                for i in T.unroll(high):
                                    for q in T.unroll(lane_reads // 8):
                                        for e in T.vectorized(8):
                                            a[i * lane_reads + q * 8 + e] = x_shared[
                                                (row0 + i * PIECE + lane % PIECE) * PADDED
                                                + depth_of(s, lane)
                                                + q * 8
                                                + e
                                            ]
                                for j in T.unroll(wide):
                                    for q in T.unroll(lane_reads // 8):
                                        for e in T.vectorized(8):
                                            b[j * lane_reads + q * 8 + e] = w_shared[
                                                (column0 + j * PIECE + lane % PIECE) * PADDED
                                                + depth_of(s, lane)
                                                + q * 8
                                                + e
                                            ]
                                for part in T.unroll(2 if mfma else 1):
                                    for i in T.unroll(high):
                                        for j in T.unroll(wide):
                                            c[T.Ramp((i * wide + j) * results, 1, results)] = (
                                                multiply(
                                                    a,
                                                    i * lane_reads,
                                                    b,
                                                    j * lane_reads,
                                                    c,
                                                    (i * wide + j) * results,
                                                    part,
                                                )
                                            )
                        for i in T.unroll(high):
                            for j in T.unroll(wide):
                                for e in T.unroll(results):
                                    t: T.let[T.int32] = top + row0 + i * PIECE + row_of(lane, e)
                                    o: T.let[T.int32] = (
                                        bx * COLUMNS + column0 + j * PIECE + lane % PIECE
                                    )
                                    if t <= last and o < out_features:
                                        out[t, o] = T.cast(
                                            c[(i * wide + j) * results + e], out_dtype
                                        )

    return matmul_rocm
