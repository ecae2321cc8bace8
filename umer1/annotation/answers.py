"""From what the teacher wrote to reasoning and summary, or to the cause why it is not used."""

import re
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tokenizers import Tokenizer

from umer1.annotation.client import Answer
from umer1.annotation.config import FilterConfig
from umer1.data.prompts import DISC_EMB, GEN_EMB, IMAGE_MARKER, VIDEO_MARKER, assistant_text
from umer1.errors import UserError

_BOX = re.compile(r"<\|(?:begin|end)_of_box\|>")
# Tags of the training format: inside a thought or a summary they would forge its structure.
_TAGS = ("<think>", "</think>", "<answer>", "</answer>", DISC_EMB, GEN_EMB, IMAGE_MARKER, VIDEO_MARKER)
# Added tokens that training takes as text: the embedding tokens, which have rules of their own, and grounding mark-up.
_ALLOWED = {DISC_EMB, GEN_EMB} | {f"<|{n}_{edge}|>" for n in ("object_ref", "box", "quad") for edge in ("start", "end")}
_FEWEST_NGRAMS = 32  # shorter texts repeat themselves by chance


@dataclass(frozen=True, slots=True)
class Fault:
    """Why an answer or a side is not used."""

    cause: str  # cut_off, format, reserved_token, over_length, repetition
    detail: str


class AnswerFilter:
    """Judges answers by the tokens of the model that will be trained on them."""

    def __init__(self, config: FilterConfig, tokenizer: Tokenizer):
        self.config, self.tokenizer = config, tokenizer
        tokenizer.no_padding()  # texts that are tokenised together would be filled up to the longest
        added = tokenizer.get_added_tokens_decoder().values()
        special = {token.content for token in added if token.special or token.content.startswith("<|")}
        self._reserved = sorted(special - _ALLOWED)

    @staticmethod
    def open(config: FilterConfig, directory: str | Path) -> "AnswerFilter":
        path = Path(directory) / "tokenizer.json"
        try:
            return AnswerFilter(config, Tokenizer.from_file(str(path)))
        except Exception as error:  # the package raises this very type
            raise UserError(f"tokenizer={str(directory)!r}: {path.name} cannot be read ({error})") from None

    def structural(self, text: str) -> str | None:
        """A token in `text` that would forge a turn or a picture, which training refuses; None when there is none."""
        return next((token for token in self._reserved if token in text), None)

    def responses(self, answers: list[Answer]) -> list[str | Fault]:
        """Of each answer the assistant's turn of the training file, or what is wrong with it.

        All texts are tokenised together, which the tokenizer does on all cores.
        """
        parts = [self._parts(answer) for answer in answers]
        token_ids = iter(self._token_ids([text for part in parts if not isinstance(part, Fault) for text in part]))
        return [part if isinstance(part, Fault) else self._turn(*part, *islice(token_ids, 2)) for part in parts]

    def _turn(
        self, reasoning: str, summary: str, reasoning_ids: list[int] | None, summary_ids: list[int] | None
    ) -> str | Fault:
        for name, text, ids in (("reasoning", reasoning, reasoning_ids), ("summary", summary, summary_ids)):
            if fault := self._text_fault(name, text, ids):
                return fault
        return assistant_text(reasoning, summary)

    def _token_ids(self, texts: list[str]) -> list[list[int] | None]:
        """None of a text that is not valid Unicode."""
        try:
            return [encoding.ids for encoding in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        except (UnicodeEncodeError, TypeError):
            return [None] if len(texts) == 1 else [ids for text in texts for ids in self._token_ids([text])]

    def _parts(self, answer: Answer) -> tuple[str, str] | Fault:
        """Reasoning and summary, neither empty."""
        if answer.finish_reason != "stop":
            cause = "repetition" if answer.finish_reason == "repetition" else "cut_off"  # vLLM can look for loops
            return Fault(cause, f"finish_reason {answer.finish_reason}")
        summary, reasoning = answer.content, answer.reasoning
        if self.config.strip_box_markers:
            summary, reasoning = _BOX.sub("", summary), reasoning and _BOX.sub("", reasoning)
        if not reasoning:
            thought, closed, summary = summary.partition("</think>")
            if not closed:
                return Fault("format", "the answer does not begin with <think>...</think>")
            reasoning = thought.strip().removeprefix("<think>")  # some chat templates have it in the prompt
        summary = summary.strip()
        if summary.startswith("<answer>"):
            summary = summary.removeprefix("<answer>").removesuffix("</answer>")
        reasoning, summary = reasoning.strip(), summary.strip()
        if not reasoning or not summary:
            return Fault("format", f"the {'reasoning' if not reasoning else 'summary'} is empty")
        return reasoning, summary

    def _text_fault(self, name: str, text: str, ids: list[int] | None) -> Fault | None:
        if tag := next((tag for tag in _TAGS if tag in text), None):
            return Fault("format", f"the {name} holds {tag}")
        if token := self.structural(text):
            return Fault("reserved_token", f"the {name} spells {token}")
        if ids is None:
            return Fault("format", f"the {name} is not valid Unicode")
        most = getattr(self.config, f"max_{name}_tokens")
        if len(ids) > most:
            return Fault("over_length", f"the {name} has {len(ids)} tokens, more than {most}")
        share = repeated_share(ids, self.config.repetition_ngram)
        if share > self.config.max_repetition:
            return Fault("repetition", f"{share:.2f} of the {name}'s {self.config.repetition_ngram}-grams are repeats")
        return None


def repeated_share(ids: list[int], n: int) -> float:
    """Share of the n-grams of token ids that stood in the text before; 0 for texts of fewer than 32."""
    grams = list(zip(*(ids[start:] for start in range(n)), strict=False))
    return 1 - len(set(grams)) / len(grams) if len(grams) >= _FEWEST_NGRAMS else 0.0
