"""Compile published models at full size for CUDA, without weights and without a GPU.

Runs `shardwright build --build-model-only` with nvcc for each configuration of
`tests/reference/published.py` and each number of ranks, one after the other, and appends the
outcome to a JSON file as it goes; what the file already has as built is not built again. Prints
those that failed, and exits with 1 if there are any. About half a minute each on 2 cores.

    python scripts/build_published.py FILE.json [--models A,B] [--num-shards 2,4,8] [--batch 1]
    python scripts/build_published.py FILE.json --table
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from reference.published import PUBLISHED


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="JSON file of the outcomes")
    parser.add_argument("--models", help="names, separated by commas; all by default")
    parser.add_argument("--num-shards", default="2,4,8")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--arch", default="sm_90a")
    parser.add_argument("--quantization", default="q4f16_1")
    parser.add_argument("--expert-parallel", action="store_true")
    parser.add_argument("--table", action="store_true", help="only print what the file has")
    options = parser.parse_args()
    found = json.loads(options.results.read_text()) if options.results.exists() else {}
    if options.table:
        print(table(found))
        return 0
    for name in options.models.split(",") if options.models else PUBLISHED:
        kind = f"{scheme_of(name, options)}, batch {options.batch}"
        kind += ", expert-parallel" * options.expert_parallel
        row = found.setdefault(f"{name}, {kind}", {})
        for ranks in options.num_shards.split(","):
            if ranks in row and row[ranks]["error"] is None:
                continue
            row[ranks] = build(name, ranks, options)
            print(name, ranks, row[ranks], flush=True)
            options.results.write_text(json.dumps(found, indent=1) + "\n")
    failed = [(name, ranks) for name, row in found.items() for ranks in row if row[ranks]["error"]]
    for name, ranks in failed:
        print(f"failed: {name}, {ranks} GPUs: {found[name][ranks]['error']}", file=sys.stderr)
    return 1 if failed else 0


def scheme_of(name: str, options: argparse.Namespace) -> str:
    """What to quantize with: published quantized, a model stays so."""
    own = "quantization_config" in PUBLISHED[name]
    return "checkpoint" if own else str(options.quantization)


def build(name: str, ranks: str, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds, bytes of the library, and the error's last lines or None."""
    with tempfile.TemporaryDirectory() as temporary:
        model, out = Path(temporary) / "model", Path(temporary) / "out"
        model.mkdir()
        (model / "config.json").write_text(json.dumps(PUBLISHED[name]))
        command = [
            *(sys.executable, "-m", "shardwright", "build", "--model", model, "-o", out),
            *("--quantization", scheme_of(name, options), "--num-shards", ranks),
            *("--target", "cuda", "--arch", options.arch, "--use-cuda-graph"),
            *("--max-batch-size", str(options.batch), "--build-model-only"),
        ]
        command += ["--expert-parallel"] * options.expert_parallel
        began = time.monotonic()
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        entry = {"seconds": round(time.monotonic() - began), "bytes": 0, "error": None}
        if done.returncode != 0:
            return entry | {"error": done.stderr.strip()[-500:] or f"exit {done.returncode}"}
        return entry | {"bytes": (out / "model.so").stat().st_size}


def table(found: dict[str, dict[str, Any]]) -> str:
    """A line a model, with the seconds for each number of ranks, or that it failed."""
    columns = sorted({ranks for row in found.values() for ranks in row}, key=int)
    lines = [f"| model | {' | '.join(f'{c} GPUs' for c in columns)} |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for name, row in found.items():
        cells = [
            ("failed" if row[c]["error"] else f"{row[c]['seconds']} s") if c in row else ""
            for c in columns
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
