"""``llama-split chat`` as its users meet it, in a pipe and on a terminal."""

from __future__ import annotations

import json
import os
import pty
import select
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.children import Child, Mother
from tests.support.commands import Command, is_one_line_error
from tests.support.process import ROOT

pytestmark = pytest.mark.timeout(150)

FIRST, SECOND = "w5 w6", "w7"


def turns(command: Command, model: Path, worker: str, said: str, *options: str) -> list[dict[str, Any]]:
    """What a chat prints to these messages, with answers of eight tokens."""
    done = command(
        *("chat", "--json", "--model", str(model), "--worker", worker, "--max-new-tokens", "8", *options), said=said
    )
    assert (done.code, done.err) == (0, "")
    return [json.loads(line) for line in done.out.splitlines()]


def generated(command: Command, model: Path, worker: str, text: str, *options: str) -> list[int]:
    """The tokens that ``generate`` gives after a text that is already in the chat's form."""
    done = command(
        *("generate", "--json", "--no-chat", "--prompt", text, "--model", str(model), "--worker", worker),
        *("--max-new-tokens", "8", *options),
    )
    assert done.code == 0, done.err
    tokens: list[int] = json.loads(done.out)["token_ids"]
    return tokens


def test_each_turn_answers_as_generate_would_and_goes_on_from_the_cache(
    command: Command, worker: str, talking: Path
) -> None:
    """The second turn runs only its own tokens and the first's last one through the model, and answers the same."""
    first, second = turns(command, talking, worker, f"{FIRST}\n{SECOND}\n")
    assert first["token_ids"] == generated(command, talking, worker, f"w1 {FIRST} w2 w3")
    whole = f"w1 {FIRST} w2 w3 {first['text']} w2 w1 {SECOND} w2 w3"
    assert second["token_ids"] == generated(command, talking, worker, whole)
    assert (first["turn"], first["prompt_tokens"], first["cached_tokens"]) == (1, 5, 0)
    assert (second["turn"], second["prompt_tokens"], second["cached_tokens"]) == (2, 18, 12)
    assert second["prefilled_tokens"] == 6
    assert first["calls"] == second["calls"] == 8 * 9
    width = 4 * (32 + 32 + 32 + 64)  # what the four linear layers take, in bytes a token
    assert second["tensor_bytes_sent"] - first["tensor_bytes_sent"] == 2 * width * (6 - 5)


def test_a_template_that_changes_what_was_said_costs_the_cache_behind_it(
    command: Command, worker: str, talking: Path, tmp_path: Path
) -> None:
    """The cache is cropped to the common prefix of both renderings, and the answer equals that of an empty cache."""
    model = tmp_path / "forgetful"
    shutil.copytree(talking, model)
    template = (model / "chat_template.jinja").read_text()
    assert template.count("message.content") == 1
    (model / "chat_template.jinja").write_text(template.replace("message.content", "message.content.split()[0]"))
    first, second = turns(command, model, worker, f"{FIRST}\n{SECOND}\n")
    whole = f"w1 w5 w2 w3 {first['text'].split()[0]} w2 w1 {SECOND} w2 w3"
    assert second["token_ids"] == generated(command, talking, worker, whole)
    assert (second["prompt_tokens"], second["cached_tokens"]) == (10, 5)  # "w1 w5 w2 w3", and the answer's first word


def test_reset_starts_over_and_exit_ends(command: Command, worker: str, talking: Path) -> None:
    """Nothing after /exit is read; empty lines are ignored."""
    said = f"{FIRST}\n\n  \n/reset\n{FIRST}\n/exit\n{SECOND}\n"
    first, again = turns(command, talking, worker, said)
    assert again["cached_tokens"] == 0
    assert again["token_ids"] == first["token_ids"]


def test_the_system_message_comes_first(command: Command, worker: str, talking: Path) -> None:
    """In every turn, also after /reset."""
    said = f"{FIRST}\n/reset\n{FIRST}\n"
    expected = generated(command, talking, worker, f"w4 w9 w2 w1 {FIRST} w2 w3")
    assert [turn["token_ids"] for turn in turns(command, talking, worker, said, "--system", "w9")] == [expected] * 2


def test_without_json_the_answers_stream(command: Command, worker: str, talking: Path) -> None:
    """The answers alone, one per line on standard output, also when the last input line has no line end."""
    common = ("--model", str(talking), "--worker", worker, "--max-new-tokens", "8")
    done = command("chat", *common, said=f"{FIRST}\n{SECOND}")
    assert (done.code, done.err) == (0, "")
    expected = turns(command, talking, worker, f"{FIRST}\n{SECOND}")
    assert done.out.splitlines() == [turn["text"] for turn in expected]


def test_a_message_too_long_is_refused_and_the_chat_goes_on(
    command: Command, worker: str, talking: Path, tmp_path: Path
) -> None:
    """The chat goes on as if the message had never been sent."""
    model = tmp_path / "short"
    shutil.copytree(talking, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 32}))
    long = " ".join(["w8"] * 40)
    done = command(
        *("chat", "--json", "--model", str(model), "--worker", worker, "--max-new-tokens", "8"),
        said=f"{FIRST}\n{long}\n{SECOND}\n",
    )
    assert done.code == 0
    first, refused, second = (json.loads(line) for line in done.out.splitlines())
    assert [first, second] == [
        {**turn, "turn": number}
        for turn, number in zip(turns(command, model, worker, f"{FIRST}\n{SECOND}"), (1, 3), strict=True)
    ]
    assert "the model has 32 positions" in refused["error"]
    assert done.err.startswith("error: the prompt has ")


def test_bytes_that_are_no_text_are_refused_and_the_chat_goes_on(command: Command, worker: str, talking: Path) -> None:
    """One line on standard error for each such message."""
    common = ("--model", str(talking), "--worker", worker, "--max-new-tokens", "8")
    done = command("chat", *common, said=f"w5 \udcff\n{FIRST}\n")
    assert (done.code, done.err) == (0, "error: the text is not valid UTF-8\n")
    assert done.out.splitlines() == [turn["text"] for turn in turns(command, talking, worker, FIRST)]


def test_help_lists_the_commands_and_unknown_ones_do_not_reach_the_model(
    command: Command, worker: str, talking: Path
) -> None:
    """A mistyped command is refused like a message too long; a path, or a line that begins with a space, is said."""
    common = ("--model", str(talking), "--worker", worker, "--max-new-tokens", "2")
    said = f"/help\n/rest\n/exit now\n{FIRST}\n/w5/w6\n /reset\n"
    done = command("chat", "--json", *common, said=said)
    assert done.code == 0
    help_line, *errors = done.err.splitlines()
    assert all(name in help_line for name in ("/reset", "/exit", "/help", "Ctrl-C"))
    assert errors == [
        f"error: there is no such command: {line}; /help lists the commands" for line in ("/rest", "/exit now")
    ]
    turns = [json.loads(line) for line in done.out.splitlines()]
    assert [one["turn"] for one in turns] == [1, 2, 3, 4, 5]
    assert ["error" in one for one in turns] == [True, True, False, False, False]
    tokens = [one["prompt_tokens"] for one in turns[2:]]
    assert tokens == sorted(set(tokens)), "each message comes after the others"


def test_a_model_without_chat_template_is_one_line(command: Command, worker: str, tiny: Path) -> None:
    """The line names the command that works without one."""
    done = command("chat", "--model", str(tiny), "--worker", worker)
    assert is_one_line_error(done), done
    assert "no chat template; use `llama-split generate --no-chat`" in done.err


class Terminal:
    """A command on a terminal of its own, like a user's; its standard error goes elsewhere."""

    def __init__(self, mother: Mother, *arguments: str) -> None:
        self._ours, self._its = pty.openpty()
        self._seen = b""
        script = ROOT / "tests/support/processes/terminal.py"
        self._process = Child(mother, script, os.ttyname(self._its), *arguments)

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def until(self, text: str, timeout_s: float = 60.0) -> str:
        """Read up to this text, and return the terminal's output since the last read."""
        deadline = time.monotonic() + timeout_s
        while text.encode() not in self._seen:
            assert time.monotonic() < deadline, self._seen
            self._read()
        shown, _, self._seen = self._seen.partition(text.encode())
        return shown.decode() + text

    def end(self, timeout_s: float = 30.0) -> tuple[int, str]:
        """Its exit code and standard error; it must end by itself."""
        deadline = time.monotonic() + timeout_s
        ended = os.pidfd_open(self._process.pid)
        try:
            while not select.select([ended], [], [], 0)[0]:
                assert time.monotonic() < deadline, self._seen
                self._read()  # a terminal that is not read would block it
        finally:
            os.close(ended)
        return self._process.wait(), self._process.output.read()

    def close(self) -> None:
        self._process.end()
        os.close(self._ours)
        os.close(self._its)

    def _read(self) -> None:
        if select.select([self._ours], [], [], 0.1)[0]:
            self._seen += os.read(self._ours, 4096)


def test_ctrl_c_ends_an_answer_and_at_the_prompt_the_chat(llama_mother: Mother, worker: str, talking: Path) -> None:
    """After an answer that was cut short the chat goes on; at the prompt the second ends it with 130 and one word."""
    options = ("--model", str(talking), "--worker", worker, "--max-new-tokens", "90000")
    terminal = Terminal(llama_mother, "chat", *options)
    try:
        terminal.until("> ")
        for said in (FIRST, SECOND):
            terminal.type(f"{said}\n")
            terminal.until(f"{said}\r\n")
            terminal.until(" w")  # it answers
            terminal.type("\x03")
            assert "\r\n" in terminal.until("> ")
        time.sleep(0.5)  # Python's input() misses a signal in the moment between showing its prompt and waiting
        terminal.type("half a mess\x03")
        terminal.until("> ")
        time.sleep(0.5)
        terminal.type("/nonsense\n")  # a line in between: the next Ctrl-C is a first one again
        terminal.until("> ")
        time.sleep(0.5)
        terminal.type("\x03")
        terminal.until("> ")
        time.sleep(0.5)
        terminal.type("\x03")
        code, err = terminal.end()
    finally:
        terminal.close()
    assert code == 130, err
    assert err.splitlines()[-1] == "interrupted"
    assert err.count("Ctrl-C once more, or Ctrl-D, ends the chat") == 2
    assert "error: there is no such command: /nonsense" in err
    assert "half a mess" not in err
    assert "Traceback" not in err
