"""Stage `tokens`: one byte-level BPE for the language model and for the CLIP text tower."""

import json
import shutil
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import GPT2TokenizerFast

from clipcap_rag.artifact import new_directory

SIZE, END, END_ID = 8192, "<|endoftext|>", 0


def learn(texts: Path, out: Path) -> None:
    """Learns the tokens from captions as they are and in lower case, which is all that the CLIP sees of them."""
    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer, bpe.decoder = ByteLevel(add_prefix_space=True), ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=SIZE, special_tokens=[END], initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    lines = texts.read_text(encoding="utf-8").splitlines()
    bpe.train_from_iterator([*lines, *(line.lower() for line in lines)], trainer)
    with new_directory(out) as folder:
        bpe.model.save(str(folder))
        language_model = GPT2TokenizerFast(
            vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), add_prefix_space=True
        )
        language_model.save_pretrained(folder / "language_model")
        bpe.normalizer = Lowercase()
        bpe.post_processor = TemplateProcessing(single=f"$A {END}", special_tokens=[(END, END_ID)])
        (folder / "clip").mkdir()
        bpe.save(str(folder / "clip/tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": END}
        (folder / "clip/tokenizer_config.json").write_text(json.dumps(settings))


def copy(tokens: Path, use: str, out: Path) -> None:
    """Puts the tokenizer files of `use`, clip or language_model, beside the weights."""
    shutil.copytree(tokens / use, out, dirs_exist_ok=True)
