"""``llama-split info``: what each split of a model costs and shows, before anything is loaded or started."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..errors import LlamaSplitError
from ..settings import DTYPE_VARIABLE, Settings
from .console import notice, one_line_errors, print_json, results
from .options import DtypeOption, ModelOption, RandomOption, SeedOption, WireDtypeOption, model_name, open_model

if TYPE_CHECKING:
    from ..footprint import Footprint
    from ..operations import Traffic

_ARENA_TOKENS = 1024  # what the default arenas are made for


def info(
    model: ModelOption = None,
    mode: Annotated[str | None, typer.Option(help="op, fused, layer or stack. Default: all, side by side.")] = None,
    prefill: Annotated[int, typer.Option(min=1, help="Tokens of the prompt; a decode step comes after them.")] = 1024,
    dtype: DtypeOption = None,
    wire_dtype: WireDtypeOption = None,
    random_weights: RandomOption = False,
    seed: SeedOption = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compare the modes: calls and bytes of a forward, memory of each side, what the worker sees.

    Reads the model's configuration; loads no weights and connects to nothing.
    """
    with one_line_errors():
        settings = Settings(report=notice)
        dtype_name = settings.pick(dtype, DTYPE_VARIABLE, "float32")
        name = model_name(settings, model)
        from ..config import DTYPE_NAMES, parse_dtype, parse_mode
        from ..footprint import footprint
        from ..operations import Mode

        compute = parse_dtype(dtype_name)
        wire = compute if wire_dtype is None else parse_dtype(wire_dtype)
        modes = list(Mode) if mode is None else [parse_mode(mode)]
        checkpoint = open_model(name, seed if random_weights else None)
        positions = checkpoint.config.max_position_embeddings
        if prefill >= positions:
            raise LlamaSplitError(
                f"--prefill {prefill} leaves no position for a decode step: the model has {positions}"
            )
        found = [footprint(checkpoint, one, compute, wire, prefill) for one in modes]
        facts = {"model": str(checkpoint.path), "dtype": DTYPE_NAMES[compute], "wire_dtype": DTYPE_NAMES[wire]}
        if as_json:
            shape = asdict(checkpoint.geometry)
            print_json({**facts, "shape": shape, "prefill_tokens": prefill, "modes": [_plain(one) for one in found]})
        else:
            _print(found, facts, prefill)


def _plain(one: Footprint) -> dict[str, Any]:
    """One mode's figures as JSON has them: bytes, unless the name says otherwise."""
    return {
        "mode": one.mode.value,
        "prefill": _plain_traffic(one.prefill),
        "decode": _plain_traffic(one.decode),
        "trusted_weight_bytes": one.trusted_weights,
        "worker_weight_bytes": one.worker_weights,
        "kv_bytes_per_token": one.kv_per_token,
        "kv_holder": one.kv_holder,
        "arena_bytes_each_way": one.arena,
        "worker_sees": one.worker_sees,
    }


def _plain_traffic(traffic: Traffic) -> dict[str, int]:
    return {"calls": traffic.calls, "bytes_sent": traffic.sent, "bytes_received": traffic.received}


def _print(found: list[Footprint], facts: dict[str, str], prefill: int) -> None:
    from shmtransport.text import printable

    table = Table(box=SIMPLE_HEAD)
    table.add_column("")
    for one in found:
        table.add_column(one.mode.value, justify="right")
    _add_traffic(table, f"prefill of {prefill} tokens", [one.prefill for one in found])
    _add_traffic(table, "decode of one more", [one.decode for one in found])
    _add_memory(table, "trusted", found, [one.trusted_weights for one in found])
    _add_memory(table, "worker", found, [one.worker_weights for one in found])
    sees = Table.grid(padding=(0, 2))
    for one in found:
        sees.add_row(f"  {one.mode.value}", one.worker_sees)
    title = f"{printable(facts['model'])}, computing in {facts['dtype']}, {facts['wire_dtype']} on the wire"
    results.print(title, markup=False, soft_wrap=True)
    results.print(table)
    results.print("  The worker sees")
    results.print(sees)
    if prefill > _ARENA_TOKENS:
        results.print(
            f"\nPrompts of more than {_ARENA_TOKENS} tokens may cross in more calls, by the size of the arenas."
        )


def _add_traffic(table: Table, title: str, traffics: list[Traffic]) -> None:
    from shmtransport.units import size_text

    table.add_row(title)
    table.add_row("  calls", *(str(traffic.calls) for traffic in traffics))
    table.add_row("  sent", *(size_text(traffic.sent) for traffic in traffics))
    table.add_row("  received", *(size_text(traffic.received) for traffic in traffics), end_section=True)


def _add_memory(table: Table, side: str, found: list[Footprint], weights: list[int]) -> None:
    from shmtransport.units import size_text

    table.add_row(f"memory, {side} side")
    table.add_row("  weights", *map(size_text, weights))
    table.add_row("  KV a token", *(size_text(one.kv_per_token) if one.kv_holder == side else "–" for one in found))
    table.add_row("  arena", *(size_text(one.arena) for one in found), end_section=True)
