"""Model directories with one changed field: each is used or refused in one line, never a traceback.

Every field of every JSON file gets values of each kind; both sides do all that precedes the first forward.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import GenerationConfig

from llama_split import CheckpointError
from llama_split.boundary.operations import Mode
from llama_split.checkpoint import open_checkpoint
from llama_split.checkpoint.synthetic import RandomCheckpoint
from llama_split.trusted.model import TrustedPart
from llama_split.worker.weights import Weights
from tests.support.llamas import Small

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers warns of many a value that it uses all the same

Field = tuple[str | int, ...]

MISSING = object()
ASK_FOR_MORE = {
    *("stop_strings", "token_healing", "penalty_alpha", "dola_layers", "constraints", "force_words_ids"),
    *("use_mtp", "is_assistant"),
}
"""Settings with which ``generate`` wants a tokenizer, code from a hub or another model, and tells so by itself."""

VALUES: tuple[Any, ...] = (
    *(MISSING, None, "text", True, 0, -1, 1, 0.5, float("nan"), 1 << 31, 1 << 63, 1e300),
    *([], [1], ["text"], {}, {"a": 1}),
)
UNUSUAL_CONFIG = (
    *("rope_scaling", "rope_theta", "partial_rotary_factor", "quantization_config", "transformers_weights"),
    *("torch_dtype", "auto_map", "layer_types", "sliding_window", "id2label", "num_labels", "text_config"),
    *("attn_implementation", "temperature", "suppress_tokens", "original_max_position_embeddings"),
)
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
ROPE: dict[str, Any] = {
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 256,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "beta_fast": 32.0,
    "attention_factor": 1.0,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
}


@pytest.fixture(scope="module")
def directory(save_small: Callable[..., Small]) -> Path:
    """A small model with a small tokenizer."""
    path = save_small(seed=21, num_hidden_layers=1).path
    RandomCheckpoint("tinyllama-1.1b").tokenizer().save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Silence transformers, which logs each odd value."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(before)


def fields_of(value: Any, at: Field = ()) -> Iterator[Field]:
    """The path to each field of a JSON value, at any depth; for lists and long tables, to the first two."""
    items = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    for key, below in items[: 2 if isinstance(value, list) or len(items) > 40 else None]:
        yield (*at, key)
        yield from fields_of(below, (*at, key))


def changed(content: Any, field: Field, value: Any) -> Any:
    """The same value with one field changed, or removed."""
    result = copy.deepcopy(content)
    holder = result
    for key in field[:-1]:
        holder = holder[key]
    if value is MISSING:
        del holder[field[-1]]
    else:
        holder[field[-1]] = value
    return result


def use(directory: Path) -> None:
    """Do everything that either side does with a model's files before the first forward."""
    checkpoint = open_checkpoint(str(directory))
    checkpoint.generation_config()
    checkpoint.fingerprint()
    Weights(checkpoint, torch.float32, torch.device("cpu"))
    with torch.device("meta"):
        TrustedPart(checkpoint.config, Mode.FUSED, None)


def refusal_of(action: Callable[[], object], change: object) -> str | None:
    """Return why a changed model is refused; None if it is used."""
    try:
        action()
    except CheckpointError as error:
        said = str(error)
    except BaseException as error:
        raise AssertionError(f"{change} ended in {error!r}") from error
    else:
        return None
    assert "\n" not in said, change
    assert len(said) < 1000, change
    return said


def try_all(
    file: Path, variants: Iterator[tuple[object, bytes]], action: Callable[[Path], object] = use
) -> tuple[int, int]:
    """Try all variants of a file; count the used and the refused ones, and restore the file afterwards."""
    before = file.read_bytes()
    used = refused = 0
    try:
        for change, content in variants:
            file.write_bytes(content)
            if refusal_of(lambda: action(file.parent), change) is None:
                used += 1
            else:
                refused += 1
    finally:
        file.write_bytes(before)
    return used, refused


def as_json(content: Any) -> bytes:
    return json.dumps(content).encode()


def every_change(content: Any) -> Iterator[tuple[object, Any]]:
    for field in fields_of(content):
        for value in VALUES:
            yield (field, value), changed(content, field, value)


def test_any_value_of_any_field_of_a_configuration_is_used_or_refused(directory: Path) -> None:
    """Missing, null, of a wrong kind, below zero, huge."""
    file = directory / "config.json"
    content = json.loads(file.read_text())
    added = (((name, value), {**content, name: value}) for name in UNUSUAL_CONFIG for value in VALUES[1:])
    variants = ((change, as_json(other)) for change, other in itertools.chain(every_change(content), added))
    used, refused = try_all(file, variants)
    assert used > 50
    assert refused > 50


@pytest.mark.parametrize("name", ["tokenizer_config.json", "tokenizer.json"])
def test_any_value_of_any_field_of_a_tokenizer_is_used_or_refused(directory: Path, name: str) -> None:
    """A panic in the tokenizer's compiled part is an error like any other."""
    file = directory / name
    checkpoint = open_checkpoint(str(directory))
    variants = ((change, as_json(other)) for change, other in every_change(json.loads(file.read_text())))
    used, refused = try_all(file, variants, lambda _directory: checkpoint.tokenizer())
    assert used > 20
    assert refused > 10


@pytest.mark.parametrize("rope_type", ROPE_TYPES)
def test_any_value_of_any_rotary_parameter_is_used_or_refused(directory: Path, rope_type: str) -> None:
    """The parameters of every scaling that transformers knows, needed or not."""
    file = directory / "config.json"
    content = json.loads(file.read_text())
    variants = (
        (change, as_json({**content, "rope_parameters": rope}))
        for change, rope in every_change({"rope_type": rope_type, **ROPE})
    )
    used, refused = try_all(file, variants, lambda path: open_checkpoint(str(path)))
    assert used > 20
    assert refused > 20


def test_any_value_for_generation_is_one_that_transformers_takes(directory: Path) -> None:
    """A value accepted on opening also works in the unsplit model's ``generate``."""
    names = {name for name in vars(GenerationConfig()) if not name.startswith("_")} - ASK_FOR_MORE
    checkpoint = open_checkpoint(str(directory))
    unsplit = transformers.LlamaForCausalLM.from_pretrained(directory).eval()
    prompt = torch.tensor([[1, 5, 6]])

    def generate(_directory: Path) -> None:
        unsplit.generation_config = checkpoint.generation_config()
        unsplit.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=1, num_beams=1, pad_token_id=0)

    values = (
        None,
        "text",
        True,
        -1,
        0,
        1,
        0.5,
        1.5,
        1e300,
        1 << 63,
        200,
        [],
        [1],
        [200],
        [[1]],
        [[200]],
        [[[1], 0.5]],
        {},
    )
    variants = (
        ((name, value), as_json({"eos_token_id": 2, name: value})) for name in sorted(names) for value in values
    )
    used, refused = try_all(directory / "generation_config.json", variants, generate)
    assert used > 100
    assert refused > 100


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"])
def test_any_text_in_place_of_a_file_is_used_or_refused(directory: Path, name: str) -> None:
    """No JSON, other JSON, no UTF-8, nothing, and the file cut off at each tenth of its length."""
    whole = (directory / name).read_bytes()
    texts = [b"", b"\0", b"\xff\xfe{}", b"null", b"3", b'"x"', b"[]", b"{}", b"{" * 9999, b"[" * 100_000]
    texts += [whole[:end] for end in range(0, len(whole), max(1, len(whole) // 10))]

    def use_all(path: Path) -> None:
        use(path)
        open_checkpoint(str(path)).tokenizer()

    used, refused = try_all(directory / name, ((text[:40], text) for text in texts), use_all)
    assert used + refused == len(texts)
    assert refused > 5
