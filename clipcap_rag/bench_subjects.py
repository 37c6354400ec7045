"""What is measured on: models of real size with random weights, captions of real lengths, photos as files.

Random weights take the same time as learned ones. The language model's logits are sharpened until the entropy of the
next token is about that of a trained model, because the cost of top-p sampling depends on it.
"""

import io
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from clipcap_rag.caption_index import CaptionIndex
from clipcap_rag.clip_models import random_model
from clipcap_rag.config import ModelConfig
from clipcap_rag.encoder import Encoder
from clipcap_rag.hardware import bfloat16_instructions
from clipcap_rag.model import CaptionModel, build_mapper, tune
from clipcap_rag.shipped import STARTER

PREFIX = 40
_VOCABULARY, _WIDTH = 50257, 768  # of GPT-2 124M
_SHARPER = 7.0  # factor on the last layer norm: the entropy of the next token falls from 10.7 to about 3 nats


@dataclass(frozen=True)
class Sizes:
    """How large the subjects are.

    Attributes:
        clip: architecture of open_clip.
        lm: arguments of GPT2Config.
        captions: texts to embed.
        photos: files to embed.
        rows: rows of the searched index.
        candidates: sampled captions of one photo.
        beam_images: photos that are captioned by beam search.
        batch: captions of a training step.
        tokens: tokens that are written.
        sample: how many candidates or photos the slowest ways do; their times are multiplied.
    """

    clip: str = "ViT-B-32"
    lm: tuple[tuple[str, int], ...] = ()
    captions: int = 512
    photos: int = 64
    rows: int = 1_000_000
    candidates: int = 64
    beam_images: int = 32
    batch: int = 40
    tokens: int = 20
    sample: int = 2


FULL = Sizes()
QUICK = Sizes(
    lm=(("n_layer", 2), ("n_embd", 128), ("n_head", 2), ("vocab_size", 2048)),
    captions=32, photos=8, rows=20_000, candidates=16, beam_images=4, batch=8, tokens=8, sample=1,
)  # fmt: skip


def with_amx(target: float) -> float | None:
    """A promise that holds for processors with AMX tiles only; None on others."""
    return target if bfloat16_instructions() == "AMX tiles" else None


class Subjects:
    """The models and inputs of a benchmark run, each made when it is first used."""

    def __init__(self, sizes: Sizes, folder: Path, device: torch.device):
        """folder: an empty one for photos and indexes."""
        self.sizes, self.folder, self.device = sizes, folder, device

    def encoder(self, dtype: torch.dtype) -> Encoder:
        """The CLIP model in a number format; the same weights each time."""
        torch.manual_seed(0)
        return Encoder(f"{self.sizes.clip}, random weights", *random_model(self.sizes.clip), self.device, dtype)

    @cached_property
    def float32(self) -> Encoder:
        """The CLIP model in float32."""
        return self.encoder(torch.float32)

    @cached_property
    def bfloat16(self) -> Encoder:
        """The CLIP model in bfloat16."""
        return self.encoder(torch.bfloat16)

    def captions(self, count: int) -> list[str]:
        """Captions as long as those that people write: 11 words in the mean, from 4 to about 30."""
        index = CaptionIndex.open(STARTER, "cpu")
        random = np.random.default_rng(0)
        picked = iter(index.captions(index.random_rows(2 * count, random)))
        return [
            next(picked).rstrip(".") + (f" while {next(picked).lower()}" if random.random() < 0.2 else ".")
            for _ in range(count)
        ]

    def language_model(self, dtype: torch.dtype) -> torch.nn.Module:
        """GPT-2 124M with random weights and sharp logits."""
        torch.manual_seed(1)
        shape = {"vocab_size": _VOCABULARY} | dict(self.sizes.lm)
        ends = dict.fromkeys(("bos_token_id", "eos_token_id"), shape["vocab_size"] - 1)
        config = GPT2Config(**shape, **ends, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
        model = GPT2LMHeadModel(config).eval()
        with torch.no_grad():
            model.transformer.ln_f.weight.mul_(_SHARPER)
        return model.to(self.device, dtype)

    def caption_model(self, dtype: torch.dtype, mapper: str = "transformer", tuning: str = "frozen") -> CaptionModel:
        """A captioner's network around that language model, with a prefix of `PREFIX`."""
        language_model = self.language_model(dtype)
        width, vocabulary = language_model.config.n_embd, language_model.config.vocab_size
        config = ModelConfig(
            mapper=mapper, clip_dim=self.float32.dim, lm_dim=width, prefix_length=PREFIX, clip_length=10,
            mapper_layers=8, mapper_heads=8, language_model_tuning=tuning,
        )  # fmt: skip
        torch.manual_seed(5)
        model = CaptionModel(build_mapper(config), tune(language_model, config), vocabulary - 1)
        return model.to(self.device, dtype).eval()

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """A tokenizer that writes token n as the word wn; words cost nothing here."""
        size = dict(self.sizes.lm).get("vocab_size", _VOCABULARY)
        words = Tokenizer(WordLevel({f"w{number}": number for number in range(size)}, unk_token="w0"))
        words.pre_tokenizer = WhitespaceSplit()
        return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=f"w{size - 1}", unk_token="w0")

    def prefix(self, images: int, dtype: torch.dtype) -> torch.Tensor:
        """Random prefixes [images, PREFIX, E] as long as word embeddings."""
        width = dict(self.sizes.lm).get("n_embd", _WIDTH)
        random = torch.Generator().manual_seed(2)
        return (0.02 * torch.randn(images, PREFIX, width, generator=random)).to(self.device, dtype)

    @cached_property
    def photos(self) -> list[Path]:
        """JPEG files of 500 x 375 pixels with the detail of photos (noise at all scales)."""
        random, files = np.random.default_rng(3), []
        for number in range(self.sizes.photos):
            layers = [random.normal(0, 40, (max(2, 375 // step), max(2, 500 // step), 3)) for step in (125, 25, 5, 1)]
            weights = (1.0, 0.6, 0.3, 0.1)
            picture = 128 + sum(w * _enlarged(layer) for w, layer in zip(weights, layers, strict=True))
            file = self.folder / f"photo-{number:03d}.jpg"
            encoded = io.BytesIO()
            Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(encoded, "JPEG", quality=90)
            file.write_bytes(encoded.getvalue())
            files.append(file)
        return files


def _enlarged(layer: np.ndarray) -> np.ndarray:
    channels = [
        Image.fromarray(layer[..., c].astype(np.float32)).resize((500, 375), Image.Resampling.BICUBIC) for c in range(3)
    ]
    return np.stack([np.asarray(channel) for channel in channels], axis=-1)
