"""A real browser, the system's Chromium, on a real JupyterLab, Notebook 7 or Voila that shows one notebook."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from mini_symposium.run import ROOT

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ARGUMENTS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
SETTINGS = {
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},
    "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False},
}


def serve(
    kind: str,
    home: Path,
    run: Path,
    name: str = "07_playground.ipynb",
    changes: Mapping[str, str] = MappingProxyType({}),
) -> tuple[subprocess.Popen, str]:
    """A server of one notebook, and its address, opened on `run`.

    Parameters
    ----------
    kind
        "lab", "notebook" or "voila".
    home
        An empty folder for the notebook and for what the server writes.
    changes
        {a text in the notebook: what to put in its place}.
    """
    text = (ROOT / "notebooks" / name).read_text(encoding="utf-8")
    for before, after in changes.items():
        assert before in text
        text = text.replace(before, after)
    (home / name).write_text(text, encoding="utf-8")
    (home / "labconfig").mkdir()
    (home / "labconfig" / "default_setting_overrides.json").write_text(json.dumps(SETTINGS))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    editor = ["--allow-root", f"--ServerApp.root_dir={home}", "--IdentityProvider.token="]
    command = {
        "lab": ["jupyterlab", *editor],
        "notebook": ["notebook", *editor],
        "voila": ["voila", name],
    }[kind]
    own = {name: str(home) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR")}
    env = {k: v for k, v in os.environ.items() if k != "MINI_SYMPOSIUM_HEADLESS"} | own
    env["MINI_SYMPOSIUM_RUN"] = str(run)
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    line = [sys.executable, "-m", *command, "--no-browser", f"--port={port}"]
    with (home / "log").open("w") as log:
        server = subprocess.Popen(line, cwd=home, env=env, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}/"
    for _ in range(300):
        try:
            if kind == "voila":  # asked for the page, it would start a kernel
                socket.create_connection(("127.0.0.1", port)).close()
            else:
                urllib.request.urlopen(address + "api").close()
            break
        except OSError:
            assert server.poll() is None, (home / "log").read_text()[-3000:]
            time.sleep(0.1)
    return server, address + {"lab": f"lab/tree/{name}", "notebook": f"notebooks/{name}"}.get(kind, "")


TIMED = """
window.seen = [];
let said = '';
document.addEventListener('keydown', event => seen.push(['key ' + event.key, performance.now()]), true);
const status = () => document.querySelector('.ms-status')?.innerText ?? '';
new MutationObserver(() => {
  if (status() !== said) seen.push([said = status(), performance.now()]);
}).observe(document, {subtree: true, childList: true, characterData: true});
"""
"""A script that notes when a key was pressed and when the status line changed, in milliseconds since the page was asked
for."""


def opened(page) -> dict[str, float]:
    """Seconds from asking for the page until something is painted, until its controls are there, and its answers."""
    page.locator(".ms-status", has_text="answers in").wait_for()
    paint = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    seen = page.evaluate("seen")
    answers = next(at for text, at in seen if " answers in " in text)
    return {"first paint": paint / 1000, "controls": seen[0][1] / 1000, "answers": answers / 1000}


def slider_answers(page) -> dict[str, float]:
    """Seconds from the release of the first adapter's slider until the status line says so, and until the answers are
    there less what their decoding took; and that."""
    page.get_by_role("slider", name=re.compile("^strength ")).first.focus()
    start = page.evaluate("seen.length")
    page.keyboard.press("Home")
    page.locator(".ms-status", has_text=re.compile(r" x 0: .* answers in ")).wait_for()
    (_, released), *later = page.evaluate(f"seen.slice({start})")
    text, answered = next((text, at) for text, at in later if " answers in " in text)
    decoding = float(re.search(r"answers in ([\d.]+) s", text)[1])
    return {
        "said": (later[0][1] - released) / 1000,
        "answers, less decoding": (answered - released) / 1000 - decoding,
        "decoding": decoding,
    }
