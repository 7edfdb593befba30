"""Image towers by timm and text towers, each from pixels or ids to one pooled vector and, if wanted, to its tokens."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from vlkd.errors import UserError
from vlkd.models.base import evaluating
from vlkd.models.folder import WEIGHTS, read_image_tower
from vlkd.models.quiet import without_bars
from vlkd.models.tokenizer import first_line

POOLINGS = ("mean", "cls")
GRID = 4
"""Image tokens are the averages of at most so many cells a side, so that stored tables and attention stay small."""


def masked_mean(tokens: Tensor, mask: Tensor) -> Tensor:
    """Mean of tokens (B, N, C) over the true entries of mask (B, N): (B, C); a text without a token gives zero."""
    weights = mask.to(tokens.dtype)[:, :, None]
    return (tokens * weights).sum(dim=1) / weights.sum(dim=1).clamp_min(1.0)


class Block(nn.Module):
    """A pre-norm transformer layer: x + attention(norm(x)), then x + mlp(norm(x)); GELU, four times the width."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.in_projection = nn.Linear(width, 3 * width)
        self.out_projection = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """tokens (B, N, C), mask (B, 1, 1, N) true where a token may be attended to."""
        batch, length, width = tokens.shape
        mixed = self.in_projection(self.attention_norm(tokens))
        query, key, value = mixed.view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        dropout = self.dropout.p if self.training else 0.0
        seen = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        tokens = tokens + self.dropout(self.out_projection(seen.transpose(1, 2).reshape(batch, length, width)))
        inner = self.dropout(nn.functional.gelu(self.mlp_in(self.mlp_norm(tokens))))
        result: Tensor = tokens + self.dropout(self.mlp_out(inner))
        return result


class CompactText(nn.Module):
    """A small bidirectional text tower: embeddings, pre-norm layers, a final norm, the masked mean.

    Args:
        vocab_size: V.
        width: C, a multiple of `heads`.
        layers: number of transformer layers.
        heads: attention heads.
        context_length: the largest N.
        dropout: after the embeddings, on attention weights and in the layers.

    Raises:
        UserError: the width is no multiple of the heads.
    """

    def __init__(
        self, *, vocab_size: int, width: int, layers: int, heads: int, context_length: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise UserError(f"Found a text width of {width} with {heads} heads; choose a width that the heads divide.")
        self.width = width
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.position_embedding = nn.Parameter(torch.empty(context_length, width))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.final_norm = nn.LayerNorm(width)
        # CLIP's initialisation of its text tower.
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position_embedding, std=0.01)

    def tokens(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids and mask (B, N) to (B, N, C)."""
        tokens = self.dropout(self.token_embedding(ids) + self.position_embedding[: ids.shape[1]])
        for block in self.blocks:
            tokens = block(tokens, mask[:, None, None, :])
        result: Tensor = self.final_norm(tokens)
        return result

    def pool(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """tokens (B, N, C) and mask (B, N) to (B, C)."""
        return masked_mean(tokens, mask)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids and mask (B, N) to (B, C)."""
        return self.pool(self.tokens(ids, mask), mask)


class TransformersText(nn.Module):
    """A transformers encoder and its pooled output, "mean" (masked, as sentence-transformers does) or "cls"."""

    def __init__(self, encoder: Any, pooling: str) -> None:
        super().__init__()
        if pooling not in POOLINGS:
            raise UserError(f"Found text pooling {pooling!r}, expected one of {', '.join(POOLINGS)}.")
        self.encoder = encoder
        self.pooling = pooling
        self.config = encoder.config
        self.width = int(encoder.config.hidden_size)
        if getattr(encoder, "pooler", None) is not None:
            encoder.pooler = None  # never used here: its weights would count, and wait for gradients that never come

    def tokens(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids and mask (B, N) to (B, N, C)."""
        tokens: Tensor = self.encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        return tokens

    def pool(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """tokens (B, N, C) and mask (B, N) to (B, C)."""
        return masked_mean(tokens, mask) if self.pooling == "mean" else tokens[:, 0]

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids and mask (B, N) to (B, C)."""
        return self.pool(self.tokens(ids, mask), mask)


def set_dropout(module: nn.Module, probability: float) -> None:
    """Set the probability of every dropout layer inside."""
    for child in module.modules():
        if isinstance(child, nn.Dropout):
            child.p = probability


def build_image_tower(name: str, kwargs: str) -> Any:
    """A timm model without classifier and without weights.

    Args:
        name: timm's name.
        kwargs: a JSON object of further arguments of `timm.create_model`, such as `{"channels": [32, 64, 128, 224]}`.

    Raises:
        UserError: timm does not know the name or refuses the arguments.
    """
    import timm

    try:
        arguments = json.loads(kwargs or "{}")
        return timm.create_model(name, pretrained=False, num_classes=0, **arguments)
    except Exception as error:  # timm's constructors raise whatever an odd argument provokes
        close = timm.list_models(f"*{name.split('.')[0][:8]}*")[:5]
        raise UserError(
            f"timm cannot build {name!r} with {kwargs or '{}'} ({first_line(error)}); "
            f"expected one of timm.list_models(){', such as ' + ', '.join(close) if close else ''}."
        ) from error


def image_tower_width(tower: Any) -> int:
    """C of a timm model without classifier; some heads widen the last features."""
    return int(getattr(tower, "head_hidden_size", None) or tower.num_features)


def image_tokens(tower: Any, maps: Tensor) -> Tensor:
    """Tokens in the space of the pooled output, from what `tower.forward_features` returned: (B, N, C).

    A map of cells is averaged down to at most `GRID` x `GRID` of them, and each goes through the tower's own head as if
    it were the whole image, so that norms and widenings after the pool act on it too. Of a transformer's tokens the
    class and register tokens are dropped; the patches are averaged in the same way where they form a square, and take
    the norm that follows the pool. N counts what is left.

    Args:
        tower: a timm model without classifier.
        maps: (B, C', H, W), (B, H, W, C') where the tower's `output_fmt` is NHWC, or (B, N', C').

    Raises:
        UserError: the tower's features have another form.
    """
    found = None
    if isinstance(maps, Tensor) and maps.ndim == 3:
        found = patch_tokens(tower, maps)
    elif isinstance(maps, Tensor) and maps.ndim == 4:
        found = cell_tokens(tower, maps)
    if found is None or found.ndim != 3 or found.shape[2] != image_tower_width(tower):
        form = tuple(maps.shape) if isinstance(maps, Tensor) else type(maps).__name__
        raise UserError(
            f"Found features {form} before the pool of {type(tower).__name__}, expected one map or one sequence of "
            "tokens; choose another image tower, or no term that reads image tokens."
        )
    return found


def cell_tokens(tower: Any, maps: Tensor) -> Tensor:
    """Tokens (B, N, C) of a map of cells."""
    last = str(getattr(tower, "output_fmt", "NCHW")) == "NHWC"
    cells = average_cells(maps.permute(0, 3, 1, 2) if last else maps)
    alone = cells.flatten(0, 1)[:, None, None, :] if last else cells.flatten(0, 1)[:, :, None, None]
    # A head may hold a BatchNorm, whose statistics are those of pooled images; cells must not be counted among them.
    with evaluating(tower):
        heads: Tensor = tower.forward_head(alone)
    return heads.view(*cells.shape[:2], -1)


def patch_tokens(tower: Any, maps: Tensor) -> Tensor:
    """Tokens (B, N, C) of a transformer's sequence."""
    tokens = maps[:, int(getattr(tower, "num_prefix_tokens", 0)) :]
    side = math.isqrt(tokens.shape[1])
    if side * side == tokens.shape[1]:
        tokens = average_cells(tokens.transpose(1, 2).reshape(len(tokens), -1, side, side))
    norm: nn.Module = getattr(tower, "fc_norm", None) or nn.Identity()
    normed: Tensor = norm(tokens)
    return normed


def average_cells(maps: Tensor) -> Tensor:
    """Averages over at most `GRID` x `GRID` cells of a map (B, C, H, W), row by row: (B, N, C)."""
    height, width = (min(size, GRID) for size in maps.shape[2:])
    return nn.functional.adaptive_avg_pool2d(maps, (height, width)).flatten(2).transpose(1, 2)


def load_timm_weights(tower: Any, path: str) -> None:
    """Load a safetensors file with timm's keys, or the image tower of a vlkd folder, into a tower.

    Classifiers are left out, timm's and those of a folder, of which the tower is taken and not how it crops.

    Raises:
        UserError: the file is missing or pickled, the folder has no timm tower of this name, or keys or shapes are not
            the tower's.
    """
    if Path(path).is_dir():
        weights = _tower_of_folder(Path(path), str(tower.pretrained_cfg.get("architecture") or ""))
    else:
        classifier = tower.pretrained_cfg.get("classifier") or "classifier"
        heads = tuple(f"{name}." for name in ([classifier] if isinstance(classifier, str) else classifier))
        weights = {key: value for key, value in read_safetensors(path).items() if not key.startswith(heads)}
    load_exactly(tower, weights, str(path))


def _tower_of_folder(folder: Path, wanted: str) -> dict[str, Tensor]:
    """The weights of a vlkd folder's image tower by timm's keys; one of another name may fit and see other pixels."""
    name, prefix = read_image_tower(folder)
    if wanted and name.partition(".")[0] != wanted:
        raise UserError(f"The image tower of {folder} is {name!r}, expected {wanted!r}; name the same one.")
    found = read_safetensors(folder / WEIGHTS)
    return {key.removeprefix(prefix): value for key, value in found.items() if key.startswith(prefix)}


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, floating ones as float32.

    Raises:
        UserError: the file is missing, pickled or damaged.
    """
    if not Path(path).is_file():
        raise UserError(f"Found no file {path}, expected weights in safetensors; check the path.")
    if Path(path).suffix != ".safetensors":
        raise UserError(f"{path} is not a .safetensors file; vlkd never unpickles, convert the weights first.")
    try:
        found = load_file(str(path))
    except Exception as error:  # SafetensorError is no subclass of a standard one
        raise UserError(f"{path} is damaged ({first_line(error)}); fetch or write it again.") from error
    return {key: value.float() if value.is_floating_point() else value for key, value in found.items()}


def load_exactly(module: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Load weights whose keys and shapes are exactly the module's.

    Raises:
        UserError: naming up to three keys that are missing, unexpected or of another shape.
    """
    own = module.state_dict()
    wrong = [f"{key} is missing" for key in own.keys() - weights.keys()]
    wrong += [f"{key} is unexpected" for key in weights.keys() - own.keys()]
    wrong += [
        f"{key} has shape {tuple(weights[key].shape)}, expected {tuple(own[key].shape)}"
        for key in own.keys() & weights.keys()
        if own[key].shape != weights[key].shape
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"{source} does not fit its model: {'; '.join(sorted(wrong)[:3])}{more}; check the pair.")
    module.load_state_dict(weights)


def build_transformers_text(folder: str | Path, *, pooling: str, weights: bool) -> TransformersText:
    """A text encoder from a transformers folder, with its safetensors weights or from its configuration alone.

    Raises:
        UserError: the folder cannot be read, or its weights are pickled or incomplete.
    """
    from transformers import AutoConfig, AutoModel

    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"Found no config.json in {folder}, expected a transformers folder; check the path.")
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
        if weights:
            with without_bars():
                encoder, info = AutoModel.from_pretrained(
                    str(folder),
                    use_safetensors=True,
                    trust_remote_code=False,
                    dtype=torch.float32,
                    output_loading_info=True,
                )
        else:
            encoder, info = AutoModel.from_config(config, trust_remote_code=False), {"missing_keys": ()}
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise UserError(f"Cannot load a text tower from {folder} ({first_line(error)}).") from error
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise UserError(f"The weights in {folder} lack {', '.join(missing[:3])}; expected the weights of its config.")
    return TransformersText(encoder.float(), pooling)
