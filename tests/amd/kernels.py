"""Hand-written kernels whose results are known, to test the emulator with.

Buffers are named in alphabetical order, which is the order of a device kernel's arguments. Each
kernel has one dimension of blocks and THREADS threads in a block.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import tvm
from tvm import tirx
from tvm.script import tirx as T

from shardwright.compiler import rocm
from shardwright.compiler.kernels.common import SCHEDULED, shuffle_xor, warp_size_of
from shardwright.runtime.code_object import code_objects

THREADS = 128


def kernel(body: Any, out: tuple[int, str], *inputs: tuple[int, str], blocks: int = 1) -> Any:
    """`body(tid, blk, out, *inputs)` for every thread; buffers are (elements, dtype)."""
    if len(inputs) == 1:

        @T.prim_func(s_tir=True)
        def one(a_h: T.handle, out_h: T.handle):
            T.func_attr(SCHEDULED)
            a = T.match_buffer(a_h, (inputs[0][0],), inputs[0][1])
            out_ = T.match_buffer(out_h, (out[0],), out[1])
            with T.sblock("root"):
                T.reads()
                T.writes()
                for blk in T.thread_binding(blocks, thread="blockIdx.x"):
                    for tid in T.thread_binding(THREADS, thread="threadIdx.x"):
                        body(tid, blk, out_, a)

        return one
    if len(inputs) == 2:

        @T.prim_func(s_tir=True)
        def two(a_h: T.handle, b_h: T.handle, out_h: T.handle):
            T.func_attr(SCHEDULED)
            a = T.match_buffer(a_h, (inputs[0][0],), inputs[0][1])
            b = T.match_buffer(b_h, (inputs[1][0],), inputs[1][1])
            out_ = T.match_buffer(out_h, (out[0],), out[1])
            with T.sblock("root"):
                T.reads()
                T.writes()
                for blk in T.thread_binding(blocks, thread="blockIdx.x"):
                    for tid in T.thread_binding(THREADS, thread="threadIdx.x"):
                        body(tid, blk, out_, a, b)

        return two

    @T.prim_func(s_tir=True)
    def three(a_h: T.handle, b_h: T.handle, c_h: T.handle, out_h: T.handle):
        T.func_attr(SCHEDULED)
        a = T.match_buffer(a_h, (inputs[0][0],), inputs[0][1])
        b = T.match_buffer(b_h, (inputs[1][0],), inputs[1][1])
        c = T.match_buffer(c_h, (inputs[2][0],), inputs[2][1])
        out_ = T.match_buffer(out_h, (out[0],), out[1])
        with T.sblock("root"):
            T.reads()
            T.writes()
            for blk in T.thread_binding(blocks, thread="blockIdx.x"):
                for tid in T.thread_binding(THREADS, thread="threadIdx.x"):
                    body(tid, blk, out_, a, b, c)

    return three


def code(kernels: dict[str, tirx.PrimFunc], target: tvm.target.Target, config: Any = None) -> bytes:
    """The code object of `kernels`; that of NAME is called NAME_kernel."""
    rocm.install_hooks(5)
    mod = tvm.IRModule({n: f.with_attr("global_symbol", n) for n, f in kernels.items()})
    config = rocm.PASS_CONFIG if config is None else config
    with tvm.transform.PassContext(config=config), rocm.without_device_warnings():
        library = tvm.compile(mod, target=target)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernels.so"
        library.export_library(str(path))
        (found,) = code_objects(path)
    return found.data


def all_kernels(arch: str) -> dict[str, tirx.PrimFunc]:
    """Name -> kernel."""
    n, wave = THREADS, warp_size_of(f"rocm:{arch}")

    @T.inline
    def add(tid, blk, out, a, b):
        if blk * n + tid < 1000:
            out[blk * n + tid] = a[blk * n + tid] + b[blk * n + tid]

    @T.inline
    def lds_sum(tid, blk, out, a):
        shared = T.alloc_buffer((n,), "float32", scope="shared")
        shared[tid] = a[blk * n + tid]
        T.tvm_storage_sync("shared")
        for s in T.unroll(n.bit_length() - 1):
            if tid < T.shift_right(n // 2, s):
                shared[tid] = shared[tid] + shared[tid + T.shift_right(n // 2, s)]
            T.tvm_storage_sync("shared")
        if tid == 0:
            out[blk] = shared[0]

    @T.inline
    def shuffles(tid, blk, out, a):
        value: T.float32 = a[tid]
        for s in T.unroll(wave.bit_length() - 1):
            value = value + shuffle_xor(value, T.shift_right(wave // 2, s), wave)
        out[tid] = value

    def dpp(value, control):
        return T.call_llvm_pure_intrin(
            "int32", "llvm.amdgcn.update.dpp", T.int32(-1), value, T.int32(control),
            T.int32(15), T.int32(15), T.bool(False),
        )  # fmt: skip

    @T.inline
    def lanes(tid, blk, out, a):
        # Neighbours swapped, two lanes down the row, the row mirrored, the first active lane.
        out[tid * 4] = dpp(a[tid], 0xB1)
        out[tid * 4 + 1] = dpp(a[tid], 0x112)
        out[tid * 4 + 2] = dpp(a[tid], 0x140)
        out[tid * 4 + 3] = T.call_llvm_pure_intrin(
            "int32", "llvm.amdgcn.ds.swizzle", a[tid], T.int32(0x041F)
        )

    @T.inline
    def packed_halves(tid, blk, out, a, b, c):
        for e in T.vectorized(8):
            out[tid * 8 + e] = a[tid * 8 + e] * b[tid * 8 + e] + c[tid * 8 + e]

    @T.inline
    def conversions(tid, blk, out, a):
        x: T.float32 = a[tid]
        out[tid * 6] = T.cast(T.cast(x, "int32"), "float32")
        out[tid * 6 + 1] = T.cast(T.cast(x, "float16"), "float32")
        out[tid * 6 + 2] = T.cast(T.cast(T.cast(x, "int32"), "uint8"), "float32")
        out[tid * 6 + 3] = T.cast(T.cast(x, "float64") * T.float64(1.1), "float32")
        out[tid * 6 + 4] = T.cast(T.cast(T.cast(x, "int32"), "int16"), "float32")
        out[tid * 6 + 5] = T.floor(x) + T.round(x)

    @T.inline
    def maths(tid, blk, out, a):
        out[tid * 6] = T.exp(a[tid])
        out[tid * 6 + 1] = T.log(a[tid])
        out[tid * 6 + 2] = T.sqrt(a[tid])
        out[tid * 6 + 3] = T.float32(3.7) / a[tid]
        out[tid * 6 + 4] = T.tanh(a[tid])
        out[tid * 6 + 5] = T.rsqrt(a[tid])

    @T.inline
    def divergence(tid, blk, out, a):
        # Steps of the Collatz sequence, a different number for each lane.
        value: T.int32 = a[tid]
        steps: T.int32 = 0
        while value > 1:
            if value % 2 == 0:
                value = value // 2
            else:
                value = value * 3 + 1
            steps = steps + 1
        out[tid] = steps

    @T.inline
    def wide_integers(tid, blk, out, a, b):
        out[tid * 4] = a[tid] * b[tid]
        out[tid * 4 + 1] = a[tid] - T.shift_right(b[tid], T.int64(7))
        out[tid * 4 + 2] = T.max(a[tid], b[tid])
        out[tid * 4 + 3] = T.truncdiv(a[tid], T.int64(1000003))

    @T.inline
    def private_memory(tid, blk, out, a):
        held = T.alloc_buffer((64,), "int32", scope="local")
        for i in T.serial(64):
            held[(i * a[tid]) % 64] = i
        out[tid] = held[a[64 + tid % 32] % 64] + held[a[tid] % 64]

    @T.inline
    def atomics(tid, blk, out, a):
        T.evaluate(
            T.call_intrin("int32", "tirx.atomic_add", out.access_ptr("rw"), a[blk * n + tid])
        )

    @T.inline
    def matrix(tid, blk, out, a, b):
        if tid < wave:
            lane: T.let[T.int32] = tid
            row: T.let[T.int32] = lane % 16
            acc = T.alloc_buffer((8,), "float32", scope="local")
            if wave == 32:
                x = T.alloc_buffer((16,), "float16", scope="local")
                y = T.alloc_buffer((16,), "float16", scope="local")
                for k in T.vectorized(16):
                    x[k] = a[row * 16 + k]
                for k in T.vectorized(16):
                    y[k] = b[row * 16 + k]
                acc[T.Ramp(0, 1, 8)] = T.call_llvm_pure_intrin(
                    "float32x8", "llvm.amdgcn.wmma.f32.16x16x16.f16",
                    x[T.Ramp(0, 1, 16)], y[T.Ramp(0, 1, 16)], T.Broadcast(T.float32(0), 8),
                )  # fmt: skip
                for i in T.unroll(8):
                    out[(2 * i + lane // 16) * 16 + row] = acc[i]
            else:
                x = T.alloc_buffer((4,), "float16", scope="local")
                y = T.alloc_buffer((4,), "float16", scope="local")
                for k in T.vectorized(4):
                    x[k] = a[row * 16 + lane // 16 * 4 + k]
                for k in T.vectorized(4):
                    y[k] = b[row * 16 + lane // 16 * 4 + k]
                acc[T.Ramp(0, 1, 4)] = T.call_llvm_pure_intrin(
                    "float32x4", "llvm.amdgcn.mfma.f32.16x16x16f16",
                    x[T.Ramp(0, 1, 4)], y[T.Ramp(0, 1, 4)], T.Broadcast(T.float32(0), 4),
                    T.int32(0), T.int32(0), T.int32(0),
                )  # fmt: skip
                for i in T.unroll(4):
                    out[(lane // 16 * 4 + i) * 16 + row] = acc[i]

    # What the checks are for. `a` says where to go.

    @T.inline
    def gather(tid, blk, out, a, b):
        out[tid] = b[a[tid]]

    @T.inline
    def scatter(tid, blk, out, a):
        out[a[tid]] = T.int32(tid)

    @T.inline
    def lds_gather(tid, blk, out, a):
        shared = T.alloc_buffer((n,), "int32", scope="shared")
        if tid < a[n]:
            shared[tid] = T.int32(tid)
        T.tvm_storage_sync("shared")
        out[tid] = shared[a[tid]]

    @T.inline
    def exchange(tid, blk, out, a):
        shared = T.alloc_buffer((n,), "int32", scope="shared")
        shared[tid] = a[tid]
        out[tid] = shared[a[tid]]

    @T.inline
    def bare_barrier(tid, blk, out, a):
        # What TVM by itself makes of a barrier.
        shared = T.alloc_buffer((n,), "int32", scope="shared")
        shared[tid] = a[tid]
        T.evaluate(T.call_llvm_intrin("void", "llvm.amdgcn.s.barrier"))
        out[tid] = shared[n - 1 - tid]

    @T.inline
    def two_buffers(tid, blk, out, a):
        # Storage rewrite gives the second the memory of the first.
        first = T.alloc_buffer((n,), "int32", scope="shared")
        second = T.alloc_buffer((n,), "float32", scope="shared")
        first[tid] = a[tid]
        T.tvm_storage_sync("shared")
        value: T.int32 = first[n - 1 - tid]
        T.tvm_storage_sync("shared")
        second[tid] = T.cast(value, "float32")
        T.tvm_storage_sync("shared")
        out[tid] = second[n - 1 - tid]

    i32, i64, f32, f16 = "int32", "int64", "float32", "float16"
    return {
        "add": kernel(add, (1000, f32), (1000, f32), (1000, f32), blocks=8),
        "lds_sum": kernel(lds_sum, (5, f32), (5 * n, f32), blocks=5),
        "shuffles": kernel(shuffles, (n, f32), (n, f32)),
        "lanes": kernel(lanes, (4 * n, i32), (n, i32)),
        "packed_halves": kernel(packed_halves, (8 * n, f16), *[(8 * n, f16)] * 3),
        "conversions": kernel(conversions, (6 * n, f32), (n, f32)),
        "maths": kernel(maths, (6 * n, f32), (n, f32)),
        "divergence": kernel(divergence, (n, i32), (n, i32)),
        "wide_integers": kernel(wide_integers, (4 * n, i64), (n, i64), (n, i64)),
        "private_memory": kernel(private_memory, (n, i32), (n, i32)),
        "atomics": kernel(atomics, (1, i32), (6 * n, i32), blocks=6),
        "matrix": kernel(matrix, (256, f32), (256, f16), (256, f16)),
        "gather": kernel(gather, (n, i32), (n, i32), (n, i32)),
        "scatter": kernel(scatter, (n, i32), (n, i32)),
        "lds_gather": kernel(lds_gather, (n, i32), (n + 1, i32)),
        "two_buffers": kernel(two_buffers, (n, f32), (n, i32)),
        "bare_barrier": kernel(bare_barrier, (n, i32), (n, i32)),
        "exchange": kernel(exchange, (n, i32), (n, i32)),
    }
