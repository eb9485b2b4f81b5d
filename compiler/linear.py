"""Passes on the matrix products of the local view: name them, join them, quantize them.

They run after partitioning, on local shapes. What they do to weights is recorded in `Weight`s,
from which the checkpoint is sliced, joined and quantized.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import tvm
from tvm import relax, tirx

from shardwright.compiler.propagate import bindings_of
from shardwright.compiler.rules import op_name, operands_of, shape_of
from shardwright.compiler.weights import Weight
from shardwright.errors import ConfigError, ShardingError


@dataclass
class Weights:
    """The program's weights by name, in argument order."""

    table: dict[str, Weight]

    def variables(self, name: str) -> list[relax.Var]:
        """Fresh argument variables for the tensors of weight `name`."""
        return [
            relax.Var(tensor, relax.TensorType(shape, dtype))
            for tensor, shape, dtype in self.table[name].tensors()
        ]


def name_linears(mod: tvm.IRModule) -> tvm.IRModule:
    """`matmul(x, permute_dims(w))` with a parameter `w` becomes `shardwright.linear(x, w)`."""

    def rewrite(rw: Rewriter, _var: relax.Var, call: relax.Call) -> relax.Expr | None:
        if op_name(call) != "relax.matmul":
            return None
        transposed = rw.value_of(call.args[1])
        if transposed is None or op_name(transposed) != "relax.permute_dims":
            return None
        weight = transposed.args[0]
        if weight not in rw.params or transposed.attrs.axes:
            return None
        return linear(rw.local(call.args[0]), rw.local(weight), str(call.ty.dtype))

    return _rewrite_module(mod, rewrite)


def linear(x: relax.Expr, weight: relax.Expr, dtype: str) -> relax.Call:
    """`x @ weight.T`, accumulated in float32, rounded to `dtype`."""
    out = relax.TensorType([shape_of(x)[0], shape_of(weight)[0]], dtype)
    return relax.call_dps_packed("shardwright.linear", relax.Tuple([x, weight]), out_ty=out)


_ELEMENTWISE = (
    *("relax.multiply", "relax.add", "relax.astype"),
    *("relax.nn.silu", "relax.nn.gelu", "relax.nn.gelu_tanh"),
)


def producers(mod: tvm.IRModule, name: str) -> list[str] | None:
    """The parameters whose rows make the columns of what weight `name` multiplies.

    Permuting these rows permutes those columns and changes nothing else: between them are
    elementwise operations only, and nothing else reads the values. None if that is not so.
    """
    found = []
    for _, func in mod.functions_items():
        values = {b.var: b.value for b in bindings_of(func)}
        params = {p for p in func.params if p not in values}
        linears = [
            v
            for v in values.values()
            if is_call(v, "shardwright.linear") and operands_of(v)[1].name == name
        ]
        if not linears:
            continue
        rows, inside = _rows_before(operands_of(linears[0])[0], values, params)
        outside = [v for var, v in values.items() if var not in inside and v is not linears[0]]
        read = {x for value in [*outside, func.body.body] for x in reads(value)}
        if rows is None or len(linears) > 1 or read & (inside | set(rows)):
            return None
        found.append([p.name for p in rows])
    return found[0] if found and all(sorted(f) == sorted(found[0]) for f in found) else None


def _rows_before(
    x: relax.Expr, values: dict[relax.Var, relax.Expr], params: set[relax.Var]
) -> tuple[list[relax.Var] | None, set[relax.Var]]:
    """Parameters along whose rows `x` is computed, None if not by such alone; and its values."""
    rows: list[relax.Var] = []
    inside: set[relax.Var] = set()
    waiting = [x]
    while waiting:
        var = waiting.pop()
        if var in inside or var in rows:
            continue
        if var in params and shape_of(var) == shape_of(x)[1:]:
            rows.append(var)
            continue
        value = values.get(var) if isinstance(var, relax.Var) else None
        if not isinstance(value, relax.Call):
            return None, inside
        inside.add(var)
        if op_name(value) == "shardwright.linear":
            rows.append(operands_of(value)[1])
        elif op_name(value) in _ELEMENTWISE:
            waiting += list(value.args)
        else:
            return None, inside
    return rows, inside


def join_linears(mod: tvm.IRModule, weights: Weights) -> tvm.IRModule:
    """Linears of one input become one linear with their weights joined, and slices of its result.

    This makes qkv and gate_up products of the separate tensors of the checkpoint. Biases of all
    members are joined likewise.
    """
    groups: dict[str, list[str]] = {}
    biases: dict[str, str] = {}  # first bias of a group, by its first weight
    for _, func in mod.functions_items():
        found = list(_groups(func, weights))
        groups |= {g[0]: g for g in found}
        for g in found:
            names = _biases(func, g)
            if names is not None:
                groups[names[0]], biases[g[0]] = names, names[0]
    joined = {}
    table: dict[str, Weight] = {}
    members = {name for group in groups.values() for name in group}
    for name, weight in weights.table.items():
        if name in groups:
            parts = [weights.table[m] for m in groups[name]]
            sources = tuple(s for part in parts for s in part.sources)
            joined[name] = replace(weight, name=_joined_name(groups[name]), sources=sources)
            table[joined[name].name] = joined[name]
        elif name not in members:
            table[name] = weight
    weights.table = table
    return tvm.IRModule(
        {
            gv: _Joiner(func, groups, joined, biases).run(gv.name_hint)
            for gv, func in mod.functions_items()
        }
    )


def _groups(func: relax.Function, weights: Weights) -> Iterable[list[str]]:
    """Names of the weights that multiply the same value, in program order, at least two.

    Those that are quantized must be so in one format.
    """
    by_input: dict[tuple[object, ...], list[str]] = defaultdict(list)
    for binding in bindings_of(func):
        if is_call(binding.value, "shardwright.linear"):
            x, weight = operands_of(binding.value)
            columns = weights.table[weight.name].columns if weight.name in weights.table else None
            key = (x, str(binding.var.ty.dtype), columns and columns.key)
            by_input[key].append(weight.name)
    return [names for names in by_input.values() if len(names) > 1]


def _biases(func: relax.Function, weights: list[str]) -> list[str] | None:
    """Names of the biases added to the products with `weights`, if every one of them has one."""
    products: dict[relax.Expr, str] = {}
    biases: dict[str, str] = {}
    for binding in bindings_of(func):
        value = binding.value
        if is_call(value, "shardwright.linear") and operands_of(value)[1].name in weights:
            products[binding.var] = operands_of(value)[1].name
            continue
        read = [x for x in reads(value) if x in products]
        if not read:
            continue
        # Nothing but its bias may be added to a product, once.
        if not is_call(value, "relax.add") or products[read[0]] in biases:
            return None
        product, bias = value.args
        if product != read[0] or bias not in list(func.params):
            return None
        if shape_of(bias) != shape_of(product)[1:]:
            return None
        biases[products[product]] = bias.name
    return [biases[w] for w in weights] if len(biases) == len(weights) else None


def reads(value: relax.Expr) -> list[relax.Var]:
    """The variables that the value of a binding, or a function's result, reads."""
    if isinstance(value, relax.Var):
        return [value]
    if isinstance(value, relax.TupleGetItem):
        return reads(value.tuple_value)
    inner = getattr(value, "args", None) or getattr(value, "fields", None) or []
    return [x for part in inner for x in reads(part)]


def _joined_name(names: list[str]) -> str:
    """`a.q.weight`, `a.k.weight` -> `a.q_k.weight`: kernels' arguments take the name, so no `+`."""
    parts = [name.split(".") for name in names]
    columns = zip(*parts, strict=True)
    return ".".join("_".join(dict.fromkeys(column)) for column in columns)


def quantize(mod: tvm.IRModule, weights: Weights) -> tvm.IRModule:
    """Weights whose sources are stored as codes become the tensors of their format.

    `shardwright.linear` and table look-ups of such a weight take them instead: `q4_linear(x, words,
    scale)` and `q4_embed(words, scale, ids[, rank])` for the format of the four-bit kernels, else
    `quantized_linear` and `quantized_embed` with the zero points, if any, after the scale, and
    `Packing.attributes` at the end. Where columns were moved, `take_columns` moves x.
    """

    def rewrite(rw: Rewriter, _var: relax.Var, call: relax.Call) -> relax.Expr | None:
        name = op_name(call)
        if name.endswith("experts"):
            return _quantized_experts(rw, call, weights)
        if name not in ("shardwright.linear", "shardwright.embed", "relax.take"):
            return None
        args = operands_of(call)
        weight = args[1] if name == "shardwright.linear" else args[0]
        tensors = rw.replaced.get(weight)
        if tensors is None:
            return None
        columns = weights.table[weight.name].columns
        assert columns is not None
        x, moved = rw.local(args[0]), tensors[-1]
        if columns.moved is not None:
            tensors = tensors[:-1]
            if name != "shardwright.linear":
                raise ShardingError(f"{weight.name}: a table in act-order cannot be looked up")
            x = _take_columns(rw, x, moved)
        kind, attributes = "q4", list[relax.Expr]()
        if not columns.packing.is_q4(str(weight.ty.dtype)):
            kind = "quantized"
            attributes = [
                relax.prim_value(tirx.IntImm("int64", a)) for a in columns.packing.attributes()
            ]
        if name == "shardwright.linear":
            args, abstract = [x, *tensors, *attributes], f"shardwright.{kind}_linear"
        else:
            rest = map(rw.local, args[1:])
            args, abstract = [*tensors, *rest, *attributes], f"shardwright.{kind}_embed"
        return relax.call_dps_packed(abstract, relax.Tuple(args), out_ty=call.ty)

    def split(param: relax.Var) -> list[relax.Var] | None:
        weight = weights.table.get(param.name)
        return weights.variables(param.name) if weight and weight.columns else None

    return _rewrite_module(mod, rewrite, split)


def _quantized_experts(rw: Rewriter, call: relax.Call, weights: Weights) -> relax.Expr | None:
    """`quantized_experts(x, gate, up, down, ids, weights, ...)`, each weight by its tensors.

    Likewise for the other operations on experts: `quantized_local_experts` and so on.
    At the end are `Packing.attributes` of the three and whether it has zero points; zeros for a
    plain one.
    """
    x, gate, up, down, *rest = operands_of(call)
    if not any(w in rw.replaced for w in (gate, up, down)):
        return None
    tensors, attributes, packings = list[relax.Expr](), list[int](), []
    for weight in (gate, up, down):
        columns = weights.table[weight.name].columns
        if columns is not None and columns.moved is not None:
            raise ConfigError(
                f"{weight.name}: experts in act-order (desc_act) are not supported; use a "
                "quantization of the model without it"
            )
        packing = columns.packing if columns is not None else None
        packings.append(packing)
        tensors += rw.replaced.get(weight, [rw.local(weight)])
        attributes += (*packing.attributes(), int(packing.zeros)) if packing else (0, 0, 0, 0)
    if packings[0] != packings[1]:
        raise ConfigError(
            f"{gate.name} and {up.name} are quantized in two formats; use a quantization of the "
            "model that has one for both"
        )
    numbers = [relax.prim_value(tirx.IntImm("int64", a)) for a in attributes]
    args = [rw.local(x), *tensors, *map(rw.local, rest), *numbers]
    name = op_name(call).replace(".", ".quantized_")
    return relax.call_dps_packed(name, relax.Tuple(args), out_ty=call.ty)


def _take_columns(rw: Rewriter, x: relax.Expr, index: relax.Var) -> relax.Var:
    """`x` [n, K] with columns `index` [K'], zeros where it is -1."""
    out = relax.TensorType([shape_of(x)[0], shape_of(index)[0]], x.ty.dtype)
    call = relax.call_dps_packed("shardwright.take_columns", relax.Tuple([x, index]), out_ty=out)
    return rw.bb.emit(call, "moved")


class Rewriter:
    """Copies a straight-line function, letting a callback replace calls and parameters."""

    def __init__(
        self,
        func: relax.Function,
        rewrite: Callable[[Rewriter, relax.Var, relax.Call], relax.Expr | None],
        split: Callable[[relax.Var], list[relax.Var] | None] = lambda _: None,
        bb: relax.BlockBuilder | None = None,
    ) -> None:
        self.func, self.rewrite, self.bb = func, rewrite, bb or relax.BlockBuilder()
        self.params = set(func.params)
        self.values = {b.var: b.value for b in bindings_of(func)}
        self.vars: dict[relax.Var, relax.Expr] = {}
        self.replaced: dict[relax.Var, list[relax.Var]] = {}
        self.new_params: list[relax.Var] = []
        for p in func.params:
            new = split(p)
            if new is None:
                new = [relax.Var(p.name, p.ty)]
                self.vars[p] = new[0]
            else:
                self.replaced[p] = new
            self.new_params += new

    def local(self, expr: relax.Expr) -> relax.Expr:
        """The new expression for an old operand."""
        return self.vars.get(expr, expr) if isinstance(expr, relax.Var) else expr

    def value_of(self, expr: relax.Expr) -> relax.Call | None:
        """The call bound to a variable of the old function."""
        value = self.values.get(expr) if isinstance(expr, relax.Var) else None
        return value if isinstance(value, relax.Call) else None

    def run(self, name: str) -> relax.Function:
        """The new function; bindings that nothing uses any more are dropped."""
        before = set(self.bb.get().get_global_vars())
        attrs = {"num_input": int(self.func.attrs["num_input"])}
        with self.bb.function("rewritten", self.new_params, attrs=attrs):
            with self.bb.dataflow():
                for b in bindings_of(self.func):
                    self.vars[b.var] = self._emit(b.var, b.value)
                out = self.bb.emit_output(self.local(self.func.body.body))
            self.bb.emit_func_output(out)
        functions = [
            f
            for gv, f in self.bb.get().functions_items()
            if gv not in before and isinstance(f, relax.Function)
        ]
        func = relax.analysis.remove_all_unused(functions[0])
        return func.with_attr("global_symbol", name)

    def _emit(self, var: relax.Var, value: relax.Expr) -> relax.Expr:
        if isinstance(value, relax.Call):
            new = self.rewrite(self, var, value)
            if isinstance(new, relax.Var | relax.Tuple):
                return new  # another name for what is there already
            return self.bb.emit(self.copy(value) if new is None else new, var.name)
        if isinstance(value, relax.TupleGetItem):
            whole = self.local(value.tuple_value)
            if isinstance(whole, relax.Tuple):
                return whole.fields[value.index]
            return self.bb.emit(relax.TupleGetItem(whole, value.index))
        if isinstance(value, relax.Tuple):
            return relax.Tuple([self.local(f) for f in value.fields])
        return self.local(value)

    def copy(self, call: relax.Call) -> relax.Call:
        """The same call on the new operands."""
        args = [
            relax.Tuple([self.local(f) for f in a.fields])
            if isinstance(a, relax.Tuple)
            else self.local(a)
            for a in call.args
        ]
        return relax.Call(call.op, args, call.attrs, call.ty_args)


class _Joiner(Rewriter):
    """Emits each joined linear where its first member stood, and slices where the members did."""

    def __init__(
        self,
        func: relax.Function,
        groups: dict[str, list[str]],
        joined: dict[str, Weight],
        biases: dict[str, str],
    ) -> None:
        self.first = {name: group[0] for group in groups.values() for name in group}
        self.outputs: dict[str, relax.Expr] = {}
        self.offsets: dict[str, int] = {}
        self.biases = biases
        self.joined_vars: dict[str, relax.Var] = {}

        def split(param: relax.Var) -> list[relax.Var] | None:
            name = param.name
            if name in joined:
                whole = joined[name]
                plain = relax.TensorType(whole.local_shape, whole.dtype)
                self.joined_vars[name] = relax.Var(whole.name, plain)
                return [self.joined_vars[name]]
            return [] if name in self.first else None

        super().__init__(func, lambda _rw, _var, call: self._join(call), split)

    def _join(self, call: relax.Call) -> relax.Expr | None:
        if op_name(call) == "relax.add" and call.args[1] in self.replaced:
            return self.local(call.args[0])  # its bias was added to the whole
        if op_name(call) != "shardwright.linear":
            return None
        x, weight = operands_of(call)
        first = self.first.get(weight.name)
        if first is None:
            return None
        if first not in self.outputs:
            y = linear(self.local(x), self.joined_vars[first], str(call.ty.dtype))
            self.outputs[first] = self.bb.emit(y)
            if first in self.biases:
                bias = self.joined_vars[self.biases[first]]
                self.outputs[first] = self.bb.emit(relax.op.add(self.outputs[first], bias))
            self.offsets[first] = 0
        begin, size = self.offsets[first], shape_of(weight)[0]
        self.offsets[first] += size
        return relax.op.strided_slice(self.outputs[first], [1], [begin], [begin + size])


def _rewrite_module(
    mod: tvm.IRModule,
    rewrite: Callable[[Rewriter, relax.Var, relax.Call], relax.Expr | None],
    split: Callable[[relax.Var], list[relax.Var] | None] = lambda _: None,
) -> tvm.IRModule:
    return tvm.IRModule(
        {gv: Rewriter(func, rewrite, split).run(gv.name_hint) for gv, func in mod.functions_items()}
    )


def is_call(value: relax.Expr, name: str) -> bool:
    """Whether `value` calls the operation `name` (see `op_name`)."""
    return isinstance(value, relax.Call) and op_name(value) == name
