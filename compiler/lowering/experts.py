"""Lowerings of a mixture of experts: the choice, and the products with those chosen."""

from __future__ import annotations

from typing import Any, TypeAlias

from tvm import relax

from shardwright.compiler.kernels import experts, experts_cuda
from shardwright.compiler.lowering.common import (
    GEMV_MAX_BATCH,
    Kernels,
    packing_of,
    tokens_of,
    value_of,
)
from shardwright.compiler.packing import Packing
from shardwright.compiler.rules import op_name, shape_of

_Expert: TypeAlias = tuple[list[relax.Expr], Packing | None]
"""Three tensors of a weight, as `kernels/experts.py` takes them, and their format."""


def lower_route(k: Kernels, call: relax.Call, args: list[relax.Expr]) -> relax.Expr:
    """The `top` experts of each token, by scores [n, experts]: ids int32 and weights [n, top]."""
    scores, top, normalize = args
    kernel = k.kernel(
        experts.route,
        tokens=tokens_of(k, scores),
        experts=shape_of(scores)[1],
        top=value_of(top),
        normalize=bool(value_of(normalize)),
        target=k.target,
    )
    return relax.call_tir(kernel, [scores], list(call.ty.fields))


def lower_experts(k: Kernels, call: relax.Call, args: list[relax.Expr]) -> relax.Expr:
    """The products with routed experts: x, gate, up, down, ids, weights; perhaps a bias of each
    and the activation's alpha and limit; and, where it matters, the rank's number.
    """
    x, gate, up, down, *rest = args
    plain: list[_Expert] = [([w] * 3, None) for w in (gate, up, down)]
    return _expert_products(k, call, x, plain, rest)


def lower_quantized_experts(k: Kernels, call: relax.Call, args: list[relax.Expr]) -> relax.Expr:
    """The same, as `linear.quantize` leaves them."""
    x, *tensors = args[:-12]
    found: list[_Expert] = []
    for i in range(-12, 0, 4):
        *attributes, zeros = args[i : i + 4 or None]
        count = 2 + value_of(zeros) if value_of(attributes[0]) else 1
        parts, tensors = tensors[:count], tensors[count:]
        packing = packing_of(parts[0], parts[1:], attributes)[0] if count > 1 else None
        found.append((parts + parts[-1:] * (3 - count), packing))
    return _expert_products(k, call, x, found, tensors)


def _expert_products(
    k: Kernels,
    call: relax.Call,
    x: relax.Expr,
    weights: list[_Expert],
    rest: list[relax.Expr],
) -> relax.Expr:
    (gate, packing), (up, _), (down, down_packing) = weights
    ids, factors, *more = rest
    name = op_name(call)
    biased, split = "biased" in name, "split" in name
    # Experts that are not shared out begin at 0, as rank 0's do.
    first = relax.const([0], "int32")
    rank = more[-1] if "local" in name or split else first
    start = first if split else rank
    *up_biases, down_bias = more[:3] if biased else [first] * 3
    activation = {"alpha": value_of(more[3]), "limit": value_of(more[4])} if biased else {}
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

    def kernels(packing: Packing | None) -> Any:
        """The module whose kernels take weights of a format."""
        cuda = experts_cuda.supported(packing=packing, dtype=dtype, target=k.target, arch=k.arch)
        return experts_cuda if cuda else experts

    x = padded(x, gate[0], packing)
    into = product(x, rows, packing) | activation | {"biased": biased}
    slots = relax.TensorType([n * top, rows], dtype)
    tokens = tokens_of(k, x)
    if k.target == "cpu" or (tokens is not None and tokens <= GEMV_MAX_BATCH):
        kernel = k.kernel(kernels(packing).experts_up, tokens=tokens, **into)
        h = k.bb.emit(relax.call_tir(kernel, [x, *gate, *up, *up_biases, ids, start], slots))
        h = padded(h, down[0], down_packing)
        out = product(h, features, down_packing)
        sides = {"biased": biased, "split": split}
        kernel = k.kernel(kernels(down_packing).experts_down, tokens=tokens, **sides, **out)
        return relax.call_tir(kernel, [h, *down, down_bias, ids, factors, rank], call.ty)
    kernel = k.kernel(experts.expert_order, tokens=tokens, top=top, experts=count, target=k.target)
    types = [relax.TensorType([n * top], "int32"), relax.TensorType([count + 1], "int32")]
    both = k.bb.emit(relax.call_tir(kernel, [ids, start], types))
    order = [k.bb.emit(relax.TupleGetItem(both, i)) for i in range(2)]
    kernel = k.kernel(kernels(packing).experts_grouped, tokens=tokens, gated=True, **into)
    h = k.bb.emit(relax.call_tir(kernel, [x, *gate, *up, *up_biases, *order], slots))
    h = padded(h, down[0], down_packing)
    out = product(h, features, down_packing)
    kernel = k.kernel(kernels(down_packing).experts_grouped, tokens=tokens, gated=False, **out)
    whole = relax.TensorType([n * top, features], dtype)
    y = k.bb.emit(relax.call_tir(kernel, [h, *down, *down, first, first, *order], whole))
    sizes = {"features": features, "biased": biased, "split": split}
    kernel = k.kernel(experts.experts_sum, tokens=tokens, **sizes, **common)
    return relax.call_tir(kernel, [y, down_bias, ids, factors, rank], call.ty)
