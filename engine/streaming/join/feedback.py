"""The delayed feedback of each task, as the configuration names it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from engine.components import DelayedFeedback
from engine.config_learning import JoinConfig
from engine.config_plugins import ComponentConfig, default_name

if TYPE_CHECKING:
    from engine.plugins import Plugins

KIND = "delayed_feedback"


def feedback_of(config: JoinConfig, tasks: Sequence[str], plugins: Plugins) -> dict[str, DelayedFeedback]:
    """task -> its own; the default one where the configuration names none."""
    found = {}
    for task in tasks:
        use = config.feedback.get(task) or ComponentConfig(name=default_name(KIND))
        plugin = plugins.get(KIND, use.name)
        found[task] = plugin(plugin.Options(**use.options))
    return found


def presumed_after(feedback: Mapping[str, DelayedFeedback]) -> dict[str, float]:
    """task -> seconds after a ranking at which its impressions are presumed negative; tasks that wait are left out."""
    return {task: its.presumed_after for task, its in feedback.items() if its.presumed_after is not None}
