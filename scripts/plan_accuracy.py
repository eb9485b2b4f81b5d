"""Steps that `shardwright plan` predicts beside those that `bench_decode.py` measured, in Markdown.

The measured ones are those of the JSON files given; the copy bandwidth is that of the same run.

    python scripts/plan_accuracy.py docs/h200-batch-1.json docs/h200-batches.json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from shardwright.compiler.cuda import cuda_target
from shardwright.compiler.plan import Estimate, Machine, estimate
from shardwright.compiler.quantization import quantization
from shardwright.compiler.trace import Limits
from shardwright.model_defs import family_of

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from reference.published import PUBLISHED

MODELS = {"8b": "Llama-3-8B", "70b": "Llama-2-70b"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path, help="JSON of bench_decode.py")
    parser.add_argument("--link", type=float, default=450e9, help="bytes/s between GPUs, each way")
    parser.add_argument("--latency", type=float, default=1.5, help="of a small all-reduce, us")
    options = parser.parse_args()
    found: dict[tuple[str, str, int], Estimate] = {}
    print("| model | GPUs | rows | predicted, ms | measured, ms | off by |")
    print("|---|---|---|---|---|---|")
    for path in options.results:
        run = json.loads(path.read_text())
        machine = Machine(0, run["copy_bytes_per_s"], options.link, options.latency * 1e-6)
        for result in run["results"]:
            name, scheme = MODELS[result["model"].split("-")[0]], result["quantization"]
            ranks = result["ranks"]
            if (name, scheme, ranks) not in found:
                found[name, scheme, ranks] = planned(name, scheme, ranks)
            for step in result["decode"]:
                predicted = found[name, scheme, ranks].seconds(
                    machine, step["batch"], result["context"]
                )
                measured = step["ms_per_token"]
                off = predicted * 1e3 / measured - 1
                print(
                    f"| {name} {scheme} | {ranks} | {step['batch']} | {predicted * 1e3:.2f} | "
                    f"{measured:.2f} | {off:+.0%} |"
                )


def planned(name: str, scheme: str, ranks: int) -> Estimate:
    """What the plan knows of a published model."""
    _, family = family_of(PUBLISHED[name])
    config = family.config.from_hf(PUBLISHED[name])
    limits = Limits(2560, 1, 2048, 16)
    return estimate(family, config, quantization(scheme), ranks, cuda_target(("sm_90a",)), limits)


if __name__ == "__main__":
    main()
