"""Conversations as one text: the tokenizer's chat template where it has one, and where in it the answers are."""

from __future__ import annotations

from typing import Any

from trainer.data.corpus import Span
from trainer.errors import DataError

ANSWER = ""
"""Label of a span that is learned."""
_ASSISTANT = "assistant"


class Chat:
    """Renders conversations. What is learned are the assistant's words and what the template ends them with."""

    def __init__(self, tokenizer: Any, end: str):
        """
        Args:
            tokenizer: of transformers; None: one that is not trained yet.
            end: end-of-text, behind an answer where there is no template.
        """
        self._tokenizer = tokenizer if getattr(tokenizer, "chat_template", None) else None
        self._end = end

    def turn(self, prompt: str, answer: str, where: str) -> tuple[str, tuple[Span, ...]]:
        """One question and its answer as text, and where in it the answer is.

        Raises:
            DataError: the template refuses them.
        """
        messages = [{"role": "user", "content": prompt}, {"role": _ASSISTANT, "content": answer}]
        return self.conversation(messages, where)

    def question(self, prompt: str, where: str) -> str:
        """One question as text, up to where the answer begins.

        Raises:
            DataError: the template refuses it.
        """
        messages = [{"role": "user", "content": prompt}]
        return self._render(messages, True, where) if self._tokenizer else self._joined(messages)[0]

    def conversation(self, messages: Any, where: str) -> tuple[str, tuple[Span, ...]]:
        """A list of `{role, content}` as text, and where in it the answers are.

        Raises:
            DataError: it is no such list, holds no answer, or the template refuses it.
        """
        if not isinstance(messages, list) or not all(
            isinstance(message, dict) and isinstance(message.get("role"), str) and _is_text(message.get("content"))
            for message in messages
        ):
            raise DataError(f"{where}: the conversation is not a list of messages, each with a role and a content")
        if not any(message["role"] == _ASSISTANT for message in messages):
            raise DataError(f"{where}: the conversation has no message of the role {_ASSISTANT!r} to learn from")
        return self._rendered(messages, where) if self._tokenizer else self._joined(messages)

    def _joined(self, messages: list[dict[str, str]]) -> tuple[str, tuple[Span, ...]]:
        text, spans = "", []
        for message in messages:
            begin = len(text)
            if message["role"] == _ASSISTANT:
                text += message["content"] + self._end
                spans.append((begin, len(text), ANSWER))
            else:
                text += message["content"] + "\n"
        return text, tuple(spans)

    def _rendered(self, messages: list[dict[str, str]], where: str) -> tuple[str, tuple[Span, ...]]:
        text = self._render(messages, False, where)
        spans = []
        for number, message in enumerate(messages):
            if message["role"] != _ASSISTANT:
                continue
            before = self._render(messages[:number], True, where) if number else ""
            until = self._render(messages[: number + 1], False, where)
            if not (text.startswith(until) and until.startswith(before)):
                raise DataError(
                    f"{where}: the tokenizer's chat template renders message {number + 1} otherwise when others follow,"
                    " so its place is not known; split the conversation behind its answers, or change the template"
                )
            # what stands between two messages is no part of either
            end = max(len(before), len(until.rstrip()))
            spans.append((len(before), end, ANSWER))
        return text, tuple(spans)

    def _render(self, messages: list[dict[str, str]], begins_answer: bool, where: str) -> str:
        try:
            assert self._tokenizer is not None
            text: str = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=begins_answer
            )
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise DataError(f"{where}: the tokenizer's chat template refuses the conversation: {reason}") from error
        return text


def _is_text(value: Any) -> bool:
    return isinstance(value, str)
