"The last test of each file, each in a process of its own: what leans on an earlier test fails here."
import contextlib
import io
import multiprocessing
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed

HEAVY = ["datasets", "peft", "pytest", "torch", "transformers", "trl"]  # imported once, before the processes part


def last_tests() -> list[str]:
    "The last test of each file."
    collected = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "--quiet"], capture_output=True, text=True, check=True
    )
    nodes = [line for line in collected.stdout.splitlines() if "::" in line]
    return sorted({node.split("::")[0]: node for node in nodes}.values())


def alone(node: str) -> tuple[str, int, str]:
    "Run one test, and return what it said."
    import pytest

    with contextlib.redirect_stdout(io.StringIO()) as said: code = pytest.main(["--quiet", node])
    return node, int(code), said.getvalue()


def main() -> None:
    "Run them all, two at a time."
    nodes, context, failed = last_tests(), multiprocessing.get_context("forkserver"), 0
    context.set_forkserver_preload(HEAVY)
    with ProcessPoolExecutor(2, context, max_tasks_per_child=1) as pool:
        for done in as_completed([pool.submit(alone, node) for node in nodes]):
            node, code, said = done.result()
            failed += code != 0
            print(f"{node}: {said.strip().splitlines()[-1]}" if code == 0 else said, flush=True)
    if failed: sys.exit(f"{failed} of {len(nodes)} tests fail when they run alone")


if __name__ == "__main__": main()
