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

Of few rows to a block the sums stay in registers and are added once. x then comes through the ring
as well, so that warps wait for it no longer than for the weight, and may come in phases.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tvm import tirx
from tvm.script import tirx as T

from .common import SCHEDULED, ceil_div, cuda_source
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
MOST_OF_X = 64  # registers of a lane
MOST_TILES = 12  # whose sums stay in registers, 4 each
MIN_BYTES, MIN_BYTES_CLUSTER = 32 << 20, 64 << 20
"""Of a weight, the second for blocks in clusters; `gemv_mma.py` takes smaller ones."""


@dataclass(frozen=True)
class Plan:
    """How a product is divided.

    `warps` multiply. A ring has `depth` places, of which `ahead` are filled before x is looked at;
    one has eight rows, or a part of each, if they come in `pieces`. Blocks of a `cluster` share
    rows, each a part. Where the sums of all rows `stay` in registers, which then are added once, x
    comes through the ring, and rows may come in `phases`, a part of their columns in each.
    """

    warps: int
    depth: int
    ahead: int
    pieces: int
    phases: int
    cluster: int
    stay: bool


def plan(product: Product) -> Plan | None:
    """The plan for a product of several tokens, None if `gemv_mma.py` is as fast or none fits.

    The choices are from measurements on an H200.
    """
    if product.group or not 1 < product.batch <= MAX_BATCH or product.outputs % 2:
        return None
    for p in _preferred(product):
        columns = COLUMNS * p.cluster * p.phases * p.pieces
        if product.in_features % columns:
            continue
        of_x = p.pieces * ceil_div(product.in_features // columns, p.warps) * 8
        if of_x > MOST_OF_X or (p.stay and _tiles(product, p) > MOST_TILES):
            continue
        places = p.pieces * ceil_div(product.batch, 8) if p.stay else 0  # of x
        for depth in range(2 * ROWS, 1, -1):
            ahead = depth - 1 if p.pieces > 1 else ceil_div(depth, 2)
            q = replace(p, depth=depth, ahead=min(ahead, depth - places))
            if q.ahead > 0 and shared_bytes(product, q) <= SHARED_BYTES_CLUSTERS:
                return q
    return None


def _preferred(product: Product) -> list[Plan]:
    """Plans but for their rings, of which the first that fits is the best."""
    size, long = product.out_features * product.row_bytes, product.in_features > 8192
    if size < MIN_BYTES:
        return []
    plans = [Plan(8, 0, 0, 1, 4 if long else 1, 2, True)]
    if not long and (product.batch <= 8 or size >= MIN_BYTES_CLUSTER):
        plans = []
    for cluster in (1, 2) if product.batch <= 8 else (2,):
        if cluster == 1 or size >= MIN_BYTES_CLUSTER:
            # Of few rows, which would fill few places of the ring, places are smaller.
            few = product.out_features <= 4 * ROWS * PROCESSORS // cluster
            plans.append(Plan(16, 0, 0, 2 if few else 1, 1, cluster, False))
    return plans


def parts(p: Plan) -> int:
    """Blocks, or clusters of them, that the outputs are divided among."""
    return PROCESSORS // p.cluster


def shared_bytes(product: Product, p: Plan, among: int = 0) -> int:
    """Bytes of shared memory of a block, as `TokenSizes` of gemv_tokens.cuh lays it out.

    `among` replaces `parts`.
    """
    row = product.row_bytes // (p.cluster * p.pieces * p.phases)
    place = ROWS * (row + (64 if row % 128 == 0 else 0))
    eights = ceil_div(product.batch, 8)
    sums = 0 if p.stay else 2 * p.warps
    sums += _tiles(product, p, among) if p.cluster > 1 else 0
    return p.depth * place + (sums * 256 + (p.warps + 1) * 32) * eights + (2 * p.depth + 1) * 8


def _tiles(product: Product, p: Plan, among: int = 0) -> int:
    """Of eight rows, of a block or cluster."""
    unit, take = (1, ROWS // 2) if product.gated else (2, ROWS)
    return ceil_div(ceil_div(product.outputs // unit, among or parts(p)) * unit, take)


def sizes(product: Product, p: Plan, among: int = 0) -> str:
    """The arguments of the template `TokenSizes` of gemv_tokens.cuh; `among` replaces `parts`."""
    values = [product.batch, product.outputs, product.in_features, int(product.gated)]
    values += [p.warps, p.depth, p.ahead, p.pieces, p.phases, p.cluster, among or parts(p), p.stay]
    return ", ".join(str(int(value)) for value in values)


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
