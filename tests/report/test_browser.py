"""The page in a real browser: at a phone's width and a desk's, in light, dark and print."""

import shutil

import pytest

from nvit.cli import main as cli
from nvit.utils.report import write_result
from tests.browser import tab

LOUD = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
WIDER = """[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll') && !e.closest('svg')
  && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.tagName + ' ' + e.className)"""
SHOWN = "[...document.querySelectorAll('figure svg')].filter(e => e.getBoundingClientRect().width > 0)"
CONTRAST = """(() => {
  const light = c => { const v = c.match(/[\\d.]+/g).slice(0, 3).map(x => x / 255)
    .map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return v[0] * .2126 + v[1] * .7152 + v[2] * .0722; };
  const [a, b] = [getComputedStyle(document.querySelector('.why')).color,
    getComputedStyle(document.body).backgroundColor].map(light).sort().reverse();
  return (a + 0.05) / (b + 0.05); })()"""


@pytest.fixture(scope="module")
def pages(whole, tmp_path_factory):
    """One run, and several with long names, one of them with nothing but a long word."""
    base = tmp_path_factory.mktemp("pages")
    long = shutil.copytree(whole, base / ("a_run_with_a_name_that_has_no_end_" * 4))
    other = base / "compare"
    names = [f"models/{'x' * n}/snapshot" for n in (90, 10)]
    write_result(other, {"models": [{"name": n, "top1": 80.0, "measured_ratio": 1.0, "params": 5e6} for n in names]})
    assert cli.main(["report", str(whole), "--out", str(base / "one.html")]) == 0
    assert cli.main(["report", str(long), str(whole), str(other), "--out", str(base / "all.html")]) == 0
    return [base / "one.html", base / "all.html"]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with tab(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("which", [0, 1], ids=["one run", "several"])
def test_a_page_fits_says_nothing_and_asks_for_nothing(pages, browser, which, width):
    browser.open(pages[which], width)
    assert browser.value("innerWidth") == width, "a window that grew with its page hides what is too wide"
    assert browser.value("document.documentElement.scrollWidth") <= width
    assert browser.value(WIDER) == []
    assert browser.said(*LOUD) == []
    asked = [r["request"]["url"] for r in browser.said("Network.requestWillBeSent")]
    assert [url for url in asked if not url.startswith("data:")] == [pages[which].as_uri()]
    labels = browser.value(f"{SHOWN}.map(e => e.getAttribute('role') + ' ' + (e.getAttribute('aria-label') || ''))")
    assert len(labels) >= 4 and all(label.startswith("img ") and len(label) > 40 for label in labels)
    assert browser.value("document.querySelectorAll('figure').length") == len(labels), "each figure is shown once"
    assert browser.value("document.querySelectorAll('script').length") == 0


def test_dark_and_print(pages, browser):
    seen = {}
    for how in ({}, {"dark": True}, {"dark": True, "media": "print"}):
        browser.open(pages[0], 1280, **how)
        assert browser.value(CONTRAST) > 4.5, how
        seen[str(how)] = browser.value("getComputedStyle(document.querySelector('.card h1')).color")
    light, dark, paper = seen.values()
    assert dark != light and paper == "rgb(0, 0, 0)"
    browser.open(pages[0], 390, media="print")
    assert browser.value(f"{SHOWN}.every(e => e.closest('.wide'))"), "paper has the wide figures"


def test_the_look_sees_what_is_wrong(browser, tmp_path):
    bad = tmp_path / "bad.html"
    bad.write_text("<p style='width: 2000px'>x</p><img src='missing.png'><script>console.error('x'); y()</script>")
    browser.open(bad, 390)
    assert browser.value("document.documentElement.scrollWidth") > 390 and browser.value(WIDER)
    assert len(browser.said(*LOUD)) >= 2 and len(browser.said("Network.requestWillBeSent")) == 2
