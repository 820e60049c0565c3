"""The report's page in a real browser: nothing is fetched or refused, everything works by keyboard, at any width."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pytest

import stockflow
from stockflow.reports import palette
from stockflow.reports.report import Report
from tests import runs
from tests.report_outputs import write_varied_recipe

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.browser

NUM_LAYERS = 32
WIDTHS = (360, 768, 1280)
RATIO_MAP = "table[aria-label='Ratio t by layer']"
TOO_FAINT = """() => {
  const number = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const linear = (channel) => channel <= 0.04045 ? channel / 12.92 : ((channel + 0.055) / 1.055) ** 2.4;
  const weights = [0.2126, 0.7152, 0.0722];
  const light = (rgb) => weights.reduce((sum, weight, index) => sum + weight * linear(rgb[index] / 255), 0);
  const ground = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = number(getComputedStyle(at).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    const box = element.getBoundingClientRect();
    if (!own || box.width <= 1 || getComputedStyle(element).visibility === "hidden") continue;
    const style = getComputedStyle(element);
    const ink = number(element instanceof SVGElement ? style.fill : style.color);
    const [high, low] = [light(ink), light(ground(element))].sort((a, b) => b - a);
    if ((high + 0.05) / (low + 0.05) < 4.5) found.push(element.outerHTML.slice(0, 120));
  }
  return found;
}"""
UNNAMED = """() => {
  const found = [];
  for (const svg of document.querySelectorAll("body svg")) {
    if (!svg.closest("[aria-hidden=true],[aria-label]")) found.push(svg.outerHTML.slice(0, 120));
  }
  for (const cell of document.querySelectorAll("thead th")) if (!cell.scope) found.push(cell.outerHTML);
  for (const button of document.querySelectorAll("button")) {
    if (!button.textContent.trim()) found.push(button.outerHTML);
  }
  const levels = [...document.querySelectorAll("h1,h2,h3,h4")].map((heading) => Number(heading.tagName[1]));
  levels.forEach((level, index) => { if (index && level > levels[index - 1] + 1) found.push(`heading ${index}`); });
  return found;
}"""


def chromium() -> str | None:
    """Return a browser of the system's, or the one of the variable; None leaves it to playwright."""
    names = (os.environ.get("STOCKFLOW_CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome")
    return next((path for name in names if name and (path := shutil.which(name))), None)


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright, as make test-browser does")
    with playwright.sync_playwright() as started:
        path = chromium()
        if path is None and not Path(started.chromium.executable_path).exists():
            pytest.skip("no chromium: apt-get install chromium, or playwright install chromium")
        # In containers the tests run as root, where chromium's sandbox does not start.
        sandbox = [] if os.geteuid() else ["--no-sandbox"]
        running = started.chromium.launch(executable_path=path, args=sandbox)
        yield running
        running.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    root = tmp_path_factory.mktemp("browser")
    runs.merge_here(write_varied_recipe(root, NUM_LAYERS), root / "out", shard_size=400_000)
    return stockflow.report(root / "out")


@pytest.fixture(scope="module")
def place(report: Report, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "report.html"
    report.save(str(path))
    return path.as_uri()


class Visit:
    """A page that was opened, and what it complained of or asked for."""

    def __init__(self, browser: "Browser", place: str, theme: Literal["light", "dark"], width: int) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=theme)
        self.page: Page = self.context.new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(place)


@pytest.fixture
def visit(browser: "Browser", place: str) -> Iterator[Visit]:
    opened = Visit(browser, place, "light", 1280)
    yield opened
    opened.context.close()


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_it_opens_without_complaint_and_fits(
    browser: "Browser", place: str, theme: Literal["light", "dark"], width: int
) -> None:
    visit = Visit(browser, place, theme, width)
    page = visit.page

    assert visit.complaints == []
    assert visit.requests == [place]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(TOO_FAINT) == []
    assert page.evaluate(UNNAMED) == []
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    expected = palette.tokens(theme)["ground"]
    assert ground == f"rgb({', '.join(str(int(expected[at : at + 2], 16)) for at in (1, 3, 5))})"
    visit.context.close()


def test_nothing_else_could_run_in_it(visit: Visit) -> None:
    visit.page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.ran = true\">')")
    visit.page.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), {text: 'window.ran = 1'}))"
    )
    visit.page.wait_for_timeout(200)

    assert visit.page.evaluate("window.ran") is None
    assert any("Content Security Policy" in complaint for complaint in visit.complaints)


def test_the_theme_is_the_readers_choice(visit: Visit) -> None:
    def ground() -> str:
        return str(visit.page.evaluate("getComputedStyle(document.body).backgroundColor"))

    light = ground()
    visit.page.get_by_role("button", name="Dark theme").press("Enter")
    dark = ground()

    assert dark != light
    visit.page.reload()
    assert ground() == dark
    visit.page.get_by_role("button", name="Light theme").click()
    assert ground() == light


def test_tables_are_sorted_by_click_and_by_keyboard(visit: Visit, report: Report) -> None:
    page = visit.page
    table = page.get_by_role("region", name="Tensors", exact=True)
    page.get_by_text(f"All {report.geometry.num_rows} tensors").click()
    button = table.get_by_role("button", name="t", exact=True)
    rows = {row.name: row.ratio for row in report.evidence.rows}

    def order() -> list[float | None]:
        names = table.locator("tbody tr td:first-child").all_text_contents()
        assert sorted(names) == sorted(rows)
        return [float(f"{rows[name]:.4f}") for name in names]

    button.click()
    falling = order()
    button.press("Enter")
    rising = order()

    assert falling == sorted(falling, key=lambda ratio: -(ratio or 0.0))
    assert rising == sorted(rising, key=lambda ratio: ratio or 0.0)
    assert table.locator("th[aria-sort]").evaluate_all("all => all.map((one) => one.ariaSort)") == ["ascending"]


def test_the_heatmap_is_read_by_keyboard_and_by_pointer(visit: Visit, report: Report) -> None:
    page = visit.page
    heatmap = page.locator(RATIO_MAP)
    readout = page.locator("figure", has=heatmap).locator(".readout")
    assert report.geometry.ratio_map
    line = report.geometry.ratio_map.lines[1]

    heatmap.focus()
    for key in ("ArrowDown", "ArrowRight", "ArrowRight", "ArrowRight"):
        page.keyboard.press(key)

    cell = line.cells[3]
    assert cell
    assert readout.text_content() == f"{line.part}, layer 3: t {cell.value:.3f}"
    page.keyboard.press("End")
    last = line.cells[-1]
    assert last
    assert readout.text_content() == f"{line.part}, layer {NUM_LAYERS - 1}: t {last.value:.3f}"
    page.keyboard.press("Escape")
    assert readout.text_content() == ""
    heatmap.locator("td.clamped").first.hover()
    assert (readout.text_content() or "").endswith(", clamped")


def test_every_chart_is_reached_by_tab_and_reads_out(visit: Visit) -> None:
    charts = visit.page.locator("[data-chart]")

    assert charts.count() == 6
    for chart in charts.all():
        assert chart.get_attribute("tabindex") == "0"
        assert chart.get_attribute("aria-label")
        chart.focus()
        visit.page.keyboard.press("ArrowRight")
        readout = chart.locator("xpath=ancestor::figure").locator(".readout")
        assert readout.get_attribute("aria-live") == "polite"
        assert readout.text_content()


def test_it_is_read_without_scripts(browser: "Browser", place: str, report: Report) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(place)

    shown = page.locator(f"{RATIO_MAP} td").first.text_content()

    assert report.geometry.ratio_map
    first = report.geometry.ratio_map.lines[0].cells[0]
    assert first
    assert shown == f"{first.value:.2f}"
    assert page.get_by_role("button").count() == 0
    context.close()


def test_the_same_records_give_the_same_page(report: Report) -> None:
    assert report.html() == Report(report.evidence, report.storage).html()
