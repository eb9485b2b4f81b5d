"""Lower: abstract operations of the local view become kernels for one target.

`LOWERINGS` maps each abstract operation to the function of `lowering/` that emits its kernels. A
kernel is generated once for each set of shapes; identical layers share it, the layer's number being
an argument.
"""

from __future__ import annotations

import tvm
from tvm import relax

from shardwright.compiler.fuse import FUSIONS
from shardwright.compiler.fuse_norm import FUSE_NORM_PASS, fuse_norm, sum_first_norms
from shardwright.compiler.linear import Rewriter
from shardwright.compiler.lowering import (
    attention,
    collectives,
    embedding,
    experts,
    norm,
    products,
    sampling,
)
from shardwright.compiler.lowering.common import Kernels, Lowering
from shardwright.compiler.lowering.images import calls_of_images
from shardwright.compiler.peer import PeerState, add_peer_functions
from shardwright.compiler.rules import op_name, operands_of

EXPERTS = ("", "local_", "biased_", "biased_local_", "biased_split_")
"""Kinds of operations on experts, see `rules.ABSTRACT_RULES`."""

PRODUCTS = ("linear", "gated_linear", "q4_linear", "q4_gated_linear")
"""Those that a residual sum and a norm can become part of, see `fuse_norm`."""

LOWERINGS: dict[str, Lowering] = {
    "shardwright.rotary_table": attention.lower_rotary_table,
    "shardwright.rotary_table_long": attention.lower_rotary_table_long,
    "shardwright.rotary_append": attention.lower_rotary_append,
    "shardwright.rotary_append_joined": attention.lower_rotary_append,
    "shardwright.attention": attention.lower_attention,
    "shardwright.attention_sinks": attention.lower_attention,
    "shardwright.append_attention": attention.lower_append_attention,
    "shardwright.append_attention_joined": attention.lower_append_attention,
    "shardwright.linear": products.lower_linear,
    "shardwright.q4_linear": products.lower_q4_linear,
    "shardwright.quantized_linear": products.lower_quantized_linear,
    "shardwright.gated_linear": products.lower_gated_linear,
    "shardwright.q4_gated_linear": products.lower_gated_linear,
    **{f"shardwright.add_norm_{kind}": products.lower_add_norm_linear for kind in PRODUCTS},
    **{f"shardwright.sum_norm_{kind}": products.lower_sum_norm_linear for kind in PRODUCTS},
    **{f"shardwright.norm_{kind}": products.lower_norm_linear for kind in PRODUCTS},
    "shardwright.add_linear": products.lower_add_linear,
    "shardwright.add_q4_linear": products.lower_add_linear,
    "shardwright.sum_add_linear": products.lower_sum_add_linear,
    "shardwright.sum_add_q4_linear": products.lower_sum_add_linear,
    "shardwright.send_linear": products.lower_send_linear,
    "shardwright.send_q4_linear": products.lower_send_linear,
    "shardwright.take_columns": products.lower_take_columns,
    "shardwright.embed": embedding.lower_embed,
    "shardwright.q4_embed": embedding.lower_q4_embed,
    "shardwright.send_embed": embedding.lower_send_embed,
    "shardwright.send_q4_embed": embedding.lower_send_embed,
    "shardwright.quantized_embed": embedding.lower_quantized_embed,
    "relax.take": embedding.lower_take,
    "shardwright.route": experts.lower_route,
    **{f"shardwright.{kind}experts": experts.lower_experts for kind in EXPERTS},
    **{f"shardwright.quantized_{kind}experts": experts.lower_quantized_experts for kind in EXPERTS},
    "shardwright.add_rms_norm": norm.lower_add_rms_norm,
    "shardwright.store_logits": sampling.lower_store_logits,
    "shardwright.sample": sampling.lower_sample,
    "relax.ccl.allreduce": collectives.lower_all_reduce,
    "relax.ccl.allgather": collectives.lower_all_gather,
    "shardwright.peer_all_reduce": collectives.lower_peer_all_reduce,
    "shardwright.peer_all_reduce_add_rms_norm": collectives.lower_peer_all_reduce_add_rms_norm,
    "shardwright.peer_all_reduce_many": collectives.lower_peer_all_reduce_many,
    "shardwright.peer_all_reduce_many_add_rms_norm": (
        collectives.lower_peer_all_reduce_many_add_rms_norm
    ),
    "shardwright.peer_store_logits": collectives.lower_peer_store_logits,
}


def lower_abstract(
    mod: tvm.IRModule,
    target: tvm.target.Target,
    peer: PeerState | None = None,
    disabled: frozenset[str] = frozenset(),
) -> tvm.IRModule:
    """Replace every abstract operation and collective of `mod` by calls of kernels for `target`.

    Operations are fused first, but for the fusions (`fuse.FUSIONS`, `fuse_norm`) named in
    `disabled`. With `peer` some functions have twins whose collectives go through peer memory.
    """
    for name, fuse in FUSIONS.items():
        if name not in disabled:
            mod = fuse(mod)
    norms = "clusters" in target.keys and FUSE_NORM_PASS not in disabled
    if norms:
        mod = sum_first_norms(mod)
    if peer is not None:
        mod = add_peer_functions(mod, peer)
    if norms:
        mod = fuse_norm(mod, peer)
    bb = relax.BlockBuilder()
    kernels = Kernels(bb, target, disabled)

    def lower(rw: Rewriter, var: relax.Var, call: relax.Call) -> relax.Expr | None:
        if var in images and op_name(call) == "relax.reshape":
            return rw.local(call.args[0])  # an image has this shape
        lowering = LOWERINGS.get(op_name(call))
        if lowering is None:
            return None  # an operation of Relax itself
        kernels.image = var in images
        return lowering(kernels, call, [rw.local(x) for x in operands_of(call)])

    functions = {}
    for gv, func in mod.functions_items():
        images = calls_of_images(kernels, func)
        kernels.decodes = gv.name_hint.startswith("decode_")
        functions[gv.name_hint] = Rewriter(func, lower, bb=bb).run(gv.name_hint)
    out = {gv: f for gv, f in bb.get().functions_items() if not isinstance(f, relax.Function)}
    return tvm.IRModule({**out, **{relax.GlobalVar(name): f for name, f in functions.items()}})
