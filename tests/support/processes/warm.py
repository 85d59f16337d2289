"""Imports whatever the command line imports, also what it does only when it is used: ``warm.py MODEL``."""

import contextlib
import logging
import sys

from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM, TextStreamer  # noqa: F401

import llama_split.commands.footprint
import llama_split.trusted.model
import llama_split.worker.service  # noqa: F401
from llama_split.commands import app

AutoConfig.from_pretrained(sys.argv[1])
AutoTokenizer.from_pretrained(sys.argv[1])
with contextlib.redirect_stderr(None):
    app(["generate", "--prompt", "x", "--model", "/no/such/model"], standalone_mode=False)
logging.root.handlers.clear()  # of that command; each has its own
