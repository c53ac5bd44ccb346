"""The report, opened in a real browser."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser

from browsing import BROKEN_IMAGES, NAMES, encoded, opened, text_of
from cluster import storage
from models.judging import calibration, compare, confusion
from pipeline.data.rejects import Reject
from pipeline.evaluation import Measured
from pipeline.recipe.sections import Report
from pipeline.report import text
from pipeline.report.charts import MANY_CLASSES
from pipeline.report.gallery import ClassCount, ClassRow, RankedImage, contact_strip, figure_ranks, thumbnail
from pipeline.report.judgment import CHARTED, PAIRS, Judged, Judgment, Tile
from pipeline.report.page import (
    Accuracy,
    Conservation,
    Curve,
    ModelFacts,
    ReportContent,
    StageRow,
    Trial,
    write_report,
)

COLORS = [(200, 30, 30), (30, 160, 30), (30, 30, 200), (200, 160, 30), (30, 160, 160)]


def strip(folder: Path, images: list[bytes]) -> tuple[str, list[bool]]:
    """A published contact strip, and which of its images it shows."""
    tiles = [thumbnail(image) for image in images]
    storage.publish(str(folder / "strip.jpg"), contact_strip(tiles))
    return str(folder / "strip.jpg"), [tile is not None for tile in tiles]


def judgment(names: list[str], images: int, tiles: list[Tile] = [], uri: str = "") -> Judgment:  # noqa: B006
    """Two models on images of all classes; the first has three of four right, and the others are taken for the next class."""
    labels = np.arange(images) % len(names)
    right, other = np.arange(images) // len(names) % 4 > 0, np.arange(images) // len(names) % 5 > 0
    predicted = np.where(right, labels, (labels + 1) % len(names))
    scores = np.linspace(0.3, 1.0, images)
    support = tuple(np.bincount(labels, minlength=len(names)).tolist())
    recall = tuple((np.bincount(labels[right], minlength=len(names)) / support).tolist())
    measured = Measured(images, float(right.mean()), 0.9, 0.5, (0.71, 0.79), 0.1, recall, recall, support)
    models = [
        Judged(name, measured, calibration(scores, some)) for name, some in (("student", right), ("baseline", other))
    ]
    return Judgment(names, models, confusion(labels, predicted), compare(right, other), tiles, uri)


def hostile_content(folder: Path) -> ReportContent:
    images = [encoded(color) for color in COLORS]
    images[3] = BROKEN_IMAGES["svg"]
    uri, shown = strip(folder, images)
    ranked = [
        RankedImage(rank, 1 - rank / 1000, NAMES[1], rank, there)
        for rank, there in zip([0, 1, 2, 57, 99], shown, strict=True)
    ]
    history: list[dict[str, float | None]] = [
        {"images_seen": 100, "learning_rate": 0.1, "loss": 2.0, "top1": 0.2, "val_top1": None},
        {"images_seen": 200, "learning_rate": 0.05, "loss": float("nan"), "top1": 0.4, "val_top1": 0.35},
    ]
    return ReportContent(
        run=NAMES[0],
        recipe_yaml="name: </pre><script>window.pwned=1</script>\nk: 100\n",
        created="2026-01-01 12:00 UTC",
        teacher=ModelFacts(NAMES[1], 25_557_032),
        student=ModelFacts("resnet18", 11_689_512),
        teacher_accuracy=Accuracy(0.901, 0.99),
        pretrained=Accuracy(0.8299, 0.97),
        fine_tuned=Accuracy(0.8812, 0.98, (0.861, 0.9009)),
        supervised=Accuracy(0.839, 0.975),
        test_images=1000,
        judgment=judgment(
            NAMES, 960, [Tile(NAMES[i], i, i + 1, 0.99 - i / 100, there) for i, there in enumerate(shown)], uri
        ),
        conservation=Conservation(
            listed=3900, scored=3897, rejected=3, candidates=7794, selected=1100, unselected=6693
        ),
        rejects_by_reason={NAMES[1]: 1, "truncated": 2},
        reject_examples=[Reject(NAMES[2], 7, "truncated", NAMES[0])],
        images_per_class=100,
        classes=[ClassCount(i, name, 100 if i else 0, 0.5 if i else None) for i, name in enumerate(NAMES)],
        rows=[ClassRow(i, name, 100, uri, ranked) for i, name in enumerate(NAMES)],
        curves=[Curve(NAMES[1], history)],
        sweep=[Trial(0.001, 0.861), Trial(0.003, 0.881, chosen=True), Trial(0.01, float("nan"))],
        stages=[StageRow(NAMES[2], "done", 61.2, 120_000), StageRow("finetune", NAMES[1])],
        environment={NAMES[0]: NAMES[1]},
    )


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("run")
    return write_report(str(folder / "report"), hostile_content(folder))


def test_hostile_names_make_no_elements(hostile: str) -> None:
    text = text_of(hostile)
    for name in NAMES[:7]:
        assert name in text
    assert "88.1%" in text


def test_sections_and_figures(browser: Browser, hostile: str) -> None:
    with opened(browser, hostile) as page:
        titles = page.locator("h2").all_inner_texts()
        assert titles == [
            *(
                "Result",
                "Classes and mistakes",
                "Images accounted for",
                "D̂ per class",
                "Ranked images",
                "Training",
                "Sweep",
            ),
            *("Stages", "Environment", "Recipe"),
        ]
        links = page.locator("nav a").evaluate_all(
            "all => all.map(a => document.querySelector(a.getAttribute('href')) !== null)"
        )
        assert links == [True] * len(titles)
        rows = [
            [cell.strip() for cell in row.split("\t")] for row in page.locator("#result tbody tr").all_inner_texts()
        ]
        assert rows == [
            ["Student, pre-trained", "D̂", "83.0%", "97.0%", "\u22120.9"],
            ["Student, fine-tuned", "D̂, then D", "88.1% (86.1\u201390.1)", "98.0%", "+4.2"],
            ["Student, fully supervised", "D", "83.9%", "97.5%", "\u2013"],
            ["Teacher", "D", "90.1%", "99.0%", "\u2013"],
        ]
        result = page.locator("#result").inner_text()
        assert "25.6M parameters" in result
        assert "1,000 images; in parentheses, the 95% interval of top-1" in result
        verdicts = page.locator(".verdict").all_inner_texts()
        assert verdicts == ["✓ holds", "✗ off by 1"]  # the second sum of this content is wrong on purpose
        assert "1 class is short of K" in page.locator("#classes").inner_text()
        drawn = page.locator("[data-figure]").evaluate_all(
            "all => all.map(p => [p.dataset.figure, p.querySelectorAll('.trace').length])"
        )
        assert drawn == [
            ["recall", 2],
            ["calibration", 3],
            ["counts", 2],
            ["lowest", 1],
            ["loss-0", 1],
            ["accuracy-0", 2],
            ["rate-0", 1],
            ["sweep", 2],
        ]
        stage = page.locator("#stages tbody tr").first.inner_text()
        assert "1 min 01 s" in stage
        assert "1,961" in stage


def test_hostile_names_are_shown_as_text(browser: Browser, hostile: str) -> None:
    with opened(browser, hostile) as page:
        shown = page.locator(".class-row h3 bdi").all_text_contents()
        assert shown[:7] == NAMES[:7]
        assert shown[7:] == ["photo\\u202egpj.exe", "line\\nbreak\\x00nul", "\\udcff lost byte", "نمر", "plain"]
        assert page.locator("h1").inner_text() == NAMES[0]
        assert page.locator("#training h3").inner_text() == NAMES[1]
        assert page.locator("#environment dd").inner_text() == NAMES[1]
        assert "</pre><script>window.pwned=1</script>" in (page.locator("#recipe code").text_content() or "")
        assert text.short(NAMES[1], 32) in (page.locator(".class-row .tile").first.get_attribute("title") or "")
        assert page.locator("img:not(.tile), main script, main a, b:text-is('bold')").count() == 0


def test_hostile_names_in_charts(browser: Browser, hostile: str) -> None:
    with opened(browser, hostile) as page:
        chart = page.locator("[data-figure=counts]")
        ticks = chart.locator(".xtick text").all_text_contents()
        assert ticks[4:7] == ["<b>bold</b>", "&lt;i&gt;", "{{ 7 * 7 }} %{x}"]
        assert ticks[0] == text.short(NAMES[0], 16)
        assert chart.locator("a, image, tspan[style*=bold]").count() == 0
        chart.scroll_into_view_if_needed()
        bars = chart.locator(".bars .point path")
        for bar, name in ((1, NAMES[2]), (2, NAMES[3]), (3, NAMES[4])):  # the bars of the classes that have K images
            box = bars.nth(bar).bounding_box()
            assert box is not None
            page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
            page.wait_for_function(
                "name => document.querySelector('.hovertext text.nums')?.textContent.includes(name)", arg=name
            )


def test_the_evaluation_class_by_class(browser: Browser, hostile: str) -> None:
    with opened(browser, hostile) as page:
        section = page.locator("#judgment")
        text_shown = section.inner_text()
        assert "Student on 960 test images: 75.0% right (95% interval 71.0\u201379.0)" in text_shown
        assert "Against the baseline: \u22125.0 points (95% interval " in text_shown
        assert "within the noise" not in text_shown
        cells = section.locator(".matrix tbody td").all_inner_texts()
        counts = [int(cell.replace(",", "") or 0) for cell in cells]
        assert (len(counts), sum(counts)) == (144, 960)  # every test image is in one cell
        assert counts[0] + counts[1] == 80
        assert [cell.strip() for cell in cells if cell.strip()] == ["60", "20"] * 11 + ["20", "60"]
        section.locator("summary").click()
        first = section.locator("details tbody tr").first.locator("td, th").all_inner_texts()
        assert first == [NAMES[0], text.short(NAMES[1], 40), "20", "80"]
        captions = section.locator(".mistakes .caption").all_inner_texts()
        assert len(captions) == len(COLORS)
        assert text.short(NAMES[4], 24) in captions[4]
        assert "0.950" in captions[4]
        assert section.locator(".mistakes .tile").nth(3).inner_text().split() == ["not", "shown"]
        assert section.locator("script, a, b b, [onerror]").count() == 0


def test_policy_stops_what_escaping_might_miss(browser: Browser, hostile: str) -> None:
    page = browser.new_page()
    page.goto(f"file://{hostile}")
    page.evaluate(
        "document.addEventListener('securitypolicyviolation', e => (window.stopped ??= []).push(e.effectiveDirective))"
    )
    for attack in (
        "const s = document.createElement('script'); s.textContent = 'window.pwned = 1'; document.body.append(s)",
        "document.body.insertAdjacentHTML('beforeend', `<img src=x onerror='window.pwned=1'>`)",
        "document.body.insertAdjacentHTML('beforeend', `<img src='http://127.0.0.1:9/'>`)",
        "document.body.insertAdjacentHTML('beforeend', `<iframe src='http://127.0.0.1:9/'></iframe>`)",
        "fetch('http://127.0.0.1:9/').catch(() => null)",
    ):
        page.evaluate(f"() => {{ {attack} }}")
    page.wait_for_function("window.stopped?.length >= 5", timeout=5_000)
    stopped = sorted(page.evaluate("window.stopped"))
    assert stopped == ["connect-src", "frame-src", "img-src", "script-src-attr", "script-src-elem"]
    assert page.evaluate("window.pwned") is None
    page.close()


def test_tiles_show_their_own_image(browser: Browser, hostile: str) -> None:
    with opened(browser, hostile) as page:
        row = page.locator(".class-row").nth(11)
        row.scroll_into_view_if_needed()
        row.locator("img").evaluate_all("all => Promise.all(all.map(image => image.decode()))")
        tiles = row.locator(".tile")
        assert tiles.count() == len(COLORS)
        for column, color in enumerate(COLORS):
            if column == 3:
                assert tiles.nth(column).inner_text().split() == ["not", "shown"]
                continue
            pixels = Image.open(io.BytesIO(tiles.nth(column).screenshot())).convert("RGB")
            for x in (6, pixels.width // 2, pixels.width - 6):
                seen = pixels.getpixel((x, pixels.height // 2))
                assert isinstance(seen, tuple)
                assert max(abs(a - b) for a, b in zip(seen, color, strict=True)) < 12
        captions = [caption.split() for caption in row.locator(".caption").all_inner_texts()]
        assert captions == [["0", "1.000"], ["1", "0.999"], ["2", "0.998"], ["57", "0.943"], ["99", "0.901"]]
        assert row.locator("li").evaluate_all("all => all.map(li => li.className)") == ["", "", "", "jump", ""]


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light")])
def test_layout(browser: Browser, hostile: str, width: int, scheme: str) -> None:
    with opened(browser, hostile, width, scheme) as page:
        assert page.evaluate("document.documentElement.scrollWidth") == width
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).every(c => c < 60)")
        assert dark == (scheme == "dark")
        unnamed = page.locator(
            "img:not([alt]), [role=img]:not([aria-label]), [role=region]:not([aria-label]), th:not([scope])"
        )
        assert unnamed.count() == 0
        assert page.locator("header, main, nav[aria-label], footer").count() == 4


def test_a_run_that_has_only_begun(browser: Browser, tmp_path: Path) -> None:
    uri = write_report(str(tmp_path / "report"), ReportContent(run="begun", recipe_yaml="seed: 0\n"))
    with opened(browser, uri) as page:
        assert page.locator("h2").all_inner_texts() == ["Recipe"]
    teacher = ReportContent(
        run="begun", recipe_yaml="", teacher_accuracy=Accuracy(0.5), classes=[ClassCount(0, "a", 0, None)]
    )
    uri = write_report(str(tmp_path / "report"), teacher)
    with opened(browser, uri) as page:
        assert page.locator("h2").all_inner_texts() == ["Result", "D̂ per class"]
        assert page.locator("#result dd").all_inner_texts()[3] == "50.0%"


@pytest.mark.parametrize("name", ["plain", NAMES[0], "photo\u202e" * 20, "\"&'" * 40, "\U0001f600" * 60])
def test_many_classes(name: str, browser: Browser, tmp_path: Path) -> None:
    """A thousand classes, with rows of the usual number of them: the page stays small, whatever they are called."""
    uri, _ = strip(tmp_path, [encoded((10, 20, 30))] * 16)
    images = [RankedImage(rank, 0.9, f"{name * 3}.tar", 123456, True) for rank in figure_ranks(1600, 6, 10)]
    names = [f"{i} {name}" for i in range(1000)]
    tiles = [Tile(f"{name * 3}/{i}.png", i, i + 1, 0.9, True) for i in range(16)]
    content = ReportContent(
        run="wide",
        judgment=judgment(names, 8000, tiles, uri),
        recipe_yaml="",
        images_per_class=1600,
        classes=[ClassCount(i, f"{i} {name}", 1600 if i % 9 else i, 0.1 + i / 7000) for i in range(1000)],
        rows=[ClassRow(i, f"{i} {name}", 1600, uri, images) for i in figure_ranks(1000, 0, Report().classes)],
        gallery="../gallery/index.html",
    )
    index = write_report(str(tmp_path / "report"), content)
    assert Path(index).stat().st_size < 225_000
    if name not in ("plain", NAMES[0]):
        return
    with opened(browser, index) as page:
        assert page.locator(".class-row").count() == 10
        assert "Shown: 10 of 1,000 classes" in page.locator("#images").inner_text()
        assert page.locator("#images a").get_attribute("href") == "../gallery/index.html"
        assert page.locator("#classes tbody tr").count() == MANY_CLASSES
        assert page.locator("#judgment tbody tr").count() == PAIRS
        assert page.locator("[data-figure=recall] .bars .point").count() == CHARTED
        assert page.locator("[data-figure=counts] .bars .point").count() == 1000
    assert len(list((tmp_path / "report" / "assets").glob("*.jpg"))) == 11


def test_on_an_object_store(s3: str, tmp_path: Path) -> None:
    out = storage.join(s3, "report")
    content = hostile_content(tmp_path)
    content = replace(content, rows=content.rows[:2])
    assert write_report(out, content) == storage.join(out, "index.html")
    files = [entry.path for entry in storage.list_files(out)]
    assert [path for path in files if "plotly" not in path] == [
        *("assets/class-00000.jpg", "assets/class-00001.jpg", "assets/mistakes.jpg"),
        *("assets/report.css", "assets/report.js"),
        "index.html",
    ]
    assert storage.read_bytes(storage.join(out, "index.html")).startswith(b"<!doctype html>")


def test_plotly_is_published_once(tmp_path: Path) -> None:
    content = ReportContent(run="a", recipe_yaml="")
    write_report(str(tmp_path), content)
    (plotly,) = (tmp_path / "assets").glob("plotly-*.min.js")
    before = plotly.stat().st_mtime_ns
    write_report(str(tmp_path), replace(content, run="b"))
    assert plotly.stat().st_mtime_ns == before
    assert "<bdi>b</bdi>" in (tmp_path / "index.html").read_text()


@pytest.mark.parametrize(
    ("got", "expected"),
    [
        (text.percent(0.8814), "88.1%"),
        (text.percent(float("nan")), "\u2013"),
        (text.points(0.0421), "+4.2"),
        (text.points(-0.012), "\u22121.2"),
        (text.points(-0.0001), "+0.0"),
        (text.duration(4.21), "4.2 s"),
        (text.duration(59.97), "1 min 00 s"),
        (text.duration(18_120), "5 h 02 min"),
        (text.parameters(25_557_032), "25.6M"),
        (text.parameters(78_042), "78.0k"),
        (text.score(-3.5, 2), "\u22123.50"),
        (text.thousands(12_345), "12,345"),
        (text.short("a" * 70 + "b" * 70, 11), "aaaaa…bbbbb"),
    ],
)
def test_text(got: str, expected: str) -> None:
    assert got == expected
