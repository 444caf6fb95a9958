"""The check that comes before hand-written kernels are used: once a kind, never in a capture, on no old GPU."""

import pytest
import torch

from fastlora.runtime import trust
from fastlora.runtime.trust import Trusted

CPU, GPU, BF16 = torch.device("cpu"), torch.device("cuda:0"), torch.bfloat16


def wrong():
    raise RuntimeError("no kernel image")


def test_a_verdict_is_made_once_for_each_key():
    trusted, runs = Trusted("the kernel", "ATen runs instead"), []
    check = lambda: runs.append(1)  # noqa: E731
    assert trusted.why_not((CPU, BF16), check) is None
    assert trusted.why_not((CPU, BF16), wrong) is None
    assert trusted.why_not((CPU, torch.float32), check) is None
    assert len(runs) == 2 and set(trusted.verdicts) == {(CPU, BF16), (CPU, torch.float32)}


@pytest.mark.parametrize(
    "check, reason", [(lambda: "y differs", "y differs"), (wrong, "RuntimeError: no kernel image")]
)
def test_what_is_wrong_is_told_once(check, reason):
    trusted = Trusted("the kernel", "ATen runs instead")
    said = rf"the kernel failed its self-check on cpu for torch\.bfloat16 and is not used; ATen runs instead: {reason}"
    with pytest.warns(RuntimeWarning, match=said):
        assert trusted.why_not((CPU, BF16, True), check) == reason
    assert trusted.why_not((CPU, BF16, True), lambda: None) == reason


def test_nothing_is_checked_in_a_capture_or_on_an_old_gpu(monkeypatch):
    trusted, capability, capturing = Trusted("the kernel", "ATen runs instead"), [(8, 0)], [True]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[0])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    assert trusted.why_not((GPU,), wrong) == trust.NOT_YET
    capability[0], capturing[0] = (7, 5), False
    assert "needs compute capability 8.0" in str(trusted.why_not((GPU,), wrong))
    assert trusted.verdicts == {}
    capability[0] = (9, 0)
    assert trusted.why_not((GPU,), lambda: None) is None
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert trusted.why_not((GPU,), wrong) is None and trusted.why_not((CPU,), wrong) == trust.NOT_YET
