"""Who may import whom: the table of the folders, enforced on the source."""

import ast
import io
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("model_defs", "compiler", "runtime")
STDLIB = sys.stdlib_module_names


@dataclass(frozen=True)
class Rule:
    """Prefixes of module names that a folder may import and, of those, may not."""

    allowed: tuple[str, ...]
    forbidden: tuple[str, ...] = ()


RULES = {
    "model_defs": Rule(
        ("tvm.relax.frontend.nn", "numpy", "shardwright.errors", "shardwright.model_defs")
    ),
    "compiler": Rule(
        (
            *("tvm", "tvm_ffi", "numpy", "ml_dtypes", "safetensors", "huggingface_hub", "cuda"),
            *("shardwright.errors", "shardwright.model_defs", "shardwright.compiler"),
            *("shardwright.runtime.artifact", "shardwright.runtime.memory"),
            "shardwright.__version__",
        )
    ),
    "runtime": Rule(
        (
            *("tvm", "tvm_ffi", "numpy", "ml_dtypes", "safetensors", "cuda"),
            *("tokenizers", "jinja2", "msgpack", "shardwright.errors", "shardwright.runtime"),
        ),
        # What a process with TVM's runtime library alone cannot load.
        ("tvm.relax", "tvm.tirx", "tvm.s_tir", "tvm.target", "tvm.te", "tvm.ir", "tvm.driver"),
    ),
}
EXCEPTIONS = {
    # The layers' own operations are Relax calls, which `frontend.nn` has no wrapper for.
    "model_defs/layers.py": ("tvm.relax", "tvm.tirx"),
    # Finding CUDA libraries and compiling a C++ file are the same task on both sides.
    "compiler/rocm.py": ("shardwright.runtime.code_object",),
    "compiler/rocm_check.py": ("shardwright.runtime.code_object",),
    "compiler/cuda.py": ("shardwright.runtime.native", "shardwright.runtime.tvm_runtime"),
}

PARALLELISM = {
    *("num_shards", "shard", "shards", "sharded", "sharding", "world", "world_size", "rank"),
    *("ranks", "mesh", "device_mesh", "placement", "tensor_parallel", "tp", "all_reduce"),
    *("all_gather", "allreduce", "allgather", "collective", "collectives", "ccl", "nccl"),
}


def sources(folder: str) -> list[Path]:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    return files


def imports(tree: ast.AST, package: str = "") -> Iterator[tuple[int, str]]:
    """Line and full name of everything imported, and of every attribute of `tvm` used."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = [*package.split(".")[: -(node.level - 1) or None]] if node.level else []
            module = ".".join(filter(None, [*base, node.module]))
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}"
        elif isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            if name.startswith("tvm.") and "(" not in name:
                yield node.lineno, name


def within(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def violations(source: str, rule: Rule, package: str = "") -> list[str]:
    found = []
    for line, name in imports(ast.parse(source), package):
        if name.split(".")[0] in STDLIB:
            continue
        if not within(name, rule.allowed) or within(name, rule.forbidden):
            found.append(f"line {line}: {name}")
    return found


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_import_only_what_the_table_allows(folder: str) -> None:
    found = []
    for path in sources(folder):
        name = str(path.relative_to(ROOT))
        rule = RULES[folder]
        rule = Rule(rule.allowed + EXCEPTIONS.get(name, ()), rule.forbidden)
        package = ".".join(("shardwright", *path.relative_to(ROOT).parent.parts))
        found += [f"{name}, {what}" for what in violations(path.read_text(), rule, package)]
    assert not found, "\n".join(found)


def test_the_check_itself() -> None:
    runtime = RULES["runtime"]
    assert violations("import json, numpy\nfrom tvm.runtime import disco\n", runtime) == []
    for source in (
        "from tvm import relax",
        "import tvm.relax.frontend",
        "import tvm\ntvm.target.Target('llvm')",
        "from shardwright.compiler import build",
        "def f():\n    import torch",
        "import shardwright",
    ):
        assert violations(source, runtime), source
    assert violations("from . import artifact", runtime, "shardwright.runtime") == []
    assert violations("from ..compiler import build", runtime, "shardwright.runtime")
    assert violations("from tvm.relax.frontend import nn", RULES["model_defs"]) == []
    assert violations("from tvm import relax", RULES["model_defs"])
    assert violations("from shardwright.runtime.session import Session", RULES["compiler"])


@pytest.mark.parametrize("path", sources("model_defs"), ids=lambda path: path.name)
def test_model_definitions_have_no_word_about_parallelism(path: Path) -> None:
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
    names = {token.string.lower() for token in tokens if token.type == tokenize.NAME}
    assert not names & PARALLELISM


@pytest.mark.parametrize("path", sources("shardwright"), ids=lambda path: path.name)
def test_the_public_face_loads_neither_tvm_nor_the_compiler_at_import(path: Path) -> None:
    for statement in ast.parse(path.read_text()).body:
        if isinstance(statement, ast.Import | ast.ImportFrom):
            for _, name in imports(statement):
                assert not within(name, ("tvm", "tvm_ffi", "shardwright.compiler"))


def test_chat_does_not_load_the_compiler() -> None:
    code = (
        "import sys, shardwright.cli, shardwright.callback, shardwright.runtime.chat\n"
        "print([m for m in sys.modules if m.startswith(('tvm.relax', 'shardwright.compiler',"
        " 'shardwright.model_defs', 'torch', 'transformers'))])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert result.stdout.strip() == "[]"
