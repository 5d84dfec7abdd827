"""Laws that awqconv asks of every target; whole checkpoints too, where the package is installed."""

from awqconv_target_example import TARGET

from awqconv.testing import check_target


def test_laws():
    assert check_target(TARGET)["slice"]
