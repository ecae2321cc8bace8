"""One record a log interval: a line in Megatron's grammar, the same as JSONL, TensorBoard and, when asked, W&B."""

import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from umer1.files import write_text

LINE = (  # record key, what the line calls it, format
    ("loss", "loss", ".4f"),
    ("disc_loss", "disc nce", ".4f"),
    ("gen_loss", "gen nce", ".4f"),
    ("ce_query", "ce query", ".4f"),
    ("ce_positive", "ce positive", ".4f"),
    ("disc_recall", "disc recall@1", ".3f"),
    ("gen_recall", "gen recall@1", ".3f"),
    ("disc_positive_similarity", "disc pos sim", ".3f"),
    ("disc_negative_similarity", "disc neg sim", ".3f"),
    ("gen_positive_similarity", "gen pos sim", ".3f"),
    ("gen_negative_similarity", "gen neg sim", ".3f"),
    ("temperature", "temperature", ".4f"),
    ("reward", "reward", ".4f"),
    ("reward_format", "format", ".3f"),
    ("reward_embedding", "embedding", ".4f"),
    ("ranking", "ranking", ".3f"),
    ("margin", "margin", ".3f"),
    ("reward_std", "spread in groups", ".4f"),
    ("zero_spread_share", "groups without spread", ".1%"),
    ("kl", "KL", ".4g"),
    ("clip_share", "clipped", ".2%"),
    ("entropy", "entropy", ".3f"),
    ("response_length", "response length", ".1f"),
    ("cut_off_share", "cut off", ".1%"),
    ("missing_gen_emb_share", "no <gen_emb>", ".1%"),
    ("failed_share", "failed", ".1%"),
    ("mismatch_mean", "engine mismatch", ".2e"),
    ("mismatch_k3", "mismatch k3", ".2e"),
    ("mismatch_p99", "p99 ratio", ".4f"),
    ("mismatch_p99_truncated", "truncated", ".4f"),
    ("seconds_rollout", "rollout (s)", ".2f"),
    ("seconds_score", "scoring (s)", ".2f"),
    ("seconds_update", "update (s)", ".2f"),
    ("seconds_sync", "sync (s)", ".2f"),
    ("generated_tokens_per_second", "generated tokens/s", ",.0f"),
    ("trained_tokens_per_second", "trained tokens/s", ",.0f"),
    ("eval_gen_hit1", "held-out gen hit@1", ".3f"),
    ("eval_reward", "held-out reward", ".4f"),
    ("grad_norm", "grad norm", ".3f"),
    ("skipped_iterations", "number of skipped iterations", "d"),
    ("nan_iterations", "number of nan iterations", "d"),
    ("tokens_per_second", "tokens/s", ",.0f"),
    ("patches_per_second", "patches/s", ",.0f"),
    ("tflops_per_device", "throughput per device (TFLOP/s)", ".4g"),
    ("mfu", "MFU", ".1%"),
    ("images_per_second", "images decoded/s", ",.1f"),
    ("frames_per_second", "frames decoded/s", ",.1f"),
    ("waiting_share", "waiting for data", ".1%"),
    ("padding_share", "padding", ".1%"),
    ("load_imbalance", "load imbalance", ".3f"),
    ("memory_mib", "memory (MiB)", ".0f"),
    ("seconds_save", "save (s)", ".2f"),
    ("seconds_save_background", "save in the background (s)", ".2f"),
    ("bad_samples", "bad samples", "d"),
    ("slowest_rank", "slowest rank", "d"),
    ("slowest_ratio", "its time by the median rank's", ".2f"),
)


@dataclass(kw_only=True, slots=True)
class LoggingConfig:
    """What the run tells and where"""

    log_interval: int = 1
    """Steps between log lines; numbers are means over the interval."""
    tensorboard_dir: str | None = None
    """TensorBoard directory; default: SAVE/tensorboard."""
    wandb_project: str | None = None
    """Weights & Biases project; not used unless it is given (needs the wandb package)."""

    def violations(self) -> list[str]:
        problems = []
        if self.log_interval < 1:
            problems.append(f"log_interval={self.log_interval} must be 1 or above")
        if self.wandb_project and importlib.util.find_spec("wandb") is None:
            problems.append(f"wandb_project={self.wandb_project} needs the wandb package: pip install wandb")
        return problems


def duration(seconds: float) -> str:
    """1:02:03"""
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


class MetricsLogger:
    """Rank 0's record of the run in `directory` (None: console alone).  After a resume, lines of steps that will be
    run again are dropped from metrics.jsonl, so that each step stands there once.  A disk that refuses a line is said
    once: it is the next checkpoint that ends the run then, on all ranks."""

    def __init__(self, config: LoggingConfig, directory: str | None, resumed_at: int, settings: dict[str, Any]):
        self.directory, self._refused = directory, False
        self.jsonl = self.tensorboard = self.wandb = None
        if directory is not None:
            path = Path(directory) / "metrics.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            keep_until(path, resumed_at)
            self.jsonl = open(path, "a", encoding="utf-8")
            from torch.utils.tensorboard import SummaryWriter

            board = config.tensorboard_dir or str(Path(directory) / "tensorboard")
            self.tensorboard = SummaryWriter(board, purge_step=resumed_at + 1 if resumed_at else None)
        if config.wandb_project:
            import wandb

            self.wandb = wandb.init(project=config.wandb_project, dir=directory, config=settings, resume="allow")

    def log(self, record: dict[str, Any]) -> None:
        print(log_line(record), flush=True)
        if self.jsonl:
            clean = self._append(record)
            with self._saying_once():
                for key, value in clean.items():
                    if isinstance(value, (int, float)) and key != "iteration":
                        self.tensorboard.add_scalar(key, value, record["iteration"])
        if self.wandb:
            self.wandb.log(record, step=record["iteration"])

    def note(self, record: dict[str, Any]) -> None:
        """Numbers that are of no step: metrics.jsonl and the console."""
        named = [f"{name}: {record[key]:{form}}" for key, name, form in LINE if record.get(key) is not None]
        print(f" [{time.strftime('%Y-%m-%d %H:%M:%S')}] iteration {record['iteration']:8d} | {' | '.join(named)}")
        if self.jsonl:
            self._append(record)

    def close(self) -> None:
        if self.jsonl:
            with self._saying_once():
                os.fsync(self.jsonl.fileno())
                self.jsonl.close()
            with self._saying_once():
                self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()

    def _append(self, record: dict[str, Any]) -> dict[str, Any]:
        """One line; returns what it holds."""
        clean = {key: finite_or_none(value) for key, value in record.items()}
        with self._saying_once():
            self.jsonl.write(json.dumps(clean) + "\n")
            self.jsonl.flush()
        return clean

    @contextmanager
    def _saying_once(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._refused:
                text = f"the record of the run cannot be written to {self.directory}: {error}; training goes on"
                print(text, file=sys.stderr, flush=True)
            self._refused = True


def finite_or_none(value: Any) -> Any:
    """JSON has no NaN or infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def keep_until(path: Path, iteration: int) -> None:
    """Drop the records after `iteration` (all of them for a run that starts), and a last line that a crash cut off."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        step = record.get("iteration") if isinstance(record, dict) else None
        if type(step) is int and step <= iteration and iteration > 0:
            kept.append(line)
    write_text(path, "".join(line + "\n" for line in kept))


def log_line(record: dict[str, Any]) -> str:
    """Megatron's console line, then ours in the same grammar."""
    parts = [
        f" [{time.strftime('%Y-%m-%d %H:%M:%S')}] iteration {record['iteration']:8d}/{record['train_iters']:8d}",
        f"consumed samples: {record['consumed_samples']:12d}",
        f"elapsed time per iteration (ms): {record['milliseconds']:.1f}",
        f"learning rate: {record['learning_rate']:.6E}",
        f"global batch size: {record['global_batch_size']:5d}",
    ]
    parts += [f"{name}: {record[key]:{form}}" for key, name, form in LINE if record.get(key) is not None]
    return " | ".join([*parts, f"ETA: {duration(record['eta_seconds'])} |"])
