"""How many weights ClipCap's recipes learn with GPT-2 of 124M parameters: from shapes alone, in a second."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from clipcap_rag.model import CaptionModel, build_mapper, learned_parameters, tune
from clipcap_rag.presets import configure

ROWS = [  # preset, CLIP and its width, length of the prefix and of the unfolded image, what the paper says
    ("clipcap-mlp", "ViT-B/32", 512, 10, "156M"),
    ("clipcap-transformer", "RN50x4", 640, 10, "43M"),
    ("clipcap-transformer", "RN50x4", 640, 40, ""),
    ("rag", "ViT-B/32", 512, 10, ""),
]


def learned(preset: str, clip_dim: int, length: int) -> int:
    """Weights of mapper and language model that learn; `length` is that of the prefix and of the unfolded image."""
    language_model = GPT2Config()
    model_config, _ = configure(preset, prefix_length=length, clip_length=length)
    config = type(model_config)(**model_config.to_json() | {"clip_dim": clip_dim, "lm_dim": language_model.n_embd})
    with torch.device("meta"):
        network = tune(GPT2LMHeadModel(language_model), config)
        return learned_parameters(CaptionModel(build_mapper(config), network, language_model.eos_token_id))


def main() -> None:
    """Prints the table as Markdown."""
    print("| preset | CLIP | prefix and image tokens | learns | the paper says |\n|---|---|---|---|---|")
    for preset, clip, width, length, claim in ROWS:
        print(f"| {preset} | {clip} ({width}) | {length} | {learned(preset, width, length):,} | {claim} |")


if __name__ == "__main__":
    main()
