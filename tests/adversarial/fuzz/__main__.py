"""``python -m tests.adversarial.fuzz --inputs 1000000``: the long run; exits with 1 at the first broken rule.

``--seed`` gives the same inputs again; ``--target NAME --replay HEX`` puts one of them in again. A child process does
the work, so that an input that ends it (by a bus error, say) is known as well.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import mmap
import os
import sys
import time
import traceback
from random import Random, SystemRandom

from .rule import Broken, Tally, Target, hold, run, watched
from .targets import TARGETS

_CHUNK = 2000
_PROGRESS_SECONDS = 5.0
_NAME_BYTES = 32
_NOTE_BYTES = 64 << 20  # for the largest input; what is not written takes no memory


class _Note:
    """The current target and input, in memory that outlives the process."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _NOTE_BYTES)

    def begin(self, target: str) -> None:
        self._memory.seek(0)
        self._memory.write(target.ljust(_NAME_BYTES).encode())
        self(b"")

    def __call__(self, data: bytes) -> None:
        self._memory.seek(_NAME_BYTES)
        self._memory.write(len(data).to_bytes(8, "little") + data)

    def text(self) -> str:
        self._memory.seek(0)
        name = self._memory.read(_NAME_BYTES).decode().strip()
        return f"{name}; the input is {self._memory.read(int.from_bytes(self._memory.read(8), 'little')).hex()}"


def supervise(arguments: list[str] | None = None) -> int:
    """Run ``main`` in a child process; return 1 also if a signal ends the child."""
    note = _Note()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = main(arguments, note)
        except SystemExit as end:  # the arguments were wrong, or help was asked for
            status = end.code if isinstance(end.code, int) else 1
        except KeyboardInterrupt:
            status = 130
        except BaseException:  # noqa: BLE001 - the child ends here, whatever it is
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    while True:
        with contextlib.suppress(KeyboardInterrupt):  # the child handles it
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            break
    if status < 0:
        print(f"\nBROKEN by signal {-status}: {note.text()}", file=sys.stderr)
        return 1
    return status


def main(arguments: list[str] | None = None, note: _Note | None = None) -> int:
    """Run, and return the exit status."""
    note = note or _Note()
    names = [target.name for target in TARGETS]
    parser = argparse.ArgumentParser(
        prog="python -m tests.adversarial.fuzz", description="Hostile input for every decoder."
    )
    parser.add_argument(
        "--inputs", type=int, default=1_000_000, help="how many, over all targets (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=SystemRandom().randrange(2**32), help="default: another each time")
    parser.add_argument("--target", choices=names, help="only this one")
    parser.add_argument("--replay", type=bytes.fromhex, metavar="HEX", help="put this one input into the target")
    options = parser.parse_args(arguments)
    if options.replay is not None and options.target is None:
        parser.error("--replay needs --target")
    chosen = [target for target in TARGETS if options.target in (None, target.name)]
    gc.collect()
    gc.freeze()  # the garbage collector need not scan what the imports have made again and again
    try:
        with watched():
            if options.replay is not None:
                with contextlib.closing(chosen[0]()) as target:
                    note.begin(target.name)
                    note(options.replay)
                    print("valid" if hold(target, options.replay) else "refused")
            else:
                _run_all(chosen, options.inputs, options.seed, note)
    except Broken as broken:
        if broken.__cause__ is not None:
            traceback.print_exception(broken.__cause__)
        print(f"\nBROKEN with --seed {options.seed}: {broken}", file=sys.stderr)
        return 1
    return 0


def _run_all(chosen: list[type[Target]], inputs: int, seed: int, note: _Note) -> None:
    print(f"{inputs} inputs, --seed {seed}", flush=True)
    started = shown = time.monotonic()
    done = 0
    tallies: dict[str, Tally] = {}
    for index, make in enumerate(chosen):
        tally = tallies[make.name] = Tally()
        wanted = inputs // len(chosen) + (index < inputs % len(chosen))
        random = Random(f"{seed} {make.name}")
        note.begin(make.name)
        with contextlib.closing(make()) as target:
            while tally.inputs < wanted:
                chunk = min(_CHUNK, wanted - tally.inputs)
                run(target, random, chunk, tally, note)
                done += chunk
                if time.monotonic() - shown >= _PROGRESS_SECONDS:
                    shown = time.monotonic()
                    print(f"{done} of {inputs} inputs in {shown - started:.0f} s; now: {target.name}", flush=True)
    print(f"\n{'target':<18}{'inputs':>10}{'valid':>10}{'refused':>10}{'seconds':>10}{'µs each':>10}")
    for name, tally in tallies.items():
        each = tally.seconds / max(tally.inputs, 1) * 1e6
        print(f"{name:<18}{tally.inputs:>10}{tally.valid:>10}{tally.refused:>10}{tally.seconds:>10.1f}{each:>10.1f}")
    print(f"{done} inputs in {time.monotonic() - started:.1f} s; none broke the rule")


if __name__ == "__main__":
    sys.exit(supervise())
