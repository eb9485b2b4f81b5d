"""The residual sum and norm in front of a product of few tokens become part of products.

With one rank that is `add_rms_norm`. Of one token the product behind the norm computes both, of
several the product in front adds the residual, and the one behind scales its results. With several
ranks it is an all-reduce too. Of one token the product whose result is reduced then sends its rows
to all ranks, and the product behind the norm adds what it gets. Of several the product in front
does both before it adds the residual. Runs after the fusions of `fuse.py` and `add_peer_functions`.
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import numpy as np
import tvm
from tvm import relax, tirx

from shardwright.compiler.fuse import Rewrite
from shardwright.compiler.kernels import gemv_mma, gemv_norm, gemv_sum
from shardwright.compiler.linear import Rewriter, is_call, reads
from shardwright.compiler.lowering.common import product_of
from shardwright.compiler.peer import SUFFIX, SUM_PLACES, PeerState, sum_places
from shardwright.compiler.propagate import bindings_of
from shardwright.compiler.rules import op_name, operands_of, shape_of

FUSE_NORM_PASS = "fuse_norm"

_DECODE = "decode_"
_ONE = "decode_1"
_ADD_NORM = "shardwright.add_rms_norm"
_REDUCE_ADD_NORM = "shardwright.peer_all_reduce_add_rms_norm"
_PRODUCTS = ("shardwright.linear", "shardwright.q4_linear")
_LOOKUPS = ("shardwright.embed", "shardwright.q4_embed")
_GATED_PRODUCTS = ("shardwright.gated_linear", "shardwright.q4_gated_linear")


class _Site(NamedTuple):
    """A sum with its norm, and the product that alone reads the norm."""

    pair: relax.Var
    args: list[relax.Expr]
    """Of the sum with its norm."""
    product: relax.Var
    call: relax.Call


class _Function:
    """Who reads what in a function."""

    def __init__(self, func: relax.Function) -> None:
        self.params = set(func.params)
        self.bindings = [(b.var, b.value) for b in bindings_of(func)]
        self.values = dict(self.bindings)
        self.place = {var: i for i, (var, _) in enumerate(self.bindings)}
        self.readers: dict[relax.Var, list[tuple[relax.Var | None, relax.Expr]]] = defaultdict(list)
        for var, value in [*self.bindings, (None, func.body.body)]:
            for x in reads(value):
                self.readers[x].append((var, value))

    def calls(self, name: str) -> list[tuple[relax.Var, relax.Call]]:
        """The calls of an operation, in order."""
        return [(var, value) for var, value in self.bindings if is_call(value, name)]

    def site(self, pair: relax.Var, call: relax.Call) -> _Site | None:
        """The site of a sum with its norm, if there is a kernel for it."""
        taken = [(var, v.index) for var, v in self.readers[pair] if _is_item(v)]
        normed = [var for var, index in taken if index == 1]
        if len(taken) != len(self.readers[pair]) or len(normed) != 1:
            return None
        match self.readers[normed[0]]:
            case [(var, value)] if var is not None and _fits(value, normed[0], self.params):
                return _Site(pair, operands_of(call), var, value)
        return None

    def sent(self, site: _Site) -> relax.Var | None:
        """What makes the summands of a site and nothing else, if it can send them."""
        y = site.args[1]
        value = self.values.get(y)
        return y if len(self.readers[y]) == 1 and _sends(value, self.params) else None

    def added(self, site: _Site) -> int | None:
        """Blocks of the product in front of a site, if it can add the residual."""
        residual, y, norm, *_ = site.args
        product = _product_of(self.values[y], self.params) if self.sent(site) is not None else None
        if product is None or norm not in self.params:
            return None
        there = residual in self.params or self.place[residual] < self.place[y]  # by then
        plan = gemv_norm.added_plan(product)
        return gemv_norm.blocks(product, plan) if there and plan is not None else None


def sum_first_norms(mod: tvm.IRModule) -> tvm.IRModule:
    """`rms_norm(x, weight)` of the looked-up row of `decode_1` as `add_rms_norm` of 0 and x.

    So `fuse_norm` finds it. Runs before `add_peer_functions`; x may be summed over all ranks.
    """

    def rewrite(rw: Rewriter, _var: relax.Var, call: relax.Call) -> relax.Expr | None:
        if op_name(call) != "relax.nn.rms_norm" or str(call.ty.dtype) != "float16":
            return None
        x, weight = call.args
        made = rw.value_of(x)
        if made is not None and op_name(made) == "relax.ccl.allreduce":
            made = rw.value_of(made.args[0])
        if (
            made is None
            or op_name(made) not in (*_LOOKUPS, "relax.take")
            or weight not in rw.params
        ):
            return None
        zero = relax.const(np.zeros(shape_of(x), "float16"))
        eps = relax.prim_value(tirx.FloatImm("float64", float(call.attrs.epsilon)))
        args = [zero, *map(rw.local, (x, weight)), eps]
        both = rw.bb.emit(_call("add_rms_norm", args, [x.ty, call.ty]))
        rw.vars[x] = rw.bb.emit(relax.TupleGetItem(both, 0))
        return relax.TupleGetItem(both, 1)

    functions = dict(mod.functions_items())
    for gv, func in mod.functions_items():
        if gv.name_hint == _ONE:
            functions[gv] = Rewriter(func, rewrite).run(_ONE)
    return tvm.IRModule(functions)


def fuse_norm(mod: tvm.IRModule, peer: PeerState | None) -> tvm.IRModule:
    """`mod` with the norms of its functions of few rows fused, for GPUs with clusters.

    Of one row `shardwright.add_norm_linear(x, y, norm, weight, eps) -> (x + y, product)`, or
    `add_norm_gated_linear`. With several ranks, `send_linear(x, weight, peers, rank, place, first)
    -> done [1]` and `sum_norm_linear(residual, norm, weight, done, x, peers, rank, place,
    last_place, eps, first)`, or gated. `done` and `x`, what the product in front multiplies, are
    not read: the one keeps the order of the two, the other its memory from being used anew, since
    the second kernel begins while the first still runs. `place` is one of `peer.SUM_PLACES`,
    `last_place` that of the sum before; `first` is `PeerState.sums_at`. With four bits these names
    have `q4_linear` or `q4_gated_linear`, and `packed, scale` is the weight. The first of the
    summands is `send_embed(table, ids, peers, rank, calls, place, first) -> done [1]`, or
    `send_q4_embed`: the row of the embedding, of which other ranks have zeros.

    Of several rows `add_linear(x, weight, residual, norm) -> (sum, weighted, squares)` in front of
    the norm and `norm_linear(weighted, squares, weight, eps) -> product`, or `norm_gated_linear`,
    behind it, or the same with four bits; see `gemv_norm.add_gemv`. With several ranks in front
    `sum_add_linear(x, weight, residual, norm, peers, rank, first)`, with the same results; `first`
    is one of `PeerState.several_at`. Sums that are too large for it (`gemv_norm.sums`) stay.
    """
    functions = dict(mod.functions_items())
    for gv, func in mod.functions_items():
        name = gv.name_hint
        if name == _ONE + SUFFIX and peer is not None:
            functions[gv] = _fuse_all_reduces(func, peer)
        elif name.startswith(_DECODE) and name.endswith(SUFFIX) and peer is not None:
            functions[gv] = _fuse_several_all_reduces(func, peer)
        elif name.startswith(_DECODE) and not name.endswith(SUFFIX):
            functions[gv] = _fuse_add_norms(func, name == _ONE)
    return tvm.IRModule(functions)


def _fuse_add_norms(func: relax.Function, one: bool) -> relax.Function:
    """Of `one` row, or of several."""
    f = _Function(func)
    if any(op_name(c).startswith("relax.ccl") for _, c in f.bindings if isinstance(c, relax.Call)):
        return func  # of several ranks, which sum before they add
    found = [site for call in f.calls(_ADD_NORM) if (site := f.site(*call)) is not None]
    if not one:
        return _fuse_several(func, _added_sites(f, found))
    sites = {site.pair: site for site in found}

    def rewrite(rw: Rewriter, var: relax.Var, _call: relax.Call) -> relax.Expr | None:
        if var not in sites:
            return None
        x, y, norm, eps = sites[var].args
        weight = operands_of(sites[var].call)[1:]
        operands = [*map(rw.local, (x, y, norm, *weight)), eps]
        return _emit(rw, sites[var], "add_norm", operands)

    return _run(func, rewrite, {site.product for site in sites.values()})


def _added_sites(f: _Function, sites: list[_Site]) -> list[tuple[_Site, int]]:
    """Those in front of which the product can add the residual, with the blocks of that."""
    return [(site, blocks) for site in sites if (blocks := f.added(site)) is not None]


def _fuse_several_all_reduces(func: relax.Function, peer: PeerState) -> relax.Function:
    """All that a residual and a norm follow, or none."""
    f = _Function(func)
    reduces = f.calls(_REDUCE_ADD_NORM)
    found = [site for call in reduces if (site := f.site(*call)) is not None]
    sites = _added_sites(f, found)
    shapes = {shape_of(site.args[1]) for site, _ in sites}
    few = all(gemv_norm.sums(tokens, features, peer.ranks) for tokens, features in shapes)
    # An even number in every step, so that the two places take turns whatever steps follow.
    if not few or len(sites) != len(reduces) or len(sites) % 2:
        return func
    return _fuse_several(func, sites, peer)


def _fuse_several(
    func: relax.Function, sites: list[tuple[_Site, int]], peer: PeerState | None = None
) -> relax.Function:
    """The product in front of each site adds the residual, the one behind scales its results.

    With `peer` the one in front first sums over ranks. With each site are the blocks of the first.
    """
    in_front = {site.args[1]: (i, site, blocks) for i, (site, blocks) in enumerate(sites)}
    pairs = {site.pair: site for site, _ in sites}
    behind = {site.product: site for site, _ in sites}
    if behind.keys() & in_front.keys():
        return func  # no kernel does both

    def rewrite(rw: Rewriter, var: relax.Var, call: relax.Call) -> relax.Expr | None:
        if var in in_front:
            number, site, blocks = in_front[var]
            residual, _, norm, *others = site.args
            squares = relax.TensorType([shape_of(call)[0], blocks], "float32")
            types = [call.ty, call.ty, squares]
            operands = [*map(rw.local, (*operands_of(call), residual, norm))]
            if peer is None:
                return _call(_named("add", call), operands, types)
            peers, _calls, rank, _eps = others
            first = relax.prim_value(peer.several_at[number % 2])
            operands += [rw.local(peers), rw.local(rank), first]
            return _call(_named("sum_add", call), operands, types)
        if var in pairs:  # the sum, and what takes the norm's place
            all_three = rw.local(pairs[var].args[1])
            both = [rw.bb.emit(relax.TupleGetItem(all_three, i)) for i in range(2)]
            return relax.Tuple(both)
        if var in behind:
            _, y, *_, eps = behind[var].args
            weighted, *weight = map(rw.local, operands_of(call))
            squares = rw.bb.emit(relax.TupleGetItem(rw.local(y), 2))
            operands = [weighted, squares, *weight, eps]
            return _call(_named("norm", call), operands, call.ty)
        return None

    return Rewriter(func, rewrite).run(str(func.attrs["global_symbol"]))


def _fuse_all_reduces(func: relax.Function, peer: PeerState) -> relax.Function:
    """All that a residual and a norm follow, or none."""
    f = _Function(func)
    reduces = f.calls(_REDUCE_ADD_NORM)
    found = [f.site(*call) for call in reduces]
    sites = [site for site in found if site is not None]
    sent = [y for y in map(f.sent, sites) if y is not None]
    if len(sent) != len(reduces) or len(sent) < SUM_PLACES:
        return func
    # Nor may a product do both, or anything run between a product that sends and its receiver.
    by_pair = {site.pair: i for i, site in enumerate(sites)}
    by_sent = {y: i for i, y in enumerate(sent)}
    apart = any(
        f.place[sites[i].pair] != f.place[y] + 1 and not _looks_up(f.values[y])
        for y, i in by_sent.items()
    )
    if apart or {site.product for site in sites} & set(sent):
        return func
    places = sum_places(len(sites))
    at = relax.prim_value(peer.sums_at)
    received: dict[int, relax.Var] = {}

    def send(rw: Rewriter, number: int) -> relax.Call:
        _, y, _, peers, calls, rank, _ = sites[number].args
        call = f.values[y]
        if _looks_up(call):
            *operands, _rank = operands_of(call)
            operands += [peers, rank, calls]
        else:
            operands = [*operands_of(call), peers, rank]
        place, done = relax.prim_value(places[number]), relax.TensorType([1], "int32")
        return _call(_named("send", call), [*map(rw.local, operands), place, at], done)

    def receive(rw: Rewriter, number: int) -> relax.Call:
        residual, y, norm, peers, _calls, rank, eps = sites[number].args
        weight = operands_of(sites[number].call)[1:]
        x = operands_of(f.values[y])[-2 if _looks_up(f.values[y]) else 0]  # -2: its ids
        tensors = map(rw.local, (residual, norm, *weight, y, x, peers, rank))
        # Before the first sum came the last one of another step.
        both = (relax.prim_value(places[i]) for i in (number, number - 1))
        operands = [*tensors, *both, eps, at]
        return _emit(rw, sites[number], "sum_norm", operands)

    def rewrite(rw: Rewriter, var: relax.Var, call: relax.Call) -> relax.Expr | None:
        if var in by_sent:
            number = by_sent[var]
            done = rw.vars[var] = rw.bb.emit(send(rw, number))
            if _looks_up(call):  # All that it needs is there, and nothing comes between.
                received[number] = rw.bb.emit(receive(rw, number))
            return done
        if var in by_pair:
            number = by_pair[var]
            return received[number] if number in received else receive(rw, number)
        return None

    return _run(func, rewrite, {site.product for site in sites})


def _run(func: relax.Function, rewrite: Rewrite, products: set[relax.Var]) -> relax.Function:
    """`func` rewritten. Where a sum and its norm were now are the sum and the product."""

    def callback(rw: Rewriter, var: relax.Var, call: relax.Call) -> relax.Expr | None:
        return rw.local(operands_of(call)[0]) if var in products else rewrite(rw, var, call)

    return Rewriter(func, callback).run(str(func.attrs["global_symbol"]))


def _emit(rw: Rewriter, site: _Site, kind: str, operands: list[relax.Expr]) -> relax.Expr:
    types = [site.args[0].ty, site.call.ty]
    return _call(_named(kind, site.call), operands, types)


def _named(kind: str, product: relax.Call) -> str:
    """The name of a product that also does what `kind` says."""
    return f"{kind}_{op_name(product).removeprefix('shardwright.')}"


def _call(name: str, args: list[relax.Expr], out: relax.Type | list[relax.Type]) -> relax.Call:
    return relax.call_dps_packed(f"shardwright.{name}", relax.Tuple(args), out_ty=out)


def _is_item(value: relax.Expr) -> bool:
    return isinstance(value, relax.TupleGetItem)


def _product_of(value: relax.Expr, params: set[relax.Var]) -> gemv_mma.Product | None:
    """The sizes of a product of few tokens in float16, None for any other call."""
    gated = any(is_call(value, name) for name in _GATED_PRODUCTS)
    if not gated and not any(is_call(value, name) for name in _PRODUCTS):
        return None
    x, *weight = operands_of(value)
    product = product_of(weight, gated=gated, batch=shape_of(x)[0])
    # x may be narrower than a four-bit weight, which has whole groups.
    if (
        shape_of(x)[1] != product.in_features
        or str(x.ty.dtype) != "float16"
        or not {*weight} <= params
    ):
        return None
    return product


def _fits(value: relax.Expr, normed: relax.Var, params: set[relax.Var]) -> bool:
    """Whether there is a kernel that computes `normed` in front of a product."""
    product = _product_of(value, params)
    if product is None or operands_of(value)[0] != normed:
        return False
    plan = gemv_sum.normed_plan if product.batch == 1 else gemv_norm.scaled_plan
    return plan(product) is not None


def _looks_up(value: relax.Expr) -> bool:
    return any(is_call(value, name) for name in _LOOKUPS)


def _sends(value: relax.Expr, params: set[relax.Var]) -> bool:
    if _looks_up(value):
        table, *scale = operands_of(value)[:-2]
        features = shape_of(table)[1] * (8 if scale else 1)
        return shape_of(value) == (1, features) and features % 8 == 0
    product = _product_of(value, params)
    return (
        product is not None
        and not product.gated
        and str(value.ty.dtype) == "float16"
        and gemv_sum.sent_plan(product) is not None
    )
