"""A model's chat template, token by token: history is only ever extended.

    chat = ChatFormat(tokenizer)
    opening = chat.open([{"role": "system", "content": "..."}, {"role": "user", "content": "..."}])
    conversation.append_ids(opening.ids)
    ids = await conversation.sample_ids(SamplingParams(256, temperature, chat.stop_ids))
    text = chat.text(ids)                                        # without the token that ended the turn
    conversation.append_ids(chat.observe("user", "Result: 42", last=ids[-1], opening=opening))
    ids = await conversation.sample_ids(...)

or, the same with mgrpo.environments.episode.Chat, which keeps these together:

    chat = Chat(episode.open("main"))
    chat.begin([{"role": "user", "content": question}])
    text = await chat.reply(max_tokens=256)
    chat.observe("user", "Result: 42")
    text = await chat.reply(max_tokens=256)

A template is a function of a whole conversation, and rendering it again after a turn may rewrite what came before:
thoughts are dropped, text is trimmed, and what the policy sampled encodes to other ids than it sampled. Therefore
nothing is encoded twice. A turn's ids stay as they were sampled, and what follows them is the part of

    template([*first messages, assistant X, new messages], tools, add_generation_prompt=True)

behind X, where X is a marker: the end of the assistant's turn, the new messages, the start of its next turn.

What a template cannot do in that way is refused by name (ChatError): a message that does not arrive as it stands, first
messages that change when others follow, a tool's result that spells the call it answers while the call is not given.

All that messages say is text: a control token's text inside one ("<|im_end|>" in a web page, "</think>" in an example
of an assistant's turn) is encoded as text. Structure comes from the template alone, from fields such as tool_calls and
reasoning_content. See chat_ids.py, and chat_marks.py for how messages are followed through a template.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mgrpo.errors import ChatError, ConfigError
from mgrpo.model.chat_clock import without_clock
from mgrpo.model.chat_ids import ChatEncoder, Rendered
from mgrpo.model.chat_marks import Marks, Message, tags_in
from mgrpo.model.stops import stops_of
from mgrpo.model.tokens import check_text, decode_piece

__all__ = ["ChatFormat", "Message", "Opening"]

_SAID = "assistantsaysthis"  # letters only: no template trims, splits or escapes it
_USER: Message = {"role": "user", "content": "u"}
_TURN: Message = {"role": "assistant", "content": _SAID}
_REPLIES = ("user", "tool", "observation", "function", "ipython")  # roles that speak after the assistant
SAMPLE_TOOL = {
    "type": "function",
    "function": {
        "name": "find",
        "description": "Finds.",
        "parameters": {"type": "object", "properties": {"query": {"type": "string", "description": "What."}}},
    },
}


def _call(name: str, number: str) -> Message:
    return {"type": "function", "id": number, "function": {"name": name, "arguments": {}}}


SAMPLE_CALL = _call("find", "call00001")  # nine characters: Mistral takes no other number of them
SAMPLE_RESULT: Message = {"role": "tool", "name": "find", "tool_call_id": "call00001", "content": "answer"}


@dataclass(frozen=True, slots=True)
class Opening:
    """How a conversation began: ids of the first messages and of the start of the assistant's turn."""

    ids: list[int]
    messages: Sequence[Message]
    tools: Sequence[Any]
    text: str
    """The rendered chat, for the check that later messages leave it as it was."""
    end: int
    """Characters of `text` up to the end of the last message."""


@dataclass(frozen=True, slots=True)
class _Chat:
    """A rendered chat and the place of each message's text in it."""

    rendered: Rendered
    places: Mapping[int, tuple[int, int]] = field(default_factory=dict)

    @property
    def text(self) -> str:
        return self.rendered.text


class ChatFormat:
    """Renders messages to token ids. Raises ConfigError where the tokenizer's template does not allow that."""

    def __init__(self, tokenizer: Any, **variables: Any) -> None:
        """tokenizer: a Hugging Face tokenizer with a chat template. variables: the template's own settings, e.g.
        enable_thinking=False. Templates that write today's date write a fixed one (see chat_clock.py), or the one
        that such a setting gives: rollouts read no clock."""
        template = getattr(tokenizer, "chat_template", None)
        self._name = str(getattr(tokenizer, "name_or_path", ""))
        if not template:
            raise ConfigError(
                f"the tokenizer {self._name!r} has no chat template; use an instruction-tuned model, put its "
                "chat_template.jinja into the model's folder, or prompt with plain text"
            )
        self.tokenizer, self._variables = tokenizer, variables
        self._encoder = ChatEncoder(tokenizer)
        self._templates: Mapping[str, str] = (
            template if isinstance(template, Mapping) else {"default": template}
        )
        added = [t.content for t in tokenizer.added_tokens_decoder.values()]
        self._tags = tags_in("\n".join(self._templates.values()), added)
        self._called: bool | None = None  # of _needs_calls
        self._roles: dict[object, bool] = {}  # role -> whether the template tells it from the assistant
        self._marked_ends: frozenset[int] = frozenset()  # ends of turns that are the next role's marker
        stops = [*self._ends(()), *(self._ends([SAMPLE_TOOL]) if "tool_use" in self._templates else ())]
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys([*stops, *stops_of(tokenizer)]))
        """Token ids that end the assistant's turn; the sampled one is part of the turn."""
        self._plain = self.open([_USER])

    def open(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None, *, calls: bool = False
    ) -> Opening:
        """The first messages of a conversation, and the start of the assistant's turn.

        messages: {"role", "content"} each, the last not the assistant's. tools: JSON schemas or functions, as
        apply_chat_template takes them. calls: extend() will be given the calls that a tool's result answers. Raises
        ChatError for what the template has no place for: tools, a role, calls, and for tools whose results it could
        not write later without the calls.
        """
        if not messages or messages[-1].get("role") == "assistant":
            raise ValueError(
                "a chat begins with at least one message, the last of which is not the assistant's"
            )
        tools = tuple(tools or ())
        self._check_roles(messages, tools)
        chat = self._render(messages, tools)
        if tools and chat.text == self._render(messages).text:
            raise ChatError(f"the chat template of {self._name!r} ignores tools; describe them in a message")
        if any(m.get("tool_calls") for m in messages):
            without = [{k: v for k, v in m.items() if k != "tool_calls"} for m in messages]
            if chat.text == self._render(without, tools).text:
                raise ChatError(
                    f"the chat template of {self._name!r} ignores tool_calls; write calls as text"
                )
        if tools and not calls and self._needs_calls(tools):
            raise ChatError(
                f"the chat template of {self._name!r} writes a tool's result only with the call that it answers; say "
                "calls=True with the tools, and give observe(..., calls=...) the calls of the turn"
            )
        end = max((end for _, end in chat.places.values()), default=0)
        return Opening(self._encoder.encode(chat.rendered), messages, tools, chat.text, end)

    def begin(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None, *, calls: bool = False
    ) -> list[int]:
        """The ids of open(), which also gives what observe() needs to continue this very conversation."""
        return self.open(messages, tools, calls=calls).ids

    def observe(
        self,
        role: str,
        content: str,
        *,
        ended: bool = True,
        last: int | None = None,
        calls: Sequence[Mapping[str, Any]] | None = None,
        opening: Opening | None = None,
    ) -> list[int]:
        """Ids that follow a sampled turn: its end, one new message, the start of the next turn. See extend()."""
        message = {"role": role, "content": content}
        return self.extend([message], ended=ended, last=last, calls=calls, opening=opening)

    def extend(
        self,
        messages: Sequence[Message],
        *,
        ended: bool = True,
        last: int | None = None,
        calls: Sequence[Mapping[str, Any]] | None = None,
        opening: Opening | None = None,
    ) -> list[int]:
        """observe() of several messages at once, e.g. the results of parallel tool calls.

        ended: the turn has its end token already (finish reason "stop"); otherwise it is closed here. last: the token
        that was sampled last, which says so more precisely: where the next role's marker ends a turn, that marker is
        written unless it was the one sampled. calls: the tool calls of the turn, as in a message's `tool_calls`, for
        templates that write of them in the results. opening: of open(); without it, a conversation of one user message
        and no tools is continued. Raises ChatError for what the template cannot append.
        """
        if not messages or any(m.get("role") == "assistant" for m in messages):
            raise ValueError(
                "new messages must be at least one, and none of them the assistant's: it is sampled"
            )
        opening = opening or self._plain
        self._check_roles(messages, opening.tools)
        if calls:
            ids = self._after_calls(messages, calls, opening)
        else:
            try:
                ids = self._after(messages, opening)
            except ChatError as error:
                if all(m.get("role") == "user" for m in messages):
                    raise
                try:
                    ids = self._after_any_call(messages, opening)
                except ChatError as behind_call:
                    raise ChatError(f"{error}; and behind a tool call: {behind_call}") from None
        end = next((i for i, token in enumerate(ids) if token in self._encoder.control), -1)
        if last is not None:
            ended = last in self.stop_ids
        if ended and end >= 0 and ids[end] in self._marked_ends:
            ended = last == ids[end]
        return ids[end + 1 :] if ended else ids

    def text(self, ids: Sequence[int]) -> str:
        """What a sampled turn says, without the token that ended it."""
        ids = [int(i) for i in ids]
        return decode_piece(self.tokenizer, ids[:-1] if ids and ids[-1] in self.stop_ids else ids)

    # -- rendering --

    def _render(self, messages: Sequence[Message], tools: Sequence[Any] = (), *, open: bool = True) -> _Chat:
        """The chat, with every message followed to its place. open: the assistant's next turn begins."""
        from jinja2 import TemplateError

        blank = [not str(m.get("content") or "").strip() and m.get("role") != "assistant" for m in messages]
        if any(blank):  # what says nothing cannot be found; its role must have a place all the same
            self._render(
                [{**m, "content": "x"} if b else m for m, b in zip(messages, blank, strict=True)], tools
            )
        for message in messages:
            if isinstance(content := message.get("content"), str):
                check_text(content)
        marks = Marks(self._tags, self._encoder.controls)
        marked, marked_tools = marks.mark(messages, tools)
        try:
            template = self.tokenizer.get_chat_template(None, tools=marked_tools or None)
            text: str = self.tokenizer.apply_chat_template(
                marked,
                tools=marked_tools or None,
                chat_template=without_clock(template),
                add_generation_prompt=open,
                tokenize=False,
                **self._variables,
            )
        except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            roles = [m.get("role") for m in messages]
            raise ChatError(
                f"the chat template of {self._name!r} refuses messages of roles {roles}: {error}"
            ) from None
        return _Chat(marks.find(text, self._name), marks.places)

    def _behind(self, chat: _Chat, turn: int) -> list[int]:
        """Ids behind the words of message number `turn`, the assistant's."""
        start, end = chat.places[turn]
        return self._encoder.encode(chat.rendered.behind(start), skip=end - start)

    def _after(self, messages: Sequence[Message], opening: Opening) -> list[int]:
        """Ids behind the assistant's words, its end of turn included."""
        turn = len(opening.messages)
        chat = self._render([*opening.messages, _TURN, *messages], opening.tools)
        self._check_kept(chat, opening, chat.places[turn][0])
        return self._behind(chat, turn)

    def _after_calls(
        self, messages: Sequence[Message], calls: Sequence[Mapping[str, Any]], opening: Opening
    ) -> list[int]:
        """As _after, of a turn that calls tools, from its end on."""
        turn = {"role": "assistant", "content": "", "tool_calls": list(calls)}
        chat = self._render([*opening.messages, turn, *messages], opening.tools)
        self._check_kept(chat, opening)
        pairs = zip(chat.text, opening.text, strict=False)
        begun = next((i for i, (a, b) in enumerate(pairs) if a != b), len(opening.text))  # of the turn
        ids = self._encoder.encode(chat.rendered.behind(begun))
        end = next((i for i, token in enumerate(ids) if token in self.stop_ids), -1)
        if end < 0:
            raise ChatError(
                f"the chat template of {self._name!r} ends a turn that calls a tool with none of the stop tokens "
                f"{self.tokenizer.convert_ids_to_tokens(list(self.stop_ids))}; add its end to eos_token_id in "
                "generation_config.json"
            )
        return ids[end:]

    def _after_any_call(self, messages: Sequence[Message], opening: Opening) -> list[int]:
        """As _after, for a template that wants a call before its result: which one must make no difference."""
        one, other = (
            self._after_calls(messages, [call], opening) for call in (SAMPLE_CALL, _call("seek", "call00002"))
        )
        if one != other:
            raise ChatError(
                f"the chat template of {self._name!r} writes the call into its result; give observe(..., calls=...) "
                "the calls of the turn"
            )
        return one

    def _check_roles(self, messages: Sequence[Message], tools: Sequence[Any]) -> None:
        """Refuse a role that the template writes as the assistant's, as templates with an `else` branch do."""
        for role in {m.get("role") for m in messages} - {"user", "assistant"}:
            if role not in self._roles:
                chats = []
                for name in (role, "assistant"):
                    with contextlib.suppress(ChatError):
                        chats.append(self._render([_USER, _TURN, {"role": name, "content": "u"}], tools).text)
                self._roles[role] = len(chats) < 2 or chats[0] != chats[1]
            if not self._roles[role]:
                raise ChatError(
                    f"the chat template of {self._name!r} writes a message of role {role!r} as the assistant's own"
                )

    def _needs_calls(self, tools: Sequence[Any]) -> bool:
        """Whether a tool's result can be written with the call that it answers, and not without."""
        if self._called is None:
            self._called = False
            opening = self.open([_USER], tools, calls=True)
            try:
                self.extend([{"role": "tool", "content": "answer"}], opening=opening)
            except ChatError:
                with contextlib.suppress(ChatError):
                    self.extend([SAMPLE_RESULT], calls=[SAMPLE_CALL], opening=opening)
                    self._called = True
        return self._called

    def _check_kept(self, chat: _Chat, opening: Opening, until: int | None = None) -> None:
        """The first messages are as they were; so is the start of the turn behind them, up to `until`, except that a
        template may write an opening of thoughts (or drop it) there."""
        kept = chat.text[: opening.end] == opening.text[: opening.end]
        if kept and until is not None:
            then, now = opening.text[opening.end :], chat.text[opening.end : until]
            kept = then.startswith(now) or now.startswith(then)
        if not kept:
            roles = [m.get("role") for m in opening.messages]
            raise ChatError(
                f"the chat template of {self._name!r} writes the first messages (roles {roles}) anew when others "
                "follow: a history that is only extended cannot do that"
            )

    # -- ends of turns --

    def _ends(self, tools: Sequence[Any]) -> list[int]:
        """The tokens that end the assistant's turn: the template's own, or the markers of the roles that may follow
        (then also in _marked_ends)."""
        closed = self._first(self._behind(self._render([_USER, _TURN], tools, open=False), 1))
        followed = self._first(self._behind(self._render([_USER, _TURN, _USER], tools), 1))
        if closed is not None and (closed == followed or closed in stops_of(self.tokenizer)):
            return [closed]
        if followed is None:
            raise ConfigError(
                f"the chat template of {self._name!r} ends the assistant's turn with no special token: sampling would "
                "not know where to stop"
            )
        opened = self._first(self._behind(self._render([_USER], tools), 0))
        if followed == opened:
            return [followed]  # ends the user's turn as well
        markers = [followed]
        for role in _REPLIES:
            try:
                chat = self._render([_USER, _TURN, {"role": role, "content": "u"}], tools)
            except ChatError:
                continue
            if (marker := self._first(self._behind(chat, 1))) not in (None, opened):
                markers.append(marker)
        self._marked_ends |= frozenset(markers)
        return markers

    def _first(self, ids: Sequence[int]) -> int | None:
        return next((token for token in ids if token in self._encoder.control), None)
