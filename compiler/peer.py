"""Decode functions whose all-reduces go through peer memory, beside those that use NCCL.

`add_peer_decode` gives every `decode_<batch>` a twin `decode_<batch>_peer`, in which all-reduces
are kernels of ours and, where a residual add and a norm follow, one kernel with them. The runtime
calls the twins where the ranks can map each other's memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import tvm
from tvm import relax

from shardwright.compiler.linear import Rewriter
from shardwright.compiler.propagate import bindings_of
from shardwright.compiler.rules import op_name, operands_of, shape_of

SUFFIX = "_peer"
PEER_PASS = "add_peer_decode"
MAX_ROWS = 64
"""Most tokens of one all-reduce; above it NCCL's bandwidth counts for more than its latency."""


@dataclass(frozen=True)
class PeerState:
    """State of the peer all-reduce on each rank, see `kernels/all_reduce.py`."""

    ranks: int
    rows: int
    features: int

    @property
    def tensors(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Name, shape and dtype of the state tensors."""
        return {
            "peers": ((self.ranks + 1,), "int64"),
            "peer_calls": ((self.rows,), "int32"),
            # A word for each element: half of a word is flag.
            "peer_buffer": ((2, self.ranks, self.rows, self.features), "uint32"),
        }


def peer_state(mod: tvm.IRModule, ranks: int) -> PeerState | None:
    """State for the all-reduces of `mod`'s decode functions; None where they do not qualify.

    They do if there are several ranks and every all-reduce is of float16 rows of one length, a
    multiple of 8, and not too many.
    """
    shapes = {
        (shape_of(b.var), str(b.var.ty.dtype))
        for gv, func in mod.functions_items()
        if gv.name_hint.startswith("decode_")
        for b in bindings_of(func)
        if _is(b.value, "relax.ccl.allreduce")
    }
    features = {shape[-1] for shape, _ in shapes}
    rows = max((shape[0] for shape, _ in shapes), default=0)
    fits = all(len(s) == 2 and s[-1] % 8 == 0 and dtype == "float16" for s, dtype in shapes)
    if ranks == 1 or len(features) != 1 or not fits or rows > MAX_ROWS:
        return None
    return PeerState(ranks, rows, features.pop())


def add_peer_decode(mod: tvm.IRModule, state: PeerState) -> tvm.IRModule:
    """`mod` with the twins. Runs after the fusions, so that norms are fused with adds already."""
    functions = dict(mod.functions_items())
    twins = {
        relax.GlobalVar(gv.name_hint + SUFFIX): _Twin(func, state).run(gv.name_hint + SUFFIX)
        for gv, func in functions.items()
        if gv.name_hint.startswith("decode_")
    }
    return tvm.IRModule({**functions, **twins})


class _Twin(Rewriter):
    """Copies a decode function with its all-reduces replaced."""

    def __init__(self, func: relax.Function, state: PeerState) -> None:
        super().__init__(func, lambda _rw, _var, call: self._replace(call))
        names = ("peers", "peer_calls")
        self.state_vars = [
            relax.Var(name, relax.TensorType(*state.tensors[name])) for name in names
        ]
        self.num_input = int(func.attrs["num_input"])
        self.new_params[self.num_input : self.num_input] = self.state_vars
        self.rank = next(self.vars[p] for p in func.params if p.name == "rank")

    def run(self, name: str) -> relax.Function:
        """The twin, called `name`."""
        return super().run(name).with_attr("num_input", self.num_input + len(self.state_vars))

    def _replace(self, call: relax.Call) -> relax.Expr | None:
        name = op_name(call)
        if name == "relax.ccl.allreduce":
            args = [self.local(call.args[0]), *self.state_vars, self.rank]
            return _abstract("peer_all_reduce", args, call.ty)
        if name == "shardwright.add_rms_norm":
            residual, x, weight, eps = operands_of(call)
            reduced = self.value_of(x)
            if reduced is not None and op_name(reduced) == "relax.ccl.allreduce":
                # The all-reduce itself is left without a reader, and is dropped.
                summand = self.local(reduced.args[0])
                args = [self.local(residual), summand, self.local(weight)]
                args += [*self.state_vars, self.rank, eps]
                return _abstract("peer_all_reduce_add_rms_norm", args, list(call.ty.fields))
        return None


def _abstract(name: str, args: list[relax.Expr], out: relax.Type | list[relax.Type]) -> relax.Call:
    return relax.call_dps_packed(f"shardwright.{name}", relax.Tuple(args), out_ty=out)


def _is(value: relax.Expr, name: str) -> bool:
    return isinstance(value, relax.Call) and op_name(value) == name
