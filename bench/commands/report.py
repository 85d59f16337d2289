"""``bench report``: writes the tables of kept runs into the documents."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ..harness.results import read
from ..reports.documents import write_documents
from .options import DOCUMENTS, command_of

FilesArgument = Annotated[list[Path] | None, typer.Argument(help="Files that --json has written.")]
DocumentsOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--document",
        help="A Markdown file with <!-- bench:… --> markers; may be repeated.",
        show_default="docs/benchmarks.md and docs/benchmark-results.md",
    ),
]


@dataclass(frozen=True)
class ReportOptions:
    """The options of ``bench report``, as given."""

    files: FilesArgument = None
    documents: DocumentsOption = None


@command_of(ReportOptions)
def report(options: ReportOptions) -> None:
    """Write the tables of runs into the documents."""
    write_documents(options.documents or DOCUMENTS, [read(path) for path in options.files or ()])
