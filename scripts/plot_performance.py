"""Draw milliseconds per token over the number of GPUs, from the JSON of `bench_decode.py`.

    python scripts/plot_performance.py results.json [--peers scripts/peers.json] -o docs/decode.svg

A panel for each batch size, a line for each model; dashed, the floor. Needs matplotlib (the `plot`
extra).
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import click


def series(report: dict[str, Any]) -> dict[int, dict[str, list[tuple[int, float, float]]]]:
    """For each batch and model (ranks, ms, floor in ms), by the number of ranks."""
    found: dict[int, dict[str, list[tuple[int, float, float]]]] = defaultdict(dict)
    for result in report["results"]:
        for entry in result.get("decode", []):
            floor = entry["bytes_per_step"] / report["copy_bytes_per_s"] * 1e3
            line = found[entry["batch"]].setdefault(result["model"], [])
            line.append((result["ranks"], entry["ms_per_token"], floor))
    return {b: {m: sorted(points) for m, points in lines.items()} for b, lines in found.items()}


def peer_points(
    peers: list[dict[str, Any]], report: dict[str, Any], model: str, batch: int
) -> list[tuple[int, float]]:
    """(ranks, ms) of the fastest other engine on the same model."""
    same = next(r for r in report["results"] if r.get("model") == model)
    bits = 4 if same["quantization"].startswith("q4") else 16
    best: dict[int, float] = {}
    for p in peers:
        shape = (p["layers"], p["hidden_size"]) == (same["layers"], same["hidden_size"])
        if shape and p["batch"] == batch and p["bits"] == bits:
            best[p["ranks"]] = min(p["ms"], best.get(p["ranks"], p["ms"]))
    return sorted(best.items())


@click.command()
@click.argument("results", type=click.Path(path_type=Path, exists=True))
@click.option("--peers", type=click.Path(path_type=Path, exists=True), help="Others' figures.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Image file.")
def main(results: Path, peers: Path | None, output: Path) -> None:
    """Draw latency over N."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    report = json.loads(results.read_text())
    others = json.loads(peers.read_text())["figures"] if peers else []
    panels = series(report)
    if not panels:
        raise click.ClickException(f"{results}: no measurements; run scripts/bench_decode.py")
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(5 * len(panels), 4), squeeze=False, layout="constrained"
    )
    for axis, (batch, lines) in zip(axes[0], sorted(panels.items()), strict=True):
        for model, points in lines.items():
            ranks = [p[0] for p in points]
            (line,) = axis.plot(ranks, [p[1] for p in points], "o-", label=model)
            axis.plot(ranks, [p[2] for p in points], "--", color=line.get_color(), lw=0.8)
            if marks := peer_points(others, report, model, batch):
                axis.plot(*zip(*marks, strict=True), "x", color=line.get_color())
        ticks = sorted({p[0] for points in lines.values() for p in points})
        axis.set(xscale="log", yscale="log", xlabel="GPUs", title=f"batch {batch}")
        axis.set_xticks(ticks, [str(n) for n in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3, which="both")
    axes[0][0].set_ylabel("ms per token")
    note = "dashed: the floor" + ("; crosses: the fastest other engine" if others else "")
    handles, labels = axes[0][-1].get_legend_handles_labels()
    figure.legend(
        handles, labels, title=note, loc="outside lower center", ncols=len(labels), fontsize="small"
    )
    figure.savefig(output)
    print(output)


if __name__ == "__main__":
    main()
