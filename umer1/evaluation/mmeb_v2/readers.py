"""A task from its files on disk: `read_task(TASKS["MSCOCO_t2i"], data_root)`."""

from collections.abc import Callable
from pathlib import Path

from umer1.evaluation.mmeb_v2.documents import read_documents
from umer1.evaluation.mmeb_v2.images import read_images
from umer1.evaluation.mmeb_v2.media_tree import MediaTree
from umer1.evaluation.mmeb_v2.moments import read_moments, read_momentseeker
from umer1.evaluation.mmeb_v2.types import TaskData, TaskSpec
from umer1.evaluation.mmeb_v2.video_qa import read_video_questions
from umer1.evaluation.mmeb_v2.videos import read_video_classes, read_video_retrieval

Reader = Callable[[TaskSpec, MediaTree, int], TaskData]

# TaskSpec.layout -> its reader.
READERS: dict[str, Reader] = {
    **dict.fromkeys(("image_cls", "image_qa", "image_i2t", "image_t2i", "image_i2i"), read_images),
    **dict.fromkeys(("vidore", "visrag"), read_documents),
    "video_cls": read_video_classes,
    "video_ret": read_video_retrieval,
    "video_qa": read_video_questions,
    "video_mret": read_moments,
    "video_momentseeker": read_momentseeker,
}


def read_task(spec: TaskSpec, data_root: str | Path, *, num_frames: int = 8) -> TaskData:
    """Read one task's annotation and look up its media; no picture is decoded.

    num_frames: frames shown of a video, evenly spaced over the saved ones.  UserError for annotation that is missing
    or cannot be read; media that are missing are named in each Item.
    """
    return READERS[spec.layout](spec, MediaTree(data_root), num_frames)
