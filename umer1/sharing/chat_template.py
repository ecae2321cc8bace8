"""The chat form of docs/method.md, 2, for engines that render messages: an export has it where its source had none."""

import json

from umer1.data.prompts import IM_END, IM_START, IMAGE_PAD, SYSTEM, VIDEO_PAD, VISION_END, VISION_START
from umer1.models.qwen2_vl.directory import HFDirectory

NAME = "chat_template.jinja"

# Qwen2-VL's own, written out: parts in the order in which they are given, the usual system message where there is none.
CHAT_TEMPLATE = f"""\
{{%- for message in messages -%}}
{{%- if loop.first and message['role'] != 'system' -%}}
{{{{- '{IM_START}system\\n{SYSTEM}{IM_END}\\n' -}}}}
{{%- endif -%}}
{{{{- '{IM_START}' + message['role'] + '\\n' -}}}}
{{%- if message['content'] is string -%}}
{{{{- message['content'] -}}}}
{{%- else -%}}
{{%- for part in message['content'] -%}}
{{%- if part['type'] in ('image', 'image_url') -%}}{{{{- '{VISION_START}{IMAGE_PAD}{VISION_END}' -}}}}
{{%- elif part['type'] in ('video', 'video_url') -%}}{{{{- '{VISION_START}{VIDEO_PAD}{VISION_END}' -}}}}
{{%- elif 'text' in part -%}}{{{{- part['text'] -}}}}{{%- endif -%}}
{{%- endfor -%}}
{{%- endif -%}}
{{{{- '{IM_END}\\n' -}}}}
{{%- endfor -%}}
{{%- if add_generation_prompt -%}}{{{{- '{IM_START}assistant\\n' -}}}}{{%- endif -%}}"""


def missing_template(directory: HFDirectory) -> dict[str, str]:
    """The file, by name, that `directory` lacks; {} where it brings a template in any of the places they stand in."""
    files = {NAME, "chat_template.json"} & set(directory.assets)
    settings = json.loads(directory.assets.get("tokenizer_config.json", "{}"))
    return {} if files or settings.get("chat_template") else {NAME: CHAT_TEMPLATE}
