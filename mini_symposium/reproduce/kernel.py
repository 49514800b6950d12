"""One notebook on a real kernel: papermill, made to fail at any error and to say where it is.

papermill lets more pass than one expects: `with Output():` swallows an exception, a widget callback's exception is
only displayed, `sys.exit(0)` skips the rest. Here any error that a kernel reports ends the run at that cell, whoever
caught it on the way; and an executed copy gets its name only once it finished.
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
    """A cell raised, wherever the exception was caught, or its kernel died."""


@dataclass(frozen=True)
class Notebook:
    """What is known of a notebook without executing it."""

    path: Path
    parameters: dict
    """Name -> default, from the cell tagged `parameters`."""
    source: str
    """sha256 of its cells."""

    @property
    def name(self) -> str:
        return self.path.stem


@contextmanager
def view(console: Console) -> Iterator[Callable[[str, int, int, str], None]]:
    """Yield `show(notebook, cells done, of, caption)`: a live bar in a terminal, else a line for each new caption."""
    place = TextColumn("{task.fields[place]}", markup=False, table_column=Column(no_wrap=True, ratio=1))
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(20), TimeElapsedColumn(), place
    tasks, said = {}, set()
    with Progress(*columns, console=console, disable=not console.is_terminal, expand=True) as progress:

        def show(name: str, cells: int, of: int, caption: str) -> None:
            place = f"{min(cells + 1, of)}/{of} {caption}".rstrip()
            if name not in tasks:
                tasks[name] = progress.add_task(name, place=place)
            progress.update(tasks[name], completed=cells, total=of, place=place)
            if not console.is_terminal and (name, caption) not in said:
                said.add((name, caption))
                console.print(f"{name} {place}", markup=False, highlight=False, soft_wrap=True)

        yield show


def execute(notebook: Notebook, made: dict, given: dict, directory: RunDirectory, show: Callable) -> None:
    """Run one notebook; its copy is named `.running` meanwhile, and `.failed` if it did not get to its end."""
    import nbformat
    from papermill import execute_notebook
    from papermill.engines import papermill_engines

    papermill_engines.register("mini-symposium", _engine())
    final = directory.notebooks / notebook.path.name
    running, failed = final.with_suffix(".running.ipynb"), final.with_suffix(".failed.ipynb")
    # papermill fills in {placeholders} in paths; ours are meant literally
    paths = [str(path).replace("{", "{{").replace("}", "}}") for path in (notebook.path, running)]
    parameters = {name: given[name] for name in notebook.parameters if name in given}
    try:
        directory.notebooks.mkdir(parents=True, exist_ok=True)
        options = {"kernel_name": "python3", "language": "python", "progress_bar": False}
        done = execute_notebook(*paths, parameters, "mini-symposium", **options, notebook=notebook.name, show=show)
        done.metadata["mini_symposium"] = made
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


def _shareable(content):
    """What a kernel says, without the secrets of the environment that it has from us: a copy may be shown around."""
    if isinstance(content, dict):
        return {key: _shareable(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_shareable(value) for value in content]
    return without_secrets(content) if isinstance(content, str) else content


def _engine() -> type:
    """papermill's engine with three differences: it says where it is, stops at any error, and runs this very Python."""
    import zmq
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpecManager
    from nbformat.v4 import output_from_msg
    from papermill.clientwrap import PapermillNotebookClient
    from papermill.engines import NBClientEngine

    class Client(PapermillNotebookClient):
        error, where, caption = None, "before its first cell", ""

        def create_kernel_manager(self):
            # With no directories to look in, `python3` is the running interpreter, whatever the machine has installed.
            # It is spoken to through sockets in a folder of its own: no open port, nothing left in the home directory.
            connection = {"transport": "ipc", "connection_file": str(Path(self.scratch) / "kernel.json")}
            own = KernelSpecManager(kernel_dirs=[])
            self.km = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=own, **connection)
            return self.km

        async def _async_check_alive(self):
            # Asked every second. Messages to the kernel, such as an Output widget's, are sent past pyzmq's asyncio
            # layer; one that is sent just as a reply comes in takes the wakening for it, and we would wait for ever.
            self.kc.shell_channel.socket.get(zmq.EVENTS)
            await super()._async_check_alive()

        def starting(self, cell, cell_index):
            first, of = (cell.source.strip().splitlines() or [""])[0], len(self.nb.cells)
            if first.startswith("#"):
                self.caption = first.strip("# ")
            self.where = f"cell {cell_index + 1}/{of} `{first:.60}`"
            self.show(self.notebook, cell_index, of, self.caption)

        def process_message(self, msg, cell, cell_index):
            msg["content"] = _shareable(msg["content"])
            output = super().process_message(msg, cell, cell_index)
            if msg["msg_type"] == "error":
                self.error = self.error or msg["content"]
                if output is None:  # an Output widget took it; let it be seen in the copy as well
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
                last = " ".join(f"{error.get('ename')}: {error.get('evalue')}".split())
                raise NotebookError(f"{self.notebook}, {self.where}: {last}")

    class Engine(NBClientEngine):
        @classmethod
        def execute_managed_notebook(cls, nb_man, kernel_name, notebook, show, **_):
            client = Client(
                nb_man, kernel_name=kernel_name, startup_timeout=180, iopub_timeout=60, coalesce_streams=True
            )
            client.notebook, client.show = notebook, show
            client.on_cell_start, client.on_cell_executed = client.starting, client.stop_at_error
            # What the kernel process itself prints must not run into the view; its last line may say why it died.
            with tempfile.TemporaryDirectory() as client.scratch, tempfile.TemporaryFile("w+") as log:
                try:
                    alone = {"IPYTHONDIR": client.scratch, "MINI_SYMPOSIUM_HEADLESS": "1"}  # nobody sees its widgets
                    client.execute(env={**os.environ, **alone}, stdout=log, stderr=log)
                except NotebookError:
                    raise
                except RuntimeError as error:  # it died, or never lived
                    log.seek(0)
                    said = [line.strip() for line in log if line.strip()] or ["perhaps memory ran out"]
                    raise NotebookError(f"{notebook}, {client.where}: {error} ({said[-1]})") from error

    return Engine
