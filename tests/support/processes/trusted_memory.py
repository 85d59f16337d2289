"""The trusted side of Llama-3.2-1B's shape in bfloat16, fused: ``trusted_memory.py ADDRESS``.

Loads the weights; then, without these, generates a few tokens after a short prompt. Prints, in bytes, the peak of its
resident memory before loading, after it and in the end, and the embedding's size.
"""

import os
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from llama_split import SplitLlamaForCausalLM
from llama_split.boundary.operations import Mode
from llama_split.checkpoint.synthetic import RandomCheckpoint
from llama_split.trusted.part import TrustedPart


def peak_bytes() -> int:
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))


def load(checkpoint: RandomCheckpoint) -> None:
    checkpoint.load(TrustedPart.weight_names(checkpoint.config, Mode.FUSED), torch.bfloat16, torch.device("cpu"))
    checkpoint.fingerprint()


peaks = [peak_bytes()]
checkpoint = RandomCheckpoint("llama-3.2-1b")
load(checkpoint)
peaks.append(peak_bytes())
with SplitLlamaForCausalLM.from_pretrained(checkpoint, worker=sys.argv[1], mode="fused", dtype="bfloat16") as split:
    ids = torch.arange(2, 34)[None]
    split.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, pad_token_id=0, do_sample=False)
    print(*peaks, peak_bytes(), split.model.embed_tokens.weight.nbytes)
