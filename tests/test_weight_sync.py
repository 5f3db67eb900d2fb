"""Weight versions and vLLM servers: missed ones, partial rollouts, workers that share servers, adapters."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import safetensors.torch
import torch

from mgrpo.config.policy import LoraConfig
from mgrpo.engines.labels import Label, parse_label
from mgrpo.engines.vllm.weight_sync import LoraSync, VllmFolderSync
from mgrpo.engines.weight_folder import KEEP, WeightFolder, adapter_files
from mgrpo.errors import ConfigError
from mgrpo.types import Probe
from mgrpo.weights.version import Weights
from tests.fake_server import logprob
from tests.fake_vllm import FakeVllm
from tests.plugin_kit import state, whole
from tests.server_bench import PROMPT, SAMPLED, Bench, expected, on_servers, until, weights


def test_a_server_that_missed_a_version_serves_nobody(tmp_path: Path) -> None:
    """A server whose update fails stays paused and unasked, although it is alive; healed, it gets the newest one."""

    async def test(bench: Bench[FakeVllm]) -> None:
        one = bench.servers[0]
        engine = bench.engine()
        await engine.load(weights(1), 1)
        one.refuse["reload_weights"] = (500, "disk full")
        one.bodies.clear()
        await engine.load(weights(2), 2)
        assert engine.version == 2 and any("disk full" in line for line in bench.said)
        answers = await asyncio.gather(*(engine.generate(PROMPT, SAMPLED, seed=s) for s in range(4)))
        assert {int(v) for a in answers for v in a.versions} == {2}
        assert (
            not one.bodies and not one.running.is_set()
        )  # torn weights answer nobody, other clients included
        one.refuse.clear()
        await until(lambda: one.label == "e1.v2" and one.running.is_set(), "its healing")

    on_servers(2, test, tmp_path)


def test_a_server_that_was_exchanged_unseen_is_found_out_by_its_answer(tmp_path: Path) -> None:
    """Between two looks a server is killed and started: its answer carries another label, is thrown away, and the
    request is answered by weights that were asked for."""

    async def test(bench: Bench[FakeVllm]) -> None:
        (server,) = bench.servers
        engine = bench.engine(watch=0.3)
        await engine.load(weights(6), 6)
        await server.stop()
        await server.start()
        server.bodies.clear()
        out = await engine.generate(PROMPT, SAMPLED, seed=2)
        assert out.token_ids.tolist() == expected(weights(6), 2) and set(out.versions.tolist()) == {6}
        assert any("'default', expected e1.v6" in line for line in bench.said)

    on_servers(1, test, tmp_path)


def test_a_rollout_across_an_update_keeps_the_version_of_each_token(tmp_path: Path) -> None:
    """Another worker updates the server in the middle of our request: our tokens say which weights sampled them, and
    they are those weights' tokens."""

    async def test(bench: Bench[FakeVllm]) -> None:
        (server,) = bench.servers
        ours, theirs = bench.engine(), bench.engine()
        await ours.load(weights(1), 1)
        await theirs.load(weights(1), 1)
        server.hold.clear()
        server.hold_at = 5
        task = asyncio.create_task(ours.generate(PROMPT, SAMPLED, seed=9))
        await until(lambda: server.standing, "the fifth token")
        await theirs.load(weights(2), 2)
        server.hold.set()
        out = await task
        assert out.versions.tolist() == [1] * 5 + [2] * 3
        assert out.token_ids.tolist() == expected(weights(1), 9, 5) + expected(weights(2), 9)[5:]
        await until(lambda: bench.pool.servers[0].label == Label(1, 2), "the other's version")

    on_servers(1, test, tmp_path)


def test_a_request_that_keeps_its_keys_shares_them_with_nobody_of_the_next_version(tmp_path: Path) -> None:
    """on_update keep: the pause clears nothing, no cache is reset, and whoever asks under the new weights, before or
    after its own next look, finds no key of the older ones (the server of these tests refuses that)."""

    async def test(bench: Bench[FakeVllm]) -> None:
        (server,) = bench.servers
        ours, theirs = (bench.engine(VllmFolderSync(tmp_path / "weights", 30.0, "keep")) for _ in range(2))
        for engine in (ours, theirs):
            await engine.load(weights(1), 1)
        server.hold.clear()
        server.hold_at = 5
        task = asyncio.create_task(ours.generate(PROMPT, SAMPLED, seed=9))
        await until(lambda: server.standing, "the fifth token")
        await theirs.load(weights(2), 2)
        server.hold.set()
        out = await task
        assert out.versions.tolist() == [1] * 5 + [2] * 3
        assert server.pauses[1:] == ["mode=keep&clear_cache=false"] and not server.clean
        assert "/reset_prefix_cache" not in server.calls[server.calls.index("/pause") :]
        new = await theirs.generate(PROMPT, SAMPLED, seed=9)
        assert new.token_ids.tolist() == expected(weights(2), 9)
        await until(lambda: ours._pool.servers[0].label == Label(1, 2), "the other's version")
        assert (await ours.generate(PROMPT, SAMPLED, seed=9)).token_ids.tolist() == expected(weights(2), 9)
        assert [body["cache_salt"] for body in server.bodies[-3:]] == ["e1.v1", "e1.v2", "e1.v2"]

    on_servers(1, test, tmp_path)


def test_workers_that_share_servers_update_each_once(tmp_path: Path) -> None:
    """Three workers load the same version at once: one reads it in, nobody resumes a half-read server, and an older
    version never replaces a newer one, except after the trainer went back. Old versions go, finished or not."""

    async def test(bench: Bench[FakeVllm]) -> None:
        engines = [bench.engine() for _ in range(3)]
        await asyncio.gather(*(engine.load(weights(1), 1) for engine in engines))
        for server in bench.servers:
            assert server.rpcs.count("reload_weights") == 1 and server.label == "e1.v1"
        await engines[0].load(weights(3), 3)
        await engines[1].load(weights(2), 2)  # a slow worker
        assert engines[1].version == 3 and {s.label for s in bench.servers} == {"e1.v3"}
        await engines[2].load(weights(2, epoch=2), 2)  # a trainer that was restarted from a checkpoint
        assert engines[2].version == 2 and {s.label for s in bench.servers} == {"e2.v2"}
        (tmp_path / "weights" / ".e2.v3.of-a-killed-worker").mkdir()
        for version in range(4, 10):
            await engines[0].load(weights(version, epoch=2), version)
        assert len([p for p in (tmp_path / "weights").iterdir() if p.is_dir()]) == KEEP

    on_servers(2, test, tmp_path)


def adapter(version: int, role: str = "") -> Weights:
    tensors = {
        f"model.layers.0.self_attn.q_proj.lora_{side}.default.weight": torch.full(shape, float(version))
        for side, shape in (("A", (2, 4)), ("B", (4, 2)))
    }
    return Weights.of_bytes(f"{role}e1.v{version}", version, safetensors.torch.save(tensors))


def test_adapters_are_loaded_beside_each_other(tmp_path: Path) -> None:
    """sync lora: nothing is paused, a request is answered to its end by the version it named, old adapters go, and the
    folder is one that peft reads."""

    async def test(bench: Bench[FakeVllm]) -> None:
        (server,) = bench.servers
        sync = LoraSync(tmp_path / "weights", 30.0, LoraConfig(rank=2, alpha=4, targets=("q_proj",)))
        engine = bench.engine(sync)
        await engine.load(adapter(0), 0)
        server.hold.clear()
        task = asyncio.create_task(engine.generate(PROMPT, SAMPLED, seed=1))
        await until(lambda: server.standing, "the request")
        for version in range(1, 6):
            await engine.load(adapter(version), version)
        server.hold.set()
        assert (await task).versions.tolist() == [0] * 8
        assert (await engine.generate(PROMPT, SAMPLED, seed=1)).versions.tolist() == [5] * 8
        assert server.bodies[-1]["model"] == "e1.v5" and list(server.adapters) == ["e1.v3", "e1.v4", "e1.v5"]
        assert "/pause" not in server.calls
        tensors = safetensors.torch.load(server.adapters["e1.v5"])
        name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
        assert tensors[name].tolist() == [[5.0] * 4] * 2 and len(tensors) == 2
        with pytest.raises(ValueError, match="hold no adapter"):
            await engine.load(Weights.of_bytes("e1.v6", 6, safetensors.torch.save({"w": torch.zeros(1)})), 6)
        await server.stop()
        await server.start()
        assert (await engine.generate(PROMPT, SAMPLED, seed=1)).versions.tolist() == [5] * 8

    on_servers(1, test, tmp_path)


def test_adapters_of_two_roles_share_a_server(tmp_path: Path) -> None:
    """Each role's requests name its own adapter, and neither unloads the other's."""

    async def test(bench: Bench[FakeVllm]) -> None:
        (server,) = bench.servers
        config = LoraConfig(rank=2, alpha=4, targets=("q_proj",))
        engines = {
            role: bench.engine(LoraSync(tmp_path / "weights" / role, 30.0, config))
            for role in ("main", "sub")
        }
        await engines["main"].load(adapter(5, "main."), 5)
        for version in range(1, 6):
            await engines["sub"].load(adapter(version, "sub."), version)
        for role in ("main", "sub"):
            out = await engines[role].generate(PROMPT, SAMPLED, seed=1)
            assert server.bodies[-1]["model"] == f"{role}.e1.v5" and out.versions.tolist() == [5] * 8
        assert list(server.adapters) == ["main.e1.v5", "sub.e1.v3", "sub.e1.v4", "sub.e1.v5"]

    on_servers(1, test, tmp_path)


def test_a_wrong_adapter_is_unloaded_and_leaves_the_other_role_served(tmp_path: Path) -> None:
    """The server takes a name and holds something else under it: nobody is answered by it, the error has the figures,
    and the role beside it goes on, on a server that is not paused."""

    async def test(bench: Bench[FakeVllm]) -> None:
        (server,) = bench.servers
        config = LoraConfig(rank=2, alpha=4, targets=("q_proj",))
        main, sub = (
            bench.engine(LoraSync(tmp_path / "weights" / role, 30.0, config), watch=60.0)
            for role in ("main", "sub")
        )

        def compared(role: str, version: int) -> Weights:
            made = adapter(version, f"{role}.")
            data = adapter_files(made.data, config)["adapter_model.safetensors"]
            made.probe = Probe((3, 1, 4), tuple(logprob(data, [3, 1, 4][:n]) for n in (1, 2)))
            return made

        await main.load(compared("main", 1), 1)
        await sub.load(compared("sub", 1), 1)
        server.deaf = True
        with pytest.raises(
            ConfigError, match=r"than those of sub\.e1\.v2 .* nats .*; the adapter was unloaded"
        ):
            await sub.load(compared("sub", 2), 2)
        assert list(server.adapters) == ["main.e1.v1", "sub.e1.v1"] and server.running.is_set()
        assert (await main.generate(PROMPT, SAMPLED, seed=1)).versions.tolist() == [1] * 8
        assert server.bodies[-1]["model"] == "main.e1.v1"

    on_servers(1, test, tmp_path)


def test_the_weights_of_another_role_are_not_taken_for_ones_own(tmp_path: Path) -> None:
    """A server that has served another policy, under a higher version: it gets ours, and its label."""

    async def test(bench: Bench[FakeVllm]) -> None:
        (server,) = bench.servers
        server.label = "sub.e9.v9"
        mine = whole("main.e1.v2", 2, state(7))
        engine = bench.engine()
        await engine.load(mine, 2)
        assert server.label == "main.e1.v2" and engine.version == 2
        assert (await engine.generate(PROMPT, SAMPLED, seed=1)).token_ids.tolist() == expected(mine, 1)

    on_servers(1, test, tmp_path)


def test_labels_are_ordered_by_epoch_first() -> None:
    """A trainer that went back publishes lower versions that are newer."""
    assert parse_label("sub.a.e2.v3") == Label(2, 3, "sub.a") and str(Label(2, 3, "sub.a")) == "sub.a.e2.v3"
    assert parse_label("e2.v3") == Label(2, 3) and str(Label(2, 3)) == "e2.v3"
    assert Label(2, 3) > Label(1, 9) > Label(1, 8)
    for text in ("default", "3", "e1", "e1.v", "e-1.v2", " e1.v2", "e1.v2.v3"):
        assert parse_label(text) is None


@pytest.mark.parametrize("at", [7, 9, -1], ids=["length", "header", "data"])
def test_a_damaged_file_in_the_folder_is_removed(tmp_path: Path, at: int) -> None:
    """Wherever a byte has changed, also where the length of the header stands; an intact file stays."""
    folder, label = WeightFolder(tmp_path), Label(1, 1)
    folder.add(Weights.of_bytes("e1.v1", 1, safetensors.torch.save({"w": torch.arange(4.0)})))
    assert not folder.drop_damaged(label) and folder.whole(label).exists()
    data = bytearray(folder.whole(label).read_bytes())
    data[at] ^= 0xFF
    folder.whole(label).write_bytes(data)
    assert folder.drop_damaged(label) and not folder.whole(label).exists()
