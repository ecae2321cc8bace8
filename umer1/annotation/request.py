"""One side as a chat-completions request: pictures scaled and sent as data URLs, then the text, then the question."""

import base64
import io
import json
import math
from typing import Any

from PIL import Image

from umer1.annotation.teacher_config import TeacherConfig
from umer1.data.images import check_aspect_ratio
from umer1.data.media import MediaRoot
from umer1.data.schema import Side

_JPEG_QUALITY = 90
_JPEG_SIDE = 65500  # pixels; the format's limit


def request_body(side: Side, config: TeacherConfig, media: MediaRoot) -> bytes:
    """The JSON of a request.  Raises BadSample when a medium cannot be used."""
    content: list[dict[str, Any]] = [_image(_jpeg(path, media, config.max_image_pixels)) for path in side.images]
    for frames in side.videos:
        pictures = [_jpeg(path, media, config.max_frame_pixels) for path in frames]
        if config.video_as == "images":
            content += map(_image, pictures)
        else:
            # vLLM reads this type as frames with commas between them
            content.append({"type": "video_url", "video_url": {"url": f"data:video/jpeg;base64,{','.join(pictures)}"}})
    content.append({"type": "text", "text": f"{side.text}\n\n{config.teacher_prompt}".strip()})
    body = {
        "model": config.teacher_model,
        "messages": [{"role": "user", "content": content}],
        "temperature": config.teacher_temperature,
        "top_p": config.teacher_top_p,
        "max_tokens": config.max_answer_tokens,
        "stream": False,
    }
    if config.keep_special_tokens:  # not in every protocol: it is sent where it is wanted alone
        body["skip_special_tokens"] = False
    return json.dumps(body).encode()


def _image(jpeg: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{jpeg}"}}


def _jpeg(path: str, media: MediaRoot, max_pixels: int) -> str:
    """A picture of at most `max_pixels`, as base64 of JPEG; BadSample where training would refuse it too."""
    image = media.open_image(path)
    width, height = image.size
    check_aspect_ratio(width, height)
    scale = min(math.sqrt(max_pixels / (width * height)), _JPEG_SIDE / max(width, height))
    if scale < 1:
        image = image.resize((max(1, int(width * scale)), max(1, int(height * scale))), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return base64.b64encode(buffer.getvalue()).decode()
