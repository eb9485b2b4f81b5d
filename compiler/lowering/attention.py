"""Lowerings of rotary embedding, the append to the cache, and attention over it."""

from __future__ import annotations

import math
from typing import Any

from tvm import relax

from shardwright.compiler.kernels import attention, attention_cuda, q4_gemm, rotary
from shardwright.compiler.lowering.common import Kernels, tokens_of, value_of
from shardwright.compiler.rules import shape_of


def lower_rotary_table(k: Kernels, call: relax.Call, args: list[relax.Expr]) -> relax.Expr:
    """Cosines and sines `[n, 2, D/2]` of the tokens' positions; scaled by length with `trained`.

    Operands are positions int32 [n], lengths int32 [n], inv_freq float32 [D/2], scale, factor and
    the trained length, 0 where the frequencies do not depend on the sequence's length.
    """
    positions, lengths, inv_freq, scale, factor, trained = args
    ntk = (value_of(factor), value_of(trained)) if value_of(trained) else None
    kernel = k.kernel(
        rotary.rotary_table,
        tokens=tokens_of(k, positions),
        half=shape_of(inv_freq)[0],
        scale=value_of(scale),
        ntk=ntk,
        target=k.target,
    )
    # What is not read need not be computed: a step has no lengths, but for this.
    return relax.call_tir(kernel, [positions, lengths if ntk else positions, inv_freq], call.ty)


def lower_rotary_table_long(k: Kernels, call: relax.Call, args: list[relax.Expr]) -> relax.Expr:
    """The same with two sets of frequencies, the second for sequences longer than `trained`.

    Operands are positions and lengths int32 [n], inv_freq float32 [2, D/2], scale, trained length.
    """
    positions, lengths, inv_freq, scale, trained = args
    kernel = k.kernel(
        rotary.rotary_table,
        tokens=tokens_of(k, positions),
        half=shape_of(inv_freq)[1],
        scale=value_of(scale),
        longer=value_of(trained),
        target=k.target,
    )
    return relax.call_tir(kernel, [positions, lengths, inv_freq], call.ty)


def lower_rotary_append(k: Kernels, call: relax.Call, args: list[relax.Expr]) -> relax.Expr:
    """Queries, keys and values apart (four tensors before the pages) or joined (two)."""
    pages = next(i for i, x in enumerate(args) if len(shape_of(x)) == 5)
    shapes = _cache_shapes(k, relax.Var("q", call.ty.fields[0]), args[pages], args[pages + 2])
    turned = 2 * shape_of(args[pages - 1])[2]
    kernel = k.kernel(
        rotary.rotary_append,
        **shapes,
        target=k.target,
        joined=pages == 2,
        rotary=turned if turned < shapes["head_dim"] else None,
    )
    # Results: rotated q is new, the pages are operands.
    return relax.call_tir_inplace(kernel, args, [-1, pages, pages + 1], list(call.ty.fields))


def lower_attention(k: Kernels, call: relax.Call, args: list[relax.Expr]) -> relax.Expr:
    """Attention of q [n, H, D] over the paged cache.

    On GPUs one token of each row is split over the sequence; where there is no kernel of one
    launch for it, a second kernel combines the parts. Sinks, if any, come after the positions.
    """
    *tensors, layer, scale, window, softcap = args
    q, k_pages, page_table = tensors[0], tensors[1], tensors[3]
    sinks = tensors[6:]
    shapes = _cache_shapes(k, q, k_pages, page_table) | {
        "scale": value_of(scale),
        "window": value_of(window),
        "softcap": value_of(softcap),
    }
    if k.target == "cpu":
        kernel = k.kernel(attention.attention_cpu, **shapes, sinks=bool(sinks))
        return relax.call_tir(kernel, [*tensors, layer], call.ty)
    sizes = {name: shapes[name] for name in ("head_dim", "page_size", "dtype")}
    if shapes["tokens"] is None:
        supported = attention_cuda.prefill_supported(**sizes, target=k.target, arch=k.arch)
        if supported and k.image:
            n, *features = shape_of(q)
            image = relax.TensorType([q4_gemm.image_rows(n), math.prod(features)], "float16")
            kernel = k.kernel(
                attention_cuda.prefill_attention_image, **shapes, target=k.target, arch=k.arch
            )
            return relax.call_tir(kernel, [*tensors, layer], image)
        if supported:
            kernel = k.kernel(
                attention_cuda.prefill_attention,
                **shapes,
                target=k.target,
                arch=k.arch,
                sinks=bool(sinks),
            )
        else:
            kernel = k.kernel(
                attention.attention_prefill, **shapes, target=k.target, sinks=bool(sinks)
            )
        return relax.call_tir(kernel, [*tensors, layer], call.ty)
    if attention_cuda.supported(**sizes, target=k.target):
        kernel = k.kernel(
            attention_cuda.decode_attention,
            **shapes,
            target=k.target,
            arch=k.arch,
            sinks=bool(sinks),
        )
        types = [call.ty, *_decode_scratch(shapes, k.arch)]
        results = k.bb.emit(relax.call_tir(kernel, [*tensors, layer], types))
        return relax.TupleGetItem(results, 0)
    n, heads, head_dim = shape_of(q)
    max_len = shapes["max_pages"] * shapes["page_size"]
    splits = attention.num_splits(
        tokens=n,
        kv_heads=shapes["kv_heads"],
        max_len=min(max_len, shapes["window"] or max_len),
    )
    kernel = k.kernel(attention.attention_partial, **shapes, splits=splits, target=k.target)
    types = [
        relax.TensorType([splits, n, heads, head_dim], "float32"),
        relax.TensorType([splits, n, heads, 2], "float32"),
    ]
    parts = k.bb.emit(relax.call_tir(kernel, [*tensors[:6], layer], types))
    pieces = [k.bb.emit(relax.TupleGetItem(parts, i)) for i in range(2)]
    names = ("tokens", "heads", "head_dim", "dtype")
    combine = k.kernel(
        attention.attention_combine,
        **{name: shapes[name] for name in names},
        splits=splits,
        target=k.target,
        sinks=bool(sinks),
    )
    return relax.call_tir(combine, [*pieces, *sinks], call.ty)


def lower_append_attention(k: Kernels, call: relax.Call, args: list[relax.Expr]) -> relax.Expr:
    """One kernel for one token of each row, where there is one; otherwise its two parts."""
    *tensors, scale, window, softcap = args
    at = next(i for i, x in enumerate(args) if len(shape_of(x)) == 5)
    out, *pages = call.ty.fields
    shapes = _cache_shapes(k, relax.Var("q", out), args[at], args[at + 2])
    sizes = {name: shapes[name] for name in ("head_dim", "page_size", "dtype")}
    turned = 2 * shape_of(args[at - 1])[2]
    supported = attention_cuda.supported(**sizes, target=k.target, rotary=turned)
    if shapes["tokens"] is not None and supported:
        kernel = k.kernel(
            attention_cuda.decode_attention,
            **shapes,
            scale=value_of(scale),
            window=value_of(window),
            softcap=value_of(softcap),
            append="joined" if at == 2 else "apart",
            rotary=turned if turned < shapes["head_dim"] else None,
            target=k.target,
            arch=k.arch,
        )
        types = [out, *pages, *_decode_scratch(shapes, k.arch)]
        places = [-1, at, at + 1, -1, -1]
        results = k.bb.emit(relax.call_tir_inplace(kernel, tensors, places, types))
        return relax.Tuple([k.bb.emit(relax.TupleGetItem(results, i)) for i in range(3)])
    name = "rotary_append_joined" if at == 2 else "rotary_append"
    append = relax.call_dps_packed(
        f"shardwright.{name}", relax.Tuple(tensors), out_ty=[out, *pages]
    )
    appended = k.bb.emit(lower_rotary_append(k, k.bb.normalize(append), tensors))
    q, *cache = [k.bb.emit(relax.TupleGetItem(appended, i)) for i in range(3)]
    attend_args = [q, *cache, *tensors[at + 2 :], scale, window, softcap]
    attend = relax.call_dps_packed("shardwright.attention", relax.Tuple(attend_args), out_ty=out)
    attended = k.bb.emit(lower_attention(k, k.bb.normalize(attend), attend_args))
    return relax.Tuple([attended, *cache])


def _cache_shapes(
    k: Kernels, q: relax.Expr, k_pages: relax.Expr, page_table: relax.Expr
) -> dict[str, Any]:
    layers, pages, kv_heads, page_size, head_dim = shape_of(k_pages)
    return {
        "tokens": tokens_of(k, q),
        "heads": shape_of(q)[1],
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "layers": layers,
        "pages": pages,
        "page_size": page_size,
        "batch": None,
        "max_pages": shape_of(page_table)[1],
        "dtype": str(q.ty.dtype),
    }


def _decode_scratch(shapes: dict[str, Any], arch: int) -> list[relax.TensorType]:
    tokens, heads, kv_heads, dim = (
        shapes[name] for name in ("tokens", "heads", "kv_heads", "head_dim")
    )
    plan = attention_cuda.decode_plan(
        tokens=tokens, kv_heads=kv_heads, group=heads // kv_heads, head_dim=dim, arch=arch
    )
    scratch = attention_cuda.decode_scratch(plan, tokens, heads, kv_heads, dim)
    return [relax.TensorType(shape, "float32") for shape in scratch]
