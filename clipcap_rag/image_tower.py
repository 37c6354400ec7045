"""Trunk features: what a CLIP image tower sees in several views of a photo, before its projection."""

import torch
from PIL import Image
from PIL.Image import Transpose

from clipcap_rag.image_loader import Preprocess

_CROP = 2 / 3  # of each side
_CORNERS = ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (0.5, 0.5))  # where the crops lie: left to right, top down
_SHARES = (1 / 4, 1 / 4) + (1 / 10,) * len(_CORNERS)  # of each view in the mean


class Views:
    """Preprocessing that shows a photo whole, mirrored, and in five crops of two thirds of its sides.

    Several views find photos that look alike better than one (Kuo and Kira 2022, arXiv 2205.04363, retrieve captions
    with such crops).
    """

    def __init__(self, preprocess: Preprocess):
        self._preprocess = preprocess

    def __call__(self, picture: Image.Image) -> torch.Tensor:
        """Pixels [V, 3, H, W] of an RGB picture, the whole picture first."""
        width, height = picture.size
        wide, high = max(1, round(_CROP * width)), max(1, round(_CROP * height))
        views = [picture, picture.transpose(Transpose.FLIP_LEFT_RIGHT)]
        for right, down in _CORNERS:
            left, top = round(right * (width - wide)), round(down * (height - high))
            views.append(picture.crop((left, top, left + wide, top + high)))
        return torch.stack([self._preprocess(view) for view in views])


class ImageTower:
    """The image side of an open_clip model, open before its last projection.

    What lies before the projection tells photos apart by more than what captions say of them (Radford et al. 2021,
    arXiv 2103.00020, use it for linear probes). A tower of a kind that is not known gives its embedding.
    """

    def __init__(self, tower: torch.nn.Module):
        self._tower = tower

    def views(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the views [B, V, 3, H, W] of B photos the embeddings [B, D] of the first and trunk features [B, T]."""
        embeddings, total = None, 0.0
        for view, share in enumerate(_SHARES):
            embedded, features = self(pixels[:, view].contiguous(memory_format=torch.channels_last))
            embeddings = embedded if embeddings is None else embeddings
            total = total + share * features.float()
        return embeddings, total

    def __call__(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings [B, D] and features [B, T] of one view of each photo."""
        tower = self._tower
        if hasattr(tower, "trunk") and hasattr(tower, "head"):  # a model of timm
            features = tower.trunk(pixels)
            return tower.head(features), _pooled(features)
        if isinstance(getattr(tower, "proj", None), torch.nn.Parameter):  # a vision transformer
            projection, tower.proj = tower.proj, None
            try:
                features = _first(tower(pixels))
            finally:
                tower.proj = projection
            return features @ projection, features
        if hasattr(tower, "attnpool"):  # OpenAI's ResNet
            seen = []
            hook = tower.attnpool.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
            try:
                return tower(pixels), _pooled(seen[0])
            finally:
                hook.remove()
        embeddings = _first(tower(pixels))
        return embeddings, embeddings


def _first(output: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def _pooled(features: torch.Tensor) -> torch.Tensor:
    """[B, T] of what may be a map [B, T, H, W] or tokens [B, N, T]."""
    if features.ndim == 4:
        return features.mean(dim=(2, 3))
    return features.mean(dim=1) if features.ndim == 3 else features
