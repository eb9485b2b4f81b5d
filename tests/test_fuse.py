"""Fusions: Before / Expected for each, and what must be left alone."""

import textwrap

import pytest
import tvm
from tvm import relax
from tvm.script import ir as I
from tvm.script import relax as R
from tvm.script import tirx as T

from shardwright.compiler import fuse, linear
from shardwright.compiler.placement import Replicate
from shardwright.compiler.weights import Source, Weight


def check(fusion, before, expected):
    assert_same(fusion(before), expected)


def assert_same(got, expected):
    # A function's result may be bound to one more name.
    tidy = relax.transform.CanonicalizeBindings()
    tvm.ir.assert_structural_equal(tidy(got), tidy(expected))


def without_unused(mod):
    """The module as the fusions' rewriter leaves one that it does not change."""
    return tvm.IRModule(
        {
            gv: linear.Rewriter(f, lambda *_: None).run(gv.name_hint)
            for gv, f in mod.functions_items()
        }
    )


def test_rotary_append_reads_adjacent_slices_from_their_whole():
    @I.ir_module
    class Before:
        @R.function
        def main(
            qkv: R.Tensor(("n", 32), "float16"),
            table: R.Tensor(("n", 2, 2), "float32"),
            k_pages: R.Tensor((1, 5, 2, 4, 4), "float16"),
            v_pages: R.Tensor((1, 5, 2, 4, 4), "float16"),
            page_table: R.Tensor((1, 5), "int32"),
            rows: R.Tensor(("n",), "int32"),
            positions: R.Tensor(("n",), "int32"),
        ):
            n = T.int64()
            R.func_attr({"num_input": 7})
            with R.dataflow():
                q = R.strided_slice(qkv, [1], [0], [16])
                k = R.strided_slice(qkv, [1], [16], [24])
                v = R.strided_slice(qkv, [1], [24], [32])
                q3 = R.reshape(q, R.shape([n, 4, 4]))
                k3 = R.reshape(k, R.shape([n, 2, 4]))
                v3 = R.reshape(v, R.shape([n, 2, 4]))
                done = R.call_dps_packed(
                    "shardwright.rotary_append",
                    (q3, k3, v3, table, k_pages, v_pages, page_table, rows, positions, 0),
                    out_ty=[
                        R.Tensor((n, 4, 4), "float16"),
                        R.Tensor((1, 5, 2, 4, 4), "float16"),
                        R.Tensor((1, 5, 2, 4, 4), "float16"),
                    ],
                )
                turned = done[0]
                R.output(turned)
            return turned

    @I.ir_module
    class Expected:
        @R.function
        def main(
            qkv: R.Tensor(("n", 32), "float16"),
            table: R.Tensor(("n", 2, 2), "float32"),
            k_pages: R.Tensor((1, 5, 2, 4, 4), "float16"),
            v_pages: R.Tensor((1, 5, 2, 4, 4), "float16"),
            page_table: R.Tensor((1, 5), "int32"),
            rows: R.Tensor(("n",), "int32"),
            positions: R.Tensor(("n",), "int32"),
        ):
            n = T.int64()
            R.func_attr({"num_input": 7})
            with R.dataflow():
                done = R.call_dps_packed(
                    "shardwright.rotary_append_joined",
                    (qkv, table, k_pages, v_pages, page_table, rows, positions, 0),
                    out_ty=[
                        R.Tensor((n, 4, 4), "float16"),
                        R.Tensor((1, 5, 2, 4, 4), "float16"),
                        R.Tensor((1, 5, 2, 4, 4), "float16"),
                    ],
                )
                turned = done[0]
                R.output(turned)
            return turned

    check(fuse.fuse_qkv, Before, Expected)
    source = Before.script()
    assert "(24,), (32,)" in source
    apart = tvm.script.from_source(source.replace("(24,), (32,)", "(0,), (8,)"))
    check(fuse.fuse_qkv, apart, without_unused(apart))


def cached(body: str) -> tvm.IRModule:
    """A function of two layers' attention over a cache of one page each, with `body`."""
    return tvm.script.from_source(f"""
@I.ir_module
class Module:
    @R.function
    def main(
        qkv: R.Tensor((2, 32), "float16"),
        table: R.Tensor((2, 2, 2), "float32"),
        page_table: R.Tensor((2, 1), "int32"),
        rows: R.Tensor((2,), "int32"),
        positions: R.Tensor((2,), "int32"),
        k_pages: R.Tensor((2, 2, 2, 4, 4), "float16"),
        v_pages: R.Tensor((2, 2, 2, 4, 4), "float16"),
    ):
        R.func_attr({{"num_input": 7}})
        with R.dataflow():
{textwrap.indent(textwrap.dedent(body), " " * 12)}
            R.output(out)
        return out
""")


HEADS = 'R.Tensor((2, 4, 4), "float16")'
PAGES = 'R.Tensor((2, 2, 2, 4, 4), "float16")'


def appended(layer, k_pages, v_pages, name="shardwright.rotary_append_joined", masks=""):
    where = f"page_table, rows, positions, {layer}{masks}"
    args = f"(qkv, table, {k_pages}, {v_pages}, {where})"
    return f'R.call_dps_packed("{name}", {args}, out_ty=[{HEADS}, {PAGES}, {PAGES}])'


def attended(layer, q, k_pages, v_pages):
    where = f"page_table, rows, positions, {layer}, T.float64(0.5), 3, T.float64(0.0)"
    args = f"({q}, {k_pages}, {v_pages}, {where})"
    return f'R.call_dps_packed("shardwright.attention", {args}, out_ty={HEADS})'


def test_an_append_joins_the_attention_of_its_tokens():
    before = cached(f"""
        first = {appended(0, "k_pages", "v_pages")}
        q0 = first[0]
        k0 = first[1]
        v0 = first[2]
        a = {attended(0, "q0", "k0", "v0")}
        second = {appended(1, "k0", "v0")}
        q1 = second[0]
        k1 = second[1]
        v1 = second[2]
        b = {attended(1, "q1", "k1", "v1")}
        sum = R.add(a, b)
        out = (sum, k1, v1)
    """)
    masks = ", T.float64(0.5), 3, T.float64(0.0)"
    name = "shardwright.append_attention_joined"
    expected = cached(f"""
        first = {appended(0, "k_pages", "v_pages", name, masks)}
        k0 = first[1]
        v0 = first[2]
        a = first[0]
        second = {appended(1, "k0", "v0", name, masks)}
        k1 = second[1]
        v1 = second[2]
        b = second[0]
        sum = R.add(a, b)
        out = (sum, k1, v1)
    """)
    check(fuse.fuse_append_attention, before, expected)


@pytest.mark.parametrize(
    ("layer", "k_pages", "rest"),
    [
        (1, "k0", ""),  # of another layer
        (0, "k_pages", ""),  # from before the append
        (0, "k0", "twice = R.add(q0, a)"),  # the turned queries are needed elsewhere
    ],
)
def test_an_attention_to_something_else_stays_apart(layer, k_pages, rest):
    module = cached(f"""
        first = {appended(0, "k_pages", "v_pages")}
        q0 = first[0]
        k0 = first[1]
        v0 = first[2]
        a = {attended(layer, "q0", k_pages, "v0")}
        {rest or "twice = a"}
        out = (twice, k0, v0)
    """)
    check(fuse.fuse_append_attention, module, without_unused(module))


def test_a_sum_and_its_norm_become_one_operation():
    @I.ir_module
    class Before:
        @R.function
        def main(
            x: R.Tensor(("n", 8), "float16"),
            y: R.Tensor(("n", 8), "float16"),
            w: R.Tensor((8,), "float16"),
        ):
            R.func_attr({"num_input": 2})
            with R.dataflow():
                z = R.ccl.allreduce(y, "sum", True)
                s = R.add(x, z)
                h = R.nn.rms_norm(s, w, axes=[-1], epsilon=0.5)
                g = R.nn.silu(h)
                t = R.add(s, g)
                R.output(t)
            return t

    @I.ir_module
    class Expected:
        @R.function
        def main(
            x: R.Tensor(("n", 8), "float16"),
            y: R.Tensor(("n", 8), "float16"),
            w: R.Tensor((8,), "float16"),
        ):
            n = T.int64()
            R.func_attr({"num_input": 2})
            with R.dataflow():
                z = R.ccl.allreduce(y, "sum", True)
                both = R.call_dps_packed(
                    "shardwright.add_rms_norm",
                    (x, z, w, T.float64(0.5)),
                    out_ty=[R.Tensor((n, 8), "float16"), R.Tensor((n, 8), "float16")],
                )
                h = both[1]
                s = both[0]
                g = R.nn.silu(h)
                t = R.add(s, g)
                R.output(t)
            return t

    check(fuse.fuse_add_norm, Before, Expected)


def test_the_norm_of_a_broadcast_sum_stays():
    @I.ir_module
    class Before:
        @R.function
        def main(
            x: R.Tensor((3, 8), "float16"),
            bias: R.Tensor((8,), "float16"),
            w: R.Tensor((8,), "float16"),
        ):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                s = R.add(x, bias)
                h = R.nn.rms_norm(s, w, axes=[-1], epsilon=0.5)
                R.output(h)
            return h

    check(fuse.fuse_add_norm, Before, without_unused(Before))


@pytest.mark.parametrize("used_twice", [False, True])
def test_a_gate_joins_its_product(used_twice):
    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor((2, 8), "float16"), w: R.Tensor((12, 8), "float16")):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                y = R.call_dps_packed(
                    "shardwright.linear", (x, w), out_ty=R.Tensor((2, 12), "float16")
                )
                gate = R.strided_slice(y, [1], [0], [6])
                g = R.nn.silu(gate)
                up = R.strided_slice(y, [1], [6], [12])
                z = R.multiply(g, up)
                R.output(z)
            return z

    @I.ir_module
    class Twice:
        @R.function
        def main(x: R.Tensor((2, 8), "float16"), w: R.Tensor((12, 8), "float16")):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                y = R.call_dps_packed(
                    "shardwright.linear", (x, w), out_ty=R.Tensor((2, 12), "float16")
                )
                gate = R.strided_slice(y, [1], [0], [6])
                g = R.nn.silu(gate)
                up = R.strided_slice(y, [1], [6], [12])
                z = R.multiply(g, up)
                t = R.add(z, up)
                R.output(t)
            return t

    @I.ir_module
    class Expected:
        @R.function
        def main(x: R.Tensor((2, 8), "float16"), w: R.Tensor((12, 8), "float16")):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                z = R.call_dps_packed(
                    "shardwright.gated_linear", (x, w), out_ty=R.Tensor((2, 6), "float16")
                )
                R.output(z)
            return z

    if used_twice:
        check(fuse.fuse_silu_mul, Twice, without_unused(Twice))
    else:
        check(fuse.fuse_silu_mul, Before, Expected)


def test_biases_of_joined_linears_are_joined():
    @I.ir_module
    class Before:
        @R.function
        def main(
            x: R.Tensor((2, 8), "float16"),
            q: R.Tensor((4, 8), "float16"),
            q_bias: R.Tensor((4,), "float16"),
            k: R.Tensor((2, 8), "float16"),
            k_bias: R.Tensor((2,), "float16"),
        ):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                a = R.call_dps_packed(
                    "shardwright.linear", (x, q), out_ty=R.Tensor((2, 4), "float16")
                )
                b = R.add(a, q_bias)
                c = R.call_dps_packed(
                    "shardwright.linear", (x, k), out_ty=R.Tensor((2, 2), "float16")
                )
                d = R.add(c, k_bias)
                e = R.concat((b, d), axis=1)
                R.output(e)
            return e

    weights = linear.Weights(
        {
            name: Weight(name, (Source(name, shape, Replicate()),), "float16")
            for name, shape in {"q": (4, 8), "q_bias": (4,), "k": (2, 8), "k_bias": (2,)}.items()
        }
    )
    got = linear.join_linears(Before, weights)
    assert {n: w.local_shape for n, w in weights.table.items()} == {
        "q_k": (6, 8),
        "q_bias_k_bias": (6,),
    }
    assert [p.name for p in got["main"].params] == ["x", "q_k", "q_bias_k_bias"]
    adds = [b for b in got["main"].body.blocks[0].bindings if linear.is_call(b.value, "relax.add")]
    assert len(adds) == 1
