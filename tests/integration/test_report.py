"""The report's numbers, against tensors.parquet read by pyarrow alone and task vectors computed here in float64."""

import json
import re
import shutil
import statistics
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pyarrow.parquet as pq
import pytest

import stockflow
from stockflow.reports.report import Report
from stockflow.text.sealed import seal
from tests import oracle, runs
from tests.checkpoints import make_family, write_recipe
from tests.report_outputs import NAMES, write_varied_recipe

NUM_LAYERS = 6
KIND_OF_PART = {"self_attn": "attention", "mlp": "mlp", "norm": "norm", "embed": "embedding", "lm_head": "head"}
SECRET = "wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("report")
    runs.merge_here(write_varied_recipe(root, NUM_LAYERS), root / "out", shard_size=200_000)
    return root / "out"


@pytest.fixture(scope="module")
def report(whole: Path) -> Report:
    return stockflow.report(whole)


@pytest.fixture(scope="module")
def table(whole: Path) -> list[dict[str, Any]]:
    (path,) = whole.glob("_stockflow/*/tensors.parquet")
    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return rows


@pytest.fixture
def output(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "out"))


@pytest.fixture(scope="module")
def changes(whole: Path) -> dict[str, list[Any]]:
    """Base and task vectors of every tensor, in float64, from the inputs' files."""
    models = [oracle.load_checkpoint(whole.parent / name) for name in NAMES]
    return {
        name: [np.ravel(base.array), *(np.ravel(model[name].array - base.array) for model in models[1:])]
        for name, base in models[0].items()
    }


def kind(name: str) -> str:
    return next(kind for part, kind in KIND_OF_PART.items() if part in name)


class Page(HTMLParser):
    """Tables of a page as lists of rows of texts, everything that could load something, and the ids."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.loads: list[tuple[str, str]] = []
        self.ids: list[str] = []
        self.elements: list[str] = []
        self._in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.loads += [
            (tag, value or "") for name, value in attrs if name in ("src", "href", "data", "action", "poster")
        ]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._in_cell = False

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.tables[-1][-1][-1] += data

    def table(self, *heads: str) -> list[list[str]]:
        """Return the only table whose heading begins with these cells, without it."""
        (found,) = (rows[1:] for rows in self.tables if rows and tuple(rows[0][: len(heads)]) == heads)
        return found


def test_ratios_and_cosines_by_kind_are_those_of_the_table(report: Report, table: list[dict[str, Any]]) -> None:
    page = Page(report.html())
    shown = {row[0]: row for row in page.table("kind", "tensors", "parameters")}

    assert {kind(row["name"]) for row in table} | {"all"} == shown.keys()
    for name, cells in shown.items():
        members = [row for row in table if name in ("all", kind(row["name"]))]
        ratios, cosines = ([row[column] for row in members] for column in ("ratio", "mean_cosine"))
        assert cells[1:3] == [f"{len(members):,}", f"{sum(row['num_elems'] for row in members):,}"]
        assert cells[3:6] == [f"{value:.3f}" for value in (statistics.median(ratios), min(ratios), max(ratios))]
        assert cells[7] == f"{statistics.median(cosines):.3f}"
        assert cells[9] == str(sum(row["mean_cosine"] <= 0 for row in members))


def test_every_cell_of_the_heatmaps_is_its_tensors_value(report: Report, table: list[dict[str, Any]]) -> None:
    values = {row["name"]: row for row in table}
    assert report.geometry.ratio_map
    assert report.geometry.cosine_map
    for heatmap, column in ((report.geometry.ratio_map, "ratio"), (report.geometry.cosine_map, "mean_cosine")):
        shown = {
            f"model.layers.{layer}.{line.part}.weight": cell.value
            for line in heatmap.lines
            for layer, cell in enumerate(line.cells)
            if cell
        }
        assert shown == {name: row[column] for name, row in values.items() if ".layers." in name}
        assert heatmap.low <= min(shown.values()) < max(shown.values()) <= heatmap.high
    assert report.geometry.cosine_map.is_diverging
    outside = {f"{one.part}.weight": (one.ratio, one.cosine) for one in report.geometry.outside}
    assert outside == {
        name: (row["ratio"], row["mean_cosine"]) for name, row in values.items() if ".layers." not in name
    }


def test_distributions_count_every_tensor_once(report: Report, table: list[dict[str, Any]]) -> None:
    for found, column in ((report.geometry.ratios, "ratio"), (report.geometry.cosines, "mean_cosine")):
        assert found
        values = sorted(row[column] for row in table)
        assert sum(found.counts) == len(values)
        for count, low, high in zip(found.counts[:-1], found.edges[:-2], found.edges[1:-1], strict=True):
            assert count == sum(low <= value < high for value in values)
        assert found.median == pytest.approx(statistics.median(values), rel=1e-15)


def test_cosines_and_norms_of_whole_models_are_those_of_their_task_vectors(
    report: Report, changes: dict[str, list[Any]]
) -> None:
    whole_vectors = [np.concatenate(parts) for parts in zip(*changes.values(), strict=True)]
    unit = np.stack([vector / np.linalg.norm(vector) for vector in whole_vectors[1:]])

    # The merge rounds task vectors to float32 before it multiplies them.
    np.testing.assert_allclose(np.array(report.geometry.matrix), unit @ unit.T, rtol=1e-6)
    np.testing.assert_allclose(report.geometry.norms, [np.linalg.norm(vector) for vector in whole_vectors], rtol=1e-6)
    pairs = [float(unit[i] @ unit[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert report.geometry.mean_model_cosine == pytest.approx(sum(pairs) / 3, rel=1e-6)
    cells = [row[1:] for row in Page(report.html()).table("", "A", "B", "C")]
    assert [cells[0][1], cells[0][2], cells[1][2]] == [f"{pair:.3f}" for pair in pairs]


def test_relative_changes_by_layer_are_those_of_the_weights(report: Report, changes: dict[str, list[Any]]) -> None:
    assert [change.letter for change in report.geometry.changes] == ["A", "B", "C"]
    for place, change in enumerate(report.geometry.changes, start=1):
        for layer, value in enumerate(change.values):
            parts = [vectors for name, vectors in changes.items() if f".layers.{layer}." in name]
            moved, base = (np.linalg.norm(np.concatenate([vectors[i] for vectors in parts])) for i in (place, 0))
            assert value == pytest.approx(moved / base, rel=1e-6)


def test_clamped_and_unchanged_tensors_are_named(report: Report) -> None:
    reasons = {one.row.name: one.reasons for one in report.geometry.notable}

    assert report.geometry.all_tensors.num_clamped == 2
    assert report.geometry.all_tensors.num_zero_delta == 4
    assert {name for name, words in reasons.items() if "clamped" in words} == {
        f"model.layers.{layer}.self_attn.k_proj.weight" for layer in (1, 2)
    }
    assert {name for name, words in reasons.items() if "unchanged in a model" in words} == {
        f"model.layers.{layer}.{part}.weight"
        for layer in (0, 1)
        for part in ("input_layernorm", "post_attention_layernorm")
    }
    listed = Page(report.html()).table("tensor", "why")
    assert {row[0] for row in listed} == reasons.keys()


def test_how_it_ran_is_what_the_receipts_say(report: Report, whole: Path) -> None:
    receipts, course = runs.receipts(whole), report.course

    assert len(receipts) > 3
    for name, words in (("read", "reading ranges"), ("combine", "combining"), ("publish", "making durable")):
        (stage,) = (stage for stage in course.stages if stage.name == words)
        assert stage.seconds == pytest.approx(sum(receipt["seconds"][name] for receipt in receipts), abs=1e-5)
    moved = sum(receipt["bytes_read"] + receipt["size"] for receipt in receipts)
    assert course.num_bytes == moved
    assert course.working_s is not None
    assert sum(course.rates) * course.working_s / len(course.rates) == pytest.approx(moved, rel=1e-9)
    assert course.began == min(receipt["began"] for receipt in receipts)
    assert course.peak_bytes == max(receipt["peak_memory_bytes"] for receipt in receipts)
    assert course.memory_bytes == receipts[0]["memory_bytes"]
    assert [(lane.num_shards, len(lane.spans)) for lane in course.lanes] == [(len(receipts), len(receipts))]


def test_the_page_needs_nothing_else_and_names_every_input(report: Report, whole: Path) -> None:
    text = report.html()
    page = Page(text)

    assert {(tag, value) for tag, value in page.loads if not value.startswith("#")} == set()
    assert {value[1:] for _, value in page.loads} <= {*page.ids}
    assert not {"img", "link", "iframe", "object", "embed", "base", "form"} & {*page.elements}
    assert re.search(r"url\(|@import|https?://", text) is None
    inputs = page.table("letter", "input", "files")
    assert [row[1].split()[0] for row in inputs] == [str(whole.parent / name) for name in NAMES]
    assert [int(row[2]) for row in inputs] == [
        len([path for path in (whole.parent / name).iterdir() if path.suffix == ".safetensors"]) for name in NAMES
    ]
    assert "merge_method: model_stock" in text


def test_json_and_text_agree_with_the_page(whole: Path, report: Report) -> None:
    told = runs.invoke("report", whole, "--json", "--quiet")
    shown = runs.invoke("report", whole)

    assert told.exit_code == shown.exit_code == 0
    facts = json.loads(told.stdout)
    assert facts == json.loads(json.dumps(report.facts()))
    assert facts["geometry"]["kinds"][-1]["num_clamped"] == 2
    assert "Three models, merged by Model Stock" in shown.stdout
    assert f"(t = {facts['geometry']['kinds'][-1]['ratio']['median']:.3f})" in shown.stdout


def test_an_output_without_receipts_has_a_report_still(output: Path) -> None:
    peak, seconds = (stockflow.report(output).course.peak_bytes, stockflow.report(output).course.stages)
    for folder in output.glob("_stockflow/*/receipts"):
        shutil.rmtree(folder)

    report = stockflow.report(output)

    assert (report.course.peak_bytes, report.course.stages) == (peak, seconds)
    assert report.findings == ()
    assert "The receipts do not say when shards were merged." in report.html()
    assert "0 of " in str(report)


@pytest.mark.parametrize("damage", [b"{}", b"\xff", b""])
def test_a_damaged_receipt_is_named_and_done_without(output: Path, damage: bytes) -> None:
    path = next(output.glob("_stockflow/*/receipts/*.json"))
    path.write_bytes(damage)

    found = runs.invoke("report", output, "--html", output.parent / "page.html")

    assert found.exit_code == 4
    assert path.name in found.stderr
    assert "1 record of this output cannot be used" in (output.parent / "page.html").read_text()


def remove_manifest(output: Path) -> None:
    (output / "manifest.json").unlink()


def leave_a_foreign_checkpoint(output: Path) -> None:
    remove_manifest(output)
    shutil.rmtree(output / "_stockflow")


def leave_nothing(output: Path) -> None:
    shutil.rmtree(output)


def damage_manifest(output: Path) -> None:
    (output / "manifest.json").write_text("{}")


def damage_table(output: Path) -> None:
    (path,) = output.glob("_stockflow/*/tensors.parquet")
    path.write_bytes(path.read_bytes()[:-1] + b"?")


def remove_table(output: Path) -> None:
    (path,) = output.glob("_stockflow/*/tensors.parquet")
    path.unlink()


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (remove_manifest, 2, "it is not a finished output"),
        (leave_a_foreign_checkpoint, 2, "it is a checkpoint that stockflow did not make"),
        (leave_nothing, 2, "there is nothing"),
        (damage_manifest, 4, "manifest.json is not"),
        (damage_table, 4, "is not as the manifest says"),
        (remove_table, 4, "Without this table there is nothing to report"),
    ],
)
def test_what_has_no_report_is_said(output: Path, change: Callable[[Path], None], code: int, words: str) -> None:
    change(output)

    found = runs.invoke("report", output, "--html", output.parent / "page.html")

    assert (found.exit_code, found.stdout) == (code, "")
    assert words in found.stderr
    assert "Traceback" not in found.stderr
    assert not (output.parent / "page.html").exists()


@pytest.mark.parametrize("place", ["", "folder/", "."])
def test_a_page_needs_a_file(whole: Path, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    found = runs.invoke("report", whole, "--html", place)

    assert found.exit_code == 2
    assert "names no file" in found.stderr


def test_the_words_of_strangers_are_only_words(output: Path) -> None:
    attack = "\x1b[31m</pre><script>alert(1)</script><img src=//evil.example>"
    fields = json.loads((output / "manifest.json").read_text())
    del fields["seal"]
    fields["recipe"] = f"{attack}\nendpoint: https://user:{SECRET}@host.example/\n"
    fields["versions"][attack] = attack
    fields["inputs"][1]["url"] = f"s3://bucket/{attack}?X-Amz-Signature={SECRET}"
    url = f"s3://bucket/{attack}?X-Amz-Signature={SECRET}"
    said = {"code": "stranger", "text": f"{attack} at {url}", "severity": "warning", "models": [url], "tensors": []}
    fields["remarks"] = [{**said, "values": {url: url}, "place": ""}]
    fields["summary"] |= {"peak_memory_bytes": 1e308, "seconds_read": 1e308}
    fields["gram"] = [[1e308] * 4] * 4
    (output / "manifest.json").write_bytes(seal(json.dumps(fields)))

    report = stockflow.report(output)

    text, page = report.html(), Page(report.html())
    assert (page.elements.count("script"), page.elements.count("img")) == (1, 0)
    assert SECRET not in json.dumps(report.facts())
    for shown in (text, str(report)):
        assert "\x1b" not in shown
        assert SECRET not in shown
    assert "&lt;script&gt;" in text


def test_a_method_without_geometry_has_a_report(tmp_path: Path) -> None:
    family = make_family(tmp_path, 2, {"model.layers.0.mlp.up_proj.weight": (8, 4), "w": (3,)}, buffers=False)
    recipe = write_recipe(tmp_path / "r.yaml", "linear", family, parameters={"weight": 0.5})
    runs.merge_here(recipe, tmp_path / "out")

    report = stockflow.report(tmp_path / "out")

    assert report.geometry.matrix == ()
    assert "linear averaging" in report.html()
    assert "Cosines and ratios are not on record" in str(report)


def test_remarks_and_what_an_elementwise_method_recorded_are_shown(tmp_path: Path) -> None:
    family = make_family(tmp_path, 2, {"model.layers.0.mlp.up_proj.weight": (8, 40), "bias": (30,)}, buffers=False)
    rules = [{"filter": "bias", "action": "skip"}]
    recipe = write_recipe(
        tmp_path / "r.yaml", "ties", family, parameters={"weight": 0.5, "density": 0.3}, stockflow={"rules": rules}
    )
    runs.merge_here(recipe, tmp_path / "out")

    report = stockflow.report(tmp_path / "out")

    assert '<th scope="col"></th>' not in report.html()
    facts = Page(report.html()).table("fact", "tensors")
    assert [row[:3] for row in facts] == [["kept share A", "1", "0.300"], ["kept share B", "1", "0.300"]]
    remarks = Page(report.html()).table("code")
    assert (
        {"skipped", "promise-unkept"} <= {row[0] for row in remarks} == {each.code for each in report.evidence.remarks}
    )
    told = str(report)
    assert "kept share A" in told
    assert all(f"{said}: {text} [{code}]" in told for code, said, text in remarks)


def test_one_tensor_of_one_layer_has_a_report(tmp_path: Path) -> None:
    family = make_family(tmp_path, 2, {"model.layers.3.mlp.up_proj.weight": (8, 4)}, buffers=False)
    runs.merge_here(write_recipe(tmp_path / "r.yaml", "model_stock", family), tmp_path / "out")

    report = stockflow.report(tmp_path / "out")

    assert report.geometry.layers == ((3, 3),)
    assert "Ratio t by layer" in report.html()


def test_a_report_on_s3_from_s3(
    whole: Path, report: Report, s3_endpoint: str, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    s3 = boto3.client("s3")
    for path in (path for path in whole.rglob("*") if path.is_file()):
        s3.put_object(Bucket=s3_bucket, Key=f"out/{path.relative_to(whole)}", Body=path.read_bytes())

    place = f"s3://{s3_bucket}/out"
    made = runs.invoke("report", place, "--html", f"{place}/report.html")

    assert made.exit_code == 0, made.stderr
    page = s3.get_object(Bucket=s3_bucket, Key="out/report.html")["Body"].read().decode()
    assert page == report.html().replace(str(whole), place)
    missing = runs.invoke("report", f"s3://{s3_bucket}/other")
    assert missing.exit_code == 2
    assert "there is nothing" in missing.stderr


def test_the_card_sums_up_what_the_table_says(whole: Path, table: list[dict[str, Any]]) -> None:
    lines = (whole / "README.md").read_text().splitlines()
    cells = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines if "|" in line
    }

    for name in ("attention", "mlp", "norm", "embedding", "head", "**all**"):
        members = [row for row in table if name in ("**all**", kind(row["name"]))]
        expected = [
            f"{of([row[column] for row in members]):.4f}"
            for column in ("ratio", "mean_cosine")
            for of in (statistics.fmean, min, max)
        ]
        assert cells[name][2:8] == expected
