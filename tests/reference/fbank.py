"""Log mel filter banks by their definition, one frame and one band at a time."""

from __future__ import annotations

import numpy as np


def mel(hertz: float) -> float:
    return 1127.0 * np.log(1.0 + hertz / 700.0)


def log_mel(samples: np.ndarray, rate: int, bins: int, low: float, high: float) -> np.ndarray:
    """``samples`` in [-1, 1] -> [T, bins]; frames of 25 ms every 10 ms, centred, mirrored at the ends."""
    shift, length = rate // 100, rate // 40
    size = 1 << (length - 1).bit_length()
    window = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(length) / (length - 1))) ** 0.85
    corners = np.linspace(mel(low), mel(high), bins + 2)
    frames = []
    for t in range((len(samples) + shift // 2) // shift):
        first = t * shift + shift // 2 - length // 2
        x = np.array([32768.0 * mirrored(samples, first + i) for i in range(length)])
        x -= x.mean()
        x -= 0.97 * np.concatenate([x[:1], x[:-1]])
        power = np.abs(np.fft.rfft(x * window, size)) ** 2
        energies = []
        for left, centre, right in zip(corners, corners[1:], corners[2:], strict=False):
            energy = 0.0
            for k in range(size // 2):
                m = mel(k * rate / size)
                if left < m < right:
                    energy += power[k] * (
                        (m - left) / (centre - left) if m <= centre else (right - m) / (right - centre)
                    )
            energies.append(np.log(max(energy, np.finfo(np.float32).eps)))
        frames.append(energies)
    return np.array(frames)


def mirrored(samples: np.ndarray, i: int) -> float:
    while not 0 <= i < len(samples):
        i = -i - 1 if i < 0 else 2 * len(samples) - 1 - i
    return float(samples[i])
