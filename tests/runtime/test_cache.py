"""The file of measured times: merged by several writers, never in the way of training."""

from __future__ import annotations

import errno
import json
import logging
import multiprocessing
import os
import tempfile
import warnings

import pytest
import torch

from fastlora.runtime import cache as tuning_cache
from fastlora.runtime.cache import TuningCache

CPU = torch.device("cpu")
HERE = {"device": "pretended", "torch": "2"}


def entry(seconds: float = 1.0) -> tuning_cache.Entry:
    return {"forward": {"cublas": seconds}, "backward": {"cublas": 2 * seconds}, "left_out": {"triton": "not there"}}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "measured" / "times.json"


def test_what_is_put_is_there_in_the_next_process(path):
    TuningCache(path, HERE).put("a", entry(1.5e-4))
    again = TuningCache(path, HERE)
    assert again.entries == {}
    again.refresh()
    assert again.entries == {"a": entry(1.5e-4)}
    assert not list(path.parent.glob("*.tmp"))


def test_writers_keep_each_others_entries(path):
    first, second = TuningCache(path, HERE), TuningCache(path, HERE)
    first.put("a", entry(1.0))
    second.put("b", entry(2.0))
    first.put("c", entry(3.0))
    first.refresh()
    assert first.entries == {"a": entry(1.0), "b": entry(2.0), "c": entry(3.0)}
    second.put("a", entry(9.0))  # the latest measurement of one key stands in the file
    assert json.loads(path.read_text())["entries"]["a"] == entry(9.0)
    first.refresh()
    assert first.entries["a"] == entry(1.0), "within a process a choice stays"


def _write_many(path, number):
    cache = TuningCache(path, HERE)
    for i in range(20):
        cache.put(f"{number}-{i}", entry(1.0 + i))


def test_several_processes_at_once(path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_write_many, args=(path, number)) for number in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    cache = TuningCache(path, HERE)
    cache.refresh()
    assert len(cache.entries) == 80 and cache.entries["3-19"] == entry(20.0)


def test_a_lock_that_is_never_given_back_is_not_waited_for(path, monkeypatch):
    monkeypatch.setattr(tuning_cache, "LOCK_WAIT_S", 0.05)
    path.parent.mkdir()
    with tuning_cache.locked(path.with_suffix(".lock")):
        TuningCache(path, HERE).put("a", entry())
    assert "a" in json.loads(path.read_text())["entries"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "\x00\xff",
        '{"version": 1, "environment": {"device": "pretended", "torch": "2"}}',
        '{"version": 1, "environment": {"device": "pretended", "torch": "2"}, "entries": {"a": {"forward": {}}}}',
        '{"version": 1, "environment": {"device": "pretended", "torch": "2"}, '
        '"entries": {"a": {"forward": {"cublas": -1.0}, "backward": {}}}}',
        '{"version": 1, "environment": {"device": "pretended", "torch": "2"}, '
        '"entries": {"a": {"forward": {"cublas": NaN}, "backward": {}}}}',
    ],
)
def test_a_corrupt_file_is_ignored_with_one_warning_and_replaced(path, text):
    path.parent.mkdir()
    path.write_text(text, encoding="latin-1")
    cache = TuningCache(path, HERE)
    with pytest.warns(RuntimeWarning, match=r"times\.json cannot be read and are ignored"):
        cache.refresh()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache.put("b", entry())
    assert cache.entries == {"b": entry()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fresh = TuningCache(path, HERE)
        fresh.refresh()
    assert fresh.entries == {"b": entry()}


@pytest.mark.parametrize("change", [{"version": 2}, {"environment": HERE | {"torch": "3"}}])
def test_another_version_or_environment_is_no_match(path, change):
    TuningCache(path, HERE).put("a", entry())
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    cache = TuningCache(path, HERE)
    cache.refresh()
    assert cache.entries == {}


@pytest.mark.parametrize("where", ["mkdir", "mkstemp", "replace", "write"])
def test_a_full_or_read_only_disk_leaves_the_times_in_memory(path, where, monkeypatch, caplog):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    place = {
        "mkdir": (os, "mkdir"),
        "mkstemp": (tempfile, "mkstemp"),
        "replace": (os, "replace"),
        "write": (os, "fdopen"),
    }
    cache = TuningCache(path, HERE)
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, logger="fastlora"):
        patch.setattr(*place[where], full)
        cache.put("a", entry())
        cache.put("b", entry())
    assert cache.entries == {"a": entry(), "b": entry()} and cache.unwritable == "No space left on device"
    assert len(caplog.records) == 1 and "FASTLORA_CACHE_DIR" in caplog.text
    assert not list(path.parent.glob("*.tmp"))
    cache.put("c", entry())
    assert cache.unwritable is None and list(json.loads(path.read_text())["entries"]) == ["c"]


def test_a_folder_that_is_a_file_is_no_error(tmp_path, caplog):
    (tmp_path / "measured").write_text("")
    cache = TuningCache(tmp_path / "measured" / "times.json", HERE)
    cache.refresh()
    cache.put("a", entry())
    assert cache.entries == {"a": entry()} and cache.unwritable


def test_without_a_home_directory_memory_serves(monkeypatch, caplog):
    def nowhere():
        raise ValueError("FASTLORA_CACHE_DIR is not set and there is no home directory")

    monkeypatch.setattr(tuning_cache.env, "cache_dir", nowhere)
    tuning_cache.for_device.cache_clear()
    cache = tuning_cache.for_device(CPU)
    tuning_cache.for_device.cache_clear()
    cache.put("a", entry())
    assert cache.path is None and cache.entries == {"a": entry()} and "no home directory" in caplog.text


def test_the_file_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTLORA_CACHE_DIR", str(tmp_path))
    tuning_cache.for_device.cache_clear()
    cache = tuning_cache.for_device(CPU)
    tuning_cache.for_device.cache_clear()
    assert cache.path is not None and cache.path.parent == tmp_path / "measured"
    assert set(cache.environment) == {"device", "torch", "triton", "kernels"}
    names = {tuning_cache.file_name(cache.environment | {key: "another"}) for key in cache.environment}
    assert len(names | {cache.path.name}) == 5
    assert len(tuning_cache.kernels_version()) == 12 and not cache.path.exists()  # looking makes nothing
