"""Time and peak memory of one contrastive training step of a small encoder, in a process of its own.

    python bench/cached_run.py B CHUNK

CHUNK 0 is the direct step (the whole batch in one graph). Prints one line of JSON: loss, seconds, and the peak of the
process's memory beyond what it held with the model and the batch made and a step of four items done.
"""

from __future__ import annotations

import json
import sys
import time

import torch
from torch import nn

from cmsa_run import resident_bytes, settled_bytes
from sda_fast import CMSALoss, cached_contrastive_step

TOKENS, WIDTH, LAYERS = 32, 128, 4


class SmallEncoder(nn.Module):
    """A transformer over given token vectors with mean pooling; 0.8 million parameters, dropout 0.1."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.1, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)

    def forward(self, tokens: torch.Tensor, modality: str) -> torch.Tensor:
        return self.layers(tokens).mean(dim=1)


def step(encoder, loss, images, texts, chunk: int) -> float:
    torch.manual_seed(0)
    if chunk:
        return cached_contrastive_step(encoder, images.split(chunk), texts.split(chunk), loss).item()
    value = loss(encoder(images, "image"), encoder(texts, "text"))
    value.backward()
    return value.item()


def main(B: int, chunk: int) -> None:
    torch.manual_seed(0)
    encoder, loss = SmallEncoder(), CMSALoss()
    images, texts = torch.randn(B, TOKENS, WIDTH), torch.randn(B, TOKENS, WIDTH)
    step(encoder, loss, images[:4], texts[:4], 2)
    before, start, cpu_start = settled_bytes(), time.perf_counter(), time.process_time()
    value = step(encoder, loss, images, texts, chunk)
    result = {"B": B, "chunk": chunk, "loss": value, "seconds": round(time.perf_counter() - start, 2)}
    result |= {"cpu_seconds": round(time.process_time() - cpu_start, 2), "threads": torch.get_num_threads()}
    print(json.dumps(result | {"extra_bytes": resident_bytes("VmHWM") - before}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
