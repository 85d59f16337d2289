"""The split model's example and the guide's code for it generate what the unsplit model does."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer, LlamaForCausalLM

from tests.support.children import Child, Mother
from tests.support.documents import DOCS, assert_printed, python_of, run_page
from tests.support.process import ROOT


@pytest.fixture(scope="module")
def unsplit_text(long: Path) -> str:
    """What the unsplit model generates."""
    tokenizer, unsplit = AutoTokenizer.from_pretrained(long), LlamaForCausalLM.from_pretrained(long)
    expected = unsplit.generate(**tokenizer("Once upon a time", return_tensors="pt"), max_new_tokens=40)
    text: str = tokenizer.decode(expected[0])
    return text


def test_the_llama_example_gives_the_unsplit_models_text(
    llama_mother: Mother, worker: str, long: Path, unsplit_text: str
) -> None:
    """The code runs as printed, with a directory, a worker's address and a dtype; it closes its model."""
    client = Child(llama_mother, ROOT / "examples/llama/generate.py", str(long), worker, "float32")
    said = client.output.read()
    code = client.wait()
    client.end()
    assert (code, said) == (0, unsplit_text + "\n")


def test_the_guides_code_gives_the_unsplit_models_text(
    worker: str, long: Path, unsplit_text: str, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The code runs as printed, but for the model's directory and the worker's address."""
    code = python_of((DOCS / "guide/split-llama.md").read_text())
    code = code.replace('"DIR"', repr(str(long))).replace("ipc:///tmp/llama.ipc", worker)
    *printed, text = run_page("split-llama.md", code, directory, capsys)
    assert_printed(printed, code)
    assert text == unsplit_text
