"""The tiny base's tokenizer: exact both ways on any text, prompt and response tokenised apart as together."""

import numpy as np
import pytest
from tokenizers import AddedToken

from umer1.data import prompts
from umer1.data.mini_tasks import HOP_TASKS, TASKS, Teacher, hop_target, look_question, sample_board, sample_question
from umer1.data.mini_tokenizer import SPECIAL_TOKENS, build_tokenizer, phrases

TEXTS = (
    "",
    "Arrows to follow in this picture: three. Start at red",
    " red  red\tred\nred\r\n reduced redA red1 1red",
    "  two spaces, <think> and </think>, <answer>, < think >, <<think>>, a < b",
    "naïve café, 日本語, 😀, \u00a0\u3000\u200b, \x00\x07",
    "x" * 500,
    " three left, three left three left;",
    "assistant\n\nassistant\nsystem\nYou are a helpful assistant. user\n",
    prompts.SUFFIX,
)


@pytest.fixture(scope="module")
def tokenizer():
    made = build_tokenizer()
    made.add_tokens([AddedToken(text, normalized=False) for text in (prompts.GEN_EMB, prompts.DISC_EMB)])
    return made


def ids(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_comes_back_exactly(tokenizer, text):
    assert tokenizer.decode(ids(tokenizer, text), skip_special_tokens=False) == text


def test_prompt_and_response_tokenise_apart_as_together(tokenizer):
    for task_text in TEXTS:
        prompt = prompts.chat_text(prompts.vision_block(4) + prompts.user_text(task_text))
        for reasoning in TEXTS:
            response = prompts.assistant_text(reasoning, reasoning) + prompts.IM_END
            for reply in (response, reasoning + response):
                assert ids(tokenizer, prompt) + ids(tokenizer, reply) == ids(tokenizer, prompt + reply)


def test_decoded_responses_keep_the_format(tokenizer):
    response = prompts.assistant_text(" red blue one left, blue pink zero left,", " pink 4")
    decoded = tokenizer.decode(ids(tokenizer, response), skip_special_tokens=True)
    assert decoded == response and prompts.has_format(decoded)


def test_every_phrase_is_one_token(tokenizer):
    for phrase in phrases():
        if phrase.startswith(" tag to represent"):
            continue  # stands after an added token only
        assert len(ids(tokenizer, phrase)) == 1, phrase


def test_the_words_of_the_tasks_need_no_byte_fallback(tokenizer):
    rng = np.random.default_rng(0)
    byte_tokens = 256
    for task in TASKS:
        for _ in range(30):
            if task in HOP_TASKS:
                question = sample_question(rng, task, sample_board(rng, task), (0, 7), Teacher(0.3, 0.3, 0.3), None)
                sides = [question.query, question.target, hop_target(rng, task, question.answer)]
            else:
                question = look_question(rng)
                sides = [question.query, question.target]
            for side in sides:
                prompt = prompts.chat_text(prompts.user_text(side.text), side.response) + "\n"
                spelled = [tokenizer.id_to_token(i) for i in ids(tokenizer, prompt) if i < byte_tokens]
                assert set(spelled) <= {"\u010a"}, f"only the newline may be a byte: {spelled} in {side.text!r}"


def test_special_tokens_are_qwen2_vl_s_and_the_embedding_tokens_are_not_there():
    base = build_tokenizer()
    first = base.token_to_id(SPECIAL_TOKENS[0])
    assert [base.token_to_id(token) for token in SPECIAL_TOKENS] == list(range(first, first + len(SPECIAL_TOKENS)))
    assert base.get_vocab_size() == first + len(SPECIAL_TOKENS)
    assert base.token_to_id(prompts.GEN_EMB) is None and base.token_to_id(prompts.DISC_EMB) is None
