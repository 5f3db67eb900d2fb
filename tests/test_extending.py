"""docs/extending.md: a package with a part of each kind, installed beside mgrpo, trains; nothing here knows of it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from mgrpo.cli.scaffold import init_task
from mgrpo.config import load_config
from mgrpo.errors import ConfigError
from mgrpo.run.processes import check_plugins, load_run_task
from tests.runs import ROOT, final_weights, leftovers, records, resume, summary, train

PAGE = (ROOT / "docs" / "extending.md").read_text()
BLOCK = re.compile(r"```(?:python|toml)\n# ([^\n]+)\n(.*?)```", re.DOTALL)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as the page has it, with the metadata that installing it would leave."""
    folder = tmp_path_factory.mktemp("extending") / "lab"
    init_task("lab", folder)
    blocks = dict(BLOCK.findall(PAGE))
    entries = blocks.pop("entry points")
    for name, text in blocks.items():
        (folder / name).write_text(text)
    info = folder / "lab-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lab\nVersion: 0.1.0\n")
    lines = re.sub(r'\[project\.entry-points\."([^"]+)"\]', r"[\1]", entries).replace('"', "")
    (info / "entry_points.txt").write_text(lines)
    return folder


@pytest.fixture(scope="module", autouse=True)
def installed(lab: Path) -> Iterator[Path]:
    """On the path of this process and of those that it starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(lab)
        patch.setenv("PYTHONPATH", f"{lab}:{ROOT}")
        yield lab


@pytest.fixture(scope="module")
def run(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Three steps as the page has them; the run's folder and its output."""
    out = tmp_path_factory.mktemp("runs") / "run"
    return out, train(installed / "run.toml", out)


def test_every_block_is_a_file_of_the_package() -> None:
    """No block of the page is left out."""
    assert PAGE.count("```") == 2 * len(BLOCK.findall(PAGE))


def test_a_part_of_each_kind_from_outside_trains(run: tuple[Path, str]) -> None:
    """Three steps with loss, algorithm, engine, trainer, sink, task and metric of the package, found by the names that
    its entry points give; each leaves its trace."""
    out, output = run
    assert summary(out)["finished"] and summary(out)["steps"] == 3 and leftovers(out) == []
    assert "main: a plain engine" in output
    rows = records(out)
    assert sum("rollout/task/helper_followed" in row for row in rows) == 3
    csv = [line.split(",") for line in (out / "metrics.csv").read_text().splitlines()]
    assert {(int(step), name) for step, name, _ in csv} == {
        (row["step"], name) for row in rows for name in row if name not in ("step", "time", "seq")
    }


def test_a_run_with_them_is_resumed(run: tuple[Path, str], tmp_path: Path) -> None:
    """The resumed run finds the same classes."""
    shutil.copytree(run[0], tmp_path / "again")
    resume(tmp_path / "again", "trainer.steps=4")
    assert summary(tmp_path / "again")["finished"] and summary(tmp_path / "again")["steps"] == 4


@pytest.mark.parametrize(
    "other",
    [
        "agents.main.loss.options={below=0.9}",
        'agents.main.algorithm={type="mgrpo"}',
        'agents.main.policy.trainer="torch"',
    ],
)
def test_each_part_changes_what_is_learned(
    run: tuple[Path, str], installed: Path, tmp_path: Path, other: str
) -> None:
    """The package's part is what computes: another setting, or the built-in one in its place, ends elsewhere."""
    train(installed / "run.toml", tmp_path / "other", other)
    assert final_weights(tmp_path / "other")["main"] != final_weights(run[0])["main"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ('agents.main.loss={type="carefull"}', r"loss: type: 'carefull' is unknown, expected .*careful, .*grpo"),
        ('agents.main.algorithm={type="medean"}', r"algorithm\.type 'medean' is unknown, expected .*median, mgrpo"),
        ('agents.main.engine={type="plane"}', r"engine\.type 'plane' is unknown, expected hf, plain, sglang, vllm or"),
        ('agents.main.policy.trainer="avg"', r"policy\.trainer 'avg' is unknown, expected averaged, torch or"),
        ('metrics.sinks=["cvs"]', r"metrics\.sinks 'cvs' is unknown, expected csv, mlflow, tensorboard,"),
        ('task={name="lap"}', r"task\.name 'lap' is unknown, expected atlas, .*lab"),
        ("agents.main.loss.options={above=1}", r"loss\.options\.above: .*Careful takes: below"),
    ],
)  # fmt: skip
def test_an_unknown_name_is_refused_with_those_there_are(
    installed: Path, override: str, message: str
) -> None:
    """Every seam, installed names included; nothing falls through to a default."""
    with pytest.raises(ConfigError, match=message):
        config = load_config(installed / "run.toml", [override])
        check_plugins(config)
        load_run_task(config)


@pytest.mark.parametrize(
    "override",
    [
        'agents.main.loss={type="broken:Part"}',
        'agents.main.algorithm={type="broken:Part"}',
        'agents.main.engine={type="broken:Part"}',
        'agents.main.policy.trainer="broken:Part"',
        'metrics.sinks=["broken:Part"]',
        'task={name="broken:Part"}',
    ],
)
def test_a_part_whose_module_fails_is_named_with_its_line(installed: Path, override: str) -> None:
    """An error of the user's own code, at import: one line with its kind, file and line, for every seam."""
    (installed / "broken.py").write_text("import math\n\nRATE = math.log(0)\n")
    with pytest.raises(ConfigError, match=r"'broken:Part': ValueError: .*\(.*broken\.py:3\)$") as caught:
        config = load_config(installed / "run.toml", [override])
        check_plugins(config)
        load_run_task(config)
    assert "\n" not in str(caught.value)
