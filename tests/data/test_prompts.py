"""The fixed words of docs/method.md, 2."""

import pytest

from umer1.data import prompts


def test_user_and_assistant_text():
    assert prompts.user_text("  a cat \n") == f"a cat\n<disc_emb>\n{prompts.SUFFIX}"
    assert prompts.SUFFIX.count("<gen_emb>") == 1 and "\n" not in prompts.SUFFIX
    assert prompts.assistant_text("r", "s") == "<think>r</think><answer>s<gen_emb>"


@pytest.mark.parametrize("task", ["a cat", "", "two\nlines  of text", "not <gen_emb> at the end", "über 漢"])
def test_task_text_takes_plain_tasks_and_whole_user_texts(task):
    whole = prompts.user_text(task)
    texts = [task, f"  {task}\n", whole, f"<image>{whole}", f"<image>\n<image>\n{whole}", f"<video> \n{whole}\n"]
    texts += [f"<image>\n{task}", f"{task}\n{prompts.DISC_EMB}", f"{task} {prompts.SUFFIX}", f"{task}<image>"]
    assert {prompts.task_text(text) for text in texts} == {task}
    assert prompts.user_text(prompts.task_text(whole)) == whole


def test_task_text_removes_markers_with_one_line_break_and_the_tail_once():
    assert prompts.task_text("<image>\nIs it\n<image>\nor\n\n<image>?") == "Is it\nor\n\n?"
    doubled = prompts.user_text(prompts.user_text("a"))
    assert prompts.task_text(doubled) == prompts.user_text("a")
    assert prompts.task_text(" " * 300_000 + "a" + " " * 300_000) == "a"  # in linear time


def test_chat_text():
    block = prompts.vision_block(2) + prompts.vision_block(1, video=True)
    assert prompts.chat_text(f"{block}hi", "ho") == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|><|image_pad|><|image_pad|><|vision_end|><|vision_start|><|video_pad|><|vision_end|>hi<|im_end|>\n"
        "<|im_start|>assistant\nho<|im_end|>"
    )


def test_format():
    assert prompts.has_format("<think>a\nb</think>\n<answer>c\n<gen_emb>")
    assert prompts.has_format("<think></think><answer><gen_emb><|im_end|>")
    assert not prompts.has_format("x<think></think><answer><gen_emb>")
    for text in ("<think>a</think><answer>c", "<answer>c<gen_emb><think>a</think>", "a</think><answer>c<gen_emb>", ""):
        assert not prompts.has_format(text)
