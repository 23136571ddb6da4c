"""Other processes for tests: for what is killed, interrupted, or done by two at once.

Python needs three seconds to import torch and transformers, far longer than a test computes. So a server imports them
once (multiprocessing's forkserver: a process that does nothing else), and every process of a test is a fork of it, with
memory, arguments, signals and an end of its own. What is a matter of the start itself, or of the memory of a whole
process, is still tested by `python -m spicerack` and `python -c`.
"""

from __future__ import annotations

import atexit
import itertools
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([
    "torch.distributed", "transformers.models.llama.modeling_llama", "transformers.trainer", "spicerack.cli.quantize",
    "spicerack.quantization.run", "spicerack.runtime.load", "spicerack.training.run",
])  # fmt: skip
_NUMBERS = itertools.count()

COMMAND = "from spicerack.cli import main; main()"
"""The code of the command line; its words are the arguments."""
STEPS = 10
"""Of learning to round, for COMMANDS: what more of them need is time."""
COMMANDS = f"""
import json, sys
from spicerack.algorithms.solvers import blockap, signround
from spicerack.cli import _output, cli
blockap.STEPS = signround.STEPS = {STEPS}
sys.exit(max(_output.run(cli, words) for words in json.loads(sys.argv[1])))
"""
"""Several command lines, one behind the other in one group of processes; a JSON list of them is the argument."""


class Started:
    """A process that runs `code` with arguments, as `python -c CODE ARGUMENTS` would, on as many threads as this one.

    Its output lies in files of `folder`. environment: in addition to this process's own.
    """

    def __init__(
        self, code: str, arguments: Iterable[object], folder: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self._files = [folder / f"process-{next(_NUMBERS)}.{stream}" for stream in ("out", "err")]
        words = ["-c", *map(str, arguments)]
        threads = torch.get_num_threads()
        # Its caller may have changed its folder and environment since the server was started.
        surroundings = (os.environ | (environment or {}), str(Path.cwd()))
        self._process = _CONTEXT.Process(
            target=_run, args=(code, words, list(map(str, self._files)), *surroundings, threads), daemon=True
        )
        self._process.start()

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    def send(self, which: signal.Signals) -> None:
        """A signal to it."""
        assert self._process.pid is not None
        os.kill(self._process.pid, which)

    def wait(self, timeout: float = 200) -> subprocess.CompletedProcess[str]:
        """How it ended, and what it printed; it is killed if it does not end in time."""
        self._process.join(timeout)
        if self.alive:
            self._process.kill()
            raise subprocess.TimeoutExpired(self._process.name, timeout)
        assert self._process.exitcode is not None
        printed, said = (file.read_text() for file in self._files)
        return subprocess.CompletedProcess([], self._process.exitcode, printed, said)


def run(
    code: str, arguments: Iterable[object], folder: Path, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """`code` in a process of its own, to its end."""
    return Started(code, arguments, folder, environment).wait()


def pair(code: str, arguments: Iterable[object], folder: Path) -> list[Started]:
    """Two processes, told of each other as torchrun tells."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    arguments = list(arguments)
    return [
        Started(
            code, arguments, folder, address | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
        )
        for rank in range(2)
    ]


def by_torchrun(commands: Sequence[Sequence[str]], folder: Path) -> str:
    """What command lines print, one behind the other by two processes of torchrun itself; fails unless all succeed."""
    script = folder / "commands.py"
    script.write_text(COMMANDS)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run([*launch, json.dumps(commands)], capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _run(code: str, words: list[str], files: list[str], environment: dict[str, str], folder: str, threads: int) -> None:
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    torch.set_num_threads(threads)
    sys.argv = words
    scope: dict[str, Any] = {"__name__": "__main__"}
    try:
        exec(compile(code, "<process>", "exec"), scope)
    finally:
        atexit._run_exitfuncs()  # which forks of a server leave out
