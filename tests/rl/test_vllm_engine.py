"""The real vLLM on the CPU, in its process, against plain transformers in fp32; one engine for all tests."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

pytest.importorskip("vllm")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from vllm_world import LENGTH, VLLMWorld  # noqa: E402

from umer1.data.schema import Prompt  # noqa: E402
from umer1.errors import UserError  # noqa: E402
from umer1.rl.checksum import checksum  # noqa: E402
from umer1.rl.config import RolloutConfig  # noqa: E402
from umer1.rl.types import EngineDied, Interrupted, Request  # noqa: E402

LONG = dict(num_generations=16, max_completion_length=600)  # takes many seconds


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return VLLMWorld(tmp_path_factory.mktemp("vllm"))


@pytest.fixture(scope="module")
def running(world):
    """One process for all tests; one that has ended it starts it anew through `engine`."""
    engine = world.engine(RolloutConfig(rollout_timeout_seconds=60.0))
    engine.start()
    yield engine
    engine.close()
    engine.close()  # may be called twice


@pytest.fixture
def engine(world, running):
    """With the model's present weights in it."""
    running.restart()
    running.load_weights(world.weights())
    return running


def never() -> bool:
    return False


def tokens(answers) -> list[list[list[int]]]:
    return [[completion.token_ids for completion in answer] for answer in answers]


def test_log_probs_are_those_of_transformers(world, engine):
    """After each update with the same pictures and long texts: nothing stale, nothing missing, at any temperature."""
    steps, rows, columns = world.requests[3].prompt.sequence.grid_thw[0].tolist()
    assert steps > max(rows, columns) // 2  # vLLM's own positions are wrong for such a video
    for step, temperature in enumerate((1.0, 0.7, 1.0)):
        world.change(step)
        engine.load_weights(world.weights())
        sampling = world.sampling(seed=step, temperature=temperature)
        for _ in range(2):  # the second time from the caches
            answers = engine.generate(world.requests, sampling, never)
            assert max(world.worst(answers, temperature).values()) < 1e-4


def test_checksums_cover_what_arrived_and_what_runs(world, engine):
    world.change(10)
    sums = engine.load_weights(world.weights())
    expected = {name: checksum(tensor) for name, tensor in world.weights()}
    assert {name: value for name, value in sums.items() if not name.startswith("engine:")} == expected
    running = {name.removeprefix("engine:"): value for name, value in sums.items() if name.startswith("engine:")}
    assert running == {name: expected[name] for name in running}
    assert {"model.embed_tokens.weight", "model.norm.weight", "visual.patch_embed.proj.weight"} <= set(running)


def test_greedy(world, engine):
    answers = engine.generate(world.requests, world.sampling(num_generations=1, temperature=0.0), never)
    assert max(world.worst(answers).values()) < 1e-4
    for request, (completion,) in zip(world.requests, answers, strict=True):
        likeliest = world.likeliest(request, completion.token_ids)
        assert completion.token_ids == likeliest


def test_samples_depend_on_key_seed_and_number_alone(world, engine):
    together = tokens(engine.generate(world.requests, world.sampling(), never))
    assert len({tuple(response) for response in together[1]}) == len(together[1])
    alone = tokens(engine.generate(world.requests[1:2], world.sampling(), never))
    assert alone[0] == together[1]
    fewer = tokens(engine.generate(world.requests[1:2], world.sampling(num_generations=2), never))
    assert fewer[0] == together[1][:2]
    assert tokens(engine.generate(world.requests[1:2], world.sampling(seed=2), never))[0] != together[1]
    other_key = [Request("another", world.requests[1].prompt)]
    assert tokens(engine.generate(other_key, world.sampling(), never))[0] != together[1]


def test_a_response_ends_with_its_stop_token(world, engine):
    (completion,) = engine.generate(world.requests[:1], world.sampling(num_generations=1), never)[0]
    assert completion.finish_reason == "length" and len(completion.token_ids) == LENGTH
    stop = completion.token_ids[7]
    end = completion.token_ids.index(stop) + 1
    (stopped,) = engine.generate(world.requests[:1], world.sampling(num_generations=1, stop_ids=(stop,)), never)[0]
    assert stopped.finish_reason == "stop" and stopped.token_ids == completion.token_ids[:end]
    np.testing.assert_allclose(stopped.logprobs, completion.logprobs[:end], atol=1e-5)


def test_generation_can_be_broken_off(world, engine):
    begin, asked = time.monotonic(), []

    def soon() -> bool:
        asked.append(time.monotonic())
        return time.monotonic() - begin > 1.0

    with pytest.raises(Interrupted):
        engine.generate(world.requests, world.sampling(**LONG), soon)
    assert time.monotonic() - begin < 10.0 and len(asked) >= 3
    answers = engine.generate(world.requests, world.sampling(), never)
    assert max(world.worst(answers).values()) < 1e-4


def test_late_responses_are_left_out(world, engine):
    before, engine.config = engine.config, replace(engine.config, rollout_timeout_seconds=1.0)
    try:
        answers = engine.generate(world.requests, world.sampling(**LONG), never)
    finally:
        engine.config = before
    assert [len(answer) for answer in answers] == [LONG["num_generations"]] * len(world.requests)
    assert any(completion is None for answer in answers for completion in answer)
    answers = engine.generate(world.requests, world.sampling(), never)
    assert None not in answers[0] and max(world.worst(answers).values()) < 1e-4


def test_a_prompt_that_cannot_be_answered_is_left_out(world, engine):
    """Longer than max_model_len."""
    sequence = world.requests[0].prompt.sequence
    long = replace(sequence, input_ids=sequence.input_ids.repeat(40))
    answers = engine.generate([Request("long", Prompt(long)), *world.requests], world.sampling(), never)
    assert answers[0] == [None] * 4
    assert max(world.worst(answers[1:]).values()) < 1e-4


def test_a_prompt_of_another_length_is_an_error(world, engine):
    """The trainer's pictures and the engine's must make the same number of tokens."""
    prompt = world.requests[1].prompt
    smaller = replace(prompt, images=(prompt.images[0][:, :28],))
    with pytest.raises(UserError, match="prompt image: vLLM makes .* tokens of it, the trainer"):
        engine.generate([Request("image", smaller)], world.sampling(), never)
    answers = engine.generate(world.requests, world.sampling(), never)
    assert max(world.worst(answers).values()) < 1e-4


def test_sleep_and_wake_are_harmless_on_the_cpu(world, engine):
    engine.sleep()
    engine.wake()
    engine.load_weights(world.weights())
    assert max(world.worst(engine.generate(world.requests, world.sampling(), never)).values()) < 1e-4


def test_signals_to_the_whole_job_are_the_trainers(world, engine):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        os.kill(engine.pid, number)
    answers = engine.generate(world.requests, world.sampling(), never)
    assert max(world.worst(answers).values()) < 1e-4


def test_weights_that_are_not_whole_are_refused(world, engine):
    for tensors, message in (
        ([*world.weights(), ("model.extra", torch.zeros(2))], "none of the model's"),
        ([(name, tensor[:1]) for name, tensor in world.weights()], "none of the model's"),
        ([*world.weights(), *world.weights()], "came twice"),
    ):
        with pytest.raises(ValueError, match=message):
            list(engine._checked(tensors))
    with pytest.raises(ValueError, match="1 tensors did not come"):
        engine.load_weights(iter(list(world.weights())[:-1]))
    with pytest.raises(EngineDied, match="restarted"):
        engine.generate(world.requests, world.sampling(), never)
    engine.restart()
    with pytest.raises(EngineDied, match="no weights"):
        engine.generate(world.requests, world.sampling(), never)


def test_killed_in_the_midst_of_generation(world, engine):
    """EngineDied at once, with its end; restarted and given weights it works as before."""
    pid, begin = engine.pid, time.monotonic()

    def kill() -> bool:
        if time.monotonic() - begin > 1.0 and engine.pid == pid:
            os.kill(pid, signal.SIGKILL)
        return False

    with pytest.raises(EngineDied, match=rf"rank 0 \(pid {pid}\) ended \(signal SIGKILL\) while generating"):
        engine.generate(world.requests, world.sampling(**LONG), kill)
    assert time.monotonic() - begin < 10.0
    with pytest.raises(EngineDied, match="restarted"):
        engine.load_weights(world.weights())
    engine.restart()
    engine.load_weights(world.weights())
    assert max(world.worst(engine.generate(world.requests, world.sampling(), never)).values()) < 1e-4


def test_killed_while_weights_arrive(world, engine):
    def broken():
        for number, item in enumerate(world.weights()):
            if number == 10:
                os.kill(engine.pid, signal.SIGKILL)
                time.sleep(0.5)
            yield item

    with pytest.raises(EngineDied, match="SIGKILL.* while loading weights"):
        engine.load_weights(broken())


def test_a_hung_engine_is_ended(world, engine):
    engine.config = replace(engine.config, weight_sync_timeout_seconds=1.0)
    pid = engine.pid
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(EngineDied, match="no answer within 1 s"):
        engine.load_weights(world.weights())
    assert not os.path.exists(f"/proc/{pid}")
    engine.config = replace(engine.config, weight_sync_timeout_seconds=300.0)


def test_the_engine_ends_with_its_trainer(world, tmp_path):
    """kill -9 of the trainer leaves no process behind."""
    program = (
        "import sys, time; sys.path.insert(0, sys.argv[1])\n"
        "import torch; from pathlib import Path\n"
        "from umer1.models.qwen2_vl.directory import HFDirectory; from umer1.rl.config import RolloutConfig\n"
        "from umer1.rl.engines.vllm_engine import VLLMEngine\n"
        "engine = VLLMEngine(RolloutConfig(), HFDirectory.open(sys.argv[1]), dtype=torch.float32, max_model_len=64,\n"
        "                    rank=0, local_rank=0)\n"
        "print(engine.pid, flush=True); time.sleep(600)\n"
    )
    trainer = subprocess.Popen(
        [sys.executable, "-c", program, str(world.root / "model")], stdout=subprocess.PIPE, text=True
    )
    pid = int(trainer.stdout.readline())
    time.sleep(2.0)  # its interpreter has come as far as asking the kernel
    assert os.path.exists(f"/proc/{pid}")
    trainer.kill()
    trainer.wait()
    deadline = time.monotonic() + 10.0
    while _alive(pid):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _alive(pid: int) -> bool:
    """A zombie that nobody has waited for is dead."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_heads_that_vllm_cannot_run_are_refused_at_once(tmp_path):
    from tiny_qwen2_vl import make_tiny_directory

    from umer1.models.qwen2_vl.directory import HFDirectory
    from umer1.rl.engines.vllm_engine import VLLMEngine

    directory = HFDirectory.open(make_tiny_directory(tmp_path, hidden=64))
    with pytest.raises(UserError, match="heads of size 16.*legal are 32"):
        VLLMEngine(RolloutConfig(), directory, dtype=torch.float32, max_model_len=64, rank=0, local_rank=0)
