"""Settings of umer1.training.watch."""

from dataclasses import dataclass, field


@dataclass(kw_only=True, slots=True)
class WatchConfig:
    """Watching a run (docs/watching.md)"""

    hang_timeout_minutes: float | None = None
    """Minutes without progress of a rank after which all ranks write where they are and the run ends with status 75; 0
    switches it off.  Default: 0.95 of distributed_timeout_minutes, so that it comes before collectives time out."""
    loss_spike_deviations: float = 10.0
    """A loss or gradient norm so many robust deviations above the median of the last 64 steps has the ids of its
    samples listed in SAVE/offending_samples.jsonl, as has every one that is not finite; 0 lists the latter alone."""
    profile: bool = False
    """Profile the steps from profile_step_start on, up to but without profile_step_end (docs/watching.md)."""
    profile_step_start: int = 10
    """First profiled step, as the log numbers them."""
    profile_step_end: int = 12
    """First step after it that is no longer profiled."""
    profile_ranks: list[str] = field(default_factory=lambda: ["0"])
    """Ranks that profile.  Whatever is set here, SIGUSR2 has the rank that it is sent to profile its next step."""

    def violations(self, world_size: int | None = None) -> list[str]:
        """Every broken rule; with `world_size` those of the number of processes too."""
        found = []
        if self.hang_timeout_minutes is not None and not 0 <= self.hang_timeout_minutes < float("inf"):
            found.append(f"hang_timeout_minutes={self.hang_timeout_minutes} must be above 0, or 0 for none")
        if not 0 <= self.loss_spike_deviations < float("inf"):
            found.append(f"loss_spike_deviations={self.loss_spike_deviations} must be above 0, or 0 for none")
        if not 1 <= self.profile_step_start < self.profile_step_end:
            found.append(
                f"profile_step_start={self.profile_step_start} must be 1 or above, and below "
                f"profile_step_end={self.profile_step_end}"
            )
        legal = "from 0 on" if world_size is None else f"from 0 to {world_size - 1}"
        if wrong := [word for word in self.profile_ranks if not _is_rank(word, world_size)]:
            found.append(f"profile_ranks={' '.join(wrong)} must be ranks, numbers {legal}")
        return found

    def hang_seconds(self, distributed_timeout_minutes: float) -> float | None:
        """The time-out in seconds, None where it is off."""
        minutes = self.hang_timeout_minutes
        return 60 * (0.95 * distributed_timeout_minutes if minutes is None else minutes) or None


def _is_rank(word: str, world_size: int | None) -> bool:
    return word.isdecimal() and (world_size is None or int(word) < world_size)
