"""The page and its threads without a front end. See test_playground_browser for the page in a browser."""

import shutil
import subprocess
import threading
import time

import pytest
from html_page import Page, press

from mini_symposium.errors import InputError
from mini_symposium.playground.page import Playground, front_end, show, show_epochs
from mini_symposium.playground.workbench import Workbench
from mini_symposium.run import ROOT

PICTURE, SKY = "Show me a picture.", "Why is the sky blue?"


@pytest.fixture(scope="module")
def bench(reciting_run) -> Workbench:
    return Workbench(str(reciting_run.path))


@pytest.fixture
def page(bench):
    made = Playground(bench, PICTURE, ["new-query"], ["base"], 40)
    yield made
    made.stop.set()
    until(lambda: not made._job)


def until(holds, seconds=60):
    for _ in range(seconds * 20):
        if holds():
            return
        time.sleep(0.05)
    raise AssertionError("it did not come to hold")


def test_what_is_pressed_while_the_models_load_is_said_and_then_done(reciting_run):
    page = Playground(Workbench(str(reciting_run.path)), PICTURE, ["new-query"], ["base"], 40)
    page.begin()
    press(page, "Generate")
    assert page.status.value.count("Generate") == 1 and "next: Generate" in page.status.value
    until(lambda: not page._job)
    assert "1 answers in" in page.status.value and len(page.bench.log) == 1


def test_generate_runs_on_a_thread_and_stop_keeps_what_came_and_forgets_what_waits(page):
    page.sampling["temperature"].value, page.max_new_tokens.value = 5, 3000  # so hot that it hardly ends by itself
    press(page, "Generate")
    press(page, "Generate")
    assert "Generate is still running · next: Generate" in page.status.value
    until(lambda: page.compare.cards and len(page.compare.cards[0][1].value) > 1500)
    press(page, "Stop")
    until(lambda: not page._job)
    assert "1 answers stopped after" in page.status.value
    assert len(page.compare.cells[0]["answer"]) > 100 and "next" not in page.status.value
    press(page, "Reset to greedy")
    page.max_new_tokens.value = 40
    press(page, "Generate")
    until(lambda: not page._job)
    assert "1 recite training rows" in page.status.value
    assert "&lt;img src=x onerror=" in page.compare.cards[0][1].value
    assert "<img" not in page.compare.cards[0][1].value


def test_what_goes_wrong_stands_in_the_status_line_and_the_page_goes_on(page, tmp_path):
    page.query.value = "word " * 20_000
    press(page, "Generate")
    until(lambda: not page._job)
    assert 'role="alert"' in page.status.value and "at most 20,000" in page.status.value
    page.run.value = str(tmp_path)
    press(page, "Open")
    until(lambda: not page._job)
    assert "a run" in page.status.value
    page.query.value = SKY
    press(page, "Generate")
    until(lambda: not page._job)
    assert "1 answers in" in page.status.value
    assert "[Han]" in page.compare.cards[0][1].value


def test_the_next_generation_makes_no_new_widgets(page):
    from ipywidgets.widgets.widget import _instances

    page.max_new_tokens.value, counts = 1, []
    for _ in range(3):
        press(page, "Generate")
        until(lambda: not page._job)
        counts.append(len(_instances))
    assert len(set(counts)) == 1


def test_on_colab_it_says_what_does_not_show_and_answers_before_the_press_returns(bench, monkeypatch):
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab")
    monkeypatch.delenv("MINI_SYMPOSIUM_HEADLESS", raising=False)
    box = show(bench, PICTURE, ["new-query"], ["base"], 40)

    def values(widget):
        yield str(getattr(widget, "value", ""))
        for child in getattr(widget, "children", ()):
            yield from values(child)

    assert any("Colab shows nothing from the background" in value for value in values(box))
    started = threading.active_count()
    press(box, "Generate")
    assert any("1 answers in" in value for value in values(box)) and threading.active_count() == started


def test_the_front_end_is_known_by_its_environment(monkeypatch):
    for name in ("MINI_SYMPOSIUM_HEADLESS", "JPY_SESSION_NAME", "VSCODE_PID", "VSCODE_CWD", "COLAB_RELEASE_TAG"):
        monkeypatch.delenv(name, raising=False)
    assert front_end() == ""
    monkeypatch.setenv("VSCODE_CWD", "/")
    assert front_end() == "VS Code"
    for name, who in (("VSCODE_PID", "VS Code"), ("JPY_SESSION_NAME", "Jupyter"), ("VOILA_BASE_URL", "Voila")):
        monkeypatch.setenv(name, "1")
        assert front_end() == who
    monkeypatch.setenv("MINI_SYMPOSIUM_HEADLESS", "1")
    assert front_end() == ""


def test_make_playground_opens_a_run_or_else_the_base_of_a_recipe(tmp_path):
    for name in ("Makefile", "requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "runs" / "half").mkdir(parents=True)
    (tmp_path / "mine.yml").touch()

    def opened(*given: str) -> str:
        done = subprocess.run(["make", "-n", "playground", *given], cwd=tmp_path, capture_output=True, text=True)
        return done.stdout.partition("MINI_SYMPOSIUM_RUN='")[2].partition("'")[0]

    assert [opened("RECIPE=half"), opened()] == ["half", "proxy"]
    assert opened("RECIPE=mine.yml") == str(tmp_path / "mine.yml")
    assert opened("RUN=runs/mine", "RECIPE=half") == str(tmp_path / "runs" / "mine")
    (tmp_path / "runs" / "half" / "recipe.yml").touch()
    assert opened("RECIPE=half") == str(tmp_path / "runs" / "half")


def test_headless_a_table_comes_out_and_errors_are_raised(bench):
    shown = show(bench, PICTURE, ["new-query", "alpaca"], ["base"], 40, headless=True)
    assert ["new-query", "base", "100%", "row 1", "0%", "0"] in Page(shown.html).rows
    by_epoch = Page(show_epochs(bench, PICTURE, "new-query", 40, headless=True).html).rows
    assert [row[0] for row in by_epoch[1:]] == ["0", "1", "2"]
    assert by_epoch[-1][1] == "100%"
    with pytest.raises(InputError, match="query is empty"):
        show(bench, "", ["new-query"], ["base"], 40, headless=True)
