"""Take README's picture of the playground, and say how fast it opened and how fast a slider answered.

    PYTHONPATH=tests python -m playground_picture runs/half [--save figures/playground.png] [--width 1280] [--dark]

Without --save it is only measured.
"""

import argparse
import os
import tempfile
from pathlib import Path

from browser import ARGUMENTS, CHROMIUM, TIMED, opened, serve, slider_answers
from playwright.sync_api import sync_playwright

MINUTES = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, help="a run directory with adapters")
    parser.add_argument("--save", type=Path, help="the picture, as figures/playground.png")
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--dark", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as home, sync_playwright() as playwright:
        server, address = serve("voila", Path(home), given.run.absolute())
        try:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
            scheme = "dark" if given.dark else "light"
            page = browser.new_context(viewport={"width": given.width, "height": 1100}, color_scheme=scheme).new_page()
            page.set_default_timeout(MINUTES * 60_000)
            page.add_init_script(TIMED)
            page.goto(address)
            print(f"{os.getloadavg()[0]:.1f} processes wait for {os.cpu_count()} cores")
            print("seconds:", {name: round(seconds, 2) for name, seconds in opened(page).items()})
            if given.save:
                height = page.evaluate("document.querySelector('.ms').getBoundingClientRect().bottom")
                page.set_viewport_size({"width": given.width, "height": round(height) + 20})  # Voila's body scrolls
                page.screenshot(path=given.save)
                page.set_viewport_size({"width": given.width, "height": 1100})
            print("a slider, seconds:", {name: round(seconds, 2) for name, seconds in slider_answers(page).items()})
            browser.close()
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
