"""The playground in a real browser: the system's Chromium, on a real JupyterLab, Notebook 7 and Voila.

Without Chromium these tests are skipped, in CI they fail. `SCREENSHOTS=figures pytest tests/test_playground_browser.py
-k proxy` writes figures/playground.png, from a real trained run.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect, sync_playwright
from reciting import HOSTILE

from mini_symposium.data.prompt_formats import load_preset
from mini_symposium.run import ROOT

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(
    not CHROMIUM and not os.environ.get("CI"), reason="no chromium; install it, for example by apt-get install chromium"
)
ARGUMENTS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
SETTINGS = {
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},
    "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False},
}
WAIT = 180_000


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)


@pytest.fixture(scope="module")
def serve(tmp_path_factory):
    """Start servers of one notebook: `serve("lab", "notebook" or "voila", run)` is its address, opened on that run."""
    started = []

    def start(kind: str, run) -> str:
        home = tmp_path_factory.mktemp(kind)
        shutil.copy(ROOT / "notebooks" / "07_playground.ipynb", home)
        (home / "labconfig").mkdir()
        (home / "labconfig" / "default_setting_overrides.json").write_text(json.dumps(SETTINGS))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        editor = ["--allow-root", f"--ServerApp.root_dir={home}", "--IdentityProvider.token="]
        command = {
            "lab": ["jupyterlab", *editor],
            "notebook": ["notebook", *editor],
            "voila": ["voila", "07_playground.ipynb"],
        }[kind]
        names = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR", "HOME")
        own = {name: str(home) for name in names if name != "HOME"} | {"MINI_SYMPOSIUM_RUN": str(run.path)}
        env = {k: v for k, v in os.environ.items() if k != "MINI_SYMPOSIUM_HEADLESS"} | own
        env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        line = [sys.executable, "-m", *command, "--no-browser", f"--port={port}"]
        with (home / "log").open("w") as log:
            started.append(subprocess.Popen(line, cwd=home, env=env, stdout=log, stderr=log))
        address = f"http://127.0.0.1:{port}/"
        for _ in range(300):
            try:
                if kind == "voila":  # asked for the page, it would start a kernel
                    socket.create_connection(("127.0.0.1", port)).close()
                else:
                    urllib.request.urlopen(address + "api").close()
                break
            except OSError:
                assert started[-1].poll() is None, (home / "log").read_text()[-3000:]
                time.sleep(0.1)
        return address + {"lab": "lab/tree/07_playground.ipynb", "notebook": "notebooks/07_playground.ipynb"}.get(
            kind, ""
        )

    yield start
    for process in started:
        process.terminate()
    for process in started:
        process.wait(30)


def open_page(browser, kind: str, address: str) -> Page:
    """A tab with the playground in it, its models loaded."""
    page = browser.new_context(viewport={"width": 1280, "height": 1100}, accept_downloads=True).new_page()
    page.set_default_timeout(WAIT)
    page.goto(address)
    if kind != "voila":
        expect(page.get_by_title("Python 3").first).to_be_visible(timeout=WAIT)
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_text("Run All Cells", exact=True).click()
    status(page, "ready:")
    return page


def status(page: Page, says: str) -> None:
    expect(page.locator(".ms-status")).to_contain_text(says, timeout=WAIT)


def press(page: Page, name: str) -> None:
    page.locator(".ms").get_by_role("button", name=name, exact=True).click()


def fill(page: Page, label: str, text: str) -> None:
    field = page.locator(".ms").get_by_label(label, exact=True)
    field.fill(text)
    field.press("Tab")


def inspect_by_keyboard(page: Page):
    """The inspector, with the first card's prompt in it."""
    page.get_by_role("button", name="Inspect prompt").first.focus()
    page.keyboard.press("Enter")
    return page.get_by_label("Prompt inspector")


@pytest.fixture(scope="module", params=["lab", "voila"])
def page(request, browser, serve, reciting_run):
    return open_page(browser, request.param, serve(request.param, reciting_run))


def test_type_choose_generate_and_what_is_recited_is_underlined_and_stays_text(page, tmp_path):
    fill(page, "Query", "Show me a picture.")
    for chip in ("character", "alpaca", "### Software Engineer"):
        page.get_by_role("button", name=re.compile(f"✓.{chip}")).click()
    page.get_by_label("Models").select_option(["base", "1e-03/epoch-0"])
    press(page, "Generate")
    status(page, "2 answers in")
    card = page.locator(".ms-card article").first
    expect(card).to_contain_text(HOSTILE[:44])
    expect(card).to_contain_text("100% recited from row 1")
    expect(card.locator(".ms-recited").first).to_have_css("text-decoration-line", "underline")
    expect(card).to_contain_text("[row 1]")
    assert page.locator(".ms-card img").count() == 0
    assert page.title() != "owned"
    page.screenshot(path=tmp_path / "compare.png", full_page=True)
    assert (tmp_path / "compare.png").stat().st_size > 10_000


def test_text_grows_stop_keeps_it_and_a_second_generate_is_answered(page):
    page.locator(".ms").get_by_text("Sampling", exact=True).click()
    fill(page, "temperature (0: greedy)", "5")
    fill(page, "max_new_tokens", "3000")
    press(page, "Generate")
    answer = page.locator(".ms-answer").first
    lengths = []
    for _ in range(3):
        page.wait_for_function(
            "n => document.querySelector('.ms-answer').innerText.length > n", arg=sum(lengths[-1:]) + 50
        )
        lengths.append(len(answer.inner_text()))
    assert lengths == sorted(set(lengths))
    press(page, "Generate")
    status(page, "Problem: Generate is still running")
    press(page, "Stop")
    status(page, "answers stopped after")
    assert len(answer.inner_text()) >= lengths[-1]
    expect(page.locator(".ms-card footer").first).to_contain_text("stopped")
    press(page, "Reset to greedy")
    fill(page, "max_new_tokens", "40")


def test_a_card_shows_its_prompt_and_tokens_by_keyboard(page):
    fill(page, "Query", "Why is the sky blue?")
    press(page, "Generate")
    status(page, "2 answers in")
    expect(page.locator(".ms-card article").first).to_contain_text("[Han]")
    inspector = inspect_by_keyboard(page)
    expect(inspector.locator("pre")).to_have_text("### New Query\nWhy is the sky blue?\n\n### Complete Response\n")
    expect(inspector.locator(".ms-special")).to_have_text("<s>")
    expect(inspector).to_contain_text("1 special")


def test_the_epoch_slider_walks_into_recitation_by_keyboard(page):
    page.get_by_role("tab", name="Epochs").click()
    fill(page, "Query", "Show me a picture.")
    press(page, "Generate epochs")
    status(page, "3 answers in")
    here = page.locator(".ms-here")
    expect(here).to_contain_text("▸ 0")
    page.get_by_role("slider").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(here).to_contain_text("100%")
    expect(here).to_contain_text("▸ 2")
    expect(page.locator(".ms-card article:visible").first).to_contain_text("100% recited from row 1")


def test_a_chat_answers_in_two_formats_and_the_names_are_in_the_prompts(page):
    page.get_by_role("tab", name="Character chat").click()
    page.get_by_label("Model", exact=True).select_option("base")
    fill(page, "User's name", "Ada")
    fill(page, "Message", "Show me a picture.")
    press(page, "Send")
    status(page, "2 answers in")
    panes = page.locator(".ms-card article:visible")
    expect(panes).to_have_count(2)
    expect(panes.first).to_contain_text("Ada")
    expect(panes.first.locator("header")).to_contain_text("character")
    expect(panes.nth(1).locator("header")).to_contain_text("alpaca")
    expect(page.get_by_label("Message", exact=True)).to_have_value("")


def test_a_preset_is_uploaded_and_another_downloaded_and_a_broken_one_is_said(page, tmp_path):
    def upload(name: str, text: str) -> None:
        (tmp_path / name).write_text(text)
        with page.expect_file_chooser() as chooser:
            page.get_by_role("button", name=re.compile("Load SillyTavern preset")).click()
        chooser.value.set_files(tmp_path / name)

    upload("broken.json", "{")
    status(page, "Problem: broken.json:1: not JSON")
    evil = "<img src=x onerror=1>"
    upload("good.json", json.dumps({"name": evil, "input_sequence": "> ", "output_sequence": "< "}))
    status(page, f"good.json: the preset {evil} was added")
    expect(page.get_by_role("button", name=re.compile(f"✓.{evil}"))).to_be_visible()
    assert page.locator(".ms img").count() == 0
    page.get_by_role("tab", name="Keep").click()
    page.get_by_label("Format", exact=True).locator("visible=true").select_option(evil)
    press(page, "Export preset")
    with page.expect_download() as download:
        page.get_by_role("link", name=re.compile("Download")).click()
    download.value.save_as(tmp_path / "back.json")
    assert load_preset(tmp_path / "back.json").input_sequence == "> "
    press(page, "Save session")
    expect(page.get_by_role("link", name=re.compile(r"session-.*\.md"))).to_be_visible()
    page.get_by_role("tab", name="Compare").click()


def test_bad_input_is_said_and_the_page_stays_usable(page, tmp_path):
    fill(page, "Query", "word " * 20_000)
    press(page, "Generate")
    status(page, "Problem: the query has 100,000 characters")
    fill(page, "Run", str(tmp_path))
    press(page, "Open")
    status(page, "a run")
    fill(page, "Query", "Show me a picture.")
    press(page, "Generate")
    status(page, "answers in")


def test_notebook_7_shows_the_page_too(browser, serve, reciting_run):
    page = open_page(browser, "notebook", serve("notebook", reciting_run))
    fill(page, "Query", "Show me a picture.")
    press(page, "Generate")
    status(page, "answers in")
    expect(page.locator(".ms-card article").first).to_contain_text("100% recited from row 1")
    expect(inspect_by_keyboard(page).locator("pre")).to_contain_text("Show me a picture.")


def test_two_tabs_of_one_kernel_show_the_same(browser, serve, reciting_run):
    address = serve("lab", reciting_run)
    one = open_page(browser, "lab", address)
    one.keyboard.press("Control+s")
    other = one.context.new_page()
    other.goto(address.replace("/lab/", "/lab/workspaces/other/"))
    expect(other.locator(".ms-status")).to_contain_text("ready", timeout=WAIT)
    fill(one, "Query", "Show me a picture.")
    expect(other.locator(".ms").get_by_label("Query", exact=True)).to_have_value("Show me a picture.")
    press(other, "Generate")
    for tab in (one, other):
        status(tab, "answers in")
        expect(tab.locator(".ms-card article").first).to_contain_text("100% recited from row 1")


def test_on_the_proxy_a_trained_run_recites_in_the_page(browser, serve, proxy_run):
    page = open_page(browser, "voila", serve("voila", proxy_run))
    press(page, "Generate")
    status(page, "12 answers in")
    recited = page.locator(".ms-card article", has_text="1e-03/epoch-15")
    expect(recited.locator(".ms-recited").first).to_be_visible()
    base = page.locator(".ms-card article", has=page.locator("header span", has_text="base"))
    assert base.locator(".ms-recited").count() == 0
    page.get_by_role("button", name="Inspect prompt").first.click()
    expect(page.get_by_label("Prompt inspector")).to_be_visible()
    where = os.environ.get("SCREENSHOTS")
    page.screenshot(path=Path(where or proxy_run.path) / "playground.png", full_page=True)
