"""Fetch a model from the Hugging Face hub: what a build needs of it and nothing else.

Progress, resuming, the cache (`HF_HOME`), mirrors (`HF_ENDPOINT`) and tokens are huggingface-hub's.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from shardwright.errors import CheckpointError

INDEX = "model.safetensors.index.json"
_SMALL = ["*.json", "*.jinja", "tokenizer.model", "merges.txt"]
_NEVER = ["*/*", "consolidated*"]  # original/, onnx/, Mistral's second copy: the same again
_NAME = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@(.+))?")
_STATUS_LINE = re.compile(r"\d{3} (Client|Server) Error.*|\(?Request ID.*")


def download(model: str, weights: bool) -> Path:
    """The directory in the user's cache of hub model `ORG/NAME` or `ORG/NAME@REVISION`.

    With `weights` False only configuration and tokenizer are fetched. The weights are the
    safetensors files of the index, or else those of the top directory; copies in other formats stay
    where they are. A revision is a branch, a tag or a commit.

    Raises CheckpointError, with the hub's own message and the mend, if there is no such model or
    revision, access to it is restricted, it cannot be reached and is not in the cache, or it has no
    weights that can be read.
    """
    match = _NAME.fullmatch(model)
    if match is None:
        raise CheckpointError(
            f"{model}: no such model; expected a directory with config.json, or a Hugging Face id "
            "such as meta-llama/Llama-3.1-8B, with @REVISION if it is not the main one"
        )
    name, revision = match[1], match[2]
    root = _fetch(model, name, revision, _SMALL)
    if not weights:
        return root
    # The commit of the first call, which names the directory, whatever is pushed since.
    return _fetch(model, name, root.name, _weight_files(model, name, root))


def _weight_files(model: str, name: str, root: Path) -> list[str]:
    """Patterns of the files with weights, given the directory of the small files."""
    if (root / INDEX).is_file():
        try:
            table = json.loads((root / INDEX).read_bytes())["weight_map"]
            return sorted(set(map(str, table.values())))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise CheckpointError(
                f"{model}: {INDEX} has no weight_map; the model is damaged"
            ) from None
    if any((root / cache).is_file() for cache in ("ndarray-cache.json", "tensor-cache.json")):
        return ["params_shard_*.bin"]  # MLC's, which are plain numbers and no pickles
    files = [path for path in _list(name, root) if not any(map(path.match, _NEVER))]
    if Path("model.safetensors") in files:
        return ["model.safetensors"]
    endings = {path.suffix for path in files}
    if ".safetensors" in endings:
        return ["*.safetensors"]
    raise CheckpointError(f"{model}: {_why_no_weights(endings)}")


def _list(name: str, root: Path) -> list[Path]:
    """Files of the commit that names directory `root`; what is in the cache if the hub is away."""
    from huggingface_hub import HfApi

    try:
        return [Path(file) for file in HfApi().list_repo_files(name, revision=root.name)]
    except Exception:  # the hub's errors come from whichever HTTP library it uses
        return [Path(path.name) for path in root.iterdir()]


def _why_no_weights(endings: set[str]) -> str:
    if endings & {".bin", ".pth", ".pt", ".ckpt"}:
        return (
            "holds PyTorch .bin files only, which are pickles: reading them runs code. Take a "
            "repository with safetensors, or a revision such as refs/pr/N that adds them, or "
            "convert it: `model.save_pretrained(DIR)` of transformers writes safetensors"
        )
    if ".gguf" in endings:
        return "holds GGUF files only; take the repository that they were made from"
    return "holds no safetensors; take a repository that does"


def _fetch(model: str, name: str, revision: str | None, patterns: list[str]) -> Path:
    # Only here: it is slow to import, and a local checkpoint does not need it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=patterns,
                ignore_patterns=_NEVER,
            )
        )
    except GatedRepoError as error:
        raise CheckpointError(
            f"{model}: access is restricted; accept its terms on huggingface.co and run "
            f"`hf auth login` ({_message(error)})"
        ) from None
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{model}: no such model, neither a directory here nor on the hub; check the name, and "
            f"run `hf auth login` if it is private ({_message(error)})"
        ) from None
    except RevisionNotFoundError as error:
        raise CheckpointError(
            f"{model}: the model has no revision {revision}; give a branch, tag or commit of it "
            f"({_message(error)})"
        ) from None
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{model}: no such directory, not (or not all of it) in the cache, and the hub cannot "
            f"be reached; check the network, HF_ENDPOINT and HF_HUB_OFFLINE ({_message(error)})"
        ) from None
    except Exception as error:  # the hub's errors come from whichever HTTP library it uses
        raise CheckpointError(
            f"{model}: cannot be fetched; run the same command again to resume ({_message(error)})"
        ) from None


def _message(error: Exception) -> str:
    """The hub's message in one line, without the status line that repeats the address."""
    lines = [line.strip() for line in str(error).splitlines()]
    kept = [line for line in lines if line and not _STATUS_LINE.fullmatch(line)]
    return " ".join(kept)[:400] or type(error).__name__
