"""A model's chat template, token by token: history is only ever extended.

    chat = ChatFormat(tokenizer)
    conversation.append_ids(chat.begin([{"role": "system", "content": "..."}, {"role": "user", "content": "..."}]))
    ids = await conversation.sample_ids(SamplingParams(256, temperature, chat.stop_ids))
    text = chat.text(ids)                                        # without the token that ended the turn
    conversation.append_ids(chat.observe("user", "Result: 42", ended=ids[-1] in chat.stop_ids))
    ids = await conversation.sample_ids(...)

or, the same with mgrpo.rollout.episode.Chat, which keeps these together:

    chat = Chat(episode.open("main"))
    chat.begin([{"role": "user", "content": question}])
    text = await chat.reply(max_tokens=256)
    chat.observe("user", "Result: 42")
    text = await chat.reply(max_tokens=256)

A template is a function of a whole conversation, and rendering it again after a turn may rewrite what came before:
thoughts are dropped, text is trimmed, and what the policy sampled encodes to other ids than it sampled. Therefore
nothing is rendered twice. A turn's ids stay as they were sampled, and what follows them is the part of

    template([user, assistant X, new messages], add_generation_prompt=True)

behind X, where X is a marker: the end of the assistant's turn, the new messages, the start of its next turn.

A control token's text inside a message ("<|im_end|>" in a web page, say) is encoded as text, so no tool can end a turn.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mgrpo.errors import ConfigError

Message = Mapping[str, Any]

_MARKER = "assistantsaysthis"  # letters only: no template trims, splits or escapes it
_BREAK = "\ue000"  # private use: stands inside a control token's text until it is encoded


class ChatFormat:
    """Renders messages to token ids. Raises ConfigError where the tokenizer's template does not allow that."""

    def __init__(self, tokenizer: Any, **variables: Any) -> None:
        """tokenizer: a Hugging Face tokenizer with a chat template. variables: the template's own settings, e.g.
        enable_thinking=False. A template that writes today's date must be given one: rollouts read no clock."""
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigError(
                f"the tokenizer {getattr(tokenizer, 'name_or_path', '')!r} has no chat template; use an instruction-"
                "tuned model, put its chat_template.jinja into the model's folder, or prompt with plain text"
            )
        self.tokenizer, self._variables = tokenizer, variables
        added = tokenizer.added_tokens_decoder
        self._control = frozenset(i for i, token in added.items() if token.special)
        texts = sorted((t.content for t in added.values() if t.special and len(t.content) > 1), key=len)
        self._control_text = re.compile("|".join(map(re.escape, reversed(texts))) or "(?!)")
        broken = (re.escape(t[0] + _BREAK + t[1:]) for t in reversed(texts))
        self._broken_text = re.compile(f"({'|'.join(broken) or '(?!)'})")
        self._end = self._end_of_turn()
        eos = tokenizer.eos_token_id
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys([self._end, *([] if eos is None else [eos])]))
        """Token ids that end the assistant's turn; the sampled one is part of the turn."""

    def begin(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> list[int]:
        """Ids of the first messages and of the start of the assistant's turn.

        messages: {"role", "content"} each, the last not the assistant's. tools: JSON schemas or functions, as
        apply_chat_template takes them; ConfigError where the template has no place for them.
        """
        if not messages or messages[-1].get("role") == "assistant":
            raise ValueError(
                "a chat begins with at least one message, the last of which is not the assistant's"
            )
        text = self._render(messages, tools)
        if tools and text == self._render(messages, None):
            raise ConfigError(
                f"the chat template of {self.tokenizer.name_or_path!r} ignores tools; describe them in a message"
            )
        return self._encode(text)

    def observe(self, role: str, content: str, *, ended: bool = True) -> list[int]:
        """Ids that follow a sampled turn: its end, one new message, the start of the next turn. ended: the turn has
        its end token already (finish reason "stop"); otherwise it is closed here."""
        return self.extend([{"role": role, "content": content}], ended=ended)

    def extend(self, messages: Sequence[Message], *, ended: bool = True) -> list[int]:
        """observe() of several messages at once, e.g. the results of parallel tool calls."""
        if not messages or any(m.get("role") == "assistant" for m in messages):
            raise ValueError(
                "new messages must be at least one, and none of them the assistant's: it is sampled"
            )
        ids = self._after(messages)
        return ids[self._end_at(ids) + 1 :] if ended else ids

    def text(self, ids: Sequence[int]) -> str:
        """What a sampled turn says, without the token that ended it."""
        ids = [int(i) for i in ids]
        text: str = self.tokenizer.decode(ids[:-1] if ids and ids[-1] in self.stop_ids else ids)
        return text

    # -- rendering --

    def _render(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> str:
        from jinja2 import TemplateError

        try:
            text: str = self.tokenizer.apply_chat_template(
                [self._broken(m) for m in messages],
                tools=list(tools) if tools else None,
                add_generation_prompt=True,
                tokenize=False,
                **self._variables,
            )
        except TemplateError as error:
            roles = [m.get("role") for m in messages]
            raise ConfigError(
                f"the chat template of {self.tokenizer.name_or_path!r} refuses messages of roles {roles}: {error}"
            ) from None
        return text

    def _after(self, messages: Sequence[Message]) -> list[int]:
        """Ids behind the assistant's words in [user, assistant, *messages], its end of turn included."""
        turn = [{"role": "user", "content": "u"}, {"role": "assistant", "content": _MARKER}]
        _, found, text = self._render([*turn, *messages]).partition(_MARKER)
        if not found:
            raise ConfigError(
                f"the chat template of {self.tokenizer.name_or_path!r} drops what the assistant said: "
                "its turns cannot be continued"
            )
        return self._encode(text)

    def _end_at(self, ids: Sequence[int]) -> int:
        return next((i for i, token in enumerate(ids) if token in self._control), -1)

    def _end_of_turn(self) -> int:
        ids = self._after([{"role": "user", "content": "u"}])
        if (at := self._end_at(ids)) < 0:
            raise ConfigError(
                f"the chat template of {self.tokenizer.name_or_path!r} ends the assistant's turn with no special "
                "token: sampling would not know where to stop"
            )
        return ids[at]

    # -- control tokens in what others wrote --

    def _broken(self, value: Any) -> Any:
        """The message with a break inside every control token's text, at any depth."""
        if isinstance(value, str):
            return self._control_text.sub(lambda m: m[0][:1] + _BREAK + m[0][1:], value.replace(_BREAK, ""))
        if isinstance(value, Mapping):
            return {key: self._broken(v) for key, v in value.items()}
        if isinstance(value, list | tuple):
            return [self._broken(v) for v in value]
        return value

    def _encode(self, text: str) -> list[int]:
        """Ids of rendered text; a control token's text with a break inside is encoded as text, without the break."""
        ids: list[int] = []
        for i, part in enumerate(
            self._broken_text.split(text)
        ):  # every other part is a broken control token's
            if i % 2:
                part = part.replace(_BREAK, "")
            ids += self.tokenizer.encode(part, add_special_tokens=False, split_special_tokens=bool(i % 2))
        return ids
