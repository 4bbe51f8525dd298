"""Writing in the background of computing: in order, one ahead, and no error is lost."""

import threading

import pytest

from hesscli.job.matrix.background import Background


@pytest.mark.parametrize("enabled", [False, True])
def test_calls_are_made_in_order(enabled: bool) -> None:
    seen: list[int] = []
    with Background(enabled) as background:
        for number in range(20):
            background.run(seen.append, number)
    assert seen == list(range(20))


def test_at_most_one_is_ahead() -> None:
    release, started = threading.Event(), threading.Event()

    def wait() -> None:
        started.set()
        assert release.wait(10)

    with Background(enabled=True) as background:
        background.run(wait)
        assert started.wait(10)  # it runs while this thread goes on
        second = threading.Thread(target=background.run, args=(started.clear,))
        second.start()
        second.join(0.2)
        assert second.is_alive()  # it waits for the first
        assert started.is_set()
        release.set()
        second.join(10)
    assert not started.is_set()


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("later", [0, 2])
def test_no_error_is_lost(enabled: bool, later: int) -> None:
    def fail() -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"), Background(enabled) as background:  # noqa: PT012
        background.run(fail)
        for _ in range(later):
            background.run(lambda: None)


def test_an_error_of_the_main_thread_goes_first() -> None:
    def fail() -> None:
        raise OSError("disk full")

    with pytest.raises(ValueError, match="mine"), Background(enabled=True) as background:  # noqa: PT012
        background.run(fail)
        raise ValueError("mine")
