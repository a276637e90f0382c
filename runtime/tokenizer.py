"""Text to ids and back, by the tokenizer that comes with the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmopt.compiler.errors import InputError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
)


def load_tokenizer(source: str | None) -> Any:
    """The transformers tokenizer of a folder or hub id; None where there is none."""
    if source is None:
        return None
    folder = Path(source)
    if folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise InputError(
            f"tokenizer of {source!r} cannot be read: {str(error).splitlines()[0]}; wanted tokenizer.json beside the "
            "weights"
        ) from error
