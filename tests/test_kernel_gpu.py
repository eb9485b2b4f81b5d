"""The GPU kernels without a GPU: their plans, their refusals, and that CUDA source comes out.

What they compute is checked on a GPU by scripts/gpu_kernel_checks.py.
"""

import itertools
import re

import pytest
import tvm
from tvm import relax
from tvm.target import Target

from shardwright.compiler.cuda import cuda_target
from shardwright.compiler.kernels import (
    attention_cuda,
    attention_gpu,
    gemv,
    gemv_mma,
    gemv_rows,
    gemv_tokens,
    matmul,
    norm,
    q4_batch,
    rotary,
    sampling,
)
from shardwright.compiler.lower import lower_abstract
from shardwright.errors import UsageError

CACHE = dict(layers=2, pages=9, page_size=16, batch=None, max_pages=4, dtype="float16")


def source(func):
    mod = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
    target = Target({"kind": "cuda", "arch": "sm_90a"}, host="llvm")
    pending = [tvm.compile(mod, target=target).mod]
    while pending:
        module = pending.pop()
        if module.kind == "cuda":
            return module.inspect_source()
        pending.extend(module.imports)
    raise AssertionError("no CUDA module")


@pytest.mark.parametrize("kind", ["prefill", "partial"])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(8, 1, 128), (9, 3, 80), (32, 2, 256)])
def test_attention(kind, heads, kv_heads, head_dim):
    shapes = dict(heads=heads, kv_heads=kv_heads, head_dim=head_dim, scale=0.1, target="cuda")
    if kind == "prefill":
        func = attention_gpu.attention_prefill(tokens=None, **shapes, **CACHE)
    else:
        func = attention_gpu.attention_partial(tokens=2, splits=7, **shapes, **CACHE)
    assert "__shfl_xor_sync" in source(func)


def test_attention_with_a_window_and_capped_scores():
    shapes = dict(heads=8, kv_heads=4, head_dim=256, scale=0.1, window=100, softcap=50.0)
    func = attention_gpu.attention_partial(tokens=2, splits=3, target="cuda", **shapes, **CACHE)
    assert "tanhf" in source(func) and "99" in source(func)


@pytest.mark.parametrize("append", ["joined", "apart", ""])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(8, 1, 128), (9, 3, 80), (32, 2, 256)])
def test_decode_attention_on_cuda(append, heads, kv_heads, head_dim):
    shapes = dict(heads=heads, kv_heads=kv_heads, head_dim=head_dim, scale=0.1, target="cuda")
    func = attention_cuda.decode_attention(
        tokens=2, append=append, window=5, rotary=head_dim // 2, **shapes, **CACHE
    )
    text = source(func)
    name = re.search(r"decode_attention<shardwright::DecodeSizes<([^>]*)>>", text)
    sizes = [x.strip() for x in name[1].split(",")]
    plan = attention_cuda.decode_plan(
        tokens=2, kv_heads=kv_heads, group=heads // kv_heads, head_dim=head_dim
    )
    assert sizes[:5] == ["2", str(heads), str(kv_heads), str(head_dim), "16"]
    numbers = [plan.parts, plan.warps, plan.loaders, plan.stages, plan.ahead]
    assert sizes[5:10] == [str(x) for x in numbers]
    assert sizes[10:14] == ["false", *(str(x) for x in (plan.few, plan.splits, plan.blocks))]
    flags = [{True: "true", False: "false"}[x] for x in (append != "", append == "joined")]
    assert sizes[14:] == [*flags, str(head_dim // 2), "5", "false", "false"]
    # It may start before the kernel in front has ended.
    assert "shardwright_launch_dependents();" in text


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(("head_dim", "softcap"), [(64, 0.0), (128, 30.0), (80, 0.0)])
def test_prefill_attention_on_cuda(arch, head_dim, softcap):
    func = attention_cuda.prefill_attention(
        tokens=None, heads=6, kv_heads=2, head_dim=head_dim, scale=0.1, target="cuda", arch=arch,
        softcap=softcap, **CACHE
    )  # fmt: skip
    text = source(func)
    groups = 3 if (arch, head_dim) == (90, 64) else 2
    assert f"Sizes<6, 2, {head_dim}, 16, {groups}, " in text
    shared = int(re.search(r"attention_shared = T.alloc_buffer\(\((\d+),\)", func.script())[1])
    # What every GPU of that generation has for a block.
    assert shared <= (99 if arch < 90 else 227) * 1024


def test_what_the_tensor_core_kernels_take():
    sizes = dict(head_dim=128, page_size=16, dtype="float16", target="cuda")
    assert attention_cuda.supported(**sizes)
    for change in (
        {"head_dim": 72}, {"head_dim": 272}, {"page_size": 8}, {"dtype": "float32"},
        {"target": "rocm"}, {"target": "cpu"}, {"rotary": 6},
    ):  # fmt: skip
        assert not attention_cuda.supported(**sizes | change)
    large = sizes | {"head_dim": 256}
    assert attention_cuda.supported(**large)
    assert attention_cuda.prefill_supported(**large, arch=90)
    for arch in (89, 120):  # 99 KB of shared memory
        assert not attention_cuda.prefill_supported(**large, arch=arch)
    assert attention_cuda.supported(**sizes | {"page_size": 48})
    assert not attention_cuda.prefill_supported(**sizes | {"page_size": 48}, arch=90)


@pytest.mark.parametrize("kernel", ["decode", "prefill"])
def test_attention_with_sinks_on_cuda(kernel):
    shapes = dict(heads=8, kv_heads=1, head_dim=64, scale=0.1, target="cuda", arch=90, sinks=True)
    if kernel == "decode":
        func = attention_cuda.decode_attention(tokens=2, window=128, **shapes, **CACHE)
    else:
        func = attention_cuda.prefill_attention(tokens=None, window=128, **shapes, **CACHE)
    assert re.search(r"Sizes<[^>]*, true>>\(", source(func))


@pytest.mark.parametrize("arch", [80, 90, 120])
@pytest.mark.parametrize("group", [1, 2, 4, 5, 7, 8, 16, 71])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
def test_decode_plans(group, head_dim, arch):
    for tokens in (1, 2, 8, 64, 4096):
        for kv_heads in (1, 2, 8, 32):
            plan = attention_cuda.decode_plan(
                tokens=tokens, kv_heads=kv_heads, group=group, head_dim=head_dim, arch=arch
            )
            queries = -(-group // plan.parts)
            assert queries * plan.parts >= group and queries <= 16
            # What every GPU of that generation has for a block.
            assert plan.shared(group, head_dim) <= (227 if arch == 90 else 98) * 1024
            # As the kernel asserts.
            assert plan.stages % plan.warps == 0
            assert plan.warps <= plan.ahead <= plan.stages
            assert plan.warps % plan.loaders == 0
            assert plan.loaders == 1 or plan.ahead % plan.warps == 0
            assert not plan.pair or (plan.parts == 2 and arch == 90 and tokens == 1)
            assert plan.threads <= 1024
            items = tokens * kv_heads * plan.parts
            assert plan.splits == 1 or items <= attention_cuda.MAX_COUNTERS
            assert 0 < plan.splits <= 64


def test_a_single_sequence_fills_the_gpu():
    plan = attention_cuda.decode_plan(tokens=1, kv_heads=8, group=4, head_dim=128)
    assert plan.splits * 8 >= 0.9 * attention_cuda.MULTIPROCESSORS


@pytest.mark.parametrize(("head_dim", "tokens", "parts"), [(64, 1, 1), (128, 1, 2), (128, 8, 1)])
def test_large_groups_are_two_parts_where_that_is_faster(head_dim, tokens, parts):
    plan = attention_cuda.decode_plan(tokens=tokens, kv_heads=8, group=16, head_dim=head_dim)
    assert plan.parts == parts
    assert tokens * 8 * plan.parts * plan.splits <= 2 * attention_cuda.MULTIPROCESSORS


@pytest.mark.parametrize(
    ("kv_heads", "arch", "pair"), [(8, 90, True), (8, 89, False), (2, 90, False)]
)
def test_two_blocks_copy_for_each_other_where_a_large_group_is_read_twice(kv_heads, arch, pair):
    shapes = dict(heads=16 * kv_heads, kv_heads=kv_heads, head_dim=128, scale=0.1, target="cuda")
    func = attention_cuda.decode_attention(tokens=1, append="joined", arch=arch, **shapes, **CACHE)
    assert ('T.thread_binding(2, thread="clusterCtaIdx.x")' in func.script()) == pair
    sizes = re.search(r"DecodeSizes<1, ([^>]*)>", func.script())[1].split(", ")
    assert sizes[4] == "2" and sizes[9] == str(pair).lower()


def test_copies_under_way_are_fewer_than_the_ring_holds():
    plan = attention_cuda.decode_plan(tokens=1, kv_heads=8, group=4, head_dim=128)
    assert plan.warps == plan.ahead == 8 and plan.stages == 16


def test_attention_refuses_odd_head_dims():
    with pytest.raises(UsageError, match="multiple of 8"):
        attention_gpu.tiling(group=1, head_dim=65, dtype="float16", warp=32)


@pytest.mark.parametrize("warp", [32, 64])
@pytest.mark.parametrize("head_dim", [16, 32, 64, 80, 96, 128, 256])
def test_tiling_covers_the_head(warp, head_dim):
    for group in range(1, 17):
        tile = attention_gpu.tiling(group=group, head_dim=head_dim, dtype="float16", warp=warp)
        assert tile.lanes * tile.width >= head_dim > (tile.lanes // 2) * tile.width
        assert tile.per_warp * tile.lanes == warp
        assert tile.queries * tile.parts >= group > tile.queries * (tile.parts - 1)


def test_splits_fill_the_gpu_but_not_beyond_the_context():
    assert attention_gpu.num_splits(tokens=1, kv_heads=8, max_len=4096) * 8 >= 132 * 2
    assert attention_gpu.num_splits(tokens=64, kv_heads=8, max_len=4096) == 1
    assert attention_gpu.num_splits(tokens=1, kv_heads=1, max_len=40) == 3


@pytest.mark.parametrize("batch", range(1, 9))
@pytest.mark.parametrize("q4", [False, True])
def test_product_plans(batch, q4):
    for out_features in (1, 7, 1280, 4096, 128256):
        for units in (1, 3, 64, 128, 512, 896, 3584):
            p = gemv.plan(batch=batch, out_features=out_features, units=units, q4=q4)
            assert p.split == 1 or p.split * p.unroll * gemv.WARP <= units
            # The warps that share rows write one sum a thread.
            assert p.split == 1 or p.rows * batch <= p.split * gemv.WARP


@pytest.mark.parametrize("clusters", [False, True])
@pytest.mark.parametrize("group", [0, 32, 128])
def test_tensor_core_plans_cover_the_product_and_fit(clusters, group):
    limit = gemv_mma.SHARED_BYTES_CLUSTERS if clusters else gemv_mma.SHARED_BYTES
    sizes = itertools.product((2, 130, 4096, 57344), (512, 1792, 4096, 28672), (1, 3, 8, 16))
    for out_features, in_features, batch in sizes:
        for gated in (False, True):
            product = gemv_mma.Product(batch, out_features, in_features, group, gated)
            p = gemv_mma.plan(product, clusters=clusters)
            if p is None:
                # Much x meets little shared memory, or one token is faster without.
                much = not clusters and batch * in_features > 2**17
                assert much or (batch == 1 and group == 0)
                continue
            assert product.shared(p) <= limit
            assert p.split * p.teams * 32 <= 512 and p.depth >= 2
            assert p.cluster == 1 or clusters
            assert product.parts(p) * p.cluster <= gemv_mma.PROCESSORS
            assert product.tiles(p) * gemv_mma.TILE * product.parts(p) >= out_features


@pytest.mark.parametrize(
    ("batch", "in_features", "group"),
    [(17, 4096, 32), (1, 96, 32), (1, 1472, 64), (1, 4096, 16), (1, 4096, 512), (1, 12, 0)],
)
def test_products_that_tensor_cores_do_not_take(batch, in_features, group):
    product = gemv_mma.Product(batch, 64, in_features, group)
    assert gemv_mma.plan(product, clusters=True) is None


@pytest.mark.parametrize("group", [0, 64])
@pytest.mark.parametrize("gated", [False, True])
def test_tensor_core_products(group, gated):
    product = gemv_mma.Product(9, 1286, 5504, group, gated)
    plan = gemv_mma.plan(product, clusters=True)
    assert plan.cluster == 2
    func = gemv_mma.gemv_mma(
        batch=9, out_features=1286, in_features=5504, group=group, gated=gated,
        out_dtype="float16", tuned=plan,
    )  # fmt: skip
    text = source(func)
    assert "mma.sync" in text and "griddepcontrol.wait" in text
    assert f"out: T.Buffer((9, {643 if gated else 1286})" in func.script()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("whole_x", [False, True])
def test_plans_of_rows_cover_the_product_and_fit(gated, whole_x):
    for out_features, in_features in itertools.product(
        (2, 130, 4096, 57344, 262144), (8, 264, 512, 1792, 4096, 5504, 11008, 28672)
    ):
        product = gemv_mma.Product(1, out_features, in_features, 0, gated)
        p = gemv_rows.plan(product, whole_x=whole_x)
        pieces = in_features // 8
        if p is None:  # there is no room for enough rows, or beside all sums
            assert in_features > 8192 and (gated or out_features > 2**17)
            continue
        assert gemv_rows.shared_bytes(product, p) <= gemv_mma.SHARED_BYTES_CLUSTERS
        assert p.threads % 32 == 0 and 32 <= p.threads <= gemv_rows.MOST_THREADS
        assert not whole_x or p.threads < pieces + 32
        assert 1 <= p.ahead <= p.window <= p.depth and 8 % p.units == 0
        # Threads without a piece are few.
        assert p.threads <= 32 or -(-pieces // p.threads) * p.threads < 1.2 * max(pieces, p.threads)


@pytest.mark.parametrize(
    ("batch", "in_features", "group"), [(2, 4096, 0), (1, 4096, 32), (1, 12, 0), (1, 65536, 0)]
)
def test_products_without_a_plan_of_rows(batch, in_features, group):
    assert gemv_rows.plan(gemv_mma.Product(batch, 64, in_features, group)) is None


@pytest.mark.parametrize("gated", [False, True])
def test_products_of_rows(gated):
    sizes = dict(out_features=1286, in_features=5504, gated=gated)
    plan = gemv_rows.plan(gemv_mma.Product(1, **sizes))
    func = gemv_rows.gemv_rows(**sizes, out_dtype="float32", tuned=plan)
    text = source(func)
    assert "cp.async.bulk" in text and "griddepcontrol.wait" in text
    assert f"out: T.Buffer((1, {643 if gated else 1286})" in func.script()


@pytest.mark.parametrize("batch", [2, 8, 9, 16])
@pytest.mark.parametrize("gated", [False, True])
def test_plans_of_tokens_fit(batch, gated):
    found = 0
    for out_features, in_features in itertools.product(
        (4096, 8192, 57344, 262144), (1024, 2048, 4096, 5120, 8192, 11008)
    ):
        product = gemv_mma.Product(batch, out_features, in_features, 0, gated)
        p = gemv_tokens.plan(product)
        if p is None:
            continue
        found += 1
        assert gemv_tokens.shared_bytes(product, p) <= gemv_mma.SHARED_BYTES_CLUSTERS
        assert 1 <= p.ahead <= p.depth and out_features * in_features * 2 >= 2**25
        assert in_features % (32 * p.pieces * p.cluster) == 0
        assert p.cluster == 2 or batch <= 8
    assert found >= 6


@pytest.mark.parametrize(
    ("batch", "out_features", "in_features", "group"),
    [(1, 8192, 4096, 0), (17, 8192, 4096, 0), (2, 8192, 4096, 32), (2, 4096, 2048, 0),
     (2, 131073, 4096, 0), (2, 8192, 4104, 0), (2, 8192, 32768, 0), (16, 15360, 2048, 0)],
)  # fmt: skip
def test_products_without_a_plan_of_tokens(batch, out_features, in_features, group):
    product = gemv_mma.Product(batch, out_features, in_features, group)
    assert gemv_tokens.plan(product) is None


@pytest.mark.parametrize("gated", [False, True])
def test_products_of_tokens(gated):
    sizes = dict(batch=9, out_features=16384, in_features=4096, gated=gated)
    plan = gemv_tokens.plan(gemv_mma.Product(**sizes))
    func = gemv_tokens.gemv_tokens(**sizes, out_dtype="float32", tuned=plan)
    text = source(func)
    assert "cp.async.bulk" in text and "griddepcontrol.wait" in text and "mma.sync" in text
    assert f"out: T.Buffer((9, {8192 if gated else 16384})" in func.script()


@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("gated", [False, True])
def test_plans_of_several_tokens_cover_the_product_and_fit(group, gated):
    sizes = itertools.product((16, 1296, 4096, 6144, 28672, 128256), (256, 2048, 14336), (17, 64))
    for out_features, in_features, batch in sizes:
        product = gemv_mma.Product(batch, out_features, in_features, group, gated)
        p = q4_batch.plan(product)
        assert q4_batch.shared_bytes(product, p) <= gemv_mma.SHARED_BYTES_CLUSTERS
        rows = q4_batch.blocks(product, p) // p.cluster * p.teams * p.tiles * 64
        assert rows >= out_features and p.threads <= 1024
        assert p.stages % 2 == 0 and p.stages >= 2 * p.split and p.depth >= 2


@pytest.mark.parametrize(
    ("batch", "out_features", "in_features", "group"),
    [
        (65, 64, 4096, 32),
        (64, 64, 128, 32),
        (64, 60, 4096, 32),
        (64, 64, 4096, 256),
        (64, 64, 256, 0),
    ],
)
def test_products_of_several_tokens_that_are_not_taken(batch, out_features, in_features, group):
    assert q4_batch.plan(gemv_mma.Product(batch, out_features, in_features, group)) is None


def test_products_of_several_tokens():
    product = gemv_mma.Product(33, 1296, 512, 64, True)
    func = q4_batch.q4_batch(
        batch=33, out_features=1296, in_features=512, group=64, gated=True, out_dtype="float16",
        tuned=q4_batch.plan(product),
    )  # fmt: skip
    text = source(func)
    assert "wgmma" in text and "griddepcontrol.wait" in text
    assert "out: T.Buffer((33, 648)" in func.script()


@pytest.mark.parametrize(("batch", "columns"), [(17, 256), (64, 512), (17, 384)])
def test_several_tokens_are_for_hoppers_tensor_cores(batch, columns):
    mod, target = four_bit_product(batch, columns), cuda_target(("sm_90a",))
    with target:
        mod = lower_abstract(mod, target)
    names = {gv.name_hint for gv, f in mod.functions_items() if not isinstance(f, relax.Function)}
    whole = {"q4_batch_kernel"}
    assert names == (whole if columns != 384 else {"q4_gemm_kernel", "q4_gemm_image_kernel"})


@pytest.mark.parametrize(("batch", "kernel"), [(1, "mma"), (16, "mma"), (17, None)])
@pytest.mark.parametrize("columns", [256, 96])
def test_who_computes_products_of_few_tokens(batch, kernel, columns):
    mod, target = four_bit_product(batch, columns), cuda_target(("sm_89", "sm_90a"))
    with target:
        mod = lower_abstract(mod, target)
    names = {gv.name_hint for gv, f in mod.functions_items() if not isinstance(f, relax.Function)}
    if kernel is None or (columns == 96 and batch > 8):
        wanted = "q4_dequantize_kernel"
    else:
        wanted = "gemv_mma_kernel" if columns == 256 else "q4_gemv_kernel"
    assert names == {wanted}


def four_bit_product(batch, columns):
    shapes = [(batch, columns), (64, columns // 8), (64, columns // 32)]
    operands = [
        relax.Var(name, relax.TensorType(shape, dtype))
        for name, shape, dtype in zip(
            ("x", "packed", "scale"), shapes, ("float16", "uint32", "float16"), strict=True
        )
    ]
    bb = relax.BlockBuilder()
    with bb.function("decode", operands, attrs={"num_input": 1}):
        with bb.dataflow():
            call = relax.call_dps_packed(
                "shardwright.q4_linear",
                relax.Tuple(operands),
                out_ty=relax.TensorType((batch, 64), "float16"),
            )
            y = bb.emit_output(call)
        bb.emit_func_output(y)
    return bb.get()


@pytest.mark.parametrize("batch", [1, 5])
def test_products(batch):
    sizes = dict(batch=batch, out_features=100, in_features=192, out_dtype="float16")
    assert "__global__" in source(gemv.gemv(**sizes))
    assert "lop3.b32" in source(gemv.q4_gemv(group=32, **sizes))


@pytest.mark.parametrize(("batch", "out_features"), [(1, 102), (1, 4096), (5, 102)])
def test_gated_products(batch, out_features):
    sizes = dict(batch=batch, out_features=out_features, in_features=4096, out_dtype="float16")
    for func in (gemv.gemv(gated=True, **sizes), gemv.q4_gemv(gated=True, group=32, **sizes)):
        assert f"out: T.Buffer(({batch}, {out_features // 2})" in func.script()
        assert "expf" in source(func)


@pytest.mark.parametrize("features", [16, 1003, 4096, 5120, 16384])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_add_rms_norm(features, dtype):
    func = norm.add_rms_norm(tokens=None, features=features, eps=1e-5, dtype=dtype, target="cuda")
    text = source(func)
    # Whole rows of 16 bytes, where they divide into them.
    assert ("uint4" in text or "float4" in text) == (features % 8 == 0)


def test_products_refuse_what_they_cannot_read_in_16_bytes():
    with pytest.raises(UsageError, match="pad them to a multiple of 8"):
        gemv.gemv(batch=1, out_features=4, in_features=12, out_dtype="float16")
    with pytest.raises(UsageError, match="multiple of 32"):
        gemv.q4_gemv(batch=1, out_features=4, in_features=64, group=16, out_dtype="float16")


@pytest.mark.parametrize("joined", [False, True])
def test_other_kernels(joined):
    append = rotary.rotary_append(
        tokens=None, heads=4, kv_heads=2, head_dim=64, target="cuda", joined=joined, **CACHE
    )
    table = rotary.rotary_table(tokens=3, half=32, scale=1.0, ntk=(2.0, 64), target="cuda")
    # Fast-math sines are wrong at large angles.
    assert "__sinf" not in source(table) and "__global__" in source(append)
    assert "__syncthreads" in source(
        sampling.sample(batch=None, vocab=1003, max_len=64, target="cuda")
    )
    for func in (
        sampling.store_logits(batch=None, vocab=1003, target="cuda"),
        matmul.q4_dequantize(out_features=8, in_features=64, group=32, dtype="float16"),
        matmul.q4_take(
            tokens=None, vocab_rows=9, features=64, group=32, dtype="float16", target="cuda"
        ),
    ):
        assert "__global__" in source(func)


@pytest.mark.parametrize("turning", [128, 96])
def test_rotation_of_a_part_of_each_head(turning):
    shapes = dict(heads=6, kv_heads=2, head_dim=128, rotary=turning, target="cuda")
    assert "uint4" in source(rotary.rotary_append(tokens=None, **shapes, **CACHE))
    assert "uint4" in source(rotary.rotary_append(tokens=2, joined=True, **shapes, **CACHE))
