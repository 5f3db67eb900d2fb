"""New weights through the plug-in, and what every update is compared with, against a server of the tests' own."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest
from torch import Tensor

from mgrpo.engines.labels import Label
from mgrpo.engines.vllm.plugin_sync import PluginSync
from mgrpo.errors import ConfigError, CorruptionError
from mgrpo.types import Probe
from mgrpo.weights.version import Weights
from tests.fake_sglang import FakeSglang
from tests.fake_vllm import FakePlugin, FakeVllm, probe_of
from tests.plugin_kit import moved, patch, state, whole
from tests.server_bench import PROMPT, SAMPLED, Bench, expected, on_fakes, on_servers, until

STATES: list[dict[str, Tensor]] = [state(0)]
for seed in range(1, 8):
    STATES.append(moved(STATES[-1], seed))


def first(probe: bool = True) -> Weights:
    return full(0, probe)


def full(version: int, probe: bool = True) -> Weights:
    made = whole(f"e1.v{version}", version, STATES[version])
    made.probe = probe_of(made.data) if probe else None
    return made


def step(version: int, base: int | None = None, probe: bool = True) -> Weights:
    """Version `version` as what changed since `base`, the one before."""
    base = version - 1 if base is None else base
    said = full(version).probe if probe else None
    return patch(f"e1.v{base}", STATES[base], f"e1.v{version}", version, STATES[version], said)


def test_patches_go_into_a_paused_server_and_are_compared(tmp_path: Path) -> None:
    """The order of the calls; tokens and label are of the new version, compared before anything else is asked; a
    version that the worker has skipped comes with the next one."""

    async def test(bench: Bench[FakePlugin]) -> None:
        (server,) = bench.servers
        engine = bench.engine()
        assert engine.takes_patches
        await engine.load(first(), 0)
        server.calls.clear()
        server.rpcs.clear()
        await engine.load(step(1), 1)
        assert server.calls == [
            *("/collective_rpc", "/pause", "/collective_rpc", "/reset_prefix_cache"),
            *("/update_weight_version", "/resume", "/inference/v1/generate"),
        ]
        assert server.rpcs == ["mgrpo_info", "mgrpo_patch"] and server.probed == 2
        out = await engine.generate(PROMPT, SAMPLED, seed=3)
        assert out.token_ids.tolist() == expected(full(1), 3) and set(out.versions.tolist()) == {1}
        await engine.load(step(4, base=1), 4)
        assert (await engine.generate(PROMPT, SAMPLED, seed=3)).token_ids.tolist() == expected(full(4), 3)
        assert not bench.said

    on_fakes(FakePlugin, 1, test, tmp_path)


def test_a_server_gets_what_it_has_missed(tmp_path: Path) -> None:
    """Two servers: one is away for two versions and takes two patches; started again, it holds nothing and takes the
    newest whole, made in the folder, although only patches came."""

    async def test(bench: Bench[FakePlugin]) -> None:
        one, two = bench.servers
        engine = bench.engine()
        await engine.load(first(), 0)
        two.refuse["mgrpo_patch"] = two.refuse["mgrpo_load"] = (500, "disk full")
        for version in (1, 2):
            await engine.load(step(version), version)
        assert one.label == "e1.v2" and two.label == "e1.v0" and not two.running.is_set()
        two.rpcs.clear()
        two.refuse.clear()
        await until(lambda: two.label == "e1.v2" and two.running.is_set(), "its healing")
        # A look at it may have been under way when it began to answer again.
        assert two.rpcs[-2:] == ["mgrpo_patch", "mgrpo_patch"] and "mgrpo_load" not in two.rpcs
        await two.stop()
        await two.start()
        await until(lambda: two.label == "e1.v2" and two.running.is_set(), "its return")
        assert two.rpcs[-1] == "mgrpo_load" and two.weights == one.weights == full(2).data
        answers = await asyncio.gather(*(engine.generate(PROMPT, SAMPLED, seed=s) for s in range(4)))
        assert [a.token_ids.tolist() for a in answers] == [expected(full(2), s) for s in range(4)]

    on_fakes(FakePlugin, 2, test, tmp_path)


def test_a_patch_that_tears_the_model_is_followed_by_a_whole_version(tmp_path: Path) -> None:
    """Weights that somebody has changed behind our back: the patch is found not to lead to the trainer's version, the
    server stays paused, the whole version repairs it, one line says so, and patches go on."""

    async def test(bench: Bench[FakePlugin]) -> None:
        (server,) = bench.servers
        engine = bench.engine()
        await engine.load(first(), 0)
        server.worker.model.norm.data[0] += 1.0
        server.rpcs.clear()
        await engine.load(step(1), 1)
        assert (
            server.rpcs == ["mgrpo_info", "mgrpo_patch", "mgrpo_load"] and server.calls.count("/pause") == 2
        )
        assert ["refused the patch to e1.v1: norm.weight" in line for line in bench.said] == [True]
        await engine.load(step(2), 2)
        assert server.rpcs[-1] == "mgrpo_patch"
        assert (await engine.generate(PROMPT, SAMPLED, seed=3)).token_ids.tolist() == expected(full(2), 3)

    on_fakes(FakePlugin, 1, test, tmp_path)


def test_a_worker_that_dies_after_a_patch_leaves_what_the_next_one_finishes(tmp_path: Path) -> None:
    """The server holds the version, paused and under its old label: nothing is applied twice."""

    async def test(bench: Bench[FakePlugin]) -> None:
        (server,) = bench.servers
        engine = bench.engine(watch=60.0)
        await engine.load(first(), 0)
        server.refuse["/update_weight_version"] = (500, "it died here")
        with pytest.raises(Exception, match="it died here"):
            await bench.engine(patience=0.1).load(step(1), 1)
        assert server.label == "e1.v0" and not server.running.is_set()
        server.refuse.clear()
        server.rpcs.clear()
        await engine.load(step(1), 1)
        assert server.rpcs == ["mgrpo_info"] and server.label == "e1.v1"
        assert (await engine.generate(PROMPT, SAMPLED, seed=3)).token_ids.tolist() == expected(full(1), 3)

    on_fakes(FakePlugin, 1, test, tmp_path)


def test_a_file_that_was_damaged_in_the_folder_is_asked_for_again(tmp_path: Path) -> None:
    """A flipped byte under a server that needs it whole: named and removed; the whole version that follows heals it."""

    async def test(bench: Bench[FakePlugin]) -> None:
        (server,) = bench.servers
        engine = bench.engine(watch=60.0)
        await engine.load(first(), 0)
        await server.stop()
        await server.start()
        file = tmp_path / "weights" / "e1.v0" / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        with pytest.raises(CorruptionError, match=r"refused weights e1\.v1: .*scale is damaged"):
            await engine.load(step(1), 1)
        assert not server.running.is_set()
        await engine.load(full(1), 1)
        assert (await engine.generate(PROMPT, SAMPLED, seed=3)).token_ids.tolist() == expected(full(1), 3)

    on_fakes(FakePlugin, 1, test, tmp_path)


@pytest.mark.parametrize("fake", [FakePlugin, FakeVllm, FakeSglang])
def test_a_server_that_samples_from_other_weights_than_it_says_is_refused(
    tmp_path: Path, fake: type[FakeVllm | FakeSglang]
) -> None:
    """It takes the update and its label, and goes on with the old weights: paused, and named with the figures."""

    async def test(bench: Bench[FakeVllm | FakeSglang]) -> None:
        (server,) = bench.servers
        engine = bench.engine(watch=60.0)
        await engine.load(first(), 0)
        server.deaf = True
        server.bodies.clear()
        with pytest.raises(
            ConfigError, match=r"other weights than those of e1\.v1 .* nats on average, .* it is paused"
        ):
            await engine.load(full(1), 1)
        assert not server.running.is_set()
        if isinstance(server, FakeSglang):
            assert server.label == "updating:e1.v1"
            return
        assert not server.bodies
        if server.plugin:
            assert server.rpcs[-2:] == ["mgrpo_load", "mgrpo_load"]  # tried again
        else:
            assert server.rpcs[-1] == "reload_weights"

    on_fakes(fake, 1, test, tmp_path)


def test_an_answer_waits_until_its_weights_were_compared(tmp_path: Path) -> None:
    """Another worker has brought a version and is still comparing: our answer under it does not count before; where it
    turns out wrong, it never does."""

    async def test(bench: Bench[FakeVllm]) -> None:
        (server,) = bench.servers
        ours, theirs = bench.engine(watch=60.0), bench.engine(watch=60.0)
        for engine in (ours, theirs):
            await engine.load(first(), 0)
        sync = theirs._sync
        gate, asked = asyncio.Event(), asyncio.Event()
        gap = sync._gap

        async def slow(*arguments: object) -> object:
            asked.set()
            await gate.wait()
            return await gap(*arguments)  # type: ignore[arg-type]

        sync._gap = slow  # type: ignore[method-assign, assignment]
        update = asyncio.create_task(theirs.load(full(1), 1))
        await asked.wait()  # the server runs, under the new label
        server.bodies.clear()
        answer = asyncio.create_task(ours.generate(PROMPT, SAMPLED, seed=3))
        await until(
            lambda: len(server.bodies) == 1 and server.bodies[0]["sampling_params"]["seed"] == 3,
            "our request",
        )
        for _ in range(20):
            await asyncio.sleep(0.01)
            assert not answer.done()
        gate.set()
        await update
        assert (await answer).token_ids.tolist() == expected(full(1), 3)
        assert server.probed == 2  # the other's comparisons count for us

    on_servers(1, test, tmp_path)


def test_wrong_weights_of_another_workers_update_end_our_request_by_name(tmp_path: Path) -> None:
    """A worker brings a version without comparing it (it died); whoever meets the label compares it himself."""

    async def test(bench: Bench[FakeVllm]) -> None:
        (server,) = bench.servers
        engine = bench.engine(watch=60.0)
        await engine.load(first(), 0)
        engine._sync.folder.write_probe(Label(1, 1), full(1).probe or Probe((), ()))
        server.label = "e1.v1"  # of the old weights
        with pytest.raises(ConfigError, match=r"other weights than those of e1\.v1"):
            await engine.generate(PROMPT, SAMPLED, seed=3)
        assert not server.running.is_set()

    on_servers(1, test, tmp_path)


def test_a_server_whose_worker_was_just_killed_is_not_one_without_the_plugin(tmp_path: Path) -> None:
    """Its front end answers status 500 for a moment, and is still healthy: it gets the version once it is back."""

    async def test(bench: Bench[FakePlugin]) -> None:
        (server,) = bench.servers
        server.refuse["mgrpo_info"] = (500, "Call to collective_rpc method failed: cancelled")
        engine = bench.engine()
        task = asyncio.ensure_future(engine.load(first(), 0))
        await until(lambda: "mgrpo_info" in server.rpcs, "the first question")
        server.refuse.clear()
        await task
        assert server.label == "e1.v0"

    on_fakes(FakePlugin, 1, test, tmp_path)


def test_a_server_without_the_plugin_is_refused_by_name(tmp_path: Path) -> None:
    """With sync "patch" only: through a folder it is served all the same, patches included."""

    async def test(bench: Bench[FakeVllm]) -> None:
        (server,) = bench.servers
        with pytest.raises(
            ConfigError, match=r"has no plug-in of mgrpo; start it with --worker-extension-cls"
        ):
            await bench.engine(PluginSync(tmp_path / "p", 30.0)).load(first(), 0)
        engine = bench.engine()
        versions: Sequence[Weights] = (first(), step(1), step(2))
        for version, weights in enumerate(versions):
            await engine.load(weights, version)
        assert server.weights == full(2).data and server.rpcs[-1] == "reload_weights"

    on_servers(1, test, tmp_path)
