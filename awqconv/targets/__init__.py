"""Targets: one file each. `base` says what a target is and finds them."""

from awqconv.targets.base import Linear, Part, Rule, Target, layout, targets

__all__ = ["Linear", "Part", "Rule", "Target", "layout", "targets"]
