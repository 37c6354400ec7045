"""Stage `views`: crops of the training photos, and what the teacher's image tower answers to each.

A student that sees exactly the crop that its teacher saw learns the teacher's function, not only its answers on the
training photos (Beyer et al. 2022, Knowledge distillation: a good teacher is patient and consistent).
"""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from clipcap_rag.artifact import commit, new_directory, staging_path
from clipcap_rag.clip_models import open_model
from clipcap_rag.images import decode_image
from clipcap_rag.progress import track

SIZE = 128  # pixels of the student
BATCH = 64


class Crops(Dataset):
    """Photo number -> pixels for the student [3, SIZE, SIZE] uint8 and for the teacher [3, H, W] float32.

    Pass 0 shows the photos as they are; each other pass crops, mirrors and colours them anew.
    """

    def __init__(self, photos: list[Path], number: int, teacher_preprocess: v2.Transform, teacher_size: int):
        self.photos, self.number, self.teacher_preprocess = photos, number, teacher_preprocess
        cubic = v2.InterpolationMode.BICUBIC
        self.augment = v2.Compose([
            v2.RandomResizedCrop(teacher_size, scale=(0.3, 1), ratio=(0.7, 1.4), interpolation=cubic),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(0.3, 0.3, 0.3),
            v2.RandomGrayscale(0.05),
        ])  # fmt: skip

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, place: int) -> tuple[torch.Tensor, torch.Tensor]:
        photo = decode_image(self.photos[place])
        if self.number:
            torch.manual_seed(self.number * len(self) + place)
            photo = self.augment(photo)
        small = photo.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(small)).permute(2, 0, 1), self.teacher_preprocess(photo)


def make(
    captions: Path, images: Path, teacher: Path, passes: int, out: Path, device: torch.device, workers: int
) -> None:
    """Writes `passes` passes over the photos that a caption file names, in its order."""
    lines = captions.read_text(encoding="utf-8").splitlines()
    photos = [images / json.loads(line)["image"] for line in lines]
    staging = staging_path(out)
    for number in range(passes):
        if not (staging / f"{number:02d}").is_dir():
            _make_pass(photos, teacher, number, staging / f"{number:02d}", device, workers)
    commit(staging, out)


def _make_pass(photos: list[Path], teacher: Path, number: int, out: Path, device: torch.device, workers: int) -> None:
    """Writes pixels.npy [N, 3, SIZE, SIZE] uint8 and answers.npy [N, D] float16, of unit length, of one pass."""
    dim, model, _, preprocess = open_model(f"local-dir:{teacher}", None)
    tower = model.visual.eval().to(device, memory_format=torch.channels_last)
    crops = Crops(photos, number, preprocess, model.visual.image_size[0])
    loader = DataLoader(crops, BATCH, num_workers=workers)
    with new_directory(out) as folder:
        pixels = np.lib.format.open_memmap(
            folder / "pixels.npy", "w+", dtype=np.uint8, shape=(len(photos), 3, SIZE, SIZE)
        )
        answers = np.zeros((len(photos), dim), np.float16)
        for batch, (small, large) in enumerate(track(loader, f"views {number}", unit="batch")):
            with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16):
                answer = tower(large.to(device, memory_format=torch.channels_last))
            rows = slice(batch * BATCH, batch * BATCH + len(small))
            pixels[rows] = small.numpy()
            answers[rows] = torch.nn.functional.normalize(answer.float(), dim=1).cpu().numpy()
        pixels.flush()
        np.save(folder / "answers.npy", answers)
