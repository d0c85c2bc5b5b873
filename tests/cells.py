"""What the tests lean on."""
import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def notebook_cell(notebook: str, cell: str) -> Iterator[None]:
    """Make whatever fails inside name the notebook and the cell it came from; also a decorator."""
    try: yield
    except Exception as error:
        error.add_note(f"in {notebook}, cell {cell}")
        raise


def hear_ctrl_c() -> None:
    """For a child process: a shell's background jobs ignore Ctrl-C, and so would their children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
