"""The pass `early_rows`: Before / Expected, and what must be left alone."""

import tvm
from tvm import relax
from tvm.script import ir as I
from tvm.script import relax as R
from tvm.script import tirx as T

from shardwright.compiler.early_rows import early_rows
from shardwright.compiler.program import partition_program
from shardwright.compiler.propagate import bindings_of
from shardwright.compiler.quantization import quantization
from shardwright.compiler.rules import op_name, operands_of, shape_of
from shardwright.compiler.trace import Limits
from shardwright.model_defs.config import LlamaConfig
from shardwright.model_defs.llama import LlamaForCausalLM


def assert_same(got, expected):
    tidy = relax.transform.CanonicalizeBindings()
    tvm.ir.assert_structural_equal(tidy(got), tidy(expected))


def test_what_only_the_taken_rows_need_is_computed_for_them_alone():
    @I.ir_module
    class Before:
        @R.function
        def main(
            x: R.Tensor(("n", 8), "float16"),
            last: R.Tensor((2,), "int32"),
            w: R.Tensor((8, 8), "float16"),
            scale: R.Tensor((8,), "float16"),
        ):
            n = T.int64()
            R.func_attr({"num_input": 2})
            with R.dataflow():
                early = R.multiply(x, x)  # the residual, which the first product needs as a whole
                mixed = R.call_dps_packed(
                    "shardwright.unknown", (early,), out_ty=R.Tensor((n, 8), "float16")
                )
                normed = R.nn.rms_norm(mixed, scale, axes=[-1], epsilon=1e-5)
                turned = R.permute_dims(w)
                product = R.matmul(normed, turned)
                total = R.add(early, product)
                index = R.maximum(last, R.const(0, "int32"))
                picked = R.take(total, index, axis=0)
                R.output(picked)
            return picked

    @I.ir_module
    class Expected:
        @R.function
        def main(
            x: R.Tensor(("n", 8), "float16"),
            last: R.Tensor((2,), "int32"),
            w: R.Tensor((8, 8), "float16"),
            scale: R.Tensor((8,), "float16"),
        ):
            n = T.int64()
            R.func_attr({"num_input": 2})
            with R.dataflow():
                early = R.multiply(x, x)
                mixed = R.call_dps_packed(
                    "shardwright.unknown", (early,), out_ty=R.Tensor((n, 8), "float16")
                )
                index = R.maximum(last, R.const(0, "int32"))
                few = R.take(mixed, index, axis=0)
                normed = R.nn.rms_norm(few, scale, axes=[-1], epsilon=1e-5)
                turned = R.permute_dims(w)
                product = R.matmul(normed, turned)
                residual = R.take(early, index, axis=0)
                total = R.add(residual, product)
                R.output(total)
            return total

    assert_same(early_rows(Before), Expected)


def test_values_that_something_else_needs_are_left_whole():
    @I.ir_module
    class Read:
        @R.function
        def main(x: R.Tensor(("n", 8), "float16"), last: R.Tensor((2,), "int32")):
            R.func_attr({"num_input": 2})
            with R.dataflow():
                y = R.nn.silu(x)
                picked = R.take(y, last, axis=0)
                out = (y, picked)
                R.output(out)
            return out

    @I.ir_module
    class ByColumn:  # a row of the taken value is a column of what is computed
        @R.function
        def main(x: R.Tensor((8, 4), "float16"), last: R.Tensor((2,), "int32")):
            R.func_attr({"num_input": 2})
            with R.dataflow():
                y = R.permute_dims(x)
                picked = R.take(y, last, axis=0)
                R.output(picked)
            return picked

    for module in (Read, ByColumn):
        assert_same(early_rows(module), module)


def _prefill_products(disable_pass):
    config = LlamaConfig.from_hf(
        dict(
            model_type="llama",
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=64,
            rms_norm_eps=1e-5,
            max_position_embeddings=64,
        )
    )
    scheme = quantization("q0f32")
    model = LlamaForCausalLM(config, scheme.dtype)
    program = partition_program(model, scheme, Limits(32, 3, 16, 16), 2, disable_pass=disable_pass)
    found = []
    for binding in bindings_of(program.mod["prefill"]):
        value = binding.value
        if isinstance(value, relax.Call) and op_name(value) == "shardwright.linear":
            weight = operands_of(value)[1].name.split(".")
            found.append((".".join(weight[2:-1]), shape_of(value)[0]))
    return found


def test_a_prefill_computes_the_end_of_its_last_layer_for_last_tokens_alone():
    few = dict(_prefill_products(())[4:])
    attention = "1.self_attn.q_proj_k_proj_v_proj"
    others = ("1.self_attn.o_proj", "1.mlp.gate_proj_up_proj", "1.mlp.down_proj")
    assert not isinstance(few[attention], int)
    assert [few[name] for name in others] == [3, 3, 3]
    everything = dict(_prefill_products(("early_rows",)))
    assert not any(isinstance(everything[name], int) for name in (attention, *others))
