"""What the CPU of this machine can do for training. In: nothing. Out: flags, and the precision that is fast here."""

from __future__ import annotations

from pathlib import Path

BF16_FLAGS = ("avx512_bf16", "amx_bf16")
"""Of /proc/cpuinfo: instructions that multiply bfloat16. Without them a step in bfloat16 takes nine times as long as one in fp32 (measured
on an AVX2 EPYC, test_resnet-64: 27 : 234 samples/s a core), with them less."""


def cpu_flags() -> list[str]:
    """Flags of the first core; none where the system does not tell."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])


def fast_precision() -> str:
    """A value of ``train.precision`` for the CPU."""
    return "amp_bf16" if set(BF16_FLAGS) & set(cpu_flags()) else "fp32"
