"""The pages: what they say is what the reports say, text does nothing, and the same data gives the same bytes."""

import math
import re
import subprocess
import sys
from collections.abc import Callable
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import page_data
import pytest

from dpo_cli.console.text import safe_text
from dpo_cli.examination.page import page as examination_page
from dpo_cli.pages import figures
from dpo_cli.pages import run as of_run
from dpo_cli.pages.evaluation import colored
from dpo_cli.pages.pages import comparison_page, evaluation_page, run_page
from dpo_cli.pages.reading import accuracy_by
from dpo_cli.theory.statistics import Clusters

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Reader(HTMLParser):
    """Checks that marks are closed in order; keeps marks, ids, cells and words."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.marks: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.rows: list[list[str]] = []
        self.words = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.marks.append(tag)
        self.attributes += [(name, value or "") for name, value in attributes]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.marks.append(tag)
        self.attributes += [(name, value or "") for name, value in attributes]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data

    def handle_comment(self, data: str) -> None:
        self.marks.append("comment")

    def titles(self, page: str) -> list[str]:
        return re.findall(r"<figure><h3>(.*?)</h3>", page)


def evaluation(number: int = 60, **more: Any) -> str:
    pairs = page_data.pairs(number)
    report = page_data.report(pairs) | more
    return evaluation_page(report, pairs, page_data.examples(4, 9), page_data.answers())


def run(**more: Any) -> str:
    data: dict[str, Any] = {
        "name": "a", "config": page_data.CONFIG, "manifest": page_data.MANIFEST, "records": page_data.records(),
        "samples": page_data.answers(),
    }  # fmt: skip
    return run_page(**(data | more))


PAGES: dict[str, Callable[[], str]] = {
    "evaluation": evaluation,
    "run": run,
    "comparison": lambda: comparison_page(*page_data.comparison()),
    "sweep": lambda: comparison_page(*page_data.comparison("sweep", 9)),
    "examination": lambda: examination_page(page_data.examination()),
}


def figure(page: str, title: str) -> str:
    """The figure of this title, with its caption."""
    found = re.search(rf"<figure><h3>{re.escape(title)}</h3>(.*?)</figure>", page, re.DOTALL)
    assert found, title
    return found[1]


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_whole_asks_nobody_and_is_the_same_twice(name: str) -> None:
    page = PAGES[name]()
    assert page == PAGES[name]()
    found = Reader(page)
    assert not {"script", "iframe", "img", "link", "a", "form", "comment", "image", "style."} & set(found.marks)
    assert "http" not in page.replace("http-equiv", "") and "default-src 'none'" in page
    assert not [name for name, _ in found.attributes if name.startswith("on") or name == "src"]
    assert all(value.startswith("#") for name, value in found.attributes if name == "href")
    assert "prefers-color-scheme: dark" in page and "@media print" in page


@pytest.mark.parametrize("name", PAGES)
def test_ids_stand_once_and_what_a_figure_uses_is_its_own(name: str) -> None:
    page = PAGES[name]()
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert ids and len(ids) == len(set(ids))
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        used = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', svg)
        assert {one or other for one, other in used} <= set(re.findall(r'\bid="([^"]+)"', svg))


@pytest.mark.parametrize("name", PAGES)
def test_every_figure_is_named_and_explained_and_takes_its_colors_from_the_page(name: str) -> None:
    page = PAGES[name]()
    drawn = re.findall(r"<figure><h3>(.*?)</h3>(<svg.*?</svg>)<figcaption>(.*?)</figcaption>", page, re.DOTALL)
    assert len(drawn) == page.count("<svg") >= 3
    for title, svg, caption in drawn:
        assert title and caption.endswith(".")
        assert unescape(f'role="img" aria-label="{title}. {caption}"') in unescape(svg)
        assert "var(--" in svg and "<text" in svg
        assert not re.search(r"#[0-9a-f]{6}\b", re.sub(r'(href|id)="[^"]*"|url\([^)]*\)', "", svg)), title
        assert not re.search(r"\{\d+\}", svg)


def test_the_numbers_of_an_evaluation_are_those_of_its_report() -> None:
    found = Reader(evaluation(60, **{"rewards/accuracies": 0.7321, "loss": None, "calibration": {"error": 0.0567}}))
    pairs = page_data.pairs(60)
    low, high = page_data.report(pairs)["intervals95"]["rewards/accuracies"]
    assert ["accuracy", "0.732", f"{low:.3g} to {high:.3g}"] in found.rows
    assert ["loss", "–", ""] in found.rows
    assert "Calibration error 0.0567" in found.words
    assert ["length, tokens", "183", "160 to 206", "130", "118 to 142"] in found.rows
    assert ["arc_easy", "acc", "0.613", "0.6", "0.013", "-0.01 to 0.036"] in found.rows
    assert ["hellaswag", "acc,flexible", "0.431", "0.441", "-0.01", ""] in found.rows
    assert ["0.25", "At 0.25 boat 2 is the outputs/run."] in found.rows
    assert ["0", "0.5", "0.46 to 0.54", "0", "-0.1 to 0.1", "0.69", "0.6 to 0.7", "–", "", "–", ""] in found.rows
    harmless = [pair["margin"] for pair in pairs if pair["source"] == "harmless"]
    row = next(row for row in found.rows if row[0] == "harmless")
    assert row[1] == f"{np.mean(np.asarray(harmless) > 0):.3g}" and row[3] == f"{np.mean(harmless):.3g}"
    assert ["beta", "0.1"] in found.rows
    assert ["data", "test.jsonl.gz; 60 of 73 rows kept; prompt_too_long 12; duplicate 1"] in found.rows
    assert "accuracy 0.71 (0.68 to 0.74): better than the reference" in found.words.split("checkpoint")[0]  # first


def test_accuracy_in_bins_counts_prompts_and_puts_equally_many_pairs_into_each() -> None:
    values, right = np.arange(100.0), np.asarray([0.0] * 50 + [1.0] * 50)
    prompts = (np.arange(100) // 5).astype(np.uint64)
    bins = accuracy_by(values, right, prompts, most=4)
    assert [place for place, _ in bins] == pytest.approx([12.0, 37.0, 62.0, 87.0])
    assert [one[0] for _, one in bins] == [0.0, 0.0, 1.0, 1.0]
    expected = Clusters(prompts[75:]).share(right[75:])
    assert bins[3][1] == (expected.mean, expected.low, expected.high)
    assert expected.low < Clusters(range(25)).share(right[75:]).low  # 5 prompts, not 25 pairs
    assert accuracy_by(np.asarray([math.nan]), np.asarray([1.0]), prompts[:1]) == []
    assert [place for place, _ in accuracy_by(np.full(30, 7.0), np.ones(30), np.arange(30, dtype=np.uint64))] == [7.0]


def test_a_token_is_colored_by_its_sign_and_size_and_says_its_number() -> None:
    tokens = [["a", 1.0], [" b", -1.0], [" c", 0.01], [" d", -0.5], [" e", None]]
    examples = [{"kind": "best", "prompt": "p", "margin": 1.0, "chosen": tokens, "rejected": [["f", 0.0]]}]
    ((example,), edges) = colored(examples)
    assert edges == pytest.approx([0.125, 0.375, 0.625, 0.875])
    assert [token[1] for token in example["chosen"]] == ["p4", "n4", "", "n2", ""]
    page = evaluation_page(page_data.report(page_data.pairs(20)), page_data.pairs(20), examples, [])
    assert (
        '<i class="p4" title="+1.00">a</i><i class="n4" title="-1.00"> b</i> c<i class="n2" title="-0.50"> d</i>'
        in page
    )
    assert ".n1, .n2 { text-decoration: underline" in page  # without color, too


def test_the_wrong_side_of_the_margins_is_red_and_the_right_one_green() -> None:
    def shades(values: list[float]) -> list[str]:
        drawing = figures.histogram("m", "c.", ("x", "y"), [("m", values)])
        return re.findall(r"fill: var\(--(good|bad)\)", drawing.svg)

    assert shades([-3.0, -2.0, -1.0]) == ["bad"] or shades([-3.0, -2.0, -1.0]) == ["bad", "good"]
    drawing = figures.histogram("m", "c.", ("x", "y"), [("m", [-4.0] * 3 + [2.0])])
    of = dict(re.findall(r'<path d="([^"]*)"[^>]*fill: var\(--(good|bad)\)', drawing.svg))
    right = {shade: max(float(x) for x in re.findall(r"[ML] (\S+) ", path)) for path, shade in of.items()}
    left = {shade: min(float(x) for x in re.findall(r"[ML] (\S+) ", path)) for path, shade in of.items()}
    assert left["bad"] < right["bad"] == left["good"] < right["good"]


def test_the_numbers_of_a_run_are_those_of_its_log() -> None:
    page = run()
    found = Reader(page)
    assert ["far", "the answers left the reference by 11 nats", "beta=0.2"] in found.rows
    assert ["final/ holds", "step 200: the last evaluation within budget.kl=10"] in found.rows
    assert ["accuracy", "0.68", "0.64 to 0.72"] in found.rows and "Last evaluation" in found.words
    assert ["1", "100", "step 100: the responses have moved by 0.3 nats a token; a larger beta helps"] in found.rows
    assert ["loss.label_smoothing", "0.0"] in found.rows and ["resume", "null"] in found.rows
    assert ["dry_run", "false"] in found.rows and ["lora.target_modules", "['q_proj', 'v_proj']"] in found.rows
    assert "Red: the budget." in figure(page, "KL of generated answers")
    assert "Red: the budget." not in figure(page, "Repetition")
    assert found.words.index("yellow") < found.words.index("accuracy 0.68 (0.64 to 0.72)") < found.words.index("Curves")


def drawn_points(svg: str) -> int:
    """Of the longest line."""
    return max(len(re.findall(r"[ML] ", path)) for path in re.findall(r'<path d="([^"]*)"[^>]*fill: none', svg))


def test_thousands_of_lines_are_averaged_in_bins_and_it_is_said() -> None:
    page = run(records=page_data.records(6000, 1000))
    loss = figure(page, "Loss")
    assert drawn_points(loss) <= 400 and "A point of the line is the mean of about 15 logged values." in loss
    assert len(page) < 1_000_000
    line = of_run._line("x", np.arange(1000.0), np.arange(1000.0), "series-1", 100, math.nan)
    assert np.asarray(line.values)[:2] == pytest.approx([4.5, 14.5]) and len(line.steps) == 100


def test_the_band_of_the_accuracy_is_wilsons_for_the_pairs_behind_a_point() -> None:
    line = of_run._line("x", np.asarray([1.0]), np.asarray([0.75]), "series-1", 60, 16.0)
    assert line.low is not None and line.high is not None
    z2 = 1.959963984540054**2  # Wilson: (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)
    half = math.sqrt(z2) * math.sqrt(0.75 * 0.25 / 16 + z2 / (4 * 16**2))
    expected = [(0.75 + z2 / 32 - half) / (1 + z2 / 16), (0.75 + z2 / 32 + half) / (1 + z2 / 16)]
    assert [float(line.low[0]), float(line.high[0])] == pytest.approx(expected)


def test_a_run_with_one_line_nan_and_null_has_its_page() -> None:
    one = run(records=page_data.records(0), manifest={}, config={}, samples=[])
    assert "Last logged step" in one and figure(one, "Loss")
    records = page_data.records(30)
    for record in records[3:6]:
        record |= {"loss": math.nan, "grad_norm": None, "rewards/margins": math.inf}
    page = run(records=records)
    assert "3 values of training are not finite and leave gaps." in figure(page, "Loss")
    assert " nan" not in figure(page, "Loss").lower() and " nan" not in figure(page, "Gradient norm").lower()
    assert "<svg" not in run(records=[], manifest={}, config={}, samples=[])
    every = [record | {"loss": None} for record in page_data.records(5)]
    assert "<h3>Loss</h3>" not in run(records=every)


def test_a_reward_run_has_no_drift_in_nats() -> None:
    records = [
        {name: value for name, value in record.items() if "per_token" not in name and "samples/" not in name}
        for record in page_data.records(20)
    ]
    titles = re.findall(r"<figure><h3>(.*?)</h3>", run(records=records))
    assert "Loss" in titles and not {"Drift", "KL of the data's responses", "KL of generated answers"} & set(titles)
    pairs = [
        {name: value for name, value in pair.items() if "logps" not in name and name != "source"}
        for pair in page_data.pairs(40)
    ]
    page = evaluation_page({"checkpoint": "r", "pairs": 40, "loss": 0.5}, pairs, [], [])
    titles = re.findall(r"<figure><h3>(.*?)</h3>", page)
    assert titles == [
        "Margins",
        "Accuracy by length gap",
        "Accuracy by prompt length",
        "Reward of chosen against rejected",
    ]


@pytest.mark.parametrize("margin", [None, 0.0])
def test_pairs_that_say_nothing_have_their_page(margin: float | None) -> None:
    logps = {f"{who}_logps_{side}": margin for who in ("policy", "reference") for side in ("chosen", "rejected")}
    pairs = [pair | logps | {"margin": margin} for pair in page_data.pairs(3)]
    report = {"checkpoint": "x", "calibration": {"error": 0.0}, "rewards/margins": margin, "intervals95": {}}
    page = evaluation_page(report, pairs, [], [])
    assert ("<svg" in page) == (margin is not None)
    assert evaluation_page({"checkpoint": "x"}, [], [], []).count("<svg") == 0


def test_pairs_without_a_finite_margin_are_counted() -> None:
    pairs = page_data.pairs(40)
    pairs[0]["margin"] = None
    page = evaluation_page(page_data.report(page_data.pairs(40)), pairs, [], [])
    assert "1 pairs without a finite margin are left out." in figure(page, "Margins")


def test_the_numbers_of_a_comparison_are_those_of_its_report() -> None:
    report, margins = page_data.comparison()
    report["models"][2]["difference"]["loss"] = None
    page = comparison_page(report, margins)
    found = Reader(page)
    row = [
        "beta-1",
        "better",
        "0.04",
        "0.01 to 0.07",
        "0.012",
        "0.12",
        "0.02 to 0.22",
        "0.2",
        "-0.04",
        "-0.06 to -0.02",
        "0.04",
        "",
    ]
    assert row in found.rows
    other = next(row for row in found.rows if row[:2] == ["beta-2", "not told apart"])
    assert other[8:] == ["–", "", "–", "1,900"]
    assert ["beta", "0.1", "0.2", "0.4"] in found.rows and ["beta-2", "outputs/beta-2/eval/held-out"] in found.rows
    assert "beta-1 has the highest accuracy, but is not told apart from beta-2" in found.words
    assert '<div class="verdict yellow">' in page and "beta-2: another dtype" in found.words
    report["models"][2]["verdict"] = "worse"
    alone = comparison_page(report, margins)
    assert '<div class="verdict green">' in alone and "best: beta-1" in alone
    assert found.words.index("better by 0.04 (0.01 to 0.07)") < found.words.index("Models")
    titles = re.findall(r"<figure><h3>(.*?)</h3>", page)
    assert titles == ["Difference in accuracy", "Difference in margin", "Difference in loss", "Margins",
                      "Accuracy against KL", "Margin against KL"]  # fmt: skip
    assert re.search(r"fill: var\(--good\)[^>]*>beta-1<", figure(page, "Accuracy against KL"))
    for model in report["models"]:
        model["metrics"]["kl"] = None
    assert "against KL" not in comparison_page(report, margins)


def test_a_sweep_has_a_column_for_each_key() -> None:
    found = Reader(comparison_page(*page_data.comparison("sweep", 9)))
    assert "Sweep of 9 models" in found.words
    heading = next(row for row in found.rows if row[0] == "model")
    assert heading[1:3] == ["beta", "optimizer.lr"]
    assert next(row for row in found.rows if row[0] == "beta-2")[1:3] == ["0.4", "1e-05"]


HOSTILE = [
    "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "]]>", "<!--", "</svg></figure>", "$x^2$", "{0}",
    r"$\frac{", "&lt;b&gt;", "\x1b[31m\x00\x07", "\u202egnp.exe", "😀🇩🇪", "日本語", "n" * 300, "'\"`=", "{{ 7*7 }}",
    "javascript:alert(1)",
]  # fmt: skip


def pages_of(words: list[str]) -> list[str]:
    """Every page with these words wherever a text of others can stand."""
    every = " ".join(words)
    pairs = page_data.pairs(20 * len(words), tuple(words))
    report = page_data.report(pairs, every)
    report |= {
        "harness": {
            word: {"policy": {word: 0.5}, "reference": {}, "difference": {word: [0.1, 0, 0.2]}} for word in words
        },
        "summary": {"color": every, "text": every},
    }
    answers = [{"prompt": word, "reference": word, "policy": word} for word in words]
    examples = [example for word in words for example in page_data.examples(1, 2, word)]
    findings = [{"name": word, "color": word, "reason": word, "next_step": word} for word in words]
    manifest = {"verdict": {"color": every, "summary": every, "findings": findings}, "model": {"name": every}}
    records = [
        *page_data.records(2),
        {"step": 2, "split": "train", "loss": 0.5, "alarms": {word: word for word in words}},
    ]
    comparison, margins = page_data.comparison("sweep", len(words))
    comparison |= {"swept": words, "warnings": words, "best": words[1]}
    for model, word in zip(comparison["models"], words, strict=True):
        model |= {"name": word, "words": word, "source": word, "swept": {word: word for word in words}}
    return [
        evaluation_page(report, pairs, examples, answers),
        run_page(every, {word: {word: [word]} for word in words}, manifest, records, answers),
        comparison_page(comparison, margins),
        examination_page(page_data.examination(every)),
    ]


def test_text_of_others_does_nothing_and_is_shown() -> None:
    plain = [f"plain{place}" for place in range(len(HOSTILE))]
    pages = pages_of(HOSTILE)
    for page, harmless in zip(pages, pages_of(plain), strict=True):
        found, expected = Reader(page), Reader(harmless)
        assert set(found.marks) == set(expected.marks)
        assert {name for name, _ in found.attributes} == {name for name, _ in expected.attributes}
        # In the figures themselves a long name may lack room.
        outside, of_harmless = (Reader(re.sub("<svg.*?</svg>", "", one, flags=re.DOTALL)) for one in (page, harmless))
        assert outside.marks == of_harmless.marks
        assert [name for name, _ in outside.attributes] == [name for name, _ in of_harmless.attributes]
        assert [text for text in HOSTILE if found.words.count(safe_text(text)) < 5] == []
        assert not set("\x00\x07\x1b\u202e") & set(page)
    names = (
        Reader(figure(pages[0], "Accuracy by source")).words + Reader(figure(pages[2], "Difference in margin")).words
    )
    assert [text for text in HOSTILE[1:] if safe_text(text, figures.NAME) not in names] == []


def test_pages_are_imported_and_drawn_without_pyplot_and_leave_the_settings_of_matplotlib() -> None:
    code = (
        "import sys; import dpo_cli.pages.pages as pages; assert 'matplotlib' not in sys.modules\n"
        "import matplotlib; matplotlib.rcParams['font.size'] = 17.5; before = matplotlib.rcParams.copy()\n"
        "from page_data import comparison; pages.comparison_page(*comparison())\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "assert all(matplotlib.rcParams[name] == before[name] for name in before if name != 'backend')"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_ten_thousand_pairs_make_a_small_page() -> None:
    pairs = page_data.pairs(10_000)
    page = evaluation_page(page_data.report(pairs), pairs, page_data.examples(20, 300), page_data.answers(20))
    assert len(page.encode()) < 5_000_000


def test_names_of_a_frontier_cover_neither_a_point_nor_each_other_and_the_line_joins_the_unbeaten() -> None:
    points = [("dear", 9.0, 0.6), ("cheap", 1.0, 0.55), ("same", 1.02, 0.551), ("beaten", 5.0, 0.5), ("best", 6.0, 0.7)]
    places = [(name, (kl, kl - 0.1, kl + 0.1), (up, up - 0.01, up + 0.01)) for name, kl, up in points]
    svg = figures.frontier("f", "c.", ("x", "y"), places, "best").svg
    named = {
        name: (float(x), float(y))
        for x, y, name in re.findall(r'<text[^>]* x="([\d.]+)" y="([\d.]+)"[^>]*>([a-z]+)</text>', svg)
        if name in {one for one, *_ in points}
    }
    assert {"dear", "beaten", "best"} <= set(named)
    boxes = [(x, y - 10, x + 5 * len(name), y) for name, (x, y) in named.items()]
    dots = [(float(x), float(y)) for x, y in re.findall(r'<use href="#\w+" x="([\d.]+)" y="([\d.]+)"', svg)]
    assert len(dots) == 5
    for place, one in enumerate(boxes):
        assert not [True for x, y in dots if one[0] < x < one[2] and one[1] < y < one[3]]
        for other in boxes[:place]:
            assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
    (dotted,) = re.findall(r'<path d="([^"]*)"[^>]*stroke: var\(--dim\)', svg)
    x = [float(one) for one in re.findall(r"[ML] (\S+) ", dotted)]
    assert len(x) == 3 and x == sorted(x)  # cheap, same, best


def test_ticks_have_the_digits_that_tell_them_apart() -> None:
    line = figures.Series("a", [0.0, 1.0], [113.2, 114.1])
    svg = figures.curves("t", "c.", "pairs a second", [line]).svg
    ticks = re.findall(r"text-anchor: end[^>]*>([\d.]+)<", svg)
    assert len(ticks) == len(set(ticks)) >= 3
    assert re.findall(r"text-anchor: middle[^>]*>([\d.]+)<", svg) == ["0", "1"]  # there is no half step


def dots(svg: str) -> list[tuple[float, float]]:
    """The markers of a figure, from left to right; the second number grows downwards."""
    return sorted((float(x), float(y)) for x, y in re.findall(r'<use href="#\w+" x="([\d.]+)" y="([\d.]+)"', svg))


def of_pairs(*, chosen_tokens: int, rejected_tokens: int, margin: float, number: int) -> list[dict[str, Any]]:
    tokens = {"chosen_tokens": chosen_tokens, "rejected_tokens": rejected_tokens, "margin": margin}
    return [pair | tokens | {"prompt": f"{place:x}"} for place, pair in enumerate(page_data.pairs(number))]


def test_the_length_gap_grows_with_the_chosen_response_and_accuracy_upwards() -> None:
    short = of_pairs(chosen_tokens=10, rejected_tokens=90, margin=-1.0, number=40)
    long = of_pairs(chosen_tokens=90, rejected_tokens=10, margin=1.0, number=40)
    page = evaluation_page({"checkpoint": "x"}, [*short, *long], [], [])
    (left, wrong), (right, well) = dots(figure(page, "Accuracy by length gap"))
    assert left < right and well < wrong


def test_a_pair_stands_where_its_log_ratios_are() -> None:
    pair = page_data.pairs(1)[0]
    moved = [pair | {"policy_logps_chosen": pair["reference_logps_chosen"] + 8.0,
                     "policy_logps_rejected": pair["reference_logps_rejected"] - 2.0, "margin": 1.0}] * 9  # fmt: skip
    svg = figure(evaluation_page({"checkpoint": "x"}, moved, [], []), "Change of chosen against rejected")
    (cell,) = re.findall(r'<path d="([^"]*)"[^>]*style="fill: var\(--series-1\)', svg)
    corner = [tuple(map(float, one)) for one in re.findall(r"[ML] (\S+) (\S+)", cell)]
    frame = [
        tuple(map(float, one)) for one in re.findall(r'<rect x="(\S+)" y="(\S+)" width="(\S+)" height="(\S+)"', svg)
    ]
    left, top, wide, high = frame[0]
    assert max(x for x, _ in corner) == pytest.approx(left + wide, abs=1)  # chosen +8 is the right end
    assert max(y for _, y in corner) == pytest.approx(top + high, abs=1)  # rejected -2 is the lower end


def test_a_difference_above_0_stands_right_of_the_line() -> None:
    for sign in (1, -1):
        svg = figures.rows("t", "c.", "x", ["a"], [(sign * 0.1, sign * 0.1 - 0.05, sign * 0.1 + 0.05)], level=0.0).svg
        ((x, _),) = dots(svg)
        (zero,) = re.findall(r'<path d="M (\S+) [^"]*"[^>]*stroke-dasharray', svg)
        assert (x > float(zero)) == (sign > 0)


def test_chosen_and_rejected_keep_their_colors_and_their_values() -> None:
    page = run(records=page_data.records(40))
    for title in ("Rewards", "Drift"):
        svg = figure(page, title)
        lines = {
            shade: path
            for path, shade in re.findall(r'<path d="([^"]*)"[^>]*fill: none; stroke: var\(--(series-[12])\)', svg)
            if len(re.findall("[ML] ", path)) > 9
        }
        lowest = {shade: max(float(y) for y in re.findall(r"[ML] \S+ (\S+)", path)) for shade, path in lines.items()}
        assert lowest["series-2"] > lowest["series-1"]  # rejected falls below chosen
        assert svg.index(">chosen<") < svg.index(">rejected<")


def test_the_reference_stands_above_the_policy_with_its_own_length() -> None:
    (left, reference), (right, policy) = dots(figure(evaluation(), "Length of answers"))
    assert left < right and reference < policy  # 130 tokens of the reference, 183 of the policy


def test_the_margin_against_kl_is_in_nats() -> None:
    heights = [y for _, y in dots(figure(comparison_page(*page_data.comparison()), "Margin against KL"))]
    assert heights == sorted(heights, reverse=True)  # 0.54/0.4 at KL 4, 0.54/0.2 at 6, 0.5/0.1 at 12
    report, margins = page_data.comparison()
    report |= {"margin": "margin/beta"}  # divided already: 0.54, 0.54, 0.5
    first, second, third = (y for _, y in dots(figure(comparison_page(report, margins), "Margin against KL")))
    assert first == second < third
