"""The report in a real browser: pictures and tables show, nothing is logged as an error, nothing leaves the machine."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from modularforge.config import Config
from modularforge.observe.report import write_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
FLAGS = (
    "--headless", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--no-sandbox", "--hide-scrollbars",
)  # fmt: skip
# Every name but this machine's resolves to nothing, so a page that asks for anything from outside fails visibly.
NO_NETWORK = "--host-resolver-rules=MAP * ~NOTFOUND"
PLOTS_OF_A_RUN, STACKED_OF_A_RUN = 12, 2
TABLES_OF_A_RUN = {
    "Stages and jobs",
    "What was drawn",
    "Perplexity on the test split",
    "The calibrated model less the others",
    "The calibrated model less the backbone, by domain",
    "By distance from the switch",
    "By position in the window",
    "Other text than the domains' own",
    "What is committed",
    "Versions",
    "Settings",
}

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed; run `make test-page`")


def browse(page: Path | str, profile: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Open a file in the browser with an empty profile; its console goes to standard error."""
    url = page if isinstance(page, str) else page.as_uri()
    command = [str(BROWSER), *FLAGS, NO_NETWORK, f"--user-data-dir={profile}", "--enable-logging=stderr", "--v=0"]
    return subprocess.run([*command, *options, url], capture_output=True, text=True, timeout=120, check=True)


def console_messages(errors: str) -> list[str]:
    """What the page itself said or failed to load; the browser's own complaints about the machine are others."""
    return [line for line in errors.splitlines() if re.search(r":CONSOLE|net::ERR", line)]


@pytest.fixture(scope="module")
def page(finished_run: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("report")
    _, url = write_report(finished_run.output_dir, str(output))
    return Path(url)


PROBE = """
<script>addEventListener("load", () => {
  document.querySelectorAll("details").forEach(one => one.open = true);
  const images = [...document.images].filter(i => i.complete && i.naturalWidth > 1000 && i.offsetHeight > 100);
  const tables = [...document.querySelectorAll("table")].map(t => t.ariaLabel + ":" + t.rows.length);
  const narrow = [...document.images].filter(i => i.naturalWidth < 1000).length;
  const paper = getComputedStyle(document.body).backgroundColor;
  const outside = performance.getEntriesByType("resource").filter(e => !e.name.startsWith("data:")).length;
  const wide = document.body.scrollWidth;
  document.title = JSON.stringify({images: images.length, tables, outside, narrow, paper, wide});
});</script></body>"""


def probe(text: str, folder: Path, width: int = 1200, *options: str) -> tuple[dict[str, Any], list[str]]:
    """What a script within a copy of the page counts after the browser has loaded it, and the console's messages."""
    copy = folder / "probe.html"
    copy.write_text(text.replace("</body>", PROBE))
    done = browse(copy, folder / "profile", f"--window-size={width},900", "--dump-dom", *options)
    found = re.search(r"<title>(.*?)</title>", done.stdout)
    assert found is not None
    return json.loads(unescape(found[1])), console_messages(done.stderr)


def test_plots_and_tables_show_without_an_error_and_without_the_network(page: Path, tmp_path: Path) -> None:
    facts, messages = probe(page.read_text(), tmp_path)
    assert messages == []
    assert facts["images"] == PLOTS_OF_A_RUN
    assert facts["outside"] == 0
    assert facts["wide"] == 1200, "the page must not scroll sideways"
    rows = dict(table.split(":") for table in facts["tables"])
    assert rows["Stages and jobs"] == "11"
    assert set(rows) == TABLES_OF_A_RUN


def test_a_phone_has_panels_below_each_other_and_does_not_scroll_the_page_sideways(page: Path, tmp_path: Path) -> None:
    facts, _ = probe(page.read_text(), tmp_path, width=500)  # no window of the browser is narrower
    assert facts["narrow"] == STACKED_OF_A_RUN
    assert facts["wide"] == 500


def test_a_dark_screen_has_a_dark_page_and_dark_pictures(page: Path, tmp_path: Path) -> None:
    dark, shot = "--blink-settings=preferredColorScheme=0", tmp_path / "page.png"
    facts, _ = probe(page.read_text(), tmp_path, 1200, dark)
    assert facts["paper"] == "rgb(26, 26, 26)"
    browse(page, tmp_path / "profile", dark, "--window-size=1200,3000", f"--screenshot={shot}")
    assert (imread(str(shot))[..., :3].mean(axis=-1) < 0.5).mean() > 0.8


def test_the_page_as_it_is_says_nothing_on_the_console(page: Path, tmp_path: Path) -> None:
    done = browse(page, tmp_path / "profile", "--dump-dom")
    assert console_messages(done.stderr) == []
    assert "finished: trained, assembled and evaluated" in done.stdout


def test_a_page_with_an_error_or_a_link_outside_is_found_out(tmp_path: Path) -> None:
    """The tests above can fail: a script error and an image from elsewhere are both seen."""
    bad = "<title></title><body><script>console.error('wrong')</script><img src='http://example.invalid/x.png'></body>"
    facts, messages = probe(bad, tmp_path)
    assert any("wrong" in message for message in messages)
    assert facts["outside"] == 1


def test_the_screenshot_is_not_blank(page: Path, tmp_path: Path) -> None:
    shot = tmp_path / "page.png"
    browse(page, tmp_path / "profile", "--window-size=1200,3000", f"--screenshot={shot}")
    picture = imread(str(shot))
    assert picture.shape[:2] == (3000, 1200)
    dark = (picture[..., :3].mean(axis=-1) < 0.5).mean()
    assert 0.005 < dark < 0.5
