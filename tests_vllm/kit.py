"""A real vLLM server on the CPU with SmolLM2-135M-Instruct, started as a run starts it; the same model in process."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from mgrpo.config import load_config, view_of
from mgrpo.engines.base import Engine, Generation, SamplingParams
from mgrpo.engines.hf.engine import HfEngine
from mgrpo.engines.pool import EnginePool
from mgrpo.engines.server_engine import ServerEngine
from mgrpo.engines.vllm.backend import VllmBackend
from mgrpo.engines.vllm.client import VllmClient
from mgrpo.model.loading import load_policy
from mgrpo.model.policy import Policy
from mgrpo.model.vocabulary import Vocabulary
from mgrpo.run.folder import RunFolder
from mgrpo.run.supervisor import Supervisor
from mgrpo.types import version_label
from mgrpo.weights.version import Weights

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "models" / "smollm2"
LENGTH = 320  # tokens of a history
SHORT = 4  # layers
START_SECONDS = 400.0  # a minute on a machine of one's own
QUESTIONS = (
    "What is the capital of France?",
    "Name three fruits.",
    "Why is the sky blue?",
    "Write one sentence about a dog.",
    "What is 7 times 8?",
    "Who wrote Hamlet?",
    "Translate 'good morning' into Spanish.",
    "Give me a short tip for sleeping well.",
)

CONFIG = """
[agents.main]
model = "{model}"
max_length = {length}
reward = {{ correct = 1.0 }}
{main}

[agents.main.engine]
type = "vllm"
sync = "{sync}"
dtype = "{dtype}"
timeout = {timeout}
python = "{python}"
arguments = {arguments}

[agents.sub]
max_length = 32
reward = {{ outcome = 1.0 }}
"""


class TimedClient(VllmClient):
    """Notes how long the server stood still."""

    def __init__(self, url: str, timeout: float) -> None:
        super().__init__(url, timeout)
        self.pauses: list[float] = []  # seconds
        self._since = 0.0

    async def post(self, path: str, json: Mapping[str, object] | None = None, **query: str) -> Any:
        if path == "/pause":
            self._since = time.monotonic()
        answer = await super().post(path, json, **query)
        if path == "/resume":
            self.pauses.append(time.monotonic() - self._since)
        return answer


class Served:
    """A server and an engine over it, with an event loop of their own."""

    def __init__(
        self, folder: Path, sync: str, dtype: str, main: str, arguments: Sequence[str], model: Path = MODEL,
        timeout: float = START_SECONDS,
    ) -> None:  # fmt: skip
        """timeout: of one request, seconds."""
        text = CONFIG.format(
            model=model,
            length=LENGTH,
            sync=sync,
            dtype=dtype,
            main=main,
            timeout=timeout,
            python=ROOT / ".venv-vllm/bin/python",
            arguments=list(arguments),
        )
        path = folder / "run.toml"
        path.write_text(text)
        self.config, self.run = load_config(path), RunFolder(folder / "run")
        self.said: list[str] = []
        self.version, self.data = -1, b""  # that load() and bring() brought last
        self.children = Supervisor(self.run.logs)
        self.url = self.run.addresses(self.config).engines["main"][0]
        self.loop = asyncio.new_event_loop()
        arguments = ["engine", str(path), "--agent", "main", "--replica", "0", "--out", str(self.run.root)]
        self.children.start("engine-main-0", arguments, healthy=START_SECONDS)
        self.sync = sync = VllmBackend.open_sync(view_of(self.config, "main"), self.run.weights / "main")
        sync.on_event = self.said.append
        self.server = TimedClient(self.url, timeout)
        tokenizer = AutoTokenizer.from_pretrained(MODEL)
        self.engine = ServerEngine(
            EnginePool(
                [self.server], sync, timeout=START_SECONDS, max_length=LENGTH, on_event=self.said.append
            ),
            sync,
            name="SmolLM2",
            vocabulary=Vocabulary(tokenizer, 49152, "SmolLM2"),
            max_length=LENGTH,
            tokenizer=tokenizer,
            patience=START_SECONDS,
        )

    def do(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run it while the server's process is looked after, as the launcher does."""

        async def watched() -> Any:
            task = asyncio.ensure_future(coroutine)
            while not task.done():
                self.said += self.children.poll()
                await asyncio.wait([task], timeout=0.2)
            return task.result()

        return self.loop.run_until_complete(asyncio.wait_for(watched(), START_SECONDS))

    def load(self, data: bytes) -> int:
        """Bring the next version; its number."""
        self.do(self.bring(data))
        return self.version

    @property
    def label(self) -> str:
        """Of the version that was brought last."""
        return version_label("main", 1, self.version)

    async def place(self, data: bytes) -> None:
        """Make the next version ready, so that a bring() of the same data only updates the server."""
        version = self.version + 1
        await self.sync.prepare(Weights.of_bytes(version_label("main", 1, version), version, data))

    async def bring(self, data: bytes) -> None:
        self.version, self.data = self.version + 1, data
        await self.engine.load(Weights.of_bytes(self.label, self.version, data), self.version)

    def take(self, weights: Weights) -> None:
        """Bring a version under its own number, compared with its probe."""
        self.version = weights.version
        self.do(self.engine.load(weights, weights.version))

    def generate(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[Generation]:
        return self.do(generate(self.engine, prompts, params))

    def one_by_one(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[Generation]:
        """As generate(), each in a batch of its own: its last bits depend on nothing but weights and prompt."""
        return [self.generate([prompt], params)[0] for prompt in prompts]


async def generate(
    engine: Engine, prompts: Sequence[Sequence[int]], params: SamplingParams
) -> list[Generation]:
    return list(await asyncio.gather(*(engine.generate(p, params, seed=i) for i, p in enumerate(prompts))))


@contextlib.contextmanager
def served(
    folder: Path, sync: str, dtype: str, main: str = "", arguments: Sequence[str] = (), model: Path = MODEL,
    timeout: float = START_SECONDS,
) -> Iterator[Served]:  # fmt: skip
    """Started; its processes are gone when the block ends. arguments: of the server, beside those of the launcher."""
    made = Served(folder, sync, dtype, main, arguments, model, timeout)
    try:
        with made.children, made.run.sockets(made.config):
            yield made
    finally:
        made.loop.run_until_complete(made.engine.close())
        made.loop.close()


def reference(dtype: torch.dtype = torch.float32) -> Policy:
    """The same model in this process."""
    policy = load_policy(MODEL)
    return Policy(policy.model.to(dtype), policy.tokenizer, policy.name)


def short_model(folder: Path) -> Path:
    """SmolLM2 without most of its layers, for whole runs: what they show does not depend on its depth, their time
    does. Its tied embedding, the largest of its tensors, stays."""
    policy = load_policy(MODEL)
    model = policy.model
    model.model.layers = model.model.layers[:SHORT]
    model.config.num_hidden_layers = SHORT
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder)
    return folder


def prompts(policy: Policy) -> list[list[int]]:
    """The questions as the model's chat template puts them."""
    return [
        [int(i) for i in policy.tokenizer.encode(f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n")]
        for q in QUESTIONS
    ]


def ours(policy: Policy, asked: Sequence[Sequence[int]], params: SamplingParams) -> list[Generation]:
    """What the in-process engine answers."""
    return asyncio.run(generate(HfEngine(policy, slots=16, max_length=LENGTH), asked, params))


@torch.inference_mode()
def logprobs(
    policy: Policy, prompt: Sequence[int], out: Generation, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Our forward over prompt + out: (n,) log-probs of out's tokens, and (n,) how far the likeliest token of each
    position is ahead of out's."""
    ids = torch.tensor([[*prompt, *out.token_ids.tolist()]])
    states = policy.hidden(ids)[0, len(prompt) - 1 : -1]
    weight = policy.head_weight.to(states.dtype).float()  # rounded as the head rounds it
    logits = states.float() @ weight.T / temperature
    all_of = logits.log_softmax(-1)
    chosen = all_of.gather(1, ids[0, len(prompt) :, None]).squeeze(1)
    return chosen, all_of.max(-1).values - chosen


def wait_gone(pids: Sequence[int], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while left := [p for p in pids if Path(f"/proc/{p}").exists()]:
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.1)


def below(pid: int) -> list[int]:
    """Processes that descend from `pid`."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    found: list[int] = []
    front = [pid]
    while front:
        front = [child for child, parent in parents.items() if parent in front]
        found += front
    return found
