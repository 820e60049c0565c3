"""Metrics of real merges, scraped over HTTP: held against receipts, dashboard, alerts and the page about them."""

import json
import re
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
import yaml
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from stockflow.engine.process import process_name
from stockflow.engine.worker import WorkerSpec
from stockflow.errors import NumericsError
from stockflow.events import Begun, Done, Event, Moved, OnEvent, Stage
from stockflow.output.receipts import Receipt
from stockflow.planning.plan import ShardPlan
from stockflow.progress.metrics import Metrics, served
from stockflow.recipe import load_recipe
from stockflow.run.driver import MergeOptions, merge
from stockflow.run.inputs import Inputs
from stockflow.run.places import in_this_process
from tests import runs
from tests.checkpoints import make_family, write_recipe
from tests.pages import section
from tests.waiting import HANG_S

DASHBOARD = runs.REPOSITORY / "deploy" / "grafana" / "stockflow.json"
ALERTS = runs.REPOSITORY / "deploy" / "prometheus" / "alerts.yaml"
PAGE = section("clusters.md", "Operations")
NOT_ON_THE_DASHBOARD: set[str] = set()
"""metrics that are left out on purpose"""
NAME = re.compile(r"\bstockflow_\w+")
NUM_SHARDS = 4

Scrape = dict[tuple[str, ...], float]
"""values by name and labels' values"""


class Run:
    """A merge in this process, scraped on the way."""

    def __init__(self, recipe: Path, output: Path, num_shards: int = NUM_SHARDS) -> None:
        self.output = output
        self.scrapes: list[tuple[Event, Scrape]] = []
        metrics = Metrics()

        def tell(event: Event) -> None:
            metrics(event)
            if not isinstance(event, Moved):
                self.text = scrape(port)
                self.scrapes.append((event, samples(self.text)))

        def execute(spec: WorkerSpec, shards: Sequence[ShardPlan], on_event: OnEvent) -> Iterator[Receipt]:
            yield from in_this_process(spec, shards[:num_shards], on_event)
            if len(shards) > num_shards:
                raise NumericsError("stopped here")

        options = MergeOptions(1024 * runs.MIB + runs.grown_bytes(), 1, "cpu", 300_000)
        with served(metrics, 0) as port:
            self.result = merge(Inputs.open(load_recipe(str(recipe))), str(output), options, execute, tell)
        with pytest.raises(OSError, match="refused"):
            scrape(port)

    def at(self, is_it: Callable[[Event], bool]) -> Scrape:
        """What was scraped at the last such event."""
        return [values for event, values in self.scrapes if is_it(event)][-1]


def scrape(port: int, host: str = "127.0.0.1") -> str:
    with urlopen(f"http://{host}:{port}/metrics", timeout=HANG_S) as response:
        assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        return str(response.read().decode())


def families(text: str) -> list[Metric]:
    return [family for family in text_string_to_metric_families(text) if family.name.startswith("stockflow_")]


def samples(text: str) -> Scrape:
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in families(text)
        for sample in family.samples
    }  # fmt: skip


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    return write_recipe(root / "recipe.yaml", "model_stock", make_family(root, 2))


@pytest.fixture(scope="module")
def run(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(recipe, tmp_path_factory.mktemp("run") / "out")


def is_publishing(event: Event) -> bool:
    return isinstance(event, Stage) and event.name == "publishing"


def tensor_bytes(path: Path) -> int:
    payload = path.read_bytes()
    return len(payload) - 8 - int.from_bytes(payload[:8], "little")


def test_a_scrape_at_the_end_says_what_receipts_and_files_say(run: Run) -> None:
    receipts = runs.receipts(run.output)
    written = sum(tensor_bytes(path) for path in run.output.glob("*.safetensors"))

    last = run.at(is_publishing)

    assert len(receipts) == NUM_SHARDS
    assert last["stockflow_read_bytes_total",] == sum(receipt["bytes_read"] for receipt in receipts)
    assert last["stockflow_written_bytes_total",] == written
    assert last["stockflow_output_bytes",] == last["stockflow_output_done_bytes",] == written
    assert last["stockflow_tensors_total",] == sum(len(receipt["tensors"]) for receipt in receipts)
    assert last["stockflow_shards", "done"] == last["stockflow_shard_duration_seconds_count",] == NUM_SHARDS
    assert last["stockflow_shard_duration_seconds_sum",] == pytest.approx(
        sum(receipt["seconds"]["total"] for receipt in receipts)
    )
    assert last["stockflow_worker_peak_memory_bytes",] == max(receipt["peak_memory_bytes"] for receipt in receipts)
    assert last["stockflow_in_flight_bytes",] == last["stockflow_busy_workers",] == 0
    spent = {key[1]: value for key, value in last.items() if key[0] == "stockflow_stage_seconds_total"}
    for stage in {stage for receipt in receipts for stage in receipt["seconds"]} - {"total"}:
        assert spent.pop(stage) == pytest.approx(sum(receipt["seconds"].get(stage, 0) for receipt in receipts))
    assert spent == {}, "a stage that no receipt has"
    (info,) = (key for key in last if key[0] == "stockflow_run_info")
    assert run.result.plan.plan_id in info


def test_on_the_way_shards_are_in_one_state_each(run: Run) -> None:
    sizes = {path.name: tensor_bytes(path) for path in run.output.glob("*.safetensors")}
    in_flight: set[str] = set()
    num_seen = 0
    for event, values in run.scrapes:
        if isinstance(event, Begun):
            in_flight.add(event.item)
        elif isinstance(event, Done) and event.cost:
            in_flight.remove(event.item)
        elif not in_flight:
            continue
        num_seen += 1
        assert sum(value for key, value in values.items() if key[0] == "stockflow_shards") == NUM_SHARDS
        assert values["stockflow_shards", "in_flight"] == len(in_flight)
        assert values["stockflow_in_flight_bytes",] == sum(sizes[name] for name in in_flight)
        assert values["stockflow_busy_workers",] == bool(in_flight)
    assert num_seen == 2 * NUM_SHARDS
    assert {event.worker for event, _ in run.scrapes if isinstance(event, Begun)} == {process_name()}


def test_a_resumed_merge_counts_what_was_there(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(NumericsError, match="stopped here"):
        Run(recipe, tmp_path / "out", num_shards=2)
    read_before = sum(receipt["bytes_read"] for receipt in runs.receipts(tmp_path / "out"))

    resumed = Run(recipe, tmp_path / "out")

    first = resumed.at(lambda event: isinstance(event, Stage) and event.name == "merging")
    last = resumed.at(is_publishing)
    assert (first["stockflow_resumed_shards",], first["stockflow_shards", "done"]) == (2, 2)
    assert first["stockflow_shards", "waiting"] == NUM_SHARDS - 2
    assert last["stockflow_output_done_bytes",] == last["stockflow_output_bytes",]
    assert last["stockflow_tensors_total",] == sum(
        len(receipt["tensors"]) for receipt in runs.receipts(tmp_path / "out")[2:]
    )
    assert last["stockflow_read_bytes_total",] + read_before == sum(
        receipt["bytes_read"] for receipt in runs.receipts(tmp_path / "out")
    )


def names(text: str) -> set[str]:
    return set(NAME.findall(text))


def queries() -> list[str]:
    """Every expression of the dashboard, of its variables too."""
    dashboard = json.loads(DASHBOARD.read_text())
    variables = [one["query"]["query"] for one in dashboard["templating"]["list"] if one["type"] == "query"]
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]] + variables


def exported(run: Run) -> dict[str, set[str]]:
    """Names of samples by the name of their metric."""
    return {family.name: {sample.name for sample in family.samples} for family in families(run.text)}


@pytest.mark.parametrize("source", ["dashboard", "alerts", "page"])
def test_every_name_that_is_asked_for_is_exported(run: Run, source: str) -> None:
    rules = yaml.safe_load(ALERTS.read_text())["groups"][0]["rules"]
    asked = {
        "dashboard": names(" ".join(queries())),
        "alerts": names(" ".join(rule["expr"] for rule in rules)),
        "page": names(PAGE),
    }[source]
    found = exported(run)

    assert asked
    assert asked - set().union(*found.values(), found) == set()


def test_every_metric_is_on_the_dashboard_and_explained(run: Run) -> None:
    shown, explained = names(" ".join(queries())), names(PAGE)
    for metric, series in exported(run).items():
        assert shown & series or metric in NOT_ON_THE_DASHBOARD, metric
        assert explained & {metric, *series}, metric
    assert exported(run).keys() >= NOT_ON_THE_DASHBOARD


def test_labels_are_explained(run: Run) -> None:
    page = PAGE
    for name, label in (key for key in run.at(is_publishing) if len(key) == 2):
        if not name.endswith(("_bucket", "run_stage")):
            assert f"`{label}`" in page, (name, label)
    for rule in yaml.safe_load(ALERTS.read_text())["groups"][0]["rules"]:
        assert f"`{rule['alert']}`" in page


def test_panels_do_not_overlap_and_say_where_they_ask() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    cells: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        own = {(place["x"] + dx, place["y"] + dy) for dx in range(place["w"]) for dy in range(place["h"])}
        assert not own & cells, panel["title"]
        assert max(x for x, _ in own) < 24
        cells |= own
        assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${datasource}"}
    assert len({panel["id"] for panel in panels}) == len(panels)


def promtool(*arguments: object, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("no promtool here; Debian's package prometheus has it")
    return subprocess.run(
        [found, *map(str, arguments)], input=stdin, capture_output=True, text=True, check=False, timeout=HANG_S
    )


def test_names_follow_the_conventions_of_prometheus(run: Run) -> None:
    done = promtool("check", "metrics", stdin=run.text)

    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_prometheus_takes_every_expression(tmp_path: Path) -> None:
    variables = {"$instance": ".*", "$__rate_interval": "1m"}
    expressions = [query for query in queries() if not query.startswith("label_values")]
    for name, value in variables.items():
        expressions = [expression.replace(name, value) for expression in expressions]
    rules = [{"record": f"panel:{number}", "expr": expression} for number, expression in enumerate(expressions)]
    (tmp_path / "panels.yaml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))

    for path in (ALERTS, tmp_path / "panels.yaml"):
        done = promtool("check", "rules", path)
        assert done.returncode == 0, done.stdout + done.stderr


FIRING: dict[str, dict[str, str]] = {
    "StockflowStalled": {
        "stockflow_read_bytes_total": "5+0x60",
        "stockflow_written_bytes_total": "0+0x60",
        'stockflow_run_stage{stage="merging"}': "1+0x60",
        "stockflow_busy_workers": "2+0x60",
    },
    "StockflowNoWorkers": {
        'stockflow_shards{state="waiting"}': "7+0x60",
        "stockflow_busy_workers": "0+0x60",
        'stockflow_run_stage{stage="merging"}': "1+0x60",
    },
    "StockflowStorageFails": {'stockflow_retries_total{cause="storage"}': "0+0x25 1+0x35"},
    "StockflowWorkersDie": {
        'stockflow_retries_total{cause="lost"}': "0+0x25 4+0x35",
        'stockflow_retries_total{cause="preempted"}': "0+90x60",
    },
}
"""Series, a value a minute, under which an alert fires half an hour later; and none of the others does."""


@pytest.mark.parametrize("alert", FIRING)
def test_an_alert_fires_when_it_should_and_no_other_does(alert: str, tmp_path: Path) -> None:
    rules = {rule["alert"]: rule for rule in yaml.safe_load(ALERTS.read_text())["groups"][0]["rules"]}
    assert rules.keys() == FIRING.keys()
    labels = {"instance": "head:9464", "job": "stockflow"}
    series: list[dict[str, str]] = []
    for name, values in FIRING[alert].items():
        own = re.findall(r'(\w+)="([^"]*)"', name)
        written = ",".join(f'{key}="{value}"' for key, value in [*labels.items(), *own])
        series.append({"series": f"{name.partition('{')[0]}{{{written}}}", "values": values})
    own_labels = {"state": "waiting"} if alert == "StockflowNoWorkers" else {}
    expected: list[dict[str, Any]] = []
    for name, rule in rules.items():
        summary = rule["annotations"]["summary"].replace("{{ $labels.instance }}", labels["instance"])
        fired = {
            "exp_labels": labels | own_labels | rule["labels"],
            "exp_annotations": {"summary": summary.replace("{{ $value }}", "7")},
        }
        expected.append({"eval_time": "30m", "alertname": name, "exp_alerts": [fired] if name == alert else []})
    tests = [{"interval": "1m", "input_series": series, "alert_rule_test": expected}]
    (tmp_path / "test.yaml").write_text(
        yaml.safe_dump({"rule_files": [str(ALERTS)], "evaluation_interval": "1m", "tests": tests})
    )

    done = promtool("test", "rules", tmp_path / "test.yaml")

    assert done.returncode == 0, done.stdout + done.stderr


def test_the_command_serves_while_it_runs(recipe: Path, tmp_path: Path) -> None:
    """It waits for its recipe on standard input when it is scraped."""
    command = runs.command(
        "merge", "-", tmp_path / "out", "--metrics-port", 0, "--device", "cpu", "--progress", "plain"
    )
    merging = subprocess.Popen(
        command,
        cwd=runs.REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert merging.stderr is not None
    place = re.fullmatch(r"note: metrics at http://\S+:(\d+)/metrics\n", merging.stderr.readline())
    assert merging.stderr.readline() == "opening checkpoints\n"
    assert place is not None

    text = scrape(int(place[1]))
    _, said = merging.communicate(recipe.read_text(), timeout=HANG_S)

    assert merging.returncode == 0, said
    assert samples(text)["stockflow_run_stage", "opening checkpoints"] == 1
    assert "process_resident_memory_bytes" in text
    assert (tmp_path / "out" / "manifest.json").exists()


def test_a_port_that_is_taken_is_said_in_one_line(recipe: Path, tmp_path: Path) -> None:
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = taken.getsockname()[1]
        finished = runs.run("merge", recipe, tmp_path / "out", "--metrics-port", port)

    assert finished.returncode == 2
    assert finished.stderr == (
        f"stockflow: --metrics-port {port}: cannot listen there: Address already in use; name another one, or 0 for "
        "any that is free\n"
    )
    assert not (tmp_path / "out").exists()
