"""The pages in a real browser: nothing overflows, every chart is seen, nothing is fetched."""

import html
import json
import re
import subprocess

import pytest

import report_samples as samples
from deltafl import report
from deltafl.report.page import to_html

pytestmark = pytest.mark.browser

# Headless Chromium has a least window width, so a phone is an iframe of a phone's width; srcdoc shares its origin.
HARNESS = """<!DOCTYPE html><title>harness</title>
<iframe style="border:0;width:{width}px;height:{height}px" srcdoc="{page}"></iframe><pre></pre>
<script>
addEventListener("load", () => {{
  const w = document.querySelector("iframe").contentWindow, d = w.document;
  const seen = [...d.querySelectorAll("svg")].filter(e => e.getClientRects().length).map(e => {{
    const box = e.getBoundingClientRect();
    const texts = [...e.querySelectorAll("text")].map(t => t.getBoundingClientRect());
    return {{width: box.width, height: box.height, label: e.parentElement.getAttribute("aria-label"),
      left: Math.min(...texts.map(t => t.left)) - box.left, right: box.right - Math.max(...texts.map(t => t.right)),
      smallest: Math.min(...[...e.querySelectorAll("text")].map(t =>
        parseFloat(w.getComputedStyle(t).fontSize) * box.width / e.viewBox.baseVal.width))}};
  }});
  const sizes = [...d.querySelectorAll("p,li,td,th,caption,figcaption,dt,dd,code,pre")].map(
    e => parseFloat(w.getComputedStyle(e).fontSize));
  document.querySelector("pre").textContent = JSON.stringify({{
    inner: w.innerWidth, scroll: d.documentElement.scrollWidth, figures: d.querySelectorAll("figure").length,
    seen, cut: [...d.querySelectorAll(".scroll")].filter(e => e.scrollWidth > e.clientWidth).length,
    smallest: Math.min(...sizes), background: w.getComputedStyle(d.documentElement).backgroundColor,
    ink: w.getComputedStyle(d.querySelector("figure svg text")).fill,
    fetched: w.performance.getEntriesByType("resource").map(e => e.name)}});
}});
</script>"""


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return {
        "quickstart": to_html(report.search_page(samples.quickstart_result(), story=True)),
        "inspect": to_html(report.inspect_page(samples.inspect_result())),
        "federated": to_html(report.run_page(*samples.federated_result())),
        "comparison": to_html(report.comparison_page(samples.comparison_result())),
    }


def measure(chromium, folder, page: str, width: int, height: int, dark: bool = False) -> dict:
    harness = folder / "harness.html"
    harness.write_text(
        HARNESS.format(width=width, height=height, page=html.escape(page)), encoding="utf-8"
    )
    command = [
        chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-sync", "--disable-background-networking", "--disable-component-update",
        f"--user-data-dir={folder / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND",
        "--enable-logging=stderr", "--window-size=1400,1000",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--dump-dom", harness.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr
    found = re.search(r"<pre>(.+?)</pre>\s*<script>", done.stdout, re.S)
    assert found is not None, done.stderr
    return json.loads(html.unescape(found[1]))


@pytest.mark.parametrize("size", [(360, 780), (1280, 900)])
@pytest.mark.parametrize("name", ["quickstart", "inspect", "federated", "comparison"])
def test_a_page_fits_and_shows_every_figure(tmp_path, pages, chromium, name, size):
    got = measure(chromium, tmp_path, pages[name], *size)
    assert got["inner"] == size[0]
    assert got["scroll"] <= got["inner"]
    assert got["smallest"] >= 16
    assert got["fetched"] == []
    assert size[0] < 1000 or got["cut"] == 0
    assert len(got["seen"]) == got["figures"] > 0
    for chart in got["seen"]:
        assert chart["width"] > 300
        assert chart["height"] > 100
        assert chart["smallest"] >= 9.3, chart["label"]
        assert min(chart["left"], chart["right"]) > -8, f"a label sticks out: {chart['label']}"


def test_the_page_and_its_charts_follow_the_theme(tmp_path, pages, chromium):
    light = measure(chromium, tmp_path, pages["quickstart"], 390, 844)
    dark = measure(chromium, tmp_path, pages["quickstart"], 390, 844, dark=True)
    for key in ("background", "ink"):
        assert light[key] != dark[key]
