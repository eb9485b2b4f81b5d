"""Train the demo model of demo/model from nothing: tokenizer, chats, weights (minutes on a GPU).

    python scripts/train_demo_model.py --out demo --minutes 4        # one H200
    python scripts/train_demo_model.py --out /tmp/x --minutes 0.5 --tokens 4096 --eval-limit 50

Needs the `reference` extra (torch and transformers). The last part of the training rounds the
weights to int4 in the forward pass (straight-through), so that the model keeps its answers when
built with q4f16_1. Writes OUT/model, OUT/heldout.json and OUT/training.json (what was reached).
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import demo_data
import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

# 3 ranks must pad (8 heads, 352 = 11 groups of 32, 512 rows), 4 ranks replicate the 2 kv heads.
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.02,
    "pretraining_tp": 1,
    "use_cache": True,
    "torch_dtype": "float16",
}
PAD, BOS, EOS = 0, 1, 2
GROUP, INT4_MAX = 32, 7
# (share of steps, tokens in a row): many short chats, some that fill the whole context.
ROW_LENGTHS = [(0.6, 64), (0.3, 256), (0.1, 512)]
QUANTIZED_FROM = 0.6  # share of the training after which int4 rounding starts
QUANTIZED_SHARE = 0.75  # share of those steps that round; the others keep fp16 exact too

# A word after a space, or capitalised, may become one token. A word in quotes, as the ones to
# reverse are, stays letters; digits always stay alone.
PRE_TOKEN = r" [A-Za-z]+|[A-Z][a-z]+|\p{N}|\p{L}| ?[^\s\p{L}\p{N}]+|\s"


def train_tokenizer() -> Tokenizer:
    """Return a byte-level BPE tokenizer of `CONFIG["vocab_size"]` tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKEN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=demo_data.SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(demo_data.tokenizer_corpus(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)]
    )
    if tokenizer.get_vocab_size() != CONFIG["vocab_size"]:
        raise SystemExit(f"the tokenizer has {tokenizer.get_vocab_size()} tokens, not 512")
    return tokenizer


class Segments:
    """All training chats as token ids on the device, from which batches are put together.

    `ids [S, L]` int16, right-padded; `lengths [S]`; `replies [S, L]` bool, true where a token is
    part of a reply or the end of one. `ranges` gives each kind's rows and its share.
    """

    def __init__(self, tokenizer: Tokenizer, device: str, fraction: float) -> None:
        """Tokenize every `1 / fraction`-th chat of each kind."""
        assistant = demo_data.SPECIAL_TOKENS.index("<|assistant|>")
        rows: list[list[int]] = []
        self.ranges: list[tuple[float, int, int]] = []
        for share, chats in demo_data.MIXTURE:
            texts = [demo_data.render(chat) for chat in chats()]
            texts = texts[:: max(1, round(1 / fraction))] if len(texts) > 1000 else texts
            start = len(rows)
            for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):
                rows.append(encoding.ids)
            self.ranges.append((share, start, len(rows)))
        width = max(map(len, rows))
        self.lengths = torch.tensor([len(row) for row in rows], device=device)
        flat = torch.tensor([row + [PAD] * (width - len(row)) for row in rows], dtype=torch.int16)
        self.ids = flat.to(device)
        # Inside a reply: after an <|assistant|>, up to and including its </s>.
        ends = self.ids == EOS
        ends_before = ends.cumsum(1) - ends.long()
        opened = (self.ids == assistant).cumsum(1) - (self.ids == assistant).long()
        self.replies = (ends_before % 2 == 1) & (opened > 0) & (self.ids != PAD)
        self.starts = [
            torch.tensor([BOS, *(self._system(tokenizer, text) if text else [])], device=device)
            for text in [None, None, None, *demo_data.SYSTEM_PROMPTS]
        ]

    @staticmethod
    def _system(tokenizer: Tokenizer, text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(f"<|system|>{text}</s>", add_special_tokens=False).ids
        return ids

    def batch(self, rows: int, width: int, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids and labels `[rows, width]` int64; labels are -100 outside replies.

        Each row is one chat: the `start`-th beginning, then segments until it is full.
        """
        device = self.ids.device
        count = width // 12 + 1
        kinds = torch.multinomial(
            torch.tensor([share for share, _, _ in self.ranges], device=device),
            rows * count,
            replacement=True,
        ).view(rows, count)
        low = torch.tensor([low for _, low, _ in self.ranges], device=device)[kinds]
        high = torch.tensor([high for _, _, high in self.ranges], device=device)[kinds]
        picked = low + (torch.rand(rows, count, device=device) * (high - low)).long()
        lengths = self.lengths[picked]
        prefix = self.starts[start]
        begin = lengths.cumsum(1) - lengths + len(prefix)
        column = torch.arange(self.ids.shape[1], device=device)
        target = begin[:, :, None] + column
        # Column `width` collects everything that does not fit.
        target = torch.where((column < lengths[:, :, None]) & (target < width), target, width)
        target = target.view(rows, -1)
        ids = torch.full((rows, width + 1), PAD, device=device, dtype=torch.int64)
        ids.scatter_(1, target, self.ids[picked].view(rows, -1).long())
        replies = torch.zeros((rows, width + 1), device=device, dtype=torch.bool)
        replies.scatter_(1, target, self.replies[picked].view(rows, -1))
        ids[:, : len(prefix)] = prefix
        ids, replies = ids[:, :width], replies[:, :width]
        return ids, torch.where(replies, ids, -100)


def fake_quantize(weight: torch.Tensor) -> torch.Tensor:
    """Round a matrix `[out, in]` to q4f16_1's grid, passing gradients straight through.

    Groups of 32 along the input, scale max|w| / 7 in fp16, values -7..7.
    """
    groups = weight.detach().unflatten(-1, (-1, GROUP))
    scale = (groups.abs().amax(-1, keepdim=True) / INT4_MAX).clamp_min(6e-8).half().float()
    rounded = (groups / scale).round().clamp(-INT4_MAX, INT4_MAX) * scale
    return weight + (rounded.flatten(-2) - weight.detach())


def quantized(parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the parameters with every matrix (linear layers and embedding) fake-quantized."""
    return {k: fake_quantize(v) if v.ndim == 2 else v for k, v in parameters.items()}


def half(parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the parameters rounded to fp16, as they are stored."""
    return {k: v.half().float() for k, v in parameters.items()}


def learn(
    model: LlamaForCausalLM, segments: Segments, minutes: float, tokens: int, peak: float
) -> int:
    """Train for `minutes` of wall time with `tokens` tokens a step; return the steps taken.

    Progress is measured in time, so that the schedule ends when the time does.
    """
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=peak,
        betas=(0.9, 0.98),
        fused=segments.ids.is_cuda,
    )
    parameters = dict(model.named_parameters())
    choices = torch.Generator().manual_seed(0)
    shares = torch.tensor([share for share, _ in ROW_LENGTHS])
    begin, step, last_print = time.time(), 0, 0.0
    while (progress := (time.time() - begin) / (60 * minutes)) < 1:
        warm = min(1.0, (step + 1) / 200)
        for group in optimizer.param_groups:
            group["lr"] = peak * warm * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * progress)))
        width = ROW_LENGTHS[int(torch.multinomial(shares, 1, generator=choices))][1]
        start = int(torch.randint(len(segments.starts), (), generator=choices))
        draw = float(torch.rand((), generator=choices))
        ids, labels = segments.batch(max(1, tokens // width), width, start)
        rounding = progress > QUANTIZED_FROM and draw < QUANTIZED_SHARE
        used = quantized(parameters) if rounding else parameters
        logits = torch.func.functional_call(
            model, used, kwargs={"input_ids": ids, "use_cache": False}
        ).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if progress - last_print > 0.02:
            last_print = progress
            print(
                f"{progress:5.0%} step {step} loss {loss.item():.4f} {'q4' if rounding else 'fp'}",
                flush=True,
            )
    return step


@torch.no_grad()
def answer(
    model: LlamaForCausalLM, tokenizer: Tokenizer, prompts: list[str], limit: int
) -> list[str]:
    """Return the greedy replies (at most `limit` tokens) to rendered prompts, as text."""
    device = model.device
    encoded = [e.ids for e in tokenizer.encode_batch(prompts, add_special_tokens=False)]
    lengths = torch.tensor([len(ids) for ids in encoded], device=device)
    width = int(lengths.max()) + limit
    ids = torch.tensor([row + [PAD] * (width - len(row)) for row in encoded], device=device)
    rows = torch.arange(len(encoded), device=device)
    for i in range(limit):
        # Padding follows each row's last token, so causal attention never sees it.
        logits = model(ids, use_cache=False).logits[rows, lengths + i - 1]
        ids[rows, lengths + i] = logits.argmax(-1)
    replies = [row[n : n + limit].tolist() for row, n in zip(ids, lengths.tolist(), strict=True)]
    cut = [row[: row.index(EOS)] if EOS in row else row for row in replies]
    return [str(text) for text in tokenizer.decode_batch(cut)]


def score(
    model: LlamaForCausalLM, tokenizer: Tokenizer, limit: int | None
) -> dict[str, dict[str, Any]]:
    """Return for each held-out kind the share of exact replies and the first few wrong ones."""
    held: dict[str, Any] = demo_data.held_out()
    chats = held.pop("chats")
    prompts: dict[str, list[tuple[str, str]]] = {
        kind: [
            (f"<s><|user|>{row['prompt']}</s><|assistant|>", row["answer"]) for row in rows[:limit]
        ]
        for kind, rows in held.items()
    }
    prompts["chats"] = []
    for chat in chats:
        text = "<s>"
        for turn in chat:
            text += f"<|user|>{turn['prompt']}</s><|assistant|>"
            prompts["chats"].append((text, turn["answer"]))
            text += f"{turn['answer']}</s>"
    result = {}
    for kind, pairs in prompts.items():
        tokens = 64 if kind == "about" else 16
        replies = answer(model, tokenizer, [prompt for prompt, _ in pairs], tokens)
        wrong = [
            f"{prompt} {reply!r} not {want!r}"
            for (prompt, want), reply in zip(pairs, replies, strict=True)
            if reply != want
        ]
        result[kind] = {"exact": round(1 - len(wrong) / len(pairs), 4), "of": len(pairs)}
        print(f"  {kind}: {result[kind]} {wrong[:3]}", flush=True)
    return result


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Write OUT/model in ordinary Hugging Face layout (fp16 safetensors) and OUT/heldout.json."""
    folder = out / "model"
    folder.mkdir(parents=True, exist_ok=True)

    def write(path: Path, value: object) -> None:
        path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")

    tensors = {k: v.detach().half().cpu().contiguous() for k, v in model.named_parameters()}
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors creates it for the owner alone
    tokenizer.save(str(folder / "tokenizer.json"))
    write(folder / "config.json", CONFIG)
    write(
        folder / "generation_config.json",
        {"bos_token_id": BOS, "eos_token_id": [EOS], "pad_token_id": PAD, "do_sample": False},
    )
    write(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "<pad>",
            "model_max_length": CONFIG["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
            "chat_template": demo_data.CHAT_TEMPLATE,
        },
    )
    write(out / "heldout.json", demo_data.held_out())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder to write")
    parser.add_argument("--minutes", type=float, default=4.0, help="training time")
    parser.add_argument("--tokens", type=int, default=98304, help="tokens a step")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="peak of the schedule")
    parser.add_argument("--fraction", type=float, default=1.0, help="share of the chats to use")
    parser.add_argument("--eval-limit", type=int, default=None, help="held-out prompts of a kind")
    args = parser.parse_args()

    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = train_tokenizer()
    segments = Segments(tokenizer, device, args.fraction)
    config = LlamaConfig(**{k: v for k, v in CONFIG.items() if k != "torch_dtype"})
    model = LlamaForCausalLM(config).float().to(device)
    count = sum(p.numel() for p in model.parameters())
    print(f"{count:,} parameters, {len(segments.lengths):,} chats on {device}", flush=True)

    steps = learn(model, segments, args.minutes, args.tokens, args.learning_rate)
    model.eval()
    report: dict[str, Any] = {
        "parameters": count,
        "steps": steps,
        "tokens_per_step": args.tokens,
        "minutes": args.minutes,
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
    }
    save(model, tokenizer, args.out)
    trained = {k: v.detach().clone() for k, v in model.named_parameters()}
    variants: list[tuple[str, Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]]] = [
        ("fp16", half),
        ("q4f16_1", lambda parameters: quantized(half(parameters))),
    ]
    for name, change in variants:
        print(name, flush=True)
        model.load_state_dict(change(trained))
        report[name] = score(model, tokenizer, args.eval_limit)
    (args.out / "training.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
