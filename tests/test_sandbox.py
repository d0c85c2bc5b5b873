"""Programs that try to break out of `experience.sandbox`, in Python and in C: patching functions passes for no wall."""
import ctypes
import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from dataclasses import replace
from pathlib import Path

import pytest

from sdpo_nb.experience import sandbox
from sdpo_nb.experience.sandbox import (
    Isolation, Limits, Outcome, Program, isolation, python_program, run_code, run_many, run_program)
from sdpo_nb.experience.walls import REFUSED

SHORT = Limits(seconds=8, cpu_seconds=4, memory=192 * 2**20, output=20_000, files=2**20, processes=8)
FULL = isolation()
C_HEAD = """
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <arpa/inet.h>
#include <sys/mount.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
int main(int argc, char **argv) {
"""
both = pytest.mark.parametrize("language", ["python", "c"])
UNGUARDED = " and ".join(FULL.missing)
pytestmark = pytest.mark.skipif(bool(UNGUARDED), reason=f"this kernel grants no layer that guards {UNGUARDED}")


@functools.cache
def compiled(body: str) -> bytes:
    """A C program's machine code."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if not compiler: pytest.skip("the attacks in C need a compiler (apt install gcc); those in Python ran")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "attack.c").write_text(C_HEAD + body + "\nreturn 0; }\n")
        subprocess.run([compiler, "-O0", "-w", "-o", "attack", "attack.c"], cwd=folder, check=True)
        return Path(folder, "attack").read_bytes()


def c_program(body: str, *words: object) -> Program:
    """A C program, with `words` as its arguments."""
    return Program(["./attack", *map(str, words)], {"attack": compiled(body)})


def attack(language: str, python: str, c: str, *words: object) -> Program:
    """The same attack in the language asked for."""
    if language == "c": return c_program(c, *words)
    program = python_program(python)
    return replace(program, argv=(*program.argv, *map(str, words)))


def alive(token: str) -> list[int]:
    """The processes whose command line holds a word."""
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid(): continue
        try: line = Path("/proc", entry, "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError): continue
        if token.encode() in line: found.append(int(entry))
    return found


def gone(token: str, seconds: float = 6.0) -> bool:
    """Whether no process with a word on its command line is left, at the latest after some seconds."""
    deadline = time.monotonic() + seconds
    while alive(token):
        if time.monotonic() > deadline: return False
        time.sleep(0.02)
    return True


@pytest.fixture
def token() -> str:
    """A word that marks a program's processes, so that survivors are found."""
    return "sandbox-" + uuid.uuid4().hex


@pytest.fixture
def public():
    """A folder outside the sandbox that anyone on this machine may read and write, with a secret in it."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        os.chmod(folder, 0o777)
        Path(folder, "secret").write_text("the-secret")
        os.chmod(Path(folder, "secret"), 0o666)
        yield Path(folder)


@pytest.fixture
def victim():
    """A sleeping neighbour that runs as the very user the program becomes outside."""
    user = {"user": 65534, "group": 65534} if os.geteuid() == 0 else {}
    process = subprocess.Popen(["/bin/sleep", "60"], cwd="/", **user)
    yield process
    process.kill()
    process.wait()


# Each wall that guards something twice is tried with only one of the two standing, and then with none: the attack
# has to work there, or the test would show nothing.
NO_WALLS = Isolation()
VIEW_ONLY = Isolation(namespaces=True, view=True)
LANDLOCK_ONLY = Isolation(landlock=FULL.landlock)
SECCOMP_ONLY = Isolation(seccomp=True)
NAMESPACES_ONLY = Isolation(namespaces=True)


def try_with(program: Program, layers: Isolation, limits: Limits = SHORT) -> Outcome:
    """Run with chosen walls, if the kernel has them."""
    lacking = [name for name in ("namespaces", "view", "landlock", "seccomp")
               if getattr(layers, name) and not getattr(FULL, name)]
    if lacking: pytest.skip(f"this kernel grants no {' and no '.join(lacking)}")
    return run_program(program, limits, layers, unsafe=True)


# --- processes

COUNT_PY = """
import os, sys, time
made = 0
try:
    while made < 60:
        if os.fork() == 0: time.sleep(30); os._exit(0)
        made += 1
except BlockingIOError: pass
print(made)
"""
COUNT_C = """
int made = 0;
while (made < 60) { int pid = fork(); if (pid < 0) break; if (!pid) { sleep(30); _exit(0); } made++; }
printf("%d\\n", made);
"""


@both
@pytest.mark.parametrize("processes", [4, 20])
def test_processes_are_counted(language, processes, token):
    limits = replace(SHORT, processes=processes, memory=2**30)
    outcome = run_program(attack(language, COUNT_PY, COUNT_C, token), limits)
    assert (outcome.ended, outcome.stdout) == ("finished", f"{processes - 1}\n")  # the program itself is one
    assert outcome.seconds < 8 and gone(token)


@both
def test_fork_bomb(language, token):
    python = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    limits = replace(SHORT, seconds=1)
    outcome = run_program(attack(language, python, "while (1) fork();", token), limits)
    assert outcome.ended == "timeout" and outcome.seconds < 6
    assert gone(token)


@both
def test_fork_bomb_that_kills_its_parents(language, token):
    python = "import os\nwhile True:\n    try:\n        if os.fork(): os._exit(0)\n    except OSError: pass"
    c = "while (1) if (fork() > 0) _exit(0);"
    outcome = run_program(attack(language, python, c, token), replace(SHORT, seconds=1))
    assert outcome.seconds < 6 and gone(token)


def test_threads_count_as_processes():
    source = """
import threading, time
made = 0
try:
    for _ in range(40): threading.Thread(target=time.sleep, args=(30,), daemon=True).start(); made += 1
except RuntimeError: pass
print(made, flush=True)
import os; os._exit(0)
"""
    assert run_code(source, limits=replace(SHORT, memory=2**30)).stdout == "7\n"


ORPHAN_PY = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.close(0); os.close(1); os.close(2)
        time.sleep(60)
    os._exit(0)
print("left")
"""
ORPHAN_C = """
if (!fork()) { setsid(); if (!fork()) { close(0); close(1); close(2); sleep(60); } _exit(0); }
puts("left");
"""


@both
def test_no_child_outlives(language, token):
    outcome = run_program(attack(language, ORPHAN_PY, ORPHAN_C, token), SHORT)
    assert (outcome.ended, outcome.stdout) == ("finished", "left\n") and outcome.seconds < 5
    assert gone(token)


@pytest.mark.parametrize("layers", [NO_WALLS, LANDLOCK_ONLY, NAMESPACES_ONLY], ids=["none", "landlock", "namespaces"])
def test_no_child_outlives_without_a_view(layers, token):
    outcome = try_with(c_program(ORPHAN_C, token), layers)
    assert (outcome.ended, outcome.stdout) == ("finished", "left\n") and gone(token)


@both
def test_a_child_that_holds_the_pipe_does_not_hold_us(language, token):
    python, c = "import os, time\nif os.fork() == 0: time.sleep(60)", "if (!fork()) sleep(60);"
    outcome = run_program(attack(language, python, c, token), SHORT)
    assert outcome.ended == "finished" and outcome.seconds < 5 and gone(token)


@both
def test_sleep_and_ignored_signals(language, token):
    python = """
import signal, time
for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}: signal.signal(number, signal.SIG_IGN)
while True: time.sleep(60)
"""
    c = "for (int i = 1; i < 64; i++) signal(i, SIG_IGN); while (1) sleep(60);"
    outcome = run_program(attack(language, python, c, token), replace(SHORT, seconds=1))
    assert outcome.ended == "timeout" and 0.9 < outcome.seconds < 6 and gone(token)


@both
def test_processor_time_of_children_counts(language):
    python = "import os\nfor _ in range(3): os.fork()\nwhile True: pass"
    c = "for (int i = 0; i < 3; i++) fork(); while (1);"
    outcome = run_program(attack(language, python, c), replace(SHORT, cpu_seconds=1, seconds=20))
    assert outcome.ended == "timeout" and outcome.seconds < 15  # by processor time, not by the 20 s on the wall


def test_we_are_killed_and_nothing_stays(token):
    # The word goes to us through the environment: on our own command line it would also be on that of each launcher
    # that we start, between its fork and its exec, and such a moment was taken for the program.
    code = ("import os; from dataclasses import replace; "
            "from sdpo_nb.experience.sandbox import Limits, python_program, run_program; "
            "p = python_program('import time; time.sleep(60)'); "
            "run_program(replace(p, argv=(*p.argv, os.environ['TOKEN'])), Limits(seconds=50))")
    us = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parent.parent,
                          env=os.environ | {"TOKEN": token})
    try:
        deadline = time.monotonic() + 40
        while not alive(token) and us.poll() is None and time.monotonic() < deadline: time.sleep(0.05)
        assert alive(token) and us.poll() is None
    finally:
        us.kill()
        us.wait()
    assert gone(token)


def test_the_launcher_is_killed_and_nothing_stays(token):
    program = python_program("import time; time.sleep(60)")
    said = []
    def run():
        try: run_program(replace(program, argv=(*program.argv, token)), replace(SHORT, seconds=50))
        except RuntimeError as error: said.append(str(error))
    thread = threading.Thread(target=run)
    thread.start()
    deadline = time.monotonic() + 20
    while not alive(token) and time.monotonic() < deadline: time.sleep(0.02)
    pid = alive(token)[0]
    for _ in range(2):  # to init, and to the launcher
        pid = int(Path(f"/proc/{pid}/status").read_text().split("PPid:")[1].split()[0])
    os.kill(pid, signal.SIGKILL)
    thread.join(20)
    assert gone(token) and said == ["the sandbox's launcher was killed from outside"]


# --- memory, output, files

@both
def test_memory_bomb(language):
    python = "held = []\nwhile True: held.append(bytearray(2**20))"
    c = "while (1) { char *p = malloc(1 << 20); if (!p) return 3; memset(p, 1, 1 << 20); }"
    outcome = run_program(attack(language, python, c), SHORT)
    assert outcome.ended == "memory" or (language, outcome.code) == ("c", 3)


@both
@pytest.mark.parametrize("megabytes", [100, 4000])
def test_memory_follows_the_limit(language, megabytes):
    python = f"x = bytearray({megabytes} * 2**20)\nprint(len(x))"
    c = f"char *p = malloc({megabytes}L << 20); if (!p) return 3; memset(p, 1, 100L << 20); puts(\"held\");"
    assert run_program(attack(language, python, c), SHORT).ok == (megabytes == 100)


@both
def test_memory_bomb_of_many_processes(language, token):
    python = """
import os, time
for _ in range(6): os.fork() == 0 and (x := bytearray(80 * 2**20)) and time.sleep(60)
time.sleep(60)
"""
    c = """for (int i = 0; i < 6; i++) if (!fork()) { char *p = malloc(80 << 20); memset(p, 1, 80 << 20); sleep(60); }
           sleep(60);"""
    outcome = run_program(attack(language, python, c, token), SHORT)
    assert outcome.ended == "memory" and outcome.seconds < 5 and gone(token)


@both
@pytest.mark.parametrize("stream", [1, 2])
def test_endless_output(language, stream):
    python = f"import os\nwhile True: os.write({stream}, b'spam' * 4096)"
    c = f"char b[16384]; memset(b, 'x', sizeof b); while (1) write({stream}, b, sizeof b);"
    outcome = run_program(attack(language, python, c), SHORT)
    said = (outcome.stdout, outcome.stderr)
    assert outcome.ended == "output" and outcome.seconds < 6
    assert len(said[stream - 1]) == SHORT.output and said[2 - stream] == ""


def test_output_up_to_the_limit_is_whole():
    outcome = run_code(f"print('x' * {SHORT.output - 1})", limits=SHORT)
    assert outcome.ok and len(outcome.stdout) == SHORT.output


@both
def test_giant_file(language):
    python = """
try: open("big", "wb").truncate(2**40)
except OSError as error: print(error.errno)
with open("big", "wb") as file:
    file.seek(2**40)
    try: file.write(b"x"); file.flush()
    except OSError as error: print(error.errno)
    file.close = None
import os; os._exit(0)
"""
    c = """signal(SIGXFSZ, SIG_IGN); int f = open("big", O_CREAT | O_WRONLY, 0600);
           ftruncate(f, 1L << 40); printf("%d\\n", errno);
           pwrite(f, "x", 1, 1L << 40); printf("%d\\n", errno);"""
    outcome = run_program(attack(language, python.replace('    file.close = None\n', ""), c), SHORT)
    if language == "c": assert outcome.stdout == "27\n27\n"
    else: assert "27" in outcome.stdout or "27" in outcome.stderr


def test_giant_file_by_signal():
    outcome = run_program(c_program('int f = open("big", O_CREAT | O_WRONLY, 0600); ftruncate(f, 1L << 40);'), SHORT)
    assert outcome.signal == "SIGXFSZ"


@both
def test_many_files_fill_no_disk(language):
    python = """
import itertools
for i in itertools.count():
    try: open(f"f{i}", "wb").write(bytes(100_000))
    except OSError as error: print(i, error.errno); break
"""
    c = """char name[20], b[100000] = {0};
    for (int i = 0; ; i++) { sprintf(name, "f%d", i); int f = open(name, O_CREAT | O_WRONLY, 0600);
        int n = write(f, b, sizeof b);
        if (n < (int) sizeof b) { n < 0 || write(f, b, 1); printf("%d %d\\n", i, errno); break; } }"""
    count, error = run_program(attack(language, python, c), SHORT).stdout.split()
    assert int(count) <= 10 and error == "28"


@both
def test_empty_files_are_counted_too(language):
    python = """
made = 0
try:
    while made < 20000: open(f"f{made}", "w").close(); made += 1
except OSError: pass
print(made)
"""
    c = """char name[20]; int made = 0;
    while (made < 20000) { sprintf(name, "f%d", made); int f = creat(name, 0600); if (f < 0) break; close(f); made++; }
    printf("%d\\n", made);"""
    assert 1000 < int(run_program(attack(language, python, c), SHORT).stdout) < 4096


@both
def test_open_files(language):
    python = "held = []\ntry:\n    while True: held.append(open('main.py'))\nexcept OSError: print(len(held) + 3)"
    c = "int n = 3; while (open(\"attack\", O_RDONLY) >= 0) n++; printf(\"%d\\n\", n);"
    assert run_program(attack(language, python, c), replace(SHORT, open_files=32)).stdout == "32\n"


# --- what it sees

@both
def test_nothing_is_inherited(language, monkeypatch):
    monkeypatch.setenv("SECRET_KEY", "the-secret")
    with open("/etc/passwd"), socket.socket() as held:
        os.set_inheritable(held.fileno(), True)
        python = """
import os
def is_open(fd):
    try: return bool(os.fstat(fd))
    except OSError: return False
print([fd for fd in range(1024) if is_open(fd)], [key for key in os.environ if key != "LC_CTYPE"])
"""
        c = """extern char **environ; struct stat s;
               for (int i = 0; i < 1024; i++) if (!fstat(i, &s)) printf("%d ", i);
               for (char **e = environ; *e; e++) puts(*e);"""
        outcome = run_program(attack(language, python, c), SHORT)
    assert outcome.stdout == ("[0, 1, 2] []\n" if language == "python" else "0 1 2 ")


READ_PY = """
import sys
for path in sys.argv[1:]:
    try: print(open(path, "rb").read())
    except OSError: print("refused")
"""
READ_C = """for (int i = 1; i < argc; i++) { char b[200] = {0}; int f = open(argv[i], O_RDONLY);
    if (f < 0 || read(f, b, 199) < 0) puts("refused"); else puts(b); }"""


@both
def test_files_outside_are_out_of_sight(language, public):
    paths = [public / "secret", "/etc/passwd", "/etc/shadow", __file__, "/proc/self/environ", "/proc/1/environ",
             f"/proc/{os.getpid()}/environ", f"/proc/{os.getppid()}/environ", "/proc/self/maps", "/sys/kernel/notes",
             "/sandbox/../../../etc/passwd", "/proc/self/root/etc/passwd", "/dev/mem", "/dev/kmsg", "/dev/vda"]
    outcome = run_program(attack(language, READ_PY, READ_C, *paths), SHORT)
    assert outcome.stdout == "refused\n" * len(paths)


@pytest.mark.parametrize("layers", [VIEW_ONLY, LANDLOCK_ONLY, replace(NAMESPACES_ONLY, landlock=FULL.landlock)],
                         ids=["view", "landlock", "landlock and namespaces"])
def test_either_wall_alone_hides_files(layers, public):
    words = (public / "secret", "/etc/passwd", f"/proc/{os.getppid()}/environ", "/proc/self/status",
             f"/..{public}/secret", f"../../../../..{public}/secret")
    outcome = try_with(c_program(READ_C, *words), layers)
    assert outcome.stdout == "refused\n" * len(words)


@pytest.mark.parametrize("layers", [NO_WALLS, NAMESPACES_ONLY, SECCOMP_ONLY], ids=["none", "namespaces", "seccomp"])
def test_without_those_walls_files_are_read(layers, public):
    assert try_with(c_program(READ_C, public / "secret"), layers).stdout == "the-secret\n"


WRITE_PY = """
import os, sys
for path in sys.argv[1:]:
    try: open(path, "w").write("broken"); print("written")
    except OSError: print("refused")
for call in (os.remove, os.rmdir, os.mkdir, lambda p: os.chmod(p, 0o777), lambda p: os.rename(p, "mine"),
             lambda p: os.truncate(p, 0)):
    try: call(sys.argv[1]); print("done")
    except OSError: print("refused")
"""
WRITE_C = """for (int i = 1; i < argc; i++) { int f = open(argv[i], O_WRONLY | O_CREAT, 0666);
    puts(f < 0 || write(f, "broken", 6) < 0 ? "refused" : "written"); }
    puts(unlink(argv[1]) ? "refused" : "done"); puts(rmdir(argv[1]) ? "refused" : "done");
    puts(mkdir(argv[1], 0777) ? "refused" : "done"); puts(chmod(argv[1], 0777) ? "refused" : "done");
    puts(rename(argv[1], "mine") ? "refused" : "done"); puts(truncate(argv[1], 0) ? "refused" : "done");"""


@both
def test_nothing_outside_is_written(language, public):
    paths = [public / "secret", public / "new", "/dev/shm/x", "/etc/passwd", "/usr/lib/x", "/x",
             sys.base_prefix + "/lib/x", os.path.realpath(sys.executable), "/proc/sys/kernel/core_pattern",
             f"/proc/{os.getpid()}/oom_score_adj"]
    outcome = run_program(attack(language, WRITE_PY, WRITE_C, *paths), SHORT)
    assert outcome.stdout == "refused\n" * (len(paths) + 6)
    assert (public / "secret").read_text() == "the-secret" and not (public / "new").exists()
    assert not Path("/dev/shm/x").exists()


@pytest.mark.parametrize("layers", [VIEW_ONLY, LANDLOCK_ONLY], ids=["view", "landlock"])
def test_either_wall_alone_protects_files(layers, public):
    outcome = try_with(c_program(WRITE_C, public / "secret", public / "new", "/dev/shm/x", "/var/tmp/x"), layers)
    assert "written" not in outcome.stdout and (public / "secret").read_text() == "the-secret"


@pytest.mark.parametrize("layers", [VIEW_ONLY, LANDLOCK_ONLY, FULL], ids=["view", "landlock", "all"])
def test_what_is_readable_is_not_writable(layers, public):
    reader, writer = c_program(READ_C, public / "secret"), c_program(WRITE_C, public / "secret", public / "new")
    assert try_with(replace(reader, readable=[str(public)]), layers).stdout == "the-secret\n"
    said = try_with(replace(writer, readable=[str(public)]), layers).stdout
    assert "written" not in said and (public / "secret").read_text() == "the-secret"


def test_without_those_walls_files_are_written(public):
    assert try_with(c_program(WRITE_C, public / "new"), NAMESPACES_ONLY).stdout.startswith("written\n")


@both
def test_symlinks_lead_nowhere(language, public):
    python = READ_PY.replace("import sys", "import os, sys; os.symlink(sys.argv[1], 'way'); os.symlink('/proc', 'p')")
    c = 'symlink(argv[1], "way"); symlink("/proc", "p");' + READ_C
    outcome = run_program(attack(language, python, c, public / "secret", "way", "p/self/environ"), SHORT)
    assert outcome.stdout == "refused\n" * 3


@pytest.mark.parametrize("layers", [None, LANDLOCK_ONLY], ids=["all", "landlock"])
def test_the_folder_starts_empty_and_is_removed(layers, public, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(public))
    program = c_program("""
        if (!access("d", F_OK)) return 1;
        mkdir("d", 0700); int f = creat("d/x", 0600); write(f, "x", 1); chmod("d", 0);
        puts(access("d", F_OK) ? "no" : "made");""")
    for _ in range(2):
        assert run_program(program, SHORT, layers, unsafe=True).stdout == "made\n"
        assert os.listdir(public) == ["secret"]


# --- the network

CONNECT_PY = """
import socket, sys
for family, address in ((socket.AF_INET, ("127.0.0.1", int(sys.argv[1]))), (socket.AF_UNIX, sys.argv[2]),
                        (socket.AF_UNIX, chr(0) + sys.argv[3])):
    try: socket.socket(family, socket.SOCK_STREAM).connect(address); print("connected")
    except OSError: print("refused")
"""
CONNECT_C = """
struct sockaddr_in in = {AF_INET, htons(atoi(argv[1]))}; in.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
struct sockaddr_un un = {AF_UNIX}; strcpy(un.sun_path, argv[2]);
struct sockaddr_un ab = {AF_UNIX}; strcpy(ab.sun_path + 1, argv[3]);
puts(connect(socket(AF_INET, SOCK_STREAM, 0), (void *) &in, sizeof in) ? "refused" : "connected");
puts(connect(socket(AF_UNIX, SOCK_STREAM, 0), (void *) &un, sizeof un) ? "refused" : "connected");
puts(connect(socket(AF_UNIX, SOCK_STREAM, 0), (void *) &ab, 3 + strlen(argv[3])) ? "refused" : "connected");
"""


@pytest.fixture
def listeners(public, token):
    """Three servers that anyone on this machine may reach: TCP on loopback, a socket file, and an abstract name."""
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as file, \
            socket.socket(socket.AF_UNIX) as name:
        file.bind(str(public / "socket"))
        os.chmod(public / "socket", 0o777)
        name.bind("\0" + token)
        for one in (file, name): one.listen()
        yield tcp.getsockname()[1], public / "socket", token


@both
def test_no_socket(language, listeners):
    assert run_program(attack(language, CONNECT_PY, CONNECT_C, *listeners), SHORT).stdout == "refused\n" * 3


@pytest.mark.parametrize("layers", [VIEW_ONLY, SECCOMP_ONLY], ids=["namespaces and view", "seccomp"])
def test_either_wall_alone_keeps_the_network_out(layers, listeners):
    assert try_with(c_program(CONNECT_C, *listeners), layers).stdout == "refused\n" * 3


def test_without_those_walls_the_network_is_there(listeners):
    assert try_with(c_program(CONNECT_C, *listeners), NO_WALLS).stdout == "connected\n" * 3


@both
def test_no_socket_at_all(language):
    python = """
import socket
for family in (1, 2, 10, 16, 17, 40):
    try: socket.socket(family, 3)
    except PermissionError: print(family)
"""
    c = """int family[] = {1, 2, 10, 16, 17, 40};
    for (int i = 0; i < 6; i++) if (socket(family[i], 3, 0) < 0 && errno == EPERM) printf("%d\\n", family[i]);"""
    assert run_program(attack(language, python, c), SHORT).stdout.split() == ["1", "2", "10", "16", "17", "40"]


def test_asyncio_still_works():
    source = "import asyncio\nasync def main(): print('ran')\nasyncio.run(main())"
    assert run_code(source, limits=SHORT).stdout == "ran\n"


# --- other processes, and the kernel

KILL_PY = """
import os, signal, sys
for pid in (os.getppid(), 1, -1, *map(int, sys.argv[1:]), *range(100, 200)):
    try: signal.signal(signal.SIGTERM, signal.SIG_IGN); os.kill(pid, signal.SIGTERM if pid == -1 else signal.SIGKILL)
    except OSError: pass
print("done")
"""
KILL_C = """
kill(getppid(), SIGKILL); kill(1, SIGINT); signal(SIGTERM, SIG_IGN); kill(-1, SIGTERM);
for (int i = 1; i < argc; i++) kill(atoi(argv[i]), SIGKILL);
puts("done");
"""


@both
def test_no_neighbour_is_killed(language, victim):
    outcome = run_program(attack(language, KILL_PY, KILL_C, victim.pid, os.getpid(), os.getppid()), SHORT)
    assert (outcome.ended, outcome.stdout) == ("finished", "done\n")
    assert victim.poll() is None


@pytest.mark.parametrize("layers", [NAMESPACES_ONLY, LANDLOCK_ONLY], ids=["namespaces", "landlock"])
def test_either_wall_alone_protects_neighbours(layers, victim):
    if layers == LANDLOCK_ONLY and FULL.landlock < 6: pytest.skip("Landlock knows signals from Linux 6.12 on")
    outcome = try_with(c_program("kill(atoi(argv[1]), SIGKILL); puts(\"done\");", victim.pid), layers)
    assert outcome.stdout == "done\n"
    time.sleep(0.05)
    assert victim.poll() is None


def test_without_those_walls_a_neighbour_dies(victim):
    try_with(c_program("kill(atoi(argv[1]), SIGKILL);", victim.pid), NO_WALLS)
    assert victim.wait(2) == -signal.SIGKILL


TRACE_PY = """
import ctypes, sys
libc = ctypes.CDLL(None, use_errno=True)
for pid in map(int, sys.argv[1:]): print(libc.ptrace(16, pid, None, None), flush=True)
"""
TRACE_C = "for (int i = 1; i < argc; i++) printf(\"%ld\\n\", ptrace(PTRACE_ATTACH, atoi(argv[i]), 0, 0));"


@both
def test_nobody_is_traced(language, victim):
    words = (victim.pid, os.getpid(), os.getppid(), 1)
    assert run_program(attack(language, TRACE_PY, TRACE_C, *words), SHORT).stdout == "-1\n" * 4


@pytest.mark.parametrize("layers", [NAMESPACES_ONLY, LANDLOCK_ONLY, SECCOMP_ONLY],
                         ids=["namespaces", "landlock", "seccomp"])
def test_any_wall_alone_keeps_tracers_out(layers, victim):
    assert try_with(c_program(TRACE_C, victim.pid), layers).stdout == "-1\n"


def test_without_those_walls_a_neighbour_is_traced(victim):
    scope = Path("/proc/sys/kernel/yama/ptrace_scope")
    if scope.exists() and scope.read_text() != "0\n": pytest.skip("Yama keeps tracers out on this machine")
    assert try_with(c_program(TRACE_C, victim.pid), NO_WALLS).stdout == "0\n"


@both
def test_init_is_not_read_or_traced(language):
    python = "import ctypes; c = ctypes.CDLL(None); print(c.ptrace(16, 1, None, None), c.kill(1, 2), c.getpid())"
    c = "printf(\"%ld %d %d\\n\", ptrace(PTRACE_ATTACH, 1, 0, 0), kill(1, SIGINT), getpid());"
    outcome = try_with(attack(language, python, c), replace(FULL, seccomp=False, landlock=0))
    assert outcome.ended == "finished" and outcome.stdout.split()[0] == "-1"


MOUNT_C = """
puts(mount("none", "/sandbox", "tmpfs", 0, 0) ? "refused" : "mounted");
puts(mount("/usr", "/sandbox", 0, MS_BIND, 0) ? "refused" : "mounted");
puts(mount("none", "/usr/lib", 0, MS_REMOUNT | MS_BIND, 0) ? "refused" : "mounted");
puts(umount2("/usr/lib", MNT_DETACH) ? "refused" : "unmounted");
puts(chroot(".") ? "refused" : "moved");
puts(unshare(CLONE_NEWUSER) ? "refused" : "root again");
puts(unshare(CLONE_NEWNS) ? "refused" : "new view");
puts(syscall(SYS_clone, CLONE_NEWUSER | SIGCHLD, 0, 0, 0, 0) < 0 ? "refused" : "root again");
unsigned long long arguments[11] = {CLONE_NEWUSER, 0, 0, 0, SIGCHLD};
puts(syscall(435, arguments, 88) < 0 ? "refused" : "root again");
puts(setuid(0) ? "refused" : "root");
"""
MOUNT_PY = """
import ctypes
libc = ctypes.CDLL(None)
for call in ((libc.mount, b"none", b"/sandbox", b"tmpfs", 0, None),
             (libc.mount, b"/usr", b"/sandbox", None, 4096, None),
             (libc.mount, b"none", b"/usr/lib", None, 4128, None), (libc.umount2, b"/usr/lib", 2), (libc.chroot, b"."),
             (libc.unshare, 0x10000000), (libc.unshare, 0x20000), (libc.setuid, 0), (libc.setgid, 0),
             (libc.setns, 0, 0)):
    print("done" if call[0](*call[1:]) == 0 else "refused")
"""


@both
def test_no_mount_and_no_new_world(language):
    assert run_program(attack(language, MOUNT_PY, MOUNT_C), SHORT).stdout == "refused\n" * 10


@pytest.mark.parametrize("layers", [replace(FULL, seccomp=False), SECCOMP_ONLY], ids=["all but seccomp", "seccomp"])
def test_either_wall_alone_refuses_a_new_world(layers):
    assert try_with(c_program(MOUNT_C), layers).stdout == "refused\n" * 10


def test_without_those_walls_there_are_new_worlds():
    if not FULL.namespaces: pytest.skip("this kernel grants no user namespaces to anyone")
    c = 'puts(syscall(SYS_clone, CLONE_NEWUSER | SIGCHLD, 0, 0, 0, 0) < 0 ? "refused" : "root again");'
    assert "root again" in try_with(c_program(c), NO_WALLS).stdout


CALLS_PY = """
import ctypes, sys
libc = ctypes.CDLL(None, use_errno=True)
for number in map(int, sys.argv[1:]): print(libc.syscall(number, 0, 0, 0, 0, 0, 0), ctypes.get_errno())
"""
CALLS_C = """for (int i = 1; i < argc; i++) { errno = 0; int r = syscall(atoi(argv[i]), 0, 0, 0, 0, 0, 0);
    printf("%d %d\\n", r, errno); }"""


@pytest.mark.parametrize("layers", [FULL, NAMESPACES_ONLY, NO_WALLS], ids=["all", "namespaces", "none"])
def test_shared_memory_and_name_are_its_own(layers):
    libc, name = ctypes.CDLL(None), os.uname().nodename
    held = libc.shmget(key := 0x5D90, 4096, 0o1666)  # 0o1000 is IPC_CREAT
    assert held >= 0
    try:
        c = """char b[65]; gethostname(b, 65);
               puts(syscall(SYS_shmget, atoi(argv[1]), 0, 0) < 0 ? "refused" : "found"); puts(b);"""
        said = try_with(c_program(c, key), layers).stdout
    finally: libc.shmctl(held, 0, None)
    assert said == (f"found\n{name}\n" if layers == NO_WALLS else "refused\nsandbox\n")
    assert os.uname().nodename == name


@both
def test_every_refused_call_is_refused(language):
    if not FULL.seccomp: pytest.skip("this kernel grants no seccomp")
    which = 0 if os.uname().machine == "x86_64" else 1
    numbers = [pair[which] for pair in REFUSED.values() if pair[which] is not None]
    assert run_program(attack(language, CALLS_PY, CALLS_C, *numbers), SHORT).stdout == "-1 1\n" * len(numbers)


def test_without_the_filter_the_kernel_answers():
    which = 0 if os.uname().machine == "x86_64" else 1
    numbers = [REFUSED[name][which] for name in ("memfd_create", "socket", "shmget", "mq_open", "personality")]
    said = try_with(c_program(CALLS_C, *numbers), replace(FULL, seccomp=False)).stdout.split("\n")
    assert sum(line != "-1 1" for line in said[:5]) == 5


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="numbers of x32 exist on x86_64 only")
def test_other_numberings_are_refused():
    outcome = run_program(c_program("int r = syscall(0x40000000 + 39); printf(\"%d %d\\n\", r, errno);"), SHORT)
    assert outcome.stdout == "-1 38\n"
    old = "int r; __asm__ volatile(\"int $0x80\" : \"=a\"(r) : \"a\"(20)); printf(\"%d\\n\", r);"  # 32-bit getpid
    outcome = run_program(c_program(old), SHORT)
    assert outcome.stdout == "" and outcome.signal in ("SIGSYS", "SIGSEGV")


# --- odd endings

@both
@pytest.mark.parametrize("code", [0, 1, 7, 255])
def test_exit_codes(language, code):
    outcome = run_program(attack(language, f"raise SystemExit({code})", f"return {code};"), SHORT)
    assert (outcome.ended, outcome.code, outcome.signal) == ("finished" if code == 0 else "error", code, None)


@both
@pytest.mark.parametrize("name", ["SIGSEGV", "SIGKILL", "SIGTERM", "SIGPIPE"])
def test_signals(language, name):
    number = getattr(signal, name).value
    reset = "" if number == 9 else f"signal.signal({number}, signal.SIG_DFL)"
    python = f"import os, signal\n{reset}\nos.kill(os.getpid(), {number})"
    outcome = run_program(attack(language, python, f"kill(getpid(), {number});"), SHORT)
    assert (outcome.ended, outcome.code, outcome.signal) == ("error", None, name)


def test_exit_and_quit_exist(): assert run_code("print(1); exit()", limits=SHORT).ok


@both
def test_deep_recursion(language):
    python = """
import sys
sys.setrecursionlimit(10**9)
class Deep:
    def __getattr__(self, name): return getattr(self, name + "x")
Deep().x
"""
    c = "int (*again)(int, char **) = (void *) main; volatile char b[4096]; b[0] = 1; return again(argc, argv) + b[0];"
    outcome = run_program(attack(language, python, c), SHORT)
    assert not outcome.ok and outcome.seconds < 5
    if language == "c": assert outcome.signal == "SIGSEGV"
    assert run_code("def f(): f()\nf()", limits=SHORT).stderr.rstrip().splitlines()[-1].startswith("RecursionError")


@both
def test_closing_stdout(language):
    python, c = "import os\nos.close(1)\nos.write(2, b'on')", "close(1); write(2, \"on\", 2);"
    outcome = run_program(attack(language, python, c), SHORT)
    assert (outcome.ended, outcome.stdout, outcome.stderr) == ("finished", "", "on")


@both
def test_closing_everything_then_sleeping(language, token):
    python = "import os, time\nos.closerange(0, 99)\ntime.sleep(60)"
    c = "for (int i = 0; i < 99; i++) close(i); sleep(60);"
    outcome = run_program(attack(language, python, c, token), replace(SHORT, seconds=1))
    assert outcome.ended == "timeout" and gone(token)


@both
def test_bytes_that_are_no_text(language):
    python = "import os; os.write(1, bytes(range(256)))"
    c = "for (int i = 0; i < 256; i++) putchar(i);"
    outcome = run_program(attack(language, python, c), SHORT)
    assert outcome.ok and outcome.stdout[:128] == "".join(map(chr, range(128)))
    assert set(outcome.stdout[128:]) == {"\ufffd"}


@pytest.mark.parametrize("source", [
    "\ud800", "print('\ud800')", "a\0b", "\ufeffprint(", "é" * 1000, "(" * 5000, "x = " + "-" * 100_000 + "1",
    "print('\N{RIGHT-TO-LEFT OVERRIDE}" + "\u0301" * 10_000 + "')", "# coding: rot13\n1", ""])
def test_unicode_bombs(source):
    outcome = run_code(source, stdin="\ud800\0", limits=SHORT)
    assert outcome.ended in ("finished", "error", "memory", "output")
    outcome.stdout.encode(), outcome.stderr.encode()


def test_input_of_any_size():
    text = "x" * 3_000_000
    assert run_code("print(len(input()))", text, limits=SHORT).stdout == "3000000\n"
    assert run_code("print('did not read')", text, limits=SHORT).ok


def test_input_cannot_be_changed():
    source = "import os\ntry: os.write(0, b'x')\nexcept OSError: print('refused')"
    assert run_code(source, "question", limits=SHORT).stdout == "refused\n"


def test_a_report_cannot_be_forged():
    source = """
import os
for descriptor in range(3, 64):
    try: os.write(descriptor, b"x" * 100)
    except OSError: pass
raise SystemExit(3)
"""
    assert run_code(source, limits=SHORT).code == 3


def test_packages_are_readable_and_nothing_else(tmp_path):
    (tmp_path / "hint.py").write_text("answer = 42")
    tmp_path.chmod(0o755)
    assert run_code("import hint; print(hint.answer)", packages=[str(tmp_path)], limits=SHORT).stdout == "42\n"
    assert run_code("import sdpo_nb", limits=SHORT).stderr.rstrip().endswith("No module named 'sdpo_nb'")
    assert run_code("import pytest", limits=SHORT).stderr.rstrip().endswith("No module named 'pytest'")


# --- many

def test_many_keep_their_order_and_share_nothing():
    source = "import os; print(os.listdir('.'), {i}); open('left', 'w')"
    outcomes = run_many([source.format(i=i) for i in range(12)], SHORT, workers=4)
    assert [one.stdout for one in outcomes] == [f"['main.py'] {i}\n" for i in range(12)]


def test_a_bomb_among_many_disturbs_no_one():
    sources = ["import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", *["print('fine')"] * 4]
    bomb, *others = run_many(sources, replace(SHORT, seconds=3, cpu_seconds=1), workers=2)
    assert bomb.ended == "timeout" and [one.stdout for one in others] == ["fine\n"] * 4


def test_no_descriptor_is_leaked():
    run_code("1", limits=SHORT)
    before = len(os.listdir("/proc/self/fd"))
    for source in ("1", "1/0", "while True: print(1)"): run_code(source, limits=SHORT)
    with pytest.raises(RuntimeError): run_program(Program(["/no/such"]), SHORT)
    assert len(os.listdir("/proc/self/fd")) == before and threading.active_count() < 10


def test_an_upgrade_in_the_middle_of_a_run_changes_nothing(tmp_path):
    package = Path(sandbox.__file__).parent.parent
    shutil.copytree(package, tmp_path / package.name, ignore=shutil.ignore_patterns("data", "static", "__pycache__"))
    code = ("from sdpo_nb.experience import sandbox, walls\n"
            "for module in (sandbox, walls): open(module.__file__, 'w').close()\n"
            "print(sandbox.run_code('print(1)').stdout)")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("1\n\n", "")


def test_it_refuses_without_walls():
    with pytest.raises(RuntimeError, match="nothing would guard files and the network and other processes"):
        run_program(python_program("print(1)"), layers=NO_WALLS)


def test_it_refuses_on_a_kernel_without_walls(monkeypatch):
    monkeypatch.setattr(sandbox, "isolation", Isolation)
    with pytest.raises(RuntimeError, match="unsafe=True"): run_code("print(1)")
    with pytest.raises(RuntimeError, match="unsafe=True"): run_many(["print(1)"])


@pytest.mark.slow  # a speed, which holds on a quiet machine only
def test_twenty_programs_a_second():
    run_many(["print(1)"] * 10)
    start = time.monotonic()
    assert all(one.ok for one in run_many(["print(1)"] * 200, workers=2))
    assert 200 / (time.monotonic() - start) >= 20
