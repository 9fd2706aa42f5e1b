"""Reports in a real browser: every figure is drawn, nothing is asked of the net, nothing sticks out or complains."""

import json
import os
import shutil
from importlib.util import find_spec

import numpy as np
import pytest

from server.report import write_report
from simulations.audits.plots import GRID
from simulations.audits.report import audit_page
from tests.run_folders import make_run

WIDTHS = (360, 768, 1280)
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
)  # fmt: skip
HOSTILE = "<script>document.title = 'taken'</script>\"><img src=http://127.0.0.1:9/x onerror='document.title=1'>"
DRAWN = """return [...document.querySelectorAll("figure .plot svg")].map(svg => {
  const box = svg.getBoundingClientRect(), parts = [...svg.querySelectorAll("path, use, text")];
  const seen = parts.filter(part => { const b = part.getBoundingClientRect(); return b.width + b.height > 0; });
  return [box.width, box.height, seen.length]; })"""
WIDE = """return [...document.querySelectorAll("body *")].filter(part => !part.closest(".scroll, .plot, svg")
  && part.getBoundingClientRect().right > document.documentElement.clientWidth + 0.5).map(part => part.outerHTML)"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or (not os.environ.get("FEDISTILL_REQUIRE_REAL") and not (driver and find_spec("selenium"))):
        pytest.skip("needs chromium, its chromedriver and selenium")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield started
    started.quit()


def audit(folder):
    """Two arms, an attack with a ROC and one that could not be tried in one of them."""
    rows = [
        {"arm": arm, "task": "toy", "seed": 0, "attack": attack, "success": success, "low": success, "chance": 0.01,
         "measure": f"share {HOSTILE}"}
        for arm, attack, success in (("none", "lira", 0.3), ("<b>noised", "lira", 0.01), ("none", "votes", 0.5),
                                     ("<b>noised", "votes", None))
    ]  # fmt: skip
    utility = [{"arm": arm, "task": "toy", "seed": 0, "attack": "utility", "success": 0.8, "measure": "accuracy"}
               for arm in ("none", "<b>noised")]  # fmt: skip
    folder.mkdir()
    curves = {"lira": {"none": np.sqrt(GRID), "<b>noised": GRID}}
    (folder / "report.html").write_text(audit_page([*utility, *rows], ("none", "<b>noised"), {}, curves))
    return folder / "report.html"


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Path and number of figures by name."""
    out = tmp_path_factory.mktemp("pages")
    many = [f"label {number}" for number in range(60)]
    runs = {
        "finished": (make_run(out / "finished", faults=True), 8),
        "tiers": (make_run(out / "tiers", tiers=True), 8),
        "killed": (make_run(out / "killed", killed=True), 6),
        "large": (make_run(out / "large", rounds=100, clients=3000, classes=many), 7),
        "hostile": (make_run(out / HOSTILE.replace("/", ""), data__source=HOSTILE, classes=(HOSTILE, "b")), 7),
    }
    found = {name: (write_report(run), figures) for name, (run, figures) in runs.items()}
    return found | {"audit": (audit(out / "audit"), 3)}


@pytest.mark.parametrize("name", ["finished", "tiers", "killed", "large", "hostile", "audit"])
def test_a_page_is_right_at_every_width_in_light_and_dark(browser, pages, name):
    path, figures = pages[name]
    browser.get_log("performance"), browser.get_log("browser")
    browser.get(path.as_uri())
    title, grounds = browser.title, set()
    assert title.startswith("fedistill: ")
    for width in WIDTHS:
        for mode in ("light", "dark"):
            show(browser, width, mode)
            drawn = browser.execute_script(DRAWN)
            assert len(drawn) == figures
            assert all(min(width, 250) < wide <= width and high > 100 and seen > 10 for wide, high, seen in drawn), (
                drawn
            )
            assert browser.execute_script("return document.documentElement.scrollWidth") <= width
            assert browser.execute_script(WIDE) == []
            grounds.add(browser.execute_script("return getComputedStyle(document.body).backgroundColor"))
    assert len(grounds) == 2  # light and dark
    assert browser.title == title  # no script of the page's ran
    assert browser.get_log("browser") == []
    assert asked(browser) == {path.as_uri()}


def test_what_is_folded_fits_too(browser, pages):
    """With every table unfolded on a phone, tables scroll in their own boxes."""
    for path, _ in pages.values():
        browser.get(path.as_uri())
        show(browser, 320, "light")
        browser.execute_script("document.querySelectorAll('details').forEach(each => { each.open = true; })")
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 320
        assert browser.execute_script(WIDE) == []


def show(browser, width, mode):
    scheme = [{"name": "prefers-color-scheme", "value": mode}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def asked(browser):
    """Addresses that the page has asked for, refused ones included."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return {each["params"]["request"]["url"] for each in events if each["method"] == "Network.requestWillBeSent"}
