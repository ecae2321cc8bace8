"""The settings of `umer1 eval --benchmark mmeb-v2`, and their rules."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from umer1.evaluation.adaptive import AdaptiveRule
from umer1.inference.engine import EngineConfig
from umer1.inference.generate import GenerationConfig
from umer1.rl.config import vllm_temperature_problems
from umer1.rl.engines.vllm_install import has_vllm, how_to_install
from umer1.rules import bound_problems, path_problems, same_place

Mode = Literal["disc", "gen"]


@dataclass(kw_only=True, slots=True)
class MMEBConfig:
    """What is evaluated, and where the results go"""

    benchmark: Literal["mmeb-v2"] = "mmeb-v2"
    """The 78 tasks of MMEB-V2."""
    data_root: str | None = None
    """Directory with the data sets as they are published (docs/mmeb_v2.md); media paths start there."""
    output: str | None = None
    """Directory for vectors, the files of the reference evaluation, results.json and results.txt; a run that was
    broken off goes on there."""
    tasks: list[str] | None = None
    """Names of tasks: --tasks K700 MSVD, or a list in YAML; unset: all 78."""
    modality: Literal["image", "video", "visdoc"] | None = None
    """Only the tasks of this modality."""
    query_mode: Mode = "disc"
    """How queries are embedded: disc = the prompt alone, read at <disc_emb>; gen = reason first, read at <gen_emb>."""
    target_mode: Mode = "disc"
    """How candidates are embedded."""
    engine: Literal["torch", "vllm"] = "torch"
    """What generates in gen mode.  vllm: one engine beside each process, states by one batched forward of umer1's."""
    vllm_memory: float = 0.5
    """Share of a GPU's memory that vLLM may take beside umer1's own copy of the model."""
    allow_missing: bool = False
    """Leave out candidates and queries whose media are missing or unusable, and count them, in place of refusing."""
    check: bool = False
    """Report coverage and versions of the data and stop; needs no model."""
    max_queries: int | None = None
    """Score the first N queries of each task alone: a smoke test, marked as such in the results."""
    reference_vectors: bool = True
    """Write the vectors as the reference evaluation does, too (pickles of plain arrays)."""
    save_every: int = 1024
    """Inputs of each copy of the model between two saves within a task; what a killed run may lose."""
    num_workers: int = 4
    """Threads of each process that decode images ahead of the model."""
    stored: str | None = None
    """OUTPUT of earlier runs: every pair of modes, the oracle and adaptive mode from its vectors, without the model;
    the right answers come from --data-root."""
    from_reference: str | None = None
    """Directory with files of the reference evaluation to be scored again, without model and data."""
    unpickle: bool = False
    """With --from-reference: rank its pickled vectors anew (arrays alone are let through), not its predictions."""
    adaptive_price: float = 0.1
    """With --stored: adaptive mode reasons where it promises more than this gain in score."""
    adaptive_probes: int = 16
    """With --stored: queries of a task that reason in any case, to calibrate adaptive mode without labels."""
    adaptive_temperature: float = 0.02
    """With --stored: temperature of the contrastive loss the model was trained with; calibration starts there."""
    adaptive_seed: int = 0
    """With --stored: seed of who is a probe."""

    def violations(self) -> list[str]:
        found = []
        jobs = [name for name in ("check", "stored", "from_reference") if getattr(self, name)]
        if len(jobs) > 1:
            found.append(f"{' and '.join(jobs)} are set; choose one")
        if not self.output and not self.check:
            found.append("--output is required")
        if not self.data_root and not self.from_reference:
            found.append("--data-root is required")
        for name in ("data_root", "stored", "from_reference"):
            found += path_problems(name, getattr(self, name), Path.is_dir, "is not a directory")
        found += bound_problems(self, 1, "save_every", "num_workers")
        source = self.stored or self.from_reference
        if source and self.output and same_place(source, self.output):
            found.append(f"output={self.output!r} is what is scored; name another directory for its results")
        found += bound_problems(self, 1, "max_queries")
        if self.max_queries is not None and source:
            found.append(f"max_queries={self.max_queries} is for runs of a model; what is stored is scored whole")
        if self.unpickle and not self.from_reference:
            found.append("unpickle needs --from-reference")
        if not 0 < self.vllm_memory < 1:
            found.append(f"vllm_memory={self.vllm_memory} must be between 0 and 1")
        return found + [f"adaptive rule: {problem}" for problem in self.rule().violations()]

    def rule(self) -> AdaptiveRule:
        return AdaptiveRule(
            price=self.adaptive_price,
            num_probes=self.adaptive_probes,
            temperature=self.adaptive_temperature,
            seed=self.adaptive_seed,
        )

    @property
    def needs_model(self) -> bool:
        return not (self.check or self.stored or self.from_reference)

    @property
    def generates(self) -> bool:
        return "gen" in (self.query_mode, self.target_mode)


@dataclass(kw_only=True, slots=True)
class MMEBCommand:
    """umer1 eval --benchmark mmeb-v2"""

    eval: MMEBConfig = field(default_factory=MMEBConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)

    def violations(self) -> list[str]:
        found = self.eval.violations()
        if not self.eval.needs_model:
            return found + bound_problems(self.engine, 1, "num_frames")
        return found + self.engine.violations() + self.generation.violations() + self._vllm_violations()

    def _vllm_violations(self) -> list[str]:
        if self.eval.engine != "vllm" or not self.eval.generates:
            return []
        found = [] if has_vllm() else [f"engine=vllm: vLLM is not installed: {how_to_install()}; or use --engine torch"]
        if self.generation.top_p != 1.0:
            found.append(f"top_p={self.generation.top_p} must be 1 with engine=vllm; or use --engine torch")
        if self.generation.temperature > 0:
            found += vllm_temperature_problems(self.generation.temperature)
        if self.engine.tensor_model_parallel_size * self.engine.pipeline_model_parallel_size > 1:
            found.append("engine=vllm has one engine a process: tensor and pipeline parallel sizes must be 1")
        return found
