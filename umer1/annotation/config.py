"""What `umer1 annotate` is told: inputs and output, and what the teacher's answers are judged by."""

import importlib.util
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from umer1.annotation.teacher_config import TeacherConfig
from umer1.distributed.parallel import launched_world_size
from umer1.inference.engine import EngineConfig
from umer1.rules import bound_problems, cannot_be_looked_at, data_root_problems, path_problems, same_place

MODALITIES = ("image", "video", "document")
MODALITY_OF_LAYOUT = {
    "mmeb": "image",
    "llavahound-caption": "video",
    "llavahound-video": "video",
    "vidore": "document",
    "vidore-page": "document",
    "visrag": "document",
}
SUFFIXES = (".parquet", ".jsonl", ".json")
DATASET_FOLDER = "dataset"  # of the output
# The finished files are put together beside that name, in the same file system, and take it in one step.
_NO_LINK = f"holds a symbolic link {DATASET_FOLDER}, which finished files cannot replace; make the output the link"
_SPLIT = re.compile(r"(.+?)-[0-9]{5}-of-[0-9]{5}")  # how the files of a published data set are named


def is_parquet(file: Path) -> bool:
    return file.suffix.lower() == ".parquet"


@dataclass(kw_only=True, slots=True)
class InputFile:
    """One file, or one folder of files, of pairs."""

    layout: Literal["mmeb", "llavahound-caption", "llavahound-video", "vidore", "vidore-page", "visrag"]
    path: str
    split: str | None = None  # of a folder with the files of several splits: those of this one
    dataset: str | None = None  # None: the file's name less its ending
    media_folder: str = ""  # below the data root, where the file's media paths start
    modality: Literal["image", "video", "document"] | None = None  # None: the layout's
    limit: int | None = None  # at most so many pairs, from the start
    query_text: str | None = None  # stands before the query's own text; None: the layout's
    target_text: str | None = None  # the same for the positive

    def files(self) -> list[Path]:
        """The files in name order; empty when there are none.  Hidden ones in a folder, such as macOS's, are none."""
        path = Path(self.path)
        there = (file for file in path.iterdir() if file.name[0] != ".") if path.is_dir() else [path]
        return sorted(file for file in there if self._is_mine(file) and file.is_file())

    def _is_mine(self, file: Path) -> bool:
        return file.suffix.lower() in SUFFIXES and self.split in (None, _split_of(file))

    def kind(self) -> str:
        return self.modality or MODALITY_OF_LAYOUT[self.layout]


@dataclass(kw_only=True, slots=True)
class AnnotateConfig:
    """What is read, and what is written"""

    inputs: list[InputFile] = field(default_factory=list)
    """Files of pairs, [{layout: mmeb, path: FILE or FOLDER, dataset: NAME}, ...]; layouts: mmeb, llavahound-caption,
    llavahound-video, vidore, vidore-page, visrag. Further keys: split (of a folder of several), media_folder (below the
    data root), modality (image, video, document), limit, query_text, target_text."""
    data_root: str | None = None
    """Directory that media paths start at and cannot leave; training gets the same one."""
    embedded_folder: str = "embedded"
    """Folder below the data root that pictures held inside parquet files, and frames of video files, are written to."""
    output: str | None = None
    """Directory of the journal (answers as they come) and of dataset/ (the finished files)."""
    tokenizer: str | None = None
    """Directory of the model that will be trained; its tokenizer.json counts the answers' tokens."""
    pairs_per_shard: int = 20000
    """Pairs of one SFT file."""
    rl_pairs: int = 0
    """Pairs kept apart for RL, as equally many of image, video and document as there are; they get no reasoning."""
    selection_seed: int = 1234
    """Which pairs those are."""
    rl_from: str | None = None
    """rl.jsonl of an earlier run: the pairs for RL are chosen among those in it, and the others in it are left out, so
    that --model may have been trained on that run's SFT files."""
    rl_oversampling: int = 4
    """With --model: so many times --rl-pairs are drawn of each modality, ranked, and chosen from."""
    rl_min_rank: int = 2
    """With --model: a pair whose positive ranks above this among its data set's drawn positives is trivial."""
    rl_max_rank_share: float = 0.5
    """With --model: a pair whose positive ranks below this share of them is hopeless (at 0.5, chance does as well)."""
    ask_refused_again: bool = False
    """Ask sides again that an earlier run's server refused (400, ...), where that was the server's fault."""
    share_identical_sides: bool = True
    """Ask once for sides of equal text and media (labels of classification sets), and use the answer for all."""

    def violations(self) -> list[str]:
        required = ("inputs", "data_root", "output", "tokenizer")
        found = [f"--{name.replace('_', '-')} is required" for name in required if not getattr(self, name)]
        found += bound_problems(self, 1, "pairs_per_shard", "rl_oversampling", "rl_min_rank")
        found += bound_problems(self, 0, "rl_pairs")
        if not 0 < self.rl_max_rank_share <= 1:
            found.append(f"rl_max_rank_share={self.rl_max_rank_share} must be above 0 and at most 1")
        found += self._rl_from_violations()
        found += data_root_problems(self.data_root)
        rule = "holds no tokenizer.json; give the model's directory"
        found += path_problems("tokenizer", self.tokenizer, lambda path: (path / "tokenizer.json").is_file(), rule)
        rule = "is not a directory"
        found += path_problems("output", self.output, lambda path: path.is_dir() or not path.exists(), rule) or (
            path_problems("output", self.output, lambda path: not (path / DATASET_FOLDER).is_symlink(), _NO_LINK)
        )
        folders = {"embedded_folder": self.embedded_folder}
        folders |= {f"inputs[{i}].media_folder": item.media_folder for i, item in enumerate(self.inputs)}
        for name, folder in folders.items():
            if folder.startswith("/") or ".." in folder.split("/"):
                found.append(f"{name}={folder!r} must be a path below the data root")
        return found + [problem for i, item in enumerate(self.inputs) for problem in _input_violations(i, item)]

    def _rl_from_violations(self) -> list[str]:
        if not self.rl_from:
            return []
        found = path_problems("rl_from", self.rl_from, Path.is_file, "is not a file; give rl.jsonl of an earlier run")
        if not self.rl_pairs:
            found.append(f"rl_from={self.rl_from!r} says among which pairs RL's are chosen; --rl-pairs says how many")
        replaced = self.output and Path(self.output) / DATASET_FOLDER
        if replaced and same_place(Path(os.path.realpath(self.rl_from)).parent, replaced):
            found.append(f"rl_from={self.rl_from!r} will be replaced by this run's; copy it to another folder first")
        return found


def _split_of(file: Path) -> str | None:
    """`train` of train-00000-of-00082.parquet."""
    found = _SPLIT.match(file.name)
    return found and found.group(1)


def _input_violations(place: int, item: InputFile) -> list[str]:
    try:
        files, found = item.files(), []
    except OSError as error:
        files, found = [], [cannot_be_looked_at(f"inputs[{place}].path={item.path}", error)]
    if not files and not found:
        of_split = f" of the split {item.split!r}" if item.split else ""
        found.append(
            f"inputs[{place}].path={item.path!r} is no {', '.join(SUFFIXES)} file{of_split} and no folder of some"
        )
    splits = sorted({split for file in files if (split := _split_of(file))})
    if len(splits) > 1:
        found.append(
            f"inputs[{place}].path={item.path!r} has the splits {', '.join(splits)}, which may be the same pairs in "
            "other words; choose one by split"
        )
    if item.limit is not None and item.limit < 1:
        found.append(f"inputs[{place}].limit={item.limit} must be 1 or above")
    if any(map(is_parquet, files)) and importlib.util.find_spec("pyarrow") is None:
        found.append(f"inputs[{place}].path={item.path!r} is parquet, which needs pyarrow: pip install 'umer1[data]'")
    return found


@dataclass(kw_only=True, slots=True)
class FilterConfig:
    """Which answers are kept"""

    strip_box_markers: bool = False
    """Take <|begin_of_box|> and <|end_of_box|> out of the answers (GLM-4.1V-Thinking writes them)."""
    max_reasoning_tokens: int = 8192
    """A longer reasoning is filtered (over_length)."""
    max_summary_tokens: int = 512
    """A longer summary is filtered (over_length)."""
    repetition_ngram: int = 8
    """Tokens of the n-grams that repetition is counted in."""
    max_repetition: float = 0.2
    """Share of an answer's n-grams that stood in it before; above it the answer is filtered (repetition)."""

    def violations(self) -> list[str]:
        found = bound_problems(self, 1, "max_reasoning_tokens", "max_summary_tokens", "repetition_ngram")
        if not 0 <= self.max_repetition <= 1:
            found.append(f"max_repetition={self.max_repetition} must lie between 0 and 1")
        return found


@dataclass(kw_only=True, slots=True)
class AnnotateCommand:
    """umer1 annotate"""

    annotate: AnnotateConfig = field(default_factory=AnnotateConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    filters: FilterConfig = field(default_factory=FilterConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)

    def violations(self) -> list[str]:
        found = self.annotate.violations() + self.teacher.violations() + self.filters.violations()
        if self.engine.model:
            found += self.engine.violations()
            if launched_world_size() > 1:
                found.append(f"{launched_world_size()} processes were started; annotate is one process")
            if not self.annotate.rl_pairs:
                found.append(f"model={self.engine.model!r} ranks the pairs for RL; --rl-pairs says how many")
        else:
            found += bound_problems(self.engine, 1, "num_frames")
        return found
