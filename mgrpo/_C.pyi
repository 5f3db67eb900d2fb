from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

def philox4x32_10(counter: Sequence[int], key: Sequence[int]) -> list[int]: ...
def multiplicities(
    counts: Sequence[int], seed: int, step: int, query: str, role: str, d_max: int, mode: str
) -> list[list[int]]: ...
def pack(
    lengths: npt.NDArray[np.int32],
    capacity: int,
    dp: int = 1,
    cost_a: float = 1.0,
    cost_b: float = 0.0,
    max_segments: int = 0,
) -> dict[str, Any]: ...
def prefix_tree(
    ids: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], min_saved: int
) -> dict[str, npt.NDArray[np.int32]]: ...

class Plan:
    step: int
    dp: int
    capacity: int
    max_segments: int
    tokens: int
    queries: list[str]
    n_mb: int
    n_padded: int
    lockstep: float
    efficiency: float
    rank_cost: npt.NDArray[np.float64]
    bin_offsets: npt.NDArray[np.int32]
    bin_items: npt.NDArray[np.int32]
    padded_offsets: npt.NDArray[np.int32]
    padded_items: npt.NDArray[np.int32]
    padded_width: npt.NDArray[np.int32]
    shared_tokens: int
    row_shared: npt.NDArray[np.int32]
    padded_prefix: npt.NDArray[np.int32]
    padded_prefix_id: npt.NDArray[np.int32]
    item_row: npt.NDArray[np.int32]
    item_weight: npt.NDArray[np.float32]
    group_query: npt.NDArray[np.int32]
    group_role: npt.NDArray[np.int32]
    group_rollouts: npt.NDArray[np.int32]
    rows: dict[str, npt.NDArray[Any]]
    slots: npt.NDArray[np.int32]

class Batcher:
    n_queries: int
    used_bytes: int
    counters: dict[str, int]
    def __init__(self, options: Mapping[str, Any]) -> None: ...
    def add(
        self,
        query: str,
        role: str,
        rollout: int,
        invocation: int,
        traj_id: int,
        tokens: npt.NDArray[np.int32],
        loss_mask: npt.NDArray[np.uint8],
        logprobs: npt.NDArray[np.float32],
        advantage: float | npt.NDArray[np.float32],
        policy_version: int,
        segment_starts: Sequence[int],
        now: float,
    ) -> bool: ...
    def add_many(self, queries: Sequence[str], role: str, columns: Mapping[str, Any], now: float) -> int: ...
    def seal(self, query: str, role: str, rollout: int, d: int, now: float) -> None: ...
    def fail(self, query: str, role: str, rollout: int, invocation: int, now: float) -> None: ...
    def ready(self) -> list[str]: ...
    def wait_ready(self, n: int, queries: Sequence[str], seconds: float) -> bool: ...
    def drop(self, query: str) -> bool: ...
    def expire(self, max_age: float, now: float) -> list[str]: ...
    def plan(
        self,
        step: int,
        queries: Sequence[str],
        skip_zero: bool,
        min_saved: int = 0,
        hold_prefixes: bool = False,
    ) -> Plan: ...
    def write(self, plan: Plan, rank: int, out: Mapping[str, npt.NDArray[Any]]) -> None: ...
    def write_padded(
        self, plan: Plan, rank: int, micro_batch: int, out: Mapping[str, npt.NDArray[Any]]
    ) -> None: ...
    def save_state(self, now: float) -> dict[str, Any]: ...
    def load_state(self, state: Mapping[str, Any], now: float) -> None: ...

class LogitRows:
    def __init__(
        self,
        *,
        logits: int,
        bfloat16: bool,
        rows: int,
        vocabulary: int,
        stride: int,
        target_ids: int,
        temperature: float,
        threads: int,
    ) -> None: ...

class TokenSettings:
    def __init__(
        self,
        *,
        term: int,
        clip_eps_low: float,
        clip_eps_high: float,
        delta: float,
        log_ratio_clip: float,
        sapo_temperature_pos: float,
        sapo_temperature_neg: float,
        kl_coef: float,
        kl_estimator: int,
        entropy_coef: float,
        correction: int,
        correction_low: float,
        correction_high: float,
    ) -> None: ...

def loss_rows(
    rows: LogitRows,
    inputs: Sequence[int],
    settings: TokenSettings,
    grad: int,
    logp: int,
    entropy: int,
    has_grad: int,
) -> None: ...
def row_partials(
    rows: LogitRows, active: int, maximum: int, sum: int, weighted: int, target: int
) -> None: ...
def row_gradients(rows: LogitRows, inputs: Sequence[int], grad: int) -> None: ...
def group_advantage(
    rewards: int, group_id: int, weight: int, n: int, estimator: int, eps: float, unbiased: bool, out: int
) -> None: ...
def active_isa() -> str: ...
def use_isa(name: str) -> None: ...

Bytes = bytes | bytearray | memoryview | npt.NDArray[np.uint8]

def xor_sparse(
    before: Bytes, after: Bytes, itemsize: int, limit: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]] | None: ...
def xor_dense(before: Bytes, after: Bytes, itemsize: int) -> npt.NDArray[np.uint8]: ...
def apply_sparse(data: Bytes, itemsize: int, gaps: Bytes, values: Bytes) -> None: ...
def apply_dense(data: Bytes, itemsize: int, planes: Bytes) -> None: ...
def sparse_indices(gaps: Bytes, n: int) -> npt.NDArray[np.int64]: ...
