r"""What people look at: the live table of a sweep and its leaderboard."""

import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from .checkpoint import RunPath
from .config import format_value
from .pruner import Record, order

__all__ = ["LiveTable", "leaderboard"]

STYLES = {
    "running": "cyan",
    "complete": "green",
    "paused": "yellow",
    "diverged": "red",
    "failed": "bold red",
}


def _status(record: Record) -> str:
    return "paused" if record.paused else record.state


def _rows(records: Sequence[Record], runs: Path, style: str = "") -> Table:
    names = {path.id: path.name for path in RunPath.all(runs)}
    keys = list(dict.fromkeys(key for record in records for key in record.config))
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("#", justify="right")
    table.add_column("run", no_wrap=True)
    table.add_column("status")
    table.add_column("epoch", justify="right")
    table.add_column("loss_valid", justify="right")

    for key in keys:
        table.add_column(key, justify="right")

    for record in records:
        loss = record.values.get(record.last, math.nan)
        status = _status(record)
        table.add_row(
            str(record.index),
            f"{names.get(record.run_id, '…')}_{record.run_id}",
            Text(status, style=STYLES.get(status, "")),
            f"{record.last}/{record.epochs}",
            "–" if math.isnan(loss) else f"{loss:.4f}",
            *(_short(record.config.get(key)) for key in keys),
        )

    return table


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else format_value(value)


class LiveTable:
    r"""Creates the live table of a sweep: a table on a terminal, a line per event elsewhere.

    Arguments:
        title: The name of the sweep.
        target: The number of runs wanted.
        runs: The directory of all runs.
        records: Gives the runs of the sweep.
    """

    def __init__(
        self, title: str, target: int, runs: Path, records: Callable[[], list[Record]]
    ) -> None:
        self.title = title
        self.target = target
        self.runs = runs
        self.records = records
        self.start = time.monotonic()
        self.console = Console()
        self.live: Live | None = None

    def __enter__(self) -> "LiveTable":
        if self.console.is_terminal:
            self.live = Live(console=self.console, auto_refresh=False, transient=True)
            self.live.__enter__()

        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.live is not None:
            self.live.__exit__(kind, error, trace)

    def notify(self, event: str, record: Record) -> None:
        r"""Shows that something happened to a run."""

        if self.live is not None:
            self.live.update(self._render(), refresh=True)
        elif event != "running":
            self._print(event, record)

    def _print(self, event: str, record: Record) -> None:
        said = {"draw": "starts", "adopt": "is resumed", "promote": "is promoted"}
        loss = f", loss_valid {record.values[record.last]:.4f}" if record.values else ""
        config = " ".join(f"{key}={_short(x)}" for key, x in record.config.items())
        print(
            f"[{time.monotonic() - self.start:6.1f} s] run {record.index} {record.run_id} "
            f"{said.get(event, event)}: epoch {record.last}/{record.epochs}{loss}, {config}"
            + (f": {record.error}" if record.error else ""),
            flush=True,
        )

    def _render(self) -> RenderableType:
        records = self.records()
        running = [r for r in records if _status(r) == "running"]
        rest = sorted((r for r in records if _status(r) != "running"), key=order)
        room = max(3, self.console.size.height - len(running) - 5)
        counts = {s: sum(_status(r) == s for r in records) for s in STYLES}
        said = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
        head = Text.assemble(
            ("sweep ", "bold"),
            (self.title, "bold cyan"),
            f"  {len(records)}/{self.target} runs: {said}  {time.monotonic() - self.start:.0f} s",
        )

        return Group(head, _rows([*running, *rest[:room]], self.runs))


def leaderboard(title: str, records: Sequence[Record], runs: Path, count: int = 10) -> None:
    r"""Prints the best runs of a sweep, and how far its numbers carry."""

    console = Console(width=None if sys.stdout.isatty() else 160)
    finished = sorted((r for r in records if r.values), key=order)
    console.print(Text(f"\nLeaderboard of {title}", style="bold"))
    console.print(_rows(finished[:count], runs))

    if len(finished) > count:
        console.print(f"and {len(finished) - count} more.")

    seeds = {record.config.get("seed") for record in records}

    if len(seeds) <= 1:
        console.print(
            f"One seed, selected as the best of {len(records)}: the winner's loss is flattered "
            "by the selection. Train it again with other seeds before you quote it."
        )
