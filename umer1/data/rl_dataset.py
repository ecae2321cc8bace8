"""RL data files (docs/method.md, 6): pairs of prompts without responses, tokenised, with the pictures behind them."""

from umer1.data import prompts
from umer1.data.bad_samples import BadSample
from umer1.data.dataset import RecordFile
from umer1.data.fields import check_keys, image_paths, kind_of, video_paths
from umer1.data.indexing import RL_NAME_KEYS
from umer1.data.schema import Pair, Prompt, PromptPair, Side

_SIDE_KEYS = tuple(f"{side}_{kind}" for side in ("qry", "pos") for kind in ("text", "image", "video"))
_KEYS = ("dataset", "dataset_name", *_SIDE_KEYS, "solution")


class PromptDataset(RecordFile):
    """Prompt pairs of an RL file; media are opened when a pair is asked for.

    The processor's max_length bounds a prompt: give it what the longest response leaves of the sequence.
    """

    name_keys = RL_NAME_KEYS

    def read(self, index: int) -> Pair:
        """The record, checked in form, its texts brought to the task alone.

        Raises BadSample: "bad_record", or "marker_mismatch" when a text has markers, but not one for each medium.
        """
        record = self.read_record(index)
        if not isinstance(record, dict):
            raise BadSample("bad_record", f"a record must be an object, not {kind_of(record)}")
        if "qry_text" not in record and isinstance(record.get("qry"), dict):
            raise BadSample("bad_record", "this is a pair of an SFT file; GRPO takes RL files (qry_text, ...)")
        check_keys("", record, _KEYS)
        for key in self.name_keys:
            if not isinstance(record.get(key, ""), str | None):
                raise BadSample("bad_record", f"{key} must be a string, not {kind_of(record[key])}")
        query, positive = (self._side(name, record) for name in ("qry", "pos"))
        return Pair(self.dataset_name(index), query, positive, index=index)

    def __getitem__(self, index: int) -> PromptPair:
        """Both prompts; `slot` is for the loader to say.  Raises BadSample."""
        pair = self.read(index)
        return PromptPair(self._encode("qry", pair.query), self._encode("pos", pair.positive), pair.dataset, index)

    def _side(self, name: str, record: dict) -> Side:
        text = record.get(f"{name}_text")
        if isinstance(text, list) and len(text) == 1:
            (text,) = text
        if not isinstance(text, str | None):
            raise BadSample("bad_record", f"{name}_text must be a string, not {kind_of(text)}")
        images = image_paths(f"{name}_image", record.get(f"{name}_image"))
        videos = video_paths(f"{name}_video", record.get(f"{name}_video"))
        self._check_markers(name, text or "", len(images), len(videos))
        task = prompts.task_text(text or "")
        if not task and not images and not videos:
            raise BadSample("bad_record", f"{name} has neither text nor media")
        return Side(task, images, videos)

    def _check_markers(self, name: str, text: str, num_images: int, num_videos: int) -> None:
        """Vision blocks stand first whatever the text says, so markers may be left out; a wrong number is an error."""
        markers = prompts.MARKERS.findall(text)
        counts = markers.count(prompts.IMAGE_MARKER), markers.count(prompts.VIDEO_MARKER)
        # upstream's files may have a marker for the white image of a text-only side
        blank = self.processor is not None and self.processor.blank_image_for_text and not num_images + num_videos
        if markers and counts != (num_images, num_videos) and not (blank and counts == (1, 0)):
            raise BadSample(
                "marker_mismatch",
                f"{name}: {counts[0]} <image> and {counts[1]} <video> markers for {num_images} images and "
                f"{num_videos} videos",
            )

    def _encode(self, name: str, side: Side) -> Prompt:
        try:
            return self.processor.encode_rollout_prompt(side.text, side.images, side.videos, self.media)
        except BadSample as error:
            raise BadSample(error.cause, f"{name}: {error.detail}") from None
