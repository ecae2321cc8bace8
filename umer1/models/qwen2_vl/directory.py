"""A Hugging Face Qwen2-VL directory as umer1 sees it: checked before it is used, and never executed.

Only JSON and safetensors are read.  `auto_map` entries (code shipped with a model) are ignored and left out of exports;
so is where transformers once loaded the files from, which may be a path of somebody's machine.
"""

import json
import logging
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from umer1.errors import ConfigError, UserError
from umer1.files import write_text
from umer1.models.qwen2_vl.config import Qwen2VLConfig
from umer1.models.qwen2_vl.safetensors_index import TensorEntry, scan_weights

logger = logging.getLogger(__name__)

GEN_EMB = "<gen_emb>"
DISC_EMB = "<disc_emb>"
# docs/method.md, 1: the embedding tokens, in the order in which they are added, and whose rows they start from
_INITIAL_FROM = {GEN_EMB: "<|object_ref_end|>", DISC_EMB: "<|object_ref_start|>"}

INPUTS_NAME = "umer1_inputs.json"  # what umer1's training shaped the model's inputs by

# Small text files of a directory; what is there is kept in memory and written beside every export and checkpoint.
_ASSETS = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
    "chat_template.jinja",
    "generation_config.json",
    INPUTS_NAME,
)
_NOT_PASSED_ON = ("auto_map", "_name_or_path", "name_or_path")  # Python code, and where files were loaded from
_MAX_ASSET_BYTES = 64 << 20  # Qwen2-VL's tokenizer.json has 7 MB


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Ids of the tokens that umer1 treats apart, looked up in the tokenizer."""

    disc_emb: int
    gen_emb: int
    image_pad: int
    video_pad: int
    vision_start: int
    vision_end: int
    im_start: int
    im_end: int


@dataclass(frozen=True)
class HFDirectory:
    """An opened directory.  `tokenizer` and `config` already include the two embedding tokens.

    initial_rows: id of an added embedding token -> id of the token whose row it starts from; empty when the directory
        had both tokens.
    file_vocab_size: rows of the embedding table in the weight files; smaller than `config.vocab_size` only when the
        table has to grow for the added tokens.
    """

    path: Path
    config: Qwen2VLConfig
    tokenizer: Tokenizer
    special: SpecialTokens
    initial_rows: dict[int, int]
    file_vocab_size: int
    assets: dict[str, str]

    @classmethod
    def open(cls, path: str | Path, *, weights: bool = True) -> "HFDirectory":
        """Read and check `path`; `weights=False` for the asset folder of a checkpoint.  Raises UserError."""
        path = Path(path)
        if not path.is_dir():
            raise UserError(f"{path} is not a directory; give a Hugging Face Qwen2-VL directory (with config.json).")
        assets = _read_assets(path)
        raw = _parse(path, assets, "config.json")
        _check_model(path, raw)
        tokenizer = _load_tokenizer(path, assets)
        initial_rows = _add_embedding_tokens(path, tokenizer)
        file_vocab_size = _grow_vocabulary(path, raw, tokenizer, initial_rows)
        try:
            config = Qwen2VLConfig.from_hf(raw)
        except ConfigError as error:
            raise UserError(f"{path / 'config.json'} describes a model that umer1 cannot run: {error}") from error
        special = _special_tokens(path, tokenizer, raw)
        assets["config.json"] = _dump(raw)
        directory = cls(path, config, tokenizer, special, initial_rows, file_vocab_size, assets)
        if weights:
            _ = directory.tensors  # checks the index and every file's header now
        return directory

    @property
    def added_tokens(self) -> bool:
        """True when an embedding token had to be added, so that its row is to be initialised at import."""
        return bool(self.initial_rows)

    @cached_property
    def tensors(self) -> dict[str, TensorEntry]:
        """Name -> where the tensor lies, of all weight files; headers only.  Raises UserError."""
        return scan_weights(self.path)

    @property
    def image_settings(self) -> dict[str, Any]:
        """The image part of processor_config.json, as transformers looks for it, else preprocessor_config.json; {} when
        there is neither."""
        return self._processor_part("image_processor") or _parse(self.path, self.assets, "preprocessor_config.json")

    @property
    def video_settings(self) -> dict[str, Any]:
        """The video part of processor_config.json, else video_preprocessor_config.json; {} without either."""
        settings = self._processor_part("video_processor")
        return settings or _parse(self.path, self.assets, "video_preprocessor_config.json")

    @property
    def input_settings(self) -> dict[str, Any]:
        """umer1_inputs.json as it stands; {} where the model was not trained by umer1."""
        return _parse(self.path, self.assets, INPUTS_NAME)

    def with_settings(self, image: dict[str, Any], video: dict[str, Any], inputs: dict[str, Any]) -> "HFDirectory":
        """The same model with other contents of these files; what processor_config.json says of them goes with it."""
        assets = dict(self.assets)
        if parts := _parse(self.path, assets, "processor_config.json"):
            found = {"image_processor": image, "video_processor": video}
            assets["processor_config.json"] = _dump(parts | {name: found[name] for name in found if name in parts})
        assets["preprocessor_config.json"], assets["video_preprocessor_config.json"] = _dump(image), _dump(video)
        assets[INPUTS_NAME] = _dump(inputs)
        return replace(self, assets=assets)

    def _processor_part(self, name: str) -> dict[str, Any]:
        part = _parse(self.path, self.assets, "processor_config.json").get(name) or {}
        if not isinstance(part, dict):
            raise UserError(f"{self.path / 'processor_config.json'} has {name} {part!r}; it must be an object.")
        return part


def save_assets(source: HFDirectory, destination: str | Path, *, dtype: str | None = None) -> None:
    """Write what `asset_texts` gives."""
    write_assets(asset_texts(source, dtype=dtype), destination)


def write_assets(texts: dict[str, str], destination: str | Path) -> None:
    """Write files of these names."""
    Path(destination).mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        write_text(Path(destination) / name, text)


def asset_texts(source: HFDirectory, *, dtype: str | None = None) -> dict[str, str]:
    """By file name: config, tokenizer (embedding tokens included), processor settings and templates of `source`.

    `dtype` ("float32", "bfloat16") is written into config.json as the type of the weights beside it.
    """
    texts = {}
    for name, text in source.assets.items():
        if name == "tokenizer.json":
            text = source.tokenizer.to_str(pretty=True)
        elif name == "tokenizer_config.json":
            text = _dump(_with_added_tokens(_parse(source.path, source.assets, name), source.tokenizer))
        elif name == "added_tokens.json":
            added = source.tokenizer.get_added_tokens_decoder()
            text = _dump({token.content: index for index, token in sorted(added.items())})
        elif name == "config.json" and dtype is not None:
            raw = json.loads(text)
            raw["dtype" if "dtype" in raw else "torch_dtype"] = dtype
            for part in (raw.get("text_config"), raw.get("vision_config")):
                if isinstance(part, dict) and "dtype" in part:
                    part["dtype"] = dtype
            text = _dump(raw)
        texts[name] = text
    return texts


def _dump(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _to_pass_on(value: Any) -> Any:
    """`value` less the keys of _NOT_PASSED_ON, at every level."""
    if isinstance(value, dict):
        return {key: _to_pass_on(item) for key, item in value.items() if key not in _NOT_PASSED_ON}
    return [_to_pass_on(item) for item in value] if isinstance(value, list) else value


def _read_assets(path: Path) -> dict[str, str]:
    assets = {}
    for name in _ASSETS:
        file = path / name
        if not file.is_file():
            continue
        if file.stat().st_size > _MAX_ASSET_BYTES:
            raise UserError(f"{file} has {file.stat().st_size} bytes; at most {_MAX_ASSET_BYTES} are read.")
        try:
            assets[name] = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file} cannot be read as UTF-8 text: {error}.") from error
        if name.endswith(".json") and name not in ("tokenizer.json", "vocab.json"):
            content = _parse(path, assets, name)  # faults are said now, not when the files are written beside a result
            if any(f'"{key}"' in assets[name] for key in _NOT_PASSED_ON):
                assets[name] = _dump(_to_pass_on(content))
    missing = [name for name in ("config.json", "tokenizer.json") if name not in assets]
    if missing:
        hint = ""
        if "tokenizer.json" in missing and "vocab.json" in assets:
            hint = " Make tokenizer.json with transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)."
        raise UserError(f"{path} has no {' and no '.join(missing)}; a Qwen2-VL directory needs both.{hint}")
    return assets


def _parse(path: Path, assets: dict[str, str], name: str) -> dict[str, Any]:
    """The JSON object in asset `name`; {} when the file is not there."""
    if name not in assets:
        return {}
    try:
        value = json.loads(assets[name])
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path / name} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path / name} must hold a JSON object, not a {type(value).__name__}.")
    return value


def _check_model(path: Path, raw: dict[str, Any]) -> None:
    if raw.get("model_type") != "qwen2_vl":
        raise UserError(
            f"{path / 'config.json'} has model_type {raw.get('model_type')!r}; umer1 trains 'qwen2_vl' "
            "(Qwen2-VL-2B, 7B, 72B and models of the same architecture)."
        )
    if raw.get("quantization_config") is not None:
        raise UserError(f"{path / 'config.json'} describes quantised weights; give the unquantised model.")


def _load_tokenizer(path: Path, assets: dict[str, str]) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_str(assets["tokenizer.json"])
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(f"{path / 'tokenizer.json'} cannot be read: {error}.") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _add_embedding_tokens(path: Path, tokenizer: Tokenizer) -> dict[int, int]:
    """Add what is missing of `<gen_emb>`, `<disc_emb>` as plain tokens; new id -> id of the row to start from."""
    initial_rows = {}
    for text, source in _INITIAL_FROM.items():
        if tokenizer.token_to_id(text) is not None:
            continue
        if (source_id := tokenizer.token_to_id(source)) is None:
            raise UserError(
                f"{path / 'tokenizer.json'} has neither {text} nor {source}, from whose row {text} would start; "
                "use a Qwen2-VL tokenizer."
            )
        tokenizer.add_tokens([AddedToken(text, special=False, normalized=False)])
        initial_rows[tokenizer.token_to_id(text)] = source_id
    return initial_rows


def _grow_vocabulary(path: Path, raw: dict[str, Any], tokenizer: Tokenizer, initial_rows: dict[int, int]) -> int:
    """Raise vocab_size in `raw` (in place) if the added ids do not fit; returns the value that it had."""
    holder = raw["text_config"] if isinstance(raw.get("text_config"), dict) else raw
    # transformers leaves a setting out of config.json when it is the class's default
    rows = holder.get("vocab_size", next(f.default for f in fields(Qwen2VLConfig) if f.name == "vocab_size"))
    if not isinstance(rows, int) or isinstance(rows, bool) or rows < 1:
        raise UserError(f"{path / 'config.json'} has vocab_size {rows!r}; it must be a positive integer.")
    highest = max((index for index in tokenizer.get_vocab().values() if index not in initial_rows), default=-1)
    if highest >= rows:
        raise UserError(
            f"{path / 'tokenizer.json'} has token ids up to {highest}, but config.json's vocab_size is {rows}; "
            "tokenizer and model do not belong together."
        )
    needed = max([rows, *(index + 1 for index in initial_rows)])
    if needed > rows:
        logger.warning(
            "%s: no spare rows for %s; the vocabulary grows from %d to %d rows",
            path,
            " and ".join(_INITIAL_FROM),
            rows,
            needed,
        )
        for level in (raw, holder):
            if "vocab_size" in level or level is holder:
                level["vocab_size"] = needed
    return rows


def _special_tokens(path: Path, tokenizer: Tokenizer, raw: dict[str, Any]) -> SpecialTokens:
    """Look the ids up; every missing token and every disagreement with config.json in one error."""
    texts = {name: f"<|{name}|>" for name in SpecialTokens.__slots__} | {"disc_emb": DISC_EMB, "gen_emb": GEN_EMB}
    ids = {name: tokenizer.token_to_id(text) for name, text in texts.items()}
    problems = [f"the tokenizer has no {texts[name]}" for name, index in ids.items() if index is None]
    fields = {
        "image_token_id": "image_pad",
        "video_token_id": "video_pad",
        "vision_start_token_id": "vision_start",
        "vision_end_token_id": "vision_end",
    }
    for field, name in fields.items():
        if raw.get(field) is not None and ids[name] is not None and raw[field] != ids[name]:
            problems.append(f"config.json has {field}={raw[field]}, but the tokenizer's {texts[name]} is {ids[name]}")
    if problems:
        raise UserError(f"{path}: " + "; ".join(problems) + ". Tokenizer and config must be of one Qwen2-VL model.")
    return SpecialTokens(**ids)


def _with_added_tokens(tokenizer_config: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """tokenizer_config.json listing every added token where it lists any (older transformers read them there)."""
    listed = tokenizer_config.get("added_tokens_decoder")
    if isinstance(listed, dict):
        for index, token in tokenizer.get_added_tokens_decoder().items():
            flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
            listed.setdefault(str(index), {flag: getattr(token, flag) for flag in flags})
    return tokenizer_config
