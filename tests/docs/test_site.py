"""The site of zensical.toml, built: links lead somewhere, search finds what people look for, nothing overflows."""

from __future__ import annotations

import functools
import http.server
import json
import re
import shutil
import subprocess
import sys
import threading
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--remote-debugging-port=0"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1000,800"),
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("zensical") is None, reason="no zensical here (the docs extra has it)"),
]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """--strict stops at broken links and unknown names, but lets complaints about docstrings pass."""
    folder = tmp_path_factory.mktemp("site")
    for name in ("docs", "fastlora"):  # copies, so that the site and its cache are not written into the checkout
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "zensical.toml", folder)
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    words = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    assert done.returncode == 0, words
    assert sorted(line.split()[0] for line in words) == ["Build", "Build", "No"], words  # started, finished; no issues
    return folder / "runs" / "docs"


class Page(HTMLParser):
    """What a page links to and loads, the names that can be linked to, and its text outside and inside of code."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.names: set[str] = set()
        self.prose: list[str] = []
        self._code = 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = {name: value for name, value in attrs if value}
        self.names |= {values[key] for key in ("id", "name") if key in values}
        self._code += tag in ("pre", "script")
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if "src" in values or (tag == "link" and values.get("rel") in ("stylesheet", "preload", "icon")):
            self.loaded.append(values.get("src") or values["href"])

    def handle_endtag(self, tag):
        self._code -= tag in ("pre", "script")

    def handle_data(self, data):
        if not self._code:
            self.prose.append(data)


@pytest.fixture(scope="module")
def pages(site):
    """By their addresses: "", "quickstart/loop/", ..."""
    found = [path for path in site.rglob("index.html")]
    return {
        path.parent.relative_to(site).as_posix().removeprefix(".") + "/" * (path.parent != site): Page(
            path.read_text(encoding="utf-8")
        )
        for path in found
    }


def test_no_link_is_dead_and_nothing_is_loaded_from_elsewhere(site, pages):
    dead = []
    for address, page in pages.items():
        assert not [source for source in page.loaded if urlsplit(source).netloc], address
        for link in page.links + page.loaded:
            parts = urlsplit(urljoin(f"http://site/{address}", link))
            if parts.netloc != "site":
                continue
            target = unquote(parts.path).lstrip("/")
            known = target in pages or (target and (site / target).is_file())
            if not known or (parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].names):
                dead.append(f"{address or 'index'}: {link}")
    assert len(pages) > 20 and sum(len(page.links) for page in pages.values()) > 500
    assert dead == []


def test_the_reference_shows_examples_as_blocks(site, pages):
    patch = (site / "api" / "models" / "index.html").read_text(encoding="utf-8")
    assert "pissa_niter_&lt;" in patch  # a docstring's <words> are not taken for tags
    assert patch.count('class="gp"') > 10
    assert [name for name, page in pages.items() if name.startswith("api/") and ">>>" in "".join(page.prose)] == []


def test_formulas_are_typeset(site):
    text = (site / "details" / "lora_ga_maths" / "index.html").read_text(encoding="utf-8")
    assert text.count('<math xmlns="http://www.w3.org/1998/Math/MathML" display="block">') >= 5
    assert "\\frac" not in text and "<mfrac>" in text


def test_pages_have_a_dark_mode_and_those_of_the_navigation_a_way_on(site, pages):
    for address in pages:
        text = (site / address / "index.html").read_text(encoding="utf-8")
        assert 'data-md-color-scheme="slate"' in text, address
        if not address.startswith(("details/", "kernels/")):  # reached from the guides that they belong to
            assert "md-footer__link--next" in text or "md-footer__link--prev" in text, address


@pytest.mark.parametrize("query", ["vLLM", "SFTTrainer", "QLoRA", "out of memory", "cite"])
def test_search_finds(site, query):
    """A section of the index that the browser searches has every word of the query, as a word."""
    index = json.loads((site / "search.json").read_text(encoding="utf-8"))
    split = re.compile(index["config"]["separator"])
    sections = [re.sub("<[^>]+>", " ", f"{item['title']} {item['text']}").lower() for item in index["items"]]
    assert any(set(query.lower().split()) <= set(split.split(section)) for section in sections)


# Put first into every page: what goes wrong while it loads.
WATCH = """<script>
window.problems = [];
addEventListener("error", e => problems.push(e.message || "does not load: " + (e.target.src || e.target.href)), true);
addEventListener("unhandledrejection", e => problems.push(String(e.reason)));
for (const kind of ["error", "warn"]) console[kind] = (...words) => problems.push(words.join(" "));
</script>"""

# Opens every page in a frame 1,000 px wide and posts its problems: errors, and what is wider than the page's column and
# neither scrolls itself nor lies in something that does.
CHECK = """<!doctype html><body style="margin: 0"><script>
const problems = (frame) => {
  const page = frame.contentDocument, found = [...frame.contentWindow.problems];
  if (page.documentElement.scrollWidth > 1000) found.push(`the page is ${page.documentElement.scrollWidth} px wide`);
  const column = page.querySelector(".md-content").getBoundingClientRect();
  for (const element of page.querySelectorAll("article :is(table, pre, code, img, math)")) {
    let box = element;
    for (let outer = element; outer.tagName != "ARTICLE"; outer = outer.parentElement)
      if (["auto", "scroll"].includes(frame.contentWindow.getComputedStyle(outer).overflowX)) box = outer;
    const {left, right} = box.getBoundingClientRect();
    if (right > column.right + 1 || left < column.left - 1)
      found.push(`${element.tagName}, ${left} to ${right} px: ${element.textContent.trim().slice(0, 60)}`);
  }
  return found;
};
(async () => {
  const report = {};
  for (const address of PAGES) {
    const frame = document.createElement("iframe");
    frame.style = "width: 1000px; height: 800px; border: 0";
    frame.src = "/" + address;
    const loaded = new Promise(done => frame.onload = done);
    document.body.append(frame);
    await loaded;
    await new Promise(done => setTimeout(done, 50));  // the theme's script wraps tables
    report[address] = problems(frame);
    frame.remove();
  }
  return report;
})().catch(error => ({failed: [String(error.stack)]}))
  .then(report => fetch("/report", {method: "POST", body: JSON.stringify(report)}));
</script>"""


class Server(http.server.ThreadingHTTPServer):
    """The site, with WATCH in each page, and the page of CHECK at /check; what it posts is `report`."""

    def __init__(self, site: Path, pages) -> None:
        super().__init__(("127.0.0.1", 0), functools.partial(Handler, directory=str(site)))
        self.check = CHECK.replace("PAGES", json.dumps(sorted(pages)))
        self.report: dict[str, list[str]] = {}
        self.arrived = threading.Event()


class Handler(http.server.SimpleHTTPRequestHandler):
    server: Server  # type: ignore[assignment]

    def do_GET(self):
        path = Path(self.translate_path(self.path))
        path = path / "index.html" if path.is_dir() else path
        if self.path != "/check" and path.suffix != ".html":
            return super().do_GET()
        page = self.server.check if self.path == "/check" else path.read_text(encoding="utf-8")
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.end_headers()
        self.wfile.write(page.replace("<head>", "<head>" + WATCH).encode())

    def do_POST(self):
        self.server.report = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(204)
        self.end_headers()
        self.server.arrived.set()

    def log_message(self, *words):
        pass


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (on Debian: apt-get install chromium)")
def test_nothing_overflows_and_no_error_appears_at_1000_pixels(site, pages, tmp_path):
    log = tmp_path / "chromium.log"
    with Server(site, pages) as server, log.open("wb") as file:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/check"
        command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", address]
        browser = subprocess.Popen(command, stdout=file, stderr=file)
        try:
            assert server.arrived.wait(240), log.read_text(errors="replace")[-2000:]
        finally:
            browser.terminate()
            browser.wait(30)
            server.shutdown()
    assert sorted(server.report) == sorted(pages), server.report
    assert [f"{page}: {problem}" for page, found in server.report.items() for problem in found] == []
