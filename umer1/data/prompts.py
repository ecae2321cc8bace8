"""The words of the method: system message, suffix, chat form, assistant form (docs/method.md, 2).

The chat form is Qwen2-VL's template written out, because executing a template that came with a directory is executing
its author's code.
"""

import re

SYSTEM = "You are a helpful assistant."
DISC_EMB = "<disc_emb>"
GEN_EMB = "<gen_emb>"
IMAGE_MARKER = "<image>"
VIDEO_MARKER = "<video>"
VISION_START = "<|vision_start|>"
VISION_END = "<|vision_end|>"
IMAGE_PAD = "<|image_pad|>"
VIDEO_PAD = "<|video_pad|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"

SUFFIX = (
    "Represent the above input text, images, videos, or any combination of the three as embeddings. First output the "
    "thinking process in <think> </think> tags and then summarize the entire input in a word or sentence. Finally, use "
    "the <gen_emb> tag to represent the entire input."
)

# What stands before and after the user's own content in a prompt.
USER_OPENING = f"{IM_START}system\n{SYSTEM}{IM_END}\n{IM_START}user\n"
ASSISTANT_OPENING = f"{IM_END}\n{IM_START}assistant\n"

# A response of the right form: reasoning, summary, embedding token.
FORMAT = re.compile(r"<think>.*?</think>.*?<answer>.*?<gen_emb>", re.DOTALL)

MARKERS = re.compile(f"({IMAGE_MARKER}|{VIDEO_MARKER})")
_MARKERS_AND_BREAK = re.compile(f"(?:{IMAGE_MARKER}|{VIDEO_MARKER})[ \\t]*\\n?")


def user_text(task_text: str) -> str:
    """The text of a user turn: task, `<disc_emb>`, and the suffix that asks for reasoning and `<gen_emb>`."""
    return f"{task_text.strip()}\n{DISC_EMB}\n{SUFFIX}"


def task_text(text: str) -> str:
    """The task alone, out of a plain task or a whole user text: markers, `<disc_emb>` and suffix are left out.

    A marker goes with the line break behind it.  `task_text(user_text(text))` is `text.strip()`.
    """
    text = _MARKERS_AND_BREAK.sub("", text).strip()
    return text.removesuffix(SUFFIX).rstrip().removesuffix(DISC_EMB).strip()


def assistant_text(reasoning: str, summary: str) -> str:
    """The assistant's turn, less the closing `<|im_end|>`.  There is no `</answer>`."""
    return f"<think>{reasoning}</think><answer>{summary}{GEN_EMB}"


def chat_text(user_content: str, response: str | None = None) -> str:
    """The whole conversation as Qwen2-VL's template renders it, ending after `assistant\\n` or `<|im_end|>`.

    `user_content` already holds its vision blocks (`vision_block`).
    """
    prompt = f"{USER_OPENING}{user_content}{ASSISTANT_OPENING}"
    return prompt if response is None else f"{prompt}{response}{IM_END}"


def vision_block(num_tokens: int, *, video: bool = False) -> str:
    """One image or video as text: start, one pad per merged patch, end."""
    return f"{VISION_START}{(VIDEO_PAD if video else IMAGE_PAD) * num_tokens}{VISION_END}"


def has_format(response: str) -> bool:
    """Whether the response begins with reasoning, then answers and embeds; what follows `<gen_emb>` does not matter."""
    return FORMAT.match(response) is not None
