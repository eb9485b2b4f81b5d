"""Partition: Before / Expected for each rule, refusals, and a two-layer model."""

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.script import ir as I
from tvm.script import relax as R

from shardwright.compiler.axes import AxisRules, DeviceMesh
from shardwright.compiler.partition import Partitioned, partition
from shardwright.compiler.placement import PAD, Partial, Replicate, Shard, even_table, head_tables
from shardwright.compiler.trace import Limits, trace
from shardwright.compiler.verify import verify
from shardwright.errors import ShardingError
from shardwright.model_defs.config import LlamaConfig, inv_freq
from shardwright.model_defs.llama import LlamaForCausalLM

EIGHT = Shard(0, 8, 4, even_table(2, 2))  # a dimension of 8 as two blocks of 4 on 2 ranks


def check(before, placements, expected, ranks=2):
    got = partition(before, placements, ranks)
    verify(got, placements, ranks)
    assert_same(got.mod, expected)
    return got


def assert_same(got, expected):
    # A function's result may be bound to one more name.
    tidy = relax.transform.CanonicalizeBindings()
    tvm.ir.assert_structural_equal(tidy(got), tidy(expected))


def test_matmul_with_sharded_rows_then_columns_needs_one_all_reduce():
    @I.ir_module
    class Before:
        @R.function
        def main(
            x: R.Tensor((3, 6), "float32"),
            up: R.Tensor((8, 6), "float32"),
            down: R.Tensor((6, 8), "float32"),
        ):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                ut = R.permute_dims(up)
                h = R.matmul(x, ut)
                a = R.nn.silu(h)
                b = R.multiply(a, h)
                dt = R.permute_dims(down)
                y = R.matmul(b, dt)
                z = R.add(x, y)
                R.output(z)
            return z

    @I.ir_module
    class Expected:
        @R.function
        def main(
            x: R.Tensor((3, 6), "float32"),
            up: R.Tensor((4, 6), "float32"),
            down: R.Tensor((6, 4), "float32"),
        ):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                ut = R.permute_dims(up)
                h = R.matmul(x, ut)
                a = R.nn.silu(h)
                b = R.multiply(a, h)
                dt = R.permute_dims(down)
                y = R.matmul(b, dt)
                s = R.ccl.allreduce(y, "sum", True)
                z = R.add(x, s)
                R.output(z)
            return z

    got = check(Before, {"up": EIGHT, "down": EIGHT.with_dim(1)}, Expected)
    assert [(c.kind, c.bytes) for c in got.collectives["main"]] == [("all-reduce", 3 * 6 * 4)]


def test_partial_values_are_added_before_they_are_summed_once():
    @I.ir_module
    class Before:
        @R.function
        def main(
            x: R.Tensor((3, 8), "float32"),
            v: R.Tensor((8, 5), "float32"),
            w: R.Tensor((8, 5), "float32"),
            bias: R.Tensor((5,), "float32"),
        ):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                y = R.matmul(x, v)
                z = R.matmul(x, w)
                s = R.add(y, z)
                a = R.add(s, bias)
                b = R.nn.silu(s)
                c = R.multiply(a, b)
                R.output(c)
            return c

    @I.ir_module
    class Expected:
        @R.function
        def main(
            x: R.Tensor((3, 4), "float32"),
            v: R.Tensor((4, 5), "float32"),
            w: R.Tensor((4, 5), "float32"),
            bias: R.Tensor((5,), "float32"),
        ):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                y = R.matmul(x, v)
                z = R.matmul(x, w)
                s = R.add(y, z)
                t = R.ccl.allreduce(s, "sum", True)
                a = R.add(t, bias)
                b = R.nn.silu(t)
                c = R.multiply(a, b)
                R.output(c)
            return c

    check(Before, {"x": EIGHT.with_dim(1), "v": EIGHT, "w": EIGHT}, Expected)


def test_scaling_a_partial_value_stays_partial():
    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor((3, 8), "float32"), w: R.Tensor((8, 5), "float32")):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                y = R.matmul(x, w)
                z = R.multiply(y, R.const(0.5, "float32"))
                r = R.reshape(z, R.shape([15]))
                a = R.nn.silu(r)
                R.output(a)
            return a

    @I.ir_module
    class Expected:
        @R.function
        def main(x: R.Tensor((3, 4), "float32"), w: R.Tensor((4, 5), "float32")):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                y = R.matmul(x, w)
                z = R.multiply(y, R.const(0.5, "float32"))
                r = R.reshape(z, R.shape([15]))
                s = R.ccl.allreduce(r, "sum", True)
                a = R.nn.silu(s)
                R.output(a)
            return a

    check(Before, {"x": EIGHT.with_dim(1), "w": EIGHT}, Expected)


def test_reshape_splits_and_merges_padded_heads():
    # 3 heads of 4: the second rank holds one head and a head of zeros.
    heads = Shard(0, 12, 4, ((0, 1), (2, PAD)))

    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor((3, 6), "float32"), w: R.Tensor((12, 6), "float32")):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                t = R.permute_dims(w)
                y = R.matmul(x, t)
                h = R.reshape(y, R.shape([3, 3, 4]))
                a = R.nn.silu(h)
                m = R.reshape(a, R.shape([3, 12]))
                z = R.matmul(m, w)
                r = R.nn.silu(z)
                R.output(r)
            return r

    @I.ir_module
    class Expected:
        @R.function
        def main(x: R.Tensor((3, 6), "float32"), w: R.Tensor((8, 6), "float32")):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                t = R.permute_dims(w)
                y = R.matmul(x, t)
                h = R.reshape(y, R.shape([3, 2, 4]))
                a = R.nn.silu(h)
                m = R.reshape(a, R.shape([3, 8]))
                z = R.matmul(m, w)
                s = R.ccl.allreduce(z, "sum", True)
                r = R.nn.silu(s)
                R.output(r)
            return r

    check(Before, {"w": heads}, Expected)


def test_norm_over_a_sharded_dimension_gathers_it():
    @I.ir_module
    class Before:
        @R.function
        def main(
            x: R.Tensor((3, 6), "float32"),
            w: R.Tensor((8, 6), "float32"),
            g: R.Tensor((8,), "float32"),
        ):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                t = R.permute_dims(w)
                y = R.matmul(x, t)
                z = R.nn.rms_norm(y, g, axes=[-1], epsilon=1e-5)
                R.output(z)
            return z

    @I.ir_module
    class Expected:
        @R.function
        def main(
            x: R.Tensor((3, 6), "float32"),
            w: R.Tensor((4, 6), "float32"),
            g: R.Tensor((8,), "float32"),
        ):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                t = R.permute_dims(w)
                y = R.matmul(x, t)
                yt = R.permute_dims(y, [1, 0])
                stacked = R.ccl.allgather(yt, 2, True)
                whole = R.permute_dims(stacked, [1, 0])
                z = R.nn.rms_norm(whole, g, axes=[-1], epsilon=1e-5)
                R.output(z)
            return z

    got = check(Before, {"w": EIGHT}, Expected)
    assert [(c.kind, c.bytes) for c in got.collectives["main"]] == [("all-gather", 3 * 8 * 4)]


def test_gathering_drops_padding_and_copies():
    # Four ranks, two blocks of 3: each held twice, the last cut short by the size 5.
    shard = Shard(0, 5, 3, ((0,), (0,), (1,), (1,)))

    @I.ir_module
    class Before:
        @R.function
        def main(
            x: R.Tensor((2, 6), "float32"),
            w: R.Tensor((5, 6), "float32"),
            g: R.Tensor((5,), "float32"),
        ):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                t = R.permute_dims(w)
                y = R.matmul(x, t)
                z = R.nn.rms_norm(y, g, axes=[-1], epsilon=1e-5)
                R.output(z)
            return z

    got = partition(Before, {"w": shard}, 4)
    verify(got, {"w": shard}, 4)
    values = [b.value for b in got.mod["main"].body.blocks[0].bindings]
    (take,) = [value for value in values if is_call(value, "relax.take")]
    assert list(take.args[1].value.numpy()) == [0, 1, 2, 6, 7]


def test_a_table_cut_along_its_rows_is_looked_up_by_rank():
    @I.ir_module
    class Before:
        @R.function
        def main(ids: R.Tensor((3,), "int32"), table: R.Tensor((8, 4), "float32")):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                x = R.take(table, ids, axis=0)
                y = R.nn.silu(x)
                R.output(y)
            return y

    @I.ir_module
    class Expected:
        @R.function
        def main(
            ids: R.Tensor((3,), "int32"),
            rank: R.Tensor((1,), "int32"),
            table: R.Tensor((4, 4), "float32"),
        ):
            R.func_attr({"num_input": 2})
            with R.dataflow():
                x = R.call_dps_packed(
                    "shardwright.embed", (table, ids, rank), out_ty=R.Tensor((3, 4), "float32")
                )
                s = R.ccl.allreduce(x, "sum", True)
                y = R.nn.silu(s)
                R.output(y)
            return y

    check(Before, {"table": EIGHT}, Expected)
    # Columns need no look-up by rank: every rank has all rows.
    cut = partition(Before, {"table": Shard(1, 4, 2, even_table(2, 2))}, 2)
    assert [p.name for p in cut.mod["main"].params] == ["ids", "table"]
    assert not cut.collectives["main"]


def two_layers(ranks, kv_heads=2):
    config = LlamaConfig.from_hf(
        {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": 96,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": kv_heads,
            "head_dim": 16,
        }
    )
    traced = trace(LlamaForCausalLM(config, "float32"), "float32", Limits(32, 2, 16, 8))
    rules = AxisRules(DeviceMesh(("tp",), (ranks,)), config)
    shapes = {p.name: [int(d) for d in p.ty.shape.values] for p in traced.mod["decode_2"].params}
    placements = {n: rules.placement(shapes[n], a) for n, a in traced.param_axes.items()}
    placements |= {s.name: rules.placement(s.shape, s.axes) for s in traced.state.values()}
    return traced, placements


# One layer of the model below on 2 ranks, as an engineer would write tensor parallelism by hand.
def expected_layer(x, p, rotary, cache, layer):
    def linear(x, weight):
        return emit(R.matmul(x, emit(R.permute_dims(weight))))

    emit = relax.BlockBuilder.current().emit
    h = emit(R.nn.rms_norm(x, p["input_layernorm"], axes=[-1], epsilon=1e-6))
    heads = []
    for name, count in (("q", 2), ("k", 1), ("v", 1)):
        y = linear(h, p[f"self_attn.{name}_proj"])
        heads.append(emit(R.reshape(y, R.shape([2, count, 16]))))
    number = relax.prim_value(tvm.tirx.IntImm("int64", layer))
    q_type = relax.TensorType([2, 2, 16], "float32")
    called = emit(
        relax.call_dps_packed(
            "shardwright.rotary_append",
            relax.Tuple([*heads, rotary, *cache["pages"], *cache["where"], number]),
            out_ty=[q_type, *[page.ty for page in cache["pages"]]],
        )
    )
    q, *cache["pages"] = (emit(relax.TupleGetItem(called, i)) for i in range(3))
    scale = relax.prim_value(tvm.tirx.FloatImm("float64", 0.25))
    none = [tvm.tirx.IntImm("int64", 0), tvm.tirx.FloatImm("float64", 0.0)]
    unmasked = [relax.prim_value(x) for x in none]
    out = emit(
        relax.call_dps_packed(
            "shardwright.attention",
            relax.Tuple([q, *cache["pages"], *cache["where"], number, scale, *unmasked]),
            out_ty=q_type,
        )
    )
    y = linear(emit(R.reshape(out, R.shape([2, 32]))), p["self_attn.o_proj"])
    x = emit(R.add(x, emit(R.ccl.allreduce(y, "sum", True))))
    h = emit(R.nn.rms_norm(x, p["post_attention_layernorm"], axes=[-1], epsilon=1e-6))
    gate = emit(R.nn.silu(linear(h, p["mlp.gate_proj"])))
    y = linear(emit(R.multiply(gate, linear(h, p["mlp.up_proj"]))), p["mlp.down_proj"])
    return emit(R.add(x, emit(R.ccl.allreduce(y, "sum", True))))


def test_two_layer_model_equals_tensor_parallelism_by_hand():
    traced, placements = two_layers(2)
    got = partition(traced.mod, placements, 2)
    verify(got, placements, 2)
    func = got.mod["decode_2"]
    local = {p.name: p for p in func.params}
    shapes = {n: [int(d) for d in p.ty.shape.values] for n, p in local.items()}
    layer = "model.layers.1."
    assert shapes[f"{layer}self_attn.q_proj.weight"] == [32, 64]
    assert shapes[f"{layer}self_attn.k_proj.weight"] == [16, 64]
    assert shapes[f"{layer}self_attn.o_proj.weight"] == [64, 32]
    # 96 columns are three blocks of 32: two on the first rank, one and one of zeros on the second.
    assert shapes[f"{layer}mlp.gate_proj.weight"] == [64, 64]
    assert shapes[f"{layer}mlp.down_proj.weight"] == [64, 64]
    assert shapes["lm_head.weight"] == [64, 64]

    bb = relax.BlockBuilder()
    params = [relax.Var(p.name, p.ty) for p in func.params]
    v = {p.name: p for p in params}
    with bb.function("decode_2", params, attrs={"num_input": 13}):
        with bb.dataflow():
            result = by_hand(bb, v)
            out = bb.emit_output(result)
        bb.emit_func_output(out)
    assert_same(tvm.IRModule({"decode_2": func}), bb.finalize())


def by_hand(bb, v):
    lengths = bb.emit(R.add(v["positions"], R.const(1, "int32")))
    constant = relax.const(inv_freq(LlamaConfig(96, 64, 96, 2, 4, 2, 16))[0])
    no_scaling = relax.prim_value(tvm.tirx.IntImm("int64", 0))
    numbers = [relax.prim_value(tvm.tirx.FloatImm("float64", 1.0))] * 2
    x = bb.emit(
        relax.call_dps_packed(
            "shardwright.embed",
            relax.Tuple([v["model.embed_tokens.weight"], v["tokens"], v["rank"]]),
            out_ty=relax.TensorType([2, 64], "float32"),
        )
    )
    rotary = bb.emit(
        relax.call_dps_packed(
            "shardwright.rotary_table",
            relax.Tuple([v["positions"], lengths, constant, *numbers, no_scaling]),
            out_ty=relax.TensorType([2, 2, 8], "float32"),
        )
    )
    x = bb.emit(R.ccl.allreduce(x, "sum", True))
    cache = {
        "pages": [v["k_pages"], v["v_pages"]],
        "where": [v["page_table"], v["rows"], v["positions"]],
    }
    for i in range(2):
        prefix = f"model.layers.{i}."
        layer = {
            name.removeprefix(prefix).removesuffix(".weight"): p
            for name, p in v.items()
            if name.startswith(prefix)
        }
        x = expected_layer(x, layer, rotary, cache, i)
    x = bb.emit(R.nn.rms_norm(x, v["model.norm.weight"], axes=[-1], epsilon=1e-6))
    head = bb.emit(R.permute_dims(v["lm_head.weight"]))
    y = bb.emit(R.permute_dims(bb.emit(R.matmul(x, head, out_dtype="float32")), [1, 0]))
    y = bb.emit(R.ccl.allgather(y, 2, True))
    # 96 rows of the vocabulary are three blocks of 32, so the fourth is padding.
    y = bb.emit(R.take(y, relax.const(np.arange(96, dtype="int32")), axis=0))
    y = bb.emit(R.permute_dims(y, [1, 0]))
    logits = bb.emit(
        relax.call_dps_packed(
            "shardwright.store_logits",
            relax.Tuple([y, v["positions"], v["logits"]]),
            out_ty=v["logits"].ty,
        )
    )
    updated = [v[n] for n in ("scores", "tokens", "positions", "history")]
    sampled = bb.emit(
        relax.call_dps_packed(
            "shardwright.sample",
            relax.Tuple([logits, *updated, *[v[n] for n in ("sampling_f", "sampling_i", "eos")]]),
            out_ty=[x.ty for x in updated],
        )
    )
    items = [bb.emit(relax.TupleGetItem(sampled, i)) for i in range(4)]
    return relax.Tuple([*cache["pages"], logits, *items])


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("ranks", range(1, 17))
def test_every_number_of_ranks_partitions_and_verifies(ranks, kv_heads):
    traced, placements = two_layers(ranks, kv_heads)
    got = partition(traced.mod, placements, ranks)
    verify(got, placements, ranks)
    kinds = [c.kind for c in got.collectives["decode_2"]]
    # The embedding, two for each layer, and the logits.
    assert kinds == ([] if ranks == 1 else ["all-reduce"] * 5 + ["all-gather"])


# Refusals ----------------------------------------------------------------------------------------


def one_op(make):
    bb = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType([4, 8], "float32"))
    with bb.function("main", [x], attrs={"num_input": 1}):
        with bb.dataflow():
            out = bb.emit_output(make(x))
        bb.emit_func_output(out)
    return bb.finalize()


def test_an_operation_without_a_rule_is_refused():
    with pytest.raises(ShardingError, match=r"relax.cumsum has no sharding rule; add one to"):
        partition(one_op(lambda x: R.cumsum(x, axis=1)), {}, 2)


def test_an_unknown_packed_function_is_refused():
    def call(x):
        return relax.call_dps_packed("someone.elses", relax.Tuple([x]), out_ty=x.ty)

    with pytest.raises(ShardingError, match=r"someone\.elses has no sharding rule"):
        partition(one_op(call), {}, 2)


def test_a_weight_is_never_gathered():
    mod = one_op(lambda x: R.add(x, R.const(np.ones((4, 8), "float32"))))
    with pytest.raises(ShardingError, match=r"relax.add: the cut of weight x \(Shard\(1\)\)"):
        partition(mod, {"x": EIGHT.with_dim(1)}, 2)


def test_a_reshape_that_cuts_a_block_does_not_shard():
    mod = one_op(lambda x: R.reshape(x, R.shape([4, 2, 4])))
    # Blocks of 2 in rows of 4: rank 0 would hold half of each row.
    with pytest.raises(ShardingError, match=r"relax\.reshape: the cut of weight x"):
        partition(mod, {"x": Shard(1, 8, 2, even_table(4, 4))}, 4)


def test_a_partial_result_is_refused():
    @I.ir_module
    class Leaks:
        @R.function
        def main(x: R.Tensor((3, 8), "float32"), w: R.Tensor((8, 5), "float32")):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                y = R.matmul(x, w)
                R.output(y)
            return y

    with pytest.raises(ShardingError, match="is Partial; nothing sums it"):
        partition(Leaks, {"x": EIGHT.with_dim(1), "w": EIGHT}, 2)


def test_query_heads_away_from_their_kv_head_are_refused():
    traced, placements = two_layers(2)
    swapped = {
        n: Shard(p.dim, p.size, p.unit, p.table[::-1]) if "q_proj" in n or "o_proj" in n else p
        for n, p in placements.items()
    }
    with pytest.raises(ShardingError, match="query head 2 is on rank 0, its kv head 1 is not"):
        partition(traced.mod, swapped, 2)


def test_an_axis_without_a_rule_is_refused():
    rules = AxisRules(DeviceMesh(("tp",), (2,)), LlamaConfig(96, 64, 96, 2, 4, 2, 16))
    with pytest.raises(ShardingError, match="logical axis 'states' has no rule; add it to"):
        rules.placement((4, 8), ("states", "embed"))


# The verifier does not trust the partitioner -----------------------------------------------------


def without_first_all_reduce(got):
    """The module of `got` with its first all-reduce dropped, its readers reading the summand."""
    func = got.mod["decode_2"]
    bindings = list(func.body.blocks[0].bindings)
    dropped = next(b for b in bindings if is_call(b.value, "relax.ccl.allreduce"))
    bindings.remove(dropped)

    def rename(b):
        if not isinstance(b.value, relax.Call):
            return b
        old, new = dropped.var, dropped.value.args[0]
        args = [new if isinstance(a, relax.Var) and a.same_as(old) else a for a in b.value.args]
        call = relax.Call(b.value.op, args, b.value.attrs, b.value.ty_args)
        return relax.VarBinding(b.var, relax.BlockBuilder().normalize(call))

    block = relax.DataflowBlock([rename(b) for b in bindings])
    return relax.Function(func.params, relax.SeqExpr([block], func.body.body), func.ret_ty)


def is_call(value, name):
    return isinstance(value, relax.Call) and getattr(value.op, "name", "") == name


def test_verify_finds_a_missing_all_reduce():
    traced, placements = two_layers(2)
    got = partition(traced.mod, placements, 2)
    got.mod.update_func(got.mod.get_global_var("decode_2"), without_first_all_reduce(got))
    with pytest.raises(ShardingError, match=r"rms_norm reads .* as Partial\(sum\)"):
        verify(got, placements, 2)


def test_verify_finds_a_wrong_local_shape():
    traced, placements = two_layers(2)
    got = partition(traced.mod, placements, 2)
    with pytest.raises(ShardingError, match=r"elements along dimension 0, its placement"):
        verify(got, two_layers(4)[1], 4)


def test_verify_finds_a_sum_of_a_whole_value():
    mod = one_op(lambda x: R.ccl.allreduce(x, "sum", True))
    with pytest.raises(ShardingError, match="sums a value that is whole already"):
        verify(Partitioned(mod), {}, 2)


# Placements --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", range(1, 17))
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 2), (8, 8), (6, 3), (32, 8), (64, 8), (5, 1)])
def test_head_tables_hold_every_head_beside_its_kv_head(heads, kv_heads, ranks):
    q, kv = head_tables(heads, kv_heads, ranks)
    assert sorted(h for row in q for h in row if h != PAD) == list(range(heads))
    assert {h for row in kv for h in row if h != PAD} == set(range(kv_heads))
    group, local = heads // kv_heads, len(q[0]) // len(kv[0])
    for q_row, kv_row in zip(q, kv, strict=True):
        for i, head in enumerate(q_row):
            assert head == PAD or kv_row[i // local] == head // group


def test_placements_print_as_they_are():
    assert str(Replicate()) == "Replicate" and str(Partial()) == "Partial(sum)"
    assert str(Shard(0, 7, 2, even_table(4, 3))) == "Shard(0)+5 pad"
    assert str(Shard(1, 4, 2, ((1,), (0,)))) == "Shard(1, blocks of 2: 1 | 0)"


def test_experts_are_cut_inside_or_shared_out_whole():
    @I.ir_module
    class Before:
        @R.function
        def main(
            x: R.Tensor((3, 6), "float32"),
            scores: R.Tensor((3, 4), "float32"),
            gate: R.Tensor((4, 8, 6), "float32"),
            up: R.Tensor((4, 8, 6), "float32"),
            down: R.Tensor((4, 6, 8), "float32"),
        ):
            R.func_attr({"num_input": 2})
            with R.dataflow():
                both = R.call_dps_packed(
                    "shardwright.route",
                    (scores, R.prim_value(2), R.prim_value(1)),
                    out_ty=[R.Tensor((3, 2), "int32"), R.Tensor((3, 2), "float32")],
                )
                ids = both[0]
                weights = both[1]
                y = R.call_dps_packed(
                    "shardwright.experts",
                    (x, gate, up, down, ids, weights),
                    out_ty=R.Tensor((3, 6), "float32"),
                )
                z = R.add(x, y)
                R.output(z)
            return z

    @I.ir_module
    class Inside:
        @R.function
        def main(
            x: R.Tensor((3, 6), "float32"),
            scores: R.Tensor((3, 4), "float32"),
            gate: R.Tensor((4, 4, 6), "float32"),
            up: R.Tensor((4, 4, 6), "float32"),
            down: R.Tensor((4, 6, 4), "float32"),
        ):
            R.func_attr({"num_input": 2})
            with R.dataflow():
                both = R.call_dps_packed(
                    "shardwright.route",
                    (scores, R.prim_value(2), R.prim_value(1)),
                    out_ty=[R.Tensor((3, 2), "int32"), R.Tensor((3, 2), "float32")],
                )
                ids = both[0]
                weights = both[1]
                y = R.call_dps_packed(
                    "shardwright.experts",
                    (x, gate, up, down, ids, weights),
                    out_ty=R.Tensor((3, 6), "float32"),
                )
                s = R.ccl.allreduce(y, "sum", True)
                z = R.add(x, s)
                R.output(z)
            return z

    @I.ir_module
    class Whole:
        @R.function
        def main(
            x: R.Tensor((3, 6), "float32"),
            scores: R.Tensor((3, 4), "float32"),
            rank: R.Tensor((1,), "int32"),
            gate: R.Tensor((2, 8, 6), "float32"),
            up: R.Tensor((2, 8, 6), "float32"),
            down: R.Tensor((2, 6, 8), "float32"),
        ):
            R.func_attr({"num_input": 3})
            with R.dataflow():
                both = R.call_dps_packed(
                    "shardwright.route",
                    (scores, R.prim_value(2), R.prim_value(1)),
                    out_ty=[R.Tensor((3, 2), "int32"), R.Tensor((3, 2), "float32")],
                )
                ids = both[0]
                weights = both[1]
                y = R.call_dps_packed(
                    "shardwright.local_experts",
                    (x, gate, up, down, ids, weights, rank),
                    out_ty=R.Tensor((3, 6), "float32"),
                )
                s = R.ccl.allreduce(y, "sum", True)
                z = R.add(x, s)
                R.output(z)
            return z

    inside = {"gate": EIGHT.with_dim(1), "up": EIGHT.with_dim(1), "down": EIGHT.with_dim(2)}
    check(Before, inside, Inside)
    whole = Shard(0, 4, 1, even_table(4, 2))
    check(Before, dict.fromkeys(inside, whole), Whole)
    with pytest.raises(ShardingError, match="experts: the cut of weight gate"):
        partition(Before, inside | {"down": EIGHT.with_dim(1)}, 2)


def test_biases_of_experts_that_are_cut_inside_are_added_by_one_rank():
    """Rank 0 adds what all ranks hold; `biased_split_experts` is told the rank's number."""
    shapes = {"gate": (4, 8, 6), "up": (4, 8, 6), "down": (4, 6, 8)}
    biases = {"gate_bias": (4, 8, 1), "up_bias": (4, 8, 1), "down_bias": (4, 6, 1)}
    routed = {"ids": ((3, 2), "int32"), "weights": ((3, 2), "float32")}

    def module(name, shapes, biases, with_rank, summed):
        def tensor(shape, dtype="float32"):
            return relax.TensorType(shape, dtype)

        params = [relax.Var("x", tensor((3, 6)))]
        params += [relax.Var(n, tensor(*t)) for n, t in routed.items()]
        rank = [relax.Var("rank", tensor((1,), "int32"))] if with_rank else []
        weights = [relax.Var(n, tensor(s)) for n, s in shapes.items()]
        sides = [relax.Var(n, tensor(s)) for n, s in biases.items()]
        bb = relax.BlockBuilder()
        attrs = {"num_input": len(params) + len(rank)}
        with bb.function("main", [*params, *rank, *weights, *sides], attrs=attrs):
            with bb.dataflow():
                args = [params[0], *weights, *params[1:], *sides]
                numbers = [R.prim_value(tvm.tirx.FloatImm("float64", v)) for v in (1.7, 7.0)]
                call = R.call_dps_packed(name, (*args, *numbers, *rank), out_ty=tensor((3, 6)))
                y = bb.emit(call)
                y = bb.emit(R.ccl.allreduce(y, "sum", True)) if summed else y
                out = bb.emit_output(R.add(params[0], y))
            bb.emit_func_output(out)
        return bb.get()

    before = module("shardwright.biased_experts", shapes, biases, False, False)
    cut = {"gate": (4, 4, 6), "up": (4, 4, 6), "down": (4, 6, 4)}
    cut_biases = {"gate_bias": (4, 4, 1), "up_bias": (4, 4, 1), "down_bias": (4, 6, 1)}
    inside = {n: EIGHT.with_dim(1) for n in ("gate", "up", "gate_bias", "up_bias")}
    inside["down"] = EIGHT.with_dim(2)
    check(before, inside, module("shardwright.biased_split_experts", cut, cut_biases, True, True))
    shared = {n: (2, *s[1:]) for n, s in shapes.items()}
    shared_biases = {n: (2, *s[1:]) for n, s in biases.items()}
    whole = dict.fromkeys([*shapes, *biases], Shard(0, 4, 1, even_table(4, 2)))
    expected = module("shardwright.biased_local_experts", shared, shared_biases, True, True)
    check(before, whole, expected)
    with pytest.raises(ShardingError, match="biased_experts: the cut of weight down_bias"):
        partition(before, inside | {"down_bias": Shard(0, 4, 1, even_table(4, 2))}, 2)


def test_sinks_are_cut_with_the_heads():
    def module(heads, kv_heads):
        def tensor(*shape, dtype="float32"):
            return relax.TensorType(shape, dtype)

        cache = tensor(1, 3, kv_heads, 4, 8)
        types = {
            "q": tensor(5, heads, 8), "k_pages": cache, "v_pages": cache,
            "page_table": tensor(2, 3, dtype="int32"), "rows": tensor(5, dtype="int32"),
            "positions": tensor(5, dtype="int32"), "sinks": tensor(heads),
        }  # fmt: skip
        params = [relax.Var(n, t) for n, t in types.items()]
        bb = relax.BlockBuilder()
        with bb.function("main", params, attrs={"num_input": 7}):
            with bb.dataflow():
                numbers = [R.prim_value(v) for v in (0, 1, 0, 0)]
                call = R.call_dps_packed(
                    "shardwright.attention_sinks", (*params, *numbers), out_ty=types["q"]
                )
                out = bb.emit_output(bb.emit(call))
            bb.emit_func_output(out)
        return bb.get()

    q, kv = head_tables(6, 2, 2)
    heads, kv_heads = Shard(1, 6, 1, q), Shard(2, 2, 1, kv)
    cuts = {"q": heads, "k_pages": kv_heads, "v_pages": kv_heads, "sinks": heads.with_dim(0)}
    check(module(6, 2), cuts, module(3, 1))
