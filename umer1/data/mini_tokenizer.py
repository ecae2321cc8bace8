"""The tokenizer of the tiny base: words and constant phrases are single tokens, everything else falls back to bytes.

Any text is encoded and decoded exactly.  Constant phrases (the chat template's lines, the suffix of the paper's prompt,
the sentences of mini-MMEB) cost one token each, which keeps sequences short enough for two CPU cores while the text
itself is the real one.  The special tokens are Qwen2-VL's, in its order; `<gen_emb>` and `<disc_emb>` are not among
them: whoever opens the base adds them, as with the real Qwen2-VL.
"""

import re

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from umer1.data import mini_tasks
from umer1.data.mini_draw import COLOURS, DIGITS, LETTERS

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
LIST_CELLS = "List what the cells show."  # what the base is asked
COUNT_DOWN = "Count down from"  # its one skill without a picture
BLANK = " blank"  # the base's word for an empty cell
# The suffix as the tokenizer meets it: cut where it holds an added token.
_SUFFIX_PIECES = (
    "\nRepresent the above input text, images, videos, or any combination of the three as embeddings. First output "
    "the thinking process in <think> </think> tags and then summarize the entire input in a word or sentence. "
    "Finally, use the ",
    " tag to represent the entire input.",
)
_CHAT_PIECES = ("system\nYou are a helpful assistant.", "user\n", "assistant\n")
_TAGS = ("<think>", "</think>", "<answer>")


def phrases() -> list[str]:
    """All texts that are one token, in the order of their ids."""
    words = [f" {word}" for word in (*COLOURS, *LETTERS, *DIGITS, *mini_tasks.NUMBERS)]
    sentences = [
        *mini_tasks.QUERY_OPENING.values(),
        *mini_tasks.QUERY_MIDDLE.values(),
        *mini_tasks.TARGET_TEXT.values(),
        mini_tasks.LOOK_QUERY,
        mini_tasks.LOOK_TARGET,
        LIST_CELLS,
        COUNT_DOWN,
        BLANK,
    ]
    traces = [mini_tasks.SHOWS, mini_tasks.GUESS, *(f" {n}{mini_tasks.LEFT}" for n in mini_tasks.NUMBERS)]
    return list(dict.fromkeys([*_CHAT_PIECES, *_SUFFIX_PIECES, *_TAGS, *words, *sentences, *traces]))


def build_tokenizer() -> Tokenizer:
    """A `tokenizers` BPE without merges: phrases are taken whole (ignore_merges), the rest byte by byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    vocabulary = {symbol: index for index, symbol in enumerate(alphabet)}
    for phrase in phrases():
        encoded = "".join(piece for piece, _ in to_bytes.pre_tokenize_str(phrase))
        vocabulary.setdefault(encoded, len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    # Longest first; a phrase that ends in a letter or digit must end where the word ends.
    ordered = sorted(phrases(), key=len, reverse=True)
    patterns = [re.escape(phrase) + (r"(?![A-Za-z0-9])" if phrase[-1].isalnum() else "") for phrase in ordered]
    rest = r" ?[A-Za-z]+| ?[0-9]| ?[^\sA-Za-z0-9<]+| ?<|\s"
    pattern = Regex("|".join([*patterns, rest]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(pattern, "isolated"), to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer
