"""The way of the experts that an engine reports: engine, conversation, trajectory log, record, rows of a micro-batch;
and a whole run that is replayed bit for bit."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from mgrpo.cli.replay import replay_run
from mgrpo.config import load_config
from mgrpo.config.policy import PolicyConfig
from mgrpo.engines.base import Generation, SamplingParams
from mgrpo.engines.hf.engine import HfEngine
from mgrpo.environments.episode import Agent, Episode
from mgrpo.errors import ConfigError, ContextOverflowError, InfrastructureError, PeerError
from mgrpo.model.policy import Policy, state_of
from mgrpo.pipeline.batch import BatchBuilder
from mgrpo.pipeline.worker_context import WorkerContext
from mgrpo.record.reader import Recording
from mgrpo.record.rollouts import _record
from mgrpo.trajectory_log import client as log_client
from mgrpo.trajectory_log import format as log_format
from mgrpo.trajectory_log.client import TrajectoryLogClient
from mgrpo.trajectory_log.format import LogRef, Meta
from mgrpo.transport import codec
from mgrpo.types import Experts, Rollout, Trajectory
from tests.moe_ranks import moe_policy
from tests.runs import RELAY, ROOT, records, train
from tests.store_kit import DIGEST, make_trajectory, same
from tests.test_batch import MASK, groups
from tests.test_conversation import PARAMS, Counting, opened, say
from tests.test_hf import served
from tests.test_routing_replay import own_experts
from tests.test_trajectory_log import served as log_of

pytestmark = pytest.mark.usefixtures("one_thread")

NONE = 255


class Reporting(Counting):
    """Counting, which reports 2 routers' 1 expert of all tokens but the last: number 10 * turn + router. Turn 1 reports
    nothing."""

    async def generate(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, seed: int, session: str | None = None
    ) -> Generation:
        turn = len(self.asked)
        out = await super().generate(prompt_ids, params, seed=seed, session=session)
        experts = np.full((len(prompt_ids) + 1, 2, 1), 10 * turn, np.uint8) + np.uint8([[0], [1]])
        return replace(out, experts=None if turn == 1 else experts)


def test_what_is_known_of_a_segment_stays() -> None:
    """A later report fills what nobody had recorded, the sampled token at the end of the turn before among it; a fork
    has its own; the last token is not known."""
    engine: Any = Reporting()
    tokenizer: Any = None
    agent = Agent("main", engine, tokenizer, 1.0, 64)
    main = Episode("7/3", 2, {"main": agent}, seed=5).open("main")
    main.append_ids([1, 2, 3])
    assert main.trajectory().experts is None
    say(main)  # 5 tokens, 4 reported
    say(main)  # 7, nothing reported
    main.append_ids([4])
    say(main)  # 10, 9 reported
    main.fork([7, 8])
    say(main)  # 4, 3 reported
    found = main.trajectory().experts
    assert found is not None and found.dtype == np.uint8 and found.shape == (14, 2, 1)
    expected = [0] * 4 + [20] * 5 + [NONE] + [30] * 3 + [NONE]
    assert found[:, 0, 0].tolist() == expected
    assert found[:, 1, 0].tolist() == [x if x == NONE else x + 1 for x in expected]
    main.close()
    final = main.final_trajectory()
    assert final.experts is not None and np.array_equal(final.experts, found)


def test_an_engine_that_reports_nothing_leaves_none() -> None:
    """Nor has the trajectory any."""
    _, main, _ = opened()
    main.append_ids([1])
    say(main)
    assert main.trajectory().experts is None


@pytest.mark.parametrize(
    "experts",
    [np.zeros((9, 2, 1), np.uint8), np.zeros((3, 2), np.uint8), np.zeros((3, 2, 1), np.int64)],
)
def test_a_report_that_does_not_fit_is_refused(experts: Any) -> None:
    """More tokens than there are, a dimension too few, another dtype."""

    class Wrong(Counting):
        async def generate(self, *args: Any, **kwargs: Any) -> Generation:
            return replace(await super().generate(*args, **kwargs), experts=experts)

    engine: Any = Wrong()
    tokenizer: Any = None
    main = Episode("7/3", 2, {"main": Agent("main", engine, tokenizer, 1.0, 64)}, seed=5).open("main")
    main.append_ids([1, 2])
    with pytest.raises(InfrastructureError, match=r"the engine reports experts .* of 4 tokens, expected u8"):
        asyncio.run(main.sample_ids(PARAMS))


# -- the log and the record -------------------------------------------------------------------------------------------


def with_experts(n: int, dtype: Any, rollout: int = 0, shape: tuple[int, int] = (3, 2)) -> Trajectory:
    experts: Experts = np.random.default_rng(n).integers(0, np.iinfo(dtype).max, (n, *shape), dtype, True)
    return replace(make_trajectory("q", rollout, "sub", 0, n), experts=experts)


def test_experts_come_back_from_the_log_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both dtypes, odd lengths, in one frame and in several; trajectories without them beside these."""
    monkeypatch.setattr(log_format, "_PIECE", 600)
    log, server = log_of(tmp_path)
    sent = [
        with_experts(n, dtype, 2 * i + (dtype == np.uint16))
        for i, n in enumerate((0, 1, 7, 100, 333))
        for dtype in (np.uint8, np.uint16)
    ]
    sent.append(make_trajectory("q", 99, "sub", 0, 50))
    with log, server, TrajectoryLogClient(server.url, digest=DIGEST, role="sub") as client:
        refs = [client.append(t).result(10) for t in sent]
        found = [log.read(ref) for ref in refs]
    for trajectory, back in zip(sent, found, strict=True):
        assert same(trajectory, back)
        if trajectory.experts is None:
            assert back.experts is None
            continue
        assert back.experts is not None and back.experts.dtype == trajectory.experts.dtype
        assert np.array_equal(back.experts, trajectory.experts) and back.experts.flags.aligned


def test_without_experts_the_log_has_the_bytes_of_before(tmp_path: Path) -> None:
    """Meta has nine fields and the payload four arrays; what was written so is read."""
    meta = Meta("q", 1, "sub", 0, 0, 3, {"format": 1.0}, 40)
    assert meta.encoded() == codec.encode(["q", 1, "sub", 0, 0, 3, {"format": 1.0}, 40, [0]])
    assert codec.decode(meta.encoded(), Meta) == meta
    log, server = log_of(tmp_path)
    with log, server, TrajectoryLogClient(server.url, digest=DIGEST, role="sub") as client:
        ref = client.append(make_trajectory("q", 1, "sub", 0, 40)).result(10)
    assert ref.length == 40 * 13


def test_experts_that_do_not_fit_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer tokens, no routers, more than a message takes."""
    log, server = log_of(tmp_path)
    with log, server, TrajectoryLogClient(server.url, digest=DIGEST, role="sub") as client:
        short = with_experts(40, np.uint8)
        assert short.experts is not None
        with pytest.raises(PeerError, match=r"experts of 39 tokens, expected 40"):
            client.append(replace(short, experts=short.experts[1:])).result(10)
        with pytest.raises(PeerError, match=r"expected routers, experts a token, and 1 or 2 bytes"):
            client.append(replace(short, experts=short.experts[:, :0])).result(10)
        monkeypatch.setattr(log_client, "MAX_EXPERTS", 200)
        with pytest.raises(ValueError, match=r"are 240 bytes, the limit is 200; set agents\.sub\.max_length"):
            client.append(short)
        assert len(log) == 0


def test_a_rollout_with_more_experts_than_travel_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its worker goes on. One of an evaluation, whose trajectories stay, does not fail."""
    monkeypatch.setattr(log_client, "MAX_EXPERTS", 200)
    parts: Any = SimpleNamespace(scores={})
    config = load_config(RELAY, ["agents.main.reward={format=0.5, correct=0.5}"])
    context = WorkerContext(config, 0, parts, parts, parts, parts, parts, parts)

    def rollout(query: str, n: int) -> Rollout:
        return Rollout(query, 0, replace(with_experts(n, np.uint8), query=query, role="main"), {}, 1.0)

    context.check_rewards(rollout("0/1", 33))
    with pytest.raises(
        ContextOverflowError, match=r"0/1/0 main/0: .* are 204 bytes, the limit is 200; set agents"
    ):
        context.check_rewards(rollout("0/1", 34))
    context.check_rewards(rollout("eval/heldout/0/greedy/1", 34))


def test_a_long_trajectory_of_many_routers_travels(tmp_path: Path) -> None:
    """32k tokens of 48 routers with 8 experts each, which are more than one frame holds."""
    trajectory = with_experts(1 << 15, np.uint16, shape=(48, 8))
    log, server = log_of(tmp_path)
    with log, server, TrajectoryLogClient(server.url, digest=DIGEST, role="sub") as client:
        back = log.read(client.append(trajectory).result(60))
    assert trajectory.experts is not None and trajectory.experts.nbytes > 1 << 24
    assert back.experts is not None and np.array_equal(back.experts, trajectory.experts)


def test_the_record_keeps_them() -> None:
    """As bytes with their shape; a record of before has neither."""
    for trajectory in (
        with_experts(7, np.uint8),
        with_experts(7, np.uint16),
        make_trajectory("q", 0, "sub", 0),
    ):
        kept = msgspec.msgpack.decode(
            msgspec.msgpack.encode(_record(trajectory, True)), type=type(_record(trajectory, True))
        )
        back = kept.trajectory("q", 0).experts
        assert (back is None) == (trajectory.experts is None)
        if back is not None and trajectory.experts is not None:
            assert back.dtype == trajectory.experts.dtype and np.array_equal(back, trajectory.experts)
        assert not _record(trajectory, False).experts


# -- rows --------------------------------------------------------------------------------------------------------------


class Reported:
    """A trajectory log whose experts are told apart by the trajectory's offset and the token's place."""

    def read(self, ref: LogRef) -> Trajectory:
        n = len(MASK)
        tokens = np.full(2 * n, ref.offset, np.int32)
        mask, versions = np.tile(MASK, 2), np.tile(MASK, 2).astype(np.int32) - 1
        experts = None
        if ref.offset % 10 == 0:  # a rollout's first call
            numbers = ref.offset // 10 * 8 + np.arange(2 * n)
            experts = np.stack([numbers, numbers + 1], -1).astype(np.uint8)[:, None]
            experts[-1] = NONE
        return Trajectory(
            "", 0, "left", 0, tokens, mask, -mask.astype(np.float32), versions, {}, (0, n), experts
        )


def test_rows_have_the_experts_of_their_tokens() -> None:
    """Segment by segment, whatever the batcher orders; not known where nobody reported, and at padding. Without the
    setting there are none."""
    config = load_config(RELAY, ["trainer.questions=2", "agents.left.policy.routing_replay=true"])
    batch = BatchBuilder(config, "left", Reported(), ranks=2).build(0, groups())
    n, seen = len(MASK), set()
    for micro in (m for b in batch.minibatches for m in b.micro):
        if not len(micro.lengths):
            continue
        for r in range(len(micro.lengths)):
            offset = int(micro.ids[r, 0])
            if offset % 10:
                assert micro.experts is None or (micro.experts[r] == -1).all()
                continue
            assert micro.experts is not None
            found = micro.experts[r, : micro.lengths[r], 0]
            start = offset // 10 * 8
            first = start if int(found[0, 0]) == start else start + n
            expected = torch.arange(first, first + n)[:, None] + torch.tensor([0, 1])
            if first != start:
                expected[-1] = -1
            assert torch.equal(found.long(), expected)
            assert (micro.experts[r, micro.lengths[r] :] == -1).all()
            seen.add((offset, first != start))
    assert len(seen) >= 8 and {segment for _, segment in seen} == {False, True}
    without = load_config(RELAY, ["trainer.questions=2"])
    plain = BatchBuilder(without, "left", Reported(), ranks=2).build(0, groups())
    assert all(m.experts is None for b in plain.minibatches for m in b.micro)


# -- the engine in this process ----------------------------------------------------------------------------------------


def turns(policy: Policy, sessions: int = 3, **settings: Any) -> list[list[tuple[list[int], Generation]]]:
    """Sessions with three turns each, of three lengths; (all tokens, generation) of every turn."""

    async def use(engine: HfEngine) -> list[list[tuple[list[int], Generation]]]:
        async def one(number: int) -> list[tuple[list[int], Generation]]:
            ids, out = [7 + number] * (3 + 2 * (number % 3)), []
            for turn in range(3):
                params = SamplingParams(3 + number % 3, 1.0, ())
                answer = await engine.generate(ids, params, seed=9 * number + turn, session=f"s{number}")
                ids = [*ids, *answer.token_ids.tolist()]
                out.append((ids, answer))
                ids = [*ids, 11 + turn, 12]
            return out

        return await asyncio.gather(*[one(number) for number in range(sessions)])

    return served(policy, use, **{"report_experts": True, "prefill_chunk": 2, **settings})


def routed(policy: Policy, ids: Sequence[int]) -> np.ndarray:
    """(tokens, N, k), sorted, of one forward pass over them."""
    from mgrpo.model.routing_replay import listen

    found: dict[int, Any] = {}
    hooks = listen(policy.routing.routers, found.__setitem__)
    with torch.no_grad():
        policy.hidden(torch.tensor([list(ids)]))
    for hook in hooks:
        hook.remove()
    return torch.stack([found[n][1] for n in range(len(found))], 1).sort(-1).values.numpy()


@pytest.mark.parametrize("slots", [2, 8])
def test_the_engine_reports_where_it_sent_every_token(slots: int) -> None:
    """In chunks, token by token, on top of a session's history and fed afresh: as one forward pass over all of it
    sends them; all but the last."""
    policy = moe_policy(PolicyConfig(share_prefixes=False))
    for session in turns(policy, slots=slots):
        for ids, answer in session:
            assert answer.experts is not None and answer.experts.dtype == np.uint8
            assert len(answer.experts) == len(ids) - 1
            expected = routed(policy, ids[:-1])
            # A tie in the last bits may go either way: none here.
            assert np.array_equal(np.sort(answer.experts, -1), expected)
    assert (
        served(policy, lambda engine: engine.generate([1], SamplingParams(2, 1.0, ()), seed=0)).experts
        is None
    )


def test_an_update_routes_what_is_fed_again() -> None:
    """A request in flight that is fed again reports the new weights' choice for all of its tokens."""
    policy, other = (moe_policy(PolicyConfig(share_prefixes=False)) for _ in range(2))
    with torch.no_grad():
        for router in other.routing.routers:
            router.module.weight.copy_(router.module.weight.flip(0))

    async def use(engine: HfEngine) -> Generation:
        task = asyncio.ensure_future(engine.generate([5, 6, 7], SamplingParams(12, 1.0, ()), seed=3))
        for _ in range(6):
            await asyncio.sleep(0)
        await engine.load(state_of(other.model), 1)
        return await task

    answer = served(policy, use, report_experts=True)
    assert answer.experts is not None and answer.versions.tolist()[-1] == 1
    ids = [5, 6, 7, *answer.token_ids.tolist()]
    assert np.array_equal(np.sort(answer.experts, -1), routed(other, ids[:-1]))


def test_nothing_of_a_forward_waits_for_the_next() -> None:
    """Logits of all routers, E floats a token each, would stay on the device."""
    policy, logits = moe_policy(PolicyConfig(share_prefixes=False)), []
    for router in policy.routing.routers:
        router.module.register_forward_hook(lambda m, a, out: logits.append(weakref.ref(out[0])))

    async def use(engine: HfEngine) -> int:
        await engine.generate([5, 6, 7], SamplingParams(2, 1.0, ()), seed=3)
        gc.collect()
        return sum(tensor() is not None for tensor in logits)

    assert served(policy, use, report_experts=True) == 0 and logits


def test_a_dense_policy_has_nothing_to_report() -> None:
    """By name."""
    from tests.models import tiny_policy

    with pytest.raises(ConfigError, match=r"llama: policy\.routing_replay=true needs a mixture of experts"):
        HfEngine(tiny_policy("llama"), report_experts=True)


def test_replay_brings_the_trainer_nearer_to_a_sampler_of_half_precision() -> None:
    """An engine in bfloat16 sends some tokens elsewhere than the float32 trainer would. With its choice the log-probs
    of those who were sampled are nearer to the engine's."""
    half = moe_policy(PolicyConfig(share_prefixes=False, attention="sdpa"))
    whole = moe_policy(PolicyConfig(routing_replay=True))
    sampler = Policy(half.model.to(torch.bfloat16), half.tokenizer, "half", half.config)
    gaps: dict[bool, list[np.ndarray]] = {False: [], True: []}
    moved = total = 0
    for session in turns(sampler, 32, slots=8):
        ids, answer = session[-1]
        assert answer.experts is not None
        n = len(answer.token_ids)
        experts = torch.full((1, len(ids), *answer.experts.shape[1:]), -1, dtype=torch.int16)
        experts[0, :-1] = torch.from_numpy(answer.experts.astype(np.int16))
        own = routed(whole, ids[:-1])
        moved += int((own != np.sort(answer.experts, -1)).any(-1).sum())
        total += own.shape[0] * own.shape[1]
        scored = torch.zeros(1, len(ids) - 1, dtype=torch.bool)
        scored[0, -n:] = True
        for forced in (False, True):
            with torch.no_grad(), whole.routing.forcing(experts if forced else None):
                hidden = whole.hidden_before(torch.tensor([ids]), torch.tensor([len(ids)]), scored)
            found = (hidden @ whole.token_head.detach().T).log_softmax(-1)
            logprobs = found[torch.arange(n), torch.from_numpy(answer.token_ids.astype(np.int64))]
            gaps[forced].append(np.abs(logprobs.numpy() - answer.logprobs))
    free, forced = (float(np.concatenate(gaps[kind]).mean()) for kind in (False, True))
    assert 0 < moved < total
    assert forced < free


def test_own_experts_are_those_of_the_engine() -> None:
    """The helper of the other tests and one forward pass agree."""
    from tests.rows import rows_of

    policy, rows = moe_policy(PolicyConfig(share_prefixes=False)), rows_of(3)
    n = int(rows.lengths[0])
    found = own_experts(policy, rows)[0, :n].sort(-1).values.numpy()
    assert np.array_equal(found, routed(policy, rows.ids[0, :n].tolist()))


def test_a_run_with_replay_is_rebuilt_bit_for_bit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A tiny mixture, sampled in bfloat16 and trained in float32: every token's routing is replayed, some of it is
    another than the trainer's, and the record gives every stage again."""
    out = tmp_path / "run"
    sets = ["agents.main.policy.routing_replay=true", 'agents.main.engine.dtype="bfloat16"']
    train(ROOT / "tests" / "alone.toml", out, 'task.name="tests.moe_relay:MoeRelay"', *sets)
    steps = [r for r in records(out) if "main/moe/replayed" in r]
    assert len(steps) == 3
    assert all(r["main/moe/replayed"] == 1.0 for r in steps)
    assert any(r["main/moe/rerouted"] > 0 for r in steps)
    body = Recording([out]).steps["main", 1].body()
    assert "experts" in body.minibatches[0].crc
    replay_run(out, [], sample=10, seed=1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "10 rollouts: every stage bit-equal"
