"""Imports whatever the command line imports, also what it does only when it is used."""

import contextlib
import logging
import os

from transformers import (  # noqa: F401
    AutoConfig,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TextStreamer,
)

import llama_split.commands.footprint
import llama_split.trusted.model
import llama_split.worker.service  # noqa: F401
from llama_split.commands import app

with open(os.devnull, "w") as nothing, contextlib.redirect_stderr(nothing):
    app(["generate", "--prompt", "x", "--model", "/no/such/model"], standalone_mode=False)
logging.root.handlers.clear()  # of that command; each has its own
