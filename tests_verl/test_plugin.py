"""How verl finds mgrpo: through its entry point, in every process; and that a failure is seen."""

from __future__ import annotations

import importlib
import subprocess
import sys
from importlib.metadata import entry_points

import pytest
import verl.utils.config
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.v1 import trainer_base, utils

from mgrpo.errors import ConfigError
from mgrpo.integrations import verl as adapter


def test_verl_has_loaded_the_plugin() -> None:
    """Nothing here has imported the plugin or called register: `import verl` did."""
    (point,) = entry_points(group="verl.plugins", name="mgrpo")
    assert point.value == "mgrpo.integrations.verl_plugin" and point.value in sys.modules
    assert core_algos.get_adv_estimator_fn("mgrpo") is adapter.advantages
    assert core_algos.get_policy_loss_fn("mgrpo") is adapter.policy_loss
    assert hasattr(verl.utils.config.validate_config, "of_mgrpo")
    assert (
        trainer_base.compute_advantage_for_multi_trajectories
        is utils.compute_advantage_for_multi_trajectories
    )
    assert hasattr(utils.compute_advantage_for_multi_trajectories, "of_mgrpo")
    adapter.check()


def test_registering_again_changes_nothing() -> None:
    before = (verl.utils.config.validate_config, utils.compute_advantage_for_multi_trajectories)
    adapter.register()
    adapter.patch_compute_advantage()
    assert before == (verl.utils.config.validate_config, utils.compute_advantage_for_multi_trajectories)


def test_a_failing_plugin_is_seen(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """verl logs it at level DEBUG; the plugin logs an error itself, and check says why."""
    plugin = importlib.import_module("mgrpo.integrations.verl_plugin")

    def fail() -> None:
        raise AttributeError("verl has changed")

    monkeypatch.setattr(adapter, "register", fail)
    with pytest.raises(AttributeError):
        importlib.reload(plugin)
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert "plugin failed" in record.message
    monkeypatch.delitem(core_algos.ADV_ESTIMATOR_REGISTRY, "mgrpo")
    monkeypatch.delitem(sys.modules, plugin.__name__)
    with pytest.raises(ConfigError, match="AttributeError: verl has changed"):
        adapter.check()


def test_a_plugin_that_is_switched_off_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(core_algos.ADV_ESTIMATOR_REGISTRY, "mgrpo")
    monkeypatch.setenv("VERL_USE_EXTERNAL_PLUGINS", "none")
    with pytest.raises(ConfigError, match="VERL_USE_EXTERNAL_PLUGINS is 'none'"):
        adapter.check()


def test_the_adapter_imports_neither_verl_nor_torch() -> None:
    code = "import sys, mgrpo.integrations.verl; assert not {'verl', 'torch', 'ray'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
