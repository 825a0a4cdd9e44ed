"""The HTML of a Container in headless Chromium folds, is legible, and runs no scripts in keys."""

from __future__ import annotations

import re

import numpy as np
import pytest
from conftest import need, need_program

from lars_tree import Container

HOSTILE = [
    "<script>document.title = 'script ran'</script>",
    "<img src=x onerror=\"document.title = 'script ran'\">",
    '" onmouseover="document.title=\'script ran\'" x="',
    "</summary></details><h1>out</h1>",
    "</style><script>document.title = 'script ran'</script>",
]
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--window-size=800,600",
]
# CSS variables of JupyterLab's dark theme, which does not depend on the theme of the system.
JUPYTER_DARK = """<style>:root{--jp-content-font-color1:rgba(255,255,255,1);
--jp-content-font-color2:rgba(255,255,255,0.7);--jp-layout-color0:#111111;
--jp-border-color2:#424242}</style>"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = need("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = need_program("chromium")
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(flag)
    service = webdriver.ChromeService(executable_path=need_program("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


def container():
    w = Container(
        encoder={"kernel": np.ones((3, 4)), "deep": {"bias": np.zeros(4)}}, head=np.ones(2)
    )
    w.hostile = {key: {key: np.ones(1)} for key in HOSTILE}
    return w


def open_page(browser, folder, theme="light", head=""):
    page = folder / "page.html"
    html = container()._repr_html_()
    page.write_text(
        f"<!doctype html><meta charset=utf-8><title>calm</title>{head}<body>{html}</body>", "utf-8"
    )
    features = [{"name": "prefers-color-scheme", "value": theme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(page.as_uri())


def row(browser, name):
    """The element that shows this key."""
    found = [
        x
        for x in browser.find_elements("css selector", "b")
        if x.get_property("textContent") == name
    ]
    assert len(found) == 1
    return found[0]


def colors(browser, selector):
    """The colours of a text and of its background, as [red, green, blue, opacity]."""
    script = """
        let x = document.querySelector(arguments[0]);
        const ink = getComputedStyle(x).color;
        while (x && getComputedStyle(x).backgroundColor === 'rgba(0, 0, 0, 0)') x = x.parentElement;
        return [ink, x ? getComputedStyle(x).backgroundColor : 'rgb(255, 255, 255)'];"""
    numbers = [re.findall(r"[\d.]+", color) for color in browser.execute_script(script, selector)]
    return [[*map(float, x), 1.0][:4] for x in numbers]


def contrast(ink, page):
    """The contrast ratio of WCAG 2.1, from 1 to 21; `ink` is first blended with `page`."""
    ink = [a * ink[3] + b * (1 - ink[3]) for a, b in zip(ink[:3], page[:3], strict=True)]
    lights = []
    for color in (ink, page):
        linear = [x / 255 / 12.92 if x <= 10 else ((x / 255 + 0.055) / 1.055) ** 2.4 for x in color]
        lights.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(lights) + 0.05) / (min(lights) + 0.05)


def test_the_tree_folds_and_unfolds(browser, tmp_path):
    open_page(browser, tmp_path)
    assert row(browser, "encoder").is_displayed()
    assert row(browser, "head").is_displayed()
    assert not row(browser, "kernel").is_displayed()
    folded = browser.get_screenshot_as_png()

    row(browser, "encoder").click()
    assert row(browser, "kernel").is_displayed()
    assert not row(browser, "bias").is_displayed()
    row(browser, "deep").click()
    assert row(browser, "bias").is_displayed()
    unfolded = browser.get_screenshot_as_png()
    assert folded != unfolded

    row(browser, "encoder").click()
    assert not row(browser, "kernel").is_displayed()
    assert not row(browser, "bias").is_displayed()


@pytest.mark.parametrize("head", ["", JUPYTER_DARK], ids=["page", "jupyter-dark"])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_all_text_is_legible(browser, tmp_path, theme, head):
    """WCAG requires a contrast ratio of at least 4.5."""
    open_page(browser, tmp_path, theme, head)
    for selector in (
        ".lars-tree b",
        ".lars-tree summary",
        ".lars-tree i",
        ".lars-tree details>div",
    ):
        ink, page = colors(browser, selector)
        assert contrast(ink, page) >= 4.5, (selector, ink, page)
        is_dark = theme == "dark" or head != ""
        assert (sum(page[:3]) < 200) == is_dark


def test_contrast_has_the_values_of_the_standard():
    assert contrast([0, 0, 0, 1], [255, 255, 255, 1]) == pytest.approx(21)
    assert contrast([119, 119, 119, 1], [255, 255, 255, 1]) == pytest.approx(4.48, abs=0.01)
    assert contrast([0, 0, 0, 0.5], [255, 255, 255, 1]) == pytest.approx(3.95, abs=0.05)


def test_hostile_keys_run_no_script(browser, tmp_path):
    open_page(browser, tmp_path)
    for summary in browser.find_elements("css selector", "summary")[1:]:
        if not summary.find_element("xpath", "..").get_property("open"):
            summary.click()
    assert browser.find_elements("css selector", "script, img, h1, [onmouseover]") == []
    text = browser.find_element("css selector", ".lars-tree").text
    for key in HOSTILE:
        assert text.count(key[:30]) >= 2
    assert browser.title == "calm"


def test_a_script_in_a_page_would_run(browser, tmp_path):
    page = tmp_path / "page.html"
    page.write_text(f"<!doctype html><title>calm</title>{HOSTILE[0]}")
    browser.get(page.as_uri())
    assert browser.title == "script ran"
