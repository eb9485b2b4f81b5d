"""The demo model's greedy answers, which every target and number of ranks must give.

python tests/demo.py [--nccl] [ARTEFACT ...]    compare artefacts with them
python tests/demo.py --write                    write them again, from one CPU rank
"""

import json
import sys
import tempfile
from pathlib import Path

DEMO = Path(__file__).parents[1] / "demo"
GOLDEN = Path(__file__).parent / "golden" / "demo_tokens.json"
QUANTIZATION = "q4f16_1"
BATCH = 4


def questions() -> list[str]:
    """Held-out sums, differences and words, and questions about the project."""
    held_out = json.loads((DEMO / "heldout.json").read_text())
    kinds = ("sums", "differences", "words", "about")
    return [item["prompt"] for kind in kinds for item in held_out[kind][:8]]


def answers(artefact: str | Path, collectives: str = "auto") -> list[list[int]]:
    """Greedy token ids of the replies to `questions()`, asked in batches of different lengths."""
    from shardwright import Session
    from shardwright.runtime.sampling import SamplingParams
    from shardwright.runtime.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_directory(Path(artefact))
    asked = questions()
    prompts = [tokenizer.encode_chat([{"role": "user", "content": q}]) for q in asked]
    replies: list[list[int]] = []
    with Session(artefact, collectives=collectives) as session:
        for i in range(0, len(prompts), BATCH):
            batch = prompts[i : i + BATCH]
            rows: list[list[int]] = [[] for _ in batch]
            for step in session.generate(batch, SamplingParams(max_new_tokens=64)):
                for row, token in zip(rows, step, strict=True):
                    row += [] if token is None else [token]
            replies += rows
    return replies


def golden() -> list[list[int]]:
    """The stored replies."""
    stored = json.loads(GOLDEN.read_text())
    assert list(stored) == questions()
    return list(stored.values())


def main() -> None:
    if sys.argv[1:] == ["--write"]:
        from shardwright.compiler.build import build
        from shardwright.compiler.options import BuildOptions

        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "demo"
            build(BuildOptions(str(DEMO / "model"), out, QUANTIZATION, max_batch_size=BATCH))
            replies = dict(zip(questions(), answers(out), strict=True))
        lines = [f" {json.dumps(q)}: {json.dumps(a)}" for q, a in replies.items()]
        GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        return
    differ, collectives = 0, "nccl" if "--nccl" in sys.argv else "auto"
    for artefact in [a for a in sys.argv[1:] if a != "--nccl"]:
        got = answers(artefact, collectives)
        wrong = sum(a != b for a, b in zip(got, golden(), strict=True))
        print(f"{Path(artefact).name}: {len(got) - wrong} of {len(got)} replies are the CPU's")
        differ += wrong
    raise SystemExit(differ > 0)


if __name__ == "__main__":
    main()
