"""The relay, whose agents have their context rewritten while they talk: the main agent's twice or not at all, "left"'s
before its last turn, as its question asks."""

from __future__ import annotations

from mgrpo.environments.episode import Episode
from mgrpo.environments.task import Question
from mgrpo.types import Rollout
from tests.relay import RelayTask


class ForkingRelay(RelayTask):
    """options: the relay's."""

    async def play(self, question: Question, episode: Episode) -> Rollout:
        main = episode.open("main")
        main.append(question.text)
        await main.sample(4, stop="w0")
        first = main.last_sampled()
        for role, calls in (("left", 1 + first % 3), ("right", first % 2)):
            for call in range(calls):
                sub = episode.open(role)
                sub.append(f"w{call + 1} w{first % 50}")
                await sub.sample(3, stop="w0")
                if role == "left" and call % 2:
                    sub.fork(sub.encode("w7 w8"))
                await sub.sample(2, stop="w0")
                sub.close(format=1.0, expert=float(sub.last_sampled() % 3 == 0))
        for n in range(2 if first % 2 else 0):
            main.fork(main.encode(f"w{10 + n} w{first % 50}"))
            await main.sample(3, stop="w0")
        main.close(format=float(len(main) % 2))
        return episode.finish(float(main.last_sampled() % 2 == 0))
