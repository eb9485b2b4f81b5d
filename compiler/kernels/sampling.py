# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-redef"
# (TVMScript is parsed, never run, so it has no Python types.)
"""The sampler: from a row's logits to its next token, in one kernel.

Filters run in the order of Hugging Face's logits processors. Top-k and top-p need no sort: their
thresholds are found bit by bit on the floats' order-preserving integer keys. The draw is the
exponential race (Gumbel-max): each candidate's clock is a hash of (seed, position, token) over its
weight, and the first to ring wins, so every rank draws the same token and there is no scan.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from .common import (
    SCHEDULED,
    extent,
    for_blocks,
    for_threads,
    is_gpu,
    launch_dependents,
    max_threads_of,
    shuffle_xor,
    wait_for_inputs,
    warp_size_of,
)

LOWEST = -3.0e38  # logits are clamped to finite numbers at this; NaN and below become -infinity
MASK32 = 0xFFFFFFFF
BATCH = 8  # scores that a thread reads at once


def sample(*, batch: int | None, vocab: int, max_len: int, target: Any) -> tirx.PrimFunc:
    """Choose each active row's next token and advance the row.

    `(logits [b,V] f32, scores [b,V] f32, tokens [b] i32, positions [b] i32, history [b,M] i32,
    sampling_f [b,4] f32, sampling_i [b,8] i32, eos [b,16] i32)`; `scores` (scratch), `tokens`,
    `positions` and `history` are written in place, nothing is returned.

    `sampling_f`: temperature (0 is greedy), top_p, repetition_penalty. `sampling_i`: top_k (0 is
    off), no_repeat_ngram_size (0 is off), min_new_tokens, prompt_len, seed (two words). A row with
    position -1, or whose history is full, is left alone. Ties are won by the lowest token id;
    NaN counts as minus infinity.
    """
    gpu = is_gpu(target)
    b = extent(batch, "b")
    warp = warp_size_of(target)
    threads = max_threads_of(target)
    warps = threads // warp
    batches = -(-vocab // (BATCH * threads))
    # A CPU row is one serial sum; in float32 it would lose the small weights.
    mass_type = "float32" if gpu else "float64"
    # LLVM code assumes that unsigned integers do not overflow, so there the hash has spare bits.
    hash_type = "uint32" if gpu else "uint64"
    shared = "shared" if gpu else "local"

    @T.inline
    def barrier():
        if gpu:
            T.tvm_storage_sync("shared")

    @T.inline
    def block_sum(value, scratch, tid):
        if gpu:
            for s in T.unroll(warp.bit_length() - 1):
                value = value + shuffle_xor(value, T.shift_right(warp // 2, s), warp)
            T.tvm_storage_sync("shared")
            if tid % warp == 0:
                scratch[tid // warp] = value
            T.tvm_storage_sync("shared")
            value = scratch[tid % warps]
            for s in T.unroll(warps.bit_length() - 1):
                value = value + shuffle_xor(value, T.shift_right(warps // 2, s), warp)

    @T.inline
    def read(values, source, r, i, tid, fill):
        # Independent loads, so that their latencies overlap; `fill` past the end of the row.
        for u in T.unroll(BATCH):
            if i * (BATCH * threads) + u * threads + tid < vocab:
                values[u] = source[r, i * (BATCH * threads) + u * threads + tid]
            else:
                values[u] = fill

    @T.inline
    def keep_larger(best, index, other, other_index):
        if other > best or (other == best and other_index < index):
            best = other
            index = other_index

    @T.inline
    def block_argmax(best, index, scratch, scratch_index, tid):
        if gpu:
            for s in T.unroll(warp.bit_length() - 1):
                other: T.let[T.float32] = shuffle_xor(best, T.shift_right(warp // 2, s), warp)
                at: T.let[T.int32] = shuffle_xor(index, T.shift_right(warp // 2, s), warp)
                keep_larger(best, index, other, at)
            T.tvm_storage_sync("shared")
            if tid % warp == 0:
                scratch[tid // warp] = best
                scratch_index[tid // warp] = index
            T.tvm_storage_sync("shared")
            best = scratch[tid % warps]
            index = scratch_index[tid % warps]
            for s in T.unroll(warps.bit_length() - 1):
                other: T.let[T.float32] = shuffle_xor(best, T.shift_right(warps // 2, s), warp)
                at: T.let[T.int32] = shuffle_xor(index, T.shift_right(warps // 2, s), warp)
                keep_larger(best, index, other, at)

    @T.inline
    def float_key(key, value):
        key = T.reinterpret("uint32", value)
        if key >= T.uint32(0x80000000):
            key = T.bitwise_not(key)
        else:
            key = key + T.uint32(0x80000000)

    def const(value: int) -> Any:
        return tirx.const(value, hash_type)

    @T.inline
    def scramble(h):
        # "lowbias32" by Chris Wellons.
        h = T.bitwise_xor(h, T.shift_right(h, const(16)))
        h = T.bitwise_and(h * const(0x7FEB352D), const(MASK32))
        h = T.bitwise_xor(h, T.shift_right(h, const(15)))
        h = T.bitwise_and(h * const(0x846CA68B), const(MASK32))
        h = T.bitwise_xor(h, T.shift_right(h, const(16)))

    @T.inline
    def word(h, value):
        # Absorb a 32-bit integer into the hash.
        h = T.bitwise_xor(h, T.cast(T.cast(value, "uint32"), hash_type))
        h = T.bitwise_and(h + const(0x9E3779B9), const(MASK32))
        scramble(h)

    @T.inline
    def filter_tokens(r, tid, position, logits, scores, history, sampling_f, sampling_i, eos):
        values = T.alloc_buffer((BATCH,), "float32", scope="local")
        for i in T.serial(batches):
            read(values, logits, r, i, tid, T.float32(0))
            for u in T.unroll(BATCH):
                if i * (BATCH * threads) + u * threads + tid < vocab:
                    scores[r, i * (BATCH * threads) + u * threads + tid] = T.if_then_else(
                        values[u] >= T.float32(LOWEST),
                        T.min(values[u], T.float32(-LOWEST)),
                        -T.infinity("float32"),
                    )
        barrier()
        penalty: T.let[T.float32] = sampling_f[r, 2]
        if penalty != T.float32(1):
            # Computed from the logits, so a token that occurs twice is penalised once.
            for i in T.serial((position + threads - tid) // threads):
                token: T.let[T.int32] = history[r, tid + i * threads]
                if token >= 0 and token < vocab:
                    x: T.let[T.float32] = logits[r, token]
                    if x >= T.float32(LOWEST):
                        scores[r, token] = T.min(
                            T.if_then_else(x > T.float32(0), x / penalty, x * penalty),
                            T.float32(-LOWEST),
                        )
        barrier()
        ngram: T.let[T.int32] = sampling_i[r, 1]
        if ngram > 0 and position + 1 >= ngram:
            for i in T.serial((position + 1 - ngram + threads - tid) // threads):
                matches: T.int32 = 1
                for g in T.serial(ngram - 1):
                    if history[r, tid + i * threads + g] != history[r, position + 2 - ngram + g]:
                        matches = 0
                if matches == 1:
                    token: T.let[T.int32] = history[r, tid + i * threads + ngram - 1]
                    if token >= 0 and token < vocab:
                        scores[r, token] = -T.infinity("float32")
        if position + 1 - sampling_i[r, 3] < sampling_i[r, 2]:
            for i in T.serial((16 + threads - 1 - tid) // threads):
                token: T.let[T.int32] = eos[r, tid + i * threads]
                if token >= 0 and token < vocab:
                    scores[r, token] = -T.infinity("float32")
        barrier()

    @T.inline
    def top_k_threshold(threshold, r, tid, k, scores, scratch):
        # The largest key that at least k scores reach, two bits a pass: the passes are bound by
        # reading the scores.
        counts = T.alloc_buffer((3,), "int32", scope="local")
        values = T.alloc_buffer((BATCH,), "float32", scope="local")
        for step in T.serial(16):
            unit: T.let[T.uint32] = T.shift_left(T.uint32(1), T.cast(30 - 2 * step, "uint32"))
            for c in T.unroll(3):
                counts[c] = 0
            for i in T.serial(batches):
                # Minus infinity is never chosen, so it does no harm to count what is past the end.
                read(values, scores, r, i, tid, -T.infinity("float32"))
                for u in T.unroll(BATCH):
                    key: T.uint32 = T.uint32(0)
                    float_key(key, values[u])
                    for c in T.unroll(3):
                        if key >= T.bitwise_or(threshold, unit * T.cast(c + 1, "uint32")):
                            counts[c] = counts[c] + 1
            digit: T.uint32 = T.uint32(0)
            for c in T.unroll(3):
                count: T.int32 = counts[c]
                block_sum(count, scratch, tid)
                if count >= k:
                    digit = T.cast(c + 1, "uint32")
            threshold = T.bitwise_or(threshold, unit * digit)

    @T.inline
    def top_p_threshold(threshold, r, tid, top_p, weights, scratch):
        # The largest weight such that those that reach it hold top_p of the mass. Weights are in
        # [0, 1], so their bits are their order and the two highest bits are zero.
        masses = T.alloc_buffer((3,), mass_type, scope="local")
        values = T.alloc_buffer((BATCH,), "float32", scope="local")
        mass = T.local_scalar(mass_type)
        mass = T.cast(0, mass_type)
        for i in T.serial(batches):
            read(values, weights, r, i, tid, T.float32(0))
            for u in T.unroll(BATCH):
                mass = mass + T.cast(values[u], mass_type)
        block_sum(mass, scratch, tid)
        wanted = T.local_scalar(mass_type)
        wanted = mass * T.cast(top_p, mass_type)
        for step in T.serial(15):
            unit: T.let[T.uint32] = T.shift_left(T.uint32(1), T.cast(28 - 2 * step, "uint32"))
            for c in T.unroll(3):
                masses[c] = T.cast(0, mass_type)
            for i in T.serial(batches):
                read(values, weights, r, i, tid, T.float32(0))
                for u in T.unroll(BATCH):
                    for c in T.unroll(3):
                        if T.reinterpret("uint32", values[u]) >= T.bitwise_or(
                            threshold, unit * T.cast(c + 1, "uint32")
                        ):
                            masses[c] = masses[c] + T.cast(values[u], mass_type)
            digit: T.uint32 = T.uint32(0)
            for c in T.unroll(3):
                mass = masses[c]
                block_sum(mass, scratch, tid)
                if mass >= wanted:
                    digit = T.cast(c + 1, "uint32")
            threshold = T.bitwise_or(threshold, unit * digit)

    @T.inline
    def draw(winner, threshold, r, tid, position, sampling_i, weights, scratch, scratch_index):
        seed = T.local_scalar(hash_type)
        seed = const(0)
        word(seed, sampling_i[r, 4])
        word(seed, sampling_i[r, 5])
        word(seed, position)
        # The earliest ring of all clocks, as the largest of minus the time.
        best: T.float32 = -T.infinity("float32")
        index: T.int32 = winner
        values = T.alloc_buffer((BATCH,), "float32", scope="local")
        for i in T.serial(batches):
            read(values, weights, r, i, tid, T.float32(0))
            for j in T.unroll(BATCH):
                if values[j] > T.float32(0) and T.reinterpret("uint32", values[j]) >= threshold:
                    token = T.meta_var(i * (BATCH * threads) + j * threads + tid)
                    h = T.local_scalar(hash_type)
                    h = seed
                    word(h, token)
                    u: T.float32 = T.min(
                        (T.cast(T.cast(h, "uint32"), "float32") + T.float32(0.5))
                        * T.float32(2.0**-32),
                        T.float32(1 - 2.0**-24),
                    )
                    # A time is at least u, so most tokens lose without a logarithm.
                    if u <= -best * values[j] * T.float32(1.001):
                        # -log(1 - u), by its series where 1 - u would round: small times win, so
                        # they must be fine-grained.
                        time: T.float32 = u * (
                            T.float32(1) + u * (T.float32(0.5) + u * T.float32(1 / 3))
                        )
                        if u >= T.float32(0.01):
                            time = -T.log(T.float32(1) - u)
                        time = -time / values[j]
                        keep_larger(best, index, time, token)
        block_argmax(best, index, scratch, scratch_index, tid)
        winner = index

    @T.prim_func(s_tir=True)
    def sample_rows(
        logits_h: T.handle,
        scores_h: T.handle,
        tokens_h: T.handle,
        positions_h: T.handle,
        history_h: T.handle,
        sampling_f_h: T.handle,
        sampling_i_h: T.handle,
        eos_h: T.handle,
    ):
        T.func_attr(SCHEDULED)
        logits = T.match_buffer(logits_h, (b, vocab), "float32")
        scores = T.match_buffer(scores_h, (b, vocab), "float32")
        tokens = T.match_buffer(tokens_h, (b,), "int32")
        positions = T.match_buffer(positions_h, (b,), "int32")
        history = T.match_buffer(history_h, (b, max_len), "int32")
        sampling_f = T.match_buffer(sampling_f_h, (b, 4), "float32")
        sampling_i = T.match_buffer(sampling_i_h, (b, 8), "int32")
        eos = T.match_buffer(eos_h, (b, 16), "int32")
        with T.sblock("root"):
            T.reads()
            T.writes()
            for r in for_blocks(b, gpu):
                for tid in for_threads(threads, gpu):
                    launch_dependents(target)
                    wait_for_inputs(target)
                    scratch = T.alloc_buffer((warps,), "float32", scope=shared)
                    scratch_int = T.alloc_buffer((warps,), "int32", scope=shared)
                    position: T.int32 = positions[r]
                    if position >= 0 and position + 1 < max_len:
                        filter_tokens(
                            r, tid, position, logits, scores, history, sampling_f, sampling_i, eos
                        )
                        highest: T.float32 = -T.infinity("float32")
                        winner: T.int32 = T.int32(0x7FFFFFFF)
                        values = T.alloc_buffer((BATCH,), "float32", scope="local")
                        for i in T.serial(batches):
                            read(values, scores, r, i, tid, -T.infinity("float32"))
                            for u in T.unroll(BATCH):
                                keep_larger(
                                    highest,
                                    winner,
                                    values[u],
                                    i * (BATCH * threads) + u * threads + tid,
                                )
                        block_argmax(highest, winner, scratch, scratch_int, tid)
                        temperature: T.let[T.float32] = sampling_f[r, 0]
                        if temperature > T.float32(0) and highest >= T.float32(LOWEST):
                            threshold: T.uint32 = T.uint32(0)
                            top_k: T.let[T.int32] = sampling_i[r, 0]
                            if top_k > 0 and top_k < vocab:
                                top_k_threshold(threshold, r, tid, top_k, scores, scratch_int)
                            for i in T.serial(batches):
                                read(values, scores, r, i, tid, T.float32(0))
                                for u in T.unroll(BATCH):
                                    at = T.meta_var(i * (BATCH * threads) + u * threads + tid)
                                    if at < vocab:
                                        key: T.uint32 = T.uint32(0)
                                        float_key(key, values[u])
                                        scores[r, at] = T.if_then_else(
                                            key >= threshold,
                                            T.exp((values[u] - highest) / temperature),
                                            T.float32(0),
                                        )
                            threshold = T.uint32(0)
                            top_p: T.let[T.float32] = sampling_f[r, 1]
                            if top_p < T.float32(1):
                                top_p_threshold(threshold, r, tid, top_p, scores, scratch)
                            draw(
                                winner,
                                threshold,
                                r,
                                tid,
                                position,
                                sampling_i,
                                scores,
                                scratch,
                                scratch_int,
                            )
                        if tid == 0:
                            history[r, position + 1] = winner
                            tokens[r] = winner
                            positions[r] = position + 1

    return sample_rows


def store_logits(*, batch: int | None, vocab: int, target: Any) -> tirx.PrimFunc:
    """Keep the new logits of the rows that have some.

    `(new [b,V] f32, last [b] i32, logits [b,V] f32)`; `logits[r] = new[r]` in place for the rows
    with `last[r] >= 0`.
    """
    gpu = is_gpu(target)
    b = extent(batch, "b")
    threads = 256 if gpu else 1
    per_block = 1024 if gpu else vocab
    blocks = -(-vocab // per_block)

    @T.prim_func(s_tir=True)
    def store_logits(new_h: T.handle, last_h: T.handle, logits_h: T.handle):
        T.func_attr(SCHEDULED)
        new = T.match_buffer(new_h, (b, vocab), "float32")
        last = T.match_buffer(last_h, (b,), "int32")
        logits = T.match_buffer(logits_h, (b, vocab), "float32")
        with T.sblock("root"):
            T.reads()
            T.writes()
            for rb in for_blocks(b * blocks, gpu):
                for tid in for_threads(threads, gpu):
                    launch_dependents(target)
                    wait_for_inputs(target)
                    if last[rb // blocks] >= 0:
                        for i in T.serial(per_block // threads):
                            at: T.let[T.int32] = (
                                T.cast(rb % blocks, "int32") * per_block + i * threads + tid
                            )
                            if at < vocab:
                                logits[rb // blocks, at] = new[rb // blocks, at]

    return store_logits
