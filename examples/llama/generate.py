"""Generates text with a model whose weight matrices are a worker's: ``generate.py DIR ADDRESS DTYPE``."""

import sys

from transformers import AutoTokenizer

from llama_split import SplitLlamaForCausalLM

path, worker, dtype = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(path)
prompt = tokenizer("Once upon a time", return_tensors="pt")
with SplitLlamaForCausalLM.from_pretrained(path, worker=worker, mode="fused", dtype=dtype) as model:
    output = model.generate(**prompt, max_new_tokens=40)
print(tokenizer.decode(output[0]))
