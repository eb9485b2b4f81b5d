"""Decode functions that all-reduce over peer memory, and the exchange of that memory."""

import threading

import numpy as np
import pytest
import tvm
from tvm import relax

from shardwright.compiler.kernels import all_reduce
from shardwright.compiler.peer import PeerState, add_peer_functions, peer_state
from shardwright.compiler.rules import op_name, operands_of
from shardwright.runtime import peer
from shardwright.runtime.collectives import AbortedError

STATE = PeerState(ranks=2, rows=3, features=8)
TYPE = relax.TensorType([3, 8], "float16")


def decode(fused, dtype="float16"):
    """An all-reduce with a residual add and a norm after it, and one without."""
    bb = relax.BlockBuilder()
    kind = relax.TensorType([3, 8], dtype)
    x, y = relax.Var("x", kind), relax.Var("y", kind)
    rank = relax.Var("rank", relax.TensorType([1], "int32"))
    weight = relax.Var("weight", relax.TensorType([8], dtype))
    with bb.function("decode_3", [x, y, rank, weight], attrs={"num_input": 3}):
        with bb.dataflow():
            a = bb.emit(relax.op.ccl.allreduce(x, "sum", True))
            b = bb.emit(relax.op.ccl.allreduce(y, "sum", True))
            if fused:
                eps = relax.prim_value(tvm.tirx.FloatImm("float64", 1e-5))
                args = relax.Tuple([a, b, weight, eps])
                call = relax.call_dps_packed("shardwright.add_rms_norm", args, [kind, kind])
                pair = bb.emit(call)
                results = [bb.emit(relax.TupleGetItem(pair, i)) for i in range(2)]
            else:
                results = [a, b]
            out = bb.emit_output(relax.Tuple(results))
        bb.emit_func_output(out)
    return bb.finalize()


def calls(func):
    return [b.value for b in func.body.blocks[0].bindings if isinstance(b.value, relax.Call)]


def test_a_twin_reduces_over_peer_memory_and_the_function_stays():
    before = decode(fused=True)
    assert peer_state(before, 2, 16) == STATE
    after = add_peer_functions(before, STATE)
    tvm.ir.assert_structural_equal(after["decode_3"], before["decode_3"])
    twin = after["decode_3_peer"]
    assert [p.name for p in twin.params] == ["x", "y", "rank", "peers", "peer_calls", "weight"]
    assert int(twin.attrs["num_input"]) == 5
    plain, fused = calls(twin)
    assert op_name(plain) == "shardwright.peer_all_reduce"
    assert op_name(fused) == "shardwright.peer_all_reduce_add_rms_norm"
    names = [getattr(x, "name", None) for x in operands_of(fused)]
    assert names[1:] == ["y", "weight", "peers", "peer_calls", "rank", None]


def test_all_reduces_without_a_norm_stand_alone():
    twin = add_peer_functions(decode(fused=False), STATE)["decode_3_peer"]
    assert [op_name(c) for c in calls(twin)] == ["shardwright.peer_all_reduce"] * 2


@pytest.mark.parametrize(("ranks", "dtype"), [(1, "float16"), (2, "float32")])
def test_what_does_not_qualify_keeps_its_collectives(ranks, dtype):
    assert peer_state(decode(fused=False, dtype=dtype), ranks, 16) is None


def decode_logits(ranks, local, vocab, dtype="float32"):
    """An all-reduce, and logits of `local` a rank that are gathered, cut to `vocab` and stored."""
    bb = relax.BlockBuilder()
    x = relax.Var("x", TYPE)
    new = relax.Var("new", relax.TensorType([3, local], dtype))
    last = relax.Var("last", relax.TensorType([3], "int32"))
    logits = relax.Var("logits", relax.TensorType([3, vocab], dtype))
    rank = relax.Var("rank", relax.TensorType([1], "int32"))
    with bb.function("decode_3", [x, new, last, logits, rank], attrs={"num_input": 5}):
        with bb.dataflow():
            total = bb.emit(relax.op.ccl.allreduce(x, "sum", True))
            whole = bb.emit(relax.op.permute_dims(new, [1, 0]))
            whole = bb.emit(relax.op.ccl.allgather(whole, ranks, True))
            if vocab != ranks * local:
                ids = relax.const(np.arange(vocab), "int64")
                whole = bb.emit(relax.op.take(whole, ids, axis=0, mode="fast"))
            whole = bb.emit(relax.op.permute_dims(whole, [1, 0]))
            args = relax.Tuple([whole, last, logits])
            stored = bb.emit(
                relax.call_dps_packed("shardwright.store_logits", args, logits.ty), "stored"
            )
            out = bb.emit_output(relax.Tuple([total, stored]))
        bb.emit_func_output(out)
    return bb.finalize()


@pytest.mark.parametrize(("ranks", "local", "vocab"), [(2, 8, 16), (3, 6, 16), (4, 4, 16)])
def test_logits_are_gathered_over_peer_memory(ranks, local, vocab):
    before = decode_logits(ranks, local, vocab)
    state = peer_state(before, ranks, 16)
    assert state == PeerState(ranks=ranks, rows=3, features=8, logits=local)
    # Two halves of sums, then a logit and a flag for each of a row's, then six sums of a row and
    # two of all.
    words = 2 * ranks * 3 * 8 + 2 * ranks * 3 * local
    assert state.sums_at == words
    words += 6 * ranks * 8 // 2
    assert state.several_at == (words, words + ranks * 3 * 8 // 2)
    words += 2 * ranks * 3 * 8 // 2
    assert state.tensors["peer_buffer"] == ((words,), "uint32")
    after = add_peer_functions(before, state)
    tvm.ir.assert_structural_equal(after["decode_3"], before["decode_3"])
    total, stored = calls(after["decode_3_peer"])
    assert op_name(total) == "shardwright.peer_all_reduce"
    assert op_name(stored) == "shardwright.peer_store_logits"
    *tensors, first = operands_of(stored)
    names = ["new", "last", "peers", "peer_calls", "rank", "logits"]
    assert [x.name for x in tensors] == names and first.value == 2 * ranks * 3 * 8


def test_sums_of_several_rows_have_room_for_those_of_the_products():
    one, most, more = (PeerState(ranks=2, rows=rows, features=64) for rows in (1, 16, 64))
    assert one.several_at[1] == one.several_at[0] == one.chunk_at
    for state in (most, more):
        first, second = state.several_at
        assert second - first == 2 * 16 * 64 // 2
        assert state.tensors["peer_buffer"] == ((2 * second - first,), "uint32")


def test_logits_that_do_not_go_in_pairs_keep_their_collective():
    before = decode_logits(2, 7, 14)
    state = peer_state(before, 2, 16)
    assert state.logits == 0 and state.sums_at == 2 * 2 * 3 * 8
    names = [op_name(c) for c in calls(add_peer_functions(before, state)["decode_3_peer"])]
    assert "relax.ccl.allgather" in names and "shardwright.peer_store_logits" not in names


@pytest.mark.parametrize("clusters", [False, True])
@pytest.mark.parametrize("features", [8, 128, 4096, 8192, 12288])
def test_plans_cover_a_row(features, clusters):
    for ranks in (2, 4, 8, 16):
        for tokens in (1, 64):
            p = all_reduce.plan(tokens=tokens, features=features, ranks=ranks, clusters=clusters)
            assert p.parts in ((1, 2, 4, 8) if clusters else (1,)) and p.threads % 32 == 0
            assert p.threads <= 1024 and p.parts * p.threads * 16 >= features // 4
            assert ranks > 2 or not p.two_shots
    assert all_reduce.plan(tokens=64, features=8192, ranks=4, clusters=clusters).two_shots


@pytest.mark.parametrize("clusters", [False, True])
def test_kernels_say_what_they_are_instantiated_for(clusters):
    sizes = {"tokens": 2, "features": 4096, "ranks": 4, "rows": 3, "clusters": clusters}
    parts = "128, 8" if clusters else "1024, 1"
    plain = str(all_reduce.all_reduce(**sizes))
    fused = str(all_reduce.all_reduce_add_rms_norm(**sizes, eps=1e-5))
    assert f"all_reduce<4, 3, 4096, {parts}, false, false>" in plain
    assert f"all_reduce<4, 3, 4096, {parts}, false, true>" in fused
    for text in (plain, fused):
        assert f'in T.thread_binding({8 if clusters else 1}, thread="clusterCtaIdx.x")' in text


def test_functions_of_many_rows_stay_with_nccl(monkeypatch):
    few, many = decode_logits(2, 8, 16)["decode_3"], decode(fused=True)["decode_3"]
    mod = tvm.IRModule({"decode_3": few, "decode_4": many})
    monkeypatch.setattr("shardwright.compiler.peer.MAX_BYTES", 2 * 3 * 8 - 1)
    assert peer_state(mod, 2, 16) is None
    monkeypatch.setattr("shardwright.compiler.peer.MAX_BYTES", 2 * 3 * 8)
    names = {gv.name_hint for gv in add_peer_functions(mod, STATE).get_global_vars()}
    assert names == {"decode_3", "decode_4", "decode_3_peer", "decode_4_peer"}


def with_prefill(decode_mod):
    """And a prefill of any number of rows: an all-reduce, one with a norm, and one of few rows."""
    bb = relax.BlockBuilder()
    n = tvm.tirx.Var("n", "int64")
    kind = relax.TensorType([n, 8], "float16")
    x, y = relax.Var("x", kind), relax.Var("y", kind)
    last = relax.Var("last", TYPE)
    rank = relax.Var("rank", relax.TensorType([1], "int32"))
    weight = relax.Var("weight", relax.TensorType([8], "float16"))
    with bb.function("prefill", [x, y, last, rank, weight], attrs={"num_input": 4}):
        with bb.dataflow():
            embedded = bb.emit(relax.op.ccl.allreduce(x, "sum", True))
            reduced = bb.emit(relax.op.ccl.allreduce(y, "sum", True))
            eps = relax.prim_value(tvm.tirx.FloatImm("float64", 1e-5))
            args = relax.Tuple([embedded, reduced, weight, eps])
            pair = bb.emit(relax.call_dps_packed("shardwright.add_rms_norm", args, [kind, kind]))
            few = bb.emit(relax.op.ccl.allreduce(last, "sum", True))
            results = [bb.emit(relax.TupleGetItem(pair, i)) for i in range(2)]
            out = bb.emit_output(relax.Tuple([*results, few]))
        bb.emit_func_output(out)
    func = bb.finalize()["prefill"]
    return tvm.IRModule({**dict(decode_mod.functions_items()), relax.GlobalVar("prefill"): func})


def test_a_prefill_has_a_twin_whose_all_reduces_are_of_many_rows():
    before = with_prefill(decode(fused=True))
    state = peer_state(before, 2, 16)
    assert state == PeerState(ranks=2, rows=3, features=8, chunk=16)
    tensors = state.tensors
    assert tensors["peer_chunk_calls"] == ((16,), "int32")
    first = 4 * state.chunk_at
    assert first % 256 == 0 and first >= 4 * (2 * 2 * 3 * 8 + 2 * 2 * 8)
    # Two halves of what the other rank sends, then flags.
    assert 4 * tensors["peer_buffer"][0][0] == first + 2 * 16 * 8 * 2 + 2 * 16 * 3 * 4
    after = add_peer_functions(before, state)
    tvm.ir.assert_structural_equal(after["prefill"], before["prefill"])
    twin = after["prefill_peer"]
    names = ["x", "y", "last", "rank", "peers", "peer_calls", "peer_chunk_calls", "weight"]
    assert [p.name for p in twin.params] == names and int(twin.attrs["num_input"]) == 7
    embedded, fused, few = calls(twin)
    assert op_name(embedded) == "shardwright.peer_all_reduce_many"
    assert op_name(fused) == "shardwright.peer_all_reduce_many_add_rms_norm"
    assert op_name(few) == "shardwright.peer_all_reduce"
    assert [x.name for x in operands_of(embedded)[:-1]] == [
        "x",
        "peers",
        "peer_chunk_calls",
        "rank",
    ]
    assert operands_of(few)[2].name == "peer_calls"
    assert operands_of(embedded)[-1].value == operands_of(fused)[-1].value == first


def test_a_prefill_of_other_rows_keeps_its_collectives():
    decode_mod = decode_logits(2, 8, 16)
    narrow = with_prefill(decode_mod)
    assert peer_state(narrow, 2, 16).chunk == 16
    plain = PeerState(ranks=2, rows=3, features=8)
    names = {gv.name_hint for gv in add_peer_functions(narrow, plain).get_global_vars()}
    assert names == {"decode_3", "decode_3_peer", "prefill"}


def test_kernels_of_many_rows_say_what_they_are_instantiated_for():
    sizes = {"features": 4096, "ranks": 4, "rows": 48, "first": 256}
    plain = str(all_reduce.all_reduce_many(**sizes))
    fused = str(all_reduce.all_reduce_many_add_rms_norm(**sizes, eps=1e-5))
    assert "all_reduce_many<4, 48, 4096, 256, true, shardwright::peer::kNone, 256>" in plain
    assert "all_reduce_many<4, 48, 4096, 256, true, shardwright::peer::kPlain, 256>" in fused
    image = str(all_reduce.all_reduce_many_add_rms_norm(**sizes, eps=1e-5, image=True))
    assert "all_reduce_many<4, 48, 4096, 128, true, shardwright::peer::kImage, 256>" in image
    two = str(all_reduce.all_reduce_many(**sizes | {"ranks": 2, "features": 264}))
    assert "all_reduce_many<2, 48, 264, 64, false, shardwright::peer::kNone, 256>" in two


class Cuda:
    """CUDA IPC of several ranks in one process: an address is its own handle."""

    def __init__(self, refuse=False):
        self.refuse, self.closed = refuse, []

    def cudaHostAlloc(self, pointer, size, flags):
        self.word = bytearray(4)
        buffer = (peer.ctypes.c_char * 4).from_buffer(self.word)
        pointer._obj.value = peer.ctypes.addressof(buffer)
        return 0

    def cudaIpcGetMemHandle(self, handle, address):
        handle._obj.reserved = str(address.value).encode()
        return 0

    def cudaIpcOpenMemHandle(self, pointer, handle, flags):
        pointer._obj.value = int(handle.reserved) + 1
        return int(self.refuse)

    def cudaIpcCloseMemHandle(self, address):
        self.closed.append(address.value)

    def cudaGetLastError(self):
        return 0


def connect(folder, monkeypatch, cudas):
    found = {}
    lock = threading.local()
    monkeypatch.setattr(peer, "cudart", lambda: cudas[lock.rank])

    def run(rank):
        lock.rank = rank
        found[rank] = peer.PeerMemory(folder, rank, len(cudas), 1000 * (rank + 1), lambda: False)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(cudas))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[rank] for rank in range(len(cudas))]


def test_ranks_exchange_their_memory(tmp_path, monkeypatch):
    cudas = [Cuda() for _ in range(3)]
    memories = connect(tmp_path, monkeypatch, cudas)
    assert memories[1].addresses[:3] == [1001, 2000, 3001]
    memories[1].abort()
    assert cudas[1].word == b"\x01\0\0\0" and cudas[0].word == bytes(4)
    memories[1].close()
    assert cudas[1].closed == [1001, 3001]


def test_one_rank_that_cannot_map_turns_all_to_nccl(tmp_path, monkeypatch):
    memories = connect(tmp_path, monkeypatch, [Cuda(), Cuda(refuse=True), Cuda()])
    assert [memory.addresses for memory in memories] == [None] * 3


def test_the_exchange_ends_when_a_rank_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(peer, "cudart", Cuda)
    with pytest.raises(AbortedError):
        peer.PeerMemory(tmp_path, 0, 2, 1000, lambda: True)
