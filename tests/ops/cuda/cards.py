"""A card of each architecture that the kernels are compiled for, as its driver describes it (CUDA programming guide,
"compute capabilities"; multiprocessors of the card named)."""

from fbn_plugin.ops.cuda.driver import Card

CARDS = {
    "sm_75": Card("sm_75", 40, 64 << 10, 64 << 10, 0, 65536, 1024, 16),  # T4
    "sm_80": Card("sm_80", 108, 163 << 10, 164 << 10, 1024, 65536, 2048, 32),  # A100
    "sm_86": Card("sm_86", 72, 99 << 10, 100 << 10, 1024, 65536, 1536, 16),  # A10
    "sm_89": Card("sm_89", 128, 99 << 10, 100 << 10, 1024, 65536, 1536, 24),  # RTX 4090
    "sm_90": Card("sm_90", 132, 227 << 10, 228 << 10, 1024, 65536, 2048, 32),  # H100
    "sm_100": Card("sm_100", 148, 227 << 10, 228 << 10, 1024, 65536, 2048, 32),  # B200
    "sm_120": Card("sm_120", 170, 99 << 10, 100 << 10, 1024, 65536, 1536, 24),  # RTX 5090
}
