"""Bad input for examples/grpo.py ends in one clear message, all violations at once, before any process group exists.

What only files or the running program can show is run as a program.
"""

import subprocess

import pytest
from grpo_reference import write_rl_pairs
from programs import GRPO, ROOT, SFT, run_in_forks, run_program
from sft_reference import write_pairs
from tiny_qwen2_vl import make_tiny_directory

from umer1.errors import ConfigError, UserError
from umer1.training import engines
from umer1.training.launch import default_policy_violations, read_command_line
from umer1.training.policy_config import GRPOConfig

DEFAULT = ROOT / "examples" / "configs" / "mini_grpo.yaml"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """(model, RL data, SFT data)"""
    folder = tmp_path_factory.mktemp("good")
    model = make_tiny_directory(folder / "model", layers=4, hidden=128)
    return model, write_rl_pairs(folder / "rl", 8), write_pairs(folder / "sft", count=8)


def flags(good, *more: str) -> list[str]:
    base = ["--hf-model", str(good[0]), "--data-path", str(good[1]), "--rollout-engine", "torch", "--fp32"]
    base += "--global-batch-size 8 --train-iters 1 --num-generations 2 --seq-length 512".split()
    return [*base, "--max-completion-length", "16", *more]


def read(arguments: list[str]):
    return read_command_line(GRPOConfig, arguments, DEFAULT, default_policy_violations)


def refused(arguments: list[str]) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        read(arguments)
    return caught.value


# what is wrong: (flags, processes, number of problems, words that the message must hold)
CONFIGURATIONS = {
    "unknown flag": ("--zzzz 1", 1, 1, ["unknown flag --zzzz", "--help"]),
    "misspelt flag": ("--num-generation 4", 1, 1, ["did you mean --num-generations"]),
    "a flag of SFT": ("--contrastive-temperature 0.1", 1, 1, ["unknown flag --contrastive-temperature"]),
    "top-p": ("--top-p 0.9", 1, 1, ["top_p=0.9", "top_p=1"]),
    "top-k": ("--top-k 50", 1, 1, ["top_k=50", "top_k=0"]),
    "one generation": ("--num-generations 1", 1, 1, ["num_generations=1", "2 or above"]),
    "temperature 0": ("--temperature 0", 1, 1, ["temperature=0.0", "above 0"]),
    "temperature above vLLM's": (
        "--temperature 2.5 --rollout-engine vllm",
        1,
        1,
        ["temperature=2.5", "0.01 to 2 for vLLM", "torch engine"],
    ),
    "temperature below vLLM's": ("--temperature 0.005 --rollout-engine vllm", 1, 1, ["temperature=0.005", "0.01 to 2"]),
    "no failed steps": ("--max-failed-steps 0", 1, 1, ["max_failed_steps=0", "1 or above"]),
    "temperature nan": ("--temperature nan", 1, 1, ["temperature=nan"]),
    "epsilon 0": ("--epsilon 0", 1, 1, ["epsilon=0.0", "between 0 and 1"]),
    "epsilon nan": ("--epsilon nan", 1, 1, ["epsilon=nan"]),
    "epsilon-high below 0": ("--epsilon-high -1", 1, 1, ["epsilon_high=-1.0"]),
    "beta below 0": ("--beta -0.1", 1, 1, ["beta=-0.1"]),
    "beta nan": ("--beta nan", 1, 1, ["beta=nan"]),
    "cap 0": ("--importance-sampling-cap 0", 1, 1, ["importance_sampling_cap=0.0"]),
    "cap nan": ("--importance-sampling-cap nan", 1, 1, ["importance_sampling_cap=nan"]),
    "unknown normalisation": ("--loss-normalisation mean", 1, 1, ["'mean'", "response or constant"]),
    "unknown engine": ("--rollout-engine sglang", 1, 1, ["'sglang'", "auto or vllm or torch"]),
    "misspelt reward": ("--rewards [{name:_fromat}]", 1, 1, ["'fromat'", "format, embedding, ranking", "module:"]),
    "reward without name": ("--rewards [{weight:_1}]", 1, 1, ["rewards[0].name is missing"]),
    "misspelt key of a reward": ("--rewards [{name:_format,_wieght:_2}]", 1, 1, ["rewards[0].wieght", "name, weight"]),
    "no list": ("--rewards format", 1, 1, ["list of maps"]),
    "no rewards": ("--rewards []", 1, 1, ["rewards is empty"]),
    "a module that is not there": ("--rewards [{name:_'nowhere.at:all'}]", 1, 1, ["nowhere.at", "PYTHONPATH"]),
    "a function that is not there": ("--rewards [{name:_'math:nowhere'}]", 1, 1, ["math", "no function nowhere"]),
    "weight nan": ("--rewards [{name:_format,_weight:_.nan}]", 1, 1, ["weight=nan"]),
    "sets that do not divide": ("--comparison-pairs 3", 1, 1, ["comparison_pairs=3", "--comparison-pairs 2"]),
    "sets of one pair": ("--comparison-pairs 1", 1, 1, ["comparison_pairs=1", "2 or above"]),
    "no room for a prompt": ("--max-completion-length 512", 1, 1, ["max_completion_length=512", "seq_length=512"]),
    "no tokens": ("--max-completion-length 0", 1, 1, ["max_completion_length=0"]),
    "no data file": ("--data-path nowhere.json", 1, 1, ["data_path=nowhere.json", "does not exist"]),
    "no held-out file": ("--eval-data-path nowhere.json", 1, 1, ["eval_data_path=nowhere.json", "does not exist"]),
    "no held-out root": (f"--eval-data-path {__file__} --eval-data-root no", 1, 1, ["eval_data_root=no"]),
    "held-out root alone": ("--eval-data-root /tmp", 1, 1, ["eval_data_root", "give both"]),
    "address without port": ("--rollout-engine vllm --rollout-server host", 1, 1, ["'host' is not HOST:PORT"]),
    "port out of range": ("--rollout-engine vllm --rollout-server h:99999", 1, 1, ["'h:99999' is not HOST:PORT"]),
    "port is no number": ("--rollout-engine vllm --rollout-server h:1,h:x", 1, 1, ["'h:x' is not HOST:PORT"]),
    "server for torch": ("--rollout-server 127.0.0.1:1", 1, 1, ["rollout_server is for vLLM"]),
    "servers that do not divide": ("--rollout-engine auto --rollout-server h:1,h:2,h:3", 2, 1, ["3 servers"]),
    "load and hf-model": ("--load /tmp", 1, 1, ["hf_model=", "load=/tmp", "keep one"]),
    "mini-batches that do not divide": ("--mini-batches 3", 1, 1, ["mini_batches=3"]),
    "batch that does not divide": (
        "--comparison-pairs 2 --global-batch-size 10",
        4,
        1,
        ["global_batch_size=10", "8 or"],
    ),
    "TP above the KV heads": ("--tensor-model-parallel-size 4", 4, 1, ["num_key_value_heads=2"]),
    "a time-out behind torch's": ("--rollout-timeout-seconds 99999", 2, 1, ["rollout_timeout_seconds=99999"]),
    "all at once": (
        "--top-p 0.5 --num-generations 1 --beta -1 --rewards [{name:_fromat}] --eval-data-path nowhere.json --zz 1",
        1,
        6,
        ["6 problems", "top_p", "num_generations", "beta", "fromat", "nowhere.json", "--zz"],
    ),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_configuration(good, name, monkeypatch):
    more, processes, count, words = CONFIGURATIONS[name]
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    error = refused(flags(good, *(word.replace(":_", ": ").replace(",_", ", ") for word in more.split())))
    assert len(error.violations) == count, error
    for word in words:
        assert word in str(error), f"{word!r} not in: {error}"


def test_good_flags_are_taken(good, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    config, directory = read(flags(good))
    assert config.rollout.num_generations == 2 and directory.path == good[0]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty working directory, one process, and no vLLM."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(engines, "has_vllm", lambda: False)
    return tmp_path


def one_line(arguments: list[str]) -> str:
    with pytest.raises(UserError) as caught:
        read(arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_without_an_sft_run_one_line_names_the_command(elsewhere):
    for made in (None, "runs", "runs/mini-umer1"):
        if made:
            (elsewhere / made).mkdir()
        message = one_line([])
        assert "torchrun --nproc-per-node 2 examples/pretrain_sft.py" in message and "runs/mini-umer1" in message
    assert "load=some/where" in str(refused(["--load", "some/where"]))
    (only,) = refused(["--load", "none"]).violations
    assert "--load" in only and "--hf-model" in only


def test_vllm_that_is_not_installed(good, elsewhere):
    (only,) = refused(flags(good, "--rollout-engine", "vllm")).violations
    assert "rollout_engine=vllm" in only and "pip install" in only and "--rollout-engine torch" in only
    both = refused(["--rollout-engine", "vllm", "--load", "none"]).violations
    assert len(both) == 2 and "--hf-model" in both[0] and "pip install" in both[1]
    config, directory = read(flags(good, "--rollout-engine", "auto"))
    assert not engines.uses_vllm(config, directory.config)


def test_heads_that_vllm_cannot_run(good, elsewhere, monkeypatch):
    """16 wide: said before a process is started; auto takes the other engine."""
    good = make_tiny_directory(elsewhere / "model"), good[1]
    monkeypatch.setattr(engines, "has_vllm", lambda: True)
    (only,) = refused(flags(good, "--rollout-engine", "vllm")).violations
    assert "heads of size 16" in only and "--rollout-engine torch" in only
    for engine in ("auto", "torch"):
        config, directory = read(flags(good, "--rollout-engine", engine))
        assert not engines.uses_vllm(config, directory.config)


def assert_one_message(done: subprocess.CompletedProcess, *words: str) -> None:
    assert done.returncode != 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stderr.count("grpo: error:") == 1, done.stderr[-3000:]
    message = done.stderr[done.stderr.index("grpo: error:") :]
    assert 'grpo.py", line' not in done.stderr, f"a traceback: {done.stderr[-3000:]}"
    for word in words:
        assert word in message, f"{word!r} not in: {message[-1500:]}"


def test_the_program_says_all_of_it_once_and_in_no_time(good):
    done = run_program(GRPO, flags(good, "--top-k", "5", "--rewards", "[{name: fromat}]"), 2, timeout=100)
    assert_one_message(done, "2 problems", "top_k=5", "fromat")


def test_an_sft_file_given_to_grpo(good):
    assert_one_message(run_in_forks(GRPO, flags(good, "--data-path", str(good[2]))), "RL", "qry_text", "SFT")


def test_an_sft_file_as_held_out_data(good):
    assert_one_message(run_in_forks(GRPO, flags(good, "--eval-data-path", str(good[2]))), str(good[2]), "RL", "SFT")


def test_an_rl_file_given_to_sft(good):
    arguments = ["--hf-model", str(good[0]), "--data-path", str(good[1]), "--global-batch-size", "8"]
    done = run_in_forks(SFT, [*arguments, "--train-iters", "1", "--fp32", "--seq-length", "512"])
    assert done.returncode == 2 and done.stderr.count("pretrain_sft: error:") == 1 and "Traceback" not in done.stderr
    assert "RL" in done.stderr and "SFT" in done.stderr, done.stderr[-1500:]
