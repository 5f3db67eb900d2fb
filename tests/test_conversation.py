"""A conversation of several segments: each is a sequence of its own, and one trajectory holds them all."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from mgrpo.engines.base import Generation, SamplingParams
from mgrpo.environments.episode import Agent, Conversation, Episode
from mgrpo.errors import ContextOverflowError, RolloutError
from mgrpo.types import Trajectory, segment_slices

PARAMS = SamplingParams(8, 1.0, ())


class Counting:
    """Says 100, 101, ... of versions 0, 1, ...: two tokens a turn. Keeps what it was asked and told to forget."""

    def __init__(self) -> None:
        self.asked: list[tuple[str | None, list[int], int]] = []
        self.released: list[str] = []
        self.wait: asyncio.Event | None = None

    @property
    def version(self) -> int:
        return 0

    async def generate(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, seed: int, session: str | None = None
    ) -> Generation:
        turn = len(self.asked)
        self.asked.append((session, list(prompt_ids), seed))
        if self.wait is not None:
            await self.wait.wait()
        ids = np.array([100 + 2 * turn, 101 + 2 * turn], np.int32)
        return Generation(ids, np.array([-0.5, -turn], np.float32), np.full(2, turn, np.int32), "length")

    async def load(self, path_or_state: object, version: int) -> None:
        raise NotImplementedError

    def release(self, session: str) -> None:
        self.released.append(session)


def opened(max_length: int = 32) -> tuple[Episode, Conversation, Counting]:
    engine = Counting()
    tokenizer: Any = None  # ids alone
    agents = {role: Agent(role, engine, tokenizer, 1.0, max_length) for role in ("main", "sub")}
    episode = Episode("7/3", 2, agents, seed=5)
    return episode, episode.open("main"), engine


def say(conversation: Conversation) -> list[int]:
    return asyncio.run(conversation.sample_ids(PARAMS))


def test_each_segment_is_a_sequence_of_its_own() -> None:
    """A fork hides what was before it from the engine, under another session; noise, tokens and versions go on; the
    trajectory has all of it, by segment."""
    episode, main, engine = opened()
    main.append_ids([1, 2, 3])
    say(main)
    main.append_ids([4])
    say(main)
    main.fork([7, 8])
    assert (main.segments, main.remaining, len(main)) == (2, 30, 10)
    with pytest.raises(ValueError, match=r"nothing was sampled yet in 7/3/2/0/main/0\+1"):
        main.last_sampled()
    say(main)
    assert main.last_sampled() == 105 and main.remaining == 28
    sessions, prompts, seeds = zip(*engine.asked, strict=True)
    assert prompts == ([1, 2, 3], [1, 2, 3, 100, 101, 4], [7, 8])
    assert sessions == ("7/3/2/0/main/0", "7/3/2/0/main/0", "7/3/2/0/main/0+1") and len(set(seeds)) == 3
    assert engine.released == ["7/3/2/0/main/0"] and main.mismatches == 0
    main.close(format=1.0)
    assert engine.released == ["7/3/2/0/main/0", "7/3/2/0/main/0+1"]
    found = episode.finish(1.0).main
    assert found.tokens.tolist() == [1, 2, 3, 100, 101, 4, 102, 103, 7, 8, 104, 105]
    assert found.loss_mask.tolist() == [0, 0, 0, 1, 1, 0, 1, 1, 0, 0, 1, 1]
    assert found.versions.tolist() == [-1, -1, -1, 0, 0, -1, 1, 1, -1, -1, 2, 2]
    assert found.logprobs.tolist() == [0, 0, 0, -0.5, 0, 0, -0.5, -1, 0, 0, -0.5, -2]
    assert found.segment_starts == (0, 8) and found.segments() == [slice(0, 8), slice(8, 12)]
    assert [a.dtype for a in (found.tokens, found.loss_mask)] == [np.int32, np.uint8]


def test_a_segment_without_a_sampled_token_is_no_part_of_the_trajectory() -> None:
    """Forked away from, it is replaced; as the last, it is left out, and a call that was opened in it stands at the
    trajectory's end."""
    episode, main, engine = opened()
    main.append_ids([1])
    main.fork([2, 3])
    assert main.segments == 1 and len(main) == 2
    say(main)
    main.fork([4])
    main.fork([5, 6])
    assert main.segments == 2
    sub = episode.open("sub")
    sub.append_ids([9])
    say(sub)
    sub.close()
    main.close()
    assert len(set(engine.released)) == len(engine.released) == 5
    rollout = episode.finish(0.0)
    assert rollout.main.tokens.tolist() == [2, 3, 100, 101] and rollout.main.segment_starts == (0,)
    assert rollout.info["opened_at"] == {"sub": [4]}


def test_nothing_sampled_in_any_segment_cannot_be_trained() -> None:
    """However many segments there were, such a conversation is refused by name."""
    episode, main, _ = opened()
    main.append_ids([1])
    main.fork([2])
    main.close()
    with pytest.raises(RolloutError, match="7/3/2/0/main/0 has no sampled token among 1"):
        episode.finish(0.0)


@pytest.mark.parametrize(
    ("ids", "error", "words"),
    [
        (
            range(33),
            ContextOverflowError,
            r"33 tokens of context of a new segment do not fit behind 0 .* is 32",
        ),
        ([], ValueError, "forked with no ids"),
        ([3, -1], ValueError, r"token ids -1..3 .* outside"),
    ],
)
def test_a_refused_fork_changes_nothing(ids: Sequence[int], error: type[Exception], words: str) -> None:
    """What does not fit, or is no context, leaves the segment, its session and what remains as they were."""
    _, main, engine = opened()
    main.append_ids([1, 2])
    say(main)
    with pytest.raises(error, match=words):
        main.fork(ids)
    assert (main.segments, len(main), main.remaining, engine.released) == (1, 4, 28, [])
    main.fork(range(32))
    assert main.remaining == 0 and len(main) == 36
    with pytest.raises(ContextOverflowError, match="1 more tokens of context do not fit behind 32 tokens"):
        main.append_ids([1])


def test_nothing_comes_between_a_turn_and_what_it_was_asked_with() -> None:
    """What it samples belongs behind the ids and in the segment that the policy saw: no context, no second turn and no
    fork meanwhile; they are taken afterwards."""

    async def run() -> Trajectory:
        _, main, engine = opened()
        main.append_ids([1])
        engine.wait = asyncio.Event()
        turn = asyncio.create_task(main.sample_ids(PARAMS))
        while not engine.asked:
            await asyncio.sleep(0)
        with pytest.raises(ValueError, match="forked while a turn is sampled"):
            main.fork([2])
        with pytest.raises(ValueError, match="appended to while a turn is sampled"):
            main.append_ids([3])
        with pytest.raises(ValueError, match="asked for another turn while a turn is sampled"):
            await main.sample_ids(PARAMS)
        engine.wait.set()
        await turn
        main.fork([2])
        return main.trajectory()

    found = asyncio.run(run())
    assert found.tokens.tolist() == [1, 100, 101, 2] and found.segment_starts == (0, 3)


@pytest.mark.parametrize("starts", [(), (1,), (0, 0), (0, 4, 2), (0, 5), (0, 9), (0, -1)])
def test_starts_out_of_place_are_refused(starts: tuple[int, ...]) -> None:
    """Of five tokens: they begin with 0, rise, and each leaves a token behind it."""
    with pytest.raises(ValueError, match="segment"):
        segment_slices(starts, 5)


def test_slices_cover_the_trajectory() -> None:
    """One behind the other, from the first token to the last; without tokens there is one, and it is empty."""
    assert segment_slices((0, 1, 4), 5) == [slice(0, 1), slice(1, 4), slice(4, 5)]
    assert segment_slices((0,), 5) == [slice(0, 5)] and segment_slices((0,), 0) == [slice(0, 0)]
