"""A schedule of random kills, what is held against each of them, and the table of what was survived."""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

from stockflow.output import manifest as manifest_file
from stockflow.storage import StorageConfig, open_store
from stockflow.verification.verify import verify
from tests.chaos.outputs import Output, Snapshot
from tests.chaos.processes import Running, await_end, descendants, go_on, kill, ray_workers, stop

Victim = Literal["worker", "driver", "everything"]
Phase = Literal["before a shard", "in a shard", "publishing", "published"]

PHASES: tuple[Phase, ...] = ("before a shard", "in a shard", "publishing", "published")
AIMED: dict[Phase, float] = {"before a shard": 0.06, "publishing": 0.14}
"""shares of the kills by what they are aimed at; all others at a shard"""
_POLL_S = 0.002
_PATIENCE_S = 120.0
_MOST_MERGES = 30
"""that end before a moment for one kill was found"""


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
    phase_s: Mapping[Phase, float]
    """about how long a phase lasts; shortened where it is missed, as on a faster machine"""


@dataclass(frozen=True)
class Kill:
    """One kill and what it hit."""

    site: str
    victim: Victim
    phase: Phase
    num_redone: int
    """shards that were being written and are made again"""


class Chaos:
    """Kills merges at one site; every claim of survival is an assertion here.

    The phase that a kill falls into is drawn, and hit on any machine: the processes are stopped at a random moment,
    looked at while nothing can change, and killed there, or let go on to another moment.
    """

    def __init__(self, site: Site, random: Random, expected: dict[str, str], behind: StorageConfig) -> None:
        """Hold every end against ``expected`` digests by file, read with the options of ``behind``."""
        self._site, self._random, self._expected, self._behind = site, random, expected, behind
        self._phase_s = dict(site.phase_s)
        self._begin_anew()
        self.kills: list[Kill] = []
        self.num_merges = 0
        """that came to their end, undisturbed at last"""

    def run(self, num_kills: int) -> list[Kill]:
        """Kill so many times, let every merge that was killed resume and end, and return what was hit."""
        aims: list[Phase] = [phase for phase, share in AIMED.items() for _ in range(round(share * num_kills))]
        aims += ["in a shard"] * (num_kills - len(aims))
        self._random.shuffle(aims)
        for aim in aims:
            self._kill_once(aim)
        self._let_end()
        return self.kills

    def _begin_anew(self) -> None:
        self._output = self._site.new_output()
        self._before = self._output.snapshot()
        self._running: Running | None = None

    def _kill_once(self, aim: Phase) -> None:
        """Kill in one phase of the merge at work, or of a next one where this one is past it."""
        if self._has_all(self._before) and (aim != "publishing" or self._random.random() < 0.5):
            self._let_end()
        for _ in range(_MOST_MERGES):
            running = self._running = self._running or self._site.start(self._output)
            if self._stop(running, aim):
                self._kill(running, aim)
                return
            self._let_end()
        raise AssertionError(f"no merge was ever stopped {aim}")

    def _stop(self, running: Running, aim: Phase) -> bool:
        """Stop a merge at a moment within a phase; return False if it ended before."""
        least = self._least_receipts(aim)
        while self._await(running, lambda: self._may_be(running, aim, least)):
            self._sleep(running, self._random.random() * self._phase_s[aim])
            mine = self._processes(running)
            stop(*mine)
            self._output.settle()
            if running.poll() is None and self._phase(running, self._output.snapshot()) == aim:
                return True
            go_on(*mine)
            self._phase_s[aim] *= 0.8
        return False

    def _least_receipts(self, aim: Phase) -> int:
        """Return how many shards are to be finished before the kill."""
        if aim == "before a shard":
            return 0
        if aim == "publishing":
            return len(self._expected)
        return min(len(self._before.receipts) + self._random.choice((0, 0, 1, 1, 2)), len(self._expected) - 1)

    def _may_be(self, running: Running, aim: Phase, least_receipts: int) -> bool:
        """Whether a merge seems to be in a phase, by a cheap look."""
        if self._output.num_receipts() < least_receipts:
            return False
        return aim != "in a shard" or self._is_working(running)

    def _phase(self, running: Running, now: Snapshot) -> Phase:
        """Return where a stopped merge is."""
        if now.is_published:
            return "published"
        if self._has_all(now):
            return "publishing"
        return "in a shard" if self._is_working(running) else "before a shard"

    def _has_all(self, found: Snapshot) -> bool:
        return len(found.receipts) == len(self._expected)

    def _is_working(self, running: Running) -> bool:
        return bool(ray_workers(running.pid)) if self._site.is_on_ray else self._output.is_busy()

    def _processes(self, running: Running) -> list[int]:
        """Those that write into the output."""
        return [running.pid, *(ray_workers(running.pid) if self._site.is_on_ray else ())]

    def _await(self, running: Running, condition: Callable[[], bool]) -> bool:
        deadline = time.monotonic() + _PATIENCE_S
        while running.poll() is None and not condition():
            assert time.monotonic() < deadline, "the merge neither goes on nor ends"
            time.sleep(10 * _POLL_S if self._site.is_on_ray else _POLL_S)
        return running.poll() is None

    def _sleep(self, running: Running, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        self._await(running, lambda: time.monotonic() >= deadline)

    def _kill(self, running: Running, phase: Phase) -> None:
        """Kill a merge that is stopped, or a worker of one that goes on then, and look at what is left."""
        stopped, now = self._output.snapshot(), self._processes(running)
        busy = now[1:]
        victim = self._random.choice(self._site.victims)
        if victim == "worker" and busy:
            killed = [self._random.choice(busy)]
            kill(*killed)
            after = stopped
            go_on(*set(now) - set(killed))
        else:
            victim = "driver" if victim == "worker" else victim
            others, killed = descendants(running.pid), busy
            kill(running.pid, *(others if victim == "everything" else ()))
            go_on(*others)
            await_end(running, others)
            self._running, after = None, self._output.snapshot()
        self._check(self._before, after)
        begun = len(killed) if self._site.is_on_ray else self._output.num_in_flight(self._before, after)
        # A worker of Ray may end its shard before it hears that its driver is gone.
        num_redone = 0 if self._has_all(stopped) else begun - (len(after.receipts) - len(stopped.receipts))
        assert 0 <= num_redone <= self._site.most_in_flight
        if not self._site.is_on_ray:
            assert (self._has_all(after), num_redone > 0) == (phase == "publishing", phase == "in a shard")
        self.kills.append(Kill(self._site.name, victim, phase, num_redone))
        self._before = after

    def _let_end(self) -> None:
        """Let a merge resume and end, hold its digests against those of the undisturbed one, and begin another."""
        running = self._running or self._site.start(self._output)
        deadline = time.monotonic() + _PATIENCE_S
        while running.poll() is None:
            assert time.monotonic() < deadline, "the merge does not end"
            time.sleep(_POLL_S)
        assert running.poll() == 0, f"a merge into {self._output.url} ended with {running.poll()}"
        after = self._output.snapshot()
        self._check(self._before, after)
        assert after.is_published
        manifest = manifest_file.read(open_store(self._output.url, self._behind))
        assert self._expected == {file: manifest.files[file].sha256 for file in self._expected}
        self.num_merges += 1
        self._begin_anew()

    def _check(self, before: Snapshot, after: Snapshot) -> None:
        """Nothing that was finished is redone, and what is published is whole."""
        redone = [file for file, writing in before.receipts.items() if after.receipts.get(file) != writing]
        assert redone == []
        if after.is_published:
            findings = verify(self._output.url, self._behind).findings
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
