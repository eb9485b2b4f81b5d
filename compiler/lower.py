"""Lower: abstract operations of the local view become kernels for one target.

`LOWERINGS` maps each abstract operation to a function that emits its kernels. A kernel is generated
once for each set of shapes; identical layers share it, the layer's number being an argument.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import tvm
from tvm import relax, te

from shardwright.compiler.fuse import FUSIONS
from shardwright.compiler.kernels import (
    activation,
    all_reduce,
    attention,
    attention_cuda,
    experts,
    gemv,
    gemv_mma,
    gemv_rocm,
    matmul,
    matmul_rocm,
    norm,
    q4_gemm,
    quantized,
    rotary,
    sampling,
    sampling_cuda,
)
from shardwright.compiler.linear import Rewriter
from shardwright.compiler.packing import Packing
from shardwright.compiler.peer import PeerState, add_peer_decode
from shardwright.compiler.rules import op_name, operands_of, shape_of

CUBLAS_PASS = "cublas"
"""Leaves products of many tokens on CUDA to cuBLAS; without it dlight schedules them."""

Q4_GEMM_PASS = "q4_gemm"
"""Unpacks four-bit weights on their way to the tensor cores; without it, into memory before."""

MATMUL = "shardwright.matmul"
"""Packed function of the runtime, `(x [n,K], w [N,K], out [n,N])`."""

GEMV_MAX_BATCH = 8
"""Largest batch of the matrix-vector kernels without tensor cores."""


def lower_abstract(
    mod: tvm.IRModule,
    target: tvm.target.Target,
    peer: PeerState | None = None,
    disabled: frozenset[str] = frozenset(),
) -> tvm.IRModule:
    """Replace every abstract operation and collective of `mod` by calls of kernels for `target`.

    Operations are fused first, but for the fusions (`fuse.FUSIONS`) named in `disabled`.
    """
    for name, fuse in FUSIONS.items():
        if name not in disabled:
            mod = fuse(mod)
    if peer is not None:
        mod = add_peer_decode(mod, peer)
    bb = relax.BlockBuilder()
    kernels = _Kernels(bb, target_name(target))
    kernels.cublas = target.kind.name == "cuda" and CUBLAS_PASS not in disabled
    kernels.clusters = "clusters" in target.keys
    kernels.wgmma = "wgmma" in target.keys and Q4_GEMM_PASS not in disabled
    if target.kind.name == "cuda":
        kernels.arch = int(str(target.attrs["arch"])[3:])
    functions = {
        gv.name_hint: Rewriter(func, kernels.lower, bb=bb).run(gv.name_hint)
        for gv, func in mod.functions_items()
    }
    out = {gv: f for gv, f in bb.get().functions_items() if not isinstance(f, relax.Function)}
    return tvm.IRModule({**out, **{relax.GlobalVar(name): f for name, f in functions.items()}})


def target_name(target: tvm.target.Target) -> str:
    """A target as kernel generators take it: "cpu", "cuda", or "rocm:" and the architecture."""
    kind = str(target.kind.name)
    return {"llvm": "cpu", "rocm": f"rocm:{target.attrs.get('mcpu', '')}"}.get(kind, kind)


NOTE = "shardwright.note"
"""Attribute of a kernel: the sizes it was generated for, as JSON, for its reference."""


def _note(shapes: dict[str, Any]) -> str:
    plain = (int, float, str, tuple, type(None))
    note: dict[str, Any] = {
        name: value for name, value in shapes.items() if isinstance(value, plain)
    }
    if isinstance(shapes.get("packing"), Packing):
        note["packing"] = asdict(shapes["packing"])
    return json.dumps(note)


class _Kernels:
    """Generates kernels on demand and emits calls of them."""

    def __init__(self, bb: relax.BlockBuilder, target: str) -> None:
        self.bb, self.target = bb, target
        self.cublas = self.clusters = self.wgmma = False
        self.arch = 0  # the oldest CUDA architecture, such as 89
        self.generated: dict[tuple[Any, ...], relax.GlobalVar] = {}

    def lower(self, rw: Rewriter, _var: relax.Var, call: relax.Call) -> relax.Expr | None:
        """The kernels for `call`, or None if it is an operation of Relax itself."""
        lowering = LOWERINGS.get(op_name(call))
        if lowering is None:
            return None
        return lowering(self, call, [rw.local(x) for x in operands_of(call)])

    def kernel(self, generate: Callable[..., Any], **shapes: Any) -> relax.GlobalVar:
        """The kernel `generate(**shapes)`, generated once."""
        key = (generate, *sorted(shapes.items(), key=lambda kv: kv[0]))
        if key not in self.generated:
            func = generate(**shapes).with_attr(NOTE, _note(shapes))
            self.generated[key] = self.bb.add_func(func, f"{generate.__name__}_kernel")
        return self.generated[key]


def _tokens(k: _Kernels, x: relax.Expr) -> int | None:
    """Number of tokens of `x` [n, ...] to generate a kernel for, None if symbolic.

    On a CPU one kernel for any number serves as well, and compiles once.
    """
    n = shape_of(x)[0]
    return n if isinstance(n, int) and k.target != "cpu" else None


def _value(x: relax.Expr) -> Any:
    """A number known at compile time."""
    return x.value


def _rotary_table(k: _Kernels, call: relax.Call, args: list[relax.Expr]) -> relax.Expr:
    positions, lengths, inv_freq, scale, factor, trained = args
    ntk = (_value(factor), _value(trained)) if _value(trained) else None
    kernel = k.kernel(
        rotary.rotary_table,
        tokens=_tokens(k, positions),
        half=shape_of(inv_freq)[0],
        scale=_value(scale),
        ntk=ntk,
        target=k.target,
    )
    return relax.call_tir(kernel, [positions, lengths, inv_freq], call.ty)


def _rotary_table_long(k: _Kernels, call: relax.Call, args: list[relax.Expr]) -> relax.Expr:
    positions, lengths, inv_freq, scale, trained = args
    kernel = k.kernel(
        rotary.rotary_table,
        tokens=_tokens(k, positions),
        half=shape_of(inv_freq)[1],
        scale=_value(scale),
        longer=_value(trained),
        target=k.target,
    )
    return relax.call_tir(kernel, [positions, lengths, inv_freq], call.ty)


def _cache_shapes(
    k: _Kernels, q: relax.Expr, k_pages: relax.Expr, page_table: relax.Expr
) -> dict[str, Any]:
    layers, pages, kv_heads, page_size, head_dim = shape_of(k_pages)
    return {
        "tokens": _tokens(k, q),
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


def _rotary_append(k: _Kernels, call: relax.Call, args: list[relax.Expr]) -> relax.Expr:
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


def _add_rms_norm(k: _Kernels, call: relax.Call, args: list[relax.Expr]) -> relax.Expr:
    x, y, weight, eps = args
    if k.target == "cpu":
        total = k.bb.emit(relax.op.add(x, y))
        return relax.Tuple(
            [total, k.bb.emit(relax.op.nn.rms_norm(total, weight, [-1], _value(eps)))]
        )
    kernel = k.kernel(
        norm.add_rms_norm,
        tokens=_tokens(k, x),
        features=shape_of(x)[1],
        eps=_value(eps),
        dtype=str(x.ty.dtype),
        target=k.target,
    )
    return relax.call_tir(kernel, [x, y, weight], list(call.ty.fields))


def _attention(k: _Kernels, call: relax.Call, args: list[relax.Expr]) -> relax.Expr:
    *tensors, layer, scale, window, softcap = args
    q, k_pages, page_table = tensors[0], tensors[1], tensors[3]
    shapes = _cache_shapes(k, q, k_pages, page_table) | {
        "scale": _value(scale),
        "window": _value(window),
        "softcap": _value(softcap),
    }
    if k.target == "cpu":
        kernel = k.kernel(attention.attention_cpu, **shapes)
        return relax.call_tir(kernel, [*tensors, layer], call.ty)
    sizes = {name: shapes[name] for name in ("head_dim", "page_size", "dtype")}
    if shapes["tokens"] is None:
        if attention_cuda.prefill_supported(**sizes, target=k.target, arch=k.arch):
            kernel = k.kernel(
                attention_cuda.prefill_attention, **shapes, target=k.target, arch=k.arch
            )
        else:
            kernel = k.kernel(attention.attention_prefill, **shapes, target=k.target)
        return relax.call_tir(kernel, [*tensors, layer], call.ty)
    if attention_cuda.supported(**sizes, target=k.target):
        kernel = k.kernel(attention_cuda.decode_attention, **shapes, target=k.target, arch=k.arch)
        types = [call.ty, *_decode_scratch(shapes)]
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
    parts = k.bb.emit(relax.call_tir(kernel, [*tensors, layer], types))
    pieces = [k.bb.emit(relax.TupleGetItem(parts, i)) for i in range(2)]
    names = ("tokens", "heads", "head_dim", "dtype")
    combine = k.kernel(
        attention.attention_combine,
        **{name: shapes[name] for name in names},
        splits=splits,
        target=k.target,
    )
    return relax.call_tir(combine, pieces, call.ty)


def _decode_scratch(shapes: dict[str, Any]) -> list[relax.TensorType]:
    tokens, heads, kv_heads, dim = (
        shapes[name] for name in ("tokens", "heads", "kv_heads", "head_dim")
    )
    plan = attention_cuda.decode_plan(
        tokens=tokens, kv_heads=kv_heads, group=heads // kv_heads, head_dim=dim
    )
    scratch = attention_cuda.decode_scratch(plan, tokens, heads, kv_heads, dim)
    return [relax.TensorType(shape, "float32") for shape in scratch]


def _append_attention(k: _Kernels, call: relax.Call, args: list[relax.Expr]) -> relax.Expr:
    """One kernel for one token of each row, where there is one; otherwise its two parts."""
    *tensors, scale, window, softcap = args
    at = next(i for i, x in enumerate(args) if len(shape_of(x)) == 5)
    out, *pages = call.ty.fields
    shapes = _cache_shapes(k, relax.Var("q", out), args[at], args[at + 2])
    sizes = {name: shapes[name] for name in ("head_dim", "page_size", "dtype")}
    if shapes["tokens"] is not None and attention_cuda.supported(**sizes, target=k.target):
        turned = 2 * shape_of(args[at - 1])[2]
        kernel = k.kernel(
            attention_cuda.decode_attention,
            **shapes,
            scale=_value(scale),
            window=_value(window),
            softcap=_value(softcap),
            append="joined" if at == 2 else "apart",
            rotary=turned if turned < shapes["head_dim"] else None,
            target=k.target,
        )
        types = [out, *pages, *_decode_scratch(shapes)]
        places = [-1, at, at + 1, -1, -1]
        results = k.bb.emit(relax.call_tir_inplace(kernel, tensors, places, types))
        return relax.Tuple([k.bb.emit(relax.TupleGetItem(results, i)) for i in range(3)])
    name = "rotary_append_joined" if at == 2 else "rotary_append"
    append = relax.call_dps_packed(
        f"shardwright.{name}", relax.Tuple(tensors), out_ty=[out, *pages]
    )
    appended = k.bb.emit(_rotary_append(k, k.bb.normalize(append), tensors))
    q, *cache = [k.bb.emit(relax.TupleGetItem(appended, i)) for i in range(3)]
    attend_args = [q, *cache, *tensors[at + 2 :], scale, window, softcap]
    attend = relax.call_dps_packed("shardwright.attention", relax.Tuple(attend_args), out_ty=out)
    attended = k.bb.emit(_attention(k, k.bb.normalize(attend), attend_args))
    return relax.Tuple([attended, *cache])


def _store_logits(k: _Kernels, call: relax.Call, args: list[relax.Expr]) -> relax.Expr:
    vocab = shape_of(args[2])[1]
    kernel = k.kernel(sampling.store_logits, batch=None, vocab=vocab, target=k.target)
    return relax.call_tir_inplace(kernel, args, [2], call.ty)


def _sample(k: _Kernels, call: relax.Call, args: list[relax.Expr]) -> relax.Expr:
    vocab, max_len = shape_of(args[0])[1], shape_of(args[4])[1]
    sizes = {"batch": None, "vocab": vocab, "max_len": max_len}
    if k.arch >= 90:
        kernel = k.kernel(sampling_cuda.sample, **sizes)
    else:
        kernel = k.kernel(sampling.sample, **sizes, target=k.target)
    return relax.call_tir_inplace(kernel, args, [1, 2, 3, 4], list(call.ty.fields))


def _linear(k: _Kernels, call: relax.Call, args: list[relax.Expr]) -> relax.Expr:
    x, weight = args
    if k.target == "cpu":
        shapes = _linear_shapes(k, call, x, weight)
        kernel = k.kernel(matmul.matmul_cpu, **shapes, dtype=str(x.ty.dtype))
        return relax.call_tir(kernel, [x, weight], call.ty)
    few = _matrix_vector(k, call, args)
    return _tensor_core_linear(k, call, x, weight) if few is None else few


def _gated_linear(k: _Kernels, call: relax.Call, args: list[relax.Expr]) -> relax.Expr:
    """`silu(gate) * up` of the halves of a product, in its own kernel if that is for few tokens."""
    if len(args) == 3:
        args = _padded(k, args)
    few = None if k.target == "cpu" else _matrix_vector(k, call, args, gated=True)
    if few is not None:
        return few
    n, half = shape_of(call)
    whole = relax.TensorType([n, 2 * half], call.ty.dtype)
    name, lowering = ("linear", _linear) if len(args) == 2 else ("q4_linear", _q4_linear)
    product = k.bb.normalize(
        relax.call_dps_packed(f"shardwright.{name}", relax.Tuple(args), out_ty=whole)
    )
    y = k.bb.emit(lowering(k, product, args))
    if k.target != "cpu":
        kernel = k.kernel(
            activation.silu_mul, tokens=_tokens(k, y), features=half, dtype=str(call.ty.dtype)
        )
        return relax.call_tir(kernel, [y], call.ty)
    gate = k.bb.emit(relax.op.strided_slice(y, [1], [0], [half]))
    up = k.bb.emit(relax.op.strided_slice(y, [1], [half], [2 * half]))
    return relax.op.multiply(k.bb.emit(relax.op.nn.silu(gate)), up)


def _matrix_vector(
    k: _Kernels, call: relax.Call, args: list[relax.Expr], gated: bool = False
) -> relax.Expr | None:
    """A kernel for few tokens on a GPU, or None if there is none.

    `args` are x and the one or two tensors of the weight.
    """
    x, weight, *scale = args
    shapes = _linear_shapes(k, call, x, weight) | {"gated": gated}
    batch, unit = shapes.pop("tokens"), 8
    if scale:
        shapes["group"] = shapes["in_features"] // shape_of(scale[0])[1]
        unit = 32
        if shapes["group"] % unit:
            return None
    if batch is None or shapes["in_features"] % unit or str(x.ty.dtype) != "float16":
        return None
    if k.target == "cuda":
        sizes = {name: size for name, size in shapes.items() if name != "out_dtype"}
        tuned = gemv_mma.plan(gemv_mma.Product(batch=batch, **sizes), clusters=k.clusters)
        if tuned is not None:
            kernel = k.kernel(gemv_mma.gemv_mma, batch=batch, **shapes, tuned=tuned)
            return relax.call_tir(kernel, args, call.ty)
    if batch > GEMV_MAX_BATCH:
        return None
    if k.target == "cuda":
        kernel = k.kernel(gemv.q4_gemv if scale else gemv.gemv, batch=batch, **shapes)
    else:
        generate = gemv_rocm.q4_gemv if scale else gemv_rocm.gemv
        kernel = k.kernel(generate, batch=batch, **shapes, target=k.target)
    return relax.call_tir(kernel, args, call.ty)


def _linear_shapes(
    k: _Kernels, call: relax.Call, x: relax.Expr, weight: relax.Expr
) -> dict[str, Any]:
    return {
        "tokens": _tokens(k, x),
        "out_features": shape_of(weight)[0],
        "in_features": shape_of(x)[1],
        "out_dtype": str(call.ty.dtype),
    }


def _tensor_core_linear(
    k: _Kernels, call: relax.Call, x: relax.Expr, weight: relax.Expr
) -> relax.Expr:
    """cuBLAS, a kernel for AMD's matrix cores, or Relax operations that dlight schedules.

    Sums are in float32.
    """
    dtype, (out_features, in_features) = str(x.ty.dtype), shape_of(weight)
    sizes = {"out_features": out_features, "in_features": in_features}
    if matmul_rocm.supported(**sizes, dtype=dtype, target=k.target):
        shapes = _linear_shapes(k, call, x, weight)
        kernel = k.kernel(matmul_rocm.matmul_rocm, **shapes, target=k.target)
        return relax.call_tir(kernel, [x, weight], call.ty)
    if k.cublas and dtype == "float16":
        return relax.call_dps_packed(MATMUL, relax.Tuple([x, weight]), out_ty=call.ty)
    transposed = k.bb.emit(relax.op.permute_dims(weight))
    y = relax.op.matmul(x, transposed, out_dtype="float32")
    if str(call.ty.dtype) == "float32":
        return y
    return relax.op.astype(k.bb.emit(y), call.ty.dtype)


def _padded(k: _Kernels, args: list[relax.Expr]) -> list[relax.Expr]:
    """Operands of a four-bit product, x as wide as the weight, which has whole groups."""
    x, packed, scale = args
    missing = shape_of(packed)[1] * 8 - shape_of(x)[1]
    return [k.bb.emit(relax.op.nn.pad(x, [0, 0, 0, missing])) if missing else x, packed, scale]


def _q4_linear(k: _Kernels, call: relax.Call, args: list[relax.Expr]) -> relax.Expr:
    x, packed, scale = _padded(k, args)
    shapes = _linear_shapes(k, call, x, packed)
    cols = shapes["in_features"]
    group = cols // shape_of(scale)[1]
    if k.target == "cpu":
        packing = Packing(4, group, offset=7, scale_dtype=str(scale.ty.dtype))
        return _quantized_matmul_cpu(k, call, [x, packed, scale], packing)
    few = _matrix_vector(k, call, [x, packed, scale])
    if few is not None:
        return few
    if k.wgmma and _fits_q4_gemm(shapes, group, x):
        n = shape_of(x)[0]
        padded = relax.TensorType([q4_gemm.image_rows(n), cols], "float16")
        image = k.bb.emit(relax.call_tir(k.kernel(q4_gemm.q4_gemm_image), [x], padded))
        kernel = k.kernel(q4_gemm.q4_gemm, group=group)
        return relax.call_tir(kernel, [image, packed, scale], call.ty)
    kernel = k.kernel(
        matmul.q4_dequantize,
        out_features=shapes["out_features"],
        in_features=cols,
        group=group,
        dtype=str(x.ty.dtype),
        target=k.target,
    )
    whole = relax.TensorType([shapes["out_features"], cols], x.ty.dtype)
    weight = k.bb.emit(relax.call_tir(kernel, [packed, scale], whole))
    return _tensor_core_linear(k, call, x, weight)


def _fits_q4_gemm(shapes: dict[str, Any], group: int, x: relax.Expr) -> bool:
    whole = shapes["in_features"] % q4_gemm.COLUMNS == 0 and shapes["out_features"] % 8 == 0
    dtypes = {str(x.ty.dtype), shapes["out_dtype"]}
    return whole and group % 32 == 0 and dtypes == {"float16"}


def _q4_embed(k: _Kernels, call: relax.Call, args: list[relax.Expr]) -> relax.Expr:
    packed, scale, ids, *rank = args
    rows, words = shape_of(packed)
    n, features = shape_of(call)
    kernel = k.kernel(
        matmul.q4_take,
        tokens=_tokens(k, ids),
        vocab_rows=rows,
        features=words * 8,
        group=words * 8 // shape_of(scale)[1],
        dtype=str(call.ty.dtype),
        target=k.target,
    )
    # A table that is not sharded starts at row 0, as rank 0's does.
    first = rank[0] if rank else relax.const([0], "int32")
    whole = relax.TensorType([n, words * 8], call.ty.dtype)
    found = relax.call_tir(kernel, [packed, scale, ids, first], whole)
    if features == words * 8:
        return found
    return relax.op.strided_slice(k.bb.emit(found), [1], [0], [features])


def _quantized_matmul_cpu(
    k: _Kernels, call: relax.Call, args: list[relax.Expr], packing: Packing
) -> relax.Expr:
    shapes = _linear_shapes(k, call, args[0], args[1])
    dtype = str(args[0].ty.dtype)
    kernel = k.kernel(quantized.quantized_matmul_cpu, **shapes, packing=packing, dtype=dtype)
    return relax.call_tir(kernel, args, call.ty)


def _packing(
    words: relax.Expr, sides: list[relax.Expr], attributes: list[relax.Expr]
) -> tuple[Packing, int]:
    """The format of a weight of `words`, scale and maybe zero points, and its columns."""
    bits, offset, is_float = map(_value, attributes)
    columns = shape_of(words)[1] * (32 // bits)
    return Packing(
        bits,
        columns // shape_of(sides[0])[1],
        code="e4m3" if is_float else "int",
        offset=offset,
        zeros=len(sides) == 2,
        scale_dtype=str(sides[0].ty.dtype),
    ), columns


def _quantized_linear(k: _Kernels, call: relax.Call, args: list[relax.Expr]) -> relax.Expr:
    """A product with a weight of another format than the four-bit kernels'."""
    x, words, *sides = args[:-3]
    packing, columns = _packing(words, sides, args[-3:])
    missing = columns - shape_of(x)[1]
    x = k.bb.emit(relax.op.nn.pad(x, [0, 0, 0, missing])) if missing else x
    if k.target == "cpu":
        return _quantized_matmul_cpu(k, call, [x, words, *sides], packing)
    shapes = _linear_shapes(k, call, x, words) | {"packing": packing, "dtype": str(x.ty.dtype)}
    batch = shapes.pop("tokens")
    if batch is not None and batch <= GEMV_MAX_BATCH:
        kernel = k.kernel(quantized.quantized_gemv, batch=batch, **shapes, target=k.target)
        return relax.call_tir(kernel, [x, words, *sides], call.ty)
    shapes.pop("out_dtype")
    kernel = k.kernel(quantized.dequantize, **shapes, target=k.target)
    whole = relax.TensorType([shapes["out_features"], columns], x.ty.dtype)
    weight = k.bb.emit(relax.call_tir(kernel, [words, *sides], whole))
    return _tensor_core_linear(k, call, x, weight)


def _quantized_embed(k: _Kernels, call: relax.Call, args: list[relax.Expr]) -> relax.Expr:
    words, *rest = args[:-3]
    sides = [t for t in rest if len(shape_of(t)) == 2]
    ids, *rank = rest[len(sides) :]
    packing, columns = _packing(words, sides, args[-3:])
    n, features = shape_of(call)
    kernel = k.kernel(
        quantized.quantized_take,
        tokens=_tokens(k, ids),
        vocab_rows=shape_of(words)[0],
        features=columns,
        packing=packing,
        dtype=str(call.ty.dtype),
        target=k.target,
    )
    first = rank[0] if rank else relax.const([0], "int32")
    whole = relax.TensorType([n, columns], call.ty.dtype)
    found = relax.call_tir(kernel, [words, *sides, ids, first], whole)
    if features == columns:
        return found
    return relax.op.strided_slice(k.bb.emit(found), [1], [0], [features])


def _take_columns(k: _Kernels, _call: relax.Call, args: list[relax.Expr]) -> relax.Expr:
    """Columns by index, zeros where it is -1."""

    def pick(x: te.Tensor, index: te.Tensor) -> te.Tensor:
        def element(i: Any, j: Any) -> Any:
            safe = tvm.tirx.max(index[j], 0)
            return tvm.tirx.if_then_else(index[j] >= 0, x[i, safe], tvm.tirx.const(0, x.dtype))

        return te.compute((x.shape[0], index.shape[0]), element, name="take_columns")

    return k.bb.call_te(pick, *args, primfunc_name_hint="take_columns")


def _route(k: _Kernels, call: relax.Call, args: list[relax.Expr]) -> relax.Expr:
    scores, top, normalize = args
    kernel = k.kernel(
        experts.route,
        tokens=_tokens(k, scores),
        experts=shape_of(scores)[1],
        top=_value(top),
        normalize=bool(_value(normalize)),
        target=k.target,
    )
    return relax.call_tir(kernel, [scores], list(call.ty.fields))


def _experts(k: _Kernels, call: relax.Call, args: list[relax.Expr]) -> relax.Expr:
    """The products with routed experts: x, gate, up, down, ids, weights and, where a rank has whole
    experts, its number.
    """
    x, gate, up, down, *rest = args
    plain: list[_Expert] = [([w] * 3, None) for w in (gate, up, down)]
    return _expert_products(k, call, x, plain, rest)


def _quantized_experts(k: _Kernels, call: relax.Call, args: list[relax.Expr]) -> relax.Expr:
    """The same, as `linear.quantize` leaves them."""
    x, *tensors = args[:-12]
    found: list[_Expert] = []
    for i in range(-12, 0, 4):
        *attributes, zeros = args[i : i + 4 or None]
        count = 2 + _value(zeros) if _value(attributes[0]) else 1
        parts, tensors = tensors[:count], tensors[count:]
        packing = _packing(parts[0], parts[1:], attributes)[0] if count > 1 else None
        found.append((parts + parts[-1:] * (3 - count), packing))
    return _expert_products(k, call, x, found, tensors)


_Expert = tuple[list[relax.Expr], Packing | None]
"""Three tensors of a weight, as `kernels/experts.py` takes them, and their format."""


def _expert_products(
    k: _Kernels,
    call: relax.Call,
    x: relax.Expr,
    weights: list[_Expert],
    rest: list[relax.Expr],
) -> relax.Expr:
    (gate, packing), (up, _), (down, down_packing) = weights
    ids, factors, *ranks = rest
    # Experts that are not shared out begin at 0, as rank 0's do.
    rank = ranks[0] if ranks else relax.const([0], "int32")
    n, features = shape_of(x)
    top, dtype = shape_of(ids)[1], str(x.ty.dtype)
    count = shape_of(down[0])[0] // features
    rows = shape_of(gate[0])[0] // count
    common = {"top": top, "experts": count, "dtype": dtype, "target": k.target}

    def padded(x: relax.Expr, weight: relax.Expr, packing: Packing | None) -> relax.Expr:
        """x as wide as the weight, which has whole groups."""
        cols = shape_of(weight)[1] * (packing.per_word if packing else 1)
        missing = cols - shape_of(x)[1]
        return k.bb.emit(relax.op.nn.pad(x, [0, 0, 0, missing])) if missing else x

    def product(x: relax.Expr, rows: int, packing: Packing | None) -> dict[str, Any]:
        return {"rows": rows, "cols": shape_of(x)[1], "packing": packing, **common}

    x = padded(x, gate[0], packing)
    into = product(x, rows, packing)
    slots = relax.TensorType([n * top, rows], dtype)
    tokens = _tokens(k, x)
    if k.target == "cpu" or (tokens is not None and tokens <= GEMV_MAX_BATCH):
        kernel = k.kernel(experts.experts_up, tokens=tokens, **into)
        h = k.bb.emit(relax.call_tir(kernel, [x, *gate, *up, ids, rank], slots))
        h = padded(h, down[0], down_packing)
        out = product(h, features, down_packing)
        kernel = k.kernel(experts.experts_down, tokens=tokens, **out)
        return relax.call_tir(kernel, [h, *down, ids, factors, rank], call.ty)
    kernel = k.kernel(experts.expert_order, tokens=tokens, top=top, experts=count, target=k.target)
    types = [relax.TensorType([n * top], "int32"), relax.TensorType([count + 1], "int32")]
    both = k.bb.emit(relax.call_tir(kernel, [ids, rank], types))
    order = [k.bb.emit(relax.TupleGetItem(both, i)) for i in range(2)]
    kernel = k.kernel(experts.experts_grouped, tokens=tokens, gated=True, **into)
    h = k.bb.emit(relax.call_tir(kernel, [x, *gate, *up, *order], slots))
    h = padded(h, down[0], down_packing)
    out = product(h, features, down_packing)
    kernel = k.kernel(experts.experts_grouped, tokens=tokens, gated=False, **out)
    whole = relax.TensorType([n * top, features], dtype)
    y = k.bb.emit(relax.call_tir(kernel, [h, *down, *down, *order], whole))
    kernel = k.kernel(experts.experts_sum, tokens=tokens, features=features, **common)
    return relax.call_tir(kernel, [y, ids, factors, rank], call.ty)


def _embed(k: _Kernels, call: relax.Call, args: list[relax.Expr]) -> relax.Expr:
    """Rows of a table cut along its rows; zeros for a row that another rank holds."""
    rows = shape_of(args[0])[0]

    def lookup(table: te.Tensor, ids: te.Tensor, rank: te.Tensor) -> te.Tensor:
        def element(i: Any, j: Any) -> Any:
            row = ids[i] - rank[0] * rows
            inside = tvm.tirx.all(row >= 0, row < rows)
            # An address is formed in any case, so it must lie inside the table.
            safe = tvm.tirx.if_then_else(inside, row, 0)
            return tvm.tirx.if_then_else(inside, table[safe, j], tvm.tirx.const(0, table.dtype))

        return te.compute((ids.shape[0], table.shape[1]), element, name="embed")

    return k.bb.call_te(lookup, *args, primfunc_name_hint="embed")


def _take(k: _Kernels, _call: relax.Call, args: list[relax.Expr]) -> relax.Expr:
    """Slices along dimension 0 by indices that are known to be in range."""

    def pick(data: te.Tensor, ids: te.Tensor) -> te.Tensor:
        def element(i: Any, *rest: Any) -> Any:
            index = (ids[i], *rest)
            return data[index]

        return te.compute((ids.shape[0], *data.shape[1:]), element, name="take")

    return k.bb.call_te(pick, *args, primfunc_name_hint="take")


def _peer_all_reduce(k: _Kernels, call: relax.Call, args: list[relax.Expr]) -> relax.Expr:
    kernel = k.kernel(all_reduce.all_reduce, **_peer_shapes(k, *args[:3]))
    return relax.call_tir(kernel, args, call.ty)


def _peer_all_reduce_add_rms_norm(
    k: _Kernels, call: relax.Call, args: list[relax.Expr]
) -> relax.Expr:
    *tensors, eps = args
    shapes = _peer_shapes(k, tensors[1], *tensors[3:5])
    kernel = k.kernel(all_reduce.all_reduce_add_rms_norm, **shapes, eps=_value(eps))
    return relax.call_tir(kernel, tensors, list(call.ty.fields))


def _peer_store_logits(k: _Kernels, call: relax.Call, args: list[relax.Expr]) -> relax.Expr:
    *tensors, first = args
    new, _, peers, calls, _, logits = map(shape_of, tensors)
    kernel = k.kernel(
        all_reduce.gather_logits,
        tokens=new[0],
        local=new[1],
        vocab=logits[1],
        ranks=peers[0] - 1,
        rows=calls[0],
        first=_value(first),
    )
    return relax.call_tir_inplace(kernel, tensors, [5], call.ty)


def _peer_shapes(
    k: _Kernels, x: relax.Expr, peers: relax.Expr, calls: relax.Expr
) -> dict[str, int]:
    tokens, features = shape_of(x)
    ranks, rows = shape_of(peers)[0] - 1, shape_of(calls)[0]
    sizes = {"tokens": tokens, "features": features, "ranks": ranks, "rows": rows}
    return sizes | {"clusters": k.arch >= 90}


def _all_reduce(k: _Kernels, call: relax.Call, args: list[relax.Expr]) -> relax.Expr:
    return relax.call_dps_packed("shardwright.all_reduce", relax.Tuple(args), out_ty=call.ty)


def _all_gather(k: _Kernels, call: relax.Call, args: list[relax.Expr]) -> relax.Expr:
    return relax.call_dps_packed("shardwright.all_gather", relax.Tuple(args), out_ty=call.ty)


Lowering = Callable[[_Kernels, relax.Call, list[relax.Expr]], relax.Expr]

LOWERINGS: dict[str, Lowering] = {
    "shardwright.rotary_table": _rotary_table,
    "shardwright.rotary_table_long": _rotary_table_long,
    "shardwright.rotary_append": _rotary_append,
    "shardwright.rotary_append_joined": _rotary_append,
    "shardwright.add_rms_norm": _add_rms_norm,
    "shardwright.attention": _attention,
    "shardwright.append_attention": _append_attention,
    "shardwright.append_attention_joined": _append_attention,
    "shardwright.store_logits": _store_logits,
    "shardwright.sample": _sample,
    "shardwright.linear": _linear,
    "shardwright.q4_linear": _q4_linear,
    "shardwright.gated_linear": _gated_linear,
    "shardwright.q4_gated_linear": _gated_linear,
    "shardwright.route": _route,
    "shardwright.experts": _experts,
    "shardwright.local_experts": _experts,
    "shardwright.quantized_experts": _quantized_experts,
    "shardwright.embed": _embed,
    "shardwright.q4_embed": _q4_embed,
    "shardwright.quantized_linear": _quantized_linear,
    "shardwright.quantized_embed": _quantized_embed,
    "shardwright.take_columns": _take_columns,
    "relax.take": _take,
    "shardwright.peer_all_reduce": _peer_all_reduce,
    "shardwright.peer_all_reduce_add_rms_norm": _peer_all_reduce_add_rms_norm,
    "shardwright.peer_store_logits": _peer_store_logits,
    "relax.ccl.allreduce": _all_reduce,
    "relax.ccl.allgather": _all_gather,
}
