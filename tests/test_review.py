"""The review of near-duplicates in a real browser, and the decisions that it saves."""

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from playwright.sync_api import Browser

from browsing import BROKEN_IMAGES, NAMES, encoded, opened, text_of
from cluster.errors import InputError
from pipeline.data.reader import Reader
from pipeline.data.shards import Shard
from pipeline.data.sources import ImageSource
from pipeline.duplicates.nearest import PAIRS
from pipeline.duplicates.review import TILE, Review, decided, read_decisions, write_review


def review_of(count: int, names: Sequence[str], source: ImageSource, sets: dict[str, ImageSource]) -> Review:
    label = next(iter(sets))
    shard = next(iter(sets[label].shards())).name
    pairs = pa.table(
        {
            "rank": np.arange(count, dtype=np.int32),
            "distance": (np.arange(count) / count).astype(np.float32),
            "shard": [names[n % len(names)] for n in range(count)],
            "index": np.arange(count, dtype=np.uint32) // len(names),
            "labeled_set": [label] * count,
            "labeled_shard": [shard] * count,
            "labeled_index": np.arange(count, dtype=np.uint32) % 3,
        },
        schema=PAIRS,
    )
    return Review(pairs, np.arange(count) < 7, "0123456789abcdef", source, sets)


def virtual(root: Path, names: Sequence[str], files: Sequence[bytes]) -> ImageSource:
    """Shards of hostile names; each holds the same images, in files of these names."""
    shards = []
    for name in names:
        paths = tuple(f"{name.replace(chr(0), '')} {number}.png" for number in range(len(files)))
        for path, data in zip(paths, files, strict=True):
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(data)
        shards.append(Shard(name, 1, "", paths))
    return ImageSource(Reader(str(root), "folder"), tuple(shards))


PLAIN_NAMES = [name for name in NAMES if "\udcff" not in name]


@pytest.fixture(scope="module")
def hostile_review(tmp_path_factory: pytest.TempPathFactory, ray_local: None) -> str:
    root = tmp_path_factory.mktemp("review")
    colors = [encoded((200, 30, 30)), encoded((30, 160, 30), size=(10, 200)), *BROKEN_IMAGES.values()]
    source = virtual(root / "u", PLAIN_NAMES, colors)
    labeled = virtual(root / "labeled", [NAMES[2]], [encoded((30, 30, 200)), encoded((1, 2, 3)), b"x"])
    return write_review(str(root / "page"), review_of(len(PLAIN_NAMES) * 9, PLAIN_NAMES, source, {NAMES[1]: labeled}))


def test_hostile_names_make_no_elements(hostile_review: str) -> None:
    text = text_of(hostile_review)
    data = json.loads(text[text.index('{"finding"') :])
    names = [name for name, _ in data["names"]]
    assert set(names) == {*PLAIN_NAMES, NAMES[1], NAMES[2]}
    assert len(data["pairs"]) == len(PLAIN_NAMES) * 9
    distance, proposed, (name, index, file, own), (labeled, other, *_), labeled_set = data["pairs"][0]
    assert (distance, proposed, names[name], index, file) == (0, 1, PLAIN_NAMES[0], 0, "u-00000.jpg")
    assert own == f"{PLAIN_NAMES[0]} 0.png"
    assert (names[labeled], other, names[labeled_set]) == (NAMES[2], 0, NAMES[1])


def test_hostile_names_and_images_in_the_review(browser: Browser, hostile_review: str) -> None:
    with opened(browser, hostile_review) as page:
        cards = page.locator(".pair")
        assert cards.count() == 50
        names = cards.locator("figure:first-child bdi").all_text_contents()
        assert names[:7] == [f"{name} 0.png" for name in PLAIN_NAMES[:7]]
        assert "photo\\u202egpj.exe 0.png" in names
        assert cards.first.locator("figure:last-child b").text_content() == NAMES[1]
        assert cards.first.locator("figure:last-child bdi").text_content() == f"{NAMES[2]} 0.png"
        assert page.locator("img:not(.picture img), main script, main a, main b b").count() == 0
        images = cards.first.locator("img")
        images.evaluate_all("all => Promise.all(all.map(image => image.decode()))")
        assert images.evaluate_all("all => all.map(i => [i.naturalWidth, i.naturalHeight])") == [[TILE, 96], [TILE, 96]]
        tall = cards.nth(len(PLAIN_NAMES)).locator("figure:first-child img")  # its image is ten pixels wide
        tall.scroll_into_view_if_needed()
        assert tall.evaluate("async i => { await i.decode(); return [i.naturalWidth, i.naturalHeight]; }") == [6, TILE]
        broken = cards.nth(2 * len(PLAIN_NAMES)).locator("figure:first-child")
        assert broken.locator("[role=img]").inner_text() == "not shown"
        assert (
            cards.nth(2).locator("figure:last-child [role=img]").count() == 1
        )  # the third labeled image is broken too


def test_the_review_has_a_policy(browser: Browser, hostile_review: str) -> None:
    page = browser.new_page()
    page.goto(f"file://{hostile_review}")
    page.evaluate(
        "document.addEventListener('securitypolicyviolation', e => (window.stopped ??= []).push(e.effectiveDirective))"
    )
    page.evaluate("() => document.body.insertAdjacentHTML('beforeend', `<img src=x onerror='window.pwned=1'>`)")
    page.evaluate("() => { fetch('http://127.0.0.1:9/').catch(() => null) }")
    page.evaluate("() => document.body.insertAdjacentHTML('beforeend', `<p style='color:red'>`)")
    page.wait_for_function("window.stopped?.length >= 3", timeout=5_000)
    assert set(page.evaluate("window.stopped")) == {"connect-src", "script-src-attr", "style-src-attr"}
    assert page.evaluate("window.pwned") is None
    page.close()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light")])
def test_layout_of_the_review(browser: Browser, hostile_review: str, width: int, scheme: str) -> None:
    with opened(browser, hostile_review, width, scheme) as page:
        assert page.evaluate("document.documentElement.scrollWidth") == width
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).every(c => c < 60)")
        assert dark == (scheme == "dark")
        assert page.locator("img:not([alt]), [role=img]:not([aria-label]), button:empty").count() == 0


def test_five_thousand_pairs_stay_usable(browser: Browser, tmp_path: Path, ray_local: None) -> None:
    names = [f"shards/{n:05d}.tar" for n in range(50)]
    source = virtual(tmp_path / "u", names, [encoded((200, 30, 30), size=(8, 8))] * 100)
    labeled = virtual(tmp_path / "labeled", ["val.tar"], [encoded((n, 0, 0)) for n in range(3)])
    index = write_review(str(tmp_path / "page"), review_of(5000, names, source, {"validation": labeled}))
    assert os.path.getsize(index) < 600_000
    with opened(browser, index) as page:
        assert page.locator("#pages").inner_text() == "100"
        began = time.monotonic()
        for _ in range(10):
            page.locator("#next").click()
        page.locator("#page").fill("100")
        page.locator("#page").press("Enter")
        assert page.locator(".pair").last.locator("b").first.inner_text() == "#4999"
        assert time.monotonic() - began < 10
        assert page.locator(".pair").count() == 50
        assert page.locator("#next").is_disabled()
        page.locator(".pair").last.locator("button").click()
        assert page.locator("#marked").inner_text() == "5,000"
        page.locator("#reset").click()
        assert page.locator("#marked").inner_text() == "7"


def test_no_pairs(browser: Browser, tmp_path: Path, ray_local: None) -> None:
    review = Review(PAIRS.empty_table(), np.zeros(0, bool), "0" * 16, ImageSource(Reader("/nowhere", "folder"), ()), {})
    with opened(browser, write_review(str(tmp_path), review)) as page:
        assert "No pair was found" in page.locator("main").inner_text()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"not json", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[]", "is no decision file"),
        (
            b'{"format": "other", "finding": "0123456789abcdef", "remove": [], "keep": []}',
            "is no decision file: format",
        ),
        ({"finding": "x"}, "is no decision file: finding"),
        ({"remove": [["a.tar"]]}, "is no decision file: remove.0"),
        ({"remove": [["a.tar", -1]]}, "is no decision file: remove.0.1"),
        ({"remove": [["a.tar", 1.5]]}, "is no decision file: remove.0.1"),
        ({"remove": [["a.tar", 2**32]]}, "is no decision file: remove.0.1"),
        ({"remove": [[7, 1]]}, "is no decision file: remove.0.0"),
        ({"extra": 1}, "is no decision file: extra"),
        ({"finding": "fedcba9876543210"}, "was made on other pairs"),
        ({"remove": [["<b>\n\x1b[31m", 0]]}, "names an image that is in no pair"),
        ({"keep": [["a.tar", 0]], "remove": [["a.tar", 0]]}, "names an image twice"),
    ],
)
def test_a_wrong_decision_file_is_one_line(content: Any, said: str, tmp_path: Path) -> None:
    file = tmp_path / "decisions.json"
    plain: dict[str, Any] = {
        "format": "tophat.duplicates.decisions/1",
        "finding": "0123456789abcdef",
        "remove": [],
        "keep": [],
    }
    file.write_bytes(content if isinstance(content, bytes) else json.dumps(plain | content).encode())
    pairs = pa.table({"shard": ["a.tar", "a.tar"], "index": pa.array([0, 1], pa.uint32())})
    with pytest.raises(InputError) as error:
        decided(
            "--decisions",
            str(file),
            read_decisions("--decisions", str(file)),
            pairs,
            plain["finding"],
            np.ones(2, bool),
        )
    message = str(error.value)
    assert said in message
    assert message.isprintable()
    assert message.startswith("--decisions = ")
    assert len(message) < 1000


def test_decisions_override_what_is_proposed(tmp_path: Path) -> None:
    file = tmp_path / "decisions.json"
    file.write_text(
        json.dumps(
            {
                "format": "tophat.duplicates.decisions/1",
                "finding": "0123456789abcdef",
                "remove": [["é\u0000", 4294967295]],
                "keep": [["a", 0]],
            }
        )
    )
    pairs = pa.table({"shard": ["a", "a", "é\0"], "index": pa.array([0, 1, 2**32 - 1], pa.uint32())})
    read = read_decisions("--decisions", str(file))
    out = decided("--decisions", str(file), read, pairs, "0123456789abcdef", np.array([True, True, False]))
    assert out.tolist() == [False, True, True]
