"""Laws of layouts over generated shapes, for every target; and that a broken target is caught."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from awqconv.repack import layouts
from awqconv.repack.axes import Pattern
from awqconv.targets import Linear, Part, Rule, Target, targets
from awqconv.testing import LawBrokenError, check_target

TARGETS = {target.name: target for target in targets()}


@pytest.mark.parametrize("name", TARGETS)
def test_every_target_obeys_the_laws(name):
    checked = check_target(TARGETS[name])
    assert set(checked) == {
        "tables", "sizes", "order", "there and back", "slice", "fusion", "conversion",
    }  # fmt: skip
    assert checked["slice"] > checked["order"]


@st.composite
def linears(draw: Any) -> Linear:
    g = draw(st.sampled_from([16, 32, 48, 64, 96, 128, 256]))
    groups = draw(st.integers(1, 8))
    N = draw(st.sampled_from([8, 32, 64])) * draw(st.integers(1, 6))
    scales = draw(st.sampled_from(["F16", "BF16", "F32"]))
    kind = draw(st.sampled_from(["dense", "expert"]))
    return Linear(g * groups, N, g, scales, kind=kind)


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=4, deadline=None)
@given(layers=st.lists(linears(), min_size=12, max_size=16))
def test_laws_over_generated_layers(name, layers):
    try:
        check_target(TARGETS[name], layers, conversion=False)
    except LawBrokenError as error:
        assume("refuse all of the layers" not in error.what)
        raise


class Sound(Target):
    """A copy of the GPTQ layout: what the broken ones differ from."""

    name = "sound"
    title = "nobody"
    rules = (Rule("K % 8 == 0", "here"),)

    def parts(self, linear: Linear) -> tuple[Part, ...]:
        return (
            Part("qweight", "q", layouts.GPTQ, "I32"),
            Part("qzeros", "z", layouts.ROWS, "I32"),
            Part("scales", "s", layouts.PLAIN, linear.scales),
        )


class NoZeros(Sound):
    def parts(self, linear: Linear) -> tuple[Part, ...]:
        return super().parts(linear)[::2]


class OneName(Sound):
    def parts(self, linear: Linear) -> tuple[Part, ...]:
        return tuple(replace(part, suffix="data") for part in super().parts(linear))


class NegativeZeros(Sound):
    """8 - z in 8 bits turns back; 8 + z in a nibble cannot be written."""

    def parts(self, linear: Linear) -> tuple[Part, ...]:
        q, _, s = super().parts(linear)
        return q, Part("qzeros", "z", layouts.PLAIN, "I8", sign=0, offset=8), s


class LossyScales(Sound):
    def parts(self, linear: Linear) -> tuple[Part, ...]:
        *others, s = super().parts(linear)
        return (*others, replace(s, dtype="BF16" if linear.scales == "F16" else "F16"))


class TooTight(Sound):
    """Columns by 64, which no rule asks for."""

    def parts(self, linear: Linear) -> tuple[Part, ...]:
        _, z, s = super().parts(linear)
        return Part("qweight", "q", layouts.MARLIN, "I32"), z, s


class Scrambled(Sound):
    """Padding that depends on what was there before."""

    def parts(self, linear: Linear) -> tuple[Part, ...]:
        _, z, s = super().parts(linear)
        pattern = Pattern("k (nw e) -> k nw (e)", pad=8, e=8)
        return Part("qweight", "q", pattern, "I32"), z, s

    def derive(self, part: Part, linear: Linear, rows: Any, z: Any) -> None:
        rows.reshape(linear.K, -1)[:, -4:] = np.random.default_rng().integers(0, 255)


class NoSource(Sound):
    rules = (Rule("K % 8 == 0", ""),)


class WrongRule(Sound):
    rules = (Rule("M % 8 == 0", "here"),)


class Unknown(Sound):
    fallback = "nothing"


BROKEN = [
    (NoZeros, "sizes"),
    (OneName, "sizes"),
    (NegativeZeros, "there and back|not an integer"),
    (LossyScales, "there and back"),
    (TooTight, "does not split"),
    (Scrambled, "there and back|slice|fusion"),
    (NoSource, "has no source"),
    (WrongRule, "'M' is not defined"),
    (Unknown, "nothing"),
]


def test_a_sound_target_passes_without_being_installed():
    checked = check_target(Sound())
    assert checked["slice"]
    assert "conversion" not in checked


@pytest.mark.parametrize(("kind", "says"), BROKEN, ids=lambda x: getattr(x, "__name__", ""))
def test_a_broken_target_is_caught(kind, says):
    with pytest.raises(Exception, match=says):
        check_target(kind())
