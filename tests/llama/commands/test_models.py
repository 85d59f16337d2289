"""Model directories with odd contents: no traceback, and the command's own choice of decoding."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llama_split.checkpoint import open_checkpoint
from llama_split.commands.console import is_of_the_model
from llama_split.commands.decoding import _TAKEN_OVER, _WITHOUT_NOTICE, decoding, overruled, taken_over
from shmtransport import Server
from tests.support.commands import Command, Finished, environment, is_one_line_error, run
from tests.support.hollow import hollow_handlers
from tests.support.llamas import random_llama, worker_in_thread

pytestmark = pytest.mark.timeout(150)

OVERRULED = {
    *("num_beams", "num_beam_groups", "diversity_penalty", "length_penalty", "early_stopping", "constraints"),
    *("force_words_ids", "penalty_alpha", "dola_layers", "num_return_sequences", "token_healing", "is_assistant"),
    *("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
    *("prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind"),
    *("target_lookbehind", "assistant_ensemble_weight", "speculation_type", "use_mtp"),
}
"""Ways of decoding that are not the command line's."""

Changed = Callable[..., Path]


@pytest.fixture
def changed(tmp_path: Path) -> Changed:
    """Make a copy of a model with other files: ``changed(model, {"name": content, …})``; None removes one."""

    def change(model: Path, files: dict[str, Any]) -> Path:
        path = tmp_path / f"model{len(list(tmp_path.iterdir()))}"
        shutil.copytree(model, path)
        for name, content in files.items():
            if content is None:
                (path / name).unlink()
            else:
                (path / name).write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return change


def answer(command: Command, model: Path, worker: str, *options: str) -> Finished:
    return command(
        *("generate", "--prompt", "w5 w6", "--no-chat", "--json", "--max-new-tokens", "6", "--model", str(model)),
        *("--worker", worker, *options),
    )


def tokens(done: Finished) -> list[int]:
    assert done.code == 0, done.err
    found: list[int] = json.loads(done.out)["token_ids"]
    return found


# What generation_config.json says


@pytest.fixture(scope="module")
def plain_tokens(command: Command, worker: str, tiny: Path) -> list[int]:
    """The greedy tokens of the model without settings."""
    return tokens(answer(command, tiny, worker))


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True, "num_return_sequences": 3, "return_dict_in_generate": True, "output_scores": True},
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5, "constraints": [1], "force_words_ids": [[1]]},
        {"penalty_alpha": 0.6, "cache_implementation": "static", "max_length": 3, "output_attentions": True},
        {"dola_layers": "low", "cache_implementation": "paged", "use_cache": False, "prefill_chunk_size": 1},
        {"prompt_lookup_num_tokens": 3, "assistant_early_exit": 1, "token_healing": True, "use_mtp": True},
        {"pad_token_id": 2000, "bos_token_id": -1, "eos_token_id": [10**9], "unheard_of": 1},
    ],
    ids=lambda settings: " ".join(settings),
)
@pytest.mark.parametrize("mode", ["fused", "stack"])
def test_the_commands_own_choice_of_decoding_wins(
    command: Command,
    worker: str,
    tiny: Path,
    plain_tokens: list[int],
    changed: Changed,
    settings: dict[str, Any],
    mode: str,
) -> None:
    """The output has the greedy tokens, one answer, and one notice that names the overruled settings."""
    done = answer(command, changed(tiny, {"generation_config.json": settings}), worker, "--mode", mode)
    assert tokens(done) == plain_tokens
    notices = [line for line in done.err.splitlines() if line.startswith("the model's generation settings")]
    named = [name for name in settings if name in OVERRULED]
    assert len(notices) == bool(named)
    assert not notices or all(name in notices[0] for name in named)


def test_every_setting_of_transformers_is_known() -> None:
    """A new one must be adopted, overruled with a notice, or shown to change no token."""
    known = {*_TAKEN_OVER, *_WITHOUT_NOTICE, *OVERRULED, "transformers_version"}
    assert {name for name in vars(GenerationConfig()) if not name.startswith("_")} <= known
    for name in OVERRULED & vars(GenerationConfig()).keys():
        config = GenerationConfig()
        setattr(config, name, 7)
        assert overruled(config) == [name]
        plain = decoding(taken_over(config), 5, {"do_sample": False})
        assert plain.to_diff_dict() == decoding(GenerationConfig(), 5, {"do_sample": False}).to_diff_dict()


def test_what_the_makers_say_of_tokens_counts_as_in_transformers(
    command: Command, worker: str, tiny: Path, changed: Changed
) -> None:
    """End tokens, forbidden and forced ones, penalties: all of them together give the unsplit model's tokens."""
    plain = tokens(answer(command, tiny, worker))
    settings = {
        "bad_words_ids": [[plain[1]]],
        "suppress_tokens": [plain[2]],
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 2,
        "min_new_tokens": 2,
        "forced_eos_token_id": 7,
    }
    model = changed(tiny, {"generation_config.json": settings})
    ids = torch.tensor([[5, 6]])
    unsplit = LlamaForCausalLM.from_pretrained(model)
    expected = unsplit.generate(ids, max_new_tokens=6, pad_token_id=0)[0, 2:].tolist()
    assert tokens(answer(command, model, worker)) == expected
    assert expected[-1] == 7
    ending = changed(tiny, {"generation_config.json": {"eos_token_id": [10**9, plain[2]]}})
    assert tokens(answer(command, ending, worker)) == plain[:3]


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": -1},
        {"min_length": "x"},
        {"eos_token_id": "two"},
        {"eos_token_id": 2**70},
        {"forced_eos_token_id": 10**9},
        {"sequence_bias": {"a": 1}},
        {"stop_strings": 5},
        {"max_time": "soon"},
        {"no_repeat_ngram_size": [1]},
        {"early_stopping": "x"},
    ],
    ids=str,
)
def test_a_setting_that_transformers_cant_use_is_one_line(
    command: Command, worker: str, tiny: Path, changed: Changed, settings: dict[str, Any]
) -> None:
    """The line quotes transformers' reason."""
    done = answer(command, changed(tiny, {"generation_config.json": settings}), worker)
    assert is_one_line_error(done), done


@pytest.fixture
def spelling(tmp_path: Path) -> Path:
    """A small random model of bytes: to look for stop strings, a model's tokenizer must know letters."""
    path = tmp_path / "spelling"
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)
    random_llama(3, vocab_size=256, bos_token_id=None, pad_token_id=None).save_pretrained(path)
    return path


def test_stop_strings_end_an_answer(command: Command, spelling: Path, changed: Changed) -> None:
    """They need the model's tokenizer, which the command passes: the tokens are the unsplit model's."""
    unsplit, tokenizer = LlamaForCausalLM.from_pretrained(spelling), AutoTokenizer.from_pretrained(spelling)
    ids = tokenizer("abc", return_tensors="pt")["input_ids"]
    common = {"max_new_tokens": 20, "pad_token_id": 0, "do_sample": False}
    text = tokenizer.decode(unsplit.generate(ids, **common)[0, ids.shape[1] :])
    stop = next(letter for letter in text if letter.isascii() and letter.isprintable())
    model = changed(spelling, {"generation_config.json": {"stop_strings": [stop, "never said"]}})
    expected = unsplit.generate(ids, **common, stop_strings=[stop, "never said"], tokenizer=tokenizer)
    with worker_in_thread(model) as worker:
        done = command(
            *("generate", "--prompt", "abc", "--no-chat", "--json", "--max-new-tokens", "20", "--model", str(model)),
            *("--worker", worker.address),
        )
    assert tokens(done) == expected[0, ids.shape[1] :].tolist()
    assert len(tokens(done)) < 20


# Tokenizers and templates


def test_a_tokenizer_of_another_model_is_one_line(
    command: Command, worker: str, tiny: Path, talking: Path, changed: Changed
) -> None:
    """Its tokens lie beyond the model's vocabulary; in a chat the next message may still work."""
    files = json.loads((tiny / "tokenizer.json").read_text())
    vocabulary = files["model"]["vocab"]
    files["model"]["vocab"] = {word: number + (number == 6) * 5000 for word, number in vocabulary.items()}
    done = answer(command, changed(tiny, {"tokenizer.json": files}), worker)
    assert is_one_line_error(done), done
    assert "the tokenizer returns token 5006, and the model has 2000" in done.err
    model = changed(talking, {"tokenizer.json": files})
    done = command("chat", "--model", str(model), "--worker", worker, "--max-new-tokens", "4", said="w6\nw5\n")
    assert (done.code, len(done.out.splitlines()), len(done.err.splitlines())) == (0, 1, 1)


@pytest.mark.parametrize("name", ["no unknown token", "a maximum that is no number"])
def test_a_tokenizer_that_fails_on_the_text_is_one_line(
    command: Command, worker: str, tiny: Path, changed: Changed, name: str
) -> None:
    """The line names the tokenizer and quotes its error."""
    files = json.loads((tiny / "tokenizer.json").read_text())
    files["model"]["unk_token"] = "none"  # noqa: S105
    config = json.loads((tiny / "tokenizer_config.json").read_text())
    odd = {"tokenizer.json": files} if name == "no unknown token" else {}
    model = changed(tiny, {**odd, "tokenizer_config.json": {**config, "unk_token": None, "model_max_length": "x"}})
    done = answer(command, model, worker, "--prompt", "hello")
    assert is_one_line_error(done), done
    assert "the model's tokenizer can't encode the text" in done.err


@pytest.mark.parametrize(
    "template",
    ["{{ 1 / 0 }}", "{% for", "{{ raise_exception('\x1b[31mno\x07') }}", "{{ messages[9].x }}"],
)
def test_a_template_that_fails_is_one_line(
    command: Command, worker: str, talking: Path, changed: Changed, template: str
) -> None:
    """In generate and in chat, without escape sequences that would affect a terminal."""
    model = changed(talking, {"chat_template.jinja": template})
    for arguments in (("generate", "--prompt", "w5"), ("chat",)):
        done = command(*arguments, "--model", str(model), "--worker", worker, said="w5\n")
        assert is_one_line_error(done), done
        assert "chat template can't be used" in done.err
        assert "\x1b" not in done.err


@pytest.mark.parametrize("template", ["", None, [], {}, 5, {"tool": "w3"}, {"default": 5}], ids=repr)
def test_a_template_of_another_type_is_none_or_one_line(
    command: Command, worker: str, talking: Path, changed: Changed, template: object
) -> None:
    """An empty template in tokenizer_config.json counts as none; one of another type is a one-line error."""
    config = json.loads((talking / "tokenizer_config.json").read_text())
    files = {"chat_template.jinja": None, "tokenizer_config.json": {**config, "chat_template": template}}
    model = changed(talking, files)
    done = command("chat", "--model", str(model), "--worker", worker, said="w5\n")
    assert is_one_line_error(done), done
    assert ("has no chat template" if not template else "chat template can't be used") in done.err


# What reaches the terminal


@pytest.fixture
def wild(talking: Path, changed: Changed) -> Path:
    """A model whose words end in an umlaut, a line's end and an escape sequence."""
    files = json.loads((talking / "tokenizer.json").read_text())
    vocabulary = files["model"]["vocab"]
    files["model"]["vocab"] = {
        (word if number < 10 else f"{word}\u00fc\n\x1b[31m"): number for word, number in vocabulary.items()
    }
    return changed(talking, {"tokenizer.json": files})


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_streamed_text_is_printable_in_every_encoding(command: Command, worker: str, wild: Path, encoding: str) -> None:
    """Line ends stay, escape sequences show as text, what the encoding lacks is replaced; JSON is exact."""
    options = ("--model", str(wild), "--worker", worker, "--max-new-tokens", "4")
    for arguments in (("generate", "--prompt", "w5"), ("chat",)):
        done = command(*arguments, *options, said="w5\n", PYTHONIOENCODING=encoding)
        assert (done.code, done.err) == (0, ""), done
        assert "\x1b" not in done.out
        assert ("\u00fc" if encoding == "utf-8" else "?") + "\n\\x1b[31m" in done.out
    done = command("generate", "--prompt", "w5", "--json", *options, PYTHONIOENCODING=encoding)
    assert "\u00fc\n\x1b[31m" in json.loads(done.out)["text"]


def test_a_message_in_utf_8_is_heard_in_every_encoding(command: Command, worker: str, wild: Path) -> None:
    """Standard input is decoded as UTF-8, whatever the encoding."""
    options = ("chat", "--json", "--model", str(wild), "--worker", worker, "--max-new-tokens", "4")
    said = "w5 \u00e9\n"
    assert command(*options, said=said, PYTHONIOENCODING="ascii") == command(*options, said=said)


def test_a_models_path_is_shown_printable(command: Command, talking: Path, tmp_path: Path) -> None:
    """In info's table and in errors."""
    model = tmp_path / "\x1b[31mred"
    shutil.copytree(talking, model)
    for path, code in ((model, 0), (model / "none", 2)):
        done = command("info", "--model", str(path))
        assert done.code == code, done
        assert "\x1b[31m" not in done.out + done.err
        assert "\\x1b[31mred" in done.out + done.err


def test_an_ascii_terminal_is_no_error() -> None:
    """A process of its own that Python starts with such an encoding."""
    done = run("info", "--model", "llama-3.2-1b", "--random-weights", PYTHONIOENCODING="ascii")
    assert (done.code, done.err) == (0, "")
    assert done.out.isascii()


# Workers and libraries that fail


@pytest.fixture
def worthless(talking: Path, address: str) -> Iterator[str]:
    """The address of a worker that answers with nothing but NaN."""
    with Server(address) as server:
        shape = hollow_handlers(
            open_checkpoint(str(talking)), torch.float32, lambda shape: torch.full(shape, float("nan"))
        )
        for name, handler in shape.items():
            server.register(name, handler)
        thread = threading.Thread(target=server.serve, daemon=True)
        thread.start()
        yield address
        server.stop()
        thread.join(10.0)


@pytest.mark.parametrize("mode", ["fused", "stack"])
def test_a_worker_that_returns_no_numbers_is_one_line(
    command: Command, worthless: str, talking: Path, mode: str
) -> None:
    """Where tokens are sampled from them, in generate and in chat."""
    options = ("--model", str(talking), "--worker", worthless, "--mode", mode, "--temperature", "0.8", "--json")
    for arguments in (("generate", "--prompt", "w5"), ("chat",)):
        done = command(*arguments, *options, said="w5\n")
        assert is_one_line_error(done), done


def test_a_temperature_that_leaves_no_probabilities_is_one_line(command: Command, worker: str, tiny: Path) -> None:
    """The logits divided by it are infinite."""
    done = answer(command, tiny, worker, "--temperature", "1e-40")
    assert is_one_line_error(done), done


def test_without_transformers_one_line_says_what_to_install() -> None:
    """Python raises an ImportError; a command exits with code 2."""
    program = (
        "import sys\n"
        "sys.modules['transformers'] = None\n"
        "try:\n"
        "    from llama_split import SplitLlamaForCausalLM\n"
        "except ImportError as error:\n"
        "    print('from Python:', error)\n"
        "sys.argv = 'llama-split generate --prompt x --model llama-3.2-1b --random-weights'.split()\n"
        "sys.argv += '--worker ipc:///no/such --connect-timeout-s 0'.split()\n"
        "from llama_split.__main__ import main\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, timeout=100, check=False
    )
    said = "llama_split needs the package transformers: pip install 'shmtransport[llama]'\n"
    assert (done.returncode, done.stdout) == (2, f"from Python: {said}"), done.stderr
    assert done.stderr == f"error: {said}"


def raised_in(*modules: str) -> Exception:
    """An error raised in the last of these modules, each called by the one before it."""

    def failing(rest: list[Any]) -> None:
        if not rest:
            raise ValueError("no")
        rest[0](rest[1:])

    called = [types.FunctionType(failing.__code__, {"__name__": name, "ValueError": ValueError}) for name in modules]
    try:
        called[0](called[1:])
    except ValueError as error:
        return error
    raise AssertionError


def test_mistakes_of_ours_are_not_taken_for_the_models() -> None:
    """An error raised in a library is the model's; one from our own callback, or from torch called by us, is ours."""
    assert is_of_the_model(raised_in("llama_split.commands.prompts", "transformers.generation.utils", "torch"))
    assert is_of_the_model(raised_in("llama_split.commands.prompts", "jinja2.runtime"))
    assert not is_of_the_model(raised_in("llama_split.commands.prompts", "torch"))
    assert not is_of_the_model(raised_in("transformers.generation.utils", "llama_split.trusted.model", "torch"))
    assert not is_of_the_model(raised_in("transformers.generation.utils", "shmtransport.endpoints.client"))
