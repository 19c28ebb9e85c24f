"""A step's tokens for the browser: numbers in two bytes each, deflated.

Shifts span twenty orders of magnitude, so that a number is kept by its logarithm: 24 decades in 65 534
levels (signed: 32 766), an error below 0.05 % (0.09 %), which is less than the page shows.
"""

from __future__ import annotations

import json
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float, Int16, UInt16

LOWEST, DECADES = -20.0, 24.0
LEVELS, SIGNED_LEVELS = 65_533, 32_765
MISSING, SIGNED_MISSING = 65_535, -32_768


def encode(values: Float[np.ndarray, " N"]) -> UInt16[np.ndarray, " N"]:
    """Values ≥ 0 as 1 + their place in the decades; 0 for (nearly) nothing, `MISSING` for NaN."""
    values = np.asarray(values, dtype=np.float64)
    codes: UInt16[np.ndarray, " N"] = _places(np.abs(values), LEVELS).astype(np.uint16)
    codes[np.isnan(values)] = MISSING
    return codes


def encode_signed(values: Float[np.ndarray, " N"]) -> Int16[np.ndarray, " N"]:
    """The same with a sign; `SIGNED_MISSING` for NaN."""
    values = np.asarray(values, dtype=np.float64)
    sizes = _places(np.abs(values), SIGNED_LEVELS)
    codes: Int16[np.ndarray, " N"] = (np.sign(np.nan_to_num(values)) * sizes).astype(np.int16)
    codes[np.isnan(values)] = SIGNED_MISSING
    return codes


def decode(codes: UInt16[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """What the page reads."""
    return np.where(codes == MISSING, np.nan, _values(codes.astype(np.float64), LEVELS))


def decode_signed(codes: Int16[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """What the page reads."""
    wide = codes.astype(np.float64)
    return np.where(
        codes == SIGNED_MISSING, np.nan, np.sign(wide) * _values(np.abs(wide), SIGNED_LEVELS)
    )


def _places(sizes: Any, levels: int) -> Any:
    with np.errstate(divide="ignore", invalid="ignore"):
        place = (np.log10(sizes) - LOWEST) / DECADES
    place = np.nan_to_num(place, nan=-1.0, posinf=1.0, neginf=-1.0)
    return np.where(place < 0, 0, 1 + np.rint(np.clip(place, 0, 1) * levels))


def _values(codes: Any, levels: int) -> Any:
    return np.where(codes == 0, 0.0, 10.0 ** (LOWEST + DECADES * (codes - 1) / levels))


def pack_step(number: int, arrays: dict[str, Any]) -> bytes:
    """One step, deflated: the length of a JSON header, the header, and the planes it names.

    Args:
        number: the optimizer step, from 1.
        arrays: of `capo.lab.records.read_step`; what an older record lacks is marked as missing.
    """
    tokens = arrays["token_ids"].size
    completions = arrays["offsets"].size - 1

    def column(name: str, size: int = tokens) -> Any:
        return arrays.get(name, np.full(size, np.nan)).astype(np.float64)

    reason = arrays.get("reason", np.zeros(tokens)).astype(np.int8)
    planes = {
        "offsets": arrays["offsets"].astype("<u4"),
        "prompt_offsets": arrays.get("prompt_offsets", np.zeros(completions + 1)).astype("<u4"),
        "token_ids": arrays["token_ids"].astype("<u4"),
        "prompt_ids": arrays.get("prompt_ids", np.zeros(0)).astype("<u4"),
        "reward": column("reward", completions).astype("<f4"),
        "policy_shift": encode(column("policy_shift")).astype("<u2"),
        "surprise": encode(-column("log_prob")).astype("<u2"),
        "entropy": encode(column("entropy")).astype("<u2"),
        "objective_shift": encode_signed(column("objective_shift")).astype("<i2"),
        "advantage": encode_signed(column("advantage")).astype("<i2"),
        "weight": encode_signed(column("weight")).astype("<i2"),
        "reason": reason,
    }
    layout = [[name, plane.dtype.str[1:], plane.size] for name, plane in planes.items()]
    header = json.dumps({"step": number, "planes": layout}).encode()
    header += b" " * (-len(header) % 4)  # planes of four bytes first, then two, then one
    body = b"".join(plane.tobytes() for plane in planes.values())
    return zlib.compress(len(header).to_bytes(4, "little") + header + body, 9)
