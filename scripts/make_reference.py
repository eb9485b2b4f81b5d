"""Compute the logits of tests/reference/golden.npz with transformers (the `reference` extra).

    python scripts/make_reference.py            # writes tests/reference/golden.npz

Each row of a case is run alone, in a freshly loaded model: one forward over the whole prompt, then
one token at a time with the key-value cache.

Rope type `dynamic` is why the model must be fresh. transformers takes the base of the frequencies
from the largest length it has seen, and remembers it in the module: it grows with every longer
forward and falls back only for a length under max_position_embeddings, so a row of 10 tokens after
one of 13 would be rotated as if it had 13. Within one row that length is what it should be: the
prompt's at prefill, the current one at each step. Keys stay in the cache as they were rotated when
they were written.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import numpy as np
import numpy.typing as npt
import torch
import transformers

ROOT = Path(__file__).resolve().parents[1]


def load_models() -> ModuleType:
    """Return tests/reference/models.py, which belongs to no package."""
    if "reference_models" in sys.modules:
        return sys.modules["reference_models"]
    path = ROOT / "tests" / "reference" / "models.py"
    spec = importlib.util.spec_from_file_location("reference_models", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def row_logits(folder: Path, prompt: list[int], fed: list[int]) -> npt.NDArray[np.float32]:
    """Return logits `[1 + len(fed), vocab]`: after the prompt and after each fed token."""
    model = transformers.LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    cache, rows = None, []
    for tokens in [prompt, *([token] for token in fed)]:
        output = model(torch.tensor([tokens]), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        rows.append(output.logits[0, -1])
    return np.stack([row.numpy() for row in rows])


def compute(case: object) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return a case's prefill `[rows, vocab]` and decode `[steps, rows, vocab]` logits, fp32."""
    with tempfile.TemporaryDirectory() as folder:
        load_models().write_checkpoint(case, Path(folder))
        rows = [
            row_logits(Path(folder), list(prompt), [step[i] for step in case.decode])
            for i, prompt in enumerate(case.prompts)
        ]
    logits = np.stack(rows, axis=1)
    return logits[0], logits[1:]


def main() -> None:
    transformers.utils.logging.disable_progress_bar()
    models = load_models()
    stored = {}
    for case in models.cases():
        prefill, decode = compute(case)
        stored[f"{case.name}/prefill"], stored[f"{case.name}/decode"] = prefill, decode
        print(f"{case.name:28} logits {prefill.std():.2f} .. {np.abs(decode).max():.2f}")
    np.savez_compressed(models.GOLDEN, **stored)
    print(f"{models.GOLDEN}: {models.GOLDEN.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
