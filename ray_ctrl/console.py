"""Console output of running commands: one line per iteration, a progress bar on a terminal."""

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table


class _Console(Console):
    lost = ""
    """Why output could not be written; empty if it could."""

    def print(self, *objects: Any, **options: Any) -> None:
        """As rich does, but a full disk under the output costs the output, never the command."""
        try:
            super().print(*objects, **options)
        except OSError as error:
            self.lost = error.strerror or str(error)
            print(f"warning: output cannot be written ({self.lost}): continuing without", file=sys.stderr)
            self.on_broken_pipe()

    def on_broken_pipe(self) -> None:
        """The reader is gone (`| head`, a closed terminal): the command continues, its further lines are dropped."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _open_closed_streams() -> None:
    """Gives a process started without stdout or stderr (`>&-`) the null device in their place.

    The next file opened would get their number, and what libraries print would be written into it.
    """
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_WRONLY)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            setattr(sys, name, os.fdopen(number, "w", encoding="utf-8", errors="replace"))


_open_closed_streams()
# Without a terminal, tables keep their own width rather than the 80 columns that rich assumes. No markup: `[/x]` in a
# path or an answer is printed as it is.
console = _Console(markup=False, highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 120)


def progress_bar() -> Progress:
    """A progress bar at the bottom of a terminal; nothing if the output goes to a file."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


@contextmanager
def counted(what: str, notice_s: float = 5.0) -> Iterator[Callable[[int, int], None]]:
    """Yields f(done, total) that moves a bar; without a terminal, a line every `notice_s` seconds."""
    last = time.monotonic()
    with progress_bar() as bar:
        task = bar.add_task(what, total=None)

        def report(done: int, total: int) -> None:
            nonlocal last
            bar.update(task, completed=done, total=total)
            if not console.is_terminal and time.monotonic() - last > notice_s:
                last = time.monotonic()
                console.print(f"{what}: {done} of {total}")

        yield report


def iteration_line(metrics: Mapping[str, Any], total: int, eta_s: float) -> str:
    """One iteration in one line, led by validation (the exported policy, by argmax) if there was one."""
    parts = [f"iteration {metrics['iteration']:>4}/{total}"]
    for name, prefix in (("validation", "validation/"), ("training", "")):
        if f"{prefix}accuracy" in metrics:
            accuracy, violations = metrics[f"{prefix}accuracy"], metrics[f"{prefix}violations"]
            parts.append(f"{name}: accuracy {accuracy:.3f}, violations {violations:.1%}")
    parts.append(f"{metrics['latency_ms']:.1f} ms")
    parts.append(f"{metrics['time/iteration_s']:.1f} s, {clock_time(eta_s)} left")
    return "  ".join(parts)


def clock_time(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    hours, rest = divmod(max(0, round(seconds)), 3600)
    minutes, seconds_left = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{seconds_left:02}" if hours else f"{minutes}:{seconds_left:02}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], title: str) -> Table:
    """A table for the terminal, numbers right-aligned."""
    grid = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for index, name in enumerate(header):
        grid.add_column(name, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        grid.add_row(*row)
    return grid
