"""Which models work: every row of the table in docs/models.md is run (tests/model_table.py), on one process and on two
ranks, and the page says what came out."""

from __future__ import annotations

import pytest

from mgrpo.config.policy import LoraConfig, PolicyConfig
from mgrpo.model.policy import Policy
from tests.families import family
from tests.model_rows import ROWS, Row
from tests.model_table import PAGE, all_rows, on_page, table
from tests.models import tiny_tokenizer

REFUSED = {"Gemma 2", "Granite"}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Row]:
    """All rows, of which each has its cells or its error."""
    return {row.title: row for row in all_rows(tmp_path_factory.mktemp("models"))}


@pytest.mark.parametrize("title", ROWS)
def test_a_model_trains_or_is_refused_by_name(rows: dict[str, Row], title: str) -> None:
    """Loaded, trained, saved, published, divided: right in all of it; what is refused is refused before anything else
    happens, alike by one process and by two."""
    row = rows[title]
    if row.error is not None:
        raise row.error
    assert (row.cells["loads"] == "refused") == (title in REFUSED)
    assert bool(row.after) == (row.cells["two ranks"] == "yes") == (title not in REFUSED)


def test_the_page_has_what_was_found(rows: dict[str, Row]) -> None:
    """`python -m tests.model_table --write` puts it there."""
    assert on_page(PAGE.read_text(encoding="utf-8")) == table(list(rows.values()))


@pytest.mark.parametrize(
    "config",
    [PolicyConfig(), PolicyConfig(last_layers=1), PolicyConfig(lora=LoraConfig(rank=2))],
    ids=["all", "last", "adapters"],
)
def test_what_text_does_not_reach_is_left_alone(config: PolicyConfig) -> None:
    """The tower for images of a model that sees has as many layers, of the same names, as its language model: it is
    frozen, has no adapters, and its layers are not taken for the decoder's."""
    policy = Policy(family("Gemma3"), tiny_tokenizer(), "tiny", config)
    trained = [name for name, p in policy.model.named_parameters() if p.requires_grad]
    assert trained and not [name for name in trained if "vision" in name or "projector" in name]
    assert not [n for n, _ in policy.model.named_parameters() if "vision" in n and ".lora_" in n]
    assert all("vision" not in type(layer).__module__ + type(layer).__name__ for layer in policy.layers)
    assert {type(layer).__name__ for layer in policy.layers} == {"Gemma3DecoderLayer"}
