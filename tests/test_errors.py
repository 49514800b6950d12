import pytest

from mini_symposium.errors import (
    INVISIBLE,
    LONGEST_LINE,
    Faults,
    InputError,
    RunError,
    one_line,
    printable,
    without_secrets,
)


@pytest.fixture(autouse=True)
def secrets(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnop")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("LONGER_KEY", "0123456789abcdef-and-more")
    monkeypatch.setenv("SHORT_KEY", "a")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "not a secret")


def test_secrets_of_the_environment_are_left_out_and_other_values_are_not():
    line = "401 for hf_abcdefghijklmnop at https://me:pass@host/x and https://0123456789abcdef@h: not a secret"
    assert without_secrets(line) == "401 for *** at https://***@host/x and https://***@h: not a secret"
    assert without_secrets("0123456789abcdef-and-more") == "***"


@pytest.mark.parametrize("error", [InputError, RunError])
def test_a_message_is_one_printable_line_without_secrets(error):
    assert str(error("a.md:1: \x1b[2Jhf_abcdefghijklmnop\n\tis a key\n")) == "a.md:1: \\x1b[2J***  is a key"


def test_a_long_message_keeps_its_ends_and_cuts_no_secret_in_two():
    text = one_line("first" + "x" * 10_000_000 + "last")
    assert text.startswith("first") and text.endswith("last") and len(text) < LONGEST_LINE + 10
    assert "hf_abc" not in one_line("x" * (LONGEST_LINE // 2 - 9) + "hf_abcdefghijklmnop" * 100)
    assert len(one_line("\u202e" * LONGEST_LINE)) < LONGEST_LINE + 10


def test_printable_spells_out_what_cannot_be_shown_and_keeps_the_rest():
    assert printable("é 巴黎 🏳\n\t") == "é 巴黎 🏳\n\t"
    assert printable("\u202e\xa0\ud800\r") == "\\u202e\\xa0\\ud800\\r"


def test_everything_invisible_is_spelled_out():
    invisible = [chr(code) for code in range(0x110000) if INVISIBLE.match(chr(code))]
    assert {"\x00", "\r", "\x1b", "\xad", "\u200b", "\u2028", "\u202e", "\ufeff", "\U000e0041"} <= set(invisible)
    assert not any(character in printable(character) for character in invisible)
    assert not {"\n", "\t", " ", "é", "\u0301", "巴"} & set(invisible)


def test_faults_that_were_cut_short_once_are_still_counted():
    """Two files, of which the first alone has more faults than are told."""
    faults = Faults()
    for name, count in (("a.jsonl", 90_000), ("b.jsonl", 2)):
        with faults.collected():
            raise InputError(*(f"{name}:{line}: not JSON" for line in range(count)))
    with pytest.raises(InputError) as refused:
        faults.refuse()
    assert len(faults) == 90_002 and refused.value.faults[-1] == "and 89,982 more faults"
