"""Text encoders of transformers' real classes with tiny random weights, beside tiny models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_models import MODELS, E

LETTERS = "abcdefghijklmnopqrstuvwxyz"
LENGTH = 16


def clip_tokenizer() -> Any:
    vocab = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    for letter in LETTERS:
        vocab |= {letter: len(vocab), f"{letter}</w>": len(vocab) + 1}
    return transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=LENGTH)


def t5_tokenizer() -> Any:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -2.0)]
    pieces += [(letter, -3.0) for letter in "▁" + LETTERS]
    return transformers.T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=LENGTH)


def clip(width: int, projection: int | None = None) -> Any:
    torch.manual_seed(width)
    config = transformers.CLIPTextConfig(
        vocab_size=2 + 2 * len(LETTERS), hidden_size=width, intermediate_size=8,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=LENGTH,
        projection_dim=projection or width, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    kind = "CLIPTextModel" if projection is None else "CLIPTextModelWithProjection"
    return getattr(transformers, kind)(config).eval()


def t5(kind: str = "T5") -> Any:
    torch.manual_seed(5)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=4 + len(LETTERS), d_model=E, d_kv=6, d_ff=8, num_layers=1, num_heads=2
    )
    return getattr(transformers, f"{kind}EncoderModel")(config).eval()


Parts = dict[str, Any]
ENCODERS: dict[str, Callable[[], Parts]] = {
    "sd": lambda: {"text_encoder": clip(E), "tokenizer": clip_tokenizer()},
    "sdxl": lambda: {
        "text_encoder": clip(4),
        "tokenizer": clip_tokenizer(),
        "text_encoder_2": clip(8, 6),
        "tokenizer_2": clip_tokenizer(),
    },
    "sd3": lambda: {
        "text_encoder": clip(4, 2),
        "tokenizer": clip_tokenizer(),
        "text_encoder_2": clip(8, 4),
        "tokenizer_2": clip_tokenizer(),
        "text_encoder_3": t5(),
        "tokenizer_3": t5_tokenizer(),
    },
    "flux-plain": lambda: {
        "text_encoder": clip(6),
        "tokenizer": clip_tokenizer(),
        "text_encoder_2": t5(),
        "tokenizer_2": t5_tokenizer(),
    },
    "pixart": lambda: {"text_encoder": t5(), "tokenizer": t5_tokenizer()},
    "wan": lambda: {"text_encoder": t5("UMT5"), "tokenizer": t5_tokenizer()},
}
"""By the names of `tiny_models.MODELS`."""


def write(name: str, folder: Path) -> Path:
    """A pipeline's folder with its network, scheduler and text encoders."""
    MODELS[name].write(folder)
    index = json.loads((folder / "model_index.json").read_text())
    for part, made in ENCODERS[name]().items():
        made.save_pretrained(folder / part)
        index[part] = ["transformers", type(made).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
