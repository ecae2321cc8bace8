"""Where a video task's saved frames lie, and a video as an item."""

from umer1.evaluation.mmeb_v2.media_tree import MediaTree
from umer1.evaluation.mmeb_v2.types import Item, TaskSpec


def frames_folder(spec: TaskSpec, tree: MediaTree) -> str:
    """The task's frames below the root: the first of `options["frames"]` that is there, else the first."""
    folders = spec.options["frames"]
    return next((folder for folder in folders if tree.has_folder(folder)), folders[0])


def saved_video(tree: MediaTree, text: str, folder: str, num_frames: int, video: str | None = None) -> Item:
    """The frames in `folder`; where there are none, what is missing tells whether the file `video` itself is there."""
    unsaved = f"{folder} (its frames are not saved; the video is {video})"
    return tree.video_item(text, folder, num_frames, unsaved if video and tree.has_file(video) else None)
