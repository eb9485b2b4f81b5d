"""Memory and speed of a model before it is built: what `shardwright plan` prints.

Sizes come from the program that a build would compile: its weights and state as the partitioner
places them, its collectives, and the workspace that TVM's planner finds. Only the depth is cut
short to plan the workspace, which all layers share.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import tvm
from tvm import relax

from shardwright.compiler.build import Progress
from shardwright.compiler.checkpoint import Checkpoint
from shardwright.compiler.cuda import cuda_target
from shardwright.compiler.library import plan_workspace
from shardwright.compiler.options import MAX_RANKS, PAGE_SIZE, BuildOptions, limits_of
from shardwright.compiler.peer import peer_state
from shardwright.compiler.placement import local_shape
from shardwright.compiler.program import Program, partition_program
from shardwright.compiler.propagate import bindings_of
from shardwright.compiler.rules import op_name, operands_of
from shardwright.compiler.scheme import Scheme, model_config, scheme_of
from shardwright.compiler.trace import Limits, StateSpec, state_specs
from shardwright.errors import UsageError
from shardwright.model_defs import family_of
from shardwright.runtime.memory import (
    CACHE,
    CONTEXT,
    RankMemory,
    count_bytes,
    on_device,
    reserved_bytes,
)

_WORKSPACE_LAYERS = 4  # the last is not like the others: see early_rows.py

# Set by the steps of one row in docs/h200-batch-1.json; scripts/plan_accuracy.py compares.
EFFICIENCY = 1.09
"""Speed at which decode kernels read plain weights and the cache, over that of a copy."""

PACKED_EFFICIENCY = 1.01
"""The same of quantized weights."""

LAYER_SECONDS = 7e-6
"""A layer's share of a step that no bandwidth shortens: small kernels, starts."""

PACKED_LAYER_SECONDS = 2e-6
"""What a layer of quantized weights takes beyond it."""

RANK_SECONDS = 0.5e-6
"""By how much each rank after the second makes the smallest collective longer."""


@dataclass(frozen=True)
class Machine:
    """A GPU and its links: bytes, bytes per second, seconds of the smallest collective of two.

    `bandwidth` is that of a large copy within its memory, bytes read and written both counted.
    """

    memory: int
    bandwidth: float | None = None
    link: float = 25e9
    latency: float = 6e-6


@dataclass(frozen=True)
class Estimate:
    """One model on `ranks` GPUs; all sizes are bytes of one rank."""

    ranks: int
    kind: str
    layers: int
    weights: int
    read: int
    """Of the weights, what a step reads: of an embedding it looks up a row."""
    workspace: int
    state: tuple[tuple[StateSpec, tuple[int, ...]], ...]
    """Each state tensor for one row of one page, and its local shape."""
    fixed: int
    """Tensors whose size depends neither on rows nor on their length."""
    collectives: tuple[tuple[str, int], ...]
    """Kind and bytes of every collective of a step of one row."""
    packed: int = 0
    """Of `read`, quantized weights."""
    experts: int = 0
    """Of `read`, the experts, of which a token takes some."""
    chosen: float = 1.0
    """Share of the experts that a token takes."""
    whole_experts: int = 0
    """Experts of a layer where each rank has whole ones; 0 where it has a part of each."""

    def memory(self, batch: int, length: int) -> RankMemory:
        """What a rank takes when it is built for `batch` rows of `length` tokens."""
        pages = -(-length // PAGE_SIZE)
        cache: list[int] = []
        rest = [self.fixed, 4 * batch]  # the last: which of a chunk's tokens are last
        for spec, shape in self.state:
            if spec.name in ("k_pages", "v_pages"):
                shape = (shape[0], pages * batch, *shape[2:])
            elif spec.name == "page_table":
                shape = (batch, pages)
            elif spec.name == "history":
                shape = (batch, length)
            else:
                shape = (batch, *shape[1:])
            (cache if spec.name in CACHE else rest).append(count_bytes(shape, spec.dtype))
        return RankMemory(
            weights=self.weights,
            cache=on_device(cache, self.kind),
            workspace=self.workspace,
            state=on_device(rest, self.kind),
            reserved=reserved_bytes(self.kind, self.ranks),
        )

    @property
    def token_bytes(self) -> float:
        """Bytes of the cache that one token of one row takes."""
        pages = [(s, shape) for s, shape in self.state if s.name in ("k_pages", "v_pages")]
        return sum(count_bytes(shape, s.dtype) / (shape[1] * shape[3]) for s, shape in pages)

    def tokens(self, memory: int, batch: int) -> int:
        """Tokens of all rows together for which the cache has room in `memory` bytes."""
        rest = replace(self.memory(batch, PAGE_SIZE), cache=0).total
        return max(0, int((memory - rest) / self.token_bytes))

    def seconds(self, machine: Machine, batch: int, context: int) -> float:
        """Predicted seconds of a decode step of `batch` rows with `context` tokens each."""
        assert machine.bandwidth is not None
        read = self.read - self.experts * (1 - self._experts_read(batch))
        packed = self.packed / self.read if self.read else 0.0
        slower = 1 + packed * (EFFICIENCY / PACKED_EFFICIENCY - 1)
        read = read * slower + batch * context * self.token_bytes
        total = read / (machine.bandwidth * EFFICIENCY) + self.layers * LAYER_SECONDS
        total += self.layers * PACKED_LAYER_SECONDS if self.packed else 0.0
        for kind, nbytes in self.collectives:
            # A ring sends what all-reduce sums twice around, what all-gather collects once.
            rounds = 2 if kind == "all-reduce" else 1
            sent = rounds * (self.ranks - 1) / self.ranks * nbytes * batch
            latency = machine.latency + RANK_SECONDS * max(self.ranks - 2, 0)
            total += latency + sent / machine.link
        return total

    def _experts_read(self, batch: int) -> float:
        """Share of a rank's experts that `batch` rows take, of the rank where it is largest."""
        # Rows choose independently, so together they take less than the sum.
        taken = 1 - (1 - self.chosen) ** batch
        if not self.whole_experts:
            return taken
        each = -(-self.whole_experts // self.ranks)
        return busiest(round(taken * self.whole_experts), self.ranks, each) / each


def busiest(taken: int, ranks: int, each: int) -> float:
    """Expected most of `taken` experts that one rank has, of `ranks` with `each` experts.

    Every choice of so many experts is as likely as any other.
    """
    expected = 0.0
    for limit in range(min(taken, each)):
        # ways[n]: to choose n experts, no more than `limit` of any rank.
        ways = [1]
        for _ in range(ranks):
            one = [math.comb(each, k) for k in range(limit + 1)]
            ways = [
                sum(ways[n - k] * one[k] for k in range(limit + 1) if 0 <= n - k < len(ways))
                for n in range(min(len(ways) + limit, taken + 1))
            ]
        none_more = ways[taken] if taken < len(ways) else 0
        expected += 1 - none_more / math.comb(ranks * each, taken)
    return expected


def estimates(
    options: BuildOptions, ranks: Iterable[int], progress: Progress
) -> tuple[list[Estimate], int]:
    """An estimate for each number of ranks, and the tokens of a row.

    Raises UsageError for options that do not fit, and what a build raises before it compiles.
    """
    checkpoint = Checkpoint.open(options.model, weights=False)
    scheme = scheme_of(options.quantization, checkpoint)
    _, family = family_of(checkpoint.config)
    config = family.config.from_hf(model_config(checkpoint))
    limits = limits_of(options, config)
    target = cuda_target(options.archs)
    found = []
    for count in ranks:
        if count > MAX_RANKS:
            raise UsageError(f"--num-shards {count}: at most {MAX_RANKS}")
        with progress.step(f"Plan {count}"):
            found.append(
                estimate(family, config, scheme, count, target, limits, options.expert_parallel)
            )
    return found, limits.max_seq_len


def estimate(
    family: Any,
    config: Any,
    scheme: Scheme,
    ranks: int,
    target: tvm.target.Target,
    limits: Limits,
    expert_parallel: bool = False,
) -> Estimate:
    """Sizes of the model of `family` on `ranks` ranks. Raises ShardingError as a build does, and
    UsageError for `expert_parallel` of a model without experts.
    """
    one = Limits(PAGE_SIZE, 1, PAGE_SIZE, PAGE_SIZE)
    model = family.model(config, scheme.dtype)
    program = partition_program(model, scheme, one, ranks, expert_parallel=expert_parallel)
    kind = {"llvm": "cpu"}.get(target.kind.name, str(target.kind.name))
    tensors = {
        name: count_bytes(shape, dtype)
        for weight in program.weights.values()
        for name, shape, dtype in weight.tensors()
    }
    looked_up, chosen = _looked_up(program), _chosen_experts(program, config)
    packed = {
        name
        for weight in program.weights.values()
        if weight.columns is not None
        for name, _, _ in weight.tensors()
    }
    workspace, peers = _workspace(family, config, scheme, ranks, target, limits, expert_parallel)
    inputs = 4 * [4 * limits.prefill_chunk_size]
    state = [
        (spec, local_shape(spec.shape, program.placements[spec.name]))
        for spec in state_specs(model, scheme.dtype, one)
    ]
    return Estimate(
        ranks=ranks,
        kind=kind,
        layers=config.num_hidden_layers,
        weights=on_device(tensors.values(), kind),
        read=sum(size for name, size in tensors.items() if name not in looked_up),
        packed=sum(s for name, s in tensors.items() if name in packed - looked_up),
        experts=sum(size for name, size in tensors.items() if name in chosen),
        chosen=min(chosen.values(), default=1.0),
        whole_experts=config.num_experts if expert_parallel else 0,
        workspace=on_device([workspace], kind),
        state=tuple(state),
        fixed=sum(inputs) + peers + 4,
        collectives=tuple((c.kind, c.bytes) for c in program.partitioned.collectives["decode_1"]),
    )


def _looked_up(program: Program) -> set[str]:
    """Weights of which a step reads single rows only."""
    func = program.mod["decode_1"]
    looked_up: set[str] = set()
    read: set[str] = set()
    for binding in bindings_of(func):
        if isinstance(binding.value, relax.Call):
            name = op_name(binding.value)
            found = looked_up if name == "relax.take" or name.endswith("embed") else read
            found |= {v.name for v in operands_of(binding.value) if isinstance(v, relax.Var)}
    return looked_up - read


def _chosen_experts(program: Program, config: Any) -> dict[str, float]:
    """The share of each expert weight that a step of one row reads."""
    return {
        v.name: config.num_experts_per_tok / config.num_experts
        for binding in bindings_of(program.mod["decode_1"])
        if isinstance(binding.value, relax.Call) and op_name(binding.value).endswith("experts")
        for v in operands_of(binding.value)
        if isinstance(v, relax.Var)
    }


class _LargestBatch(Limits):
    """Limits with a decode function for the largest batch only."""

    @property
    def buckets(self) -> list[int]:
        return [self.max_batch_size]


def _workspace(
    family: Any,
    config: Any,
    scheme: Scheme,
    ranks: int,
    target: tvm.target.Target,
    limits: Limits,
    expert_parallel: bool,
) -> tuple[int, int]:
    """Bytes of the workspace, and of the tensors for all-reduces over peer memory."""
    few = replace(config, num_hidden_layers=min(config.num_hidden_layers, _WORKSPACE_LAYERS))
    sizes = (limits.max_seq_len, limits.max_batch_size, limits.prefill_chunk_size)
    limits = _LargestBatch(*sizes, limits.page_size)
    program = partition_program(
        family.model(few, scheme.dtype), scheme, limits, ranks, expert_parallel=expert_parallel
    )
    cuda = target.kind.name == "cuda"
    peer = peer_state(program.mod, ranks, limits.prefill_chunk_size) if cuda else None
    tensors = peer.tensors.values() if peer else ()
    extra = sum(count_bytes(shape, dtype) for shape, dtype in tensors)
    return plan_workspace(program, target, limits, peer), extra


def advice(
    estimates: Iterable[Estimate],
    machine: Machine,
    batches: Iterable[int],
    length: int,
    context: int,
) -> list[str]:
    """Where a second replica on half the GPUs serves better than more shards."""
    by_ranks = {e.ranks: e for e in estimates}
    lines = []
    for ranks, whole in sorted(by_ranks.items()):
        half = by_ranks.get(ranks // 2) if ranks % 2 == 0 else None
        if half is None or machine.bandwidth is None:
            continue
        for batch in batches:
            share = math.ceil(batch / 2)
            if half.memory(share, length).total > machine.memory - CONTEXT:
                continue
            one = batch / whole.seconds(machine, batch, context)
            two = 2 * share / half.seconds(machine, share, context)
            if batch == 1:
                # One row cannot be shared out: a replica is better if more shards are no faster.
                better = half.seconds(machine, 1, context) <= whole.seconds(machine, 1, context)
                if better:
                    lines.append(
                        f"batch 1: {ranks} shards are no faster than {ranks // 2}; two replicas "
                        f"of {ranks // 2} GPUs serve two rows at the same speed"
                    )
            elif two > one:
                lines.append(
                    f"batch {batch}: two replicas of {ranks // 2} GPUs, {share} rows each, give "
                    f"{two:.0f} tokens/s; {ranks} shards give {one:.0f}"
                )
    return lines
