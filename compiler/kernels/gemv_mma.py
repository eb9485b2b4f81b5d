# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-redef"
# (TVMScript is parsed, never run, so it has no Python types.)
"""Products of few tokens with a large weight on the tensor cores of CUDA GPUs.

Bound by reading the weight, so everything serves that stream. The rows are divided evenly among
the multiprocessors. A warp takes tiles of 16 rows and, of these, every `split`-th chunk of `chunk`
bytes a row. It copies them ahead of their use to a ring in shared memory that no other warp
touches, the first of them before the kernel waits for its inputs. The weight is the first operand
of `mma.m16n8k16`, 16 rows by 16 elements, the tokens are the second, so that 8 tokens cost hardly
more than one. Elements are summed in whichever order suits the weight as it is stored. x comes to
shared memory by asynchronous copies, with a barrier for the columns of each step, so that warps
begin with what is there; what does not fit comes in phases, into two buffers in turn. The sums of
the warps that share rows meet in shared memory and are added in a fixed order. In a cluster of
blocks each takes a part of the inner dimension, and so of x.

A single token is multiplied with four bits as integers, by `mma.m16n8k32`: x as 16 bits in two
bytes, to a scale for each 32 elements, and codes as they are.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from .common import SCHEDULED, ceil_div, cuda_source, launches_dependents

MAX_BATCH = 16
"""Most tokens of a product."""
PROCESSORS = 132  # multiprocessors of an H100 or H200, among which the rows are divided
TILE = 16  # rows
SHARED_BYTES = 99 * 1024  # that a block may have on any GPU from sm_80 on
SHARED_BYTES_CLUSTERS = 227 * 1024  # on those with clusters of blocks
CUDA_TYPE = {"float16": "half", "float32": "float"}
"""Of outputs."""
FEW_PHASES, MAX_PHASES = 4, 16  # of x: what is sought, and what is still worth while


@dataclass(frozen=True)
class Plan:
    """How a product is divided.

    A warp copies `tiles` x 16 rows x `chunk` bytes at once, with `depth` such copies under way or
    in use; `split` warps share rows, `teams` times as many make a block; a cluster of `cluster`
    blocks shares rows; x passes through shared memory in `phases` parts.
    """

    chunk: int
    tiles: int
    depth: int
    split: int
    teams: int
    cluster: int = 1
    phases: int = 1


@dataclass(frozen=True)
class Product:
    """The sizes of a product; `group` is 0 for an fp16 weight."""

    batch: int
    out_features: int
    in_features: int
    group: int = 0
    gated: bool = False

    @property
    def outputs(self) -> int:
        """Columns of the result."""
        return self.out_features // 2 if self.gated else self.out_features

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of the weight, without its scales."""
        return self.in_features // 2 if self.group else self.in_features * 2

    def fits(self, chunk: int = 128) -> bool:
        """Whether rows divide into pieces of 16 bytes, and their scales into pieces of 4."""
        if self.row_bytes % 16:
            return False
        return not self.group or (
            self.group % 32 == 0
            and chunk * 2 // self.group * 2 % 4 == 0
            and self.in_features // self.group * 2 % 4 == 0
        )

    def parts(self, p: Plan) -> int:
        """Blocks, or clusters of them, that the outputs are divided among."""
        return min(PROCESSORS // p.cluster, ceil_div(self.outputs, 8))

    def shared(self, p: Plan) -> int:
        """Bytes of shared memory of a block, as `product` of gemv_mma.cuh lays it out."""
        elements = p.chunk * 2 if self.group else p.chunk // 2
        scale_bytes = elements // self.group * 2 if self.group else 0
        pitch = p.chunk + 16 + scale_bytes + (16 if scale_bytes == 32 else 0)
        ring = p.split * p.teams * p.depth * p.tiles * TILE * pitch
        chunks = ceil_div(self.in_features, elements)
        steps = ceil_div(chunks, p.split * p.phases * p.cluster)
        rows = p.tiles * TILE
        take = rows // 2 if self.gated else rows
        wide = 1 if self.batch == 1 or self.outputs % 4 else 4
        height = ceil_div(ceil_div(self.outputs // wide, self.parts(p)) * wide, take) * rows
        partial = (height + 4) * 4 * p.split * self.batch
        columns = steps * p.split * elements
        if self.batch == 1 and self.group:
            # Also two floats for each group of x.
            return ring + columns * 2 + columns // 32 * 8 + partial
        buffers = 2 if p.phases > 1 else 1
        x = buffers * self.batch * (columns * 2 + (64 if self.group else 16))
        return ring + x + ceil_div(buffers * steps, 2) * 16 + partial

    def tiles(self, p: Plan) -> int:
        """Tiles of a block."""
        return ceil_div(self.out_features, self.parts(p) * TILE)

    def stay(self, p: Plan) -> bool:
        """Whether each warp has one take of rows, whose sums stay in registers."""
        return self.tiles(p) <= p.teams * p.tiles and (self.batch > 1 or not self.group)

    def idle_steps(self, p: Plan) -> bool:
        """Whether some of the warps that share rows would run out of chunks well before others."""
        chunks, shares = ceil_div(self.row_bytes, p.chunk), p.split * p.cluster
        return ceil_div(chunks, shares) * shares * 8 > chunks * 9

    def in_phases(self, p: Plan, limit: int) -> Plan | None:
        """`p` with the fewest phases that fit into `limit` bytes of shared memory, if any do."""
        for phases in range(1, ceil_div(self.row_bytes, p.chunk) + 1):
            q = replace(p, phases=phases)
            if self.shared(q) <= limit:
                return q
        return None


def plan(product: Product, *, clusters: bool) -> Plan | None:
    """The plan for a product, None if there is none or `gemv.py` is faster.

    With `clusters` the GPU has clusters of blocks and 227 KB of shared memory for a block.
    The choices are from measurements on an H200 (`scripts/gpu_kernel_checks.py --tune`).
    """
    if product.batch == 1 and not product.group:
        return None  # see `gemv_rows.py`
    limit = SHARED_BYTES_CLUSTERS if clusters else SHARED_BYTES
    if product.batch > MAX_BATCH:
        return None
    plans = [_evenly(product, p) for p in _preferred(product, clusters) if product.fits(p.chunk)]
    for p in plans:
        if product.shared(p) <= limit:
            return p
    for p in reversed(plans):
        if (found := _in_few_phases(product, p, limit)) is not None:
            return found
    return None


def _evenly(product: Product, p: Plan) -> Plan:
    """`p`, whose warps that share rows run out of them together, unless many would have none."""
    while p.split > 1 and product.idle_steps(p) and p.teams < 2 * product.tiles(p):
        p = _wider(p)
    return p


def _in_few_phases(product: Product, p: Plan, limit: int) -> Plan | None:
    """`p` in phases, with fewer warps that share rows where that saves phases."""
    found = None
    while True:
        q = product.in_phases(p, limit)
        stay = q is not None and product.stay(q)
        if q is not None and (found is None or stay or q.phases < found.phases):
            found = q
        if p.split == 1 or stay or (q is not None and q.phases <= FEW_PHASES):
            break
        p = _wider(p)
    return found if found is not None and found.phases <= MAX_PHASES else None


def _wider(p: Plan) -> Plan:
    """Half as many warps share rows."""
    return replace(p, split=p.split // 2, teams=p.teams * 2)


def _preferred(product: Product, clusters: bool) -> list[Plan]:
    """Plans: the first of which a block has all of x, else the last, in phases."""
    batch, q4 = product.batch, product.group > 0
    if not clusters:
        return [Plan(128, 1, 2, 4, 2)]
    x_bytes = batch * product.in_features * 2
    little = 64 if (product.in_features < 8192 if q4 else batch <= 4) else 32
    cluster = 2 if batch > 1 and x_bytes > little * 1024 else 1
    rows = ceil_div(product.out_features, PROCESSORS // cluster)  # of a block
    tiles = ceil_div(rows, TILE)
    if not q4:
        most = Plan(128, 1, 3, 2, 8)
        if batch <= 4:
            plans = [Plan(128, 1, 4, 8, 2), Plan(128, 1, 3, 4, 4), most]
        elif tiles <= (8 if batch <= 8 else 4):
            plans = [Plan(128, 1, 4, 4, 4)]
        else:
            plans = [
                Plan(128, 1, 6, 4, 2) if batch <= 8 or tiles <= 6 else Plan(128, 1, 5, 2, 4),
                most,
            ]
    elif batch == 1:
        if product.row_bytes % 512:
            plans = [Plan(128, 1, 3, 4, 4)]
        else:
            much = rows > 128 and x_bytes <= 8192
            plans = [Plan(256, 1, 2, 2, 8) if much else Plan(256, 1, 2, 4, 4)]
    elif batch <= 8:
        if tiles < 0.7 * ceil_div(tiles, 8) * 8:
            plans = [Plan(128, 1, 2, 4, 4)]
        else:
            long = batch <= 4 and product.row_bytes % 512 == 0
            plans = [Plan(256, 1, 2, 2, 8)] * long + [Plan(128, 1, 2, 2, 8)]
    else:
        split = 4 if tiles <= 3 else 2 if tiles <= 8 else 1
        plans = [Plan(128, 1, 2, split, 16 // split)]
        # Two tiles at once read x half as often, which they then also put in order.
        plans += [Plan(128, 2, 2, 4, 2) if tiles <= 4 else Plan(128, 2, 2, 2, 4)]
    return [replace(p, cluster=cluster) for p in plans]


def sizes(product: Product, p: Plan, parts: int | None = None) -> str:
    """The arguments of the template `Sizes` of gemv_mma.cuh; `parts` replaces `Product.parts`."""
    values = [product.batch, product.outputs, product.in_features, product.group, product.gated]
    values += [p.chunk, p.tiles, p.depth, p.split, p.teams, p.phases, p.cluster]
    values += [parts or product.parts(p)]
    return ", ".join(str(int(value)) for value in values)


@dataclass(frozen=True)
class Function:
    """A device function that computes a product, and the grid whose threads call it.

    Its last argument is `shared` bytes of shared memory. Blocks come in clusters of `cluster`.
    """

    name: str
    source: str
    blocks: int
    threads: int
    shared: int
    cluster: int = 1

    def call(self, args: list[Any], shared: Any) -> Any:
        """Its call in a kernel."""
        return T.cuda.func_call(self.name, *args, shared, source_code=self.source)


def wrapper(
    kind: str, sizes: str, product: str, out_dtype: str, given: str, x: str, output: str
) -> tuple[str, str]:
    """The name and text of a device function that calls the template `product` with `sizes`.

    Its parameters are `given`, of which `x` and `output` are made, and then weight, scale and
    shared memory; `kind` tells it from others of these sizes.
    """
    name = re.sub(r"\W+", "_", f"shardwright_gemv_{kind}_{sizes}_{out_dtype}")
    text = f"""
__device__ __forceinline__ void {name}({given}, const void* weight, const half* scale,
                                       void* shared) {{
  using namespace shardwright_gemv;
  using Z = {sizes};
  {product}<Z>({x}, weight, scale, {output}, static_cast<char*>(shared));
}}
"""
    return name, text


def device_function(
    kind: str,
    product: Product,
    tuned: Plan,
    out_dtype: str,
    given: str,
    output: str,
    x: str = "PlainInput{x}",
    beside: str | None = None,
    more: int = 0,
) -> Function:
    """The device function that computes a product by `product` of gemv_mma.cuh, see `wrapper`.

    `more` bytes of its shared memory are behind the product's. What else it needs is in the file
    `beside`.
    """
    template = f"Sizes<{sizes(product, tuned)}>"
    name, text = wrapper(kind, template, "product", out_dtype, given, x, output)
    source = cuda_source("gemv_mma.cuh", beside) + text
    blocks, threads = product.parts(tuned) * tuned.cluster, tuned.split * tuned.teams * 32
    shared = product.shared(tuned) + more
    return Function(name, source, blocks, threads, shared, tuned.cluster)


def plain_output(out_dtype: str) -> tuple[str, str]:
    """For `wrapper`: the parameters x and the result, and the output that is made of them."""
    out = CUDA_TYPE[out_dtype]
    return f"const half* x, {out}* out", f"PlainOutput<{out}>{{out}}"


@T.inline
def _call(f, args):
    """A thread calls the device function `f`, a `Function`, with `args` and shared memory."""
    launches_dependents()
    gemv_shared = T.alloc_buffer((f.shared,), "uint8", scope="shared.dyn")
    # Without this, nvcc keeps half of the registers free for a second block.
    with T.attr(0, "tirx.launch_bounds_min_blocks_per_sm", 1):
        T.evaluate(f.call(args, gemv_shared.data))


@T.inline
def launch(f, args):
    """Blocks of which each thread does so."""
    for _block in T.thread_binding(f.blocks, thread="blockIdx.x"):
        for _tid in T.thread_binding(f.threads, thread="threadIdx.x"):
            _call(f, args)


@T.inline
def launch_clusters(f, args):
    """Clusters of such blocks."""
    for _block in T.thread_binding(f.blocks, thread="blockIdx.x"):
        for _cluster in T.thread_binding(f.cluster, thread="clusterCtaIdx.x"):
            for _tid in T.thread_binding(f.threads, thread="threadIdx.x"):
                _call(f, args)


def gemv_mma(
    *,
    batch: int,
    out_features: int,
    in_features: int,
    out_dtype: str,
    tuned: Plan,
    group: int = 0,
    gated: bool = False,
) -> tirx.PrimFunc:
    """`(x [b,K] f16, w [N,K] f16) -> x @ w.T [b,N]`, or with a four-bit weight for `group` > 0.

    That is `(x, packed [N,K/8] u32, scale [N,K/group] f16)`. Sums are float32; of a four-bit weight
    elements are multiplied as small integers and the sums of 32 scaled. With `gated` the result is
    `silu(y[:, :N/2]) * y[:, N/2:]`, [b,N/2], of the product y rounded to `out_dtype`. `tuned` is
    from `plan`. Two calls give the same bits.
    """
    product = Product(batch, out_features, in_features, group, gated)
    outputs, (given, output) = product.outputs, plain_output(out_dtype)
    f = device_function("plain", product, tuned, out_dtype, given, output)

    if not group:

        @T.prim_func(s_tir=True)
        def gemv_mma(x_h: T.handle, w_h: T.handle, out_h: T.handle):
            T.func_attr(SCHEDULED)
            x = T.match_buffer(x_h, (batch, in_features), "float16")
            w = T.match_buffer(w_h, (out_features, in_features), "float16")
            out = T.match_buffer(out_h, (batch, outputs), out_dtype)
            with T.sblock("root"):
                T.reads()
                T.writes()
                launch_clusters(f, [x.data, out.data, w.data, w.data])

        return gemv_mma

    @T.prim_func(s_tir=True)
    def q4_gemv_mma(x_h: T.handle, packed_h: T.handle, scale_h: T.handle, out_h: T.handle):
        T.func_attr(SCHEDULED)
        x = T.match_buffer(x_h, (batch, in_features), "float16")
        packed = T.match_buffer(packed_h, (out_features, in_features // 8), "uint32")
        scale = T.match_buffer(scale_h, (out_features, in_features // group), "float16")
        out = T.match_buffer(out_h, (batch, outputs), out_dtype)
        with T.sblock("root"):
            T.reads()
            T.writes()
            launch_clusters(f, [x.data, out.data, packed.data, scale.data])

    return q4_gemv_mma
