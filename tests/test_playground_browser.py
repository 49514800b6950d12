"""The playground, and notebook 02's Stop button, in a real browser: the system's Chromium, on a real JupyterLab,
Notebook 7 and Voila.

Without Chromium these tests are skipped, in CI they fail. `python -m playground_picture` takes README's picture.
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import axe_playwright_python
import pytest
import torch
from browser import ARGUMENTS, CHROMIUM, TIMED, slider_answers
from browser import serve as start_server
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright
from reciting import HOSTILE
from safetensors.torch import load_file

from mini_symposium.data.dataset import load_examples, write_axolotl_jsonl
from mini_symposium.data.prompt_formats import load_preset
from mini_symposium.recipe import load_recipe
from mini_symposium.release.report import write_report
from mini_symposium.run import ROOT, RunDirectory, open_run
from mini_symposium.training.finetune import train

pytestmark = pytest.mark.skipif(
    not CHROMIUM and not os.environ.get("CI"), reason="no chromium; install it, for example by apt-get install chromium"
)
WAIT = 180_000


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)


@pytest.fixture(scope="module")
def serve(tmp_path_factory):
    """`serve("lab", "notebook" or "voila", run)` is the address of a server of notebook 07, as `browser.serve`."""
    started = []

    def start(kind: str, run: RunDirectory, *more) -> str:
        server, address = start_server(kind, tmp_path_factory.mktemp(kind), run.path, *more)
        started.append(server)
        return address

    yield start
    for server in started:
        server.terminate()
    for server in started:
        server.wait(30)


def open_page(browser, kind: str, address: str) -> Page:
    """A tab with the playground in it, its models loaded."""
    page = browser.new_context(viewport={"width": 1280, "height": 1100}, accept_downloads=True).new_page()
    page.set_default_timeout(WAIT)
    page.add_init_script(TIMED)
    page.goto(address)
    if kind != "voila":
        run_all(page)
    status(page, "answers in")  # to the first query, without a click
    return page


def run_all(page: Page) -> None:
    expect(page.get_by_title("Python 3").first).to_be_visible(timeout=WAIT)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()


def status(page: Page, says: str) -> None:
    expect(page.locator(".ms-status")).to_contain_text(says, timeout=WAIT)


def press(page: Page, name: str) -> None:
    page.locator(".ms").get_by_role("button", name=name, exact=True).click()


def fill(page: Page, label: str, text: str) -> None:
    field = page.locator(".ms").get_by_label(label, exact=True)
    field.fill(text)
    field.press("Tab")


def choose(page: Page, *models: str) -> None:
    """Press those buttons of models that are not as they should be."""
    chips = page.locator(".ms-chips").nth(1).get_by_role("button")
    for chip in chips.all():
        if ("mod-active" in chip.get_attribute("class")) != (chip.inner_text() in models):
            chip.click()


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
    choose(page, "base", "1e-03/epoch-0")
    press(page, "Generate")
    status(page, "2 answers in")
    card = page.locator(".ms-grid article").first
    expect(card).to_contain_text(HOSTILE[:44])
    expect(card).to_contain_text("100% recited from row 1")
    expect(card.locator(".ms-recited").first).to_have_css("text-decoration-line", "underline")
    expect(card).to_contain_text("[row 1]")
    assert page.locator(".ms-grid img").count() == 0
    assert page.title() != "owned"
    page.screenshot(path=tmp_path / "compare.png", full_page=True)
    assert (tmp_path / "compare.png").stat().st_size > 10_000


def test_text_grows_stop_keeps_it_and_a_second_generate_waits(page):
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
    status(page, "Generate is still running · next: Generate")
    press(page, "Stop")
    status(page, "answers stopped after")
    assert len(answer.inner_text()) >= lengths[-1]
    expect(page.locator(".ms-grid footer").first).to_contain_text("stopped")
    press(page, "Reset to greedy")
    fill(page, "max_new_tokens", "40")


def test_a_card_shows_its_prompt_and_tokens_by_keyboard(page):
    fill(page, "Query", "Why is the sky blue?")
    press(page, "Generate")
    status(page, "2 answers in")
    expect(page.locator(".ms-grid article").first).to_contain_text("[Han]")
    inspector = inspect_by_keyboard(page)
    expect(inspector.locator("pre")).to_have_text("### New Query\nWhy is the sky blue?\n\n### Complete Response\n")
    expect(inspector.locator(".ms-special")).to_have_text("<s>")
    expect(inspector).to_contain_text("1 special")


def test_the_epoch_slider_walks_into_recitation_by_keyboard(page):
    page.get_by_role("tab", name="Epochs and strengths").click()
    fill(page, "Query", "Show me a picture.")
    press(page, "Generate all")
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

    page.locator(".ms").get_by_text("More formats", exact=True).click()
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
    page.locator(".ms").get_by_text("Another run", exact=True).click()
    fill(page, "Run", str(tmp_path))
    press(page, "Open")
    status(page, "a run")
    fill(page, "Query", "Show me a picture.")
    press(page, "Generate")
    status(page, "answers in")


@pytest.mark.parametrize("page", ["voila"], indirect=True)  # of so small a window JupyterLab leaves nothing
@pytest.mark.parametrize("turned", [False, True])
def test_heads_stay_in_sight_and_on_a_narrow_page_a_card_at_a_time(page, turned):
    page.get_by_role("button", name="Models as columns").click()
    if not turned:
        page.get_by_role("button", name="Models as columns").click()
    grid = page.locator(".ms-grid")
    column, row = grid.locator("> .ms-top").nth(2), grid.locator("> .ms-left").last
    expect(column if turned else row).to_contain_text("1e-03/epoch-")
    card = grid.locator("> .widget-vbox:not(.ms-row)").nth(1)  # the first row's, in the second column
    for width, height in ((1280, 420), (380, 520)):
        page.set_viewport_size({"width": width, "height": height})
        grid.scroll_into_view_if_needed()
        grid.evaluate("e => e.scrollTo({left: 0, top: 0})")
        frame = grid.bounding_box()
        if width == 1280:  # the same row, the same column
            assert abs(card.bounding_box()["x"] - column.bounding_box()["x"]) < 2
            assert grid.locator("> .ms-left").first.bounding_box()["y"] == card.bounding_box()["y"]
        else:
            assert card.bounding_box()["width"] > 0.95 * frame["width"]
            assert page.evaluate("document.documentElement.scrollWidth") <= 380
        grid.evaluate("e => e.scrollTo({left: e.clientWidth, top: 1e6})")
        expect(column).to_be_in_viewport()
        expect(row.locator(".ms-name")).to_be_in_viewport()
        assert abs(column.bounding_box()["y"] - frame["y"]) < 3
    page.set_viewport_size({"width": 1280, "height": 1100})
    if turned:
        page.get_by_role("button", name="Models as columns").click()


def test_a_slider_answers_at_its_strength_by_keyboard(page):
    fill(page, "Query", "Show me a picture.")
    choose(page, "base", "1e-03/epoch-0")
    press(page, "Generate")
    status(page, "answers in")
    cards = page.locator(".ms-grid article")
    card = cards.nth(cards.count() // 2)  # the second row's, in the first format
    base, trained = cards.first.locator(".ms-answer"), card.locator(".ms-answer")
    expect(trained).not_to_have_text(base.inner_text())
    slider_answers(page)
    slider = page.get_by_role("slider", name="strength 1e-03/epoch-0")
    status(page, "1e-03/epoch-0 x 0:")
    expect(trained).to_have_text(base.inner_text())
    expect(card.locator("header")).to_contain_text("1e-03/epoch-0 x 0")
    slider.focus()
    page.keyboard.press("End")
    status(page, "1e-03/epoch-0 x 1.5:")
    page.get_by_label("Show differences from", exact=True).select_option("base")
    expect(trained.locator("ins").first).to_be_visible()
    page.get_by_label("Show differences from", exact=True).select_option("nothing")


def test_a_blind_test_by_key_tells_at_the_end_who_is_who_and_the_session_can_be_taken_along(page, tmp_path):
    page.get_by_role("tab", name="Blind test").click()
    page.get_by_label("Second model", exact=True).select_option("1e-03/epoch-0")
    fill(page, "Queries, one a line", "Show me a picture.\nWhy is the sky blue?")
    press(page, "Start")
    status(page, "2 pairs; vote")
    vote = page.get_by_label(re.compile("Vote by key"))
    for said in ("Pair 1 of 2", "Pair 2 of 2"):
        expect(page.get_by_text(said)).to_be_visible()
        visible = page.locator(".ms-card article:visible")
        left = visible.first.inner_text()
        vote.press("1" if HOSTILE[:44] in left or "天空" in left else "2")
        expect(vote).to_have_value("")
    status(page, "base in new-query: 2 votes. 1e-03/epoch-0 in new-query: 0 votes.")
    page.get_by_role("tab", name="Keep").click()
    press(page, "Save session")
    status(page, ".html")
    with page.expect_download() as download:
        page.get_by_role("link", name=re.compile(r"session-.*\.html")).click()
    download.value.save_as(tmp_path / "session.html")
    saved = page.context.new_page()
    saved.goto((tmp_path / "session.html").as_uri())
    expect(saved.locator("p").last).to_contain_text("Blind test: base in new-query: 2 votes.")
    assert saved.title() == "Playground session" and saved.locator("img").count() == 0
    saved.close()
    page.get_by_role("tab", name="Compare").click()


AXE = (Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text(encoding="utf-8")


@pytest.mark.parametrize("width", [1280, 380])
def test_axe_finds_nothing_serious_in_light_or_dark(page, width):
    page.set_viewport_size({"width": width, "height": 1100})
    page.evaluate(AXE + "; undefined")
    for tab in ("Epochs and strengths", "Character chat", "Blind test", "Keep", "Compare"):
        page.get_by_role("tab", name=tab).click()
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            found = page.evaluate("() => axe.run('.ms')")["violations"]
            serious = [
                (each["id"], each["nodes"][0]["html"]) for each in found if each["impact"] in ("serious", "critical")
            ]
            assert serious == [], (tab, scheme)
    page.emulate_media(color_scheme="light")
    page.set_viewport_size({"width": 1280, "height": 1100})


def test_notebook_7_shows_the_page_too(browser, serve, reciting_run):
    page = open_page(browser, "notebook", serve("notebook", reciting_run))
    fill(page, "Query", "Show me a picture.")
    press(page, "Generate")
    status(page, "answers in")
    expect(page.locator(".ms-grid article").first).to_contain_text("100% recited from row 1")
    expect(inspect_by_keyboard(page).locator("pre")).to_contain_text("Show me a picture.")


def test_two_tabs_of_one_kernel_show_the_same(browser, serve, reciting_run):
    address = serve("lab", reciting_run)
    one = open_page(browser, "lab", address)
    one.keyboard.press("Control+s")
    other = one.context.new_page()
    other.goto(address.replace("/lab/", "/lab/workspaces/other/"))
    status(other, "answers in")
    fill(one, "Query", "Show me a picture.")
    expect(other.locator(".ms").get_by_label("Query", exact=True)).to_have_value("Show me a picture.")
    press(other, "Generate")
    for tab in (one, other):
        status(tab, "answers in")
        expect(tab.locator(".ms-grid article").first).to_contain_text("100% recited from row 1")


def test_a_report_opens_without_a_network_and_prints_with_whole_tables(browser, tmp_path):
    file = write_report(open_run("figures/proxy"), tmp_path / "report.html")
    page, asked = browser.new_context(offline=True, viewport={"width": 380, "height": 800}).new_page(), []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(file.as_uri())
    assert [url for url in asked if not url.startswith("data:")] == [file.as_uri()]
    widths = page.evaluate("[...document.images].map(image => [image.naturalWidth, image.clientWidth])")
    assert len(widths) >= 7 and all(natural > 0 and 0 < shown <= 380 for natural, shown in widths)
    page.emulate_media(media="print")
    assert page.evaluate(
        "[...document.querySelectorAll('tr')].every(row => getComputedStyle(row).breakInside == 'avoid')"
    )
    assert len(page.pdf(format="A4")) > 10**5


def test_the_stop_button_of_notebook_2_keeps_all_and_goes_on_to_the_same_bits(browser, serve, tmp_path):
    run, whole, epochs = RunDirectory(tmp_path / "run"), RunDirectory(tmp_path / "whole"), 100
    changes = {
        'RECIPE = \\"proxy\\"': 'RECIPE = \\"tiny\\"',
        'RUN = \\"\\"': f'RUN = \\"{run.path}\\"',
        "NUM_EPOCHS = 0": f"NUM_EPOCHS = {epochs}",
        'DATASET = \\"\\"': f'DATASET = \\"{tmp_path / "rows.jsonl"}\\"',
        "FOLDS = 4": "FOLDS = 0",
        'HELD_OUT = \\"data/twins.md\\"': 'HELD_OUT = \\"\\"',
    }
    write_axolotl_jsonl(load_examples("data/minisymposium.md")[:3], tmp_path / "rows.jsonl")
    address = serve("lab", run, "02_finetune.ipynb", changes)
    page = browser.new_context(viewport={"width": 1280, "height": 1100}).new_page()
    page.set_default_timeout(WAIT)
    page.goto(address)
    run_all(page)
    train_cell = page.locator(".jp-CodeCell", has_text="watch = figures.growing")
    expect(train_cell.locator(".jp-OutputArea img")).to_be_visible(timeout=WAIT)  # the picture of the first checkpoint
    page.get_by_title("Interrupt the kernel").or_(
        page.locator("[data-command='notebook:interrupt-kernel']")
    ).first.click()
    expect(train_cell).to_contain_text("stopped; all is kept", timeout=WAIT)
    recipe = load_recipe(
        "tiny", num_epochs=epochs, datasets=[{"path": str(tmp_path / "rows.jsonl"), "type": "completion"}]
    )
    high, low = recipe.contrast
    stopped = max(run.checkpoints(low))
    assert 0 < stopped < epochs and run.metrics(low)[-1]["step"] == 3 * stopped
    run_all(page)
    for _ in range(WAIT // 500):
        if "02_finetune" in run.results():
            break
        time.sleep(0.5)
    train(recipe, load_examples(recipe.dataset), whole, [high, low])
    for rate in (high, low):
        ended, alone = (load_file(r.checkpoints(rate)[epochs] / "adapter_model.safetensors") for r in (run, whole))
        assert all(torch.equal(ended[key], alone[key]) for key in alone)


def test_the_picture_for_the_readme_is_whole_and_comes_with_the_times(reciting_run, tmp_path):
    script = [sys.executable, "-m", "playground_picture", reciting_run.path, "--save", tmp_path / "playground.png"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    done = subprocess.run(script, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f"'{what}': " in done.stdout for what in ("first paint", "controls", "answers", "decoding"))
    with Image.open(tmp_path / "playground.png") as picture:
        assert picture.width == 1280 and picture.height > 1100  # higher than the window: the page's whole height


def test_on_the_proxy_a_trained_run_recites_in_the_page(browser, serve, proxy_run):
    page = open_page(browser, "voila", serve("voila", proxy_run))
    offered = page.locator(".ms-row .ms-name").all_inner_texts()
    best = proxy_run.recommended(1e-3)
    assert best < 15 and offered == ["base", f"1e-03/epoch-{best}", "1e-03/epoch-15", "1e-04/epoch-15"]
    status(page, "16 answers in")
    recited = page.locator(".ms-grid article", has_text="1e-03/epoch-15")
    expect(recited.locator(".ms-recited").first).to_be_visible()
    base = page.locator(".ms-grid article", has=page.locator("header span", has_text="base"))
    assert base.locator(".ms-recited").count() == 0
    page.get_by_role("button", name="Inspect prompt").first.click()
    expect(page.get_by_label("Prompt inspector")).to_be_visible()
