"""From what a data file says to what the model takes: token ids, labels, M-RoPE positions, patches.

Structure (chat turns, vision blocks) is put together from token ids and never from text that a file can write: a file
that spells `<|im_start|>` or `<|image_pad|>` is a bad sample, not a turn or an image.
"""

import hashlib
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from umer1.data import prompts
from umer1.data.bad_samples import BadSample
from umer1.data.images import ImageConfig
from umer1.data.media import MediaRoot
from umer1.data.schema import Prompt, Sequence, Side
from umer1.data.vision import Vision, VisionLoader, too_long
from umer1.errors import UserError
from umer1.models.qwen2_vl.positions import mrope_positions, next_position

IGNORE = -100  # label of a position that is not supervised
MAX_FRAMES = 768  # of one video; transformers' own limit for Qwen2-VL
# Bounds of what is kept, since small data sets repeat their texts and layouts; others pass through.
_CACHED_TEXTS, _CACHED_CHARACTERS = 16384, 1024
_KEPT_LAYOUTS, _KEPT_LAYOUT_TOKENS = 4096, 1024
# Added tokens that only mark up text: grounding data spells them, and they cannot forge a turn or an image.
_MARK_UP = {f"<|{name}_{edge}|>" for name in ("object_ref", "box", "quad") for edge in ("start", "end")}


class Processor:
    """Encodes sides, prompts and responses for one tokenizer, model and image configuration.

    tokenizer: with the two embedding tokens added.  special: their ids and the structural ones (SpecialTokens).
    max_length: most tokens of one sequence; None for no limit.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        special: Any,
        model_config: Any,
        image_config: ImageConfig,
        max_length: int | None = None,
        *,
        max_frames: int = MAX_FRAMES,
        blank_image_for_text: bool = False,
    ):
        self.tokenizer = getattr(tokenizer, "backend_tokenizer", tokenizer)
        self.special = special
        self.model_config = model_config
        self.image_config = image_config
        self.max_length = max_length
        self.blank_image_for_text = blank_image_for_text
        self.vision = VisionLoader(special, image_config, max_length, max_frames)
        self._known: dict[str, list[int]] = {}
        self._layouts: dict[tuple, np.ndarray] = {}
        self._reserved = self._reserved_ids()
        self._opening = self._encode(prompts.USER_OPENING.removesuffix("user\n"))
        self._assistant = self._encode(prompts.ASSISTANT_OPENING)

    def _reserved_ids(self) -> frozenset[int]:
        added = self.tokenizer.get_added_tokens_decoder()
        for index in (self.special.disc_emb, self.special.gen_emb):
            token = added.get(index)
            if token is not None and (token.lstrip or token.rstrip or token.single_word):
                raise UserError(
                    f"{token.content} swallows the text beside it in this tokenizer; add it as a plain token"
                )
        names = ("image_pad", "video_pad", "vision_start", "vision_end", "im_start", "im_end")
        ids = {index for index, token in added.items() if token.special and token.content not in _MARK_UP}
        ids |= {getattr(self.special, name) for name in names}
        return frozenset(ids - {self.special.disc_emb, self.special.gen_emb})

    # -- sides and prompts -------------------------------------------------------------------------------------------

    def encode_side(self, side: Side, media: MediaRoot) -> Sequence:
        """A side of a data file, teacher-forced when it has a response.  Markers are replaced where they stand.

        Raises BadSample with every cause of a bad side (`umer1.data.bad_samples.CAUSES`).
        """
        parts = self._marked_parts(side)
        head = self._user_ids(parts)
        response = None if side.response is None else self.response_ids(side.response)
        fixed = sum(len(part) for part in head if isinstance(part, list)) + 1
        visions = self.vision.load(parts, media, fixed)
        ids = _interleave(head, visions)
        disc_index = self._disc_index(ids)
        if response is not None:
            response = self._fit(response, side.response, len(ids))
        elif self.max_length is not None and len(ids) > self.max_length:
            raise too_long(len(ids), self.max_length)
        target = content_id(side.text, side.images, side.videos)
        return self._sequence(ids, response, visions, disc_index, target)

    def encode_prompt(
        self,
        text: str,
        images: list[str] | tuple[str, ...],
        videos: list[list[str]] | tuple[tuple[str, ...], ...],
        media: MediaRoot | None,
        *,
        disc_only: bool = False,
    ) -> Sequence:
        """A prompt as used outside of SFT: vision blocks, directly followed by the task text, `<disc_emb>`, suffix.

        text: the task text alone.  disc_only: cut behind `<disc_emb>`; attention is causal, so its state is the same.
        Raises BadSample.
        """
        return self._prompt(text, images, videos, media, disc_only)[0]

    def encode_rollout_prompt(
        self,
        text: str,
        images: list[str] | tuple[str, ...],
        videos: list[list[str]] | tuple[tuple[str, ...], ...],
        media: MediaRoot | None,
    ) -> Prompt:
        """`encode_prompt` with the resized pictures that its patches were cut from.  Raises BadSample."""
        sequence, visions = self._prompt(text, images, videos, media, disc_only=False)
        frames = [(vision.is_video, self.vision.patchifier.frames(vision.patches)) for vision in visions]
        return Prompt(
            sequence,
            images=tuple(pictures[0] for is_video, pictures in frames if not is_video),
            videos=tuple(pictures for is_video, pictures in frames if is_video),
        )

    def _prompt(self, text, images, videos, media, disc_only: bool) -> tuple[Sequence, list[Vision]]:
        if not isinstance(text, str) or isinstance(images, str) or any(isinstance(paths, str) for paths in videos):
            raise BadSample(
                "bad_record", "needed are a text, a list of image paths, and a list of lists of frame paths"
            )
        parts: list[Any] = [("image", path) for path in images] + [("video", tuple(paths)) for paths in videos]
        if not parts and self.blank_image_for_text:
            parts.append(("blank", None))
        parts.append(prompts.user_text(text))
        head = self._user_ids(parts)
        visions = self.vision.load(parts, media, sum(len(part) for part in head if isinstance(part, list)))
        ids = _interleave(head, visions)
        disc_index = self._disc_index(ids)
        if disc_only:
            ids = ids[: disc_index + 1]
        if self.max_length is not None and len(ids) > self.max_length:
            raise too_long(len(ids), self.max_length)
        target = content_id(text, tuple(images), tuple(tuple(paths) for paths in videos))
        return self._sequence(ids, None, visions, disc_index, target), visions

    def encode_response(self, prompt: Sequence, response: str | list[int] | torch.Tensor) -> Sequence:
        """`prompt` (encode_prompt, not disc_only) followed by a response, which is supervised.

        Text is closed with `<|im_end|>`; ids, as an engine generated them, are taken as they stand.  gen_index is -1
        when the response has no `<gen_emb>` (the caller has a policy for that).  Raises BadSample.
        """
        if isinstance(response, str):
            ids = [*self._encode_user(response), self.special.im_end]
        else:
            ids = [int(item) for item in response]
        length = prompt.prompt_length + len(ids)
        if self.max_length is not None and length > self.max_length:
            raise too_long(length, self.max_length)
        start = next_position(prompt.position_ids)
        added = torch.arange(start, start + len(ids)).expand(3, -1)
        tokens = torch.cat([prompt.input_ids, torch.tensor(ids, dtype=torch.int64)])
        return replace(
            prompt,
            input_ids=tokens,
            labels=torch.from_numpy(_labels(tokens.numpy(), prompt.prompt_length)),
            position_ids=torch.cat([prompt.position_ids, added], dim=1),
            gen_index=_last_index(ids, self.special.gen_emb, prompt.prompt_length),
        )

    # -- text --------------------------------------------------------------------------------------------------------

    def _encode(self, text: str) -> list[int]:
        known = self._known.get(text)
        if known is not None:
            return known
        try:
            ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        except (UnicodeEncodeError, TypeError) as error:
            raise BadSample("bad_record", f"the text is not valid Unicode: {error}") from None
        if len(text) <= _CACHED_CHARACTERS:
            if len(self._known) >= _CACHED_TEXTS:
                self._known.clear()
            self._known[text] = ids
        return ids

    def _encode_user(self, text: str) -> list[int]:
        """Ids of text that a file wrote; BadSample("reserved_token") when it spells structure."""
        ids = self._encode(text)
        if not self._reserved.isdisjoint(ids):
            found = next(index for index in ids if index in self._reserved)
            raise BadSample("reserved_token", f"the text spells {self.tokenizer.id_to_token(found)!r}")
        return ids

    def _user_ids(self, parts: list[Any]) -> list[Any]:
        """The prompt with texts as id lists and media left as they are.

        Splitting at added tokens (vision blocks, the last `<disc_emb>`) gives the ids of the whole text: a tokenizer
        splits there first.  It lets the constant suffix be encoded once.
        """
        head: list[Any] = [self._opening]
        text = "user\n"
        for part in [*parts, None]:
            if isinstance(part, str):
                text += part
                continue
            before, marker, after = text.rpartition(prompts.DISC_EMB)
            if marker:
                head += [self._encode_user(before), [self.special.disc_emb]] if before else [[self.special.disc_emb]]
            if after:
                head.append(self._encode_user(after))
            text = ""
            if part is not None:
                head.append(part)
        return [*head, self._assistant]

    def _marked_parts(self, side: Side) -> list[Any]:
        """Texts and ("image", path) / ("video", paths) in the order in which the human turn has them."""
        pieces = prompts.MARKERS.split(side.text)
        counts = pieces[1::2].count(prompts.IMAGE_MARKER), pieces[1::2].count(prompts.VIDEO_MARKER)
        text_only = not side.images and not side.videos
        if self.blank_image_for_text and text_only and counts in ((0, 0), (1, 0)):
            # upstream's files have a marker for the white image at times, and at times none
            return [("blank", None), *pieces] if counts == (0, 0) else [pieces[0], ("blank", None), pieces[2]]
        if counts != (len(side.images), len(side.videos)):
            raise BadSample(
                "marker_mismatch",
                f"{counts[0]} <image> and {counts[1]} <video> markers for {len(side.images)} images and "
                f"{len(side.videos)} videos",
            )
        images, videos = iter(side.images), iter(side.videos)
        parts: list[Any] = []
        for piece in pieces:
            if piece == prompts.IMAGE_MARKER:
                parts.append(("image", next(images)))
            elif piece == prompts.VIDEO_MARKER:
                parts.append(("video", next(videos)))
            elif piece:
                parts.append(piece)
        return parts

    def response_ids(self, response: str) -> list[int]:
        """Ids of a response of a data file.  Raises BadSample: empty_response, reserved_token, no_gen_emb."""
        if not response.strip():
            raise BadSample("empty_response", "the response is empty")
        ids = self._encode_user(response)
        if self.special.gen_emb not in ids:
            raise BadSample("no_gen_emb", f"the response ends {response[-40:]!r} without {prompts.GEN_EMB}")
        return ids

    def _disc_index(self, ids: list[int]) -> int:
        index = _last_index(ids, self.special.disc_emb, 0)
        if index < 0:
            raise BadSample("no_disc_emb", f"the prompt has no {prompts.DISC_EMB}")
        return index

    def _fit(self, ids: list[int], text: str, prompt_length: int) -> list[int]:
        """Response ids that fit behind the prompt with `<|im_end|>`: reasoning is cut at its end, nothing else."""
        excess = 0 if self.max_length is None else prompt_length + len(ids) + 1 - self.max_length
        if excess <= 0:
            return ids
        start, end = text.find("<think>"), text.find("</think>")
        if start < 0 or end < start or prompts.GEN_EMB not in text[end:]:
            raise too_long(prompt_length + len(ids) + 1, self.max_length)
        before = self._encode(text[: start + len("<think>")])
        reasoning = self._encode(text[start + len("<think>") : end])
        after = self._encode(text[end:])
        # the three parts may take more tokens than the whole did, so the room is counted anew
        room = self.max_length - prompt_length - 1 - len(before) - len(after)
        if room < 0:
            raise too_long(prompt_length + len(before) + len(after) + 1, self.max_length)
        return [*before, *reasoning[:room], *after]

    # -- tensors -----------------------------------------------------------------------------------------------------

    def _sequence(
        self, prompt: list[int], response: list[int] | None, visions: list[Vision], disc_index: int, target: int
    ) -> Sequence:
        closed = [] if response is None else [*response, self.special.im_end]
        input_ids = np.array(prompt + closed, dtype=np.int64)
        grid_thw = torch.from_numpy(np.array([vision.grid for vision in visions], dtype=np.int64).reshape(-1, 3))
        if not visions:
            pixels = torch.empty(0, self.image_config.patch_dim)
        else:
            pixels = visions[0].pixels if len(visions) == 1 else torch.cat([vision.pixels for vision in visions])
        positions = self._prompt_positions(input_ids[: len(prompt)], grid_thw, visions)
        if closed:
            start = next_position(positions)
            following = np.arange(start, start + len(closed))
            positions = np.concatenate([positions, np.broadcast_to(following, (3, len(closed)))], axis=1)
        return Sequence(
            input_ids=torch.from_numpy(input_ids),
            labels=torch.from_numpy(_labels(input_ids, len(prompt))),
            position_ids=torch.from_numpy(positions),
            pixel_values=pixels,
            grid_thw=grid_thw,
            disc_index=disc_index,
            gen_index=_last_index(closed, self.special.gen_emb, len(prompt)),
            prompt_length=len(prompt),
            target_id=target,
        )

    def _prompt_positions(self, prompt: np.ndarray, grid_thw: torch.Tensor, visions: list[Vision]) -> np.ndarray:
        """int64 [3, len(prompt)].  Positions depend on where the vision blocks stand and on their grids alone."""
        starts = np.flatnonzero(prompt == self.special.vision_start).tolist()
        key = (len(prompt), *starts, *(vision.grid for vision in visions))
        known = self._layouts.get(key)
        if known is None:
            known = mrope_positions(torch.from_numpy(prompt), grid_thw, self.model_config).numpy()
            if len(self._layouts) >= _KEPT_LAYOUTS:
                self._layouts.clear()
            if len(prompt) <= _KEPT_LAYOUT_TOKENS:
                known.setflags(write=False)
                self._layouts[key] = known
        return known.copy()


def _interleave(head: list[Any], visions: list[Vision]) -> list[int]:
    """Ids of the whole prompt: id lists as they are, each media part by its block."""
    blocks = iter(visions)
    ids: list[int] = []
    for part in head:
        ids += part if isinstance(part, list) else next(blocks).ids
    return ids


def _labels(input_ids: np.ndarray, prompt_length: int) -> np.ndarray:
    """int64 [L]: at each position the next token, where that belongs to the response."""
    labels = np.full_like(input_ids, IGNORE)
    if prompt_length < len(input_ids):
        labels[prompt_length - 1 : -1] = input_ids[prompt_length:]
    return labels


def _last_index(ids: list[int], token: int, offset: int) -> int:
    """`offset` + the last position of `token`; -1 when it does not occur."""
    for index in range(len(ids) - 1, -1, -1):
        if ids[index] == token:
            return offset + index
    return -1


def content_id(text: str, images: tuple[str, ...] = (), videos: tuple[tuple[str, ...], ...] = ()) -> int:
    """A stable 63-bit hash of a text and its media's names: equal targets have equal ids on every machine."""
    words = [text, "\0images", *images]
    for frames in videos:
        words += ["\0video", *frames]
    # the length before each word keeps ("ab", "c") and ("a", "bc") apart
    joined = "".join(f"{len(word)}:{word}" for word in words).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(joined, digest_size=8).digest(), "big") >> 1
