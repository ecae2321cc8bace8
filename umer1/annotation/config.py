"""What `umer1 annotate` is told: inputs and output, the teacher, and what its answers are judged by."""

import importlib.util
import os
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from umer1.distributed.parallel import launched_world_size
from umer1.inference.engine import EngineConfig
from umer1.rl.engines.vllm_assets import INSTALL, has_vllm

TEACHER_PROMPT = (
    "The above is one input for a search system: text, pictures, frames of a video, or several of them together. Think "
    "about what it shows, says and asks for, inside <think> </think> tags. Then give, inside <answer> </answer> tags, "
    "one word or one sentence that sums up the entire input."
)
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


@dataclass(kw_only=True, slots=True)
class InputFile:
    """One file, or one folder of files, of pairs."""

    layout: Literal["mmeb", "llavahound-caption", "llavahound-video", "vidore", "vidore-page", "visrag"]
    path: str
    dataset: str | None = None  # None: the file's name less its ending
    media_folder: str = ""  # below the data root, where the file's media paths start
    modality: Literal["image", "video", "document"] | None = None  # None: the layout's
    limit: int | None = None  # at most so many pairs, from the start
    query_text: str | None = None  # stands before the query's own text; None: the layout's
    target_text: str | None = None  # the same for the positive

    def files(self) -> list[Path]:
        """The files in name order; empty when there are none."""
        path = Path(self.path)
        if not path.is_dir():
            return [path] if path.is_file() and path.suffix in SUFFIXES else []
        return sorted(file for file in path.iterdir() if file.suffix in SUFFIXES and file.is_file())

    def kind(self) -> str:
        return self.modality or MODALITY_OF_LAYOUT[self.layout]


@dataclass(kw_only=True, slots=True)
class AnnotateConfig:
    """What is read, and what is written"""

    inputs: list[InputFile] = field(default_factory=list)
    """Files of pairs, [{layout: mmeb, path: FILE or FOLDER, dataset: NAME}, ...]; layouts: mmeb, llavahound-caption,
    llavahound-video, vidore, vidore-page, visrag. Further keys: media_folder (below the data root), modality (image,
    video, document), limit, query_text, target_text."""
    data_root: str | None = None
    """Directory that media paths start at and cannot leave; training gets the same one."""
    embedded_folder: str = "embedded"
    """Folder below the data root that pictures held inside parquet files, and frames of video files, are written to."""
    output: str | None = None
    """Directory of the journal (answers as they come) and of dataset/ (the finished files)."""
    tokenizer: str | None = None
    """Directory of the model that will be trained; its tokenizer.json counts the answers' tokens."""
    num_frames: int = 8
    """Frames of a video, evenly spaced over those in its folder or file."""
    pairs_per_shard: int = 20000
    """Pairs of one SFT file."""
    rl_pairs: int = 0
    """Pairs kept apart for RL, as equally many of image, video and document as there are; they get no reasoning."""
    selection_seed: int = 1234
    """Which pairs those are."""
    rl_oversampling: int = 4
    """With --model: so many times --rl-pairs are drawn of each modality, ranked, and chosen from."""
    rl_min_rank: int = 2
    """With --model: a pair whose positive ranks above this among its data set's drawn positives is trivial."""
    rl_max_rank_share: float = 0.5
    """With --model: a pair whose positive ranks below this share of them is hopeless (at 0.5, chance does as well)."""
    share_identical_sides: bool = True
    """Ask once for sides of equal text and media (labels of classification sets), and use the answer for all."""

    def violations(self) -> list[str]:
        required = ("inputs", "data_root", "output", "tokenizer")
        found = [f"--{name.replace('_', '-')} is required" for name in required if not getattr(self, name)]
        least_values = {"num_frames": 1, "pairs_per_shard": 1, "rl_pairs": 0, "rl_oversampling": 1, "rl_min_rank": 1}
        for name, least in least_values.items():
            if getattr(self, name) < least:
                found.append(f"{name}={getattr(self, name)} must be {least} or above")
        if not 0 < self.rl_max_rank_share <= 1:
            found.append(f"rl_max_rank_share={self.rl_max_rank_share} must be above 0 and at most 1")
        if self.data_root and not Path(self.data_root).is_dir():
            found.append(f"data_root={self.data_root!r} is not a directory; give the folder that media paths start at")
        if self.tokenizer and not (Path(self.tokenizer) / "tokenizer.json").is_file():
            found.append(f"tokenizer={self.tokenizer!r} holds no tokenizer.json; give the model's directory")
        if self.output and Path(self.output).exists() and not Path(self.output).is_dir():
            found.append(f"output={self.output!r} is not a directory")
        folders = {"embedded_folder": self.embedded_folder}
        folders |= {f"inputs[{i}].media_folder": item.media_folder for i, item in enumerate(self.inputs)}
        for name, folder in folders.items():
            if folder.startswith("/") or ".." in folder.split("/"):
                found.append(f"{name}={folder!r} must be a path below the data root")
        return found + [problem for i, item in enumerate(self.inputs) for problem in _input_violations(i, item)]


def _input_violations(place: int, item: InputFile) -> list[str]:
    files = item.files()
    found = []
    if not files:
        found.append(f"inputs[{place}].path={item.path!r} is no {', '.join(SUFFIXES)} file and no folder of some")
    if item.limit is not None and item.limit < 1:
        found.append(f"inputs[{place}].limit={item.limit} must be 1 or above")
    if any(file.suffix == ".parquet" for file in files) and importlib.util.find_spec("pyarrow") is None:
        found.append(f"inputs[{place}].path={item.path!r} is parquet, which needs pyarrow: pip install 'umer1[data]'")
    return found


@dataclass(kw_only=True, slots=True)
class TeacherConfig:
    """The model that writes reasoning and summary, behind an OpenAI-compatible endpoint"""

    endpoint: str | None = None
    """Base address, such as http://localhost:8000/v1; /chat/completions is added."""
    teacher_model: str | None = None
    """The model's name at the endpoint; with --serve-teacher, its directory."""
    serve_teacher: bool = False
    """Run the teacher by vLLM in a process of this command, which ends with it, in place of --endpoint."""
    vllm_arguments: str = ""
    """With --serve-teacher: further arguments of vLLM's server; written with =, --vllm-arguments="--dtype float32"."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the API key; none is sent without it. The key is never written."""
    teacher_prompt: str = TEACHER_PROMPT
    """What the teacher is asked, after the input."""
    teacher_temperature: float = 0.8
    """Temperature of sampling."""
    teacher_top_p: float = 0.6
    """Nucleus of sampling."""
    max_answer_tokens: int = 8704
    """Most tokens of an answer; one that is cut off there is filtered."""
    max_image_pixels: int = 1_048_576
    """A larger picture is scaled down to this before it is sent."""
    max_frame_pixels: int = 262_144
    """The same for a frame of a video."""
    max_source_pixels: int = 100_000_000
    """A picture whose header claims more is refused before it is decoded."""
    video_as: Literal["images", "video_url"] = "images"
    """How frames are sent: as pictures, or as one video_url of JPEG frames, which vLLM understands."""
    concurrency: int = 32
    """Requests under way at once."""
    request_timeout_seconds: float = 600.0
    """Seconds of one request, from its first byte to the answer's last."""
    connect_timeout_seconds: float = 10.0
    """Seconds to reach the endpoint."""
    max_attempts: int = 8
    """Times one side is asked before it counts as failed (an answer, good or bad, is never asked for again)."""
    backoff_seconds: float = 1.0
    """Longest wait before the second attempt; it doubles with each further one, and chance picks a part of it."""
    max_backoff_seconds: float = 60.0
    """Longest such wait. A server's Retry-After is kept to, up to an hour."""
    stop_after_failures: int = 32
    """Failed sides in a row that end the run; the same command goes on from there."""
    input_token_price: float = 0.0
    """Price of a million tokens sent, for the cost shown."""
    output_token_price: float = 0.0
    """Price of a million tokens written by the teacher."""
    progress_seconds: float = 5.0
    """Seconds between lines of progress."""

    def violations(self) -> list[str]:
        found = [
            f"--{name.replace('_', '-')} is required"
            for name in ("endpoint", "teacher_model")
            if not getattr(self, name) and not (name == "endpoint" and self.serve_teacher)
        ]
        if self.serve_teacher:
            found += self._serving_violations()
        if self.endpoint and (problem := _endpoint_problem(self.endpoint)):
            found.append(f"endpoint={self.endpoint!r} {problem}; use http[s]://HOST[:PORT]/v1")
        if self.api_key_env and not os.environ.get(self.api_key_env):
            found.append(f"api_key_env={self.api_key_env}: that environment variable is not set")
        least = {"max_answer_tokens": 1, "max_image_pixels": 784, "max_frame_pixels": 784, "max_source_pixels": 1}
        least |= {"concurrency": 1, "max_attempts": 1, "stop_after_failures": 1}
        found += [
            f"{name}={getattr(self, name)} must be {low} or above"
            for name, low in least.items()
            if getattr(self, name) < low
        ]
        positive = ("request_timeout_seconds", "connect_timeout_seconds", "backoff_seconds", "max_backoff_seconds")
        found += [
            f"{name}={getattr(self, name)} must be above 0" for name in positive if not 0 < getattr(self, name) < 1e6
        ]
        at_least_0 = ("teacher_temperature", "input_token_price", "output_token_price", "progress_seconds")
        found += [
            f"{name}={getattr(self, name)} must be 0 or above"
            for name in at_least_0
            if not 0 <= getattr(self, name) < 1e6
        ]
        if not 0 < self.teacher_top_p <= 1:
            found.append(f"teacher_top_p={self.teacher_top_p} must be above 0 and at most 1")
        return found

    def _serving_violations(self) -> list[str]:
        found = []
        if self.endpoint or self.api_key_env:
            found.append("serve_teacher starts an endpoint of its own; leave out --endpoint and --api-key-env")
        if self.teacher_model and not Path(self.teacher_model).is_dir():
            found.append(f"teacher_model={self.teacher_model!r} is not a directory, which --serve-teacher needs")
        if not has_vllm():
            found.append(f"serve_teacher needs vLLM: {INSTALL}")
        try:
            shlex.split(self.vllm_arguments)
        except ValueError as error:
            found.append(f"vllm_arguments={self.vllm_arguments!r}: {error}")
        return found


def _endpoint_problem(endpoint: str) -> str | None:
    try:
        parts = urlsplit(endpoint)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
            return "is no address"
        if parts.username or parts.password:
            return "holds a password; name a variable with --api-key-env instead"
        return "must have no ? and no #" if parts.query or parts.fragment else None
    except ValueError as error:
        return f"is no address ({error})"


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
        names = ("max_reasoning_tokens", "max_summary_tokens", "repetition_ngram")
        found = [f"{name}={getattr(self, name)} must be 1 or above" for name in names if getattr(self, name) < 1]
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
        return found
