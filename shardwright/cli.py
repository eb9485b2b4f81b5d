"""The `shardwright` command: build, plan, reshard, chat, inspect.

Only this module knows click. The library raises its own errors; they become one line on standard
error and their exit code here.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import click

from shardwright import __version__, planning
from shardwright.console import (
    TerminalProgress,
    print_findings,
    print_kernels,
    print_manifest,
    rank_memory,
    show,
    size,
    verify_files,
)
from shardwright.errors import DeviceError, InputError, ShardwrightError, UsageError
from shardwright.runtime.artifact import load_manifest
from shardwright.runtime.memory import of_manifest

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""

QUANTIZATIONS = (
    *("q4f16_1", "q4f16_0", "q3f16_1", "q8f16_1", "fp8f16", "q0f16", "q0f32"),
    *("checkpoint", "checkpoint-f32"),
)
TARGETS = ("cpu", "cuda", "rocm")


class _InterruptedError(Exception):
    """Ctrl-C, before click makes an Abort and an empty line of it."""


class _Group(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise _InterruptedError from None


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="shardwright")
def cli() -> None:
    """Compile one language-model definition into an SPMD library for N ranks, and run it."""


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C is a KeyboardInterrupt here, and the only thing standard error tells about it.

    An exception that crosses TVM's C++ comes out as a RuntimeError, and what it unwinds there
    writes warnings. From the signal to the end of the block nothing is written.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return
    interrupted = False
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)

    def interrupt(number: int, frame: object) -> None:
        nonlocal interrupted
        interrupted = True
        os.dup2(nowhere, 2)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except BaseException as error:
        if not interrupted:
            raise
        # What the stack still holds goes now, while its warnings are not shown.
        unwound: BaseException | None = error
        while unwound is not None:
            traceback.clear_frames(unwound.__traceback__)
            unwound = unwound.__context__
        gc.collect()
    finally:
        signal.signal(signal.SIGINT, before)
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)
    if interrupted:
        raise KeyboardInterrupt


def _target(ctx: click.Context, param: click.Parameter, value: str) -> str:
    if value not in TARGETS:
        raise UsageError(f"unknown target {value!r}; use one of {', '.join(TARGETS)}")
    return value


def _quantization(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value is not None and value not in QUANTIZATIONS:
        raise UsageError(f"unknown quantization {value!r}; use one of {', '.join(QUANTIZATIONS)}")
    return value


def _archs(ctx: click.Context, param: click.Parameter, value: str) -> tuple[str, ...]:
    return tuple(arch.strip() for arch in value.split(",") if arch.strip())


_COUNT = click.IntRange(min=1)
_DIRECTORY = click.Path(path_type=Path, file_okay=False)


@cli.command(short_help="Compile a checkpoint for N ranks.")
@click.option(
    "--model",
    required=True,
    help="Checkpoint: a directory, or ORG/NAME[@REVISION] on the Hugging Face hub.",
)
@click.option("-o", "--output", required=True, type=_DIRECTORY, help="Directory to write.")
@click.option(
    "--quantization",
    callback=_quantization,
    help=f"One of {', '.join(QUANTIZATIONS)}. [default: the checkpoint's own, else q4f16_1]",
)
@click.option("--num-shards", default=1, show_default=True, type=_COUNT, help="Number of ranks.")
@click.option(
    "--target",
    default="cpu",
    show_default=True,
    callback=_target,
    help=f"One of {', '.join(TARGETS)}.",
)
@click.option(
    "--arch",
    default="",
    callback=_archs,
    metavar="LIST",
    help="GPU architectures to compile for, such as sm_89,sm_90a or gfx1100,gfx942.",
)
@click.option(
    "--rocm-abi",
    default=5,
    show_default=True,
    type=int,
    help="Version of AMD code objects: 5, or 6 for ROCm 6.3 and later.",
)
@click.option("--max-seq-len", type=_COUNT, help="Longest row, in tokens. [default: the model's]")
@click.option("--max-batch-size", default=8, show_default=True, type=_COUNT, help="Most rows.")
@click.option("--prefill-chunk-size", type=_COUNT, help="Most tokens of one prefill call.")
@click.option("--use-cuda-graph", is_flag=True, help="Decode by one CUDA graph per step.")
@click.option("--expert-parallel", is_flag=True, help="Whole experts on a rank, not parts of each.")
@click.option("--build-model-only", is_flag=True, help="Write the library and no weights.")
@click.option("--dummy-weights", is_flag=True, help="No weights; each rank makes random ones.")
@click.option("--gpu-memory", metavar="SIZE", help="Refuse what GPUs of this size cannot hold.")
@click.option("--explain", is_flag=True, help="Print placements, collectives, bytes per step.")
@click.option("--dump-ir", type=_DIRECTORY, help="Write the module after each pass there.")
@click.option("--disable-pass", multiple=True, metavar="NAME", help="Leave out a fusion.")
def build(output: Path, arch: tuple[str, ...], gpu_memory: str | None, **options: Any) -> None:
    """Compile a Hugging Face checkpoint into a directory that `chat` runs."""
    began = time.monotonic()
    if gpu_memory:
        options["gpu_memory"] = planning.parse_amount(gpu_memory, "--gpu-memory")
    with TerminalProgress() as progress, _interruptible():
        # The compiler takes seconds to load, and only this command may load it.
        from shardwright.compiler.build import build as run_build
        from shardwright.compiler.options import BuildOptions

        result = run_build(BuildOptions(out=output, archs=arch, **options), progress=progress)
    if options["explain"]:
        click.echo(result.explanation.rstrip("\n"))
    _print_built(result.path, began)


def _print_built(path: Path, began: float) -> None:
    manifest = load_manifest(path)
    weights = size(rank_memory(manifest)["weights"])
    total = size(of_manifest(manifest).total)
    click.echo(
        f"{path}: {manifest.model.architecture}, {manifest.quantization}, "
        f"{manifest.mesh.size} x {manifest.target.kind}, {weights} of weights a rank, "
        f"{total} of memory, "
        f"built in {time.monotonic() - began:.1f} s"
    )


@cli.command()
@click.argument("directory", type=_DIRECTORY)
@click.option("--prompt", help="Answer this and exit; without it, a conversation.")
@click.option("--system", "system_prompt", help="System message of the conversation.")
@click.option("--temperature", type=float, help="0 is greedy.  [default: the model's]")
@click.option("--top-p", type=float, help="Keep the tokens of this total probability.")
@click.option("--top-k", type=int, help="Keep this many tokens; 0 is off.")
@click.option("--repetition-penalty", type=float, help="Above 1, seen tokens get less likely.")
@click.option("--no-repeat-ngram-size", type=int, help="No n-gram of this length twice; 0 is off.")
@click.option("--min-new-tokens", type=int, help="No end of the answer before this many tokens.")
@click.option("--max-new-tokens", type=int, help="End of the answer at the latest.")
@click.option("--stop", multiple=True, help="End at this text, not shown. May be repeated.")
@click.option("--seed", type=int, help="Seed of the sampling.")
@click.option("--stats", is_flag=True, help="Print tokens per second and memory at the end.")
@click.option(
    "--collectives",
    default="auto",
    show_default=True,
    help="auto, or nccl to keep GPUs from summing in each other's memory.",
)
def chat(
    directory: Path,
    prompt: str | None,
    system_prompt: str | None,
    stats: bool,
    stop: tuple[str, ...],
    collectives: str,
    **sampling: Any,
) -> None:
    """Talk to a built model. In a conversation: /reset, /stats, /exit."""
    from shardwright.runtime.chat import ChatConfig, ChatModule

    sampling["stop"] = stop or None
    config = ChatConfig(system_prompt=system_prompt, **sampling)
    with TerminalProgress() as progress, progress.bar("Load") as bar:
        module = ChatModule(
            model=directory, chat_config=config, progress=bar, collectives=collectives
        )
    with module:
        if prompt is None:
            _converse(module)
        else:
            _answer(module, prompt)
        if stats:
            click.echo(module.stats(verbose=True), err=True)


def _answer(module: Any, prompt: str) -> None:
    from shardwright.runtime.callback import StreamToStdout

    module.generate(prompt=prompt, progress_callback=StreamToStdout(callback_interval=1))


def _converse(module: Any) -> None:
    """Read prompts from standard input until it ends or says /exit."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives `input` a history and line editing)
    interactive = sys.stdin.isatty()
    if interactive:
        click.echo("/reset begins anew, /stats shows the speed, /exit ends.")
    while True:
        try:
            line = input(">>> " if interactive else "").strip()
        except EOFError:
            return
        if line == "/exit":
            return
        if line == "/reset":
            module.reset_chat()
        elif line == "/stats":
            click.echo(module.stats(verbose=True))
        elif line.startswith("/"):
            click.echo(f"unknown command {line}; /reset, /stats or /exit", err=True)
        elif line:
            try:
                _answer(module, line)
            except InputError as error:
                # The conversation goes on: a shorter prompt, or /reset, mends it.
                _print_error(error)


@cli.command(short_help="Show what fits on 1, 2, 4 ... GPUs, and how fast.")
@click.argument("model")
@click.option("--num-shards", default="1,2,4,8", show_default=True, help="Numbers of GPUs.")
@click.option("--gpu-memory", required=True, metavar="SIZE", help="Of one GPU, such as 24GiB.")
@click.option("--max-seq-len", type=_COUNT, help="Tokens a row. [default: the model's, to 4096]")
@click.option("--batch", default="1,16,64", show_default=True, help="Numbers of rows.")
@click.option(
    "--quantization",
    callback=_quantization,
    help=f"One of {', '.join(QUANTIZATIONS)}. [default: the checkpoint's own, else q4f16_1]",
)
@click.option("--arch", default="sm_80", show_default=True, help="GPU to compile for.")
@click.option("--prefill-chunk-size", default=2048, show_default=True, type=_COUNT)
@click.option("--bandwidth", metavar="RATE", help="Of a large copy on a GPU, as 4.2TB/s.")
@click.option("--link", default="25GB/s", show_default=True, help="Between GPUs, each way.")
@click.option(
    "--latency", default=6.0, show_default=True, help="Of a small all-reduce of two, in us."
)
@click.option("--context", default=256, show_default=True, help="Tokens a row, for the speed.")
@click.option(
    "--expert-parallel", is_flag=True, help="Whole experts on each rank, not parts of each."
)
def plan(
    model: str,
    num_shards: str,
    gpu_memory: str,
    max_seq_len: int | None,
    batch: str,
    quantization: str | None,
    arch: str,
    prefill_chunk_size: int,
    bandwidth: str | None,
    link: str,
    latency: float,
    context: int,
    expert_parallel: bool,
) -> None:
    """Show what a model takes on 1, 2, 4 ... GPUs, what fits, and how fast it will decode.

    MODEL is a checkpoint as `build` takes it; no weights are read or fetched.
    """
    ranks = planning.parse_counts(num_shards, "--num-shards")
    batches = planning.parse_counts(batch, "--batch")
    memory = planning.parse_amount(gpu_memory, "--gpu-memory")
    rate = planning.parse_amount(bandwidth, "--bandwidth") if bandwidth else None
    with TerminalProgress() as progress, _interruptible():
        from shardwright.compiler import plan as planner
        from shardwright.compiler.options import BuildOptions

        machine = planner.Machine(
            memory, rate, planning.parse_amount(link, "--link"), latency / 1e6
        )
        options = BuildOptions(
            model=model,
            out=Path(),
            quantization=quantization,
            target="cuda",
            archs=(arch,),
            max_seq_len=max_seq_len,
            max_batch_size=max(batches),
            prefill_chunk_size=prefill_chunk_size,
            expert_parallel=expert_parallel,
        )
        found, length = planner.estimates(options, ranks, progress)
        notes = planner.advice(found, machine, batches, length, context)
    planning.show(found, machine, batches, length, context, notes, show)


@cli.command(short_help="Make a built model for another number of ranks.")
@click.argument("directory", type=_DIRECTORY)
@click.option("--num-shards", required=True, type=_COUNT, help="Number of ranks.")
@click.option("-o", "--output", required=True, type=_DIRECTORY, help="Directory to write.")
def reshard(directory: Path, num_shards: int, output: Path) -> None:
    """Make a built model for another number of ranks, without its checkpoint."""
    began = time.monotonic()
    with TerminalProgress() as progress, _interruptible():
        from shardwright.compiler.reshard import reshard as run_reshard

        result = run_reshard(directory, output, num_shards, progress)
    _print_built(result.path, began)


@cli.command(short_help="Show what a built model is and needs.")
@click.argument("directory", type=_DIRECTORY)
@click.option("--tensors", is_flag=True, help="List every weight with shape and placement.")
@click.option("--verify", is_flag=True, help="Check the length and checksum of every file.")
def inspect(directory: Path, tensors: bool, verify: bool) -> None:
    """Show what a built model is and what it needs; for AMD GPUs, what its kernels use."""
    manifest = load_manifest(directory)
    print_manifest(manifest, tensors=tensors)
    if manifest.target.kind == "rocm":
        print_kernels(directory)
    if verify:
        verify_files(directory, manifest)
        click.echo(f"{len(manifest.files)} files verified")


@cli.command(short_help="Check kernels and collectives of a built model here.")
@click.argument("directory", type=_DIRECTORY)
@click.option("--target", type=click.Choice(TARGETS), help="What it must have been built for.")
def selftest(directory: Path, target: str | None) -> None:
    """Check every kernel and the collectives of a built model on this machine.

    Each kernel's results are compared with a reference in float64. Paste the table into a report.
    """
    manifest = load_manifest(directory)
    if target not in (None, manifest.target.kind):
        raise UsageError(f"{directory} was built for {manifest.target.kind}, not {target}")
    from shardwright.runtime.selftest import run as run_selftest
    from shardwright.runtime.session import Session

    with Session(directory, timeout=3600) as session:
        findings = run_selftest(session)
    print_findings(manifest, findings)
    wrong = [f.name for f in findings if not f.passed and not f.note]
    if wrong:
        raise DeviceError(f"{len(wrong)} of {len(findings)} checks failed: {', '.join(wrong[:5])}")


def _print_error(error: BaseException) -> None:
    # One error is one line, for people and for `grep`.
    text = "; ".join(line.strip() for line in str(error).splitlines() if line.strip())
    click.echo(f"Error: {text or type(error).__name__}", err=True)


def _print_usage_error(error: click.ClickException) -> None:
    context = getattr(error, "ctx", None)
    if context is None or error.message == context.get_help():
        error.show()  # a command without arguments: its help
        return
    message = error.format_message().rstrip(".")
    between = " " if message.endswith("?") else "; "
    hint = f"`{context.command_path} --help` shows the options"
    _print_error(InputError(message + between + hint))


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    click.echo(f"Warning: {message}", err=True)


def run(args: Sequence[str] | None = None) -> int:
    """Run the command with `args` (those of the process if None) and return the exit code."""
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            return cli.main(args=args, prog_name="shardwright", standalone_mode=False) or 0
        except click.ClickException as error:
            _print_usage_error(error)
            return error.exit_code
        except ShardwrightError as error:
            _print_error(error)
            return error.exit_code
        except OSError as error:
            # A full disk, a file of another user: the system's own message is the clearest.
            _print_error(error)
            return 1
        except (_InterruptedError, KeyboardInterrupt, click.Abort):
            click.echo("Interrupted", err=True)
            return INTERRUPTED


def main() -> NoReturn:
    """Entry point of the `shardwright` command."""
    sys.exit(run())
