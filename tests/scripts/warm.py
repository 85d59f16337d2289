"""Runs the command line again and again: ``warm.py MODEL`` imports all once, then forks for each line of JSON.

A line on standard input is ``{"arguments": […], "environment": {…}, "said": "…"}``, where what is said is the
command's own standard input; the answer is one line with the exit code and what was written to standard output and
standard error. Prints "ready" first.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile

from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM, TextStreamer  # noqa: F401

import llama_split.footprint
import llama_split.trusted.model
import llama_split.worker.service  # noqa: F401
from llama_split.__main__ import main


def run(arguments: list[str], environment: dict[str, str], said: str) -> dict[str, object]:
    with (
        tempfile.TemporaryFile("w+", errors="surrogateescape") as into,
        tempfile.TemporaryFile("w+") as out,
        tempfile.TemporaryFile("w+") as err,
    ):
        into.write(said)
        into.flush()
        into.seek(0)
        child = os.fork()
        if child == 0:
            os.dup2(into.fileno(), 0)
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            os.environ.update(environment)
            encoding = environment.get("PYTHONIOENCODING", "utf-8")
            sys.stdin = open(0, encoding=encoding, closefd=False)  # noqa: SIM115 - what was read ahead is ours
            sys.stdout = open(1, "w", encoding=encoding, closefd=False)  # noqa: SIM115
            sys.argv = ["llama-split", *arguments]
            main()
            sys.exit(0)
        _, status = os.waitpid(child, 0)
        out.seek(0)
        err.seek(0)
        return {"code": os.waitstatus_to_exitcode(status), "out": out.read(), "err": err.read()}


# What is imported only when it is used, once for all forks.
AutoConfig.from_pretrained(sys.argv[1])
AutoTokenizer.from_pretrained(sys.argv[1])
with contextlib.suppress(SystemExit), contextlib.redirect_stderr(None):
    sys.argv = ["llama-split", "generate", "--prompt", "x", "--mode", "none", "--model", sys.argv[1]]
    main()
print("ready", flush=True)
while line := sys.stdin.readline():
    print(json.dumps(run(**json.loads(line))), flush=True)
