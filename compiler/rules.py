"""One sharding rule per operation.

A rule is a string in the notation of einops, one term per operand and result: `"n (q d) -> n q d"`.
A letter is a factor of the operation's iteration space. Lower-case factors may be sharded,
upper-case ones may not. Only the first (major) factor of a group in parentheses can be sharded.
Sharding a factor that the operation sums over makes its result Partial. `1` is a dimension without
a factor (broadcast); `()` a scalar or an attribute.

Propagation and partitioning read these rules and never look at an operation's name. An operation
without a rule is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import tvm
from tvm import relax

from shardwright.compiler.placement import PAD, Shard
from shardwright.errors import ShardingError

Dim: TypeAlias = tuple[str, ...]
Term: TypeAlias = tuple[Dim, ...]
Linear: TypeAlias = Literal["no", "one", "all"]


@dataclass(frozen=True)
class Rule:
    """Factors of each dimension of each operand and result.

    `sizes` gives the length of the minor factors of grouped dimensions, `sums` the factors that are
    summed over. `linear` says when Partial operands make a Partial result: "one" if a single
    operand is Partial and the others are whole (scaling, reshaping), "all" if all are (addition),
    "no" if never. `check` may refuse the cuts of the factors.
    """

    operands: tuple[Term, ...]
    results: tuple[Term, ...]
    sizes: dict[str, int]
    linear: Linear = "no"
    sums: frozenset[str] = frozenset()
    check: Callable[[dict[str, Shard | None]], None] | None = None


def parse(text: str, sizes: dict[str, int] | None = None, **kwargs: Any) -> Rule:
    """A rule from its notation; `sizes` as in `Rule`."""
    left, right = text.split("->")
    return Rule(_terms(left), _terms(right), sizes or {}, **kwargs)


def _terms(text: str) -> tuple[Term, ...]:
    terms = []
    for term in text.split(","):
        dims: list[Dim] = []
        group: list[str] | None = None
        for token in term.replace("(", " ( ").replace(")", " ) ").split():
            if token == "(":
                group = []
            elif token == ")":
                if group:
                    dims.append(tuple(group))
                group = None
            elif group is not None:
                group.append(token)
            else:
                dims.append(() if token == "1" else (token,))
        terms.append(tuple(dims))
    return tuple(terms)


def shape_of(expr: relax.Expr) -> tuple[Any, ...]:
    """Shape of a tensor expression: ints, and TIR expressions where symbolic."""
    return tuple(int(d) if isinstance(d, tvm.tirx.IntImm) else d for d in expr.ty.shape.values)


# Rules of Relax operations -----------------------------------------------------------------------


def _letters(count: int) -> list[str]:
    return [f"d{i}" for i in range(count)]


def _elementwise(linear: Linear) -> Callable[[relax.Call], Rule]:
    """Numpy broadcasting: dimensions align from the right, length 1 repeats."""

    def rule(call: relax.Call) -> Rule:
        out = shape_of(call)
        letters = _letters(len(out))

        def term(arg: relax.Expr) -> Term:
            shape = shape_of(arg)
            names = letters[len(out) - len(shape) :]
            return tuple(
                () if d == 1 and o != 1 else (n,)
                for n, d, o in zip(names, shape, out[len(out) - len(shape) :], strict=True)
            )

        result = tuple((n,) for n in letters)
        return Rule(tuple(term(a) for a in call.args), (result,), {}, linear)

    return rule


def _matmul(call: relax.Call) -> Rule:
    if len(shape_of(call.args[0])) != 2 or len(shape_of(call.args[1])) != 2:
        raise ShardingError("matmul: only products of two matrices have a sharding rule")
    return parse("m k, k n -> m n", linear="one", sums=frozenset("k"))


def _permute_dims(call: relax.Call) -> Rule:
    rank = len(shape_of(call.args[0]))
    axes = [int(a) % rank for a in call.attrs.axes] if call.attrs.axes else range(rank)[::-1]
    letters = _letters(rank)
    operand = tuple((n,) for n in letters)
    return Rule((operand,), (tuple((letters[a],) for a in axes),), {}, "one")


def _reshape(call: relax.Call) -> Rule:
    """Match runs of input dimensions with runs of output dimensions of the same product."""
    source, target = list(shape_of(call.args[0])), list(shape_of(call))
    sizes: dict[str, int] = {}
    terms: tuple[list[Dim], list[Dim]] = ([], [])
    i = j = 0
    while i < len(source) and j < len(target):
        i0, j0, left, right = i, j, source[i], target[j]
        while not _equal(left, right):
            if isinstance(left, int) and isinstance(right, int) and left < right:
                i += 1
                left = left * source[i]
            elif j + 1 < len(target):
                j += 1
                right = right * target[j]
            else:
                raise ShardingError(f"reshape {source} -> {target} has no sharding rule")
        i, j = i + 1, j + 1
        _reshape_run(source[i0:i], target[j0:j], f"g{i0}", terms, sizes)
    if any(d != 1 for d in source[i:] + target[j:]):
        raise ShardingError(f"reshape {source} -> {target} has no sharding rule")
    terms[0].extend(() for _ in source[i:])
    terms[1].extend(() for _ in target[j:])
    return Rule((tuple(terms[0]), ()), (tuple(terms[1]),), sizes, "one")


def _reshape_run(
    source: list[Any],
    target: list[Any],
    name: str,
    terms: tuple[list[Dim], list[Dim]],
    sizes: dict[str, int],
) -> None:
    """Factors of one run: both sides share the major one; the minor ones are never sharded."""
    if len(source) == len(target) == 1:
        terms[0].append((name,))
        terms[1].append((name,))
        return
    if min(len(source), len(target)) != 1:
        # Both sides have several dimensions: no factor is common, so nothing here may be sharded.
        for side, dims in zip(terms, (source, target), strict=True):
            side.extend((f"{name.upper()}_{k}",) for k in range(len(dims)))
        return
    splits = len(target) > 1
    many = target if splits else source
    minors = [f"{name.upper()}_{k}" for k in range(1, len(many))]
    sizes.update(zip(minors, (int(d) for d in many[1:]), strict=True))
    apart, together = (terms[1], terms[0]) if splits else terms
    apart.extend([(name,), *[(m,) for m in minors]])
    together.append((name, *minors))


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return bool(tvm.sym.Analyzer().can_prove_equal(a, b))


def _rms_norm(call: relax.Call) -> Rule:
    axes = {int(a) % len(shape_of(call)) for a in call.attrs.axes}
    dims = [f"D{i}" if i in axes else f"d{i}" for i in range(len(shape_of(call)))]
    weight = [d for d in dims if d[0] == "D"]
    return parse(f"{' '.join(dims)}, {' '.join(weight)} -> {' '.join(dims)}")


def _take(call: relax.Call) -> Rule:
    """Rows of a table. A table cut along its rows gives Partial: each rank adds those it holds."""
    if int(call.attrs.axis) != 0 or len(shape_of(call.args[0])) != 2:
        raise ShardingError("take: only rows of a matrix have a sharding rule")
    return parse("v e, n -> n e", sums=frozenset("v"))


RULES: dict[str, Callable[[relax.Call], Rule]] = {
    "relax.matmul": _matmul,
    "relax.permute_dims": _permute_dims,
    "relax.reshape": _reshape,
    "relax.nn.rms_norm": _rms_norm,
    "relax.take": _take,
    "relax.add": _elementwise("all"),
    "relax.subtract": _elementwise("all"),
    "relax.multiply": _elementwise("one"),
    "relax.negative": _elementwise("one"),
    "relax.maximum": _elementwise("no"),
    "relax.minimum": _elementwise("no"),
    "relax.nn.silu": _elementwise("no"),
    "relax.nn.gelu_tanh": _elementwise("no"),
    "relax.tanh": _elementwise("no"),
    "relax.astype": _elementwise("no"),
}

# Rules of abstract operations: attributes are operands without dimensions. -----------------------


def _attention_check(cuts: dict[str, Shard | None]) -> None:
    """Every query head must find its kv head on its own rank."""
    q, k = cuts["q"], cuts["k"]
    if q is None and k is None:
        return
    if q is None or k is None:
        raise ShardingError("attention: query and kv heads must be sharded together")
    group = q.size // k.size
    local_group = q.local_size // k.local_size
    for rank, (q_ids, kv_ids) in enumerate(zip(q.table, k.table, strict=True)):
        for i, head in enumerate(q_ids):
            if head != PAD and kv_ids[i // local_group] != head // group:
                raise ShardingError(
                    f"attention: query head {head} is on rank {rank}, its kv head "
                    f"{head // group} is not; use placement.head_tables for both"
                )


_BIASED = "N I, e m I, e m I, e I m, N K, N K, e m 1, e m 1, e I 1"

ABSTRACT_RULES: dict[str, Rule] = {
    "shardwright.rotary_table": parse("N, N, R, (), (), () -> N T R"),
    "shardwright.rotary_table_long": parse("N, N, F R, (), () -> N T R"),
    "shardwright.rotary_append": parse(
        "N q D, N k D, N k D, N T R, L P k S D, L P k S D, B M, N, N, ()"
        " -> N q D, L P k S D, L P k S D",
        check=_attention_check,
    ),
    "shardwright.attention": parse(
        "N q D, L P k S D, L P k S D, B M, N, N, (), (), (), () -> N q D", check=_attention_check
    ),
    "shardwright.attention_sinks": parse(
        "N q D, L P k S D, L P k S D, B M, N, N, q, (), (), (), () -> N q D",
        check=_attention_check,
    ),
    "shardwright.route": parse("N E, (), () -> N K, N K"),
    # Experts cut inside, or whole ones on each rank: a rank adds what its part gives.
    "shardwright.experts": parse("N I, e m I, e m I, e I m, N K, N K -> N I", sums=frozenset("em")),
    # The same where a rank has whole experts, by its number.
    "shardwright.local_experts": parse(
        "N I, e m I, e m I, e I m, N K, N K, R -> N I", sums=frozenset("em")
    ),
    # With a bias of each product. Where experts are cut inside (`split`), all ranks hold the one of
    # the sum over m, and only rank 0 adds it.
    "shardwright.biased_experts": parse(f"{_BIASED}, (), () -> N I", sums=frozenset("em")),
    "shardwright.biased_local_experts": parse(f"{_BIASED}, (), (), R -> N I", sums=frozenset("em")),
    "shardwright.biased_split_experts": parse(f"{_BIASED}, (), (), R -> N I", sums=frozenset("em")),
    # A look-up in a table cut along its rows, by the rank's number.
    "shardwright.embed": parse("v E, N, R -> N E", sums=frozenset("v")),
    "shardwright.store_logits": parse("B V, B, B V -> B V"),
    "shardwright.sample": parse("B V, B V, B, B, B M, B F, B I, B E -> B V, B, B, B M"),
}


def op_name(call: relax.Call) -> str:
    """`relax.matmul`, or the name of the abstract operation or packed function called."""
    name = str(call.op.name) if isinstance(call.op, tvm.ir.Op) else str(call.op)
    return str(call.args[0].global_symbol) if name == "relax.call_dps_packed" else name


def operands_of(call: relax.Call) -> list[relax.Expr]:
    """The operands that a rule speaks of: of a packed call, the fields of its argument tuple."""
    if isinstance(call.args[0], relax.ExternFunc):
        return list(call.args[1].fields)
    return list(call.args)


def rule_of(call: relax.Call) -> Rule:
    """The sharding rule of a call. Raises ShardingError for an operation without one."""
    name = op_name(call)
    if name in ABSTRACT_RULES:
        return ABSTRACT_RULES[name]
    if name in RULES:
        return RULES[name](call)
    raise ShardingError(
        f"{name} has no sharding rule; add one to compiler/rules.py (see CONTRIBUTING)"
    )
