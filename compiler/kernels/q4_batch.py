# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-redef"
# (TVMScript is parsed, never run, so it has no Python types.)
"""Products of 17 to 64 tokens with a four-bit weight on Hopper's tensor cores.

As in `q4_gemm.py` the weight is unpacked in registers on its way to `wgmma`, 64 rows to a tile.
Each warp copies its 16 rows of a tile ahead of their use to a ring in shared memory that no other
warp touches, the first of them before the kernel waits for its inputs. x is brought by warps that
do nothing else to a second ring, each column to where the lanes hold the weight's. Every block
reads the part of x that belongs to its columns, half a megabyte for 64 tokens and 4096 columns. So
blocks take several tiles, and the blocks of a cluster a part of the columns each; their sums meet
in shared memory and are added in a fixed order.

PTX for later GPUs has no `wgmma`; there the same layout feeds `mma`.
"""

from __future__ import annotations

import itertools
from dataclasses import astuple, dataclass, replace

from tvm import tirx
from tvm.script import tirx as T

from .common import SCHEDULED, cuda_source, launch_dependents
from .gemv_mma import PROCESSORS, SHARED_BYTES_CLUSTERS, Product

MAX_BATCH = 64
"""Most tokens of a product."""
COLUMNS = 256
"""K must be a multiple."""
_ROWS = 64  # of a tile
_PITCH = 68  # floats, of the partial sums of a tile's rows
_FORMS = [(1, 2, 2), (1, 3, 1), (1, 2, 1), (2, 1, 1)]  # split, teams, tiles
# By blocks of a cluster: blocks that run at once on an H200, and microseconds that clusters cost.
_CLUSTERS = {1: (PROCESSORS, 0.0), 2: (PROCESSORS, 1.0), 4: (120, 2.0), 8: (120, 2.5)}


@dataclass(frozen=True)
class Plan:
    """How a product is divided.

    `split` warpgroups share rows and take chunks of `COLUMNS` in turn, `teams` times as many
    multiply, and each has `tiles` tiles. Of the weight a warp copies 16 rows x 256 columns at once,
    with `depth` such copies under way or in use; of x, which `bringers` other warps bring, there
    are `stages` of 128 columns. The blocks of a cluster of `cluster` share rows.
    """

    split: int
    teams: int
    tiles: int
    depth: int
    stages: int
    bringers: int
    cluster: int = 1

    @property
    def threads(self) -> int:
        """Of a block."""
        return self.split * self.teams * 128 + self.bringers * 32


def supported(product: Product) -> bool:
    """Whether the kernel takes such a product: all of its rows and columns in whole pieces."""
    return (
        product.batch <= MAX_BATCH
        and product.group in (32, 64, 128)
        and product.in_features % COLUMNS == 0
        and product.outputs % 8 == 0
    )


def plan(product: Product) -> Plan | None:
    """The plan with the least estimated time, None if the kernel does not take the product.

    The estimate is what H200s were seen to need: 5 us for starting, reading x first and adding; a
    piece of 64 rows x 256 columns per block; the bytes that all blocks read through the L2 cache,
    where x counts once for each (the shorter of both hides but for a quarter); and what larger
    clusters cost.
    """
    if not supported(product):
        return None
    tokens, chunks = product.batch, product.in_features // COLUMNS
    weight = product.out_features * product.row_bytes * (1 + 4 / product.group)
    found: tuple[float, Plan] | None = None
    for (split, teams, tiles), (cluster, (most, cost)) in itertools.product(
        _FORMS, _CLUSTERS.items()
    ):
        p = _with_rings(product, Plan(split, teams, tiles, 2, 2, 4, cluster))
        count, steps = blocks(product, p), -(-chunks // cluster)
        waves = -(-count // most)
        work = waves * steps * teams * tiles * (0.3 + 0.0036 * tokens)
        traffic = (count * steps * COLUMNS * tokens * 2 + weight) / 5.5e6
        time = max(work, traffic) + min(work, traffic) / 4 + cost
        if found is None or time < found[0]:
            found = time, p
    assert found is not None
    return found[1]


def _with_rings(product: Product, p: Plan) -> Plan:
    """`p` with as much of x and of the weight under way as is of use and fits."""
    # As many warps bring x as there are stages: two with the same stage could mistake their turns.
    many = 8 if p.tiles == 1 and p.split * p.teams == 2 else 4
    p = replace(p, stages=many, bringers=many, depth=6)
    while shared_bytes(product, p) > SHARED_BYTES_CLUSTERS:
        p = replace(p, depth=p.depth - 1)
    return p


def blocks(product: Product, p: Plan) -> int:
    """Blocks of a product."""
    outputs = p.teams * p.tiles * (_ROWS // 2 if product.gated else _ROWS)
    return -(-product.outputs // outputs) * p.cluster


def shared_bytes(product: Product, p: Plan) -> int:
    """Shared memory of a block as `product` of q4_batch.cuh lays it out, and to align it."""
    tokens, warps = -(-product.batch // 8) * 8, p.split * p.teams * 4
    ring = warps * p.depth * 16 * (128 + 512 // product.group)
    sums = p.split * p.teams * p.tiles * tokens * _PITCH * 4
    return 1024 + max(p.stages * (tokens * 256 + 16) + ring, sums)


def sizes(product: Product, p: Plan) -> str:
    """The arguments of the template `Sizes` of q4_batch.cuh."""
    values = [product.batch, product.outputs, product.in_features, product.group, product.gated]
    return ", ".join(str(int(value)) for value in (*values, *astuple(p)))


def q4_batch(
    *,
    batch: int,
    out_features: int,
    in_features: int,
    out_dtype: str,
    group: int,
    tuned: Plan,
    gated: bool = False,
) -> tirx.PrimFunc:
    """`(x [b,K] f16, packed [N,K/8] u32, scale [N,K/group] f16) -> x @ w.T [b,N]`.

    Weights are rounded to fp16 as `q4_dequantize` rounds them, sums are float32. With `gated` the
    result is `silu(y[:, :N/2]) * y[:, N/2:]`, [b,N/2], of the product y rounded to `out_dtype`.
    `tuned` is from `plan`. Two calls give the same bits.
    """
    product = Product(batch, out_features, in_features, group, gated)
    p, outputs = tuned, product.outputs
    template = sizes(product, p)
    name = f"shardwright_q4_batch_{template.replace(', ', '_')}_{out_dtype}"
    out_type = {"float16": "half", "float32": "float"}[out_dtype]
    text = cuda_source("gemv_mma.cuh", "q4_batch.cuh") + (
        f"__device__ __forceinline__ void {name}(const half* x, const unsigned* packed, "
        f"const half* scale, {out_type}* out, unsigned char* shared) {{\n"
        f"  shardwright_q4_batch::product<shardwright_q4_batch::Sizes<{template}>>("
        "x, packed, scale, out, shardwright_q4_batch::aligned(shared));\n}\n"
    )
    shared = shared_bytes(product, p)

    @T.prim_func(s_tir=True)
    def q4_batch(x_h: T.handle, packed_h: T.handle, scale_h: T.handle, out_h: T.handle):
        T.func_attr(SCHEDULED)
        x = T.match_buffer(x_h, (batch, in_features), "float16")
        packed = T.match_buffer(packed_h, (out_features, in_features // 8), "uint32")
        scale = T.match_buffer(scale_h, (out_features, in_features // group), "float16")
        out = T.match_buffer(out_h, (batch, outputs), out_dtype)
        with T.sblock("root"):
            T.reads()
            T.writes()
            for _block in T.thread_binding(blocks(product, p), thread="blockIdx.x"):
                for _cluster in T.thread_binding(p.cluster, thread="clusterCtaIdx.x"):
                    for _tid in T.thread_binding(p.threads, thread="threadIdx.x"):
                        # CUDA code knows it by this name and one type in all kernels of a library.
                        q4_batch_shared = T.alloc_buffer((shared,), "uint8", scope="shared.dyn")
                        with T.attr(0, "tirx.launch_bounds_min_blocks_per_sm", 1):
                            T.evaluate(
                                T.cuda.func_call(
                                    name,
                                    x.data,
                                    packed.data,
                                    scale.data,
                                    out.data,
                                    q4_batch_shared.data,
                                    source_code=text,
                                )
                            )
                        # The kernel has done so before its last sums; this says so to the compiler.
                        launch_dependents("cuda")

    return q4_batch
