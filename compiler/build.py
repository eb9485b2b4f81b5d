"""Build: from a checkpoint to an artefact directory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from shardwright import __version__
from shardwright.compiler import kept
from shardwright.compiler.checkpoint import Checkpoint
from shardwright.compiler.cuda import from_sm_90
from shardwright.compiler.formats import Format
from shardwright.compiler.library import compile_program
from shardwright.compiler.options import BuildOptions, limits_of, targets_of
from shardwright.compiler.peer import PEER_PASS, peer_state
from shardwright.compiler.placement import local_shape
from shardwright.compiler.program import Program, partition_program
from shardwright.compiler.quantization import Quantization
from shardwright.compiler.scheme import Scheme, check_name, model_config, scheme_of
from shardwright.compiler.slicing import Reader
from shardwright.compiler.vocabulary import check_vocabulary
from shardwright.compiler.weights import Weight, ignore_buffers, stored_shapes, write_shards
from shardwright.errors import BuildError, UsageError
from shardwright.model_defs import family_of
from shardwright.runtime import artifact, memory
from shardwright.runtime.artifact import KERNELS


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
class BuildResult:
    """The artefact's directory, and the text of `--explain`."""

    path: Path
    explanation: str


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
    scheme: Scheme | None = None,
) -> BuildResult:
    """Build from an open checkpoint, as `build`. With `readers`, weights as an artefact has them:
    joined tensors taken apart, and complete. `scheme` takes the place of `options.quantization`.
    """
    progress = progress or Silent()
    targets = targets_of(options)
    with_weights = not (options.build_model_only or options.dummy_weights)
    scheme = scheme or scheme_of(options.quantization, checkpoint)
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
            options.disable_pass,
        )
    peer = None
    if options.target == "cuda" and PEER_PASS not in options.disable_pass:
        peer = peer_state(program.mod, options.num_shards, limits.prefill_chunk_size)
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
        if not isinstance(scheme, Quantization):
            kept.write(options.out / kept.FILE, program.quantized)
            files[kept.FILE] = artifact.file_entry(options.out / kept.FILE)
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
        tokens_to_host=from_sm_90(targets[0]),
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
    return BuildResult(options.out, program.explanation() if options.explain else "")


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
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / artifact.MANIFEST).unlink(missing_ok=True)
    except OSError as error:
        raise BuildError(
            f"{out}: cannot write there ({error.strerror}); choose another directory"
        ) from error
    shutil.rmtree(out / "shards", ignore_errors=True)


def _lines(notes: dict[str, dict[str, Any]], config: Any) -> str:
    """`selftest.json`, a kernel a line; kernels of Relax operations know no epsilon."""
    eps = getattr(config, "rms_norm_eps", None)
    entries = [
        f' "{name}": {json.dumps({"eps": eps, **note} if "rms_norm" in name else note)}'
        for name, note in notes.items()
    ]
    return "{\n" + ",\n".join(entries) + "\n}\n"


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
    sources = tuple(replace(s, plus=0.0, joined=None, first=0, step=1) for s in weight.sources)
    return replace(weight, sources=sources)


def _copy_tokenizer(checkpoint: Checkpoint, out: Path) -> dict[str, artifact.FileEntry]:
    files = {}
    for path in checkpoint.tokenizer_files():
        shutil.copyfile(path, out / path.name)
        files[path.name] = artifact.file_entry(out / path.name)
    return files
