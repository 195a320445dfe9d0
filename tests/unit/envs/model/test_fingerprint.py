"""The fingerprint cached next to large weights is the one that hashing gives, and follows every change."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from envs.model import AdaptiveMolmoE, fingerprint, molmoe


@pytest.fixture
def folder(model, tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprint, "MIN_CACHED_BYTES", 0)
    model.save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def hashed(monkeypatch):
    """Counts the times that weights are hashed."""
    calls = []
    original = molmoe.fingerprint
    monkeypatch.setattr(molmoe, "fingerprint", lambda *given: calls.append(1) or original(*given))
    return calls


def test_weights_are_hashed_once(folder, model, hashed):
    assert [AdaptiveMolmoE.from_pretrained(folder).fingerprint for _ in range(3)] == 3 * [model.fingerprint]
    assert len(hashed) <= 2  # the folder's, and the fixture's unless it was known
    assert list(json.loads((folder / fingerprint.CACHE_FILE).read_text()).values()) == [model.fingerprint]


def test_dtype_and_blank_crops_have_fingerprints_of_their_own(folder):
    def all_three():
        return [
            AdaptiveMolmoE.from_pretrained(folder).fingerprint,
            AdaptiveMolmoE.from_pretrained(folder, dtype=torch.bfloat16).fingerprint,
            AdaptiveMolmoE.from_pretrained(folder, blank_crops="trainer").fingerprint,
        ]

    first = all_three()
    assert len(set(first)) == 3
    assert all_three() == first


def test_replaced_weights_are_hashed_again(folder):
    before = AdaptiveMolmoE.from_pretrained(folder).fingerprint
    path = folder / "model.safetensors"
    times = path.stat()
    tensors = load_file(path)
    tensors["lm_head.weight"] += 1
    save_file(tensors, path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # the same size and time of modification
    assert AdaptiveMolmoE.from_pretrained(folder).fingerprint != before


def test_weights_changed_in_memory_are_not_cached(folder, model):
    changed = AdaptiveMolmoE.from_pretrained(folder)
    with torch.no_grad():
        changed.language.ln_f[3] += 1
    assert changed.fingerprint != model.fingerprint
    assert not (folder / fingerprint.CACHE_FILE).exists()


@pytest.mark.parametrize("content", ["", "[1]", "{}", "7"])
def test_a_damaged_cache_is_replaced(folder, model, content):
    (folder / fingerprint.CACHE_FILE).write_text(content)
    assert AdaptiveMolmoE.from_pretrained(folder).fingerprint == model.fingerprint
    assert model.fingerprint in (folder / fingerprint.CACHE_FILE).read_text()


def test_a_folder_that_cannot_be_written_is_no_error(folder, model, monkeypatch):
    def refuse(*_):
        raise PermissionError("read-only")

    monkeypatch.setattr(fingerprint, "write_json", refuse)
    assert AdaptiveMolmoE.from_pretrained(folder).fingerprint == model.fingerprint


def test_small_weights_leave_no_file(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert AdaptiveMolmoE.from_pretrained(tmp_path).fingerprint == model.fingerprint
    assert not (tmp_path / fingerprint.CACHE_FILE).exists()
