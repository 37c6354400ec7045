"""Stage `clip`: a small CLIP from random weights, taught by captions and by a larger one's answers.

Three losses, all between embeddings of unit length: photos against their captions (Radford et al. 2021, CLIP), photos
against what the teacher answers to the same crop, and captions of one photo against each other, for which the photos
need not be there, so that captions of other collections help.
"""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import open_clip
import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from clipcap_rag.artifact import commit, staging_path
from clipcap_rag.lines import BadLines
from clipcap_rag.sources import SourceOptions, read_captions
from clipcap_rag.text_tower import TextTower
from starter import tokens
from starter.rounds import learning_rate, train_rounds
from starter.texts import tidy
from starter.views import SIZE

WIDTH, CONTEXT, BATCH = 128, 32, 256
PAIRS, PAIR_LENGTH = 128, 20  # pairs of captions of one photo in a batch, and the most tokens of such a caption
MODEL = {
    "embed_dim": WIDTH,
    "vision_cfg": {
        "timm_model_name": "regnetx_002",
        "timm_model_pretrained": False,
        "timm_pool": "avg",
        "timm_proj": "linear",
        "image_size": SIZE,
    },
    "text_cfg": {
        "context_length": CONTEXT,
        "vocab_size": tokens.SIZE,
        "hf_tokenizer_name": "tokenizer.json",
        "width": 128,
        "heads": 4,
        "layers": 3,
        "pool_type": "eos",
        "eos_id": tokens.END_ID,
    },
}
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
PREPROCESS = {
    "size": SIZE,
    "mode": "RGB",
    "mean": MEAN,
    "std": STD,
    "interpolation": "bicubic",
    "resize_mode": "squash",
}


def train(work: Path, captions: Path, stores: list[Path], out: Path, rounds: int, device: torch.device) -> None:
    """Trains on the passes of `work`/views and writes an open_clip model folder with float16 weights."""
    folder = staging_path(out)
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = open_clip.CLIP(**MODEL)
    torch.nn.init.normal_(model.token_embedding.weight, std=0.05)
    trainer = _Trainer(model.to(device, memory_format=torch.channels_last), work, captions, stores, rounds, device)
    train_rounds(folder, {"model": model, "optimizer": trainer.optimizer}, rounds, trainer.round)
    state = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors", metadata={"format": "pt"})
    (folder / "open_clip_model.safetensors").chmod(0o644)  # safetensors lets nobody else read it
    config = {"model_cfg": MODEL, "preprocess_cfg": PREPROCESS}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=1) + "\n")
    tokens.copy(work / "tokens", "clip", folder)
    commit(folder, out)


class _Trainer:
    def __init__(self, model, work: Path, captions: Path, stores: list[Path], rounds: int, device: torch.device):
        self.model, self.tower, self.device, self.rounds = model, TextTower(model), device, rounds
        tokenizer = open_clip.tokenizer.HFTokenizer(str(work / "tokens/clip"), context_length=CONTEXT)
        passes = sorted((work / "views").glob("[0-9][0-9]"))
        self.pixels = [np.load(folder / "pixels.npy", mmap_mode="r") for folder in passes]
        answers = [torch.from_numpy(np.load(folder / "answers.npy")).float() for folder in passes]
        _, _, axes = torch.linalg.svd(answers[0], full_matrices=False)
        self.answers = [F.normalize(answer @ axes[:WIDTH].T, dim=1) for answer in answers]
        rows = [json.loads(line)["captions"] for line in captions.read_text(encoding="utf-8").splitlines()]
        self.tokens = [tokenizer(texts) for texts in rows]
        groups = [tokenizer(texts) for texts in _same_photo(stores)]
        groups = [[text for text in group if text[PAIR_LENGTH - 1] == tokens.END_ID] for group in groups]
        self.groups = [group for group in groups if len(group) > 1]
        grouped = [[p for p in model.parameters() if (p.ndim < 2) == flat] for flat in (False, True)]
        self.optimizer = torch.optim.AdamW(
            [{"params": grouped[0], "weight_decay": 0.1}, {"params": grouped[1], "weight_decay": 0}], betas=(0.9, 0.98)
        )
        self.mean, self.std = (torch.tensor(x, device=device).view(3, 1, 1) * 255 for x in (MEAN, STD))

    def round(self, number: int) -> dict[str, float]:
        """Every photo once, in a new order, from the next pass of crops."""
        self.model.train()
        pixels, answers = self.pixels[number % len(self.pixels)], self.answers[number % len(self.pixels)]
        batches = torch.randperm(len(answers)).split(BATCH)[: len(answers) // BATCH]
        sums = defaultdict(float)
        for step, rows in enumerate(batches):
            rate = 2e-3 * learning_rate(number * len(batches) + step, self.rounds * len(batches), 3 * len(batches))
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            losses = self._losses(pixels, answers, rows)
            sum(losses.values()).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            for name, loss in losses.items():
                sums[name] += loss.item() / len(batches)
        return sums

    def _losses(self, pixels: np.ndarray, answers: torch.Tensor, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        rows = rows.sort().values  # read from the disk in order
        pictures = torch.from_numpy(pixels[rows.numpy()])
        pictures = ((pictures.to(self.device) - self.mean) / self.std).to(memory_format=torch.channels_last)
        answer = answers[rows].to(self.device)
        texts = torch.stack([_one(self.tokens[row]) for row in rows.tolist()])
        pairs = [self.groups[place] for place in torch.randint(len(self.groups), (PAIRS,)).tolist()]
        picked = [[group[place] for place in torch.randperm(len(group))[:2]] for group in pairs]
        pairs = torch.stack([group[0] for group in picked] + [group[1] for group in picked])
        # for short texts on a CPU the plain attention has twice as fast a backward pass as the fused one
        with torch.autocast(self.device.type, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            image = self.model.encode_image(pictures, normalize=True).float()
            text, pairs = self._text(texts).float(), self._text(pairs).float()
        scale = self.model.logit_scale.exp().clamp(max=100)
        return {
            "caption": _contrast(image, text, scale),
            "answer": 4 * (1 - (image * answer).sum(1)).mean(),
            "caption_to_answer": _contrast(answer, text, scale),
            "caption_to_caption": 0.5 * _contrast(*pairs.split(PAIRS), scale),
        }

    def _text(self, texts: torch.Tensor) -> torch.Tensor:
        longest = int(self.tower.lengths(texts).max())
        return F.normalize(self.tower(texts[:, :longest].to(self.device)), dim=1)


def _contrast(a: torch.Tensor, b: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    logits, own = scale * a @ b.T, torch.arange(len(a), device=a.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def _one(texts: torch.Tensor) -> torch.Tensor:
    return texts[int(torch.randint(len(texts), ()))]


def _same_photo(stores: list[Path]) -> list[list[str]]:
    """Captions of photos that have at least two."""
    photos = defaultdict(list)
    for record in read_captions(stores, SourceOptions(), BadLines()):
        if record.image_id:
            photos[record.source, record.image_id].append(tidy(record.caption))
    return [captions for captions in photos.values() if len(captions) > 1]
