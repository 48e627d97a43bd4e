import pytest

from fastlocal.trainer.progress import Bar, losses_text


@pytest.mark.parametrize(
    ("losses", "text"),
    [
        ([0.314], ".31"),
        ([2.3, 0.996, 12.4, 0.004], "2.3 1.0 12 | last .00"),
        ([9.96, float("nan")], "10 | last nan"),
    ],
)
def test_losses_text(losses, text):
    assert losses_text(losses) == text


def test_of_many_blocks_some_are_shown_with_their_numbers():
    text = losses_text([k / 100 for k in range(55)])
    assert text.startswith("0:.00 ") and " 53:.53 | last .54" in text and text.count(":") == 11


def test_a_disabled_bar_is_silent(capsys):
    with Bar(2, "run", enabled=False) as bar:
        bar.step([1.0])
    assert capsys.readouterr() == ("", "")


def test_losses_that_were_not_read_keep_the_last_ones(capsys):
    with Bar(2, "run") as bar:
        bar.step([1.0, 2.0])
        bar.step(None)
    assert "2/2" in (err := capsys.readouterr().err) and "loss 1.0 | last 2.0" in err
