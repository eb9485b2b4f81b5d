"""Compute the stored logits of tests/reference with transformers (the `reference` extra).

    python scripts/make_reference.py   # writes golden.npz, families.npz, families.json, formats.npz

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

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import quantized_models
from reference import families, models


@torch.no_grad()
def row_logits(folder: Path, prompt: list[int], fed: list[int]) -> npt.NDArray[np.float32]:
    """Return logits `[1 + len(fed), vocab]`: after the prompt and after each fed token."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    cache, rows = None, []
    for tokens in [prompt, *([token] for token in fed)]:
        output = model(torch.tensor([tokens]), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        rows.append(output.logits[0, -1])
    return np.stack([row.numpy() for row in rows])


def compute(case: models.Case, source: Any) -> tuple[npt.NDArray[np.float32], ...]:
    """Return a case's prefill `[rows, vocab]` and decode `[steps, rows, vocab]` logits, fp32.

    `source` is `models` or `families`.
    """
    with tempfile.TemporaryDirectory() as folder:
        source.write_checkpoint(case, Path(folder))
        logits = case_logits(case, Path(folder))
    return logits[0], logits[1:]


def case_logits(case: models.Case, folder: Path) -> npt.NDArray[np.float32]:
    """Logits `[1 + steps, rows, vocab]` of the checkpoint in `folder` on the case's tokens."""
    rows = [
        row_logits(folder, list(prompt), [step[i] for step in case.decode])
        for i, prompt in enumerate(case.prompts)
    ]
    return np.stack(rows, axis=1)


def quantized_logits(name: str) -> npt.NDArray[np.float32]:
    """Logits with the weights that the checkpoint of format `name` stands for, fp32."""
    case = quantized_models.case_of(name)
    with tempfile.TemporaryDirectory() as folder:
        whole = quantized_models.write_any(Path(folder) / "quantized", name)
        quantized_models.save(Path(folder) / "plain", case.config, whole)
        return case_logits(case, Path(folder) / "plain")


def saved_shapes(case: models.Case) -> dict[str, list[int]]:
    """Names and shapes of the tensors that transformers saves for the case's config.json."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(case.config))
        config = transformers.AutoConfig.from_pretrained(folder)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "saved")
        with safe_open(folder / "saved" / "model.safetensors", "np") as file:
            return {key: list(file.get_slice(key).get_shape()) for key in sorted(file.keys())}


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=formatter).parse_args()
    transformers.utils.logging.disable_progress_bar()
    shapes = {case.name: saved_shapes(case) for case in families.cases()}
    families.SHAPES.write_text(json.dumps(shapes, indent=1) + "\n")
    for source in (models, families):
        stored = {}
        for case in source.cases():
            prefill, decode = compute(case, source)
            stored[f"{case.name}/prefill"], stored[f"{case.name}/decode"] = prefill, decode
            print(f"{case.name:28} logits {prefill.std():.2f} .. {np.abs(decode).max():.2f}")
        np.savez_compressed(source.GOLDEN, **stored)
        print(f"{source.GOLDEN}: {source.GOLDEN.stat().st_size:,} bytes")
    formats = {name: quantized_logits(name) for name in quantized_models.ALL}
    np.savez_compressed(quantized_models.GOLDEN, **formats)
    print(f"{quantized_models.GOLDEN}: {quantized_models.GOLDEN.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
