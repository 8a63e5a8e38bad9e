"""The words of an error."""

from aimv2_mllm.errors import first_line


def test_an_error_is_told_by_its_first_line_and_one_that_says_nothing_by_its_kind() -> None:
    assert first_line(ValueError("\n the disk is full\nat 3 of 4")) == "the disk is full"
    assert first_line(ValueError()) == first_line(ValueError(" \n")) == "ValueError"
