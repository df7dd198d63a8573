"""One engine with one model in a process of its own: commands come in and times go out, as JSON.

    python players.py ENGINE MODEL THREADS [TOKENS]

TOKENS are what a peer's context has to hold. Engines: keelback (also with states of
another type, as keelback-bf16), llama_cpp, ik_llama_cpp, llama-bench, transformers, and `probe`,
which reads memory. Between commands a process waits for its input and leaves the processors alone.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROWS = 512


def tokens(count: int, vocabulary: int, first: int = 0) -> list[int]:
    """Ids that every engine reads alike."""
    return [(first + i) * 7919 % (vocabulary - 10) + 5 for i in range(count)]


class Keelback:
    """States are kept by name, so that one that is deep in a text is reached once."""

    def __init__(self, path: str, threads: int, context: int, state_type: str = "f32") -> None:
        from keelback.engine.bandwidth import moved_bytes
        from keelback.engine.model import Model

        self.model = Model(path, threads, state_type=state_type)
        self.vocabulary = self.model.vocabulary
        per_token = self.model.layout.bytes_per_token
        self.facts = {"moved_bytes": moved_bytes(self.model), "bytes_per_token": per_token}
        self.states = {"fresh": self.model.new_state()}
        self.state = self.states["fresh"].clone()

    def start(self, name: str) -> None:
        self.state = self.states[name].clone()

    def keep(self, name: str) -> None:
        self.states[name] = self.state.clone()

    def read(self, ids: list[int]) -> None:
        self.model.forward(ids, self.state)


class Llama:
    """llama.cpp and its forks through the C functions that their Python packages declare."""

    def __init__(self, path: str, threads: int, context: int, package: str = "llama_cpp") -> None:
        name = "ik_llama_cpp._ctypes_api" if package == "ik_llama_cpp" else package
        self.api: Any = importlib.import_module(name)
        self._quiet()
        self.api.llama_backend_init()
        params = self.api.llama_model_default_params()
        params.n_gpu_layers = 0
        self._model = self.api.llama_model_load_from_file(path.encode(), params)
        if not self._model:
            raise RuntimeError(f"{package} cannot load {Path(path).name}")
        params = self.api.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = context, ROWS, ROWS
        params.n_threads = params.n_threads_batch = threads
        if hasattr(params, "n_seq_max"):
            params.n_seq_max = 1
        self._context = self.api.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"{package} cannot run {Path(path).name}")
        vocab = self.api.llama_model_get_vocab(self._model)
        self.vocabulary = self.api.llama_vocab_n_tokens(vocab)
        self.batch = self.api.llama_batch_init(ROWS, 0, 1)
        self.facts: dict[str, int] = {}
        self.position = 0

    def _quiet(self) -> None:
        if hasattr(self.api, "llama_log_callback"):
            self._log = self.api.llama_log_callback(lambda level, text, data: None)
            self.api.llama_log_set(self._log, ctypes.c_void_p(0))

    def start(self, name: str) -> None:
        if hasattr(self.api, "llama_memory_clear"):
            self.api.llama_memory_clear(self.api.llama_get_memory(self._context), True)
        else:
            self.api.llama_kv_cache_clear(self._context)
        self.position = 0

    def read(self, ids: list[int]) -> None:
        for first in range(0, len(ids), ROWS):
            part, batch = ids[first : first + ROWS], self.batch
            batch.n_tokens = len(part)
            for i, token in enumerate(part):
                batch.token[i], batch.pos[i] = token, self.position + i
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
                batch.logits[i] = first + i == len(ids) - 1
            if self.api.llama_decode(self._context, batch):
                raise RuntimeError("llama_decode failed")
            self.position += len(part)
        # The logits are ready only once they have been asked for.
        assert self.api.llama_get_logits_ith(self._context, self.batch.n_tokens - 1)


class Transformers:
    """A checkpoint folder in bfloat16."""

    def __init__(self, path: str, threads: int, context: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.torch: Any = torch
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
        self.vocabulary, self.cache = self.model.config.vocab_size, None
        self.facts: dict[str, int] = {}

    def start(self, name: str) -> None:
        self.cache = None

    def read(self, ids: list[int]) -> None:
        # Mamba models call their cache something else.
        name = "cache_params" if "mamba" in self.model.config.model_type else "past_key_values"
        past = {} if self.cache is None else {name: self.cache}
        out = self.model(self.torch.tensor([ids]), use_cache=True, logits_to_keep=1, **past)
        self.cache = getattr(out, name)


class LlamaBench:
    """llama.cpp's own program, started for every measurement."""

    def __init__(self, path: str, threads: int, context: int) -> None:
        self.vocabulary, self.facts = 100, dict[str, int]()
        self._command = ["llama-bench", "-m", path, "-t", str(threads), "-r", "1", "-o", "json"]
        self.seconds("decode", 1)

    def start(self, name: str) -> None:
        """Every measurement starts anew."""

    def seconds(self, job: str, count: int) -> float:
        """How long a job took by its own clock."""
        sizes = ("-p", "0", "-n", str(count)) if job == "decode" else ("-p", str(count), "-n", "0")
        done = subprocess.run([*self._command, *sizes], capture_output=True, text=True, check=True)
        return json.loads(done.stdout)[0]["avg_ns"] / 1e9


class Probe:
    """Memory read bandwidth with the engine's number of threads."""

    def __init__(self, path: str, threads: int, context: int) -> None:
        from keelback.engine.bandwidth import Probe as Reader

        self._reader, self._threads = Reader(lambda text: None), threads
        self._reader.measure(threads)

    def measure(self) -> dict[str, float]:
        """The median of three passes."""
        passes = sorted(self._reader.measure(self._threads) for _ in range(3))
        return {"bytes_per_second": passes[1]}


def peak_resident() -> int:
    """VmHWM of this process in bytes, 0 where the system does not tell."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if "VmHWM" in line)


def answer(engine: Any, command: dict[str, Any]) -> dict[str, Any]:
    """Do what a command asks and tell how long it took."""
    job = command["do"]
    if job == "probe":
        return engine.measure()
    if job == "peak":
        return {"bytes": peak_resident()}
    if job == "start":
        engine.start(command.get("state", "fresh"))
        return {}
    if job == "keep":
        engine.keep(command["state"])
        return {}
    if hasattr(engine, "seconds"):
        return {"seconds": engine.seconds(job, command["tokens"])}
    ids = tokens(command["tokens"], engine.vocabulary)
    began = time.perf_counter()
    if job == "prefill":
        engine.read(ids)
    elif job == "decode":
        for token in ids:
            engine.read([token])
    else:
        raise ValueError(f"there is no command {job!r}")
    return {"seconds": time.perf_counter() - began}


ENGINES: dict[str, Any] = {
    "keelback": Keelback,
    "keelback-bf16": lambda *arguments: Keelback(*arguments, "bf16"),
    "keelback-int8": lambda *arguments: Keelback(*arguments, "int8"),
    "llama_cpp": Llama,
    "ik_llama_cpp": lambda *arguments: Llama(*arguments, "ik_llama_cpp"),
    "llama-bench": LlamaBench,
    "transformers": Transformers,
    "probe": Probe,
}


def main() -> None:
    name, path, threads, context = [*sys.argv[1:], "4096"][:4]
    # What libraries print must not get between the answers.
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    began = time.perf_counter()
    try:
        engine = ENGINES[name](path, int(threads), int(context))
    except Exception as error:
        replies.write(json.dumps({"error": f"{type(error).__name__}: {error}"}) + "\n")
        return
    loaded = time.perf_counter() - began
    facts = {"load_seconds": loaded, **getattr(engine, "facts", {})}
    replies.write(json.dumps(facts) + "\n")
    for line in sys.stdin:
        replies.write(json.dumps(answer(engine, json.loads(line))) + "\n")


if __name__ == "__main__":
    main()
