"""Progress on a terminal: one block at the bottom that redraws itself; stages that took long leave a line above it."""

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from stockflow.events import Event, Note
from stockflow.progress.lines import Ticking
from stockflow.progress.state import Contribution, Snapshot, State
from stockflow.progress.wording import in_words, items
from stockflow.text.escaping import in_a_line, printable
from stockflow.text.sizes import duration, gb

REFRESH_S = 0.2
LONG_S = 2.0
"""A stage that took longer leaves a line."""
WORDS_CELLS = 84
"""What everything beside the bar takes, mostly."""
BAR_CELLS = (8, 28)
"""The least and the most of a bar."""


class LiveDisplay(Ticking):
    """A bar, and on request a line per worker."""

    def __init__(self, *, delay_s: float = 0.0, has_lanes: bool = False, console: Console | None = None) -> None:
        """Draw on standard error.

        Args:
            delay_s: nothing is drawn of what ends before, notes excepted.
            has_lanes: whether to draw a line per worker.
            console: another one to draw on.
        """
        super().__init__(REFRESH_S, delay_s)
        self._console = console or Console(stderr=True)
        self._has_lanes = has_lanes
        self._state = State()
        self._spinner = Spinner("dots")
        self._live = Live(
            console=self._console, get_renderable=self._draw, auto_refresh=False, transient=True, redirect_stdout=False
        )

    def __enter__(self) -> "LiveDisplay":
        """Begin."""
        if not self._delay_s:
            self._live.start()
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        """Take the block away."""
        self._stop()
        self._live.stop()

    def __call__(self, event: Event) -> None:
        """Count an event; leave notes, and stages that took long, standing above the block."""
        ended = self._state.take(event)
        if self._live.is_started and (ended is not None or isinstance(event, Note)):
            self._live.refresh()  # what is printed above a block redraws its last picture
        if ended is not None and ended.elapsed_s >= LONG_S:
            self._console.print(_ended(ended), markup=False, highlight=False)
        if isinstance(event, Note):
            self._console.print(f"{event.kind}: {printable(event.text)}", markup=False, highlight=False)

    def tick(self) -> None:
        """Draw."""
        if not self._live.is_started:
            self._live.start()
        self._live.refresh()

    def _draw(self) -> RenderableType:
        now = self._state.snapshot()
        line = Table.grid(padding=(0, 1))
        line.add_column(no_wrap=True)
        line.add_column(no_wrap=True, style="bold", min_width=len(now.stage.name))
        if now.share is None:
            line.add_row(self._spinner, now.stage.name, Text(in_words(now), style="dim"))
        else:
            least, most = BAR_CELLS
            cells = min(max(self._console.width - len(now.stage.name) - WORDS_CELLS, least), most)
            line.add_column(no_wrap=True, min_width=cells)
            line.add_column(no_wrap=True, overflow="ellipsis")
            bar = ProgressBar(total=1.0, completed=now.share, width=cells)
            line.add_row(self._spinner, now.stage.name, bar, Text(in_words(now)))
        return Group(line, _lanes(now)) if self._has_lanes and now.workers else line


def _lanes(now: Snapshot) -> Table:
    table = Table.grid(padding=(0, 2))
    for _ in range(5):
        table.add_column(no_wrap=True, overflow="ellipsis")
    for one in (one for one in now.workers if one.num_read or one.num_written):
        table.add_row(Text(f"  {in_a_line(one.worker) or 'here'}"), *_cells(one, now))
    return table


def _cells(worker: Contribution, now: Snapshot) -> list[Text]:
    rate = (worker.num_read + worker.num_written) / max(worker.elapsed_s, 1e-9)
    moved = f"{gb(worker.num_read)} read" + (f", {gb(worker.num_written)} written" if worker.num_written else "")
    done = items(now.stage, worker.num_done) if worker.num_done else ""
    return [Text(moved), Text(f"{gb(rate)}/s"), Text(done), Text(in_a_line(worker.last_item), style="dim")]


def _ended(state: Snapshot) -> str:
    parts = [f"{state.stage.name}: {duration(state.elapsed_s)}"]
    if state.num_done > state.stage.num_done:
        parts.append(items(state.stage, state.num_done - state.stage.num_done))
    moved = state.num_read + state.num_written
    if moved:
        parts.append(f"{gb(moved)}, {gb(moved / max(state.elapsed_s, 1e-9))}/s")
    return ", ".join(parts)
