"""A schedule of random kills, what is held against each of them, and the table of what was survived."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

from stockflow.output import manifest as manifest_file
from stockflow.storage import StorageConfig, open_store
from stockflow.verification.verify import verify
from tests.chaos.outputs import Output, Snapshot
from tests.chaos.processes import Running, await_end, descendants, kill, ray_workers

Victim = Literal["worker", "driver", "everything"]
Phase = Literal["before a shard", "in a shard", "publishing", "published"]

PHASES: tuple[Phase, ...] = ("before a shard", "in a shard", "publishing", "published")
_POLL_S = 0.002
_PATIENCE_S = 120.0


@dataclass(frozen=True)
class Site:
    """Where and how merges run, to be killed."""

    name: str
    start: Callable[[Output], Running]
    new_output: Callable[[], Output]
    victims: Sequence[Victim]
    is_on_ray: bool
    most_in_flight: int
    """shards: locally one that is merged, and one that becomes durable meanwhile; on Ray one per worker"""
    start_s: float
    """about how long until the first shard is begun"""
    shard_s: float
    """about how long a shard takes"""
    publish_s: float
    """about how long from the last receipt to the manifest"""


@dataclass(frozen=True)
class Kill:
    """One kill and what it hit."""

    site: str
    victim: Victim
    phase: Phase
    num_redone: int
    """shards that were being written and are made again"""


class Chaos:
    """Kills merges at one site; every claim of survival is an assertion here."""

    def __init__(self, site: Site, random: Random, expected: dict[str, str], behind: StorageConfig) -> None:
        """Hold every end against ``expected`` digests by file, read with the options of ``behind``."""
        self._site, self._random, self._expected, self._behind = site, random, expected, behind
        self._publish_s = site.publish_s
        self.kills: list[Kill] = []
        self.num_merges = 0
        """that came to their end, undisturbed at last"""

    def run(self, num_kills: int) -> list[Kill]:
        """Kill so many times, let every merge that was killed resume and end, and return what was hit."""
        while len(self.kills) < num_kills:
            output = self._site.new_output()
            self._torment(output, num_kills)
        return self.kills

    def _torment(self, output: Output, num_kills: int) -> None:
        """Kill merges into one output until it is published, or enough were killed; then let one end."""
        before = output.snapshot()
        running: Running | None = None
        while len(self.kills) < num_kills and not before.is_published:
            if running is None:
                running = self._site.start(output)
            if not self._await_moment(running, output, before):
                break
            before, ended = self._kill(running, output, before)
            running = None if ended else running
            if len(before.receipts) == len(self._expected) and self._random.random() < 0.5:
                break
        self._let_end(running or self._site.start(output), output, before)

    def _await_moment(self, running: Running, output: Output, before: Snapshot) -> bool:
        """Wait for a moment drawn at random; return whether the merge still runs."""
        site, draw = self._site, self._random
        num_left = len(self._expected) - len(before.receipts)
        chance, moment_s = draw.random(), draw.random()
        target = len(self._expected) if chance > 0.86 else len(before.receipts) + draw.choice((0, 0, 1, 1, 2))
        if num_left == 0:  # nothing is left to merge: anywhere from the start to the manifest
            return self._sleep(running, moment_s * (0.7 * site.start_s + site.publish_s))
        if chance < 0.06:
            return self._sleep(running, moment_s * site.start_s)
        if target >= len(self._expected):
            reached = self._await(running, lambda: output.num_receipts() >= len(self._expected))
            if reached and not self._sleep(running, moment_s * self._publish_s):
                self._publish_s /= 2  # it ends sooner on this machine
            return running.poll() is None
        is_due: Callable[[], bool] = lambda: output.num_receipts() >= target and self._is_working(running, output)  # noqa: E731
        return self._await_within_a_shard(running, output, is_due, moment_s * site.shard_s)

    def _await_within_a_shard(
        self, running: Running, output: Output, is_due: Callable[[], bool], seconds: float
    ) -> bool:
        """Wait until a shard has been in work for so long; for half of it, where all end sooner on this machine."""
        while self._await(running, is_due):
            num_receipts = output.num_receipts()
            if not self._sleep(running, seconds):
                return False
            if self._is_working(running, output) and (self._site.is_on_ray or output.num_receipts() == num_receipts):
                return True
            seconds /= 2
        return False

    def _is_working(self, running: Running, output: Output) -> bool:
        return bool(ray_workers(running.pid)) if self._site.is_on_ray else output.is_busy()

    def _await(self, running: Running, condition: Callable[[], bool]) -> bool:
        deadline = time.monotonic() + _PATIENCE_S
        while running.poll() is None and not condition():
            assert time.monotonic() < deadline, "the merge neither goes on nor ends"
            time.sleep(10 * _POLL_S if self._site.is_on_ray else _POLL_S)
        return running.poll() is None

    def _sleep(self, running: Running, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        return self._await(running, lambda: time.monotonic() >= deadline)

    def _kill(self, running: Running, output: Output, before: Snapshot) -> tuple[Snapshot, bool]:
        """Kill, look at what is left, and return that and whether the merge is over."""
        victim = self._random.choice(self._site.victims)
        busy = ray_workers(running.pid) if self._site.is_on_ray else []
        if victim == "worker" and not busy:
            victim = "driver"
        others = descendants(running.pid)
        if victim == "worker":
            killed = [self._random.choice(busy)]
            kill(*killed)
        else:
            killed = busy
            kill(running.pid, *(others if victim == "everything" else ()))
            await_end(running, others)
        after = output.snapshot()
        self._check(output, before, after)
        begun = len(killed) if self._site.is_on_ray else output.num_in_flight(before, after)
        num_redone = begun if len(after.receipts) < len(self._expected) else 0
        assert num_redone <= self._site.most_in_flight
        self.kills.append(Kill(self._site.name, victim, self._phase(after, num_redone), num_redone))
        return after, victim != "worker"

    def _phase(self, after: Snapshot, num_redone: int) -> Phase:
        if after.is_published:
            return "published"
        if len(after.receipts) == len(self._expected):
            return "publishing"
        return "in a shard" if num_redone else "before a shard"

    def _let_end(self, running: Running, output: Output, before: Snapshot) -> None:
        """Let a merge resume and end; hold its digests against those of the undisturbed one."""
        deadline = time.monotonic() + _PATIENCE_S
        while running.poll() is None:
            assert time.monotonic() < deadline, "the merge does not end"
            time.sleep(_POLL_S)
        assert running.poll() == 0, f"a merge into {output.url} ended with {running.poll()}"
        after = output.snapshot()
        self._check(output, before, after)
        assert after.is_published
        manifest = manifest_file.read(open_store(output.url, self._behind))
        assert self._expected == {file: manifest.files[file].sha256 for file in self._expected}
        self.num_merges += 1

    def _check(self, output: Output, before: Snapshot, after: Snapshot) -> None:
        """Nothing that was finished is redone, and what is published is whole."""
        redone = [file for file, writing in before.receipts.items() if after.receipts.get(file) != writing]
        assert redone == []
        if after.is_published:
            findings = verify(output.url, self._behind).findings
            assert findings == (), findings


def table(kills: Sequence[Kill], seed: int) -> str:
    """Return what was hit and survived, in lines."""
    columns = list(dict.fromkeys((kill_.site, kill_.victim) for kill_ in kills))
    counts = Counter((kill_.site, kill_.victim, kill_.phase) for kill_ in kills)
    redone = Counter[tuple[str, str]]()
    for kill_ in kills:
        redone[kill_.site, kill_.victim] += kill_.num_redone
    head = f"{'seed ' + str(seed):26}" + "".join(f"{phase:>16}" for phase in PHASES) + f"{'all':>6}{'redone':>8}"
    lines = [head]
    for site, victim in columns:
        row = [counts[site, victim, phase] for phase in PHASES]
        cells = "".join(f"{count:>16}" for count in row)
        lines.append(f"{site + ', ' + victim:26}{cells}{sum(row):>6}{redone[site, victim]:>8}")
    totals = [sum(kill_.phase == phase for kill_ in kills) for phase in PHASES]
    cells = "".join(f"{count:>16}" for count in totals)
    lines.append(f"{'all':26}{cells}{len(kills):>6}{sum(redone.values()):>8}")
    return "\n".join(lines)
