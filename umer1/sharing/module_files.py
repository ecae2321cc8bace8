"""The files by which sentence-transformers loads an exported directory, in disc mode and without foreign code.

Its own Transformer module runs transformers' Qwen2-VL; a chat template renders the prompt of docs/method.md, 2 up to
`<disc_emb>` and not beyond (attention is causal); the last token is pooled and L2-normalised.
"""

import json
from typing import Any

from umer1.data.images import ImageConfig
from umer1.data.prompts import DISC_EMB, IMAGE_PAD, USER_OPENING, VIDEO_PAD, VISION_END, VISION_START

# Where these classes are re-exported.  vLLM compares the longer names and would take the directory for a pooling model
# from then on, which cannot generate unless it is told to.
_MODULES = "sentence_transformers.sentence_transformer.modules"
_POOLING, _NORMALIZE = "1_Pooling", "2_Normalize"
_OPENING = USER_OPENING.replace("\n", "\\n")  # as Jinja spells it


def _block(pad: str) -> str:
    return f"{VISION_START}{pad}{VISION_END}"


# Vision blocks first and in order, images before videos; then the texts, stripped as one.  What comes as a system
# message is sentence-transformers' `prompt`: an instruction, which the method has in front of the text.
DISC_TEMPLATE = f"""\
{{%- set parts = namespace(instruction='', images='', videos='', text='') -%}}
{{%- for message in messages -%}}
{{%- if message['content'] is string -%}}
{{%- if message['role'] == 'system' -%}}{{%- set parts.instruction = parts.instruction + message['content'] -%}}
{{%- else -%}}{{%- set parts.text = parts.text + message['content'] -%}}{{%- endif -%}}
{{%- else -%}}
{{%- for part in message['content'] -%}}
{{%- if message['role'] == 'system' -%}}{{%- set parts.instruction = parts.instruction + part['text'] -%}}
{{%- elif part['type'] == 'image' -%}}{{%- set parts.images = parts.images + '{_block(IMAGE_PAD)}' -%}}
{{%- elif part['type'] == 'video' -%}}{{%- set parts.videos = parts.videos + '{_block(VIDEO_PAD)}' -%}}
{{%- elif part['type'] == 'text' -%}}{{%- set parts.text = parts.text + part['text'] -%}}{{%- endif -%}}
{{%- endfor -%}}
{{%- endif -%}}
{{%- endfor -%}}
{{{{- '{_OPENING}' + parts.images + parts.videos -}}}}
{{{{- (parts.instruction + parts.text).strip() + '\\n{DISC_EMB}' -}}}}"""


def module_files(hidden_size: int, pictures: ImageConfig) -> dict[str, str]:
    """Relative path -> text of each file; `hidden_size` is the length of an embedding."""
    modules = [("", "Transformer"), (_POOLING, "Pooling"), (_NORMALIZE, "Normalize")]
    output = {"method": "forward", "method_output_name": "last_hidden_state"}
    transformer = {
        "transformer_task": "feature-extraction",
        "modality_config": dict.fromkeys(("text", "image", "video"), output)
        | {"message": {**output, "format": "structured"}},
        "module_output_name": "token_embeddings",
        # Pillow's resize is the one the model was trained with; torchvision's gives cosines of about 0.99997.
        # transformers now calls this backend="pil", which its video processor does not let through.
        "processor_kwargs": {"use_fast": False},
        "processing_kwargs": {
            "text": {"truncation": False},  # cutting would take <disc_emb> or half a picture away
            "image": {"size": _size(pictures.min_pixels, pictures.max_pixels)},
            "video": _video(pictures),
            "chat_template": {"chat_template": DISC_TEMPLATE},
        },
    }
    root = {
        "model_type": "SentenceTransformer",
        "prompts": {"query": "", "document": ""},  # instructions belong to a task, not to the model
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    }
    pooling = {"embedding_dimension": hidden_size, "pooling_mode": "lasttoken", "include_prompt": True}
    return {
        "modules.json": _dump(
            [
                {"idx": index, "name": str(index), "path": path, "type": f"{_MODULES}.{name}"}
                for index, (path, name) in enumerate(modules)
            ]
        ),
        "config_sentence_transformers.json": _dump(root),
        "sentence_bert_config.json": _dump(transformer),
        f"{_POOLING}/config.json": _dump(pooling),
        f"{_NORMALIZE}/config.json": _dump({"module_input_name": "sentence_embedding"}),
    }


def _video(pictures: ImageConfig) -> dict[str, Any]:
    """Frames are chosen by who calls.  The bounds stand here because a directory may leave them to umer1."""
    capped = pictures.max_video_tokens is not None
    return {
        "do_sample_frames": False,
        "size": _size(pictures.video_min_pixels, pictures.video_max_pixels),
        "cap_pixels_per_frame": capped,
        **({"max_video_tokens": pictures.max_video_tokens} if capped else {}),
    }


def _size(low: int, high: int) -> dict[str, int]:
    """Bounds in pixels, as transformers calls them."""
    return {"shortest_edge": low, "longest_edge": high}


def _dump(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
