# SPDX-License-Identifier: Apache-2.0
"""The page under /retrieval/ in headless Chromium, against a live server."""

import json
import shutil
import urllib.request
from decimal import ROUND_HALF_UP, Decimal

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)
SIZES = {"light": ("light", 1180, 900), "dark": ("dark", 1180, 900), "phone": ("light", 390, 844)}


def status(url):
    request = urllib.request.Request(f"{url}/retrieval/status", None, {"Authorization": "Bearer view"})
    with urllib.request.urlopen(request, timeout=30) as reply:
        return json.load(reply)


def check(url, folder, meanwhile):
    """Open it as a person would: wrong key, right key, light, dark, on a phone, by keyboard.

    ``meanwhile`` is called before each picture, which goes into ``folder``.
    """
    if CHROMIUM is None:
        pytest.skip("no Chromium here (Debian: chromium-headless-shell)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        said = []
        for name, (scheme, width, height) in SIZES.items():
            context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": height})
            shown = context.new_page()
            shown.on("console", lambda message: said.append(message.text))
            shown.on("pageerror", lambda error: said.append(str(error)))
            _open(shown, url)
            if name == "light":
                _check_values(shown, url)
                _check_reading(shown)
                _check_steering(shown, url)
            meanwhile()
            # Nothing sticks out: tables scroll within themselves.
            assert shown.evaluate("document.documentElement.scrollWidth <= innerWidth")
            shown.screenshot(path=folder / f"page-{name}.png", full_page=True)
            context.close()
        browser.close()
    refused = [text for text in said if "401" not in text]  # Chromium's own line for the wrong key
    assert not refused


def _first_paint(shown, url):
    """Milliseconds."""
    shown.goto(f"{url}/retrieval/")
    return shown.evaluate(
        "new Promise(done => new PerformanceObserver(list => done(list.getEntries()[0].startTime))"
        ".observe({type: 'paint', buffered: true}))"
    )


def _open(shown, url):
    assert min(_first_paint(shown, url) for _ in range(3)) <= 500  # the cores may be busy for a moment
    shown.get_by_label("RETRIEVAL_VIEW_KEY").fill("wrong")
    shown.keyboard.press("Enter")
    shown.get_by_text("wrong or no key").wait_for()
    shown.get_by_label("RETRIEVAL_VIEW_KEY").fill("view")
    shown.keyboard.press("Enter")
    shown.get_by_text("Requests that ended").wait_for()


def _tile(shown, name):
    return shown.locator(f"dd[data-name='{name}']").evaluate("element => element.firstChild.textContent")


def _percent(share):
    """As the page writes it. JavaScript rounds ties up, format() to even."""
    return f"{Decimal(100 * share).quantize(Decimal('0.1'), ROUND_HALF_UP)} %"


def _check_values(shown, url):
    """What the tiles say is what /status says; nothing runs meanwhile."""
    (engine,) = status(url)["engines"]
    shown.wait_for_timeout(1500)
    assert _tile(shown, "Requests running") == str(status(url)["running"]) == "0"
    assert _tile(shown, "Tokens on host") == str(engine["host_tokens"])
    assert _tile(shown, "Host memory") == _percent(engine["arena"]["used"] / engine["arena"]["capacity"])
    worst = max(group["output_error"] for group in engine["fidelity"])
    assert _tile(shown, "Output error") == _percent(worst)
    assert _tile(shown, "Recall@100") == _percent(min(group["recall"] for group in engine["fidelity"]))
    assert shown.locator("#workers tbody tr").count() == engine["workers"]["wanted"]
    problems = status(url)["problems"]
    assert (shown.locator("#verdict-line").inner_text() == "All is well.") is not bool(problems)
    for said, problem in zip(shown.locator("#problems li").all_inner_texts(), problems, strict=True):
        assert said == f"{problem['what']} {problem['do']}"


def _check_reading(shown):
    """Every picture has its newest values in words, every control a name, every table its heads."""
    pictures = shown.locator("svg[role=img]")
    assert pictures.count() == 6
    for label in pictures.evaluate_all("all => all.map(one => one.getAttribute('aria-label'))"):
        assert ":" in label
    controls = shown.locator("button, input").evaluate_all(NAMES)
    assert all(controls)
    assert shown.locator("table caption").count() == 3
    assert shown.locator("th:not([scope])").count() == 0
    # Contrast of text on its ground, as WCAG 2 has it for small text.
    assert shown.evaluate(CONTRAST) >= 4.5
    shown.keyboard.press("Tab")
    shown.get_by_role("button", name="Dark").click()
    assert shown.evaluate(CONTRAST) >= 4.5
    shown.get_by_role("button", name="Light").click()


NAMES = """all => all.map(one =>
  (one.getAttribute("aria-label") || one.textContent || one.labels?.[0]?.textContent || "").trim())"""
CONTRAST = """() => {
  const channel = c => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const light = name => {
    const probe = document.createElement("i");
    probe.style.color = `var(--${name})`;
    document.body.append(probe);
    const [r, g, b] = getComputedStyle(probe).color.match(/[0-9.]+/g).map(Number);
    probe.remove();
    return 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  };
  const pairs = [["ink", "ground"], ["ink", "card"], ["soft", "ground"], ["soft", "card"], ["ink", "good-ground"],
                 ["ink", "warn-ground"], ["soft", "warn-ground"]];
  return Math.min(...pairs.map(([a, b]) => {
    const [x, y] = [light(a), light(b)].sort((p, q) => q - p);
    return (x + 0.05) / (y + 0.05);
  }));
}"""


def _check_steering(shown, url):
    """Drain and back by the page, with the admin key; without it, the page says what is missing."""
    shown.on("dialog", lambda dialog: dialog.accept())
    shown.get_by_text("Change something").click()
    shown.get_by_role("button", name="Drain").click()
    shown.locator("#answer", has_text="wrong or no key").wait_for()
    shown.get_by_label("RETRIEVAL_ADMIN_KEY").fill("admin")
    shown.get_by_role("button", name="Drain").click()
    shown.get_by_text("This server is draining").wait_for()
    assert status(url)["draining"]
    assert "POST /retrieval/undrain" in shown.locator("#problems").inner_text()
    assert shown.locator("#verdict-line").inner_text() != "All is well."
    shown.get_by_role("button", name="Take requests again").click()
    shown.get_by_text("This server is draining").wait_for(state="detached")
    shown.get_by_role("textbox", name="rows").fill("900")
    shown.get_by_role("button", name="Change").click()
    shown.locator("#answer", has_text='"rows":900').wait_for()
