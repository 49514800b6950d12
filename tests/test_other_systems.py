"""The tiny chain without what Windows lacks. It stands in for a machine with Windows, on which nothing was run."""

import os
import subprocess
import sys

from mini_symposium.run import ROOT

WITHOUT = """
import builtins, os, signal, sys

real = builtins.__import__
def without(name, globals=None, locals=None, fromlist=(), level=0):
    importer = (globals or {}).get("__name__", "")
    if name.partition(".")[0] in ("fcntl", "resource", "pwd", "termios") and importer.startswith("mini_symposium"):
        raise ModuleNotFoundError(f"{importer} imports {name}, which Windows lacks")
    return real(name, globals, locals, fromlist, level)
builtins.__import__ = without
import trl, torch.distributed.checkpoint, transformers.modeling_utils  # Linux's own libraries use SIGKILL
for module, names in ((os, ("getuid", "setuid", "setsid", "fork", "killpg")), (signal, ("SIGKILL", "SIGALRM"))):
    for name in names:
        delattr(module, name)
from mini_symposium.cli.main import main
for line in sys.argv[1:]:
    try:
        main(line.split())
    except SystemExit as ended:
        if ended.code:
            raise
"""


def test_inspect_train_ask_and_merge_need_nothing_that_windows_lacks(tmp_path):
    lines = (
        "inspect data/minisymposium.md",
        "train --recipe tiny --run mine -p NUM_EPOCHS=1 -p LEARNING_RATES=[1e-3]",
        "ask mine Why? --format bare --max-new-tokens 2",
        "merge mine --out merged",
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LOGNAME": "ada"}  # torch asks for the user
    command = [sys.executable, "-c", WITHOUT, *lines]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "merged" / "config.json").is_file()


def test_code_of_an_answer_is_not_run_without_the_sandbox(tmp_path):
    code = "import sys; sys.modules['resource'] = None\n" + (ROOT / "mini_symposium/data/sandbox.py").read_text()
    (tmp_path / "sandbox.py").write_text(code.replace("__file__", repr(str(tmp_path / "sandbox.py"))))
    call = "import sandbox; print(sandbox.passes('', ''))"
    done = subprocess.run([sys.executable, "-c", call], cwd=tmp_path, capture_output=True, text=True)
    assert "cannot be run safely here" in done.stderr and "Linux and macOS can" in done.stderr
