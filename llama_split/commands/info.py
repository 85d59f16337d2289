"""``llama-split info``: what each split of a model costs and reveals, before anything is loaded or started."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from shmtransport.text import printable
from shmtransport.units import size_text

from ..boundary.choices import ARENA_TOKENS, check_dtype, parse_mode
from ..boundary.division import layers_text
from ..boundary.operations import PROMISES, Mode
from ..checkpoint.description import describe
from ..errors import LlamaSplitError
from .console import notice, print_json, results
from .footprint import Footprint, footprint
from .options import DtypeOption, ModelOption, RandomOption, SeedOption, WireDtypeOption, model_name
from .settings import DTYPE_VARIABLE, Settings
from .signature import takes

if TYPE_CHECKING:
    from ..boundary.traffic import Traffic


@dataclass(frozen=True)
class InfoOptions:
    """The options of ``llama-split info``, in the order of its help."""

    model: ModelOption = None
    mode: Annotated[str | None, typer.Option(help="op, fused, layer or stack. Default: all, side by side.")] = None
    prefill: Annotated[int, typer.Option(min=1, help="Tokens of the prompt; a decode step comes after them.")] = 1024
    dtype: DtypeOption = None
    wire_dtype: WireDtypeOption = None
    workers: Annotated[
        int, typer.Option(min=1, help="Show how this many workers would share the layers, for `worker --layers`.")
    ] = 1
    max_weight_bytes: Annotated[
        list[int] | None,
        typer.Option(
            min=1, help="The most bytes of weights that a worker can hold; once for all, or once for each in order."
        ),
    ] = None
    random_weights: RandomOption = False
    seed: SeedOption = 0
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False


@takes(InfoOptions)
def info(options: InfoOptions) -> None:
    """Compare what the modes cost and reveal. These are calls and bytes of a forward, and memory of each side.

    Reads the model's configuration and the names of its tensors; loads no weights and connects to nothing.
    """
    settings = Settings(report=notice)
    compute = check_dtype(settings.pick(options.dtype, DTYPE_VARIABLE, "float32"))
    wire = compute if options.wire_dtype is None else check_dtype(options.wire_dtype)
    modes = list(Mode) if options.mode is None else [parse_mode(options.mode)]
    name = model_name(settings, options.model)
    model = describe(name, options.seed if options.random_weights else None)
    prefill, positions = options.prefill, model.positions
    if prefill >= positions:
        raise LlamaSplitError(f"--prefill {prefill} leaves no position for a decode step: the model has {positions}")
    limits = _limits(options.max_weight_bytes, options.workers)
    found = [footprint(model.outline, one, compute, wire, prefill, limits) for one in modes]
    facts = {"model": str(model.path), "dtype": compute.name, "wire_dtype": wire.name}
    if options.as_json:
        shape = asdict(model.outline.geometry)
        costs = {"prefill_tokens": prefill, "modes": [_plain(one) for one in found]}
        print_json({**facts, "shape": shape, **costs, "shields": PROMISES})
    else:
        _print(found, facts, prefill)


def _limits(given: list[int] | None, workers: int) -> list[int | None]:
    """For each worker the most bytes of weights that it can hold; None: no limit."""
    limits: list[int | None] = [None] if given is None else [*given]
    if len(limits) == 1:
        return limits * workers
    if workers not in (1, len(limits)):
        raise LlamaSplitError(
            f"--max-weight-bytes is given {len(limits)} times for --workers {workers}: once, or once each"
        )
    return limits


def _plain(one: Footprint) -> dict[str, Any]:
    """The figures of one mode for JSON: bytes, unless the name says otherwise."""
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
        "workers": [{"layers": layers_text(share.layers), "weight_bytes": share.weights} for share in one.shares],
    }


def _plain_traffic(traffic: Traffic) -> dict[str, int]:
    return {"calls": traffic.calls, "bytes_sent": traffic.sent, "bytes_received": traffic.received}


def _print(found: list[Footprint], facts: dict[str, str], prefill: int) -> None:
    table = Table(box=SIMPLE_HEAD)
    table.add_column("")
    for one in found:
        table.add_column(one.mode.value, justify="right")
    _add_traffic(table, f"prefill of {prefill} tokens", [one.prefill for one in found])
    _add_traffic(table, "decode of one more", [one.decode for one in found])
    shared = len(found[0].shares) > 1
    _add_memory(table, "trusted side", "trusted", found, [one.trusted_weights for one in found])
    workers = "all workers" if shared else "worker side"
    _add_memory(table, workers, "worker", found, [one.worker_weights for one in found])
    if shared:
        _add_shares(table, found)
    sees = Table.grid(padding=(0, 2))
    for one in found:
        sees.add_row(f"  {one.mode.value}", one.worker_sees)
    title = f"{printable(facts['model'])}, computing in {facts['dtype']}, {facts['wire_dtype']} on the wire"
    results.print(title, markup=False, soft_wrap=True)
    results.print(table)
    results.print("  The worker sees")
    results.print(sees)
    results.print("\n  With a shield (--shield), whatever the worker does")
    promises = Table.grid(padding=(0, 2))
    for name, promise in PROMISES.items():
        promises.add_row(f"  {name}", promise)
    results.print(promises)
    if prefill > ARENA_TOKENS:
        results.print(f"\nPrompts of more than {ARENA_TOKENS} tokens may cross in more calls if the arenas are small.")


def _add_shares(table: Table, found: list[Footprint]) -> None:
    """The layers of each worker, in each mode, as ``worker --layers`` takes them."""
    for number in range(len(found[0].shares)):
        shares = [one.shares[number] for one in found]
        table.add_row(f"worker {number + 1}")
        table.add_row("  layers", *(layers_text(share.layers) for share in shares))
        table.add_row("  weights", *(size_text(share.weights) for share in shares), end_section=True)


def _add_traffic(table: Table, title: str, traffics: list[Traffic]) -> None:
    table.add_row(title)
    table.add_row("  calls", *(str(traffic.calls) for traffic in traffics))
    table.add_row("  sent", *(size_text(traffic.sent) for traffic in traffics))
    table.add_row("  received", *(size_text(traffic.received) for traffic in traffics), end_section=True)


def _add_memory(table: Table, title: str, side: str, found: list[Footprint], weights: list[int]) -> None:
    table.add_row(f"memory, {title}")
    table.add_row("  weights", *map(size_text, weights))
    table.add_row("  KV a token", *(size_text(one.kv_per_token) if one.kv_holder == side else "–" for one in found))
    table.add_row("  arena", *(size_text(one.arena) for one in found), end_section=True)
