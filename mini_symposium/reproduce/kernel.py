"""Execute one notebook on a real kernel: with papermill, but failing at every error and showing progress.

papermill misses some errors: `with Output():` swallows an exception, an exception in a widget's callback is only
displayed, and `sys.exit(0)` skips the remaining cells. Here any error that the kernel reports ends the run at that
cell, even if something caught it. The executed copy gets its final name only when the notebook has finished.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Column

from mini_symposium.errors import InputError, RunError, without_secrets
from mini_symposium.files.writing import written_whole
from mini_symposium.run import RunDirectory


class NotebookError(RunError):
    """A cell raised an exception, caught or not, or the kernel died."""


@dataclass(frozen=True)
class Notebook:
    """A notebook as it is before it is executed."""

    path: Path
    parameters: dict
    """Name -> default, from the cell tagged `parameters`."""
    source: str
    """sha256 of its cells' sources."""

    @property
    def name(self) -> str:
        return self.path.stem


@contextmanager
def view(console: Console) -> Iterator[Callable[[str, int, int, str], None]]:
    """Yield `show(notebook, cells done, all cells, caption)`, which reports progress.

    In a terminal it moves a progress bar; elsewhere it prints a line for each new caption.
    """
    position_column = TextColumn("{task.fields[position]}", markup=False, table_column=Column(no_wrap=True, ratio=1))
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(20), TimeElapsedColumn(), position_column
    tasks, printed = {}, set()
    with Progress(*columns, console=console, disable=not console.is_terminal, expand=True) as progress:

        def show(name: str, done: int, cells: int, caption: str) -> None:
            position = f"{min(done + 1, cells)}/{cells} {caption}".rstrip()
            if name not in tasks:
                tasks[name] = progress.add_task(name, position=position)
            progress.update(tasks[name], completed=done, total=cells, position=position)
            if not console.is_terminal and (name, caption) not in printed:
                printed.add((name, caption))
                console.print(f"{name} {position}", markup=False, highlight=False, soft_wrap=True)

        yield show


def execute(notebook: Notebook, made_from: dict, given: dict, run: RunDirectory, show: Callable) -> None:
    """Execute one notebook into `run`/notebooks, with its parameters taken from `given`.

    While it runs, its copy is named `.running.ipynb`; if it fails, `.failed.ipynb`. The finished copy holds
    `made_from`. An InputError in a cell is raised here as an InputError.
    """
    import nbformat
    from papermill import execute_notebook
    from papermill.engines import papermill_engines

    papermill_engines.register("mini-symposium", _engine())
    final = run.notebooks / notebook.path.name
    running, failed = final.with_suffix(".running.ipynb"), final.with_suffix(".failed.ipynb")
    # papermill fills in {placeholders} in paths; ours have none, so their braces are doubled.
    paths = [str(path).replace("{", "{{").replace("}", "}}") for path in (notebook.path, running)]
    parameters = {name: given[name] for name in notebook.parameters if name in given}
    try:
        run.notebooks.mkdir(parents=True, exist_ok=True)
        options = {"kernel_name": "python3", "language": "python", "progress_bar": False}
        done = execute_notebook(*paths, parameters, "mini-symposium", **options, notebook=notebook.name, show=show)
        done.metadata["mini_symposium"] = made_from
        done.metadata.papermill = {key: done.metadata.papermill[key] for key in ("start_time", "end_time", "duration")}
        failed.unlink(missing_ok=True)
        with written_whole(final) as temporary:
            nbformat.write(done, temporary)
        running.unlink()
        show(notebook.name, len(done.cells), len(done.cells), "done")
    except NotebookError as error:
        raise NotebookError(f"{error}; see {failed}") from error
    except OSError as error:
        if error.errno is None:
            raise
        raise InputError(f"{final}: cannot be written ({error.strerror}); free some space") from error
    finally:
        if running.exists():
            running.replace(failed)


def _redacted(content):
    """A kernel message without the secrets of the environment, since executed copies are shown to others."""
    if isinstance(content, dict):
        return {key: _redacted(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_redacted(value) for value in content]
    return without_secrets(content) if isinstance(content, str) else content


def _engine() -> type:
    """papermill's engine, but it reports progress, stops at any error, and runs kernels on this Python interpreter."""
    import zmq
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpecManager
    from nbformat.v4 import output_from_msg
    from papermill.clientwrap import PapermillNotebookClient
    from papermill.engines import NBClientEngine

    class Client(PapermillNotebookClient):
        error, where, caption = None, "before its first cell", ""

        def create_kernel_manager(self):
            # Without directories of kernel specs, `python3` is the running interpreter, whatever specs are installed.
            # Its sockets are files in a temporary folder: no open port, and nothing is left in the home directory.
            connection = {"transport": "ipc", "connection_file": str(Path(self.scratch) / "kernel.json")}
            specs = KernelSpecManager(kernel_dirs=[])
            self.km = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=specs, **connection)
            return self.km

        async def _async_check_alive(self):
            # Called every second. Messages to the kernel, such as those of an Output widget, bypass pyzmq's asyncio
            # layer. One that is sent just as a reply arrives uses up the wake-up for that reply, and we would wait for
            # it forever. Reading EVENTS restores the wake-up.
            self.kc.shell_channel.socket.get(zmq.EVENTS)
            await super()._async_check_alive()

        def starting(self, cell, cell_index):
            first_line, cells = (cell.source.strip().splitlines() or [""])[0], len(self.nb.cells)
            if first_line.startswith("#"):
                self.caption = first_line.strip("# ")
            self.where = f"cell {cell_index + 1}/{cells} `{first_line:.60}`"
            self.show(self.notebook, cell_index, cells, self.caption)

        def process_message(self, msg, cell, cell_index):
            msg["content"] = _redacted(msg["content"])
            output = super().process_message(msg, cell, cell_index)
            if msg["msg_type"] == "error":
                self.error = self.error or msg["content"]
                if output is None:  # an Output widget captured it; show it in the copy as well
                    cell.outputs.append(output_from_msg(msg))
            return output

        def stop_at_error(self, cell, cell_index, execute_reply):
            reply = execute_reply["content"]
            if any(payload.get("source") == "ask_exit" for payload in reply.get("payload", [])):
                reply = {"status": "error", "ename": "SystemExit", "evalue": "the cell called exit()"}
            error = self.error or reply
            if error.get("ename") == "InputError":
                raise InputError(f"{error['evalue']} ({self.notebook}, {self.where})")
            if self.error or error["status"] != "ok":
                raise NotebookError(f"{self.notebook}, {self.where}: {error.get('ename')}: {error.get('evalue')}")

    class Engine(NBClientEngine):
        @classmethod
        def execute_managed_notebook(cls, nb_man, kernel_name, notebook, show, **_):
            client = Client(
                nb_man, kernel_name=kernel_name, startup_timeout=180, iopub_timeout=60, coalesce_streams=True
            )
            client.notebook, client.show = notebook, show
            client.on_cell_start, client.on_cell_executed = client.starting, client.stop_at_error
            # The kernel process's own output must not disturb the view; its last line may give the cause of death.
            with tempfile.TemporaryDirectory() as client.scratch, tempfile.TemporaryFile("w+") as log:
                try:
                    # Headless: nobody sees the widgets.
                    headless = {"IPYTHONDIR": client.scratch, "MINI_SYMPOSIUM_HEADLESS": "1"}
                    client.execute(env={**os.environ, **headless}, stdout=log, stderr=log)
                except NotebookError:
                    raise
                except RuntimeError as error:  # the kernel died, or did not start
                    log.seek(0)
                    printed = [line.strip() for line in log if line.strip()] or ["perhaps memory ran out"]
                    raise NotebookError(f"{notebook}, {client.where}: {error} ({printed[-1]})") from error

    return Engine
