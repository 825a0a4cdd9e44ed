"""`python -m benchmarks.pictures`: draw the pictures of docs/reports.md.

The pictures show networks trained by LARS on the digits of scikit-learn. The picture of a notebook
needs Chromium and its driver.
"""

from __future__ import annotations

import io
import re
import shutil
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np

from benchmarks import report
from benchmarks.plots import STYLE
from lars_tree import Container
from lars_tree._commands import demo
from lars_tree.report import TrustHistory, layer_table, trust_ratios

IMAGES = report.DOCS / "images"
BATCH, EPOCHS, RATE, DECAY = 512, 40, 0.1, 1e-4


def main() -> None:
    """Train, and write the pictures."""
    wide, w, g = _trained([64, 128, 64, 10], RATE)
    _save(wide, IMAGES / "ratios.svg")
    deep, *_ = _trained([64, *[48] * 20, 10], RATE / 5)
    _save(deep, IMAGES / "ratios-map.svg")
    _table(w, g, IMAGES / "table.svg")
    _notebook(w, IMAGES / "notebook.png")


def _trained(sizes: list[int], rate: float) -> tuple[TrustHistory, Container, Container]:
    """Train a network; return the history, and the last weights and gradients."""
    digits, _ = demo.load(seed=0)
    rng = np.random.default_rng(0)
    w = Container()
    for i, (inputs, outputs) in enumerate(pairwise(sizes), 1):
        name = "head" if i == len(sizes) - 1 else f"hidden{i}"
        kernel = rng.normal(0, np.sqrt(2 / inputs), (inputs, outputs))
        w[name] = {"kernel": kernel, "bias": np.zeros(outputs)}
    kernels = w.map(lambda path, _: path[-1] == "kernel", with_path=True)
    history = TrustHistory()
    for _ in range(EPOCHS):
        order = rng.permutation(len(digits.labels))
        for start in range(0, len(order), BATCH):
            picked = order[start : start + BATCH]
            g = demo.gradients(w, demo.Digits(digits.images[picked], digits.labels[picked]))
            options = {"decay_lambda": DECAY * kernels, "adapt": kernels}
            ratios = trust_ratios(w, g, rate, **options)
            history.record(ratios.filter(lambda path, _: path[-1] == "kernel"))
            w.lars_update(g, rate, out=w, **options)
    return history, w, g


def _save(history: TrustHistory, path: Path) -> None:
    import matplotlib as mpl

    with mpl.rc_context({**STYLE, "axes.spines.top": True, "axes.spines.right": True}):
        figure = history.plot().figure
        figure.savefig(path, transparent=True, metadata={"Date": None}, dpi=120)


def _table(w: Container, g: Container, path: Path) -> None:
    from rich.console import Console

    console = Console(width=96, record=True, file=io.StringIO())
    console.print(layer_table(w, g, RATE, decay_lambda=DECAY))
    svg = console.export_svg(title="layer_table(w, g, 0.1, decay_lambda=1e-4)")
    # Drop the fonts that rich would load from the network.
    path.write_text(re.sub(r"\n *@font-face \{.*?\}", "", svg, flags=re.DOTALL))


def _notebook(w: Container, path: Path) -> None:
    """The tree as a notebook shows it, in a light and in a dark theme."""
    from PIL import Image
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    with tempfile.TemporaryDirectory() as folder:
        for flag in ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/u"):
            options.add_argument(flag)
        service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
        page = Path(folder, "page.html")
        head = "<!doctype html><meta charset=utf-8><body style='margin:0'>"
        page.write_text(head + w._repr_html_())
        shots = []
        with webdriver.Chrome(options=options, service=service) as browser:
            browser.set_window_size(500, 400)
            for theme in ("light", "dark"):
                features = [{"name": "prefers-color-scheme", "value": theme}]
                browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
                browser.get(page.as_uri())
                browser.find_elements("css selector", "summary")[1].click()
                shots.append(Path(folder, f"{theme}.png"))
                browser.find_element("css selector", ".lars-tree").screenshot(str(shots[-1]))
        pictures = [Image.open(shot) for shot in shots]
        both = Image.new("RGB", (sum(x.width for x in pictures) + 20, pictures[0].height), "#888")
        both.paste(pictures[0], (0, 0))
        both.paste(pictures[1], (pictures[0].width + 20, 0))
        both.quantize(64).save(path, optimize=True)


if __name__ == "__main__":
    main()
