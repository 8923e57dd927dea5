r"""Tests for sda_ray.report.page: the report as a file, and in a browser without a network."""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from studies import no_sync  # noqa: F401
from sweeping import make_sweep

from sda_ray import choice, loguniform
from sda_ray.cli.main import main
from sda_ray.cli.results import report_end
from sda_ray.core.lease import Lease
from sda_ray.report.findings import read_findings
from sda_ray.report.page import write_report
from sda_ray.search.promotion import rank_key

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
OPTIONS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
]
FIGURES = ("History", "Learning curves", "May the rungs be trusted?", "What mattered", "Timeline")


class Rows(HTMLParser):
    r"""The rows of the table of runs: the keys of their cells."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: dict[int, list[str]] = {}
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)

        if tag == "tr" and (run := found.get("data-run")):
            self.rows[int(run)] = []
        elif tag == "td" and "data-key" in found:
            list(self.rows.values())[-1].append(found["data-key"] or "")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("report") / "runs"
    make_sweep(runs, "width", 60, ends={3: "diverged", 5: "failed"}, min_epochs=4, finalists=12)
    make_sweep(runs, "depth", 12)

    return runs


@pytest.fixture(scope="module")
def page(runs: Path) -> Path:
    return write_report(runs, ["width"])


def specs(page: Path) -> list[list[dict[str, Any]]]:
    found = re.search(r'<script id="specs"[^>]*>(.*?)</script>', page.read_text(), re.S)
    assert found is not None
    groups: list[list[dict[str, Any]]] = json.loads(found[1])

    return groups


def test_numbers_are_those_of_the_study(runs: Path, page: Path) -> None:
    findings = read_findings(runs, "width")
    rows = Rows(page.read_text()).rows
    records = sorted((t.record for t in findings.trials), key=rank_key)
    assert list(rows) == [r.index for r in records]

    for record in records:
        cells = rows[record.index]
        assert float(cells[3]) == record.last
        assert float(cells[4]) == record.values[record.last]
        assert float(cells[7]) == record.config["learning_rate"]
        assert cells[9] == record.config["activation"]

    figures = {spec["title"]: spec for spec in specs(page)[0]}
    assert {*FIGURES} <= {*figures}
    steps, points, _ = figures["History"]["data"]
    assert sorted(points["y"]) == sorted(t.record.value or 0 for t in findings.complete)
    assert steps["y"][-1] == records[0].values[30]
    curves = figures["Learning curves"]["data"]
    assert len(curves) == sum(r.state != "diverged" for r in records)
    assert sum(map(len, (curve["x"] for curve in curves))) == sum(
        r.last for r in records if r.state != "diverged"
    )
    bars = figures["Timeline"]["data"]
    assert sum(len(bar["x"]) for bar in bars) == sum(len(t.attempts) for t in findings.trials)
    assert sum(figures["Cost"]["data"][0]["y"]) == findings.spent
    shares = dict(zip(*(figures["What mattered"]["data"][0][k] for k in "yx"), strict=True))
    assert shares == {name: share for name, (share, *_) in findings.shares.items()}


def test_a_report_can_be_mailed(page: Path) -> None:
    text = page.read_text()

    assert page.stat().st_size < 3_000_000
    assert not re.findall(r'(?:src|href)="(?!data:|#|\.\./\.\./crimson-cloud)', text)
    assert page.stat().st_mode & 0o777 == 0o644


def test_texts_of_others_stay_texts(tmp_path: Path) -> None:
    bad = "</script><script>document.title='bad'</script><img src=x onerror=\"document.title='bad'\">"
    space = {"learning_rate": loguniform(1e-4, 1e-2), "activation": choice("SiLU", "GELU")}
    make_sweep(tmp_path, "width", 4, space, ends={1: "failed"})
    journal = tmp_path / "sweeps" / "width" / "study.journal"
    journal.write_text(journal.read_text().replace("it failed & <ended>", json.dumps(bad)[1:-1]))
    record = tmp_path / "sweeps" / "width" / "sweep.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"code": bad}))
    text = write_report(tmp_path, ["width"]).read_text()

    assert "document.title=" in text
    assert "<script>document" not in text
    assert "<img src=x" not in text


def test_one_report_compares_sweeps_and_is_written_where_it_is_wanted(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "both.html"
    main(argv=["report", "width", "depth", f"--output={file}", f"--runs={runs}"])
    groups = specs(file)

    assert capsys.readouterr().out.splitlines()[-1].endswith("both.html")
    assert len(groups) == 3
    assert [trace["name"] for trace in groups[2][0]["data"]] == ["width", "depth"]

    for words, why in (
        (["nothing"], "no sweep 'nothing'"),
        (["width", "--output=report.pdf"], "must end with .html"),
        (["width", f"--output={tmp_path}/none/a.html"], "a directory that exists"),
    ):
        with pytest.raises(SystemExit) as end:
            main(argv=["report", *words, f"--runs={runs}"])

        assert end.value.code == 2
        assert why in capsys.readouterr().err


def test_report_at_the_end_is_written_under_the_lease_or_not_at_all(tmp_path: Path) -> None:
    make_sweep(tmp_path, "width", 4)
    directory = tmp_path / "sweeps" / "width"
    lease = Lease(directory / "lease.json", "sweep 'width'")
    assert report_end(tmp_path, "width", lease.hold).endswith("report.html")
    before = (directory / "report.html").stat()

    lease.release()  # as another driver's takeover would
    assert report_end(tmp_path, "width", lease.hold) == ""
    assert (directory / "report.html").stat() == before

    (directory / "study.journal").write_text("nonsense\n")
    assert report_end(tmp_path, "width", nullcontext).startswith("\nNo report: ")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield browser
        browser.close()


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")
@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 390)])
def test_report_works_in_a_browser_without_a_network(
    page: Path, browser: Any, scheme: str, width: int
) -> None:
    errors: list[str] = []
    view = {"width": width, "height": 800}
    tab = browser.new_page(viewport=view, color_scheme=scheme, offline=True)
    tab.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.goto(page.as_uri())
    tab.wait_for_selector("html[data-drawn]", timeout=60_000)

    def texts(selector: str) -> list[str]:
        found: list[str] = tab.locator(selector).all_inner_texts()
        return found

    def shown() -> list[str]:
        return texts("table.runs tbody tr:not([hidden]) td:first-child")

    # All figures, in the colours of the theme, and nothing wider than the screen
    titles = [spec["title"] for spec in specs(page)[0]]
    assert texts("figure:has(.chart) h3") == titles
    assert tab.locator(".chart .main-svg").count() >= len(titles)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    ink = {"light": "rgb(27, 31, 36)", "dark": "rgb(228, 232, 236)"}[scheme]
    assert ink in tab.locator(".chart .xtick text").first.get_attribute("style")

    # Sorting, either way; one more run than wanted, since one failed
    head = tab.locator("table.runs th button", has_text="#")
    head.click()
    assert shown() == [str(i) for i in range(1, 62)]
    head.click()
    assert shown() == [str(i) for i in range(61, 0, -1)]

    # Filtering
    tab.locator("input[type=search]").fill("complete SiLU")
    left = texts("table.runs tbody tr:not([hidden])")
    assert left and all("complete" in row and "SiLU" in row for row in left)
    assert texts(".count") == [f"{len(left)} of 61 runs"]
    tab.locator("input[type=search]").fill("")

    # Brushing: the runs between two learning rates
    number = titles.index("Parallel coordinates")
    chosen = tab.evaluate(
        """async (number) => {
            const plot = document.querySelectorAll(".chart")[number];
            const dimensions = plot.data[0].dimensions;
            const i = dimensions.findIndex((d) => d.label === "learning_rate");
            const values = [...dimensions[i].values].sort((a, b) => a - b);
            await Plotly.restyle(plot, {[`dimensions[${i}].constraintrange`]: [[values[0], values[9]]]});
            return values.length;
        }""",
        number,
    )
    assert chosen == 59  # without the one that diverged and the one that failed
    rows, drawn = Rows(page.read_text()).rows, specs(page)[0][number]["runs"]
    lowest = sorted(drawn, key=lambda run: float(rows[run][7]))[:10]
    assert {*shown()} == {*map(str, lowest)}
    assert errors == []
    tab.close()
