"""The trainer's side of vLLM: a child process of this rank, or a server elsewhere, as a RolloutEngine.

The trainer never imports vLLM.  Every wait has an end: a process that is gone, or does not answer in time, is ended
and reported as EngineDied, which the trainer may follow by `restart`.
"""

import logging
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from umer1 import device
from umer1.data.images import ImageConfig
from umer1.errors import UserError
from umer1.models.qwen2_vl.directory import HFDirectory
from umer1.models.qwen2_vl.weight_table import hf_shapes
from umer1.printable import printable
from umer1.rl.config import RolloutConfig
from umer1.rl.engines.vllm_answers import Answers, prompt_message
from umer1.rl.engines.vllm_assets import check_head_size, dtype_name, save_engine_assets
from umer1.rl.engines.vllm_process import EngineProcess
from umer1.rl.engines.vllm_remote import connect
from umer1.rl.engines.vllm_staging import StagingBuffer, fill
from umer1.rl.engines.vllm_wire import Channel, ConnectionLost, Message, WireError
from umer1.rl.types import Completion, EngineDied, Interrupted, Request, Sampling, Stop

logger = logging.getLogger(__name__)

# A 2B model on a GPU measures its memory and captures graphs: minutes on a cold machine.  The other ranks wait in a
# collective meanwhile, which by default gives up after ten.
START_SECONDS = 540.0
_ANSWER_SECONDS = 120.0  # for a command that is no work
_TICK_SECONDS = 0.2  # between looks at `stop`
_CANCEL_SECONDS = 60.0  # the engine's step under way is finished first


class VLLMEngine:
    """A RolloutEngine; see the module's docstring.

    directory: config and tokenizer of the model; weights come by `load_weights` alone.  dtype: of the engine's weights
    and arithmetic.  max_model_len: most tokens of prompt and response together.  rank: for messages.  devices: the
    GPUs of a child by number (default: that of local_rank).  log_path: where a child's output is added (default: a
    temporary file).  server: (host, port) of a server to use instead of a child.

    A child starts in the background; whatever is called first waits for it.  Raises UserError on what cannot run.
    """

    name = "vllm"
    collective = False

    def __init__(
        self,
        config: RolloutConfig,
        directory: HFDirectory,
        *,
        dtype: torch.dtype,
        max_model_len: int,
        rank: int,
        local_rank: int,
        log_path: Path | None = None,
        server: tuple[str, int] | None = None,
        image_config: ImageConfig | None = None,
        devices: list[int] | None = None,
    ):
        self.config, self.directory, self.rank, self.server = config, directory, rank, server
        self.dtype, self.max_model_len = dtype, max_model_len
        self.devices = [local_rank] if devices is None else devices
        self._shapes = hf_shapes(directory.config)
        self._folder = tempfile.TemporaryDirectory(prefix="umer1-vllm-")
        self.log_path = log_path or Path(self._folder.name) / "engine.log"
        self._model_folder = Path(self._folder.name) / "model"
        self._process: EngineProcess | None = None
        self._channel: Channel | None = None
        self._staging: StagingBuffer | None = None
        self._started = False
        self._obituary = ""  # of an engine that died where no one could be told, or while it started
        if server is None:
            check_head_size(directory.config)
            images = image_config or ImageConfig.of_directory(directory)
            name = dtype_name(dtype)
            save_engine_assets(directory, images, self._model_folder, dtype=name, max_tokens=max_model_len)
        self._launch()

    @property
    def pid(self) -> int | None:
        """The child's process, while there is one."""
        return self._process.pid if self._process is not None else None

    # -- generation --------------------------------------------------------------------------------------------------

    def generate(self, requests: list[Request], sampling: Sampling, stop: Stop) -> list[list[Completion | None]]:
        """See RolloutEngine.  Responses that are not there after `rollout_timeout_seconds` are None."""
        self.start()
        answers = Answers(requests, sampling.num_generations)
        with self._exchange("generating"):
            self._send("generate", count=len(requests), sampling=asdict(sampling))
            unsent = iter(requests)
            deadline = time.monotonic() + self.config.rollout_timeout_seconds
            cancelled, looked = "", -_TICK_SECONDS
            while not answers.finished:
                now = time.monotonic()
                if cancelled:
                    if now > deadline:
                        raise TimeoutError(f"it did not break off within {_CANCEL_SECONDS:g} s")
                elif now - looked >= _TICK_SECONDS:
                    looked = now
                    cancelled = "stopped" if stop() else "late" if now > deadline else answers.mismatch and "mismatch"
                    if cancelled:
                        self._send("cancel")
                        deadline = now + _CANCEL_SECONDS
                request = None if cancelled else next(unsent, None)
                if request is not None:
                    fields, bodies = prompt_message(request, self.directory.special)
                    self._send("prompt", bodies, **fields)
                message = self._poll(0.0 if request is not None else _TICK_SECONDS)
                if message is not None:
                    self._refused(message)
                    answers.take(message)
        if cancelled == "stopped":
            raise Interrupted("generation was broken off")
        if answers.mismatch:
            raise UserError(answers.mismatch)
        answers.log_failures(self.rank, late=cancelled == "late")
        return answers.found

    # -- weights -----------------------------------------------------------------------------------------------------

    def load_weights(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, float]:
        """See RolloutEngine.  Every tensor of the model must come, once; ValueError otherwise.

        The answer has each tensor's checksum as it arrived, and under "engine:" + name that of the running model's
        own tensor, for those that vLLM keeps as they are.
        """
        self.start()
        with self._exchange("loading weights"):
            staging = self._staging_buffer()
            self._send("begin_weights", staging=staging.described() if staging.shared else None)
            self._await("ready", self.config.weight_sync_timeout_seconds)
            for pieces in fill(self._checked(tensors), staging.view):
                if staging.shared:
                    device.synchronize()
                    self._send("weights", pieces=pieces)
                else:
                    used = max(piece["offset"] + piece["bytes"] for piece in pieces)
                    self._send("weights", [memoryview(staging.memory)[:used]], pieces=pieces)
                self._await("taken", self.config.weight_sync_timeout_seconds)
            self._send("end_weights")
            sums = self._await("loaded", self.config.weight_sync_timeout_seconds).fields.get("checksums")
            if not isinstance(sums, dict) or not all(type(value) in (int, float) for value in sums.values()):
                raise WireError("an end of the weights without their checksums")
            return sums

    def _checked(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """A partial update would leave fused layers wrong without a word, so names and shapes are compared."""
        waiting = dict(self._shapes)
        for name, tensor in tensors:
            if waiting.pop(name, None) != tuple(tensor.shape):
                raise ValueError(f"the tensor {name} {tuple(tensor.shape)} is none of the model's, or came twice")
            yield name, tensor
        if waiting:
            raise ValueError(f"{len(waiting)} tensors did not come, {next(iter(waiting))} among them")

    def _staging_buffer(self) -> StagingBuffer:
        if self._staging is None:
            self._staging = StagingBuffer(shared=self._process is not None)
        return self._staging

    # -- memory and life ---------------------------------------------------------------------------------------------

    def sleep(self) -> None:
        """Give back a child's GPU memory; nothing to give on the CPU, and a server's is its own."""
        self._simple("sleep", "going to sleep")

    def wake(self) -> None:
        """Take the memory of the weights again; that of the KV cache follows when they have been loaded.

        A child shares its GPU with the trainer, whose step leaves most of it in the hands of torch's allocator.
        """
        if self._started and self.server is None:
            device.release_memory()
        self._simple("wake", "waking up")

    def _simple(self, command: str, phase: str) -> None:
        """An engine that dies here is reported by its next use, in which all ranks take part; a new one is awake."""
        if self._started and self.server is None and device.has_cuda():
            try:
                with self._exchange(phase):
                    self._send(command)
                    self._await("done", _ANSWER_SECONDS)
            except EngineDied as error:
                self._obituary = str(error)

    def restart(self) -> None:
        """Start a dead engine anew; one that lives is left alone."""
        if self._channel is None:
            self._launch()

    def close(self) -> None:
        """End the child, or leave the server; may be called twice."""
        self._end()
        if self._staging is not None:
            self._staging.close()
            self._staging = None
        self._folder.cleanup()

    def _launch(self) -> None:
        self._started, self._obituary = False, ""
        if self.server is not None:
            return  # `start` connects: a server that is not there must not end the constructor
        device.release_memory()  # vLLM refuses to start where its share of the GPU is not free
        self._process = EngineProcess(self.log_path, self.devices)
        self._channel = Channel(self._process.connection)
        with self._exchange("starting"):
            self._send(
                "configure",
                model=str(self._model_folder),
                dtype=dtype_name(self.dtype),
                max_model_len=self.max_model_len,
                max_sequences=self.config.rollout_max_sequences,
                tensor_parallel_size=self.config.rollout_tensor_parallel_size,
                gpu_memory_utilization=self.config.rollout_gpu_memory_utilization,
                sleep=True,
            )

    def start(self, stop: Stop = lambda: False) -> None:
        """Wait until the engine stands; every other method does so by itself, without a look at `stop`.

        Raises EngineDied, Interrupted.
        """
        if self._started:
            return
        if self.server is not None:
            with self._exchange("connecting"):
                self._channel = connect(self.server, self.directory.config, self.dtype, self.max_model_len, stop)
        elif self._channel is None:
            raise EngineDied(
                self._obituary or f"the vLLM engine of rank {self.rank} is not running; it has to be restarted"
            )
        else:
            try:
                with self._exchange("starting"):
                    self._await("started", START_SECONDS, stop)
            except EngineDied as error:
                self._obituary = str(error)  # for whoever asks next
                raise
        self._started = True

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
        elif self._channel is not None:
            self._channel.close()
        self._process = self._channel = None
        self._started = False

    # -- talk --------------------------------------------------------------------------------------------------------

    @contextmanager
    def _exchange(self, phase: str):
        """One command from its first message to its last.

        Whatever breaks it off leaves an engine that nobody knows the state of: it is ended, and EngineDied says why
        where the engine is at fault.
        """
        try:
            yield
        except (ConnectionLost, WireError, TimeoutError) as error:
            text = self._epitaph(phase, error)
            self._end()
            raise EngineDied(text) from None
        except BaseException:
            self._end()
            raise

    def _epitaph(self, phase: str, error: Exception) -> str:
        if self._process is None:
            host, port = self.server
            return f"the vLLM server at {host}:{port}, used by rank {self.rank}, failed while {phase}: {error}"
        ended = self._process.wait_for_end() if isinstance(error, ConnectionLost) else None
        how = f"ended ({ended})" if ended else f"failed: {error}"
        said = self._process.last_words()
        where = f"the vLLM engine of rank {self.rank} (pid {self._process.pid}) {how} while {phase}"
        return where + (f"; the last lines of {self.log_path}:\n{said}" if said else "; it has written nothing")

    def _send(self, op: str, bodies: Iterable[Any] = (), **fields: Any) -> None:
        self._channel.send(op, list(bodies), timeout=_ANSWER_SECONDS, **fields)

    def _poll(self, seconds: float) -> Message | None:
        return self._channel.poll(seconds)

    def _await(self, op: str, seconds: float, stop: Stop = lambda: False) -> Message:
        deadline = time.monotonic() + seconds
        while (message := self._poll(_TICK_SECONDS)) is None:
            if stop():
                raise Interrupted("the engine's start was broken off")
            if time.monotonic() > deadline:
                raise TimeoutError(f"no answer within {seconds:g} s")
        self._refused(message)
        if message.op != op:
            raise WireError(f"{message.op[:40]!r} where {op!r} was due")
        return message

    def _refused(self, message: Message) -> None:
        if message.op == "refused":
            raise WireError(f"it refused: {printable(message.fields.get('reason'), 2000)}")
