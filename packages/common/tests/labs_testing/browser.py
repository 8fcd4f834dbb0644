"""Opens reports in a headless Chromium, as readers do: on a phone and on a desk, light and dark, printed; and demos."""

import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

A4 = 718  # pixels between the margins
VIEWS = {"phone": (390, 844), "desk": (1280, 900)}
# What is wrong with the page as it stands: things wider than the window, Persian that runs the wrong way, blurred or
# broken pictures, contrast of text too low to read.
FAULTS = """() => {
  const faults = [];
  const wide = document.documentElement.scrollWidth - window.innerWidth;
  if (wide > 1) faults.push(`${wide} pixels are cut off at the right`);
  for (const one of document.querySelectorAll("h1, h2, p, td, th, figcaption, pre, svg, img")) {
    const box = one.getBoundingClientRect();
    const scrolls = !matchMedia("print").matches && one.closest(".wide, pre");
    if (box.width && (box.left < -1 || (box.right > window.innerWidth + 1 && !scrolls)))
      faults.push(`<${one.tagName}> leaves the window: ${one.textContent.slice(0, 40)}`);
  }
  for (const one of document.querySelectorAll("[dir=auto]")) {
    const first = one.textContent.match(/\\p{L}/u);
    if (first && /\\p{Script=Arabic}/u.test(first[0]) && getComputedStyle(one).direction !== "rtl")
      faults.push(`Persian runs left to right: ${one.textContent.slice(0, 40)}`);
  }
  for (const one of document.images)
    if (!one.complete || !one.naturalWidth) faults.push(`a picture is broken: ${one.alt}`);
    else if (one.naturalWidth < one.width && getComputedStyle(one).imageRendering !== "pixelated")
      faults.push(`a picture is blurred: ${one.alt}`);
  const light = colour => {
    const [r, g, b] = colour.match(/[\\d.]+/g).map(part => {
      const share = part / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const back = light(getComputedStyle(document.body).backgroundColor);
  for (const one of document.querySelectorAll("p, td, th, figcaption, h1, h2, a")) {
    const ink = light(getComputedStyle(one).color);
    const contrast = (Math.max(ink, back) + 0.05) / (Math.min(ink, back) + 0.05);
    if (contrast < 4.5) { faults.push(`contrast ${contrast.toFixed(1)} of <${one.tagName}>`); break; }
  }
  return faults;
}"""


def faults_of(pages: Sequence[Path], pictures: Path | None = None, every: bool = True) -> list[str]:
    """What is wrong with reports on a phone and a desk, light and dark, and printed; skips without a browser.

    Without `every` a page is seen twice: on a desk in light, on a phone in dark colours.

    A message on the console, a request to any network and a script that fails are faults too. Screenshots and PDFs go
    to the directory `pictures`.
    """
    faults: list[str] = []

    def look(browser: Any) -> None:
        for page in pages:
            for name, (width, height) in VIEWS.items():
                for scheme in ("light", "dark"):
                    if not every and (name, scheme) not in (("desk", "light"), ("phone", "dark")):
                        continue
                    tab = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
                    found = _opened(tab, page)
                    shot = f"{page.parent.name}-{name}-{scheme}.png"
                    if pictures is not None:
                        tab.screenshot(path=pictures / shot, full_page=True)
                    if (name, scheme) == ("desk", "light"):
                        found += _sorted(tab)
                        printed = tab.pdf(path=pictures and pictures / f"{page.parent.name}.pdf", format="A4")
                        found += [] if printed.startswith(b"%PDF") else ["cannot be printed"]
                        # Paper has no scroll bars: in the width of A4 without its margins everything must fit.
                        tab.emulate_media(media="print")
                        tab.set_viewport_size({"width": A4, "height": 1000})
                        found += [f"printed: {fault}" for fault in tab.evaluate(FAULTS)]
                    faults.extend(f"{page}, {name}, {scheme}: {fault}" for fault in found)
                    tab.close()

    _in_browser(look)
    return faults


def visited(page: Any, visit: Callable[[Any], None]) -> None:
    """Serves a page of gradio, opens it in a tab, which `visit` uses, and closes it; skips without a browser."""

    def look(browser: Any) -> None:
        tab = browser.new_page()
        tab.goto(url)
        visit(tab)

    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1", share=False)
    try:
        _in_browser(look)
    finally:
        page.close()


def _opened(tab: Any, page: Path) -> list[str]:
    found: list[str] = []
    tab.on("console", lambda message: found.append(f"console: {message.text}"))
    tab.on("pageerror", lambda error: found.append(f"script: {error}"))
    tab.on("request", lambda request: found.append(f"request: {request.url}") if _outside(request.url) else None)
    tab.goto(page.absolute().as_uri())
    tab.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    return found + tab.evaluate(FAULTS)


def _outside(address: str) -> bool:
    return not address.startswith(("file:", "data:", "blob:"))


def _sorted(tab: Any) -> list[str]:
    """Clicks on a column of numbers: its rows must come in order, and back."""
    heads = tab.locator("th.number")
    for place in range(min(2, heads.count())):
        head = heads.nth(place)
        head.click()
        values = head.evaluate(
            """head => [...head.closest("table").tBodies[0].rows].map(row => row.cells[head.cellIndex].innerText)
              .map(text => parseFloat(text.replace(/,/g, ""))).filter(value => !isNaN(value))"""
        )
        if values not in (sorted(values), sorted(values, reverse=True)):
            return [f"a table is not sorted: {values[:6]}"]
    return []


def _in_browser(look: Callable[[Any], None]) -> None:
    """Gives `look` a browser, in a thread: pytest's own may have an event loop, in which playwright does not run."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright to drive a browser")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no Chromium on this machine")
    failures: list[BaseException] = []

    def caught() -> None:
        try:
            with sync_api.sync_playwright() as playwright:
                browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
                look(browser)
                browser.close()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=caught)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
