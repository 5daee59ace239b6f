"""Every page in a real browser: nothing overflows, no message, no request, every figure visible and readable."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import page_data
import pytest

from dpo_cli.examination.page import page as examination_page
from dpo_cli.pages.pages import comparison_page, evaluation_page, run_page

sync_api = pytest.importorskip("playwright.sync_api")

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
)  # fmt: skip
LONG = "a-very-long-name-without-any-space-" * 6
LOOK = """() => ({
  inner: innerWidth, wide: document.scrollingElement.scrollWidth,
  figures: [...document.querySelectorAll('svg')].map(svg => {
    const box = svg.getBoundingClientRect()
    return [box.width, box.height, Math.min(...[...svg.querySelectorAll('text')].map(
      text => parseFloat(getComputedStyle(text).fontSize) * box.width / svg.viewBox.baseVal.width))]
  }),
  folded: [...document.querySelectorAll('details > :not(summary)')].map(part => part.checkVisibility()),
})"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = os.environ.get("DPO_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is there; make browser installs one, or set DPO_CHROMIUM")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found, args=list(FLAGS))
        yield started
        started.close()


def evaluation() -> str:
    pairs = page_data.pairs(200, (LONG, "日本語", "😀", "$x^2$"))
    answers = [*page_data.answers(2), {"prompt": LONG, "reference": LONG, "policy": LONG}]
    return evaluation_page(page_data.report(pairs, LONG), pairs, page_data.examples(5, 30, LONG[:40]), answers)


def run() -> str:
    return run_page(
        LONG, page_data.CONFIG | {LONG: LONG}, page_data.MANIFEST, page_data.records(), page_data.answers(2)
    )


PAGES: dict[str, Callable[[], str]] = {
    "evaluation": evaluation,
    "run": run,
    "comparison": lambda: comparison_page(*page_data.comparison()),
    "comparison-long": lambda: comparison_page(*page_data.comparison("comparison", 4, LONG)),
    "sweep": lambda: comparison_page(*page_data.comparison("sweep", 30)),
    "examination": lambda: examination_page(page_data.examination(LONG)),
}


@pytest.fixture(scope="module", params=PAGES)
def page_file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("page") / f"{request.param}.html"
    file.write_text(PAGES[request.param](), encoding="utf-8")
    return file


@pytest.mark.parametrize("how", ["light", "dark", "print"])
@pytest.mark.parametrize("width", [1200, 400])
def test_a_page_fits_asks_nobody_and_can_be_read(browser: Any, page_file: Path, width: int, how: str) -> None:
    said, asked = [], []
    page = browser.new_page(viewport={"width": width, "height": 900})
    try:
        page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.emulate_media(
            media="print" if how == "print" else "screen", color_scheme="dark" if how == "dark" else "light"
        )
        page.goto(page_file.as_uri())
        seen = page.evaluate(LOOK)
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    finally:
        page.close()
    assert said == [] and asked == [page_file.as_uri()]
    assert seen["wide"] <= seen["inner"] == width
    assert seen["figures"] and all(wide > 0 and high > 0 for wide, high, _ in seen["figures"])
    assert how == "print" or min(smallest for *_, smallest in seen["figures"]) >= 9, json.dumps(seen["figures"])
    if width == 1200 and how != "print":
        assert all(wide <= 400 for wide, *_ in seen["figures"])  # three stand side by side
    assert all(visible == (how == "print") for visible in seen["folded"])  # paper cannot be unfolded
    assert (background == "rgb(255, 255, 255)") == (how != "dark")
