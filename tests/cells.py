"""What the generated tests lean on."""
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def notebook_cell(notebook: str, cell: str) -> Iterator[None]:
    """Make whatever fails inside name the notebook and the cell it came from; also a decorator."""
    try: yield
    except Exception as error:
        error.add_note(f"in {notebook}, cell {cell}")
        raise
