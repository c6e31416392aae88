import pytest
from tornado.web import HTTPError

from gp_core.errors import KERNEL_DIED, REASONS, ConfigError, LaunchDenied, LaunchFailed, LaunchTimeout, readable


def test_a_failed_launch_says_what_why_and_what_to_do() -> None:
    text = str(LaunchFailed("kernel 1 ended", reason=KERNEL_DIED, exit_code=1, log="Traceback\nNo module named x\n"))
    assert text.splitlines() == ["kernel 1 ended [KernelDied]", "Traceback", "No module named x", KERNEL_DIED.advice]


@pytest.mark.parametrize(
    ("error", "status"),
    [(ConfigError("x"), 400), (LaunchDenied("x"), 403), (LaunchFailed("x"), 503), (LaunchTimeout("x"), 504)],
)
def test_readable_errors_keep_their_class_and_text_and_have_a_status(error: Exception, status: int) -> None:
    shown = readable(error)
    assert isinstance(shown, type(error))
    assert isinstance(shown, HTTPError)
    assert shown.status_code == status
    assert str(shown) == str(error)
    assert shown.log_message == str(error)


def test_readable_errors_hold_nothing_that_could_be_formatted() -> None:
    shown = readable(LaunchFailed("disk at 100% of %s", log="50%d"))
    assert "%" not in str(shown)
    assert "100 percent" in str(shown)


def test_a_readable_error_names_its_reason_and_stays_the_same_when_it_crosses_twice() -> None:
    shown = readable(LaunchFailed("x", reason=KERNEL_DIED, exit_code=3))
    assert readable(shown) is shown
    assert (shown.reason, shown.failure, shown.exit_code) == ("KernelDied", KERNEL_DIED, 3)


def test_reasons_have_distinct_codes_and_advice() -> None:
    assert len({reason.code for reason in REASONS}) == len(REASONS) > 10
    assert all(reason.advice.endswith((".", ")")) for reason in REASONS)
