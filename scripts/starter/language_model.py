"""Stage `language_model`: a small GPT-2 that has read captions, each followed by the end token."""

from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast

from clipcap_rag.artifact import commit, staging_path
from starter import tokens
from starter.rounds import learning_rate, train_rounds

CONTEXT, BATCH, STEPS = 64, 64, 150  # tokens of a sequence, sequences of a step, steps of a round
SHAPE = {"n_embd": 224, "n_layer": 4, "n_head": 4, "n_positions": 128}


def train(texts: Path, learned_tokens: Path, out: Path, epochs: int, device: torch.device) -> None:
    """Trains on the lines of `texts` in random order and writes a transformers model folder."""
    folder = staging_path(out)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = GPT2TokenizerFast.from_pretrained(learned_tokens / "language_model")
    lines = texts.read_text(encoding="utf-8").splitlines()
    captions = [np.array([*ids, tokens.END_ID]) for ids in tokenizer(lines).input_ids]
    rounds = epochs * sum(map(len, captions)) // (CONTEXT * BATCH * STEPS)
    torch.manual_seed(0)
    ends = {"bos_token_id": tokens.END_ID, "eos_token_id": tokens.END_ID}
    shape = {name: 0.05 for name in ("attn_pdrop", "embd_pdrop", "resid_pdrop")} | SHAPE
    model = GPT2LMHeadModel(GPT2Config(vocab_size=tokens.SIZE, **shape, **ends)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05, betas=(0.9, 0.95))

    def train_round(number: int) -> dict[str, float]:
        model.train()
        order = torch.randperm(len(captions))
        stream = np.concatenate([captions[place] for place in order[: STEPS * BATCH * CONTEXT // 6]])
        batches = torch.from_numpy(stream[: STEPS * BATCH * CONTEXT]).view(STEPS, BATCH, CONTEXT)
        total = 0.0
        for step, batch in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = 2e-3 * learning_rate(number * STEPS + step, rounds * STEPS, STEPS)
            batch = batch.to(device)
            with torch.autocast(device.type, torch.bfloat16):
                logits = model(input_ids=batch[:, :-1], use_cache=False).logits
            loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            total += loss.item() / STEPS
        return {"loss": total}

    train_rounds(folder, {"model": model, "optimizer": optimizer}, rounds, train_round)
    model.save_pretrained(folder)
    tokens.copy(learned_tokens, "language_model", folder)
    commit(folder, out)
