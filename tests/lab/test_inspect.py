"""The token report: its numbers, what it leaves out, what it refuses, and its server."""

from __future__ import annotations

import base64
import json
import re
import threading
import urllib.error
import urllib.request
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic_runs import config, write_run
from typer.testing import CliRunner

from capo.cli.main import app
from capo.core.errors import InputError
from capo.lab.inspect import build_inspection, encode
from capo.lab.inspect.gather import Gathered
from capo.lab.inspect.server import make_server
from capo.lab.records import read_step, recorded_steps

SIZES = st.floats(1e-20, 1e4)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "watched"
    return write_run(path, config("watched", capo__selection="capo"), tokens=6)


def payload(page: Path) -> dict[str, Any]:
    found = re.search(r'id="payload">(.*?)</script>', page.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    read: dict[str, Any] = json.loads(found[1])
    return read


def unpack(packed: bytes) -> dict[str, Any]:
    """The page's own reading of a step, in Python."""
    raw = zlib.decompress(packed)
    length = int.from_bytes(raw[:4], "little")
    header, at, found = json.loads(raw[4 : 4 + length]), 4 + length, {}
    for name, kind, size in header["planes"]:
        found[name] = np.frombuffer(raw, f"<{kind}", size, at)
        assert at % found[name].itemsize == 0  # typed arrays of the browser want it so
        at += found[name].nbytes
    assert at == len(raw)
    return found


@given(st.lists(SIZES, min_size=1))
def test_sizes_are_kept_to_a_thousandth(values: list[float]) -> None:
    given_ = np.array(values)
    assert np.allclose(encode.decode(encode.encode(given_)), given_, rtol=1e-3, atol=0)
    for sign in (1, -1):
        found = encode.decode_signed(encode.encode_signed(sign * given_))
        assert np.allclose(found, sign * given_, rtol=1e-3, atol=0)


def test_nothing_infinite_and_missing() -> None:
    odd = np.array([0.0, 1e-30, np.inf, np.nan])
    np.testing.assert_allclose(encode.decode(encode.encode(odd)), [0, 0, 1e4, np.nan])
    np.testing.assert_allclose(
        encode.decode_signed(encode.encode_signed(-odd)), [0, 0, -1e4, np.nan]
    )


def test_a_steps_numbers_arrive(run: Path, tmp_path: Path) -> None:
    written = build_inspection(run, tmp_path / "page.html")
    data, files = payload(written.path), recorded_steps(run / "tokens")
    assert data["steps"] == list(files)
    assert written.steps == written.recorded == len(files)
    for number, path in files.items():
        arrays, found = read_step(path), unpack(base64.b64decode(data["packed"][str(number)]))
        assert arrays is not None
        for name in ("offsets", "token_ids", "reason"):
            np.testing.assert_array_equal(found[name], arrays[name])
        for name in ("policy_shift", "entropy"):
            want = arrays[name].astype(float)
            np.testing.assert_allclose(encode.decode(found[name]), want, rtol=1e-3, atol=1e-20)
        gain = arrays["objective_shift"].astype(float)
        np.testing.assert_allclose(
            encode.decode_signed(found["objective_shift"]), gain, rtol=1e-3, atol=1e-20
        )
        assert {str(t) for t in np.unique(arrays["token_ids"])} <= set(data["words"])


def test_offenders_add_up(run: Path) -> None:
    gathered = Gathered(run)
    offenders, ranges = gathered.survey()
    shift = sum(
        float(gathered.arrays(n)["policy_shift"].astype(float).sum()) for n in gathered.files
    )
    assert offenders.total == pytest.approx(shift)
    by_token = offenders.by_token.values()
    assert sum(row[0] for row in by_token) == pytest.approx(shift)
    tokens = sum(gathered.arrays(n)["token_ids"].size for n in gathered.files)
    assert sum(row[1] for row in by_token) == tokens
    shares = [row["share"] for row in offenders.table("token")]
    assert shares == sorted(shares, reverse=True)
    assert 0 < ranges["policy_shift/low"] < ranges["policy_shift/high"]


def test_a_hundred_steps_stay_below_ten_megabytes(tmp_path: Path) -> None:
    """Of 96 completions of up to 60 tokens each, of numbers that hardly compress."""
    run = write_run(tmp_path / "big", config("big", capo__selection="capo"), tokens=1)
    rng = np.random.default_rng(0)
    for number in range(1, 101):
        lengths = rng.integers(20, 61, 96)
        offsets, size = np.concatenate([[0], np.cumsum(lengths)]), int(lengths.sum())
        np.savez_compressed(
            run / "tokens" / f"step-{number:06d}.npz",
            offsets=offsets,
            prompt_offsets=np.arange(97) * 20,
            prompt_ids=rng.integers(0, 1000, 96 * 20).astype(np.int32),
            reward=rng.integers(0, 2, 96).astype(np.float32),
            token_ids=rng.integers(0, 1000, size).astype(np.int32),
            log_prob=-rng.exponential(1, size).astype(np.float32),
            entropy=rng.exponential(1, size).astype(np.float16),
            advantage=np.repeat(rng.normal(size=96), lengths).astype(np.float32),
            objective_shift=rng.normal(size=size).astype(np.float32),
            policy_shift=rng.lognormal(-8, 4, size).astype(np.float32),
            weight=np.ones(size, np.float32),
            reason=rng.integers(0, 2, size).astype(np.int8),
        )
    whole = build_inspection(run, tmp_path / "whole.html")
    assert whole.steps >= 100
    assert whole.size < 10e6
    part = build_inspection(run, tmp_path / "part.html", step=37, limit_mb=2)
    assert part.size < 2e6
    assert part.steps < part.recorded
    kept = payload(part.path)["steps"]
    assert {1, 37, max(recorded_steps(run / "tokens"))} <= set(kept)
    assert payload(part.path)["open"] == 37
    with pytest.raises(InputError, match=r"--limit-mb: must be at least .* got 0\.1"):
        build_inspection(run, tmp_path / "none.html", limit_mb=0.1)
    assert not (tmp_path / "none.html").exists()


def test_command_and_what_it_refuses(run: Path, tmp_path: Path) -> None:
    def call(*arguments: object) -> Any:
        return CliRunner().invoke(app, ["inspect", *map(str, arguments)])

    done = call(run, "--output", tmp_path / "deep" / "page.html")
    assert done.exit_code == 0, done.output
    assert "6 steps" in done.output
    bare = write_run(tmp_path / "bare", config("bare"))
    refused = {
        (tmp_path / "no",): "not a directory",
        (bare,): "train with --tokens EVERY",
        (run, "--step", 10_000): "must be a recorded step, got 10000; the nearest are",
        (run, "--output", tmp_path): "is a directory",
    }
    for arguments, sentence in refused.items():
        failed = call(*arguments)
        assert isinstance(failed.exception, InputError), arguments
        assert sentence in str(failed.exception)
    assert not (bare / "inspect.html").exists()


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    words = ["</script><script>alert(1)</script>", "<b>", "\u2028", "\n", *"abcdefghijklmnop"]
    run = write_run(
        tmp_path / "odd", config("<i>odd</i>", capo__selection="capo"), tokens=2, vocabulary=words
    )
    page = build_inspection(run, tmp_path / "page.html").path
    html = page.read_text(encoding="utf-8")
    assert "<script>alert" not in html
    assert "<i>odd" not in html
    assert set(payload(page)["words"].values()) <= set(words)


def test_server_sends_steps_and_nothing_else(run: Path) -> None:
    server = make_server(run)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        with urllib.request.urlopen(f"{base}/") as answer:
            assert b'"packed":null' in answer.read()
        number, path = next(iter(recorded_steps(run / "tokens").items()))
        with urllib.request.urlopen(f"{base}/step/{number}") as answer:
            found = unpack(answer.read())
        arrays = read_step(path)
        assert arrays is not None
        np.testing.assert_array_equal(found["token_ids"], arrays["token_ids"])
        for wrong in ("/step/99999", "/step/../config.json", "/config.json", "/step/-1"):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(base + wrong)
        with pytest.raises(InputError, match="--port"):
            make_server(run, server.server_address[1])
    finally:
        server.shutdown()
        server.server_close()
