# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-redef"
# (TVMScript is parsed, never run, so it has no Python types.)
"""Products of one token on CUDA GPUs from sm_90 on, with a plain weight or a large four-bit one.

The outputs are divided evenly among the multiprocessors. One warp of a block copies its rows,
which lie one behind the other in memory, to a ring in shared memory, some rows with each bulk copy.
The others all read the same row, a piece of 16 bytes each, so that a thread holds the elements of x
that it ever needs in registers. Memory is read fastest so: in long pieces, and with nearly all of a
multiprocessor's shared memory under way. With four bits x becomes integers, as in `gemv_mma.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx
from tvm.script import tirx as T

from .common import SCHEDULED, ceil_div, cuda_source
from .gemv_mma import (
    PROCESSORS,
    SHARED_BYTES_CLUSTERS,
    Function,
    Product,
    launch,
    plain_output,
    wrapper,
)

WARP = 32
MOST_THREADS = 512  # that multiply
MOST_PIECES = {0: 8, 4: 2}  # of a row, that a thread has, by the bits of its weight if quantized
AHEAD = {0: 0.5, 4: 0.35}  # of the ring's places, filled before x is looked at, by the same
WINDOW = {4: 2}  # places that are under way at a time, by the same; else all
MIN_Q4_BYTES = 6 << 20
"""Of a four-bit weight; smaller ones are faster in `gemv_mma.py`."""
_SUMS = 8  # of rows, that threads add up at once; see `RowSizes`


@dataclass(frozen=True)
class Plan:
    """How a product is divided.

    `threads` multiply; together they read `units` times at each place of a ring of `depth` places,
    of which `ahead` are filled before x is looked at. At most `window` places wait for their bytes
    at a time.
    """

    threads: int
    units: int
    depth: int
    ahead: int
    window: int


def plan(product: Product, *, whole_x: bool = False) -> Plan | None:
    """The plan for a product of one token, None if there is none or it is small, with four bits.

    With `whole_x` the threads hold x once, as one whose norm they compute must be.
    """
    pieces, bits = _pieces(product), 4 if product.group else 0
    if product.batch != 1 or not _fits(product):
        return None
    each = ceil_div(pieces, MOST_THREADS)
    threads = ceil_div(ceil_div(pieces, each), WARP) * WARP
    if bits or (not whole_x and pieces % WARP == 0):
        threads *= max(1, MOST_THREADS // threads)  # several rows at once
    if each > MOST_PIECES[bits]:
        return None
    for units in (4, 2) if product.gated else (4, 2, 1):
        takes = ceil_div(_most(product), _taken(product, threads, units))
        for depth in range(takes, 0, -1):
            window = min(depth, WINDOW.get(bits, depth))
            ahead = min(window, max(1, int(depth * AHEAD[bits] + 0.5)))
            p = Plan(threads, units, depth, ahead, window)
            if shared_bytes(product, p) <= SHARED_BYTES_CLUSTERS:
                if depth < min(takes, 3):
                    break  # too few: smaller places
                return p
    return None


def _fits(product: Product) -> bool:
    """Whether rows and their scales are whole pieces of 16 bytes, and worth while."""
    if not product.group:
        return product.in_features % 8 == 0
    k, size = product.in_features, product.out_features * product.row_bytes
    whole = k % 256 == 0 and product.group % 32 == 0 and k % (8 * product.group) == 0
    return whole and size >= MIN_Q4_BYTES


def parts(product: Product) -> int:
    """Blocks, among which the outputs are divided."""
    return min(PROCESSORS, product.outputs)


def _most(product: Product, blocks: int = 0) -> int:
    """Outputs of a block."""
    return ceil_div(product.outputs, blocks or parts(product))


def _pieces(product: Product) -> int:
    """Of 16 bytes, of a row."""
    return product.row_bytes // 16


def _rows(product: Product, threads: int) -> int:
    """Rows that threads read at once."""
    lanes = ceil_div(_pieces(product), WARP) * WARP
    return threads // lanes if threads % lanes == 0 else 1


def _taken(product: Product, threads: int, units: int) -> int:
    """Outputs of a place of the ring."""
    return units * _rows(product, threads) // (2 if product.gated else 1)


def shared_bytes(product: Product, p: Plan, blocks: int = 0) -> int:
    """Bytes of shared memory of a block, as `RowSizes` of gemv_rows.cuh lays it out.

    `blocks` replaces `parts`.
    """
    warps, k = p.threads // WARP, product.in_features
    scales = k // product.group * 2 if product.group else 0
    place = p.units * _rows(product, p.threads) * (product.row_bytes + scales)
    takes = ceil_div(_most(product, blocks), _taken(product, p.threads, p.units))
    sums = (takes + _SUMS // p.units) * p.units * warps * 4 + warps * 4
    x = k * 2 + k // 32 * 8 if product.group else 0
    return ceil_div(p.depth * place + x + sums, 16) * 16 + (2 * p.depth + 1) * 8


def sizes(product: Product, p: Plan, blocks: int = 0) -> str:
    """The arguments of the template `RowSizes` of gemv_rows.cuh; `blocks` replaces `parts`."""
    values = [product.outputs, product.in_features, product.group, int(product.gated)]
    values += [p.threads, p.units, p.depth, p.ahead, p.window, blocks or parts(product)]
    return ", ".join(map(str, values))


def device_function(
    kind: str,
    product: Product,
    tuned: Plan,
    out_dtype: str,
    given: str,
    output: str,
    x: str = "RowInput{x}",
    beside: str | None = None,
) -> Function:
    """The device function that computes a product by `product_of_rows` of gemv_rows.cuh.

    Its parameters, and what `beside` is, are as for that of `gemv_mma.py`.
    """
    template = f"RowSizes<{sizes(product, tuned)}>"
    name, text = wrapper(kind, template, "product_of_rows", out_dtype, given, x, output)
    source = cuda_source("gemv_mma.cuh", "gemv_rows.cuh", beside) + text
    shared = shared_bytes(product, tuned)
    return Function(name, source, parts(product), tuned.threads + WARP, shared)


def weight_of(product: Product) -> tuple[bool, tuple[int, int], str, tuple[int, int]]:
    """Whether a weight has four bits, its tensor's shape and dtype, and the shape of its scale."""
    rows, columns, group = product.out_features, product.in_features, product.group
    if not group:
        return False, (rows, columns), "float16", (rows, 1)
    return True, (rows, columns // 8), "uint32", (rows, columns // group)


def with_scale(func: tirx.PrimFunc, has_scale: bool) -> tirx.PrimFunc:
    """`func`; if there is no scale, without the parameter for it, which then nothing reads."""
    return func if has_scale else without(func, "scale")


def without(func: tirx.PrimFunc, *names: str) -> tirx.PrimFunc:
    """`func` without the parameters of these names, which nothing reads."""
    params = [param for param in func.params if param.name not in names]
    return tirx.PrimFunc(params, func.body, func.ret_type, func.attrs)


def gemv_rows(
    *,
    out_features: int,
    in_features: int,
    out_dtype: str,
    tuned: Plan,
    group: int = 0,
    gated: bool = False,
) -> tirx.PrimFunc:
    """`(x [1,K] f16, w [N,K] f16) -> x @ w.T [1,N]`, or with a four-bit weight for `group` > 0.

    That is `(x, packed [N,K/8] u32, scale [N,K/group] f16)`. Sums are as in `gemv_mma`, and so is
    `gated`. `tuned` is from `plan`. Two calls give the same bits.
    """
    product = Product(1, out_features, in_features, group, gated)
    given, output = plain_output(out_dtype)
    f = device_function("plain", product, tuned, out_dtype, given, output)
    q4, words, dtype, scales = weight_of(product)

    @T.prim_func(s_tir=True)
    def gemv_rows(x_h: T.handle, w_h: T.handle, scale_h: T.handle, out_h: T.handle):
        T.func_attr(SCHEDULED)
        x = T.match_buffer(x_h, (1, in_features), "float16")
        w = T.match_buffer(w_h, words, dtype)
        scale = T.match_buffer(scale_h, scales, "float16")
        out = T.match_buffer(out_h, (1, product.outputs), out_dtype)
        with T.sblock("root"):
            T.reads()
            T.writes()
            launch(f, [x.data, out.data, w.data, scale.data if q4 else w.data])

    return with_scale(gemv_rows, q4)
