"""Functions whose all-reduces go through peer memory, beside those that use NCCL.

`add_peer_functions` gives each `decode_<batch>` of few rows, and `prefill`, a twin with `_peer` at
the end of its name, in which all-reduces are kernels of ours and, where a residual add and a norm
follow, one kernel with them; a decode function's logits are gathered the same way. The runtime
calls the twins where the ranks can map each other's memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import tvm
from tvm import relax

from shardwright.compiler.kernels.all_reduce import many_bytes
from shardwright.compiler.kernels.gemv_mma import MAX_BATCH
from shardwright.compiler.linear import Rewriter
from shardwright.compiler.propagate import bindings_of
from shardwright.compiler.rules import op_name, operands_of, shape_of

SUFFIX = "_peer"
PEER_PASS = "add_peer_decode"
PREFILL = "prefill"
MAX_BYTES = 2 << 20
"""Of one all-reduce of a decode function; above it NCCL's bandwidth counts for more."""


SUM_PLACES = 6
"""For sums of one row of `fuse_norm`, each [ranks, features] f16."""


def sum_places(sums: int) -> list[int]:
    """The places of a step's sums, at least `SUM_PLACES`: used again behind two others or more.

    By then every rank has cleared it. The last two have their own, so that this holds for the next
    step too, whatever runs before it.
    """
    return [i % (SUM_PLACES - 2) for i in range(sums - 2)] + [SUM_PLACES - 2, SUM_PLACES - 1]


@dataclass(frozen=True)
class PeerState:
    """State on each rank of what goes over peer memory.

    See `kernels/peer.cuh` and `peer_many.cuh`. `logits` is how many of a row a rank computes, 0
    where they are not gathered so; `chunk` how many rows a prefill may have, 0 where it uses NCCL.
    """

    ranks: int
    rows: int
    features: int
    logits: int = 0
    chunk: int = 0

    @property
    def logits_at(self) -> int:
        """Word of the buffer at which logits begin; before it are the sums' words."""
        # A word for each element, half of a word being flag, and two halves used in turn.
        return 2 * self.ranks * self.rows * self.features

    @property
    def sums_at(self) -> int:
        """Word of the buffer at which the sums of one row begin, at a multiple of 16 bytes."""
        # A flag beside each logit.
        return self.logits_at + 2 * self.ranks * self.rows * self.logits

    @property
    def several_at(self) -> tuple[int, int]:
        """Words at which summands of several rows begin, for two sums of `fuse_norm` in turn."""
        first = self.sums_at + SUM_PLACES * self.ranks * self.features // 2
        return first, first + self._several_words

    @property
    def _several_words(self) -> int:
        rows = min(self.rows, MAX_BATCH)
        return self.ranks * rows * self.features // 2 if rows > 1 else 0

    @property
    def chunk_at(self) -> int:
        """Word of the buffer at which what a prefill sends begins, at a multiple of 256 bytes."""
        return (self._decode_words + 63) // 64 * 64

    @property
    def _decode_words(self) -> int:
        return self.several_at[1] + self._several_words

    @property
    def tensors(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Name, shape and dtype of the state tensors."""
        words = self._decode_words
        if self.chunk:
            more = many_bytes(ranks=self.ranks, rows=self.chunk, features=self.features)
            words = self.chunk_at + more // 4
        tensors: dict[str, tuple[tuple[int, ...], str]] = {
            "peers": ((self.ranks + 1,), "int64"),
            "peer_calls": ((self.rows,), "int32"),
            "peer_buffer": ((words,), "uint32"),
        }
        if self.chunk:
            tensors["peer_chunk_calls"] = ((self.chunk,), "int32")
        return tensors


def peer_state(mod: tvm.IRModule, ranks: int, chunk: int) -> PeerState | None:
    """State for the all-reduces of `mod`'s functions; None where no decode function qualifies.

    They do if there are several ranks and every all-reduce is of float16 rows of one length, a
    multiple of 8. Functions of so many rows that NCCL is faster are left to it. `chunk` is the
    largest number of rows of a prefill.
    """
    functions = [mod[name] for name in _qualified(mod)]
    shapes = {kind for func in functions for kind in _reduced(func)}
    features = {shape[-1] for shape, _ in shapes}
    if ranks == 1 or len(features) != 1:
        return None
    rows = max(shape[0] for shape, _ in shapes)
    gathered = {_gathered_logits(func) for func in functions}
    # None of a function that gathers otherwise; two logits travel together.
    same = len(gathered) == 1 and (logits := gathered.pop()) is not None and logits % 2 == 0
    state = PeerState(ranks, rows, features.pop(), logits if same and logits else 0)
    return replace(state, chunk=chunk) if _prefill_qualifies(mod, state) else state


def _qualified(mod: tvm.IRModule) -> list[str]:
    """Names of the decode functions that get a twin."""
    return [
        gv.name_hint
        for gv, func in mod.functions_items()
        if gv.name_hint.startswith("decode_")
        and (kinds := _reduced(func))
        and all(len(s) == 2 and s[1] % 8 == 0 and dtype == "float16" for s, dtype in kinds)
        and all(2 * s[0] * s[1] <= MAX_BYTES for s, _ in kinds)
    ]


def _prefill_qualifies(mod: tvm.IRModule, state: PeerState) -> bool:
    names = {gv.name_hint for gv in mod.get_global_vars()}
    kinds = _reduced(mod[PREFILL]) if PREFILL in names else set()
    return bool(kinds) and all(s[1:] == (state.features,) and t == "float16" for s, t in kinds)


def _reduced(func: relax.Function) -> set[tuple[tuple[int, ...], str]]:
    """Shapes and dtypes of what a function reduces over all ranks."""
    return {
        (shape_of(b.var), str(b.var.ty.dtype))
        for b in bindings_of(func)
        if _is(b.value, "relax.ccl.allreduce")
    }


class _Gather(NamedTuple):
    """The logits of this rank, those of all ranks being stored in their place."""

    new: relax.Var
    last: relax.Var
    logits: relax.Var


def _gather_of(store: relax.Call, values: dict[relax.Var, relax.Expr]) -> _Gather | None:
    """What `shardwright.store_logits` keeps, if that was gathered from all ranks in rank order."""

    def operand(x: relax.Expr, name: str) -> relax.Expr:
        value = values.get(x) if isinstance(x, relax.Var) else None
        return value.args[0] if value is not None and _is(value, name) else None

    whole, last, logits = operands_of(store)
    turned = operand(whole, "relax.permute_dims")
    taken = operand(turned, "relax.take")
    if taken is not None:
        # Ids that leave out padding behind the last rank's.
        ids = values[turned].args[1]
        in_order = np.arange(shape_of(turned)[0])
        if isinstance(ids, relax.Var) or not np.array_equal(ids.value.numpy(), in_order):
            return None
    gathered = operand(turned if taken is None else taken, "relax.ccl.allgather")
    new = operand(gathered, "relax.permute_dims")
    return None if new is None else _Gather(new, last, logits)


def _gathered_logits(func: relax.Function) -> int | None:
    values = {b.var: b.value for b in bindings_of(func)}
    for value in values.values():
        if _is(value, "shardwright.store_logits") and (found := _gather_of(value, values)):
            return int(shape_of(found.new)[1])
    return None


def add_peer_functions(mod: tvm.IRModule, state: PeerState) -> tvm.IRModule:
    """`mod` with the twins. Runs after the fusions, so that norms are fused with adds already."""
    names = [*_qualified(mod), *([PREFILL] if state.chunk else [])]
    twins = {
        relax.GlobalVar(name + SUFFIX): _Twin(mod[name], state).run(name + SUFFIX) for name in names
    }
    return tvm.IRModule({**dict(mod.functions_items()), **twins})


class _Twin(Rewriter):
    """Copies a function with its all-reduces replaced."""

    def __init__(self, func: relax.Function, state: PeerState) -> None:
        super().__init__(func, lambda _rw, _var, call: self._replace(call))
        self.prefill = str(func.attrs["global_symbol"]) == PREFILL
        names = ["peers", "peer_calls", *(["peer_chunk_calls"] if self.prefill else [])]
        self.state_vars = [
            relax.Var(name, relax.TensorType(*state.tensors[name])) for name in names
        ]
        self.num_input = int(func.attrs["num_input"])
        self.new_params[self.num_input : self.num_input] = self.state_vars
        self.state = state
        self.rank = next(self.vars[p] for p in func.params if p.name == "rank")

    def run(self, name: str) -> relax.Function:
        """The twin, called `name`."""
        return super().run(name).with_attr("num_input", self.num_input + len(self.state_vars))

    def _replace(self, call: relax.Call) -> relax.Expr | None:
        name = op_name(call)
        if name == "relax.ccl.allreduce":
            how = self._how(call)
            if how is None:
                return None
            kind, state, extra = how
            args = [self.local(call.args[0]), *state, self.rank, *extra]
            return _abstract(f"peer_all_reduce{kind}", args, call.ty)
        if name == "shardwright.add_rms_norm":
            residual, x, weight, eps = operands_of(call)
            reduced = self.value_of(x)
            if reduced is not None and op_name(reduced) == "relax.ccl.allreduce":
                how = self._how(reduced)
                if how is None:
                    return None
                kind, state, extra = how
                # The all-reduce itself is left without a reader, and is dropped.
                summand = self.local(reduced.args[0])
                args = [self.local(residual), summand, self.local(weight)]
                args += [*state, self.rank, eps, *extra]
                return _abstract(f"peer_all_reduce{kind}_add_rms_norm", args, list(call.ty.fields))
        if name == "shardwright.store_logits" and self.state.logits and not self.prefill:
            found = _gather_of(call, self.values)
            assert found is not None  # or there would be no such state
            new, last, logits = map(self.local, found)
            first = relax.prim_value(self.state.logits_at)
            args = [new, last, *self.state_vars, self.rank, logits, first]
            return _abstract("peer_store_logits", args, call.ty)
        return None

    def _how(self, reduce: relax.Call) -> tuple[str, list[relax.Var], list[relax.Expr]] | None:
        """Of an all-reduce: its kind, its state, what else its kernel takes; None: NCCL's."""
        rows = shape_of(reduce)[0]
        peers, calls, *chunk_calls = self.state_vars
        if not isinstance(rows, int):
            return "_many", [peers, *chunk_calls], [relax.prim_value(4 * self.state.chunk_at)]
        return ("", [peers, calls], []) if rows <= self.state.rows else None


def _abstract(name: str, args: list[relax.Expr], out: relax.Type | list[relax.Type]) -> relax.Call:
    return relax.call_dps_packed(f"shardwright.{name}", relax.Tuple(args), out_ty=out)


def _is(value: relax.Expr, name: str) -> bool:
    return isinstance(value, relax.Call) and op_name(value) == name
