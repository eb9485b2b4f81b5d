"""Build: from a checkpoint to an artefact directory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tvm
from tvm import relax

from shardwright import __version__
from shardwright.compiler import cuda, linear, pipeline, rocm
from shardwright.compiler.axes import AXIS_RULES, EXPERT_PARALLEL, AxisRules, DeviceMesh
from shardwright.compiler.checkpoint import Checkpoint
from shardwright.compiler.columns import Quantized
from shardwright.compiler.explain import explain
from shardwright.compiler.formats import Format
from shardwright.compiler.fuse import FUSIONS
from shardwright.compiler.kernel_bytes import kernels_of
from shardwright.compiler.lower import lower_abstract
from shardwright.compiler.lowering.common import CUBLAS_PASS, NOTE, Q4_GEMM_PASS
from shardwright.compiler.lowering.products import MATMUL
from shardwright.compiler.partition import Partitioned, partition
from shardwright.compiler.peer import PEER_PASS, PeerState, peer_state
from shardwright.compiler.placement import Placement, Shard, local_shape
from shardwright.compiler.propagate import bindings_of
from shardwright.compiler.rules import op_name, shape_of
from shardwright.compiler.scheme import Scheme, check_name, model_config, scheme_of
from shardwright.compiler.script_speed import without_source_context
from shardwright.compiler.slicing import Reader
from shardwright.compiler.stored import experts_as_matrices, matrix_placement, matrix_shape
from shardwright.compiler.trace import Limits, Traced, trace
from shardwright.compiler.verify import verify
from shardwright.compiler.vocabulary import check_vocabulary
from shardwright.compiler.weights import (
    Source,
    Weight,
    ignore_buffers,
    stored_shapes,
    write_shards,
)
from shardwright.compiler.workspace import PlanWorkspace
from shardwright.errors import UsageError
from shardwright.model_defs import family_of
from shardwright.model_defs.layers import Stored
from shardwright.runtime import artifact, memory
from shardwright.runtime.artifact import KERNELS

MAX_RANKS = 16
DEFAULT_MAX_SEQ_LEN = 4096
DEFAULT_CHUNK = {"cpu": 256, "cuda": 2048, "rocm": 2048}
PAGE_SIZE = 16
MAX_UNIT = 256
"""A quantization group up to this size is not cut, at the price of padding."""
PASSES = (*FUSIONS, PEER_PASS, pipeline.DEPENDENT_LAUNCH, CUBLAS_PASS, Q4_GEMM_PASS)
"""What `--disable-pass` takes."""


class Progress(Protocol):
    """Where a build reports its steps; the command line shows bars."""

    def step(
        self, name: str, total: int | None = None
    ) -> AbstractContextManager[Callable[[int], None]]:
        """A step begins; call what is yielded with how far it advanced, out of `total`."""


class Silent:
    """Reports nothing."""

    @contextmanager
    def step(self, name: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        """See `Progress`."""
        yield lambda amount: None


@dataclass(frozen=True)
class BuildOptions:
    """What to build. `model` is a directory or a Hugging Face name; `out` the artefact directory.

    `max_seq_len` and `prefill_chunk_size` are in tokens, `max_batch_size` in rows. Left out, they
    are the model's length up to 4096, and 256 (CPU) or 2048 (GPU). `disable_pass` names fusions
    to leave out, which helps to find what changed a result. `rocm_abi` is the version of AMD code
    objects, 5 or 6. With `gpu_memory`, bytes of one GPU, what will not fit is not built.
    """

    model: str
    out: Path
    quantization: str | None = None
    num_shards: int = 1
    target: str = "cpu"
    archs: tuple[str, ...] = ()
    rocm_abi: int = rocm.ABIS[0]
    max_seq_len: int | None = None
    max_batch_size: int = 8
    prefill_chunk_size: int | None = None
    use_cuda_graph: bool = False
    build_model_only: bool = False
    dummy_weights: bool = False
    explain: bool = False
    dump_ir: Path | None = None
    disable_pass: tuple[str, ...] = ()
    gpu_memory: int | None = None
    expert_parallel: bool = False


@dataclass(frozen=True)
class BuildResult:
    """The artefact's directory, and the text of `--explain`."""

    path: Path
    explanation: str


@dataclass(frozen=True)
class Program:
    """A partitioned program before lowering: what `compile_program` makes of a model.

    `orders` says in text how each weight in act-order gets its activations.
    """

    traced: Traced
    partitioned: Partitioned
    mod: tvm.IRModule
    weights: dict[str, Weight]
    placements: dict[str, Placement]
    mesh: DeviceMesh
    orders: tuple[str, ...] = ()


@dataclass(frozen=True)
class Compiled:
    """What `compile_program` tells of the library it wrote, in the manifest's terms."""

    workspace_bytes: int
    functions: dict[str, artifact.Function]
    libraries: tuple[str, ...]
    notes: dict[str, dict[str, Any]]
    """Of each kernel, what its reference must know; see `lowering.common.NOTE`."""


def build(options: BuildOptions, progress: Progress | None = None) -> BuildResult:
    """Compile `options.model` for `options.num_shards` ranks and write the artefact.

    The manifest is written last: an interrupted build leaves none. Raises UsageError for options
    that do not fit, and ConfigError, CheckpointError, ShardingError or BuildError.
    """
    targets_of(options)  # before a model is fetched
    check_name(options.quantization)
    with_weights = not (options.build_model_only or options.dummy_weights)
    checkpoint = Checkpoint.open(options.model, weights=with_weights)
    return build_from(checkpoint, options, progress)


def build_from(
    checkpoint: Checkpoint,
    options: BuildOptions,
    progress: Progress | None = None,
    readers: Mapping[str, Reader] | None = None,
) -> BuildResult:
    """Build from an open checkpoint, as `build`. With `readers`, weights as an artefact has them:
    joined tensors taken apart, and complete.
    """
    progress = progress or Silent()
    targets = targets_of(options)
    with_weights = not (options.build_model_only or options.dummy_weights)
    scheme = scheme_of(options.quantization, checkpoint)
    if options.build_model_only and isinstance(scheme, Format) and scheme.act_order:
        raise UsageError(
            "--build-model-only: the program depends on the order of this checkpoint's weights "
            "(act-order); build with them"
        )
    architecture, family = family_of(checkpoint.config)
    config = family.config.from_hf(model_config(checkpoint))
    limits = limits_of(options, config)
    special = (*config.bos_token_id, *config.eos_token_id)
    check_vocabulary(checkpoint.root, config.vocab_size, special)
    _prepare(options.out)

    with progress.step("Partition"):
        model = family.model(config, scheme.dtype)
        program = partition_program(
            model,
            scheme,
            limits,
            options.num_shards,
            options.dump_ir,
            options.expert_parallel,
        )
    peer = None
    if options.target == "cuda" and PEER_PASS not in options.disable_pass:
        peer = peer_state(program.mod, options.num_shards)
    state = {
        name: artifact.TensorSpec(name, local_shape(s.shape, program.placements[name]), s.dtype)
        for name, s in program.traced.state.items()
    }
    state["rank"] = artifact.TensorSpec("rank", (1,), "int32")
    for name, (shape, dtype) in (peer.tensors if peer else {}).items():
        state[name] = artifact.TensorSpec(name, shape, dtype)
    weights = tuple(weight_specs(program.weights.values()))
    _check_memory(options, weights, state.values(), workspace=0)
    with progress.step("Compile"):
        library = options.out / "model.so"
        compiled = compile_program(
            program, targets, limits, library, peer, options.dump_ir, options.disable_pass
        )
    _check_memory(options, weights, state.values(), compiled.workspace_bytes)
    files = {"model.so": artifact.file_entry(library)}
    (options.out / artifact.SELFTEST).write_text(_lines(compiled.notes, config))
    files[artifact.SELFTEST] = artifact.file_entry(options.out / artifact.SELFTEST)
    if options.target == "rocm":
        files[KERNELS] = artifact.file_entry(options.out / KERNELS)
    if with_weights:
        files |= _write_weights(checkpoint, scheme, program, config, options, progress, readers)
    files |= _copy_tokenizer(checkpoint, options.out)

    manifest = artifact.Manifest(
        version=__version__,
        name=options.out.resolve().name,
        model=artifact.Model(
            architecture=architecture,
            config=checkpoint.config,
            vocab_size=config.vocab_size,
            bos=config.bos_token_id[0] if config.bos_token_id else None,
            eos=config.eos_token_id,
            num_layers=config.num_hidden_layers,
        ),
        target=artifact.Target(options.target, options.archs),
        mesh=artifact.Mesh(program.mesh.axes, program.mesh.shape),
        quantization=scheme.name,
        dtype=scheme.dtype,
        limits=artifact.Limits(
            limits.max_seq_len,
            limits.max_batch_size,
            limits.prefill_chunk_size,
            limits.page_size,
            limits.num_pages,
        ),
        use_cuda_graph=options.use_cuda_graph,
        libraries=compiled.libraries,
        disable_pass=options.disable_pass,
        expert_parallel=options.expert_parallel,
        decode_buckets=tuple(limits.buckets),
        workspace_bytes=compiled.workspace_bytes,
        state=tuple(state.values()),
        functions=compiled.functions,
        weights=weights,
        has_weights=with_weights or options.dummy_weights,
        dummy_weights=options.dummy_weights,
        files=files,
    )
    artifact.write_manifest(options.out, manifest)
    return BuildResult(options.out, _explanation(program) if options.explain else "")


def _lines(notes: dict[str, dict[str, Any]], config: Any) -> str:
    """`selftest.json`, a kernel a line; kernels of Relax operations know no epsilon."""
    eps = getattr(config, "rms_norm_eps", None)
    entries = [
        f' "{name}": {json.dumps({"eps": eps, **note} if "rms_norm" in name else note)}'
        for name, note in notes.items()
    ]
    return "{\n" + ",\n".join(entries) + "\n}\n"


def targets_of(options: BuildOptions) -> tuple[tvm.target.Target, ...]:
    """TVM's targets for the options: one, or one for each architecture of AMD GPUs.

    Raises UsageError for what cannot be built, BuildError for a missing tool.
    """
    for name in options.disable_pass:
        if name not in PASSES:
            known = ", ".join(PASSES)
            raise UsageError(f"--disable-pass {name} is unknown; choose one of {known}")
    if not 1 <= options.num_shards <= MAX_RANKS:
        raise UsageError(f"--num-shards {options.num_shards}: must be from 1 to {MAX_RANKS}")
    if options.target == "cuda":
        target = cuda.cuda_target(options.archs)
        cuda.install_hook(options.archs)
        return (target,)
    if options.target == "rocm":
        targets = rocm.rocm_targets(options.archs)
        rocm.install_hooks(options.rocm_abi)
        return targets
    if options.target != "cpu":
        raise UsageError(f"--target {options.target} is unknown; choose cpu, cuda or rocm")
    if options.archs:
        raise UsageError("--arch is for --target cuda and --target rocm")
    if options.use_cuda_graph:
        raise UsageError("--use-cuda-graph is for --target cuda and --target rocm")
    return (tvm.target.Target({"kind": "llvm", "mcpu": _host_cpu()}),)


def _host_cpu() -> str:
    cpu = tvm.get_global_func("target.llvm_get_system_cpu", allow_missing=True)
    return str(cpu()) if cpu else "generic"


def limits_of(options: BuildOptions, config: Any) -> Limits:
    """Sizes of the build. Raises UsageError for lengths beyond what the model was trained for."""
    trained = config.max_position_embeddings
    # Only "dynamic" scaling is meant to go on beyond the trained length.
    extends = config.rope_scaling.type == "dynamic"
    seq = options.max_seq_len or min(trained, DEFAULT_MAX_SEQ_LEN)
    if seq > trained and not extends:
        raise UsageError(f"--max-seq-len {seq}: the model was trained for at most {trained} tokens")
    chunk = min(options.prefill_chunk_size or DEFAULT_CHUNK[options.target], seq)
    return Limits(seq, options.max_batch_size, chunk, PAGE_SIZE)


def partition_program(
    model: Any,
    scheme: Scheme,
    limits: Limits,
    ranks: int,
    dump_ir: Path | None = None,
    expert_parallel: bool = False,
) -> Program:
    """Trace, partition, verify, join and quantize: the local program before any kernel exists.

    With `expert_parallel` a rank has whole experts; UsageError if the model has none.
    """
    traced = trace(model, scheme.dtype, limits)
    pipeline.dump(traced.mod, dump_ir, "0-traced")
    mesh = DeviceMesh(("tp",), (ranks,))
    if expert_parallel and not any("experts" in axes for axes in traced.param_axes.values()):
        raise UsageError("--expert-parallel: this model has no experts; leave it out")
    shapes = {p.name: shape_of(p) for p in traced.mod["prefill"].params}
    quantized = {
        # A router is small, and what it says must not change.
        name: scheme.quantized(
            _checkpoint_name(name, traced.stored.get(name)),
            matrix_shape(shapes[name]),
            axes[-2:],
            model.config,
        )
        if axes[0] != "router"
        else None
        for name, axes in traced.param_axes.items()
    }
    rules = AxisRules(
        mesh,
        model.config,
        _units(traced.param_axes, shapes, quantized),
        EXPERT_PARALLEL if expert_parallel else AXIS_RULES,
    )
    placements = {n: rules.placement(shapes[n], axes) for n, axes in traced.param_axes.items()}
    placements |= {s.name: rules.placement(s.shape, s.axes) for s in traced.state.values()}
    # A prefill's tokens are the chunk's, and share names with per-row state; none is sharded.
    partitioned = partition(traced.mod, placements, ranks)
    verify(partitioned, placements, ranks)
    pipeline.dump(partitioned.mod, dump_ir, "1-partitioned")

    dtypes = {p.name: str(p.ty.dtype) for p in traced.mod["prefill"].params}
    table = {
        n: Weight(
            n,
            (_source(n, shapes[n], placements[n], traced.stored.get(n), quantized[n]),),
            dtypes[n],
        )
        for n in traced.param_axes
    }
    mod = linear.name_linears(experts_as_matrices(partitioned.mod))
    orders = _plan_orders(mod, table)
    weights = linear.Weights(table)
    mod = linear.join_linears(mod, weights)
    mod = linear.quantize(mod, weights)
    pipeline.dump(mod, dump_ir, "2-linear")
    return Program(traced, partitioned, mod, weights.table, placements, mesh, tuple(orders))


def _source(
    name: str,
    shape: tuple[int, ...],
    placement: Placement,
    stored: Stored | None,
    quantized: Quantized | None,
) -> Source:
    """The tensor of the checkpoint that parameter `name` is."""
    shape, placement = matrix_shape(shape), matrix_placement(shape, placement)
    if stored is None or stored.path is None:
        return Source(name, shape, placement, quantized, plus=stored.plus if stored else 0.0)
    whole = _checkpoint_name(name, stored)
    return Source(name, shape, placement, quantized, stored.plus, whole, stored.first)


def _checkpoint_name(name: str, stored: Stored | None) -> str:
    """The tensor of the checkpoint that parameter `name` is, or is part of."""
    if stored is None or stored.path is None:
        return name
    module = name.split(".")[:-1]
    path = stored.path
    while path.startswith("../"):
        module, path = module[:-1], path[3:]
    return ".".join([*module, path])


def _plan_orders(mod: tvm.IRModule, table: dict[str, Weight]) -> list[str]:
    """Decide for each weight in act-order how its activations come in the order of its groups.

    Where only elementwise operations lie between it and the products before, their rows are
    permuted once and for all. Else every rank permutes its own activations before the product.
    """
    lines = []
    for name, weight in table.items():
        (source,) = weight.sources
        if source.quantized is None or source.quantized.group_of is None:
            continue
        before = linear.producers(mod, name)
        if before and all(table[p].sources[0].rows is None for p in before):
            order = np.argsort(source.quantized.group_of, kind="stable")
            table[name] = replace(weight, sources=(replace(source, order=order),))
            for p in before:
                rows = replace(table[p].sources[0], rows=order)
                table[p] = replace(table[p], sources=(rows,))
            lines.append(f"{name}: rows of {', '.join(before)} permuted; nothing at run time")
            continue
        cut = isinstance(source.placement, Shard) and source.placement.dim == 1
        where = "its own columns, sorted by group and padded" if cut else "all of its columns"
        lines.append(f"{name}: each rank permutes the activations of {where}; nothing is sent")
    return lines


def _units(
    axes: dict[str, tuple[str, ...]],
    shapes: dict[str, tuple[int, ...]],
    quantized: dict[str, Quantized | None],
) -> dict[str, int]:
    """Elements that a cut should not part, by logical axis: the largest group along it."""
    units: dict[str, int] = {}
    for name, how in quantized.items():
        if how is not None and how.packing.group < min(shapes[name][-1], MAX_UNIT + 1):
            axis = axes[name][-1]
            units[axis] = max(units.get(axis, 0), how.packing.group)
    return units


def compile_program(
    program: Program,
    targets: tuple[tvm.target.Target, ...],
    limits: Limits,
    library: Path,
    peer: PeerState | None = None,
    dump_ir: Path | None = None,
    disable_pass: tuple[str, ...] = (),
) -> Compiled:
    """Lower and compile `program` to `library`.

    With `peer` there are decode functions that reduce over peer memory as well. AMD GPUs have a
    program for each architecture, since waves and with them the launches differ.
    """
    compiled = []
    for target in targets:
        arch = str(target.attrs.get("mcpu", "")) if target.kind.name == "rocm" else ""
        with target, without_source_context():
            dump = dump_ir / arch if dump_ir else None
            mod, *found = _lower(program, target, limits, peer, dump, frozenset(disable_pass))
        compiled.append((rocm.for_arch(mod, target, arch) if arch else mod, *found))
    mods, workspaces, functions, libraries, notes = zip(*compiled, strict=True)
    mod = tvm.IRModule({gv: func for mod in mods for gv, func in mod.functions_items()})
    if arch:
        rocm.build(mod, targets, library)
    else:
        with targets[0]:
            executable = relax.build(mod, targets[0], relax_pipeline=None)
        executable.export_library(str(library))
    return Compiled(max(workspaces), functions[0], libraries[0], notes[0])


def _lower(
    program: Program,
    target: tvm.target.Target,
    limits: Limits,
    peer: PeerState | None,
    dump_ir: Path | None,
    disabled: frozenset[str],
) -> tuple[
    tvm.IRModule,
    int,
    dict[str, artifact.Function],
    tuple[str, ...],
    dict[str, dict[str, Any]],
]:
    """VM code for `target`, and what `Compiled` tells of it."""
    workspace = PlanWorkspace()
    mod = lower_abstract(program.mod, target, peer, disabled)
    libraries = (artifact.CUBLAS,) if _calls(mod, MATMUL) else ()
    pipeline.dump(mod, dump_ir, "3-lowered")
    prefill = mod["prefill"]
    bound = {"n": limits.prefill_chunk_size}
    mod.update_func(mod.get_global_var("prefill"), prefill.with_attr("tir_var_upper_bound", bound))
    passes = pipeline.legalize(target) + pipeline.schedule(target, disabled)
    mod = tvm.transform.Sequential(passes)(mod)
    pipeline.dump(mod, dump_ir, "4-scheduled")
    weights = frozenset(n for w in program.weights.values() for n, _, _ in w.tensors())
    kernels = {
        gv.name_hint: kernels_of(func, weights)
        for gv, func in mod.functions_items()
        if isinstance(func, relax.Function) and gv.name_hint.startswith("decode_")
    }
    mod = tvm.transform.Sequential(pipeline.to_vm(workspace)[:7])(mod)
    functions = {
        gv.name_hint: artifact.Function(
            tuple(map(_argument, func.params)), kernels.get(gv.name_hint, {})
        )
        for gv, func in mod.functions_items()
        if isinstance(func, relax.Function)
    }
    mod = tvm.transform.Sequential(pipeline.to_vm(workspace)[7:])(mod)
    pipeline.dump(mod, dump_ir, "5-vm")
    notes = {
        gv.name_hint: json.loads(str(func.attrs.get(NOTE, "{}")))
        for gv, func in sorted(mod.functions_items(), key=lambda item: item[0].name_hint)
        if isinstance(func, tvm.tirx.PrimFunc)
    }
    return mod, workspace.bytes, functions, libraries, notes


def plan_workspace(
    program: Program, target: tvm.target.Target, limits: Limits, peer: PeerState | None
) -> int:
    """Bytes of the workspace that a build of `program` for `target` would have."""
    with target, without_source_context():
        return _lower(program, target, limits, peer, None, frozenset())[1]


def _calls(mod: tvm.IRModule, name: str) -> bool:
    """Whether a function of `mod` calls an operation or packed function."""
    return any(
        isinstance(binding.value, relax.Call) and op_name(binding.value) == name
        for func in mod.functions.values()
        if isinstance(func, relax.Function)
        for binding in bindings_of(func)
    )


def _argument(param: relax.Var) -> artifact.TensorSpec:
    if not isinstance(param.ty, relax.TensorType):
        return artifact.TensorSpec(param.name, (), "object")
    shape = tuple(d if isinstance(d, int) else str(d) for d in shape_of(param))
    return artifact.TensorSpec(param.name, shape, str(param.ty.dtype))


def weight_specs(weights: Iterable[Weight]) -> Iterator[artifact.WeightSpec]:
    """The manifest's entries of weights."""
    for weight in weights:
        placement = " + ".join(dict.fromkeys(str(s.placement) for s in weight.sources))
        for name, shape, dtype in weight.tensors():
            yield artifact.WeightSpec(name, shape, dtype, placement)


def _check_memory(
    options: BuildOptions,
    weights: Iterable[artifact.WeightSpec],
    state: Iterable[artifact.TensorSpec],
    workspace: int,
) -> None:
    """Raise DeviceError if the model will not fit on GPUs of `options.gpu_memory`."""
    if options.gpu_memory is not None and options.target != "cpu":
        need = memory.needed(options.target, options.num_shards, weights, state, workspace)
        free = options.gpu_memory - memory.CONTEXT
        memory.check_fits(options.out.name, need, free, "--gpu-memory leaves")


def _prepare(out: Path) -> None:
    """An empty or earlier artefact directory without its manifest and shards."""
    out.mkdir(parents=True, exist_ok=True)
    (out / artifact.MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(out / "shards", ignore_errors=True)


def _write_weights(
    checkpoint: Checkpoint,
    scheme: Scheme,
    program: Program,
    config: Any,
    options: BuildOptions,
    progress: Progress,
    readers: Mapping[str, Reader] | None,
) -> dict[str, artifact.FileEntry]:
    def ignored(name: str) -> bool:
        tied = config.tie_word_embeddings and name == "lm_head.weight"
        return tied or ignore_buffers(name)

    with progress.step("Write weights", 100) as advance:
        shown = 0

        def report(done: int, total: int) -> None:
            nonlocal shown
            percent = 100 * done // max(total, 1)
            advance(percent - shown)
            shown = percent

        weights = list(program.weights.values())
        if readers is not None:
            weights = [_as_stored(weight) for weight in weights]
        elif isinstance(scheme, Format):
            readers = scheme.readers(stored_shapes(checkpoint.tensors, weights))
        return write_shards(
            checkpoint, weights, options.num_shards, options.out, report, ignored, readers
        )


def _as_stored(weight: Weight) -> Weight:
    sources = tuple(replace(s, plus=0.0, joined=None, first=0) for s in weight.sources)
    return replace(weight, sources=sources)


def _copy_tokenizer(checkpoint: Checkpoint, out: Path) -> dict[str, artifact.FileEntry]:
    files = {}
    for path in checkpoint.tokenizer_files():
        shutil.copyfile(path, out / path.name)
        files[path.name] = artifact.file_entry(out / path.name)
    return files


def _explanation(program: Program) -> str:
    state = {name: (s.shape, program.placements[name]) for name, s in program.traced.state.items()}
    shapes = {p.name: shape_of(p) for p in program.traced.mod["prefill"].params}
    # As the model has them: experts are matrices in the weights.
    model = {name: (shapes[name], program.placements[name]) for name in program.traced.param_axes}
    weights, local = program.weights.values(), program.partitioned
    return explain(program.mesh, weights, state, local, model, program.orders)
