"""Targets: one file each. `base` says what a target is and finds them."""

from awqconv.targets.base import Linear, Mixture, Part, Rule, Target, layout, targets

__all__ = ["Linear", "Mixture", "Part", "Rule", "Target", "layout", "targets"]
