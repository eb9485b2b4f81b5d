# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-redef"
# (TVMScript is parsed, never run, so it has no Python types.)
"""Products of several tokens with a large plain weight, on CUDA GPUs from sm_90 on.

As in `gemv_rows.py` a warp of each block copies rows of the weight to a ring in shared memory by
long bulk copies, eight rows at a time, and the others all read the same rows, each warp its own
columns, whose part of x it holds in registers. They multiply on the tensor cores, with x as the
first operand of `mma.m16n8k16`, 16 tokens by 16 elements, and eight rows as the second. A lane
reads 16 bytes of a row, so elements are summed in another order than they are stored in. The warps'
sums of eight rows meet in shared memory, and the warps take turns to add them up and to write
results. A block of a cluster takes a part of the inner dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx
from tvm.script import tirx as T

from .common import SCHEDULED, cuda_source
from .gemv_mma import (
    CUDA_TYPE,
    MAX_BATCH,
    PROCESSORS,
    SHARED_BYTES_CLUSTERS,
    Function,
    Product,
    launch_clusters,
    wrapper,
)

WARP = 32
ROWS = 8  # at a place of the ring
COLUMNS = 32  # that a warp's lanes read of these at once, and keep 8 registers of x for
WARPS = 16
MOST_OF_X = 64  # registers of a lane
MIN_BYTES, MIN_BYTES_CLUSTER = 32 << 20, 64 << 20
"""Of a weight, the second for blocks in clusters; `gemv_mma.py` takes smaller ones."""


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class Plan:
    """How a product is divided.

    `warps` multiply. A ring has `depth` places, of which `ahead` are filled before x is looked at;
    one has eight rows, or a part of each, if they come in `pieces`. Blocks of a `cluster` share
    rows, each a part.
    """

    warps: int
    depth: int
    ahead: int
    pieces: int
    cluster: int


def plan(product: Product) -> Plan | None:
    """The plan for a product of several tokens, None if `gemv_mma.py` is as fast or none fits.

    The choices are from measurements on an H200.
    """
    if product.group or not 1 < product.batch <= MAX_BATCH or product.outputs % 2:
        return None
    size = product.out_features * product.row_bytes
    for cluster in (1, 2) if product.batch <= 8 else (2,):
        if size < (MIN_BYTES if cluster == 1 else MIN_BYTES_CLUSTER):
            return None
        # Of few rows, which would fill few places of the ring, places are smaller.
        pieces = 2 if product.out_features <= 4 * ROWS * PROCESSORS // cluster else 1
        if product.in_features % (COLUMNS * cluster * pieces):
            continue
        columns = product.in_features // (COLUMNS * cluster * pieces)
        if pieces * _ceil(columns, WARPS) * 8 > MOST_OF_X:
            continue
        for depth in range(2 * ROWS, 1, -1):
            p = Plan(WARPS, depth, depth - 1 if pieces > 1 else _ceil(depth, 2), pieces, cluster)
            if shared_bytes(product, p) <= SHARED_BYTES_CLUSTERS:
                return p
    return None


def parts(p: Plan) -> int:
    """Blocks, or clusters of them, that the outputs are divided among."""
    return PROCESSORS // p.cluster


def shared_bytes(product: Product, p: Plan, among: int = 0) -> int:
    """Bytes of shared memory of a block, as `TokenSizes` of gemv_tokens.cuh lays it out.

    `among` replaces `parts`.
    """
    unit, take = (1, ROWS // 2) if product.gated else (2, ROWS)
    tiles = _ceil(_ceil(product.outputs // unit, among or parts(p)) * unit, take)
    row = product.row_bytes // (p.cluster * p.pieces)
    place = ROWS * (row + (64 if row % 128 == 0 else 0))
    eights = _ceil(product.batch, 8)
    sums = 2 * p.warps + (tiles if p.cluster > 1 else 0)
    return p.depth * place + (sums * 256 + (p.warps + 1) * 32) * eights + (2 * p.depth + 1) * 8


def sizes(product: Product, p: Plan, among: int = 0) -> str:
    """The arguments of the template `TokenSizes` of gemv_tokens.cuh; `among` replaces `parts`."""
    values = [product.batch, product.outputs, product.in_features, int(product.gated)]
    values += [p.warps, p.depth, p.ahead, p.pieces, p.cluster, among or parts(p)]
    return ", ".join(map(str, values))


def device_function(
    kind: str, product: Product, tuned: Plan, out_dtype: str, given: str, output: str
) -> Function:
    """The device function that computes a product by `product_of_tokens` of gemv_tokens.cuh.

    Its parameters are as for that of `gemv_mma.py`.
    """
    template = f"TokenSizes<{sizes(product, tuned)}>"
    name, text = wrapper(kind, template, "product_of_tokens", out_dtype, given, "x", output)
    source = cuda_source("gemv_mma.cuh", "gemv_norm.cuh", "gemv_tokens.cuh") + text
    blocks, threads = parts(tuned) * tuned.cluster, (tuned.warps + 1) * WARP
    return Function(name, source, blocks, threads, shared_bytes(product, tuned), tuned.cluster)


def gemv_tokens(
    *,
    batch: int,
    out_features: int,
    in_features: int,
    out_dtype: str,
    tuned: Plan,
    gated: bool = False,
) -> tirx.PrimFunc:
    """`(x [b,K] f16, w [N,K] f16) -> x @ w.T [b,N]`, as by `gemv_mma`; `tuned` is from `plan`."""
    product = Product(batch, out_features, in_features, 0, gated)
    out = CUDA_TYPE[out_dtype]
    given, output = f"const half* x, {out}* out", f"PlainTokens<Z, {out}>{{out}}"
    f = device_function("plain", product, tuned, out_dtype, given, output)

    @T.prim_func(s_tir=True)
    def gemv_tokens(x_h: T.handle, w_h: T.handle, out_h: T.handle):
        T.func_attr(SCHEDULED)
        x = T.match_buffer(x_h, (batch, in_features), "float16")
        w = T.match_buffer(w_h, (out_features, in_features), "float16")
        out = T.match_buffer(out_h, (batch, product.outputs), out_dtype)
        with T.sblock("root"):
            T.reads()
            T.writes()
            launch_clusters(f, [x.data, out.data, w.data, w.data])

    return gemv_tokens
