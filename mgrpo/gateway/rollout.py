"""One attempt at a rollout behind its base URL: turns of its agents, as programs ask for them over HTTP.

    TurnRequest --entry()--> normal form --_chosen()--> repeated: the recorded turn
                                                        else a Match --steps.py--> Step, checked and not yet done
    Step --_begin()--> ids appended, a task that samples --parser--> TurnReply, recorded

Up to _begin() nothing is changed and nothing is awaited, so a request that is refused leaves no trace and two requests
never see each other half done. The turn itself is a task of the attempt, not of the request: a client that hangs up
leaves it running, its retry gets the recorded reply, and when the attempt ends so do its turns.

What a rollout says follows from the episode's seed and the program: an invocation's noise, and the ids of its replies
and calls, from the digest of its first messages and its number among equal ones. Only `id` and `token` are random.
"""

from __future__ import annotations

import asyncio
import contextvars
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from hashlib import blake2b

from mgrpo.engines.base import SamplingParams
from mgrpo.environments.attempt import AttemptOverError
from mgrpo.environments.conversation import Agent, Conversation, unit_score
from mgrpo.environments.episode import Episode
from mgrpo.errors import ConfigError, InfrastructureError, RolloutError
from mgrpo.gateway.errors import GatewayError
from mgrpo.gateway.forms import Forms
from mgrpo.gateway.history import (
    Entry,
    Match,
    Past,
    canonical,
    choose_extended,
    choose_rewritten,
    digest,
    entry,
    repeats,
    rewritten,
)
from mgrpo.gateway.options import GatewayOptions
from mgrpo.gateway.steps import Asked, Step, Thread, next_step, open_step
from mgrpo.gateway.tool_parser import ParsedCall
from mgrpo.gateway.turn import ToolCall, TurnReply, TurnRequest
from mgrpo.types import MAIN

COUNTS = ("turns", "rewritten", "forks", "thoughts_dropped", "tools_changed", "overridden", "repeated")
"""What a rollout counts: see GatewayRollout.counts."""
_LETTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
Terms = tuple[frozenset[str], int | None, tuple[str, ...]]


@dataclass(slots=True, eq=False)
class _Turn:
    """A turn that is sampled, or was sampled last in its conversation. asked: what was said before it. first: of its
    conversation. lost: who waited for it has gone."""

    thread: Thread
    asked: Past
    terms: Terms
    first: bool
    task: asyncio.Task[TurnReply]
    lost: bool = False


class GatewayRollout:
    """Use from the loop that plays. Made within the attempt, it samples within it: its turns end with the attempt."""

    def __init__(self, episode: Episode, options: GatewayOptions, forms: Forms) -> None:
        """forms: shared by the rollouts of a task."""
        self.id, self.token = secrets.token_urlsafe(16), secrets.token_urlsafe(32)
        self.counts: dict[str, int] = dict.fromkeys(COUNTS, 0)
        """turns that were begun; rewritten histories that were kept; forks; replies whose thoughts were left out; turns
        that offer fewer tools than their conversation began with; requests with overridden settings; requests that
        were answered from the record."""
        self.failure: Exception | None = None
        """What failed first where turns are sampled: whatever the program makes of it, the attempt failed for it."""
        self._episode, self._options, self._forms = episode, options, forms
        self._context = contextvars.copy_context()
        self._threads: dict[str, list[Thread]] = {role: [] for role in episode.agents}
        self._turns: dict[Thread, _Turn] = {}  # each conversation's last
        self._digests: Counter[bytes] = Counter()
        self._refused: Counter[bytes] = Counter()  # requests that were too many, which an SDK sends again
        self._rewards: dict[tuple[str, int], dict[str, float]] = {}
        self._over = False
        self._harness: asyncio.Timeout | None = None  # around what plays, see decides()

    @property
    def roles(self) -> Sequence[str]:
        """The models that a request may name."""
        return sorted(self._threads)

    # -- turns --

    async def turn(self, request: TurnRequest) -> TurnReply:
        """What the policy says next. Raises GatewayError: 400 for what cannot be asked, written or does not fit, 404
        for a role that is not there, 409 for a history that was rewritten, a conversation that is busy, too many turns
        and a rollout that is over, 429 for too many turns at once, 500 and 503 for what failed meanwhile. A request
        whose caller is cancelled goes on; the same request again gets its reply."""
        self._check_running()
        agent = self._episode.agents.get(request.role)
        if agent is None:
            raise GatewayError(
                404,
                "model_not_found",
                f"the model {request.role!r:.100} does not exist; this run has {self.roles}",
            )
        try:
            asked = Asked(
                request, [entry(m) for m in request.messages], frozenset(map(canonical, request.tools))
            )
            self._check(asked)
            turn = self._repeated(asked) or self._begun(asked, agent)
        except AttemptOverError as error:
            raise _over() from error
        except (ValueError, TypeError, ConfigError) as error:
            raise GatewayError(400, "invalid_messages", str(error)) from error
        return await self._reply(turn)

    def overridden(self, names: Sequence[str]) -> None:
        """A request has settings that are not taken. Raises GatewayError (400) where options.sampling refuses them."""
        if not names:
            return
        if self._options.sampling == "refuse":
            raise GatewayError(
                400, "unsupported_setting", f"{', '.join(names)}: turns are sampled as they are trained"
            )
        self.counts["overridden"] += 1

    @asynccontextmanager
    async def decides(self) -> AsyncIterator[None]:
        """Around the code that plays: what fails first where turns are sampled is raised, whatever that code makes of
        it. It is cancelled then, since nothing it could still do counts."""
        try:
            async with asyncio.timeout(None) as self._harness:
                yield
        except (Exception, SystemExit, asyncio.CancelledError) as error:
            task = asyncio.current_task()
            if self.failure is None or (task is not None and task.cancelling()):
                raise
            raise self.failure from error
        finally:
            self._harness = None
        if self.failure is not None:
            raise self.failure

    def end(self) -> None:
        """No more turns: those under way are cancelled, later ones are refused (409). Idempotent."""
        self._over = True
        for turn in self._turns.values():
            turn.task.cancel("the rollout is over")

    async def settle(self) -> None:
        """No more turns are begun, and those under way are awaited, so that what is trained does not depend on when a
        program that did not wait for them has ended. They end at the latest with the attempt."""
        self._over = True
        if running := [turn.task for turn in self._turns.values() if not turn.task.done()]:
            await asyncio.wait(running)

    def arrange(self) -> None:
        """Number the sub-agents' conversations in the episode by what they were asked: first by main's turn, then by
        their first messages. Before, they have the order in which requests arrived, as in replies and rewards; call it
        last, before the episode is finished."""
        for role, threads in self._threads.items():
            if role != MAIN:
                order = sorted(range(len(threads)), key=lambda i, of=threads: of[i].rank)  # type: ignore[misc]
                self._episode.renumber(role, order)

    # -- what becomes of it --

    def reward(self, role: str, invocation: int, name: str, value: float) -> None:
        """A score of a conversation; a later one of the same name replaces it. Raises GatewayError: 404 for a
        conversation that is not there, 400 for a name that is no identifier or a value outside [0, 1], 409."""
        if self._over:
            raise _over()
        threads = self._threads.get(role, [])
        if not 0 <= invocation < len(threads):
            raise GatewayError(
                404,
                "invocation_not_found",
                f"role {role!r:.100} has {len(threads)} invocations, not {invocation}",
            )
        where = f"invocation {invocation} of role {role!r}"
        if not (isinstance(name, str) and name.isidentifier()):
            raise GatewayError(
                400, "invalid_reward", f"{name!r:.100} of {where} is no name: letters, digits and _"
            )
        try:
            score = unit_score(value, f"reward {name!r} of {where}")
        except RolloutError as error:
            raise GatewayError(400, "invalid_reward", str(error)) from error
        self._rewards.setdefault((role, invocation), {})[name] = score

    def rewards(self) -> Mapping[tuple[str, int], Mapping[str, float]]:
        """(role, invocation) -> name -> value, of what was posted."""
        return {place: dict(scores) for place, scores in self._rewards.items()}

    def conversations(self) -> Mapping[tuple[str, int], Conversation]:
        """(role, invocation) -> its conversation, in the order in which they were opened."""
        return {
            (role, i): thread.conversation
            for role, threads in self._threads.items()
            for i, thread in enumerate(threads)
        }

    # -- before a turn: nothing is changed --

    def _check_running(self) -> None:
        if self._over:
            raise _over()
        if self.failure is not None:
            raise _failed(self.failure)

    def _check(self, asked: Asked) -> None:
        """What can be said of a request alone."""
        request, count = asked.request, len(self._threads[asked.request.role])
        if not asked.entries or asked.entries[-1].role == "assistant":
            raise ValueError(
                "a request has at least one message, the last of which is not the assistant's: it is sampled"
            )
        if request.max_tokens is not None and request.max_tokens < 1:
            raise ValueError(f"max_tokens is {request.max_tokens}, expected at least 1")
        SamplingParams(1, stop=request.stop)  # refuses stop texts that cannot be taken
        if request.invocation is not None and not 0 <= request.invocation <= count:
            raise GatewayError(
                404,
                "invocation_not_found",
                f"role {request.role!r} has {count} invocations: the next is {count}, not {request.invocation}",
            )

    def _candidates(self, asked: Asked) -> tuple[list[Thread], bool]:
        """The conversations that a request may go on with, and whether it can be no other."""
        threads, named = self._threads[asked.request.role], asked.request.invocation
        if named is not None:
            return threads[named : named + 1], True
        return threads, asked.request.role == MAIN

    def _repeated(self, asked: Asked) -> _Turn | None:
        """The recorded turn that answers a request which was sent again.

        An SDK says so. Without its word it is taken for one where no conversation would go on with it otherwise;
        the first request of a sub-agent is not, since equal ones open parallel twins, unless who sent one has hung up
        while it was sampled."""
        threads, sole = self._candidates(asked)
        flagged = asked.request.repeated
        if flagged and self._refused[key := _key(asked)]:
            self._refused[key] -= 1  # it comes again because it was refused
            flagged = False
        if not flagged and choose_extended([t.past for t in threads if not self._busy(t)], asked.entries):
            return None
        terms = _terms(asked)
        turns = [turn for t in threads if (turn := self._turns.get(t)) and turn.terms == terms]
        same = [
            t for t in turns if (flagged or sole or t.lost or not t.first) and repeats(t.asked, asked.entries)
        ]
        if not same:
            return None
        turn = next((t for t in same if t.lost), same[-1])
        self.counts["repeated"] += 1
        return turn

    def _begun(self, asked: Asked, agent: Agent) -> _Turn:
        """The turn of a request that is no repetition, once everything is checked."""
        self._check_limits(asked)
        found = self._found(asked)
        if found is None:
            opened = sum(map(len, self._threads.values()))
            if opened >= self._options.invocations:
                raise GatewayError(
                    409, "too_many_invocations", f"this rollout has {opened} conversations, which is its most"
                )
            step = open_step(asked, agent, self._forms.of(agent))
        else:
            step = next_step(asked, *found, self._options)
        return self._begin(asked, step)

    def _check_limits(self, asked: Asked) -> None:
        if (turns := self.counts["turns"]) >= self._options.turns:
            raise GatewayError(409, "too_many_turns", f"this rollout has {turns} turns, which is its most")
        running = sum(map(self._busy, self._turns))
        if running >= self._options.concurrent_turns:
            self._refused[_key(asked)] += 1
            raise GatewayError(
                429, "too_many_concurrent_turns", f"this rollout samples {running} turns, its most at once"
            )

    def _found(self, asked: Asked) -> tuple[Thread, Match] | None:
        """The conversation that a request goes on with; None: it opens the next one."""
        threads, sole = self._candidates(asked)
        idle = [t for t in threads if not self._busy(t)]
        pasts = [t.past for t in idle]
        found = choose_extended(pasts, asked.entries)
        found = found or choose_rewritten(pasts, asked.entries, sole=sole)
        if found is not None:
            return idle[found[0]], found[1]
        for thread in threads:
            if self._busy(thread) and rewritten(thread.past, asked.entries, sole=sole):
                raise GatewayError(
                    409,
                    "conversation_busy",
                    f"invocation {thread.conversation.invocation} of role {asked.request.role!r} samples a turn; "
                    "await it before the next",
                )
        return None

    def _busy(self, thread: Thread) -> bool:
        turn = self._turns.get(thread)
        return turn is not None and not turn.task.done()

    # -- a turn --

    def _begin(self, asked: Asked, step: Step) -> _Turn:
        """Do what the step says, and sample."""
        thread = self._opened(asked, step) if step.thread is None else step.thread
        if step.kind == "fork":
            thread.conversation.fork(step.ids)
        else:
            thread.conversation.append_ids(step.ids)
        if step.opening is not None:
            thread.opening = step.opening
        thread.past = step.past
        for name in ("turns", *step.counts):
            self.counts[name] += 1
        wanted = asked.request.max_tokens or self._options.turn_tokens
        params = SamplingParams(
            min(wanted, step.room),
            thread.conversation.agent.temperature,
            thread.form.chat.stop_ids,
            asked.request.stop,
        )
        first, thread.turns = not thread.turns, thread.turns + 1
        task = asyncio.get_running_loop().create_task(
            self._sampled(thread, asked.request, params), context=self._context.copy()
        )
        task.add_done_callback(_retrieved)
        turn = self._turns[thread] = _Turn(thread, step.past, _terms(asked), first, task)
        return turn

    def _opened(self, asked: Asked, step: Step) -> Thread:
        role, found = asked.request.role, _key(asked)
        number = self._digests[found]
        salt = blake2b(found + number.to_bytes(8, "little"), digest_size=8).digest()
        conversation = self._episode.open(role, salt=int.from_bytes(salt, "little"))
        self._digests[found] += 1
        rank = sum(len(main.conversation) for main in self._threads.get(MAIN, ())), found, number
        assert step.opening is not None
        thread = Thread(conversation, self._forms.of(conversation.agent), step.opening, step.past, rank)
        self._threads[role].append(thread)
        return thread

    async def _sampled(self, thread: Thread, request: TurnRequest, params: SamplingParams) -> TurnReply:
        """Sample, and take the turn apart."""
        conversation = thread.conversation
        prompt = conversation.agent.max_length - conversation.remaining
        _, found, number = thread.rank
        name = f"{self._episode.query}/{self._episode.rollout}/{found.hex()}/{number}/{thread.turns}"
        try:
            ids = await conversation.sample_ids(params)
            text, ended = thread.form.said(ids, params.stop)
            parsed = await thread.form.parser.parse(
                ids, text, request.tools, finish="stop" if ended else "length"
            )
        except Exception as error:
            self._fail(error)
            raise
        calls = tuple(_tool_call(name, i, call) for i, call in enumerate(parsed.calls))
        assert conversation.last is not None
        thread.last = ids[-1] if ids else None
        reply = TurnReply(
            blake2b(name.encode(), digest_size=12).hexdigest(),
            request.role,
            conversation.invocation,
            parsed.content,
            parsed.reasoning,
            calls,
            parsed.finish_reason,
            prompt,
            tuple(ids),
            tuple(float(x) for x in conversation.last.logprobs),
        )
        thread.past = Past([*thread.past.entries, _entry(reply, text)], thread.past.first, thread.past.tools)
        return reply

    def _fail(self, error: Exception) -> None:
        if self.failure is None:
            self.failure = error
            if self._harness is not None:
                self._harness.reschedule(asyncio.get_running_loop().time())  # at once

    async def _reply(self, turn: _Turn) -> TurnReply:
        """Of a turn, once it is there. It ends at the latest with the attempt, whose task it is."""
        try:
            await asyncio.wait([turn.task])
        except asyncio.CancelledError:
            turn.lost = True
            raise
        turn.lost = False
        if turn.task.cancelled():
            raise _over()
        if (error := turn.task.exception()) is not None:
            assert isinstance(error, Exception)
            raise _failed(error) from error
        return turn.task.result()


def _key(asked: Asked) -> bytes:
    return digest(asked.request.role, asked.entries, asked.tools)


def _terms(asked: Asked) -> Terms:
    """What, beside the history, must be equal in a request that is sent again."""
    return asked.tools, asked.request.max_tokens, asked.request.stop


def _entry(reply: TurnReply, raw: str) -> Entry:
    calls = tuple((call.name, canonical(call.arguments)) for call in reply.tool_calls)
    ids = tuple(call.id for call in reply.tool_calls)
    return Entry("assistant", reply.content, calls, reasoning=reply.reasoning, ids=ids, raw=raw)


def _tool_call(name: str, number: int, call: ParsedCall) -> ToolCall:
    """With an id of nine letters and digits, the one form that every chat template takes."""
    value = int.from_bytes(blake2b(f"{name}/{number}".encode(), digest_size=8).digest(), "little")
    letters = []
    for _ in range(9):
        value, at = divmod(value, len(_LETTERS))
        letters.append(_LETTERS[at])
    return ToolCall("".join(letters), call.name, call.arguments)


def _over() -> GatewayError:
    return GatewayError(409, "rollout_over", "this rollout is over: no more turns are sampled for it")


def _failed(error: Exception) -> GatewayError:
    if isinstance(error, GatewayError):
        return error
    if isinstance(error, InfrastructureError | ConnectionError | TimeoutError):
        return GatewayError(503, "engine_unavailable", f"a turn could not be sampled: {error}")
    return GatewayError(500, "internal_error", f"a turn failed: {type(error).__name__}: {error}")


def _retrieved(task: asyncio.Task[TurnReply]) -> None:
    """A failure is kept in `failure`, whether or not anybody waits for the turn."""
    if not task.cancelled():
        task.exception()
